//! Looking for a partition table on a device that has just come into service.
//!
//! Linux up to 6.18 looks while it starts the device. Later kernels do so some time after the start has returned, so whoever mounts
//! `/dev/ublkbNp1` on our word that the device serves might come too early. Where the driver leaves the scan to its user
//! (Linux 7.0) we have it made here, and wait for it. It reads through the queues, hence on a thread of its own and with a bound.

#![allow(unsafe_code, reason = "an ioctl")]

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

/// How long a scan may take; what it finds later is there later.
const LIMIT: Duration = Duration::from_secs(30);
/// How often the wait looks whether it should be given up.
const SLICE: Duration = Duration::from_millis(100);
/// Between two attempts while somebody else has claimed the device.
const PAUSE: Duration = Duration::from_millis(10);

mod ioctl {
    // `BLKRRPART`: read the partition table again.
    nix::ioctl_none!(reread_partitions, 0x12, 95);
}

/// Has the kernel look for partitions, and waits until it has. That it fails is worth a line in the log, as it is where the
/// kernel looks by itself: the device serves without.
pub(crate) fn scan(device: PathBuf, give_up: &mut dyn FnMut() -> bool) {
    let (done, outcome) = mpsc::channel();
    let scanned = device.clone();
    thread::spawn(move || done.send(reread(&scanned)));
    let deadline = Instant::now() + LIMIT;
    let error = loop {
        match outcome.recv_timeout(SLICE) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => break error,
            Err(RecvTimeoutError::Disconnected) => break io::Error::other("the thread for it panicked"),
            Err(RecvTimeoutError::Timeout) if give_up() => return,
            Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                break io::Error::new(io::ErrorKind::TimedOut, "it takes too long");
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    };
    let path = device.display();
    tracing::warn!("{path}: partitions were not looked for: {error}; `blockdev --rereadpt {path}` does it");
}

fn reread(path: &Path) -> io::Result<()> {
    let device = File::open(path)?;
    let deadline = Instant::now() + LIMIT;
    loop {
        // SAFETY: the command names no memory; the descriptor is open for as long as it runs.
        match unsafe { ioctl::reread_partitions(device.as_raw_fd()) } {
            Ok(_) => return Ok(()),
            // An automounter, say, has it open for itself alone, and will let go.
            Err(nix::errno::Errno::EBUSY) if Instant::now() < deadline => thread::sleep(PAUSE),
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_partitions_is_told_so() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(reread(file.path()).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(reread(Path::new("/nowhere")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
