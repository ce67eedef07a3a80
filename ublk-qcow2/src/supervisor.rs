//! The process that `add` leaves behind: it starts the server, and another one when that dies.
//!
//! ```text
//! add ── fork ── supervisor ── fork ── server            dies by a signal (or a panic, which aborts)
//!                    └──────── fork ── its successor     takes the device over
//! ```
//!
//! It does next to nothing, so that it outlives what may kill a server: no ring, no image, no device and one
//! thread, which is what makes the forks sound. It ends with the server that ends by itself. What a new
//! server has made and not told of, be it killed or one of its queues failed, it removes; a device that was
//! to be recovered goes on waiting. A server that dies again and again as soon as it serves is given up, and so
//! is one that cannot be started for a while: its device waits for `ublk-qcow2 recover` or `del`.

use crate::{
    control::Control,
    daemon::{self, ServeError, Start},
    detach::{self, Reporter, Side, Unserved},
    device,
    keep::Kept,
    namespace::{self, Namespace},
    processes::Process,
    redofile,
    runfile::{self, Phase, Record, RunFile},
    safety, wait,
};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};
use std::{
    io, process,
    thread::sleep,
    time::{Duration, Instant},
};

/// A server that has served for this long died of something else than the requests that were waiting
/// for it: its death says nothing of the next one's.
const SERVED: Duration = Duration::from_millis(200);
/// Servers in a row that die younger, or cannot be started, before the device is left to its users.
const MAX_SETBACKS: u32 = 8;
/// The pause after the first of them; each later one is twice as long: 25.5 s in all.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// How long a server may take to write back and close that is to end as soon as it serves.
const STOP_WAIT: Duration = Duration::from_secs(600);
/// How long one may take to be gone that has failed before anybody was told of its device, or was killed.
const GONE_WAIT: Duration = Duration::from_secs(60);
/// How often to look whether it has ended.
const LOOK: Duration = Duration::from_millis(10);

/// Serves in a child process, and in another one whenever that is killed. `reporter` learns how the
/// first one began.
pub(crate) fn run(start: &Start, reporter: Reporter) -> io::Result<()> {
    // Before the device can be mounted, and for all servers to come.
    let (namespace, _hold) = namespace::leave(start.image().as_deref());
    safety::prepare();
    let mut reporter = Some(reporter);
    let (server, outcome) = start_server(start, namespace, &mut reporter)?;
    let Some(reporter) = reporter else { return Ok(()) };
    match *start {
        Start::New { cookie, .. } => begin_new(server, outcome, cookie, namespace, reporter),
        Start::Recover { id } => {
            match outcome {
                Ok(_) => drop(reporter.serving(id, &runfile::log_path(id))),
                Err(error) => reporter.failed_for_now(id, &error),
            }
            // It has users, whoever hears of it, and what they were told is written may be in its redo log
            // only. A server that was silent has been killed, or serves all the same; one that has failed has
            // ended.
            watch(id, server, namespace);
        }
    }
    Ok(())
}

/// Goes on with a server that was to make a device, or with what it has left of one.
fn begin_new(
    server: Pid,
    outcome: Result<u32, Unserved>,
    cookie: u64,
    namespace: Namespace,
    reporter: Reporter,
) {
    match outcome {
        Ok(id) => match reporter.serving(id, &runfile::log_path(id)) {
            Ok(()) => watch(id, server, namespace),
            Err(error) => {
                tracing::error!(id, "nobody was told of the device, so it is detached again: {error}");
                stop(server);
            }
        },
        Err(error) => {
            remove_unheard_of(server, cookie);
            reporter.failed(&error.to_string());
        }
    }
}

/// Watches a server, and its successors, to the end.
fn watch(id: u32, mut server: Pid, namespace: Namespace) {
    let mut setbacks = Setbacks::default();
    let mut kept = Kept::of(id);
    loop {
        let begun = Instant::now();
        let Some(signal) = wait_for_death(server) else { return };
        let lived = begun.elapsed();
        redofile::note_end(id);
        tracing::error!(id, "the server (process {server}) died by {signal}");
        if lived >= SERVED {
            setbacks = Setbacks::default();
        } else if setbacks.pause().is_err() {
            tracing::error!(id, "as the {MAX_SETBACKS} before it: {}", way_out(id));
            return;
        }
        tracing::info!(id, "recovering the device");
        server = match start_patiently(&mut setbacks, || {
            start_server(&Start::Recover { id }, namespace, &mut None)
        }) {
            Ok((server, Ok(_))) => {
                kept.renew();
                server
            }
            // The next wait finds how it ended: by itself, and then trying again is for somebody who has
            // read why, or by a signal once more.
            Ok((server, Err(error))) => {
                tracing::error!(id, "recovery failed: {error}");
                server
            }
            Err(error) => {
                tracing::error!(id, "cannot start another server: {error}: {}", way_out(id));
                return;
            }
        };
    }
}

fn way_out(id: u32) -> String {
    format!("the device is left to `ublk-qcow2 recover -n {id}` or `del -n {id}`")
}

/// Attempts in a row to have the device served that came to nothing.
#[derive(Default)]
struct Setbacks(u32);

/// There were too many.
struct GivenUp;

impl Setbacks {
    /// Counts one more, and waits before the next attempt.
    fn pause(&mut self) -> Result<(), GivenUp> {
        if self.0 == MAX_SETBACKS {
            return Err(GivenUp);
        }
        sleep(FIRST_PAUSE * (1 << self.0));
        self.0 += 1;
        Ok(())
    }
}

/// Starts a server, though there may be no process or no memory for it at the moment.
fn start_patiently<T>(setbacks: &mut Setbacks, mut start: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match start() {
            Err(error) => {
                tracing::warn!("cannot start a server: {error}");
                setbacks.pause().map_err(|GivenUp| error)?;
            }
            started => return started,
        }
    }
}

/// Starts a server. Returns when it serves, has failed, or has died. The server does not keep `ours`:
/// whoever listens there waits until nobody can speak any more.
fn start_server(
    start: &Start,
    namespace: Namespace,
    ours: &mut Option<Reporter>,
) -> io::Result<(Pid, Result<u32, Unserved>)> {
    let supervisor = Process::this()?;
    match detach::into_background()? {
        Side::Parent { child, outcome } => Ok((child, outcome)),
        Side::Child(reporter) => {
            *ours = None;
            process::exit(serve(start, namespace, Some(supervisor), reporter))
        }
    }
}

/// The server's whole life; returns its exit code.
pub(crate) fn serve(
    start: &Start,
    namespace: Namespace,
    supervisor: Option<Process>,
    reporter: Reporter,
) -> i32 {
    let mut reporter = Some(reporter);
    let result = daemon::run(start, namespace, supervisor, |_, id| match reporter.take() {
        Some(reporter) => reporter.serving(id, &runfile::log_path(id)),
        None => Ok(()),
    });
    match (result, reporter) {
        (Ok(()), _) => 0,
        (Err(error), Some(reporter)) => {
            reporter.failed(&error.to_string());
            1
        }
        (Err(error), None) => {
            tracing::error!("{error}");
            1
        }
    }
}

/// Has a server detach its device, and waits until it has.
fn stop(server: Pid) {
    // It is our child and was not waited for, so the number is its own even if it has ended.
    let _ = kill(server, Signal::SIGTERM);
    ends_within(server, STOP_WAIT);
}

/// Waits for a server's end, but not for ever.
fn ends_within(server: Pid, limit: Duration) -> bool {
    let has_ended = wait::ends_within(server, limit, LOOK);
    if !has_ended {
        let seconds = limit.as_secs();
        tracing::error!("the server (process {server}) has not ended within {seconds} s; it is left alone");
    }
    has_ended
}

/// Waits for the end of a server and of what it has begun; the signal if it was killed.
fn wait_for_death(server: Pid) -> Option<Signal> {
    loop {
        match waitpid(server, None) {
            Ok(WaitStatus::Signaled(_, signal, _)) => return Some(signal),
            Ok(WaitStatus::Exited(..)) => return None,
            Err(errno) if errno != Errno::EINTR => return None,
            _ => {}
        }
    }
}

/// Removes the device with this cookie, of which nobody was told: `server`, or the one that was to start it,
/// has died or said why not. A server that has ended in order has removed it.
pub(crate) fn remove_unheard_of(server: Pid, cookie: u64) {
    if !ends_within(server, GONE_WAIT) {
        return;
    }
    let Some(Record { id, .. }) = runfile::load_made(cookie) else { return };
    // A server that lives hears that nobody listens, and stops.
    let Ok(run_file) = RunFile::take_over(id) else { return };
    let record = run_file.record();
    // Somebody else has removed it, and the number has been given out again.
    let removed = if record.cookie == cookie { remove(record) } else { return run_file.leave() };
    if let Err(error) = removed {
        tracing::error!("device {id} is left behind: {error}; `ublk-qcow2 del -n {id}` removes it");
        run_file.leave();
    }
}

fn remove(record: &Record) -> Result<(), ServeError> {
    device::delete_left(&mut Control::open()?, record.id, record.cookie)?;
    match record.phase {
        // Somebody may have found it by himself, and have written to it.
        Phase::Serving if record.config.recovery => daemon::settle(record),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        alone,
        redofile::{RedoFile, RedoFileError},
        runfile::DIRECTORY_VARIABLE,
    };
    use nix::sys::signal::{SigHandler, raise, signal};
    use std::{fs, path::Path};

    /// `add` was started by a program that ignores SIGCHLD, as some do: the server was killed, and its
    /// supervisor took that for an end of its own and went away. Signals belong to a whole process, so one of
    /// its own takes the test.
    #[test]
    fn a_server_s_death_is_noticed_whatever_was_inherited() {
        alone::run("supervisor::tests::a_server_s_death_is_noticed_whatever_was_inherited", || {
            #[allow(unsafe_code, reason = "in a process of its own")]
            // SAFETY: it installs no handler.
            unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.unwrap();
            match detach::into_background().unwrap() {
                Side::Parent { child, .. } => assert_eq!(wait_for_death(child), Some(Signal::SIGKILL)),
                Side::Child(_) => raise(Signal::SIGKILL).unwrap(),
            }
        });
    }

    /// There was no process left for a moment, or no memory for one: the supervisor gave up, and the device's
    /// users waited until somebody came.
    #[test]
    fn a_server_that_cannot_be_started_is_tried_again() {
        let failing = |times: u32| {
            let mut made = 0;
            move || {
                made += 1;
                if made <= times { Err(io::Error::from(Errno::EAGAIN)) } else { Ok(made) }
            }
        };
        let mut setbacks = Setbacks::default();
        assert_eq!(start_patiently(&mut setbacks, failing(2)).unwrap(), 3);
        assert_eq!(setbacks.0, 2, "one that dies early then is the third");
        let mut setbacks = Setbacks(MAX_SETBACKS);
        assert!(start_patiently(&mut setbacks, failing(1)).is_err(), "but not for ever");
    }

    /// Runs a test in a process of its own that has a run directory of its own.
    fn alone_in_a_directory(test: &str, body: impl FnOnce(&Path)) {
        match alone::again(test) {
            Some(mut child) => {
                let dir = tempfile::tempdir().unwrap();
                alone::check(&child.env(DIRECTORY_VARIABLE, dir.path()).output().unwrap());
            }
            None => body(&runfile::directory()),
        }
    }

    /// A server of this device is killed. The next one finds no such device, and ends by itself.
    fn server_dies(id: u32) {
        match detach::into_background().unwrap() {
            Side::Parent { child, .. } => watch(id, child, Namespace::Shared),
            Side::Child(_) => raise(Signal::SIGKILL).unwrap(),
        }
    }

    /// The image's disk stalled, and its server was killed: what that had begun modified the image when the
    /// disk came back, half a minute after the server had last noted that the image was ours. The image was
    /// taken for changed by somebody else, and what had been acknowledged was given up.
    #[test]
    fn what_a_dead_server_had_begun_is_no_change_by_somebody_else() {
        let test = "supervisor::tests::what_a_dead_server_had_begun_is_no_change_by_somebody_else";
        alone_in_a_directory(test, |directory| {
            // Nothing is noted of it.
            let log = RedoFile::create(0).unwrap();
            let image = directory.join("image");
            fs::write(&image, "").unwrap();
            assert!(log.check_unchanged(&image).is_err());
            server_dies(0);
            assert!(log.check_unchanged(&image).is_ok());
        });
    }

    /// QEMU's tools changed an image a moment after its server had died: what that had acknowledged was replayed
    /// over it, because ten seconds were granted to what the server itself had begun.
    #[test]
    fn what_others_change_when_a_server_has_died_is_noticed_at_once() {
        let test = "supervisor::tests::what_others_change_when_a_server_has_died_is_noticed_at_once";
        alone_in_a_directory(test, |directory| {
            let mut record = runfile::example();
            let image = directory.join("image");
            record.config.image.clone_from(&image);
            fs::write(&image, "one").unwrap();
            fs::write(runfile::path_of(record.id), serde_json::to_string(&record).unwrap()).unwrap();
            let log = RedoFile::create(record.id).unwrap();
            drop(log.witness(&image).unwrap());
            let is_changed = || matches!(log.check_unchanged(&image), Err(RedoFileError::Changed { .. }));
            server_dies(record.id);
            assert!(!is_changed());
            sleep(Duration::from_millis(50)); // a tick of the clock by which files are modified
            fs::write(&image, "two").unwrap();
            assert!(is_changed());
            server_dies(record.id);
            assert!(is_changed(), "the second one had not come to open the image");
        });
    }
}
