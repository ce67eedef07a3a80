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
//! Of one kind of users neither the claims nor [`stack`](super::stack) tell: a file system that has claimed its
//! disks without saying so (Btrfs, of which one may have many), and what is on that.
//! [`sync_everything`] is sync(2), which reaches all there is, and waits for all there is: for a file server
//! that is gone, or another device of ours that waits to be recovered. So nobody's wish to detach a free disk
//! depends on it: it is for disks that are taken from under their users, when the rest has been done.

use super::{
    DeviceError, ioctl,
    nodes::block_path,
    stack::{Layer, Machine, User, name_of},
};
use crate::{
    runfile::Entry,
    wait::{self, Bound, NoAnswer},
};
use nix::unistd::sync;
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    time::Duration,
};

/// How long the kernel may take to write what it has for the disk.
const WRITE_BACK: Duration = Duration::from_secs(300);
/// How long everybody's disks may take.
const SYNC: Duration = Duration::from_secs(60);
/// How long opening a device may take.
const LOOK: Duration = Duration::from_secs(2);

/// Why what lies in memory for a node is not written.
#[derive(Debug, thiserror::Error)]
enum Unwritten {
    /// Nothing was tried, and nothing is lost yet.
    #[error("{0}")]
    NotTried(io::Error),
    #[error("{0}")]
    Failed(io::Error),
}

/// Has the kernel write what it has in memory for a disk, its partitions and what is built on them; waits for
/// requests to the disk.
pub(crate) fn write_back(id: u32, bound: Bound) -> Result<(), DeviceError> {
    let path = block_path(id);
    let write = move || {
        // A device of ours on it to which no server comes back would keep us waiting for nothing.
        let machine = Machine::look(Entry::is_looked_after);
        write_all(&machine.stack_on(id), &machine)
    };
    match wait::in_time(WRITE_BACK, bound, write) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Unwritten::Failed(source))) => Err(DeviceError::WriteBack { path, source }),
        Ok(Err(Unwritten::NotTried(source))) => Err(DeviceError::NotBegun { path, source }),
        Err(NoAnswer::Late) => Err(DeviceError::Late { path, limit: WRITE_BACK }),
        Err(error @ NoAnswer::NotBegun(_)) => {
            Err(DeviceError::NotBegun { path, source: io::Error::other(error) })
        }
    }
}

/// Has the kernel write all that it has in memory.
pub(crate) fn sync_everything(id: u32, bound: Bound) -> Result<(), DeviceError> {
    let path = block_path(id);
    match wait::in_time(SYNC, bound, sync) {
        Ok(()) => Ok(()),
        Err(error @ NoAnswer::NotBegun(_)) => {
            Err(DeviceError::NotBegun { path, source: io::Error::other(error) })
        }
        Err(error) => Err(DeviceError::WriteBack { path, source: io::Error::other(error) }),
    }
}

/// Makes sure that a device is not mounted or claimed otherwise, nor are its partitions, and that no other device is
/// built on it.
pub(crate) fn check_unused(id: u32, bound: Bound) -> Result<(), DeviceError> {
    let path = block_path(id);
    let machine = Machine::look(Entry::needs_its_image);
    if let Some(by) = machine.stack_on(id).into_iter().find_map(|layer| layer.user) {
        return Err(DeviceError::Used { path, by });
    }
    let node = path.clone();
    // For a block device O_EXCL means: fail if it is claimed.
    let claim = move || OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(node).map(drop);
    judge(wait::in_time(LOOK, bound, claim), || machine.has(&name_of(id)), path)
}

/// What an attempt to claim a device says of it.
fn judge(
    claimed: Result<io::Result<()>, NoAnswer>,
    is_there: impl FnOnce() -> bool,
    path: PathBuf,
) -> Result<(), DeviceError> {
    let source = match claimed {
        // A device without a server may keep whoever opens it waiting, but only if it is not claimed.
        Ok(Ok(())) | Err(NoAnswer::Late) => return Ok(()),
        Ok(Err(error)) => error,
        Err(error) => io::Error::other(error),
    };
    match source.raw_os_error() {
        Some(libc::EBUSY) => Err(DeviceError::Used { path, by: User::Claim }),
        _ if is_of_nothing(&source, is_there) => Ok(()),
        _ => Err(DeviceError::Unclear { path, source }),
    }
}

/// Whether a node could not be opened because its device is stopped or gone; not because this process's /dev does
/// not have it.
fn is_of_nothing(error: &io::Error, is_there: impl FnOnce() -> bool) -> bool {
    match error.raw_os_error() {
        Some(libc::ENXIO | libc::ENODEV) => true,
        Some(libc::ENOENT) => !is_there(),
        _ => false,
    }
}

/// Goes on after a failure; tells of one that can be made up for, or else of the first.
fn write_all(layers: &[Layer], machine: &Machine) -> Result<(), Unwritten> {
    let mut failures: Vec<_> = layers.iter().filter_map(|layer| write(&layer.name, machine).err()).collect();
    failures.sort_by_key(|failure| matches!(failure, Unwritten::Failed(_)));
    failures.into_iter().next().map_or(Ok(()), Err)
}

fn write(name: &str, machine: &Machine) -> Result<(), Unwritten> {
    let node = machine.node_of(name);
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", node.display()));
    let device = match File::open(&node) {
        // Nor is there anything in memory for it.
        Err(error) if is_of_nothing(&error, || machine.has(name)) => return Ok(()),
        device => device.map_err(|error| Unwritten::NotTried(named(error)))?,
    };
    ioctl::flush_buffers(&device)
        .and_then(|()| device.sync_all())
        .map_err(|error| Unwritten::Failed(named(error)))
}

#[cfg(test)]
mod tests {
    use super::{super::stack::tests::machine, *};
    use std::{fs, os::unix::fs::symlink};

    #[test]
    fn who_fails_is_named_and_keeps_nobody_from_being_written() {
        let dir = tempfile::tempdir().unwrap();
        for directory in ["sys/nowhere!1", "dev"] {
            fs::create_dir_all(dir.path().join(directory)).unwrap();
        }
        for name in ["null", "full"] {
            symlink(format!("/dev/{name}"), dir.path().join("dev").join(name)).unwrap();
        }
        let machine = machine(dir.path(), Vec::new());
        let write = |names: &[&str]| {
            let layer = |name: &&str| Layer { name: (*name).to_owned(), user: None };
            write_all(&names.iter().map(layer).collect::<Vec<_>>(), &machine)
        };
        let failed = write(&["null", "full"]).unwrap_err();
        assert!(matches!(&failed, Unwritten::Failed(_)), "{failed:?}");
        assert!(failed.to_string().contains("/dev/null: "), "{failed}");
        assert!(write(&["nowhere!0"]).is_ok(), "there is no such device");
        let untried = write(&["null", "nowhere!1"]).unwrap_err();
        assert!(matches!(&untried, Unwritten::NotTried(_)), "{untried:?}");
        assert!(untried.to_string().contains("/dev/nowhere/1: "), "{untried}");
    }

    /// Where there was no thread, or the node was not in this /dev, a mounted device counted as free, and was taken
    /// from under its user.
    #[test]
    fn only_what_is_known_to_be_unclaimed_counts_as_such() {
        let judged = |claimed, is_there| judge(claimed, || is_there, block_path(7));
        let refused = |errno, is_there| judged(Ok(Err(io::Error::from_raw_os_error(errno))), is_there);
        assert!(judged(Ok(Ok(())), true).is_ok());
        assert!(judged(Err(NoAnswer::Late), true).is_ok(), "it has no server");
        for errno in [libc::ENXIO, libc::ENODEV] {
            assert!(refused(errno, true).is_ok(), "it is stopped");
        }
        assert!(refused(libc::ENOENT, false).is_ok(), "it is gone");
        assert!(matches!(refused(libc::EBUSY, true), Err(DeviceError::Used { by: User::Claim, .. })));
        let no_thread = judged(Err(NoAnswer::NotBegun(io::ErrorKind::WouldBlock.into())), true);
        for unclear in [no_thread, refused(libc::ENOENT, true), refused(libc::EPERM, true)] {
            assert!(matches!(unclear, Err(DeviceError::Unclear { .. })), "{unclear:?}");
        }
    }
}
