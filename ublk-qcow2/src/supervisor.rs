//! The process that `add` leaves behind: it starts the server, and another one when that dies.
//!
//! ```text
//! add ── fork ── supervisor ── fork ── server            dies by a signal (or a panic, which aborts)
//!                    └──────── fork ── its successor     takes the device over
//! ```
//!
//! It does next to nothing, so that it outlives what may kill a server: no ring, no device, of the image but a
//! descriptor, and one thread, which is what makes the forks sound. It ends with the server that ends by itself.
//! What a new server has made and not told of, be it killed or one of its queues failed, it removes; a device that
//! was to be recovered goes on waiting. If there is no successor to be had, because each dies as soon as it serves,
//! fails to take the device over or cannot even be started, it goes on trying ([`Setbacks`]), until somebody
//! else has the device or takes it away.

mod setbacks;
mod write_back;

use crate::{
    control::Control,
    daemon::{self, ServeError, Settled, Start},
    detach::{self, Reporter, Side, Unserved},
    device,
    keep::Kept,
    namespace::{self, Namespace},
    orphans,
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
use setbacks::Setbacks;
use std::{
    io, process,
    time::{Duration, Instant},
};
use write_back::WriteBack;

/// A server that has served for this long died of something else than the requests that were waiting
/// for it: its death says nothing of the next one's.
const SERVED: Duration = Duration::from_millis(200);
/// How long a server may take to write back and close that is to end as soon as it serves.
const STOP_WAIT: Duration = Duration::from_secs(600);
/// How long one may take to be gone that has failed before anybody was told of its device, or was killed.
const GONE_WAIT: Duration = Duration::from_secs(60);
/// How often to look whether it has ended.
const LOOK: Duration = Duration::from_millis(10);
/// With this exit code a server says that its device is not there to be recovered, by nobody.
const NOTHING_LEFT: i32 = 2;

/// Serves in a child process, and in another one whenever that is killed. `reporter` learns how the
/// first one began.
pub(crate) fn run(start: &Start, reporter: Reporter) -> io::Result<()> {
    // Before the device can be mounted, and for all servers to come.
    let (namespace, _hold) = namespace::leave(start.image().as_deref());
    safety::prepare();
    let mut reporter = Some(reporter);
    let started = start_server(start, namespace, &mut reporter);
    let Some(reporter) = reporter else { return Ok(()) };
    let server = match started {
        Ok(server) => server,
        Err(error) => {
            reporter.failed(&format!("cannot start a server: {error}"));
            return Err(error);
        }
    };
    match *start {
        Start::New { cookie, .. } => begin_new(server, cookie, namespace, reporter),
        Start::Recover { id } => begin_again(id, server, namespace, reporter),
    }
    Ok(())
}

/// Goes on with a server that was to make a device, or with what it has left of one.
fn begin_new(server: Attempt, cookie: u64, namespace: Namespace, reporter: Reporter) {
    match &server.outcome {
        &Ok(id) => match reporter.serving(id, &runfile::log_path(id)) {
            Ok(()) => watch(id, server, namespace),
            Err(error) => {
                tracing::error!(id, "nobody was told of the device, so it is detached again: {error}");
                stop(server.pid);
            }
        },
        Err(error) => {
            remove_unheard_of(server.pid, cookie);
            reporter.failed(&error.to_string());
        }
    }
}

/// Goes on with a server that was to take a device over. That has users, whoever hears of it, and what they were
/// told is written may be in its redo log only. A server that was silent has been killed, or serves all the same.
fn begin_again(id: u32, server: Attempt, namespace: Namespace, reporter: Reporter) {
    match &server.outcome {
        Ok(_) => drop(reporter.serving(id, &runfile::log_path(id))),
        Err(error) => reporter.failed_for_now(id, error),
    }
    // Trying again is for who has just read why it does not work.
    if !matches!(server.outcome, Err(Unserved::Failed(_))) {
        watch(id, server, namespace);
    }
}

/// Watches a server, and its successors, until there is nothing more to be served, or by somebody else.
fn watch(id: u32, mut server: Attempt, namespace: Namespace) {
    let cookie = runfile::load(id).ok().flatten().map(|entry| entry.record.cookie);
    let is_over = || is_over(id, cookie);
    let mut setbacks = Setbacks::default();
    let mut kept = Kept::of(id);
    let write_back = WriteBack::of(id);
    // Until the server dies it holds the same program, and who has attached the device may go first.
    if let Err(error) = wait::until_end_of(server.pid, safety::LEISURE) {
        tracing::warn!(id, "cannot wait for a while: {error}");
    }
    safety::hold_program();
    loop {
        let end = server.end(id);
        if end != End::Regular {
            write_back.judge(id);
        }
        match end {
            End::Regular => return,
            End::Killed(signal) => {
                tracing::error!(id, "the server (process {}) died by {signal}", server.pid);
                setbacks = Setbacks::default();
            }
            End::Setback(reason) => setbacks.note(id, reason),
        }
        let start = || start_server(&Start::Recover { id }, namespace, &mut None);
        let Some(next) = setbacks::start_patiently(id, &mut setbacks, is_over, start) else { return };
        server = next;
        if server.outcome.is_ok() {
            tracing::info!(id, "the device has been recovered");
            kept.renew();
        }
    }
}

/// Whether nobody waits for another server of ours: the device is gone, or another's, or somebody else takes it
/// away or serves it.
fn is_over(id: u32, cookie: Option<u64>) -> bool {
    match runfile::load(id) {
        Ok(None) => true,
        Ok(Some(entry)) => {
            Some(entry.record.cookie) != cookie || entry.record.phase == Phase::Removing || entry.serves()
        }
        // Whoever takes it over will say so.
        Err(_) => false,
    }
}

/// A server that was started, and what it has come to at first.
struct Attempt {
    pid: Pid,
    outcome: Result<u32, Unserved>,
    since: Instant,
}

/// How a server has ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// By itself, as it should, or so that another one can do nothing more.
    Regular,
    /// It had served, and what ended it says nothing of the next one.
    Killed(Signal),
    /// The device waits, and why.
    Setback(String),
}

impl Attempt {
    /// Waits for its end, and for that of what it has begun.
    fn end(&self, id: u32) -> End {
        let status = wait_for_end(self.pid);
        let lived = self.since.elapsed();
        if let Some(WaitStatus::Signaled(..)) = status {
            redofile::note_end(id);
        }
        match (status, &self.outcome) {
            (Some(WaitStatus::Signaled(_, signal, _)), outcome) => match outcome {
                Err(Unserved::Failed(error)) => End::Setback(format!("recovery failed: {error}")),
                // No request brings that about, and the OOM killer passes servers by.
                Ok(_) if signal == Signal::SIGKILL => End::Killed(signal),
                _ if lived >= SERVED => End::Killed(signal),
                _ => End::Setback(format!("a server died by {signal} as soon as it was started")),
            },
            (Some(WaitStatus::Exited(_, code)), Err(Unserved::Failed(error))) if code != NOTHING_LEFT => {
                End::Setback(format!("recovery failed: {error}"))
            }
            (_, Err(Unserved::Failed(error))) => {
                tracing::error!(id, "there is nothing to be recovered: {error}");
                End::Regular
            }
            _ => End::Regular,
        }
    }
}

/// Starts a server. Returns when it serves, has failed, or has died. The server does not keep `ours`:
/// whoever listens there waits until nobody can speak any more.
fn start_server(start: &Start, namespace: Namespace, ours: &mut Option<Reporter>) -> io::Result<Attempt> {
    let supervisor = Process::this()?;
    match detach::into_background()? {
        Side::Parent { child, outcome } => Ok(Attempt { pid: child, outcome, since: Instant::now() }),
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
            if error.leaves_nothing() { NOTHING_LEFT } else { 1 }
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

/// Waits for the end of a server and of what it has begun.
fn wait_for_end(server: Pid) -> Option<WaitStatus> {
    loop {
        match waitpid(server, None) {
            Ok(status @ (WaitStatus::Signaled(..) | WaitStatus::Exited(..))) => return Some(status),
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
    let Some(Record { id, .. }) = runfile::load_made(cookie) else {
        // It may have been killed before it could write one.
        if let Err(error) = orphans::remove_made(cookie) {
            tracing::error!("a device is left behind: {error}");
        }
        return;
    };
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
        Phase::Serving if record.config.recovery => {
            if let Settled::Lost(what) = daemon::settle(record)? {
                tracing::error!(id = record.id, "{what}");
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        alone,
        redofile::{RedoFile, RedoFileError},
    };
    use nix::{
        fcntl::{Flock, FlockArg},
        sys::signal::{SigHandler, raise, signal},
    };
    use std::{
        collections::BTreeSet,
        fs::{self, File},
        thread::{self, sleep},
    };

    fn begun(pid: Pid, outcome: Result<u32, Unserved>) -> Attempt {
        Attempt { pid, outcome, since: Instant::now() }
    }

    /// A server that dies by a signal.
    fn dying(by: Signal) -> Attempt {
        match detach::into_background().unwrap() {
            Side::Parent { child, outcome } => begun(child, outcome),
            Side::Child(_) => {
                raise(by).unwrap();
                unreachable!("nobody survives that")
            }
        }
    }

    /// Who killed servers as soon as they served, over and over, waited a quarter of a minute for the next.
    #[test]
    fn a_server_that_is_killed_soon_has_a_successor_at_once() {
        let test = "supervisor::tests::a_server_that_is_killed_soon_has_a_successor_at_once";
        alone::in_a_directory(test, |_| {
            let end_of = |signal, outcome| Attempt { outcome, ..dying(signal) }.end(7);
            assert_eq!(end_of(Signal::SIGKILL, Ok(7)), End::Killed(Signal::SIGKILL));
            let crashed = end_of(Signal::SIGABRT, Ok(7));
            assert!(matches!(&crashed, End::Setback(_)), "{crashed:?}");
            let unserved = end_of(Signal::SIGKILL, Err(Unserved::Silent));
            assert!(matches!(&unserved, End::Setback(_)), "{unserved:?}");
        });
    }

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
                Side::Parent { child, .. } => {
                    let end = wait_for_end(child);
                    assert!(matches!(end, Some(WaitStatus::Signaled(_, Signal::SIGKILL, _))), "{end:?}");
                }
                Side::Child(_) => raise(Signal::SIGKILL).unwrap(),
            }
        });
    }

    /// The image's disk stalled, and its server was killed: what that had begun modified the image when the
    /// disk came back, half a minute after the server had last noted that the image was ours. The image was
    /// taken for changed by somebody else, and what had been acknowledged was given up.
    #[test]
    fn what_a_dead_server_had_begun_is_no_change_by_somebody_else() {
        let test = "supervisor::tests::what_a_dead_server_had_begun_is_no_change_by_somebody_else";
        alone::in_a_directory(test, |directory| {
            // Nothing is noted of it.
            let log = RedoFile::create(0).unwrap();
            let image = directory.join("image");
            fs::write(&image, "").unwrap();
            assert!(log.check_unchanged(&image).is_err());
            // Without a record the next server ends by itself.
            watch(0, dying(Signal::SIGKILL), Namespace::Shared);
            assert!(log.check_unchanged(&image).is_ok());
        });
    }

    /// QEMU's tools changed an image a moment after its server had died: what that had acknowledged was replayed
    /// over it, because ten seconds were granted to what the server itself had begun.
    #[test]
    fn what_others_change_when_a_server_has_died_is_noticed_at_once() {
        let test = "supervisor::tests::what_others_change_when_a_server_has_died_is_noticed_at_once";
        alone::in_a_directory(test, |directory| {
            let mut record = runfile::example();
            let (id, image) = (record.id, directory.join("image"));
            record.config.image.clone_from(&image);
            fs::write(&image, "one").unwrap();
            fs::write(runfile::path_of(id), serde_json::to_string(&record).unwrap()).unwrap();
            let log = RedoFile::create(id).unwrap();
            drop(log.witness(&image).unwrap());
            let is_changed = || matches!(log.check_unchanged(&image), Err(RedoFileError::Changed { .. }));
            dying(Signal::SIGKILL).end(id);
            assert!(!is_changed());
            sleep(Duration::from_millis(50)); // a tick of the clock by which files are modified
            fs::write(&image, "two").unwrap();
            assert!(is_changed());
            dying(Signal::SIGKILL).end(id);
            assert!(is_changed(), "the second one had not come to open the image");
        });
    }

    /// A successor could not take the device over, because the image's file system was gone for a moment, say:
    /// that ended the supervisor, and the device's users waited until somebody came.
    #[test]
    fn a_failed_recovery_is_not_the_last_as_long_as_the_device_waits() {
        let test = "supervisor::tests::a_failed_recovery_is_not_the_last_as_long_as_the_device_waits";
        alone::in_a_directory(test, |_| {
            let record = runfile::example();
            let (id, path) = (record.id, runfile::path_of(record.id));
            fs::write(&path, serde_json::to_string(&record).unwrap()).unwrap();
            // Each of the servers puts itself into the record, and none has a driver.
            let watcher = thread::spawn(move || {
                let mut servers = BTreeSet::new();
                let deadline = Instant::now() + Duration::from_secs(20);
                while servers.len() < 4 && Instant::now() < deadline {
                    servers.extend(runfile::load(id).unwrap().map(|entry| entry.record.pid));
                    sleep(Duration::from_millis(1));
                }
                let before = Instant::now();
                fs::remove_file(path).unwrap();
                (servers.len(), before)
            });
            match detach::into_background().unwrap() {
                Side::Parent { child, outcome } => watch(id, begun(child, outcome), Namespace::Shared),
                Side::Child(_) => raise(Signal::SIGKILL).unwrap(),
            }
            let (servers, removed) = watcher.join().unwrap();
            assert_eq!(servers, 4, "the one before, and three attempts");
            assert!(removed.elapsed() < Duration::from_secs(5), "it goes on though the device is gone");
        });
    }

    #[test]
    fn who_has_the_device_by_now_decides_whether_another_server_is_needed() {
        let test = "supervisor::tests::who_has_the_device_by_now_decides_whether_another_server_is_needed";
        alone::in_a_directory(test, |_| {
            let record = runfile::example();
            let (id, cookie) = (record.id, Some(record.cookie));
            let write = |record: &Record| {
                fs::write(runfile::path_of(id), serde_json::to_string(record).unwrap()).unwrap();
            };
            assert!(is_over(id, cookie), "it is gone");
            write(&record);
            assert!(!is_over(id, cookie), "it waits");
            assert!(is_over(id, Some(record.cookie - 1)), "it is another's");
            write(&Record { phase: Phase::Removing, ..record.clone() });
            assert!(is_over(id, cookie), "somebody takes it away");
            write(&record);
            let file = File::open(runfile::path_of(id)).unwrap();
            let _served = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
            assert!(is_over(id, cookie), "somebody else serves it");
        });
    }
}
