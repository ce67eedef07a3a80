//! What is known about running servers: one file per device in the run directory.
//!
//! A server writes `N.json` when it has made device N, keeps it locked while it lives, and removes it after a
//! clean end. The lock, not the process id, tells whether the server lives: the kernel gives it back however
//! the process ends. A file without a lock is that of a server that died, or of one that could not close its
//! image and says so in `error`. Whoever recovers the device, or takes it away, takes the file over: locked
//! first, then rewritten with the new process in it. So of a successor and `del` one comes first, and a new
//! device of the same number waits until nobody works with the old one's files, and is not made while a
//! record of this boot is all that leads to writes which are in no image yet.

use crate::{config::Config, processes::Process, wait};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use serde::{Deserialize, Serialize};
use std::{
    env,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// Where the files are, unless the environment variable [`DIRECTORY_VARIABLE`] names another place.
const DIRECTORY: &str = "/run/ublk-qcow2";
/// Names another run directory: for tests, and for several instances that must not meet.
const DIRECTORY_VARIABLE: &str = "UBLK_QCOW2_RUN_DIR";
/// How long a file may be locked by somebody who only looks whether somebody else has it locked.
const GLANCE: Duration = Duration::from_secs(1);
/// How long the one before may still be busy with its files, when its device is gone already and its very
/// number is wanted: what it had acknowledged may have to be written to its image.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(60);
/// Between two attempts to lock a file.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// How far a server has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    /// It has made the device, or taken it over, and the driver does not know its queues yet.
    Preparing,
    /// It is handing its queues to the driver.
    Fetching,
    /// The driver has all of them.
    Fetched,
    /// The device serves I/O.
    Serving,
    /// `del` is taking it away; its server is dead.
    Removing,
}

/// The contents of a run file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The device's number.
    pub(crate) id: u32,
    /// The server's process.
    pub(crate) pid: i32,
    /// The device's capacity in bytes.
    pub(crate) size: u64,
    /// Queues and depth as the driver gave them.
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    /// How far the server has come, or its dead predecessor had.
    pub(crate) phase: Phase,
    /// Whether the phase is the predecessor's: who has taken the file over has not come any further.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_inherited: bool,
    /// How the image is served.
    pub(crate) config: Config,
    /// What the driver knows the device by, so that it is not taken for another with its number.
    pub(crate) cookie: u64,
    /// Who has the image's file system mounted, or keeps it busy: the server, and its supervisor.
    #[serde(default)]
    pub(crate) processes: Vec<Process>,
    /// The boot in which the device was made: it has not outlived it.
    pub(crate) boot: String,
    /// Why the server could not end cleanly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// Why a run file could not be used.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}: {source}", .path.display())]
pub(crate) struct RunFileError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Why a new device could not have its run file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CreateError {
    #[error(transparent)]
    RunFile(#[from] RunFileError),
    #[error(
        "number {id} is that of a device whose server died, and what that had acknowledged is not in {} yet: \
         `ublk-qcow2 del -n {id}` writes it there", .image.display()
    )]
    Owing { id: u32, image: PathBuf },
    #[error(
        "number {0} is that of a device whose server still writes to its image: try again when that has ended"
    )]
    Busy(u32),
}

/// Whether a number was asked for, or another will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    AskedFor,
    Any,
}

/// Why a dead server's run file could not be taken over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TakeOverError {
    #[error(transparent)]
    RunFile(#[from] RunFileError),
    #[error("there is no record of a device {0}: `ublk-qcow2 list` shows what there is")]
    Missing(u32),
    #[error("device {0} has a server")]
    Alive(u32),
    #[error("device {0} was made before the machine's last start and is gone")]
    OtherBoot(u32),
}

/// A server's own run file, locked. Dropping it removes it, unless it was to be left.
pub(crate) struct RunFile {
    path: PathBuf,
    record: Record,
    is_left: bool,
    /// Let go of after `drop` has removed the file, so that nobody takes it for a dead server's.
    lock: Flock<File>,
}

/// A run file as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) record: Record,
    /// Whether its server lives.
    pub(crate) is_alive: bool,
}

impl Entry {
    /// Whether its server serves it.
    pub(crate) fn serves(&self) -> bool {
        self.is_alive && self.record.phase == Phase::Serving && !self.record.is_inherited
    }
}

impl RunFile {
    /// Writes and locks the run file of this process's device. Whoever had the number before may have to
    /// finish first; if `owes` says of its redo log that it is still of use the number stays its own.
    pub(crate) fn create(
        record: Record,
        choice: Choice,
        owes: impl FnOnce(u32) -> bool,
    ) -> Result<Self, CreateError> {
        let patience = match choice {
            Choice::AskedFor => PREDECESSOR_WAIT,
            Choice::Any => GLANCE,
        };
        Self::create_at(path_of(record.id), record, patience, owes)
    }

    fn create_at(
        path: PathBuf,
        record: Record,
        patience: Duration,
        owes: impl FnOnce(u32) -> bool,
    ) -> Result<Self, CreateError> {
        let fail = |what| {
            let path = path.clone();
            move |source| RunFileError { what, path, source }
        };
        fs::create_dir_all(directory()).map_err(fail("cannot make the directory for"))?;
        let before = lock_dead(&path, patience).map_err(fail("cannot take over"))?;
        match &before {
            Dead::Missing => {}
            Dead::Alive => return Err(CreateError::Busy(record.id)),
            Dead::Locked(file) => {
                if let Some(image) = owing(file, &record, owes).map_err(fail("cannot take over"))? {
                    return Err(CreateError::Owing { id: record.id, image });
                }
            }
        }
        // It would be taken for the new device's.
        remove_if_there(&redo_path(record.id)).map_err(fail("cannot remove the redo log of"))?;
        let lock = write_locked(&path, &record).map_err(fail("cannot write"))?;
        Ok(Self { path, record, is_left: false, lock })
    }

    /// Takes over the file of a dead server, for this process. How far that server had come stays there.
    pub(crate) fn take_over(id: u32) -> Result<Self, TakeOverError> {
        Self::take_over_at(path_of(id), id)
    }

    fn take_over_at(path: PathBuf, id: u32) -> Result<Self, TakeOverError> {
        let fail = |source| RunFileError { what: "cannot take over", path: path.clone(), source };
        let dead = match lock_dead(&path, GLANCE).map_err(fail)? {
            Dead::Missing => return Err(TakeOverError::Missing(id)),
            Dead::Alive => return Err(TakeOverError::Alive(id)),
            Dead::Locked(lock) => lock,
        };
        let mut record: Record = serde_json::from_reader(&*dead).map_err(|error| fail(error.into()))?;
        if record.boot != boot().map_err(fail)? {
            remove_files(id);
            return Err(TakeOverError::OtherBoot(id));
        }
        record.pid = std::process::id().cast_signed();
        record.error = None;
        record.is_inherited = true;
        let lock = write_locked(&path, &record).map_err(fail)?;
        drop(dead);
        Ok(Self { path, record, is_left: false, lock })
    }

    /// Says how far the server has come.
    pub(crate) fn enter(&mut self, phase: Phase) -> Result<(), RunFileError> {
        self.record.phase = phase;
        self.record.is_inherited = false;
        let fail = |source| RunFileError { what: "cannot write", path: self.path.clone(), source };
        self.lock = write_locked(&self.path, &self.record).map_err(fail)?;
        Ok(())
    }

    /// Says, with the next [`Self::enter`], who belongs to the service.
    pub(crate) fn name(&mut self, processes: Vec<Process>) {
        self.record.processes = processes;
    }

    /// What it says.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    /// Leaves the file behind, with the reason why the server's end was not clean, for `del` to tell.
    pub(crate) fn fail(mut self, error: String) {
        self.record.error = Some(error);
        // If it cannot be written `del` will still find a dead server.
        let _ = write_locked(&self.path, &self.record);
        self.leave();
    }

    /// Leaves the file behind, for another attempt at recovery or at taking the device away.
    pub(crate) fn leave(mut self) {
        self.is_left = true;
    }
}

impl Drop for RunFile {
    fn drop(&mut self) {
        if !self.is_left {
            remove_files(self.record.id);
        }
    }
}

/// The image that lacks what a dead server has left in its redo log, if there is one: the log is lost with
/// the record that leads to it, which `new` is to replace.
fn owing(dead: &File, new: &Record, owes: impl FnOnce(u32) -> bool) -> io::Result<Option<PathBuf>> {
    match serde_json::from_reader::<_, Record>(dead) {
        // Those have no log, or one that the machine's end has taken.
        Ok(Record { config: Config { recovery: false, .. } | Config { read_only: true, .. }, .. }) => {
            Ok(None)
        }
        Ok(Record { boot, .. }) if boot != new.boot => Ok(None),
        read if owes(new.id) => Ok(Some(read?.config.image)),
        _ => Ok(None),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Writes the file under another name, locks it, and only then gives it its name: whoever finds it
/// finds it whole and locked.
fn write_locked(path: &Path, record: &Record) -> io::Result<Flock<File>> {
    let temporary = path.with_extension(format!("{}.new", record.pid));
    let written = write_as(&temporary, path, record);
    if written.is_err() {
        // It fills a directory that may be full already.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn write_as(temporary: &Path, path: &Path, record: &Record) -> io::Result<Flock<File>> {
    let mut file = File::create(temporary)?;
    file.write_all(serde_json::to_string(record)?.as_bytes())?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
    fs::rename(temporary, path)?;
    Ok(lock)
}

/// The run file of device `id`, if there is one.
pub(crate) fn load(id: u32) -> Result<Option<Entry>, RunFileError> {
    load_path(&path_of(id))
}

/// All run files that can be read, in the order of their ids. One that cannot hides no other.
pub(crate) fn load_all() -> Result<Vec<Entry>, RunFileError> {
    let readable = |entry: Result<Entry, RunFileError>| match entry {
        Ok(entry) => Some(entry),
        Err(error) => {
            tracing::warn!("{error}");
            None
        }
    };
    Ok(load_each()?.into_iter().filter_map(readable).collect())
}

/// What is left of the device that was made with this cookie, however far its server had come.
pub(crate) fn load_made(cookie: u64) -> Option<Record> {
    load_made_in(&directory(), cookie)
}

fn load_made_in(directory: &Path, cookie: u64) -> Option<Record> {
    let records = load_each_in(directory).unwrap_or_default().into_iter().filter_map(Result::ok);
    records.map(|entry| entry.record).find(|record| record.cookie == cookie)
}

/// All run files, in the order of their ids.
pub(crate) fn load_each() -> Result<Vec<Result<Entry, RunFileError>>, RunFileError> {
    load_each_in(&directory())
}

fn load_each_in(directory: &Path) -> Result<Vec<Result<Entry, RunFileError>>, RunFileError> {
    let fail = |source| RunFileError { what: "cannot read", path: directory.to_owned(), source };
    let files = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        files => files.map_err(fail)?,
    };
    let mut found = Vec::new();
    for file in files {
        let path = file.map_err(fail)?.path();
        let is_ours = path.extension().is_some_and(|extension| extension == "json");
        let id = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<u32>().ok());
        if let (true, Some(id)) = (is_ours, id) {
            found.extend(load_path(&path).transpose().map(|entry| (id, entry)));
        }
    }
    found.sort_by_key(|&(id, _)| id);
    Ok(found.into_iter().map(|(_, entry)| entry).collect())
}

/// Removes what a server has in the run directory. The run file must be locked, or a new device of the same
/// number loses its.
fn remove_files(id: u32) {
    // The log first: it is of no use without the run file, but not the other way round.
    for path in [redo_path(id), log_path(id), path_of(id)] {
        let _ = fs::remove_file(path);
    }
}

/// A number by which a device is known that is to be made.
pub(crate) fn new_cookie() -> io::Result<u64> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Which boot of the machine this is.
pub(crate) fn boot() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Where a server keeps its redo log.
pub(crate) fn redo_path(id: u32) -> PathBuf {
    directory().join(format!("{id}.redo"))
}

/// A run file that is to be taken over.
enum Dead {
    Missing,
    Alive,
    Locked(Flock<File>),
}

/// Locks the run file of a server that has died. Waits so long for whoever has it locked.
fn lock_dead(path: &Path, patience: Duration) -> io::Result<Dead> {
    let is_held = |found: &_| matches!(found, Ok(Named::Held(_)));
    let lock = || lock_named(path, FlockArg::LockExclusiveNonblock);
    Ok(match wait::patiently(patience, LOCK_PAUSE, is_held, lock)? {
        Named::Missing => Dead::Missing,
        Named::Held(_) => Dead::Alive,
        Named::Locked(file) => Dead::Locked(file),
    })
}

/// A run file, and whether the lock could be had.
enum Named {
    Missing,
    Held(File),
    Locked(Flock<File>),
}

/// Opens a run file and tries to lock it. A file that has lost its name by then tells nothing: its owner
/// has put another one there, and is alive.
fn lock_named(path: &Path, how: FlockArg) -> io::Result<Named> {
    loop {
        let file = match File::open(path) {
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
fn has_name(file: &File, path: &Path) -> io::Result<bool> {
    let file = file.metadata()?;
    Ok(fs::metadata(path).is_ok_and(|named| (named.dev(), named.ino()) == (file.dev(), file.ino())))
}

/// Where a server in the background writes what it has to say.
pub(crate) fn log_path(id: u32) -> PathBuf {
    directory().join(format!("{id}.log"))
}

fn load_path(path: &Path) -> Result<Option<Entry>, RunFileError> {
    let read = || {
        Ok(match lock_named(path, FlockArg::LockSharedNonblock)? {
            Named::Missing => None,
            Named::Held(file) => Some(Entry { record: serde_json::from_reader(file)?, is_alive: true }),
            Named::Locked(file) => Some(Entry { record: serde_json::from_reader(&*file)?, is_alive: false }),
        })
    };
    read().map_err(|source| RunFileError { what: "cannot read", path: path.to_owned(), source })
}

/// The run file of device `id`.
pub(crate) fn path_of(id: u32) -> PathBuf {
    directory().join(format!("{id}.json"))
}

/// The run directory.
pub(crate) fn directory() -> PathBuf {
    env::var_os(DIRECTORY_VARIABLE).map_or_else(|| PathBuf::from(DIRECTORY), PathBuf::from)
}

/// A record for tests.
#[cfg(test)]
pub(crate) fn example() -> Record {
    Record {
        phase: Phase::Serving,
        is_inherited: false,
        id: 7,
        pid: 1,
        size: 1 << 40,
        queues: 2,
        depth: 64,
        config: crate::config::example(),
        cookie: u64::MAX,
        processes: vec![Process::this().unwrap()],
        boot: boot().unwrap(),
        error: None,
    }
}

#[cfg(test)]
mod tests;
