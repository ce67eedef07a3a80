//! The process that `add` leaves behind: it starts the server, and another one when that dies.
//!
//! ```text
//! add ── fork ── supervisor ── fork ── server            dies by a signal (or a panic, which aborts)
//!                    └──────── fork ── its successor     takes the device over
//! ```
//!
//! It does next to nothing, so that it outlives what may kill a server: no ring, no image, no device
//! and one thread, which is what makes the forks sound. It ends with the server that ends by itself. What a
//! new server that is killed before it serves has made it removes; a device that was to be recovered goes on waiting. A
//! server that dies again and again as soon as it serves is given up: its device waits for
//! `ublk-qcow2 recover` or `del`.

use crate::{
    control::Control,
    daemon::{self, Start},
    detach::{self, Reporter, Side},
    device,
    keep::Kept,
    namespace::{self, Namespace},
    runfile::{self, Entry, Phase, Record, RunFile},
    safety,
};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
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
/// Servers in a row that die younger before the device is left to its users.
const MAX_EARLY_DEATHS: u32 = 8;
/// The pause after the first of them; each later one is twice as long: 12.7 s in all.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// How long a server may take to write back and close that is to end as soon as it serves.
const STOP_WAIT: Duration = Duration::from_secs(600);
/// How often to look whether it has ended.
const LOOK: Duration = Duration::from_millis(10);

/// Serves in a child process, and in another one whenever that is killed. `reporter` learns how the
/// first one began.
pub(crate) fn run(start: &Start, reporter: Reporter) -> io::Result<()> {
    // Before the device can be mounted, and for all servers to come.
    let namespace = namespace::leave();
    safety::prepare();
    let mut reporter = Some(reporter);
    let (server, outcome) = start_server(start, namespace, &mut reporter)?;
    let Some(reporter) = reporter else { return Ok(()) };
    match start {
        Start::New { .. } => begin_new(server, outcome, namespace, reporter),
        &Start::Recover { id } => {
            match outcome {
                Ok(_) => drop(reporter.serving(id, &runfile::log_path(id))),
                Err(error) => reporter.failed_for_now(id, &error),
            }
            // It has users, whoever hears of it, and what they were told is written may be in its redo log only. A server
            // that was silent has been killed, or serves all the same; one that has failed has ended.
            watch(id, server, namespace);
        }
    }
    Ok(())
}

/// Goes on with a server that was to make a device, or with what it has left of one.
fn begin_new(server: Pid, outcome: Result<u32, String>, namespace: Namespace, reporter: Reporter) {
    match outcome {
        Ok(id) => match reporter.serving(id, &runfile::log_path(id)) {
            Ok(()) => watch(id, server, namespace),
            Err(error) => {
                tracing::error!(id, "nobody was told of the device, so it is detached again: {error}");
                stop(server);
            }
        },
        Err(error) => {
            remove_half_made(server);
            reporter.failed(&error);
        }
    }
}

/// Watches a server, and its successors, to the end.
fn watch(id: u32, mut server: Pid, namespace: Namespace) {
    let mut early_deaths = 0;
    let mut kept = Kept::of(id);
    loop {
        let begun = Instant::now();
        let Some(signal) = wait_for_death(server) else { return };
        early_deaths = if begun.elapsed() < SERVED { early_deaths + 1 } else { 0 };
        if early_deaths > MAX_EARLY_DEATHS {
            tracing::error!(
                id,
                "the server (process {server}) died by {signal}, as the {MAX_EARLY_DEATHS} before it: \
                 left to `ublk-qcow2 recover -n {id}` or `del -n {id}`"
            );
            return;
        }
        tracing::error!(id, "the server (process {server}) died by {signal}; recovering the device");
        if early_deaths > 0 {
            sleep(FIRST_PAUSE * (1 << (early_deaths - 1)));
        }
        server = match start_server(&Start::Recover { id }, namespace, &mut None) {
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
                tracing::error!(id, "cannot start another server: {error}; try `ublk-qcow2 recover -n {id}`");
                return;
            }
        };
    }
}

/// Starts a server. Returns when it serves, has failed, or has died. The server does not keep `ours`:
/// whoever listens there waits until nobody can speak any more.
fn start_server(
    start: &Start,
    namespace: Namespace,
    ours: &mut Option<Reporter>,
) -> io::Result<(Pid, Result<u32, String>)> {
    match detach::into_background()? {
        Side::Parent { child, outcome } => Ok((child, outcome)),
        Side::Child(reporter) => {
            *ours = None;
            process::exit(serve(start, namespace, reporter))
        }
    }
}

/// The server's whole life; returns its exit code.
pub(crate) fn serve(start: &Start, namespace: Namespace, reporter: Reporter) -> i32 {
    let mut reporter = Some(reporter);
    let result = daemon::run(start, namespace, |_, id| match reporter.take() {
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
    let deadline = Instant::now() + STOP_WAIT;
    while let Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) = waitpid(server, Some(WaitPidFlag::WNOHANG)) {
        if Instant::now() >= deadline {
            let seconds = STOP_WAIT.as_secs();
            tracing::error!(
                "the server (process {server}) has not ended within {seconds} s; it is left alone"
            );
            return;
        }
        sleep(LOOK);
    }
}

/// Waits for a server's end; the signal if it was killed.
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

/// Removes the device that a new server had made and did not come to serve.
fn remove_half_made(server: Pid) {
    if wait_for_death(server).is_none() {
        // It has ended by itself, and tidied up.
        return;
    }
    for Entry { record, .. } in runfile::load_all().unwrap_or_default() {
        if !is_half_made(&record, server) {
            continue;
        }
        let Record { id, cookie, .. } = record;
        // A server that lives has another process of this number.
        let Ok(run_file) = RunFile::take_over(id) else { continue };
        let removed = Control::open().and_then(|mut control| device::delete_left(&mut control, id, cookie));
        if let Err(error) = removed {
            tracing::error!("device {id} is left behind: {error}");
            run_file.leave();
        }
    }
}

/// Whether a record is that of a device which `server` has made and not served. The number of a process is given out again: a
/// device that waits for a successor may have had a server with it.
fn is_half_made(record: &Record, server: Pid) -> bool {
    let is_before_service = match record.phase {
        Phase::Preparing | Phase::Fetching | Phase::Fetched => true,
        Phase::Serving | Phase::Removing => false,
    };
    record.pid == server.as_raw() && is_before_service && !record.is_inherited
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{SigHandler, raise, signal};
    use std::env;

    /// `add` was started by a program that ignores SIGCHLD, as some do: the server was killed, and its supervisor took that for an
    /// end of its own and went away. Signals belong to a whole process, so one of its own takes the test.
    #[test]
    fn a_server_s_death_is_noticed_whatever_was_inherited() {
        const IS_CHILD: &str = "UBLK_QCOW2_TEST_IS_CHILD";
        if env::var_os(IS_CHILD).is_some() {
            #[allow(unsafe_code, reason = "in a process of its own")]
            // SAFETY: it installs no handler.
            unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.unwrap();
            match detach::into_background().unwrap() {
                Side::Parent { child, .. } => assert_eq!(wait_for_death(child), Some(Signal::SIGKILL)),
                Side::Child(_) => raise(Signal::SIGKILL).unwrap(),
            }
            return;
        }
        let mut child = process::Command::new(env::current_exe().unwrap());
        child.args(["--exact", "supervisor::tests::a_server_s_death_is_noticed_whatever_was_inherited"]);
        let ended = child.args(["--nocapture", "--test-threads=1"]).env(IS_CHILD, "").output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    }

    /// A successor was killed before it had said that it serves, and the device was deleted, with the redo log that had what its
    /// users had written.
    #[test]
    fn only_what_the_dead_server_has_made_itself_and_not_served_is_half_made() {
        let server = Pid::from_raw(41);
        let made = |phase| Record { pid: 41, phase, ..runfile::example() };
        for phase in [Phase::Preparing, Phase::Fetching, Phase::Fetched] {
            assert!(is_half_made(&made(phase), server), "{phase:?}");
            assert!(!is_half_made(&Record { is_inherited: true, ..made(phase) }, server), "{phase:?}");
            assert!(!is_half_made(&Record { pid: 42, ..made(phase) }, server), "{phase:?}");
        }
        for phase in [Phase::Serving, Phase::Removing] {
            assert!(!is_half_made(&made(phase), server), "{phase:?}");
        }
    }
}
