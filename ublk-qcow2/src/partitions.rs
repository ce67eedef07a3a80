//! Looking for a partition table on a device that has just come into service.
//!
//! Linux before 6.19 looks while it starts the device. Later kernels (and those of the long-term series 6.18
//! that have been given the same correction) do so some time after the start has returned, so whoever mounts
//! `/dev/ublkbNp1` on our word that the device serves might come too early. Where the driver leaves the scan
//! to its user (Linux 7.0) we have it made here, and wait for it. It reads through the queues, hence on a
//! thread of its own, with a bound, and not in the server (see `deputy`).

use crate::{
    device::reread_partitions,
    wait::{self, Bound},
};
use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// How long a scan may take; what it finds later is there later.
const LIMIT: Duration = Duration::from_secs(30);
/// How long somebody else may have claimed the device: who looks at it lets go at once, as udev does; who has
/// mounted it does not, and then it has no partitions.
const CLAIM_WAIT: Duration = Duration::from_secs(2);
/// Between two attempts meanwhile.
const PAUSE: Duration = Duration::from_millis(10);

/// Has the kernel look for partitions, and waits until it has.
pub(crate) fn scan(device: PathBuf) -> io::Result<()> {
    wait::in_time(LIMIT, Bound::Here, move || reread(&device))
        .unwrap_or_else(|error| Err(io::Error::other(error)))
}

fn reread(path: &Path) -> io::Result<()> {
    let device = File::open(path)?;
    let is_busy = |outcome: &io::Result<()>| {
        outcome.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
    };
    wait::patiently(CLAIM_WAIT, PAUSE, is_busy, || reread_partitions(&device))
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
