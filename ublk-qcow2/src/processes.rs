//! Processes that somebody signals or waits for who did not start them.
//!
//! `del` asks a server to stop, and returns when nothing is left that holds an image's file system: that server
//! and its supervisor, wherever they were started. The kernel gives the numbers of processes out again, hence
//! each is known by the moment of its birth too.

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process,
    time::Instant,
};

/// Where the moment of birth is in `/proc/PID/stat`, counted from the field after the name.
const START: usize = 19;

/// A process of this boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// When it was started, in the kernel's ticks.
    start: u64,
}

impl Process {
    /// This one.
    pub(crate) fn this() -> io::Result<Self> {
        Self::with(process::id().cast_signed())
    }

    /// Who has this number now.
    pub(crate) fn with(pid: i32) -> io::Result<Self> {
        let path = format!("/proc/{pid}/stat");
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, format!("{path} tells no start"));
        let start = start_in(&read_proc(Path::new(&path))?).ok_or_else(invalid)?;
        Ok(Self { pid, start })
    }

    /// Whether it has not ended, as far as is known.
    pub(crate) fn lives(self) -> bool {
        !self.ends_by(Instant::now()).unwrap_or(true)
    }

    /// Waits for its end, when it has let go of its files and mounts with all its threads; not longer than
    /// that. Whether it has ended.
    pub(crate) fn ends_by(self, deadline: Instant) -> io::Result<bool> {
        let Some(descriptor) = self.open()? else { return Ok(true) };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let limit = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut end = [PollFd::from_borrowed_fd(descriptor.as_fd(), PollFlags::IN)];
            match poll(&mut end, Some(&limit)) {
                Err(Errno::INTR) => {}
                ready => return Ok(ready? > 0),
            }
        }
    }

    /// Sends it a signal, and nobody who has got its number since. Whether it is there.
    pub(crate) fn send(self, signal: Signal) -> io::Result<bool> {
        let Some(descriptor) = self.open()? else { return Ok(false) };
        match pidfd_send_signal(descriptor, signal) {
            Err(Errno::SRCH) => Ok(false),
            sent => Ok(sent.map(|()| true)?),
        }
    }

    /// What stays its own whoever gets its number; nothing if it has ended.
    fn open(self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        let descriptor = match pidfd_open(pid, PidfdFlags::empty()) {
            // Nobody, or a thread, has the number.
            Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => return Ok(None),
            descriptor => descriptor?,
        };
        Ok((Self::with(self.pid).ok() == Some(self)).then_some(descriptor))
    }
}

/// Reads what is there wherever /proc is mounted, and says so where it is not.
pub(crate) fn read_proc(path: &Path) -> io::Result<String> {
    fs::read_to_string(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound if !Path::new("/proc/self").exists() => {
            io::Error::new(error.kind(), format!("{}: {error}; is /proc mounted?", path.display()))
        }
        _ => error,
    })
}

/// The name may have blanks and brackets in it.
fn start_in(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(START)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{process::Command, time::Duration};

    #[test]
    fn the_start_is_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 10\n";
        assert_eq!(start_in(stat), Some(4711));
        assert_eq!(start_in("7 (a) S 1"), None);
    }

    /// A record named a process that had ended, and whose number a stranger had by then: `del` ended that one.
    #[test]
    fn a_signal_reaches_nobody_who_has_only_the_number() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let it = Process::with(child.id().cast_signed()).unwrap();
        assert!(!Process { start: it.start - 1, ..it }.send(Signal::TERM).unwrap());
        assert!(!it.ends_by(Instant::now() + Duration::from_millis(50)).unwrap());
        assert!(it.send(Signal::TERM).unwrap());
        child.wait().unwrap();
        assert!(!it.send(Signal::TERM).unwrap());
    }

    /// `del` returned while server and supervisor were still on their way out, with the image's file system
    /// mounted in their namespace: who unmounted it, and made a new one on its disk, was told that the disk
    /// was in use.
    #[test]
    fn an_end_is_waited_for() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let it = Process::with(child.id().cast_signed()).unwrap();
        let soon = || Instant::now() + Duration::from_millis(20);
        assert!(!it.ends_by(soon()).unwrap());
        let before = Process { start: it.start - 1, ..it };
        assert!(before.ends_by(soon()).unwrap(), "it was another one with this number");
        child.kill().unwrap();
        // Its parent need not have asked how it ended.
        assert!(it.ends_by(Instant::now() + Duration::from_secs(30)).unwrap());
        child.wait().unwrap();
        assert!(it.ends_by(soon()).unwrap());
    }
}
