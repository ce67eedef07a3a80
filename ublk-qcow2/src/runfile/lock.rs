//! Run files are locked as long as their servers live, never seen half written, and written in a full directory too.
//!
//! Beside each lies a spare of its length. A new content is written to that and locked, and the two change their
//! names: that takes no room, which the run directory may have none of when a server has died, and its device could
//! neither be recovered nor removed. The spare belongs to who has the run file locked. One who dies before the names
//! are changed has written to what nobody reads.
//!
//! Whoever may open a file may lock it, so only root may open these (from the next [`write_locked`] on where a
//! version of before made them readable): a stranger's lock would have a dead server seem alive.

use super::Record;
use crate::wait;
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2},
};
use std::{
    fs::{self, File, Permissions},
    io::{self, Seek},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

/// How long a file may be locked by somebody who only looks whether somebody else has it locked.
pub(super) const GLANCE: Duration = Duration::from_secs(1);
/// Between two attempts to lock a file.
const LOCK_PAUSE: Duration = Duration::from_millis(5);
/// A file is that much longer than what it says, at least: its next content may be longer.
const SLACK: usize = 2048;
/// What the space of files comes in.
const PAGE: usize = 4096;
const MODE: u32 = 0o600;

/// Where the next content of a run file is written.
pub(super) fn spare_path(path: &Path) -> PathBuf {
    path.with_extension("spare")
}

/// Writes the spare, locks it, and only then gives it the file's name: whoever finds it finds it whole and locked.
/// The file that had the name is the next spare.
pub(super) fn write_locked(path: &Path, record: &Record) -> io::Result<Flock<File>> {
    let spare = spare_path(path);
    let written = write_by_way_of(&spare, path, record);
    if written.is_err() && !fs::exists(path).unwrap_or(true) {
        // It fills a directory that may be full already.
        let _ = fs::remove_file(&spare);
    }
    written
}

fn write_by_way_of(spare: &Path, path: &Path, record: &Record) -> io::Result<Flock<File>> {
    let file = lock_spare(spare)?;
    let text = padded(serde_json::to_string(record)?, file.metadata()?.len());
    file.write_all_at(text.as_bytes(), 0)?;
    if renameat2(AT_FDCWD, spare, AT_FDCWD, path, RenameFlags::RENAME_EXCHANGE).is_ok() {
        return Ok(file);
    }
    // It is the first, or the file system cannot do that.
    fs::rename(spare, path)?;
    if let Err(error) = open_spare(spare).and_then(|next| next.write_all_at(text.as_bytes(), 0)) {
        tracing::warn!(
            "{}: {error}; {} can be written only while there is room",
            spare.display(),
            path.display()
        );
        let _ = fs::remove_file(spare);
    }
    Ok(file)
}

/// With spaces at the end, which mean nothing, over all that the file has.
fn padded(mut text: String, file_bytes: u64) -> String {
    let has = usize::try_from(file_bytes).unwrap_or(0);
    let bytes = if text.len() <= has { has } else { (text.len() + SLACK).next_multiple_of(PAGE) };
    text.extend(std::iter::repeat_n(' ', bytes - text.len()));
    text
}

/// The spare, which had the file's name once: who found it then may be having a look at it.
fn lock_spare(spare: &Path) -> io::Result<Flock<File>> {
    let lock = || {
        let file = open_spare(spare)?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno.into())
    };
    let is_held =
        |locked: &io::Result<_>| matches!(locked, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
    let locked = wait::patiently(GLANCE, LOCK_PAUSE, is_held, lock);
    if !is_held(&locked) {
        return locked;
    }
    fs::remove_file(spare)?;
    lock()
}

fn open_spare(spare: &Path) -> io::Result<File> {
    let file = File::options().read(true).write(true).create(true).truncate(false).mode(MODE).open(spare)?;
    if file.metadata()?.mode() & 0o7777 != MODE {
        file.set_permissions(Permissions::from_mode(MODE))?;
    }
    Ok(file)
}

/// What a file says whose owner lives. Nothing if that is about to change: a file that has lost its name may be
/// written to while it is read, and have its name again by then, but then it is another text that it has.
pub(super) fn read_held(file: &File, path: &Path) -> io::Result<Option<String>> {
    let read = || {
        let mut file = file;
        file.rewind()?;
        io::read_to_string(file)
    };
    let text = read()?;
    Ok((has_name(file, path)? && text == read()?).then_some(text))
}

/// A run file that is to be taken over.
pub(super) enum Dead {
    Missing,
    Alive,
    Locked(Flock<File>),
}

/// Locks the run file of a server that has died. Waits so long for whoever has it locked.
pub(super) fn lock_dead(path: &Path, patience: Duration) -> io::Result<Dead> {
    let is_held = |found: &_| matches!(found, Ok(Named::Held(_)));
    let lock = || lock_named(path, FlockArg::LockExclusiveNonblock);
    Ok(match wait::patiently(patience, LOCK_PAUSE, is_held, lock)? {
        Named::Missing => Dead::Missing,
        Named::Held(_) => Dead::Alive,
        Named::Locked(file) => Dead::Locked(file),
    })
}

/// A run file, and whether the lock could be had.
pub(super) enum Named {
    Missing,
    Held(File),
    Locked(Flock<File>),
}

/// Opens a run file and tries to lock it. A file that has lost its name by then tells nothing: its owner
/// has put another one there, and is alive.
pub(super) fn lock_named(path: &Path, how: FlockArg) -> io::Result<Named> {
    loop {
        // Not to wait for whoever writes to something else of that name.
        let file = match File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Named::Missing),
            file => file?,
        };
        let lock = match Flock::lock(file, how) {
            Err((file, Errno::EWOULDBLOCK)) => return Ok(Named::Held(file)),
            lock => lock.map_err(|(_, errno)| errno)?,
        };
        if has_name(&lock, path)? {
            return Ok(Named::Locked(lock));
        }
    }
}

/// Whether a file is the one that `path` names.
pub(super) fn has_name(file: &File, path: &Path) -> io::Result<bool> {
    let file = file.metadata()?;
    Ok(fs::metadata(path).is_ok_and(|named| (named.dev(), named.ino()) == (file.dev(), file.ino())))
}
