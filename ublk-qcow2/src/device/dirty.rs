//! What the kernel has in memory for a disk, and is to write before the disk goes: a device for recovery fails
//! whatever comes after the beginning of its stop.
//!
//! ```text
//! files ─ file system ─┐
//! pages ───────────────┴ /dev/dm-0 ─┐
//! pages ────────────────────────────┴ /dev/ublkb0p1 ─┐
//! pages ─────────────────────────────────────────────┴ /dev/ublkb0
//! ```
//!
//! Every node has pages of its own, and the files of a mounted file system are none of them: an fsync of
//! `/dev/ublkb0` reaches the lowest row alone. [`write_back`] goes from node to node, the upper ones first.
//! `BLKFLSBUF` has the kernel sync the file system that has claimed a node, or else the node's pages. It finds
//! the file system by the claim: syncfs takes a way to it, and this process has none, because mounts that
//! others make do not reach its namespace. The fsync after it tells of errors, and has the disk flush.
//!
//! Of two kinds of users neither the claims nor sysfs tell: a file system that has claimed its disks without
//! saying so (Btrfs, of which one may have many), and one on a loop device whose file is on the disk.
//! [`sync_everything`] is sync(2), which reaches all there is, and waits for all there is: for a file server
//! that is gone, or another device of ours that waits to be recovered. So nobody's wish to detach a free disk
//! depends on it: it is for disks that are taken from under their users, when the rest has been done.

#![allow(unsafe_code, reason = "an ioctl")]

use super::{DeviceError, nodes::block_path};
use crate::wait;
use nix::unistd::sync;
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

/// How long the kernel may take to write what it has for the disk.
const WRITE_BACK: Duration = Duration::from_secs(300);
/// How long everybody's disks may take.
const SYNC: Duration = Duration::from_secs(60);
/// How long opening a device may take.
const LOOK: Duration = Duration::from_secs(2);
/// Devices on devices on devices, at the most: partitions, LUKS, LVM.
const MAX_STACK: usize = 16;
/// Where the kernel tells of block devices.
const BLOCK_DEVICES: &str = "/sys/class/block";

mod ioctl {
    // `BLKFLSBUF`: sync, and let go of clean pages.
    nix::ioctl_none!(flush_buffers, 0x12, 97);
}

/// Has the kernel write what it has in memory for a disk, its partitions and what is built on them; waits for
/// requests to the disk.
pub(crate) fn write_back(id: u32) -> Result<(), DeviceError> {
    let path = block_path(id);
    let disk = format!("ublkb{id}");
    let fail = |source: io::Error| match source.kind() {
        io::ErrorKind::TimedOut => DeviceError::Late { path, limit: WRITE_BACK },
        _ => DeviceError::WriteBack { path, source },
    };
    wait::in_time(WRITE_BACK, move || write_all(&stack_on(&disk, Path::new(BLOCK_DEVICES)))).map_err(fail)
}

/// Has the kernel write all that it has in memory.
pub(crate) fn sync_everything(id: u32) -> Result<(), DeviceError> {
    let work = || {
        sync();
        Ok(())
    };
    wait::in_time(SYNC, work).map_err(|source| DeviceError::WriteBack { path: block_path(id), source })
}

/// Makes sure that a device is not mounted or claimed otherwise, nor are its partitions.
pub(crate) fn check_unclaimed(id: u32) -> Result<(), DeviceError> {
    let path = block_path(id);
    // For a block device O_EXCL means: fail if it is claimed. A device without a server may keep whoever opens
    // it waiting, but only if it is not claimed.
    let claimed = path.clone();
    let claim = move || OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(claimed);
    match wait::in_time(LOOK, move || claim().map(drop)) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(DeviceError::Claimed(path)),
        _ => Ok(()),
    }
}

/// The names of a block device and of what is built on it, the upper ones first.
fn stack_on(disk: &str, devices: &Path) -> Vec<String> {
    let mut found = Vec::new();
    gather(disk, devices, MAX_STACK, &mut found);
    found
}

fn gather(name: &str, devices: &Path, depth: usize, found: &mut Vec<String>) {
    let directory = devices.join(name);
    let partitions = names_in(&directory).filter(|name| directory.join(name).join("partition").exists());
    for above in partitions.chain(names_in(&directory.join("holders"))) {
        if depth > 0 && !found.contains(&above) {
            gather(&above, devices, depth - 1, found);
        }
    }
    found.push(name.to_owned());
}

fn names_in(directory: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// Goes on after a failure; tells of the first.
fn write_all(names: &[String]) -> io::Result<()> {
    let outcomes: Vec<_> = names.iter().map(|name| write(&node_of(name))).collect();
    outcomes.into_iter().collect()
}

/// In sysfs a name has no slash.
fn node_of(name: &str) -> PathBuf {
    Path::new("/dev").join(name.replace('!', "/"))
}

fn write(node: &Path) -> io::Result<()> {
    let write = || {
        let device = File::open(node)?;
        // SAFETY: the command names no memory; the descriptor is open for as long as it runs.
        unsafe { ioctl::flush_buffers(device.as_raw_fd()) }?;
        device.sync_all()
    };
    write().map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", node.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Partitions, and what is built on them, lost what lay in memory for them when their disk was detached:
    /// only the disk's own pages were written back.
    #[test]
    fn all_that_is_built_on_a_disk_is_written_before_what_it_is_built_on() {
        let dir = tempfile::tempdir().unwrap();
        let make = |path: &str| fs::create_dir_all(dir.path().join(path)).unwrap();
        for device in ["ublkb0/ublkb0p1", "ublkb0/ublkb0p2", "ublkb0/queue", "dm-0", "dm-1", "dm-2"] {
            make(&format!("{device}/holders"));
        }
        for partition in ["ublkb0p1", "ublkb0p2"] {
            let directory = dir.path().join("ublkb0").join(partition);
            fs::write(directory.join("partition"), "1").unwrap();
            symlink(directory, dir.path().join(partition)).unwrap();
        }
        // A file system's volume on both partitions, encrypted.
        for (below, above) in [("ublkb0p1", "dm-0"), ("ublkb0p2", "dm-0"), ("dm-0", "dm-1")] {
            symlink("anywhere", dir.path().join(below).join("holders").join(above)).unwrap();
        }
        let mut found = stack_on("ublkb0", dir.path());
        assert_eq!(found[..2], ["dm-1", "dm-0"]);
        assert_eq!(found[4], "ublkb0");
        found[2..4].sort();
        assert_eq!(found[2..4], ["ublkb0p1", "ublkb0p2"]);
    }

    #[test]
    fn who_fails_is_named_and_keeps_nobody_from_being_written() {
        let failed = write_all(&["nowhere!0".to_owned(), "null".to_owned()]).unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::NotFound);
        assert!(failed.to_string().starts_with("/dev/nowhere/0: "), "{failed}");
    }
}
