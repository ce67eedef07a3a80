//! The server's own view of the mounts.
//!
//! A server whose mount namespace holds a mount of its own device could not end: the last reference to
//! the mount goes with its process, and letting go of it needs the server. So a server moves into a
//! namespace of its own before its device can be mounted, which later mounts do not reach; and one that
//! takes over a device that is mounted already lets go of its own copies of those mounts.
//!
//! The namespace begins as a copy of the caller's. What is in it stays mounted, whoever unmounts it
//! elsewhere: so when all is open only the mounts stay that lead to the files of the image
//! ([`Namespace::keep_ways_to`]), for a successor to open them again. Elsewhere nothing would show that they
//! are in use: the caller's mount of the image's file system is held ([`Hold`]), so that it cannot be
//! unmounted under the image, as for everybody who has a file open.

use crate::device::MAX_STACK;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, open, statx};
use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs, io,
    os::{fd::OwnedFd, unix::ffi::OsStringExt},
    path::{Path, PathBuf},
};

/// Symbolic links on the way to a file, at the most: the kernel's own limit.
const MAX_LINKS: usize = 40;
/// What every server needs, beside its image.
const SYSTEM: [&str; 4] = ["/", "/proc", "/sys", "/dev"];

/// Whose mounts this process sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Namespace {
    /// Its own: what it unmounts is unmounted nowhere else.
    Own,
    /// Everybody's.
    Shared,
}

/// Keeps the caller's mount of the file system busy that an image lies on.
pub(crate) struct Hold {
    _file: Option<OwnedFd>,
}

/// A line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    number: u64,
    parent: u64,
    /// Device number, such as "259:3".
    device: String,
    point: PathBuf,
}

/// Moves this process into a mount namespace of its own, and holds the file system of its image in the one
/// that it leaves. It must have one thread.
pub(crate) fn leave(image: Option<&Path>) -> (Namespace, Hold) {
    let hold = Hold::of(image);
    (leave_mounts(), hold)
}

fn leave_mounts() -> Namespace {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    let result = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(None::<&str>, "/", None::<&str>, private, None::<&str>));
    match result {
        Ok(()) => Namespace::Own,
        Err(error) => {
            tracing::warn!(
                "no mount namespace of its own: {error}; unmount the device before stopping the server"
            );
            Namespace::Shared
        }
    }
}

impl Hold {
    /// An image that cannot be found is found missing when it is to be opened.
    fn of(image: Option<&Path>) -> Self {
        let open = |image: &Path| open(image, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        Self { _file: image.and_then(|image| open(image).ok()) }
    }
}

impl Namespace {
    /// Lets go of the mounts that lie on block device `name`, or on one that is built on it.
    pub(crate) fn let_go_of(self, name: &str) {
        let mounts = mounts();
        let mine = mounts.iter().filter(|mount| lies_on(&mount.device, name)).collect();
        self.unmount(mine);
    }

    /// Lets go of all mounts but the system's and those on the ways to these files.
    pub(crate) fn keep_ways_to(self, files: &[PathBuf]) {
        let system = SYSTEM.iter().map(PathBuf::from).filter(|path| path.exists());
        let ways: io::Result<Vec<_>> =
            system.chain(files.iter().cloned()).map(|path| mounts_along(&path)).collect();
        match ways {
            Ok(ways) => {
                let mounts = mounts();
                self.unmount(unneeded(&mounts, ways.into_iter().flatten().collect()));
            }
            Err(error) => {
                tracing::warn!(
                    "mounts are kept that are not needed: {error}; they stay when unmounted elsewhere"
                );
            }
        }
    }

    /// The latest first: it may lie inside an earlier one.
    fn unmount(self, mounts: Vec<&Mount>) {
        if self == Self::Shared {
            return;
        }
        for mount in mounts.into_iter().rev() {
            let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
            if let Err(error) = umount2(&mount.point, flags) {
                tracing::warn!("cannot let go of the mount at {}: {error}", mount.point.display());
            }
        }
    }
}

fn mounts() -> Vec<Mount> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    table.split(|&byte| byte == b'\n').filter_map(parse).collect()
}

/// The mounts that are not `wanted`, nor is anything inside them, as far as their path leads to them.
fn unneeded(mounts: &[Mount], mut wanted: BTreeSet<u64>) -> Vec<&Mount> {
    // What is inside comes later in the table, unless it was moved there.
    while {
        let around = mounts.iter().filter(|mount| wanted.contains(&mount.number)).map(|mount| mount.parent);
        let before = wanted.len();
        wanted.extend(around.collect::<Vec<_>>());
        wanted.len() > before
    } {}
    mounts.iter().filter(|it| !wanted.contains(&it.number) && !is_hidden(it, mounts)).collect()
}

/// Whether another mount lies over a directory on the way, so that the path leads elsewhere.
fn is_hidden(it: &Mount, mounts: &[Mount]) -> bool {
    let is_over = |other: &&Mount| {
        // The first root of a machine is its own parent.
        other.parent == it.parent
            && other.number != it.parent
            && other.point != it.point
            && it.point.starts_with(&other.point)
    };
    let around = mounts.iter().find(|other| other.number == it.parent && other.number != it.number);
    mounts.iter().find(is_over).is_some() || around.is_some_and(|around| is_hidden(around, mounts))
}

/// The numbers of the mounts that a path leads through, by way of symbolic links too.
fn mounts_along(path: &Path) -> io::Result<BTreeSet<u64>> {
    let mut mounts = BTreeSet::from([mount_of(Path::new("/"))?]);
    let mut at = PathBuf::from("/");
    let mut rest = parts_of(path);
    let mut links = 0;
    while let Some(part) = rest.pop() {
        if part == ".." {
            at.pop();
            continue;
        }
        let next = at.join(&part);
        mounts.insert(mount_of(&next)?);
        match fs::read_link(&next) {
            Ok(target) => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(io::Error::from_raw_os_error(libc::ELOOP));
                }
                if target.is_absolute() {
                    at = PathBuf::from("/");
                }
                rest.extend(parts_of(&target));
            }
            Err(_) => at = next,
        }
    }
    Ok(mounts)
}

/// The names in a path, the last first.
fn parts_of(path: &Path) -> Vec<OsString> {
    let names = path.iter().filter(|part| *part != "/" && *part != ".");
    let mut parts: Vec<_> = names.map(OsStr::to_owned).collect();
    parts.reverse();
    parts
}

fn mount_of(path: &Path) -> io::Result<u64> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    Ok(statx(CWD, path, flags, StatxFlags::MNT_ID)?.stx_mnt_id)
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mut text = || String::from_utf8(fields.next()?.to_vec()).ok();
    let (number, parent) = (text()?.parse().ok()?, text()?.parse().ok()?);
    let device = text()?;
    let point = fields.nth(1)?;
    Some(Mount { number, parent, device, point: PathBuf::from(OsString::from_vec(unescape(point))) })
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
    use crate::alone;

    fn mount_at(number: u64, parent: u64, point: &str) -> Mount {
        Mount { number, parent, device: "259:3".to_owned(), point: point.into() }
    }

    /// `umount` of the file system on which a served image lies succeeded, and the server wrote on, to a file
    /// system that was mounted nowhere for all that anybody could see.
    #[test]
    fn the_file_system_of_an_image_cannot_be_unmounted() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        // A thread may have mounts of its own, but its owner must be privileged; the device cases do this
        // too.
        if leave(None).0 == Namespace::Shared {
            return alone::skip("a mounted file system of an image: no namespace of mounts can be had");
        }
        mount(None::<&str>, dir.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write(&image, "").unwrap();
        let hold = std::thread::scope(|scope| scope.spawn(|| leave(Some(&image)).1).join().unwrap());
        assert_eq!(umount2(dir.path(), MntFlags::empty()), Err(nix::errno::Errno::EBUSY));
        drop(hold);
        umount2(dir.path(), MntFlags::empty()).unwrap();
    }

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let line = b"36 35 259:3 / /mnt/a\\040b\\134c rw,noatime shared:1 - xfs /dev/ublkb0p1 rw";
        assert_eq!(parse(line), Some(mount_at(36, 35, "/mnt/a b\\c")));
        assert_eq!(parse(b"36 35"), None);
        assert_eq!(unescape(b"x\\9\\04"), b"x\\9\\04");
    }

    #[test]
    fn what_is_wanted_stays_with_what_is_around_it() {
        let mounts = [
            mount_at(1, 1, "/"),
            mount_at(2, 1, "/dev"),
            mount_at(3, 2, "/dev/pts"),
            mount_at(4, 1, "/data"),
            mount_at(5, 4, "/data/images"),
            mount_at(6, 4, "/data/other"),
            // Two at one place, of which the later one is seen.
            mount_at(7, 1, "/home"),
            mount_at(8, 7, "/home"),
            // Out of reach: /srv lies over it.
            mount_at(9, 1, "/srv/hidden"),
            mount_at(10, 9, "/srv/hidden/deep"),
            mount_at(11, 1, "/srv"),
        ];
        let numbers = |wanted: &[u64]| -> Vec<_> {
            unneeded(&mounts, wanted.iter().copied().collect()).iter().map(|mount| mount.number).collect()
        };
        assert_eq!(numbers(&[1, 2, 5]), [3, 6, 7, 8, 11]);
        assert_eq!(numbers(&[1, 3, 8, 11]), [4, 5, 6]);
    }

    #[test]
    fn a_path_is_followed_through_its_links() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink("/proc/version", dir.path().join("away")).unwrap();
        std::os::unix::fs::symlink("./away", dir.path().join("far")).unwrap();
        std::os::unix::fs::symlink("round", dir.path().join("round")).unwrap();
        let (here, proc) = (mounts_along(&file).unwrap(), mounts_along(Path::new("/proc")).unwrap());
        assert!(proc.len() > 1, "the root's and its own");
        let both: BTreeSet<_> = here.union(&proc).copied().collect();
        assert_eq!(mounts_along(&dir.path().join("far")).unwrap(), both);
        assert_eq!(mounts_along(&dir.path().join("x/../file")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(mounts_along(&dir.path().join("round")).unwrap_err().raw_os_error(), Some(libc::ELOOP));
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
