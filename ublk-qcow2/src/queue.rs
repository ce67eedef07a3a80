//! One queue of a device: fetch, serve, commit.
//!
//! [`serve`] is the whole life of a queue's thread: it fetches with all tags, and from then on, for each
//! (`tags`): decodes the descriptor that the kernel has put into shared memory, has the engine do
//! the work, and commits the result, which is also the next fetch. The same ring carries these
//! commands and the image's I/O, so that they share system calls. Nothing here blocks.
//!
//! The end: once the device is stopped every fetch comes back with ENODEV. A tag that is at work
//! finishes its request first and learns it from its commit. When all queues have ended the daemon
//! closes the image.

#![allow(unsafe_code, reason = "the mapped descriptors, and submissions that name tags' buffers")]

mod buffers;
mod payload;
mod tags;

use crate::{
    config::Config,
    device::DataPath,
    errno::errno,
    request::{Bounds, DecodeError, Request},
    safety, uapi,
};
use io_uring::opcode;
use memmap2::{MmapOptions, MmapRaw};
use payload::{Announced, Payloads};
use qcow2_engine::{
    Image, Lane, Pace, Verdict, entry_for,
    exec::Executor,
    io::{
        Files,
        uring::{Target, Uring},
    },
};
use std::{
    cell::{Cell, RefCell},
    fs::File,
    future::{Future, poll_fn},
    io, mem,
    os::fd::AsFd,
    pin::{Pin, pin},
    rc::Rc,
    sync::{Arc, mpsc::Receiver},
    task::{Poll, Waker},
    time::{Duration, Instant},
};
use tags::{Failure, Tag};

/// Failed requests that a queue reports one by one; from then on only powers of two are.
const REPORTED_ERRORS: u64 = 16;
/// Between two passes of write-back and of giving freed clusters back.
const MAINTENANCE_PAUSE: Duration = Duration::from_secs(1);
/// Between two steps of the search for leaks, each of which takes a tenth of that.
const RECLAIM_REST: Duration = Duration::from_millis(1);
/// The same while the queue has requests, which wait for a step: a hundredth of the time is the search's.
const RECLAIM_REST_BUSY: Duration = Duration::from_millis(8);
/// The kernel's result for a command of a stopped queue.
const ABORTED: i32 = uapi::UBLK_IO_RES_ABORT;

/// What a queue's thread needs to know.
pub(crate) struct Queue {
    pub(crate) index: u16,
    pub(crate) depth: u16,
    pub(crate) bounds: Bounds,
    pub(crate) data_path: DataPath,
    pub(crate) char_device: Arc<File>,
    pub(crate) image: Arc<Image>,
    pub(crate) files: Arc<Files>,
    /// When to look for what a crash has leaked; queue 0 does it.
    pub(crate) search: Search,
    /// Says when to fetch; closed, not to fetch at all.
    pub(crate) go: Receiver<()>,
}

/// When the search for leaks begins, which gives back what a crash has left of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Search {
    Never,
    /// A little after the device has come into service: there may be none, and its first users should not wait.
    Later,
    /// At once: the server before was killed, and has left what it had in reserve. The next one, or a `del`, may come
    /// soon.
    AtOnce,
}

impl Search {
    /// This, unless leaks are left to others (`--no-reclaim`).
    pub(crate) fn if_wanted(self, config: &Config) -> Self {
        if config.reclaims { self } else { Self::Never }
    }
}

/// Why a queue ended other than by the device being stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueError {
    #[error("cannot set the queue up: {0}")]
    SetUp(io::Error),
    #[error("the queue's ring failed: {0}")]
    Ring(io::Error),
    #[error("the driver refused to fetch requests: {0}")]
    Fetch(io::Error),
    #[error("its thread panicked")]
    Panicked,
}

/// What a queue tells before its end.
#[derive(Debug)]
pub(crate) enum Notice {
    /// All is there that the queue needs to fetch.
    Prepared,
    /// The kernel has got the fetches of all tags: the device can be started.
    Fetching,
    /// A tag is lost; the others go on.
    Failing(QueueError),
}

/// Serves a queue until the device is stopped, on the thread that calls it.
pub(crate) fn serve(queue: &Queue, notify: impl Fn(Notice) + 'static) -> Result<(), QueueError> {
    // One entry per tag for its command, and as many again for its image I/O.
    let entries = (u32::from(queue.depth) * 2).next_power_of_two().max(64);
    let ring = Uring::new(Arc::clone(&queue.files), entries).map_err(QueueError::SetUp)?;
    let registered = ring.register_fd(queue.char_device.as_fd());
    let payloads = Payloads::new(queue, &ring, registered.target()).map_err(QueueError::SetUp)?;
    notify(Notice::Prepared);
    if queue.go.recv().is_err() {
        return Ok(());
    }
    // From here until all queues fetch a server should be quick: see `Phase::Fetching`.
    let descriptors = Descriptors::map(queue).map_err(QueueError::SetUp)?;
    let context = Rc::new(Context {
        index: queue.index,
        target: registered.target(),
        tags: (0..queue.depth).map(|_| Tag::new()).collect(),
        without_task: RefCell::default(),
        payloads,
        serving: Cell::new(queue.depth),
        drained: RefCell::new(None),
        lane: Lane::new(&queue.image, ring.clone(), usize::from(queue.depth)),
        bounds: queue.bounds,
        ring: ring.clone(),
        descriptors,
        errors: Cell::new(0),
        notify: Box::new(notify),
    });

    let executor = Executor::new(ring.clone());
    executor.spawn(Rc::clone(&context).serve_tags(executor.clone()));
    executor.spawn(Rc::clone(&context).report_fetching());
    if queue.index == 0 {
        executor.spawn(Rc::clone(&context).maintain());
        if queue.search != Search::Never {
            executor.spawn(Rc::clone(&context).reclaim_leaks(queue.search));
        }
    }
    executor.run().map_err(|error| {
        // The kernel may still move data. Dropped, the requests would let go of what they have reserved and
        // locked for it.
        mem::forget((executor, context));
        QueueError::Ring(error)
    })
}

/// What the tags of a queue share.
struct Context {
    index: u16,
    target: Target,
    tags: Box<[Tag]>,
    /// Tags that need a task for the first time.
    without_task: RefCell<Vec<u16>>,
    payloads: Payloads,
    /// Tags that have not ended.
    serving: Cell<u16>,
    /// Whoever waits for the last tag to end.
    drained: RefCell<Option<Waker>>,
    lane: Lane<Uring>,
    bounds: Bounds,
    ring: Uring,
    descriptors: Descriptors,
    errors: Cell<u64>,
    notify: Box<dyn Fn(Notice)>,
}

impl Context {
    /// The image's own work, beside the requests, until the last tag has ended.
    async fn maintain(self: Rc<Self>) {
        loop {
            let mut pause = pin!(self.ring.sleep(MAINTENANCE_PAUSE));
            let goes_on = poll_fn(|task| {
                if self.serving.get() == 0 {
                    return Poll::Ready(false);
                }
                self.drained.replace(Some(task.waker().clone()));
                pause.as_mut().poll(task).map(|_| true)
            });
            if !goes_on.await {
                return;
            }
            if let Err(error) = self.lane.maintain().await {
                self.report(&format_args!("maintenance failed: {error}"));
            }
        }
    }

    /// The search for leaks, once.
    async fn reclaim_leaks(self: Rc<Self>, when: Search) {
        let begun = Instant::now();
        while when == Search::Later && begun.elapsed() < MAINTENANCE_PAUSE {
            if !self.rest().await {
                return;
            }
        }
        match self.lane.reclaim_leaks(&*self).await {
            Err(error) => tracing::warn!("leaked clusters were not all given back: {error}"),
            Ok(done) => {
                let (freed, lowered) = (done.freed, done.lowered);
                if freed + lowered > 0 {
                    let bytes = freed * self.lane.image().geometry().cluster_size();
                    tracing::info!(freed, bytes, lowered, "gave back clusters that a crash had leaked");
                }
                if done.left > 0 {
                    tracing::info!(
                        left = done.left,
                        "clusters stay counted too often: run `ublk-qcow2 check --repair leaks`"
                    );
                }
                if let Verdict::Doubt(reason) = done.verdict {
                    tracing::warn!("the search for leaked clusters ended: {reason}; run `ublk-qcow2 check`");
                }
            }
        }
    }

    /// Spawned after the task that fetches: the kernel takes submissions in order, so when this no-op has
    /// completed it has the fetches that were queued before it.
    async fn report_fetching(self: Rc<Self>) {
        // SAFETY: a no-op names no memory.
        let no_op = unsafe { self.ring.submit(opcode::Nop::new().build(), None) };
        if no_op.await.is_ok() {
            // Not before: the driver has the partitions of a device looked for only if it trusts who fetches.
            safety::keep_nothing();
            (self.notify)(Notice::Fetching);
        }
    }

    fn depth(&self) -> u16 {
        // As many as the queue is deep.
        self.tags.len() as u16
    }

    fn tag(&self, number: u16) -> &Tag {
        &self.tags[usize::from(number)]
    }

    /// The request that a descriptor stands for, or what the kernel is to be told instead of a result.
    #[inline]
    fn request_of(&self, descriptor: &uapi::IoDesc) -> Result<Request, i32> {
        Request::decode(descriptor, self.bounds).map_err(|error| self.refused(error))
    }

    /// What the kernel is told of a request that it should not have made.
    #[cold]
    fn refused(&self, error: DecodeError) -> i32 {
        self.report(&format_args!("request refused: {error}"));
        match error {
            DecodeError::Operation(_) => -libc::EOPNOTSUPP,
            DecodeError::OutOfRange { .. } | DecodeError::TooLong(_) => -libc::EIO,
        }
    }

    /// A fetch, or a commit with `result` that fetches again; its end is reported under the tag's
    /// number.
    fn command(&self, code: u32, tag: u16, result: i32) {
        let Announced { buffer, registration } = self.payloads.announce(tag);
        let area = command_area(self.index, tag, result, buffer);
        let entry = entry_for!(self.target, |fd| {
            opcode::UringCmd16::new(fd, code).cmd(area).addr(registration).build()
        });
        // SAFETY: the only memory that the entry names is that buffer, which the ring keeps.
        unsafe { self.ring.submit_reporting(entry, u32::from(tag)) }
    }

    /// What the kernel is told of a request that could not be carried out.
    fn failed(&self, request: &Request, failure: &Failure) -> i32 {
        self.report(&format_args!("request failed: {request:?}: {failure}"));
        match failure {
            Failure::Image(error) => -errno(error.kind()),
            Failure::Copy(_) => -libc::EIO,
        }
    }

    /// Reports that something failed, unless so much has that it would flood the log.
    fn report(&self, what: &dyn std::fmt::Display) {
        let count = self.errors.get() + 1;
        self.errors.set(count);
        if count <= REPORTED_ERRORS || count.is_power_of_two() {
            tracing::error!(queue = self.index, count, "{what}");
        }
    }
}

/// The part of a queue's command that is the driver's own (`ublksrv_io_cmd`).
pub(crate) fn command_area(queue: u16, tag: u16, result: i32, buffer: u64) -> [u8; 16] {
    zerocopy::transmute!(uapi::IoCmd { q_id: queue, tag, result, addr: buffer })
}

impl Pace for Context {
    fn rest(&self) -> Pin<Box<dyn Future<Output = bool> + '_>> {
        let pause = if self.lane.is_idle() { RECLAIM_REST } else { RECLAIM_REST_BUSY };
        Box::pin(async move { self.ring.sleep(pause).await.is_ok() && self.serving.get() > 0 })
    }
}

/// The request descriptors of a queue, which the kernel writes before it completes a fetch.
struct Descriptors {
    map: MmapRaw,
    depth: u16,
}

impl Descriptors {
    fn map(queue: &Queue) -> io::Result<Self> {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.unwrap_or(4096) as usize;
        let size = size_of::<uapi::IoDesc>();
        // Each queue's array begins where one of the greatest possible depth would end.
        let stride = (usize::from(uapi::UBLK_MAX_QUEUE_DEPTH) * size).next_multiple_of(page);
        let map = MmapOptions::new()
            .offset(uapi::UBLKSRV_CMD_BUF_OFFSET + stride as u64 * u64::from(queue.index))
            .len((usize::from(queue.depth) * size).next_multiple_of(page))
            .populate()
            .map_raw_read_only(&*queue.char_device)?;
        Ok(Self { map, depth: queue.depth })
    }

    /// The descriptor of a tag whose fetch has completed.
    fn get(&self, tag: u16) -> uapi::IoDesc {
        assert!(tag < self.depth, "tag {tag} of a queue that is {} deep", self.depth);
        let array = self.map.as_ptr().cast::<uapi::IoDesc>();
        // SAFETY: the mapping has `depth` descriptors, is page-aligned, and holds integers only.
        // The kernel does not write to this one between the completion of the tag's fetch, which
        // has been seen, and the commit of its result.
        unsafe { array.add(usize::from(tag)).read_volatile() }
    }
}
