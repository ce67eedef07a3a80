//! The threads that serve a device, as seen by the one that commands it.
//!
//! [`Crew`] starts a thread per queue, hears of their ends and of the signals that end a service, and
//! waits for either, never without a bound while the device is being made or unmade.

use crate::{
    daemon::ServeError,
    deputy::Deputy,
    detach,
    device::{self, Device},
    queue::{self, Notice, Queue, QueueError, Search},
    request::{Bounds, device_sectors},
    runfile::{Phase, RunFile},
    safety,
};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use qcow2_engine::{Image, io::Files};
use std::{
    fs::File,
    io,
    path::Path,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How long the queues may take until all of them are ready to fetch, and then until they do.
const FETCH_WAIT: Duration = Duration::from_secs(30);
/// The signal that ends a service whatever is lost: none that a terminal sends, nor who shuts a host down.
const FORCING: Signal = Signal::SIGUSR1;
/// The same for who sends it.
pub(crate) const FORCING_SENT: rustix::process::Signal = rustix::process::Signal::USR1;

/// What all queues share.
pub(crate) struct Service {
    pub(crate) image: Arc<Image>,
    pub(crate) files: Arc<Files>,
    pub(crate) char_device: Arc<File>,
    /// When to look for what a crash has leaked.
    pub(crate) search: Search,
}

/// What the commanding thread waits for.
enum Event {
    Signal(Signal),
    Queue { index: u16, notice: Notice },
    Ended { index: u16, result: Result<(), QueueError> },
}

/// What ends a service that does not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// A signal: the device is to be stopped, if nothing is lost by that.
    Asked,
    /// Another signal: the device is to be stopped, whatever is lost.
    Forced,
    /// Somebody else has stopped the device.
    Stopped,
}

/// The queues' threads.
pub(crate) struct Crew {
    events: Receiver<Event>,
    to_events: Sender<Event>,
    threads: Vec<JoinHandle<()>>,
    /// Threads that have not ended.
    running: usize,
    /// Queues that have got ready to fetch.
    prepared: usize,
    /// Queues whose fetches the kernel has got.
    fetching: usize,
    is_failing: bool,
    failure: Option<ServeError>,
    signal: Option<Signal>,
}

impl Crew {
    /// A crew without threads. From now on the signals that end a service wait for [`Self::listen`]: all
    /// threads started later leave them alone.
    pub(crate) fn new() -> io::Result<Self> {
        ending_signals().thread_block()?;
        Ok(Self::deaf())
    }

    /// Hears of these signals from now on, and of those that have come meanwhile.
    pub(crate) fn listen(&self) -> io::Result<()> {
        let to_events = self.to_events.clone();
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            safety::keep_nothing();
            while let Ok(signal) = ending_signals().wait() {
                if to_events.send(Event::Signal(signal)).is_err() {
                    return;
                }
            }
        })?;
        Ok(())
    }

    fn deaf() -> Self {
        let (to_events, events) = mpsc::channel();
        let (threads, failure, signal) = (Vec::new(), None, None);
        Self {
            events,
            to_events,
            threads,
            running: 0,
            prepared: 0,
            fetching: 0,
            is_failing: false,
            failure,
            signal,
        }
    }

    /// Brings the device into service and says so. That nobody hears it is a reason not to serve a new
    /// device, but one that was taken over has users already.
    pub(crate) fn bring_up(
        &mut self,
        service: &Service,
        device: &mut Device,
        run_file: &mut RunFile,
        deputy: &mut Deputy,
        announce: impl FnOnce(&Path, u32) -> io::Result<()>,
    ) -> Result<(), ServeError> {
        let go = self.start(service, device)?;
        run_file.enter(Phase::Fetching)?;
        self.have_fetched(go)?;
        run_file.enter(Phase::Fetched)?;
        let is_in_use = device.is_waiting();
        self.start_device(device, deputy)?;
        let id = device.id();
        let unless_in_use = |outcome: Result<(), ServeError>| match outcome {
            Err(error) if is_in_use => {
                tracing::error!(id, "the device is served all the same: {error}");
                Ok(())
            }
            outcome => outcome,
        };
        unless_in_use(run_file.enter(Phase::Serving).map_err(ServeError::from))?;
        unless_in_use(announce(&device::block_path(id), id).map_err(ServeError::Unannounced))
    }

    /// Starts a thread per queue, and returns when all of them are ready to fetch, with the means to tell
    /// each to.
    fn start(&mut self, service: &Service, device: &Device) -> Result<Vec<Sender<()>>, ServeError> {
        let mut all = Vec::new();
        for index in 0..device.queues() {
            let (to_go, go) = mpsc::channel();
            all.push(to_go);
            let queue = Queue {
                index,
                depth: device.depth(),
                bounds: Bounds {
                    sectors: device_sectors(service.image.virtual_size()),
                    buffer_bytes: device.max_io_bytes(),
                },
                data_path: device.data_path(),
                char_device: Arc::clone(&service.char_device),
                image: Arc::clone(&service.image),
                files: Arc::clone(&service.files),
                search: service.search,
                go,
            };
            self.threads.push(spawn(queue, self.to_events.clone()).map_err(ServeError::SetUp)?);
            self.running += 1;
        }
        self.wait_until(|crew| crew.prepared == crew.threads.len())?;
        Ok(all)
    }

    /// Has all queues fetch, and returns when the kernel has got their fetches.
    fn have_fetched(&mut self, go: Vec<Sender<()>>) -> Result<(), ServeError> {
        // A queue whose thread has ended has said so.
        for go in go {
            let _ = go.send(());
        }
        self.wait_until(|crew| crew.fetching == crew.threads.len())
    }

    fn wait_until(&mut self, reached: impl Fn(&Self) -> bool) -> Result<(), ServeError> {
        let deadline = Instant::now() + FETCH_WAIT;
        while !reached(self) {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) => self.note(event),
                Err(_) => return Err(ServeError::TooSlow { what: "start", limit: FETCH_WAIT }),
            }
            self.check()?;
        }
        Ok(())
    }

    /// Starts the device, unless a queue fails or a signal comes meanwhile.
    fn start_device(&mut self, device: &mut Device, deputy: &mut Deputy) -> Result<(), ServeError> {
        let started = device.start(deputy, &mut || {
            while let Ok(event) = self.events.try_recv() {
                self.note(event);
            }
            self.check().is_err()
        });
        self.check()?;
        Ok(started?)
    }

    /// Lets others go first, for a while, unless something happens.
    pub(crate) fn rest(&mut self, limit: Duration) {
        if let Ok(event) = self.events.recv_timeout(limit) {
            self.note(event);
        }
    }

    /// Waits for what ends the service. Should it go on after a signal, that is forgotten.
    pub(crate) fn wait_for_end(&mut self) -> Result<End, ServeError> {
        loop {
            match self.signal.take() {
                Some(FORCING) => return Ok(End::Forced),
                Some(_) => return Ok(End::Asked),
                None => {}
            }
            match self.failure {
                _ if !self.is_failing => {}
                Some(_) => return Err(ServeError::QueueFailed),
                None => return Ok(End::Stopped),
            }
            match self.events.recv() {
                Ok(event) => self.note(event),
                // It cannot be: a sender is among our fields.
                Err(_) => return Err(ServeError::QueueFailed),
            }
        }
    }

    /// Waits for the queues to end, after the device has been stopped.
    pub(crate) fn drain(mut self, limit: Duration) -> Result<(), ServeError> {
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
            Event::Queue { notice: Notice::Prepared, .. } => self.prepared += 1,
            Event::Queue { notice: Notice::Fetching, .. } => self.fetching += 1,
            Event::Queue { index, notice: Notice::Failing(source) } => self.fail(index, source),
            Event::Ended { index, result } => {
                self.running -= 1;
                // A queue does not end well by itself, but when the device is stopped, by us or by somebody
                // else.
                self.is_failing = true;
                if let Err(source) = result {
                    self.fail(index, source);
                }
            }
        }
    }

    fn fail(&mut self, index: u16, source: QueueError) {
        self.is_failing = true;
        // Of a queue whose driver refuses one fetch all may be refused.
        if self.failure.is_none() {
            tracing::error!(queue = index, "the queue failed: {source}");
            self.failure = Some(ServeError::Queue { index, source });
        }
    }

    /// How the first queue failed that has, if any: all of them end well when somebody else stops the device.
    pub(crate) fn take_failure(&mut self) -> Option<ServeError> {
        self.failure.take()
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
            let _ = to_events.send(Event::Queue { index, notice });
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

/// A blocked signal is waited for even if it is ignored: what this process was told to ignore is left out.
/// SIGTERM is not, the way to end a server that has no terminal.
fn ending_signals() -> SigSet {
    let others = [Signal::SIGINT, Signal::SIGHUP].into_iter().filter(|&it| !detach::was_told_to_ignore(it));
    others.chain([Signal::SIGTERM, FORCING]).collect()
}

/// Takes a step that may be long and leaves nothing that has to be undone: before the crew listens the signals that
/// end a service end the process meanwhile. A thread that is started by it and goes on would be ended by them for ever.
pub(crate) fn interruptible<T>(step: impl FnOnce() -> T) -> io::Result<T> {
    let before = ending_signals().thread_swap_mask(SigmaskHow::SIG_UNBLOCK)?;
    let done = step();
    before.thread_set_mask()?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{alone, detach::Side};
    use nix::{
        sys::{
            signal::{SigHandler, kill, signal},
            wait::{WaitStatus, waitpid},
        },
        unistd::Pid,
    };
    use std::{process, thread};

    /// `add --foreground` could not be interrupted while it opened its image, which takes long if that has
    /// to be repaired first.
    #[test]
    fn a_server_that_opens_its_image_can_be_interrupted() {
        alone::run("crew::tests::a_server_that_opens_its_image_can_be_interrupted", || {
            let child = match detach::into_background().unwrap() {
                Side::Parent { child, .. } => child,
                Side::Child(_) => {
                    let _crew = Crew::new().unwrap();
                    let opening = thread::spawn(|| {
                        interruptible(|| {
                            kill(Pid::this(), Signal::SIGTERM).unwrap();
                            thread::sleep(Duration::from_secs(10));
                        })
                    });
                    process::exit(opening.join().map_or(2, |_| 1));
                }
            };
            assert!(matches!(waitpid(child, None), Ok(WaitStatus::Signaled(_, Signal::SIGTERM, _))));
        });
    }

    /// What else opens an image, as `del` does, has not blocked them.
    #[test]
    fn signals_are_afterwards_as_they_were() {
        let masks = |is_blocked: bool| {
            thread::spawn(move || {
                if is_blocked {
                    ending_signals().thread_block().unwrap();
                }
                let during = interruptible(|| SigSet::thread_get_mask().unwrap()).unwrap();
                [during, SigSet::thread_get_mask().unwrap()].map(|mask| mask.contains(Signal::SIGTERM))
            })
            .join()
            .unwrap()
        };
        assert_eq!((masks(true), masks(false)), ([false, true], [false, false]));
    }

    /// `nohup ublk-qcow2 add --foreground &` ended when its user logged out, and its device went.
    #[test]
    fn what_a_server_was_told_to_ignore_does_not_end_it() {
        alone::run("crew::tests::what_a_server_was_told_to_ignore_does_not_end_it", || {
            let (ignored, heeded) = (SigHandler::SigIgn, SigHandler::SigDfl);
            let told = [(Signal::SIGHUP, ignored), (Signal::SIGTERM, ignored), (Signal::SIGINT, heeded)];
            for (kind, disposition) in told {
                #[allow(unsafe_code, reason = "in a process of its own")]
                // SAFETY: it installs no handler.
                unsafe { signal(kind, disposition) }.unwrap();
            }
            // Its first thread is the one that has a crew, as in a server.
            let child = match detach::into_background().unwrap() {
                Side::Parent { child, .. } => child,
                Side::Child(_) => {
                    let heard = all_that_a_crew_hears();
                    process::exit(i32::from(heard != [Signal::SIGINT, Signal::SIGTERM]));
                }
            };
            assert!(matches!(waitpid(child, None), Ok(WaitStatus::Exited(_, 0))));
        });
    }

    fn all_that_a_crew_hears() -> Vec<Signal> {
        let crew = Crew::new().unwrap();
        crew.listen().unwrap();
        let sent = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM].into_iter();
        sent.filter_map(|sent| {
            kill(Pid::this(), sent).unwrap();
            match crew.events.recv_timeout(Duration::from_millis(500)) {
                Ok(Event::Signal(signal)) => Some(signal),
                _ => None,
            }
        })
        .collect()
    }

    /// Another program stopped the device: its queues ended well, but the record said "a queue failed",
    /// `list` that the device waits, and `del` failed, though there was nothing left to be done.
    #[test]
    fn a_device_that_somebody_else_stops_has_not_failed() {
        let end_with = |events: Vec<Event>| {
            let mut crew = Crew::deaf();
            crew.running = 2;
            events.into_iter().for_each(|event| crew.to_events.send(event).unwrap());
            crew.wait_for_end()
        };
        let ended = |result| Event::Ended { index: 0, result };
        assert!(matches!(end_with(vec![ended(Ok(()))]), Ok(End::Stopped)));
        assert!(matches!(end_with(vec![Event::Signal(Signal::SIGTERM)]), Ok(End::Asked)));
        assert!(matches!(end_with(vec![Event::Signal(FORCING)]), Ok(End::Forced)));
        let failed = end_with(vec![ended(Err(QueueError::Panicked))]);
        assert!(matches!(failed, Err(ServeError::QueueFailed)));
    }
}
