//! Run files are locked as long as their servers live, and never seen half written.
//!
//! Whoever may open a file may lock it, so only root may open these (from the next [`write_locked`] on where a
//! version of before made them readable): a stranger's lock would have a dead server seem alive.

use super::Record;
use crate::wait;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

/// Between two attempts to lock a file.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Writes the file under another name, locks it, and only then gives it its name: whoever finds it
/// finds it whole and locked.
pub(super) fn write_locked(path: &Path, record: &Record) -> io::Result<Flock<File>> {
    let temporary = path.with_extension(format!("{}.new", record.pid));
    let written = write_as(&temporary, path, record);
    if written.is_err() {
        // It fills a directory that may be full already.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn write_as(temporary: &Path, path: &Path, record: &Record) -> io::Result<Flock<File>> {
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(temporary)?;
    file.write_all(serde_json::to_string(record)?.as_bytes())?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
    fs::rename(temporary, path)?;
    Ok(lock)
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
