//! Waits with a bound.

use nix::{
    errno::Errno,
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::Pid,
};
use std::{
    io,
    sync::mpsc,
    thread::{self, sleep},
    time::{Duration, Instant},
};

/// Does what waits for requests to a device, which may hang. It goes on when its time is up, on its thread.
pub(crate) fn in_time(
    limit: Duration,
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<()> {
    let (done, outcome) = mpsc::channel();
    // There may be no thread left for it.
    thread::Builder::new().name("waiting".to_owned()).spawn(move || done.send(work()))?;
    let late = |_| Err(io::Error::new(io::ErrorKind::TimedOut, "it takes too long"));
    outcome.recv_timeout(limit).unwrap_or_else(late)
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

    /// `del` found no thread left for it (`ulimit -u`), and aborted.
    #[test]
    fn what_cannot_have_a_thread_fails() {
        alone::run("wait::tests::what_cannot_have_a_thread_fails", || {
            // No memory for its stack: a limit on threads is none for root.
            setrlimit(Resource::RLIMIT_AS, 0, 0).unwrap();
            let outcome = in_time(Duration::from_secs(60), || Ok(()));
            assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        });
    }
}
