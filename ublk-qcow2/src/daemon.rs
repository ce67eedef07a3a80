//! The serving process: from an image's path to a device and back.
//!
//! [`run`] reads top to bottom as the life of a server: open the image, make the device, start its
//! queues, start the device, say so, wait, stop, close, delete. Any step that fails undoes the ones
//! before. This thread commands the driver and serves nothing itself, because the driver's commands
//! wait for requests that the queues serve.

use crate::{
    control::{Control, ControlError},
    device::{self, Device, DeviceError, Shape},
    queue::{self, Notice, Queue, QueueError},
    request::{Bounds, device_sectors},
    runfile::{Record, RunFile, RunFileError},
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::signal::{SigSet, Signal},
};
use qcow2_engine::{
    BackingPolicy, Format, Image, Lane, OpenOptions,
    exec::block_on,
    io::{
        Files,
        files::{Caching, Locking},
        uring::Uring,
    },
};
use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Submission slots of the ring that opens the image.
const OPENING_RING: u32 = 64;
/// How long the queues may take until all of them fetch.
const FETCH_WAIT: Duration = Duration::from_secs(30);
/// How long the queues may take to finish their requests, write back and end, once the device has
/// been stopped.
const DRAIN_WAIT: Duration = Duration::from_secs(300);
/// The same when the device could not be stopped, so that they hardly will.
const HOPELESS_DRAIN_WAIT: Duration = Duration::from_secs(5);

/// What to serve, and how.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// The image, as an absolute path.
    pub(crate) image: PathBuf,
    pub(crate) id: Option<u32>,
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    pub(crate) read_only: bool,
    pub(crate) locking: Locking,
    pub(crate) cache_bytes: u64,
    pub(crate) caching: Caching,
    pub(crate) backing_format: Option<Format>,
    pub(crate) backing_policy: BackingPolicy,
}

/// Why a server could not start, or not end cleanly.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error(transparent)]
    Open(qcow2_engine::Error),
    #[error("closing the image failed: {0}")]
    Close(qcow2_engine::Error),
    #[error("{}: the image is empty, and a block device cannot be", .0.display())]
    Empty(PathBuf),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    RunFile(#[from] RunFileError),
    #[error("cannot start the server: {0}")]
    SetUp(#[source] io::Error),
    #[error("a queue failed")]
    QueueFailed,
    #[error("queue {index}: {source}")]
    Queue { index: u16, source: QueueError },
    #[error("the queues did not {what} within {} s", .limit.as_secs())]
    TooSlow { what: &'static str, limit: Duration },
    #[error("stopped by {0} before the device served I/O")]
    Interrupted(Signal),
    #[error("nobody was told of the device, so it was stopped: {0}")]
    Unannounced(io::Error),
}

/// What this thread waits for.
enum Event {
    Signal(Signal),
    Queue(Notice),
    Ended { index: u16, result: Result<(), QueueError> },
}

/// Serves an image until a signal ends it. `announce` is called once the device serves I/O; its
/// failure stops the device again.
pub(crate) fn run(
    config: &Config,
    announce: impl FnOnce(&Path, u32) -> io::Result<()>,
) -> Result<(), ServeError> {
    leave_mount_namespace();
    let (to_events, events) = mpsc::channel();
    watch_signals(to_events.clone()).map_err(ServeError::SetUp)?;
    let control = Control::open()?;
    let files = Arc::new(Files::with_locking(config.caching, config.locking));
    let image = open_image(config, &files)?;
    let shape = shape_of(&image, config)?;

    let wanted = device::Request { id: config.id, queues: config.queues, depth: config.depth };
    let mut device = Device::add(control, &wanted)?;
    device.describe(&shape)?;
    let run_file = RunFile::create(record(config, &device, &shape))?;
    let service = Service { image, files, char_device: Arc::new(device.open_char()?) };
    let mut queues = Queues::new(events);
    let started = queues.bring_up(&service, &mut device, &to_events, announce);
    let is_announced = started.is_ok();
    let served = started.and_then(|()| queues.wait_for_end());

    let stopped = device.stop().map_err(ServeError::from);
    let drained = queues.drain(if stopped.is_ok() { DRAIN_WAIT } else { HOPELESS_DRAIN_WAIT });
    // While a queue may still write the image cannot be closed; it is then as after a crash.
    let closed = if drained.is_ok() { close_image(&service) } else { Ok(()) };
    // The driver deletes a device when nobody has it open.
    drop(service);
    let deleted = device.delete().map_err(ServeError::from);
    // A failed queue is the cause of whatever else went wrong.
    let result = drained.and(served).and(closed).and(stopped).and(deleted);
    // Before the announcement the one who waits for it learns of the error; after, `del` does.
    if let (Err(error), true) = (&result, is_announced) {
        run_file.fail(error.to_string());
    }
    result
}

/// What all queues share.
struct Service {
    image: Arc<Image>,
    files: Arc<Files>,
    char_device: Arc<File>,
}

fn open_image(config: &Config, files: &Arc<Files>) -> Result<Arc<Image>, ServeError> {
    let ring = Uring::new(Arc::clone(files), OPENING_RING).map_err(ServeError::SetUp)?;
    let options = OpenOptions {
        read_only: config.read_only,
        cache_bytes: config.cache_bytes,
        backing_format: config.backing_format,
        backing_policy: config.backing_policy.clone(),
        ..OpenOptions::default()
    };
    block_on(&ring, Image::open(&ring, &**files, &config.image, &options))
        .map_err(ServeError::SetUp)?
        .map_err(ServeError::Open)
}

/// Makes everything durable and leaves no leak, when all queues have ended.
fn close_image(service: &Service) -> Result<(), ServeError> {
    let ring = Uring::new(Arc::clone(&service.files), OPENING_RING).map_err(ServeError::SetUp)?;
    let lane = Lane::new(&service.image, ring.clone(), 1);
    block_on(&ring, lane.close()).map_err(ServeError::SetUp)?.map_err(ServeError::Close)
}

fn shape_of(image: &Image, config: &Config) -> Result<Shape, ServeError> {
    let sectors = device_sectors(image.virtual_size());
    if sectors == 0 {
        return Err(ServeError::Empty(config.image.clone()));
    }
    Ok(Shape {
        sectors,
        // At most 2 MiB.
        cluster_bytes: image.geometry().cluster_size() as u32,
        read_only: image.is_read_only(),
        can_discard: image.can_discard(),
    })
}

fn record(config: &Config, device: &Device, shape: &Shape) -> Record {
    Record {
        id: device.id(),
        pid: std::process::id().cast_signed(),
        image: config.image.clone(),
        size: shape.sectors * 512,
        queues: device.queues(),
        depth: device.depth(),
        read_only: shape.read_only,
        error: None,
    }
}

/// The threads that serve, as seen by the one that commands.
struct Queues {
    events: Receiver<Event>,
    threads: Vec<JoinHandle<()>>,
    /// Threads that have not ended.
    running: usize,
    /// Queues whose fetches the kernel has got.
    fetching: usize,
    is_failing: bool,
    failure: Option<ServeError>,
    signal: Option<Signal>,
}

impl Queues {
    fn new(events: Receiver<Event>) -> Self {
        let (threads, failure, signal) = (Vec::new(), None, None);
        Self { events, threads, running: 0, fetching: 0, is_failing: false, failure, signal }
    }

    /// Brings the device into service and says so.
    fn bring_up(
        &mut self,
        service: &Service,
        device: &mut Device,
        to_events: &Sender<Event>,
        announce: impl FnOnce(&Path, u32) -> io::Result<()>,
    ) -> Result<(), ServeError> {
        self.start(service, device, to_events)?;
        self.start_device(device)?;
        announce(&device::block_path(device.id()), device.id()).map_err(ServeError::Unannounced)
    }

    /// Starts a thread per queue, and returns when all of them fetch.
    fn start(
        &mut self,
        service: &Service,
        device: &Device,
        to_events: &Sender<Event>,
    ) -> Result<(), ServeError> {
        for index in 0..device.queues() {
            let queue = Queue {
                index,
                depth: device.depth(),
                bounds: Bounds {
                    sectors: device_sectors(service.image.virtual_size()),
                    buffer_bytes: device.max_io_bytes(),
                },
                char_device: Arc::clone(&service.char_device),
                image: Arc::clone(&service.image),
                files: Arc::clone(&service.files),
            };
            self.threads.push(spawn(queue, to_events.clone()).map_err(ServeError::SetUp)?);
            self.running += 1;
        }
        let deadline = Instant::now() + FETCH_WAIT;
        while self.fetching < self.threads.len() {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) => self.note(event),
                Err(_) => return Err(ServeError::TooSlow { what: "start", limit: FETCH_WAIT }),
            }
            self.check()?;
        }
        Ok(())
    }

    /// Starts the device, unless a queue fails or a signal comes meanwhile.
    fn start_device(&mut self, device: &mut Device) -> Result<(), ServeError> {
        let started = device.start(&mut || {
            while let Ok(event) = self.events.try_recv() {
                self.note(event);
            }
            self.check().is_err()
        });
        self.check()?;
        Ok(started?)
    }

    /// Waits for the signal that ends the service.
    fn wait_for_end(&mut self) -> Result<(), ServeError> {
        while self.signal.is_none() {
            // It cannot fail: `run` holds a sender.
            if let Ok(event) = self.events.recv() {
                self.note(event);
            }
            if self.is_failing {
                return Err(ServeError::QueueFailed);
            }
        }
        Ok(())
    }

    /// Waits for the queues to end, after the device has been stopped.
    fn drain(mut self, limit: Duration) -> Result<(), ServeError> {
        let deadline = Instant::now() + limit;
        while self.running > 0 {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) => self.note(event),
                Err(_) => return Err(self.failure.unwrap_or(ServeError::TooSlow { what: "end", limit })),
            }
        }
        for thread in self.threads.drain(..) {
            // Its end has been reported already, a panic too.
            let _ = thread.join();
        }
        self.failure.map_or(Ok(()), Err)
    }

    fn note(&mut self, event: Event) {
        match event {
            Event::Signal(signal) => self.signal = Some(signal),
            Event::Queue(Notice::Fetching) => self.fetching += 1,
            Event::Queue(Notice::Failing) => self.is_failing = true,
            Event::Ended { index, result } => {
                self.running -= 1;
                // Until the device is stopped a queue does not end by itself.
                self.is_failing = true;
                if let Err(source) = result {
                    tracing::error!(queue = index, "the queue failed: {source}");
                    self.failure.get_or_insert(ServeError::Queue { index, source });
                }
            }
        }
    }

    /// Whether to go on starting.
    fn check(&self) -> Result<(), ServeError> {
        match self.signal {
            _ if self.is_failing => Err(ServeError::QueueFailed),
            Some(signal) => Err(ServeError::Interrupted(signal)),
            None => Ok(()),
        }
    }
}

/// Starts a queue's thread, which reports its end whatever that is.
fn spawn(queue: Queue, to_events: Sender<Event>) -> io::Result<JoinHandle<()>> {
    let name = format!("queue{}", queue.index);
    std::thread::Builder::new().name(name).spawn(move || {
        let index = queue.index;
        let mut ending =
            Ending { index, to_events: to_events.clone(), result: Some(Err(QueueError::Panicked)) };
        ending.result = Some(queue::serve(&queue, move |notice| {
            let _ = to_events.send(Event::Queue(notice));
        }));
        drop(queue);
        drop(ending);
    })
}

/// Reports a queue's end when dropped.
struct Ending {
    index: u16,
    to_events: Sender<Event>,
    result: Option<Result<(), QueueError>>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(result) = self.result.take() {
            let _ = self.to_events.send(Event::Ended { index: self.index, result });
        }
    }
}

/// Turns the signals that end a service into events. All threads started later leave them alone.
fn watch_signals(to_events: Sender<Event>) -> io::Result<()> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    signals.thread_block()?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        while let Ok(signal) = signals.wait() {
            if to_events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

/// Moves this process into a mount namespace of its own, which mounts made later do not reach. A
/// server whose namespace holds a mount of its own device could not exit: the last reference to
/// the mount goes with its process, and letting go of it needs the server.
fn leave_mount_namespace() {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    let result = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(None::<&str>, "/", None::<&str>, private, None::<&str>));
    if let Err(error) = result {
        tracing::warn!(
            "no mount namespace of its own: {error}; unmount the device before stopping the server"
        );
    }
}
