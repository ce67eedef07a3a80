//! The server's own view of the mounts.
//!
//! A server whose mount namespace holds a mount of its own device could not end: the last reference to
//! the mount goes with its process, and letting go of it needs the server. So a server moves into a
//! namespace of its own before its device can be mounted, which later mounts do not reach; and one that
//! takes over a device that is mounted already lets go of its own copies of those mounts.

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// Devices below devices below devices, at the most: partitions, LUKS, LVM.
const MAX_STACK: usize = 16;

/// Moves this process into a mount namespace of its own. It must have one thread.
pub(crate) fn leave() {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    let result = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(None::<&str>, "/", None::<&str>, private, None::<&str>));
    if let Err(error) = result {
        tracing::warn!(
            "no mount namespace of its own: {error}; unmount the device before stopping the server"
        );
    }
}

/// Lets go of the mounts in this process's own namespace that lie on block device `name`, or on one
/// that is built on it.
pub(crate) fn let_go_of(name: &str) {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mounts = table.split(|&byte| byte == b'\n').filter_map(parse);
    // The latest first: it may lie inside an earlier one.
    let mine: Vec<_> = mounts.filter(|(device, _)| lies_on(device, name)).collect();
    for (_, point) in mine.iter().rev() {
        if let Err(error) = umount2(point, MntFlags::MNT_DETACH) {
            tracing::warn!("cannot let go of the mount at {}: {error}", point.display());
        }
    }
}

/// Device number ("259:3") and mount point of a line of mountinfo.
fn parse(line: &[u8]) -> Option<(String, PathBuf)> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = String::from_utf8(fields.nth(2)?.to_vec()).ok()?;
    let point = fields.nth(1)?;
    Some((device, PathBuf::from(OsString::from_vec(unescape(point)))))
}

/// The kernel writes blanks and backslashes as three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|digits| digits.iter().all(|d| (b'0'..b'8').contains(d)));
        match (byte, digits) {
            (b'\\', Some(digits)) => {
                bytes.push(digits.iter().fold(0_u8, |value, d| value.wrapping_mul(8) + (d - b'0')));
                rest = &tail[3..];
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    bytes
}

/// Whether a device, by its number, is `name`, a partition of it, or built on it.
fn lies_on(device: &str, name: &str) -> bool {
    fs::canonicalize(Path::new("/sys/dev/block").join(device))
        .is_ok_and(|directory| is_built_on(&directory, name, MAX_STACK))
}

fn is_built_on(directory: &Path, name: &str, depth: usize) -> bool {
    if directory.iter().any(|part| part == name) {
        return true;
    }
    let slaves = fs::read_dir(directory.join("slaves")).into_iter().flatten().flatten();
    depth > 0
        && slaves
            .filter_map(|slave| fs::canonicalize(slave.path()).ok())
            .any(|below| is_built_on(&below, name, depth - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let line = b"36 35 259:3 / /mnt/a\\040b\\134c rw,noatime shared:1 - xfs /dev/ublkb0p1 rw";
        assert_eq!(parse(line), Some(("259:3".to_owned(), PathBuf::from("/mnt/a b\\c"))));
        assert_eq!(parse(b"36 35"), None);
        assert_eq!(unescape(b"x\\9\\04"), b"x\\9\\04");
    }

    #[test]
    fn partitions_and_what_is_built_on_them_belong_to_the_device() {
        let dir = tempfile::tempdir().unwrap();
        let partition = dir.path().join("block/ublkb0/ublkb0p1");
        let stacked = dir.path().join("block/dm-3");
        fs::create_dir_all(&partition).unwrap();
        fs::create_dir_all(stacked.join("slaves")).unwrap();
        std::os::unix::fs::symlink(&partition, stacked.join("slaves/ublkb0p1")).unwrap();
        for directory in [&partition, &stacked] {
            assert!(is_built_on(directory, "ublkb0", MAX_STACK));
            assert!(!is_built_on(directory, "ublkb1", MAX_STACK));
        }
    }
}
