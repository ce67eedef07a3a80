//! What loop devices are on.
//!
//! sysfs has the name of a loop device's file, as it was called where that was opened: the name may have been removed
//! since, or mean something else here. The kernel knows the file. It may ask the file's file system, which may be gone,
//! and nobody answer: so each is asked on a thread of its own, and for a short time.

use super::ioctl;
use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// How long all of them may take to answer.
const ANSWER: Duration = Duration::from_secs(2);

/// The numbers of the block devices that these loop devices are on, those that answer.
pub(super) fn bases(loops: impl IntoIterator<Item = PathBuf>) -> BTreeMap<PathBuf, u64> {
    let (to_us, answers) = mpsc::channel();
    for node in loops {
        let to_us = to_us.clone();
        let ask = move || base(&node).is_ok_and(|base| to_us.send((node, base)).is_ok());
        // Where there is no thread left for it the name has to do.
        let _ = thread::Builder::new().name("asking".to_owned()).spawn(ask);
    }
    drop(to_us);
    let deadline = Instant::now() + ANSWER;
    let next = || answers.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok();
    std::iter::from_fn(next).collect()
}

/// The block device that a loop device is on, or that the file system of its file is on. Where that is on none this is
/// no number of a block device.
fn base(node: &Path) -> io::Result<u64> {
    let status = ioctl::loop_status(&File::open(node)?)?;
    Ok(if status.lo_rdevice == 0 { status.lo_device } else { status.lo_rdevice })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_loop_device_says_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(base(file.path()).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert!(bases([file.path().to_owned(), "/nowhere".into()]).is_empty());
        assert!(bases([]).is_empty());
    }
}
