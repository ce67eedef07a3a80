//! QEMU's image locks: who may open an image at the same time, in a way that QEMU understands.
//!
//! A user of a file *uses* some permissions and *denies* some to everybody else. It says so by shared
//! locks on bytes of the file that nobody reads or writes through them: byte 100 + p while it uses
//! permission p, byte 200 + p while it denies it. First it takes its own locks, which always succeeds
//! among those who keep to this, then it looks whether anybody holds the opposite ones. So of two that
//! come at the same time at most one gets in.
//!
//! The locks belong to the open file description: they survive a fork, and end with the last
//! descriptor, and with the last operation of a ring that uses it. This module knows descriptors and
//! bytes; which file is opened for what is [`super::Files`]' affair.

use crate::io::Access;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
};
use std::{
    fmt,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, Instant},
};

/// Byte of the lock on the first permission while it is used.
const USED_BASE: u8 = 100;
/// Byte of the lock on the first permission while it is denied to others.
const DENIED_BASE: u8 = 200;
/// How long a conflict may last before it is an error: a tool that only has a look at the image, or
/// the kernel that ends the operations of a killed server, is through by then.
const CONFLICT_WAIT: Duration = Duration::from_millis(500);
/// Between two attempts.
const CONFLICT_PAUSE: Duration = Duration::from_millis(20);
/// Users of a file that an error names at most.
const MAX_NAMED: usize = 3;

/// How files are kept from being opened by two who are in each other's way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// As QEMU does: one writer and no reader, or any number of readers.
    #[default]
    AsQemu,
    /// As QEMU's `force-share` does, for reading only: whoever writes meanwhile is tolerated, and what
    /// is read may then be torn.
    ForceShare,
}

/// Something that can be done with an image; the number is its place in the lock bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Permission {
    Read = 0,
    Write = 1,
    WriteUnchanged = 2,
    Resize = 3,
}

const PERMISSIONS: [Permission; 4] =
    [Permission::Read, Permission::Write, Permission::WriteUnchanged, Permission::Resize];

/// What a user of a file does with it, and what it denies to others: sets of permissions, a bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Claim {
    used: u8,
    denied: u8,
}

/// A lock of somebody else that is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Conflict {
    /// What we use is denied.
    Denied(Permission),
    /// What we deny is used.
    Used(Permission),
}

enum Attempt {
    Taken,
    Conflict(Conflict),
    /// The file system, or the kernel, has no such locks.
    Unsupported(Errno),
}

impl Claim {
    /// What opening a file means.
    ///
    /// # Errors
    /// `InvalidInput` for writing without locks.
    pub(super) fn of(access: Access, locking: Locking) -> io::Result<Self> {
        let reading = Permission::Read.bit();
        let changing = Permission::Write.bit() | Permission::Resize.bit();
        match (access, locking) {
            (Access::ReadWrite, Locking::AsQemu) => Ok(Self { used: reading | changing, denied: changing }),
            // QEMU's own backing files too: below a guest's disk nobody writes.
            (Access::ReadOnly, Locking::AsQemu) => Ok(Self { used: reading, denied: changing }),
            (Access::ReadOnly, Locking::ForceShare) => Ok(Self { used: reading, denied: 0 }),
            (Access::ReadWrite, Locking::ForceShare) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "an image that others may be writing to can be shared for reading only",
            )),
        }
    }

    fn and(self, other: Self) -> Self {
        Self { used: self.used | other.used, denied: self.denied | other.denied }
    }

    /// The bytes whose locks `self` has and `held` has not.
    fn bytes_beyond(self, held: Self) -> impl Iterator<Item = u8> {
        let beyond = Self { used: self.used & !held.used, denied: self.denied & !held.denied };
        let used = PERMISSIONS.into_iter().filter(move |p| beyond.used & p.bit() != 0);
        let denied = PERMISSIONS.into_iter().filter(move |p| beyond.denied & p.bit() != 0);
        used.map(Permission::used_byte).chain(denied.map(Permission::denied_byte))
    }

    /// Everybody else's locks that are in the way.
    fn conflicts(self) -> impl Iterator<Item = Conflict> {
        let denied = PERMISSIONS.into_iter().filter(move |p| self.used & p.bit() != 0).map(Conflict::Denied);
        let used = PERMISSIONS.into_iter().filter(move |p| self.denied & p.bit() != 0).map(Conflict::Used);
        denied.chain(used)
    }
}

/// Takes the locks of `wanted` on a descriptor that has those of `held`. Returns what it has now:
/// nothing, with a warning, where the file system has no such locks.
///
/// # Errors
/// `ResourceBusy`, with who it is and the way out, if somebody is in the way for longer than
/// [`CONFLICT_WAIT`]; the operating system's. The descriptor then has what it had before.
pub(super) fn extend(file: &File, path: &Path, held: Claim, wanted: Claim) -> io::Result<Claim> {
    let both = held.and(wanted);
    if both == held {
        return Ok(held);
    }
    let deadline = Instant::now() + CONFLICT_WAIT;
    loop {
        match attempt(file, held, both)? {
            Attempt::Taken => return Ok(both),
            Attempt::Unsupported(reason) => {
                let path = path.display();
                tracing::warn!("{path}: no image locks here ({reason}): see to it that nobody else writes");
                return Ok(Claim::default());
            }
            Attempt::Conflict(_) if Instant::now() < deadline => std::thread::sleep(CONFLICT_PAUSE),
            Attempt::Conflict(conflict) => return Err(busy(file, conflict)),
        }
    }
}

/// Gives the locks back at once. Closing would do it as well, but a ring that had the file lets go of
/// it only some time after it is closed itself.
pub(super) fn release(file: &File, held: Claim) {
    held.bytes_beyond(Claim::default()).for_each(|byte| unlock(file, byte));
}

fn attempt(file: &File, held: Claim, both: Claim) -> io::Result<Attempt> {
    let outcome = take_and_look(file, held, both);
    if !matches!(outcome, Ok(Attempt::Taken)) {
        both.bytes_beyond(held).for_each(|byte| unlock(file, byte));
    }
    outcome
}

fn take_and_look(file: &File, held: Claim, both: Claim) -> io::Result<Attempt> {
    for byte in both.bytes_beyond(held) {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&lock_of(byte, libc::F_RDLCK))) {
            Ok(_) => {}
            // Somebody has an exclusive lock there, which QEMU never takes.
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(Attempt::Conflict(Conflict::at(byte))),
            Err(reason @ (Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS)) => {
                return Ok(Attempt::Unsupported(reason));
            }
            Err(error) => return Err(error.into()),
        }
    }
    for conflict in both.conflicts() {
        // An exclusive lock would be refused if anybody has any; our own description's do not count.
        let mut found = lock_of(conflict.byte(), libc::F_WRLCK);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
        if found.l_type != libc::F_UNLCK as libc::c_short {
            return Ok(Attempt::Conflict(conflict));
        }
    }
    Ok(Attempt::Taken)
}

fn unlock(file: &File, byte: u8) {
    // Giving back fails only where taking would have failed.
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&lock_of(byte, libc::F_UNLCK)));
}

fn lock_of(byte: u8, kind: libc::c_int) -> libc::flock {
    libc::flock {
        // The constants are small.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte.into(),
        l_len: 1,
        // Must be 0 for locks of a description.
        l_pid: 0,
    }
}

impl Permission {
    fn bit(self) -> u8 {
        1 << self as u8
    }

    fn used_byte(self) -> u8 {
        USED_BASE + self as u8
    }

    fn denied_byte(self) -> u8 {
        DENIED_BASE + self as u8
    }

    /// QEMU's name.
    fn name(self) -> &'static str {
        match self {
            Self::Read => "consistent read",
            Self::Write => "write",
            Self::WriteUnchanged => "write unchanged",
            Self::Resize => "resize",
        }
    }
}

impl Conflict {
    /// The byte on which somebody else's lock is in the way.
    fn byte(self) -> u8 {
        match self {
            Self::Denied(permission) => permission.denied_byte(),
            Self::Used(permission) => permission.used_byte(),
        }
    }

    /// What an exclusive lock on `byte` comes to.
    fn at(byte: u8) -> Self {
        let find = |base| PERMISSIONS.into_iter().find(|&p| base + p as u8 == byte);
        let used = find(USED_BASE).map(Self::Used);
        used.or_else(|| find(DENIED_BASE).map(Self::Denied)).unwrap_or(Self::Used(Permission::Write))
    }
}

impl fmt::Display for Conflict {
    /// The end of "in use by somebody", with QEMU's name of the lock that cannot be had.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denied(Permission::Read) => f.write_str("; nobody else may read it")?,
            Self::Denied(_) => f.write_str("; nobody else may write to it")?,
            Self::Used(Permission::Read) => f.write_str(", for reading")?,
            Self::Used(_) => f.write_str(", for writing")?,
        }
        match self {
            Self::Denied(permission) => write!(f, " (\"{}\" lock)", permission.name()),
            Self::Used(permission) => write!(f, " (shared \"{}\" lock)", permission.name()),
        }
    }
}

fn busy(file: &File, conflict: Conflict) -> io::Error {
    let holders = holders(file, conflict.byte());
    let who = if holders.is_empty() { "another process".to_owned() } else { holders.join(" and ") };
    io::Error::new(
        io::ErrorKind::ResourceBusy,
        format!(
            "it is in use by {who}{conflict}: end that first, or only read the image, with --force-share"
        ),
    )
}

/// Who has a lock on `byte`, as far as this process may know: the lock itself does not say.
fn holders(file: &File, byte: u8) -> Vec<String> {
    let Ok(metadata) = file.metadata() else { return Vec::new() };
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .flatten()
        .map(|entry| entry.path())
        .filter(|process| process.file_name().is_some_and(|name| name.as_encoded_bytes()[0].is_ascii_digit()))
        .filter(|process| holds(process, metadata.ino(), byte))
        .take(MAX_NAMED)
        .map(|process| {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            let id = process.file_name().unwrap_or_default().to_string_lossy();
            format!("{} (process {id})", name.trim())
        })
        .collect()
}

/// Whether a process has a descriptor with a lock on `byte` of the file with this inode number.
fn holds(process: &Path, inode: u64, byte: u8) -> bool {
    let Ok(descriptors) = fs::read_dir(process.join("fdinfo")) else { return false };
    descriptors.flatten().any(|descriptor| {
        fs::read_to_string(descriptor.path())
            .is_ok_and(|text| text.lines().any(|line| covers(line, inode, byte)))
    })
}

/// Whether a line of a descriptor's `fdinfo` is a lock on `byte` of the inode:
/// `lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 200 203`.
fn covers(line: &str, inode: u64, byte: u8) -> bool {
    let Some(lock) = line.strip_prefix("lock:") else { return false };
    let fields: Vec<_> = lock.split_whitespace().collect();
    let &[_, _, _, _, _, place, first, last] = fields.as_slice() else { return false };
    // The device number is not the one that stat shows, on some file systems.
    let is_same = place.rsplit(':').next().is_some_and(|number| number.parse() == Ok(inode));
    let is_from = first.parse().is_ok_and(|first: u64| first <= u64::from(byte));
    let is_until = last == "EOF" || last.parse().is_ok_and(|last: u64| last >= u64::from(byte));
    is_same && is_from && is_until
}

#[cfg(test)]
mod tests;
