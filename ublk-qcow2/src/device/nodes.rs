//! The two nodes of a device in /dev, and what is done through them.

use super::DeviceError;
use crate::wait;
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// How long the kernel may take to end the I/O of a server that died. Linux before 6.15 may begin after 30 s.
pub(super) const ORPHAN_WAIT: Duration = Duration::from_secs(90);
/// Between two questions whether it has.
pub(super) const ORPHAN_PAUSE: Duration = Duration::from_millis(10);
/// How long a device node may take to appear after the driver has made the device.
const NODE_WAIT: Duration = Duration::from_secs(10);
/// Between two attempts to open it.
const NODE_PAUSE: Duration = Duration::from_millis(5);

/// Where the kernel tells of the devices that the driver has.
const CHAR_DEVICES: &str = "/sys/class/ublk-char";

/// The node through which the device is used.
pub(crate) fn block_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

/// The node through which the device is served.
fn char_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkc{id}"))
}

/// The numbers of all devices of the driver, whoever serves them.
pub(crate) fn numbers() -> Vec<u32> {
    numbers_in(Path::new(CHAR_DEVICES))
}

fn numbers_in(directory: &Path) -> Vec<u32> {
    let names = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.to_str()?.strip_prefix("ublkc")?.parse().ok()).collect()
}

/// Opens the character device; see [`super::Device::open_char`].
pub(super) fn open_char(id: u32) -> Result<File, DeviceError> {
    wait_for_node(char_path(id), |path| {
        // A dead server may not have let go of it yet. Without O_NONBLOCK the kernel would have a thread of
        // its own read and write it, see `queue::payload`.
        until_let_go(io::Error::raw_os_error, || {
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
        })
    })
}

/// Waits until the node of the block device is there.
pub(super) fn wait_for_block(id: u32) -> Result<(), DeviceError> {
    wait_for_node(block_path(id), |path| fs::metadata(path).map(drop))
}

/// Tries until the node is there, and readable for us.
fn wait_for_node<T>(
    path: PathBuf,
    mut attempt: impl FnMut(&Path) -> io::Result<T>,
) -> Result<T, DeviceError> {
    let may_come = |outcome: &io::Result<T>| {
        let kind = outcome.as_ref().err().map(io::Error::kind);
        matches!(kind, Some(io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied))
    };
    wait::patiently(NODE_WAIT, NODE_PAUSE, may_come, || attempt(&path)).map_err(|source| {
        let is_missing = source.kind() == io::ErrorKind::NotFound;
        let hint = if is_missing { "; is a devtmpfs mounted on /dev, or does udev run?" } else { "" };
        DeviceError::Node { path, source, hint }
    })
}

/// Tries again while the kernel still has to do with a server that died, and so refuses with EBUSY.
pub(super) fn until_let_go<T, E>(
    errno_of: impl Fn(&E) -> Option<i32>,
    attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let is_busy =
        |outcome: &Result<T, E>| outcome.as_ref().is_err_and(|error| errno_of(error) == Some(libc::EBUSY));
    wait::patiently(ORPHAN_WAIT, ORPHAN_PAUSE, is_busy, attempt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_s_devices_are_known_by_their_names() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["ublkc3", "ublkc12", "ublkc", "ublkcx", "null"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let mut found = numbers_in(dir.path());
        found.sort_unstable();
        assert_eq!(found, [3, 12]);
        assert!(numbers_in(Path::new("/nowhere")).is_empty());
    }
}
