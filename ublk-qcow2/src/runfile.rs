//! What is known about running servers: one file per device in the run directory.
//!
//! A server writes `N.json` when it has made device N, keeps it locked while it lives, and removes
//! it after a clean end. The lock, not the process id, tells whether the server lives: the kernel
//! gives it back however the process ends. A file without a lock is that of a server that died, or
//! of one that could not close its image and says so in `error`. Whoever recovers the device takes the
//! file over: locked first, then rewritten with the new process in it.

use crate::config::Config;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::{
    env,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Where the files are, unless the environment variable [`DIRECTORY_VARIABLE`] names another place.
const DIRECTORY: &str = "/run/ublk-qcow2";
/// Names another run directory: for tests, and for several instances that must not meet.
const DIRECTORY_VARIABLE: &str = "UBLK_QCOW2_RUN_DIR";

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
    /// How the image is served.
    pub(crate) config: Config,
    /// What the driver knows the device by, so that it is not taken for another with its number.
    pub(crate) cookie: u64,
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

/// A server's own run file, locked. Dropping it removes it.
pub(crate) struct RunFile {
    path: PathBuf,
    record: Record,
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

impl RunFile {
    /// Writes and locks the run file of this process's device.
    pub(crate) fn create(record: Record) -> Result<Self, RunFileError> {
        let path = path_of(record.id);
        let fail = |what| {
            let path = path.clone();
            move |source| RunFileError { what, path, source }
        };
        fs::create_dir_all(directory()).map_err(fail("cannot make the directory for"))?;
        let lock = write_locked(&path, &record).map_err(fail("cannot write"))?;
        Ok(Self { path, record, lock })
    }

    /// Takes over the file of a dead server, for this process. How far that server had come stays there.
    pub(crate) fn take_over(id: u32) -> Result<Self, TakeOverError> {
        let path = path_of(id);
        let fail = |source| RunFileError { what: "cannot take over", path: path.clone(), source };
        let dead = lock_dead(&path).map_err(fail)?;
        let (mut record, dead) = match dead {
            Dead::Missing => return Err(TakeOverError::Missing(id)),
            Dead::Alive => return Err(TakeOverError::Alive(id)),
            Dead::Locked(record, lock) => (record, lock),
        };
        if record.boot != boot().map_err(fail)? {
            remove_stale(id);
            return Err(TakeOverError::OtherBoot(id));
        }
        record.pid = std::process::id().cast_signed();
        record.error = None;
        let lock = write_locked(&path, &record).map_err(fail)?;
        drop(dead);
        Ok(Self { path, record, lock })
    }

    /// Says how far the server has come.
    pub(crate) fn enter(&mut self, phase: Phase) -> Result<(), RunFileError> {
        self.record.phase = phase;
        let fail = |source| RunFileError { what: "cannot write", path: self.path.clone(), source };
        self.lock = write_locked(&self.path, &self.record).map_err(fail)?;
        Ok(())
    }

    /// What it says.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    /// Leaves the file behind, with the reason why the server's end was not clean: for `del` to tell,
    /// or for another attempt at recovery.
    pub(crate) fn fail(mut self, error: String) {
        self.record.error = Some(error);
        // If it cannot be written `del` will still find a dead server.
        let _ = write_locked(&self.path, &self.record);
    }
}

impl Drop for RunFile {
    fn drop(&mut self) {
        if self.record.error.is_none() {
            remove_stale(self.record.id);
        }
    }
}

/// Writes the file under another name, locks it, and only then gives it its name: whoever finds it
/// finds it whole and locked.
fn write_locked(path: &Path, record: &Record) -> io::Result<Flock<File>> {
    let temporary = path.with_extension(format!("{}.new", record.pid));
    let mut file = File::create(&temporary)?;
    file.write_all(serde_json::to_string(record)?.as_bytes())?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
    fs::rename(&temporary, path)?;
    Ok(lock)
}

/// The run file of device `id`, if there is one.
pub(crate) fn load(id: u32) -> Result<Option<Entry>, RunFileError> {
    load_path(&path_of(id))
}

/// All run files, in the order of their ids.
pub(crate) fn load_all() -> Result<Vec<Entry>, RunFileError> {
    let directory = directory();
    let fail = |source| RunFileError { what: "cannot read", path: directory.clone(), source };
    let files = match fs::read_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        files => files.map_err(fail)?,
    };
    let mut entries = Vec::new();
    for file in files {
        let path = file.map_err(fail)?.path();
        let is_ours = path.extension().is_some_and(|extension| extension == "json")
            && path
                .file_stem()
                .and_then(|stem| stem.to_str())
                .is_some_and(|stem| stem.parse::<u32>().is_ok());
        if is_ours {
            entries.extend(load_path(&path)?);
        }
    }
    entries.sort_by_key(|entry| entry.record.id);
    Ok(entries)
}

/// Removes what a server has in the run directory.
pub(crate) fn remove_stale(id: u32) {
    // The log first: it is of no use without the run file, but not the other way round.
    for path in [redo_path(id), log_path(id), path_of(id)] {
        let _ = fs::remove_file(path);
    }
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
    Locked(Record, Flock<File>),
}

/// Locks the run file of a server that has died.
fn lock_dead(path: &Path) -> io::Result<Dead> {
    loop {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Dead::Missing),
            file => file?,
        };
        let Ok(file) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(Dead::Alive) };
        // Somebody else may have taken it over between the opening and the lock.
        match fs::metadata(path) {
            Ok(named) if (named.dev(), named.ino()) == (file.metadata()?.dev(), file.metadata()?.ino()) => {
                return Ok(Dead::Locked(serde_json::from_reader(&*file)?, file));
            }
            _ => {}
        }
    }
}

/// Where a server in the background writes what it has to say.
pub(crate) fn log_path(id: u32) -> PathBuf {
    directory().join(format!("{id}.log"))
}

fn load_path(path: &Path) -> Result<Option<Entry>, RunFileError> {
    let fail = |source| RunFileError { what: "cannot read", path: path.to_owned(), source };
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(fail)?,
    };
    let record = serde_json::from_reader(&file).map_err(|error| fail(error.into()))?;
    let is_alive = Flock::lock(file, FlockArg::LockSharedNonblock).is_err();
    Ok(Some(Entry { record, is_alive }))
}

fn path_of(id: u32) -> PathBuf {
    directory().join(format!("{id}.json"))
}

fn directory() -> PathBuf {
    env::var_os(DIRECTORY_VARIABLE).map_or_else(|| PathBuf::from(DIRECTORY), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    #[test]
    fn a_record_survives_and_the_lock_tells_who_lives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("7.json");
        let record = Record {
            phase: Phase::Serving,
            id: 7,
            pid: 1,
            size: 1 << 40,
            queues: 2,
            depth: 64,
            config: config::example(),
            cookie: u64::MAX,
            boot: boot().unwrap(),
            error: None,
        };
        let lock = write_locked(&path, &record).unwrap();
        assert_eq!(load_path(&path).unwrap(), Some(Entry { record: record.clone(), is_alive: true }));
        assert!(matches!(lock_dead(&path).unwrap(), Dead::Alive));
        drop(lock);
        assert_eq!(load_path(&path).unwrap(), Some(Entry { record: record.clone(), is_alive: false }));
        let Dead::Locked(found, _lock) = lock_dead(&path).unwrap() else { panic!("it is dead") };
        assert_eq!(found, record);
        assert!(matches!(lock_dead(&path).unwrap(), Dead::Alive), "one of two takes it over");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
        assert_eq!(load_path(&dir.path().join("8.json")).unwrap(), None);
    }
}
