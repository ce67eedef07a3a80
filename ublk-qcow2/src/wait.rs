//! Waits with a bound.

use nix::{
    errno::Errno,
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::Pid,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{PidfdFlags, pidfd_open},
};
use std::{
    io,
    sync::mpsc,
    thread::{self, sleep},
    time::{Duration, Instant},
};

/// Who bounds a wait when there is no thread left for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bound {
    /// Nobody: it is not begun.
    Here,
    /// Whoever waits for this process: it is done by the caller's thread.
    Elsewhere,
}

/// Why it is not known how something went.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoAnswer {
    #[error("there is no thread for it: {0}")]
    NotBegun(io::Error),
    #[error("it takes too long")]
    Late,
}

/// Does what waits for requests to a device, which may hang. It goes on when its time is up, on its thread.
pub(crate) fn in_time<T: Send + 'static>(
    limit: Duration,
    bound: Bound,
    work: impl FnOnce() -> T + Clone + Send + 'static,
) -> Result<T, NoAnswer> {
    let (done, outcome) = mpsc::channel();
    let kept = work.clone();
    match (thread::Builder::new().name("waiting".to_owned()).spawn(move || done.send(work())), bound) {
        (Ok(_), _) => outcome.recv_timeout(limit).map_err(|_| NoAnswer::Late),
        (Err(_), Bound::Elsewhere) => Ok(kept()),
        (Err(error), Bound::Here) => Err(NoAnswer::NotBegun(error)),
    }
}

/// Tries until the outcome is none that passes with time, but not longer than that: then the last one counts.
pub(crate) fn patiently<T>(
    limit: Duration,
    pause: Duration,
    passes: impl Fn(&T) -> bool,
    mut attempt: impl FnMut() -> T,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        let outcome = attempt();
        if !passes(&outcome) || Instant::now() >= deadline {
            return outcome;
        }
        sleep(pause);
    }
}

/// Whether a child of this process has ended in time, by looking so often.
pub(crate) fn ends_within(child: Pid, limit: Duration, look: Duration) -> bool {
    let lives = |state: &_| matches!(state, Ok(WaitStatus::StillAlive) | Err(Errno::EINTR));
    !lives(&patiently(limit, look, lives, || waitpid(child, Some(WaitPidFlag::WNOHANG))))
}

/// Waits until a child of this process has ended, of which it may be asked afterwards, or its time is up.
pub(crate) fn until_end_of(child: Pid, limit: Duration) -> io::Result<()> {
    let child = rustix::process::Pid::from_raw(child.as_raw()).ok_or(io::ErrorKind::InvalidInput)?;
    let descriptor = pidfd_open(child, PidfdFlags::empty())?;
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone;
    use nix::sys::resource::{Resource, setrlimit};

    #[test]
    fn what_passes_is_sat_out_and_nothing_else() {
        let attempts = |passing: u32, limit| {
            let mut made = 0;
            let outcome = patiently(
                limit,
                Duration::from_millis(1),
                |made| *made < passing,
                || {
                    made += 1;
                    made
                },
            );
            assert_eq!(outcome, made);
            made
        };
        assert_eq!(attempts(1, Duration::from_secs(60)), 1);
        assert_eq!(attempts(3, Duration::from_secs(60)), 3);
        assert_eq!(attempts(2, Duration::ZERO), 1, "there is one attempt in any case");
        assert!(attempts(u32::MAX, Duration::from_millis(20)) > 1);
    }

    /// `del` found no thread left for it (`ulimit -u`), and aborted. Later it took that for an answer: a mounted
    /// device for one that nobody uses, and what had not been written back for lost.
    #[test]
    fn what_cannot_have_a_thread_is_not_begun_or_done_where_somebody_else_bounds_it() {
        let test = "what_cannot_have_a_thread_is_not_begun_or_done_where_somebody_else_bounds_it";
        alone::run(&format!("wait::tests::{test}"), || {
            // No memory for its stack: a limit on threads is none for root.
            setrlimit(Resource::RLIMIT_AS, 0, 0).unwrap();
            let outcome = |bound| in_time(Duration::from_secs(60), bound, || 7);
            assert!(matches!(outcome(Bound::Here), Err(NoAnswer::NotBegun(_))));
            assert!(matches!(outcome(Bound::Elsewhere), Ok(7)));
        });
    }

    #[test]
    fn who_waits_for_a_child_s_end_for_a_while_has_not_heard_of_it() {
        alone::run("wait::tests::who_waits_for_a_child_s_end_for_a_while_has_not_heard_of_it", || {
            let of = |life: &str| {
                let mut child = std::process::Command::new("sleep").arg(life).spawn().unwrap();
                let begun = Instant::now();
                until_end_of(Pid::from_raw(child.id() as i32), Duration::from_millis(300)).unwrap();
                let waited = begun.elapsed();
                let has_ended = child.try_wait().unwrap().map(|status| status.success());
                let _ = child.kill();
                let _ = child.wait();
                (waited, has_ended)
            };
            let (waited, has_ended) = of("0");
            assert_eq!(has_ended, Some(true), "after {waited:?}");
            let (waited, has_ended) = of("60");
            assert!(waited >= Duration::from_millis(300) && has_ended.is_none(), "{waited:?} {has_ended:?}");
        });
    }

    #[test]
    fn what_takes_too_long_is_late() {
        let outcome = in_time(Duration::ZERO, Bound::Elsewhere, || sleep(Duration::from_secs(1)));
        assert!(matches!(outcome, Err(NoAnswer::Late)));
    }
}
