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
    thread::spawn(move || done.send(work()));
    let late = |_| Err(io::Error::new(io::ErrorKind::TimedOut, "it takes too long"));
    outcome.recv_timeout(limit).unwrap_or_else(late)
}

/// Whether a child of this process has ended in time, by looking so often.
pub(crate) fn ends_within(child: Pid, limit: Duration, look: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while let Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) = waitpid(child, Some(WaitPidFlag::WNOHANG)) {
        if Instant::now() >= deadline {
            return false;
        }
        sleep(look);
    }
    true
}
