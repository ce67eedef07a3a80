//! What is known about running servers: one file per device in the run directory.
//!
//! A server writes `N.json` when it has made device N, keeps it locked while it lives, and removes it after a
//! clean end. The lock, not the process id, tells whether the server lives: the kernel gives it back however
//! the process ends. A file without a lock is that of a server that died, or of one that could not close its
//! image and says so in `error`. Whoever recovers the device, or takes it away, takes the file over: locked
//! first, then rewritten with the new process in it. So of a successor and `del` one comes first, and a new
//! device of the same number waits until nobody works with the old one's files, and is not made while a
//! record of this boot is all that leads to writes which are in no image yet. To rewrite a file takes no room
//! (`lock.rs`).

mod directory;
mod lock;
mod making;
mod record;
mod users;

#[cfg(test)]
pub(crate) use {directory::DIRECTORY_VARIABLE, record::example};
pub(crate) use {
    directory::{
        check_directory, directory, load, load_all, load_each, load_made, log_path, make_directory, open_log,
        path_of, redo_path, spare_path,
    },
    making::{Making, lacks_record, new_cookie},
    record::{Entry, Phase, Record, Refusal, invocation},
    users::{InUse, refuse_awaited, refuse_clashes, refuse_served},
};

use crate::{
    config::Config,
    processes::{self, Process},
};
use directory::remove_files;
use lock::{Dead, GLANCE, lock_dead, write_locked};
use nix::fcntl::Flock;
use std::{
    fs::{self, File},
    io, mem,
    path::{Path, PathBuf},
    time::Duration,
};

/// How long the one before may still be busy with its files, when its device is gone already and its very
/// number is wanted: what it had acknowledged may have to be written to its image.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(60);

/// Why a run file could not be used.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}: {source}{}", .path.display(), hint(.source))]
pub(crate) struct RunFileError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl RunFileError {
    /// Whether somebody asks who is not to know.
    fn is_refusal(&self) -> bool {
        self.source.kind() == io::ErrorKind::PermissionDenied
    }
}

/// The way out where there is a file that cannot be understood, or no place for one.
fn hint(source: &io::Error) -> &'static str {
    match (source.get_ref(), source.kind()) {
        (Some(inner), _) if inner.is::<serde_json::Error>() => {
            "; it is damaged or another version's: detach the device with that version, or remove the file, \
             which gives up what is in its redo log only, and then the device, with `ublk-qcow2 del -n`"
        }
        (_, io::ErrorKind::ReadOnlyFilesystem) => {
            "; the environment variable UBLK_QCOW2_RUN_DIR names another run directory"
        }
        (_, io::ErrorKind::PermissionDenied) => "; only root may look at servers' records",
        _ => "",
    }
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
    /// So it is with a record that tells nothing: what is in the log may be in no image yet.
    #[error(transparent)]
    Unreadable(RunFileError),
    #[error(
        "number {0} is that of a device whose server still writes to its image: try again when that has ended"
    )]
    Busy(u32),
}

impl CreateError {
    /// Whether the number is still somebody else's, and another one may be free.
    pub(crate) fn is_of_number(&self) -> bool {
        matches!(self, Self::Owing { .. } | Self::Unreadable(_) | Self::Busy(_))
    }
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
        make_directory(&directory()).map_err(fail("cannot make the directory for"))?;
        let before = lock_dead(&path, patience).map_err(fail("cannot take over"))?;
        match &before {
            Dead::Missing => {}
            Dead::Alive => return Err(CreateError::Busy(record.id)),
            Dead::Locked(file) => {
                let image = owing(file, &record, owes).map_err(fail("cannot take over"));
                if let Some(image) = image.map_err(CreateError::Unreadable)? {
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
        if record.boot != boot()? {
            remove_files(id);
            return Err(TakeOverError::OtherBoot(id));
        }
        let this = Process::this().map_err(fail)?;
        record.pid = this.pid;
        record.processes.push(this);
        record.error = None;
        record.is_ending = false;
        record.refusal = None;
        record.is_inherited = true;
        let lock = write_locked(&path, &record).map_err(fail)?;
        drop(dead);
        Ok(Self { path, record, is_left: false, lock })
    }

    /// Says how far the server has come.
    pub(crate) fn enter(&mut self, phase: Phase) -> Result<(), RunFileError> {
        self.record.phase = phase;
        self.record.is_inherited = false;
        self.write()
    }

    /// Says that the server has been asked to end.
    pub(crate) fn begin_end(&mut self) -> Result<(), RunFileError> {
        self.record.is_ending = true;
        self.write()
    }

    /// Says why the server goes on though it was asked to end.
    pub(crate) fn refuse(&mut self, reason: String) -> Result<(), RunFileError> {
        let before = self.record.refusal.as_ref().map_or(0, |refusal| refusal.number);
        self.record.refusal = Some(Refusal { number: before + 1, reason });
        self.record.is_ending = false;
        self.write()
    }

    fn write(&mut self) -> Result<(), RunFileError> {
        let fail = |source| RunFileError { what: "cannot write", path: self.path.clone(), source };
        self.lock = write_locked(&self.path, &self.record).map_err(fail)?;
        Ok(())
    }

    /// Says, with the next [`Self::enter`], who belongs to the service. So does whoever did before and lives: a
    /// supervisor may not have seen yet that somebody else has its device.
    pub(crate) fn name(&mut self, mut processes: Vec<Process>) {
        let before = mem::take(&mut self.record.processes);
        processes.extend(before.into_iter().filter(|process| process.lives()));
        processes.sort();
        processes.dedup();
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

/// Which boot of the machine this is.
pub(crate) fn boot() -> Result<String, RunFileError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let fail = |source| RunFileError { what: "cannot read", path: path.to_owned(), source };
    Ok(processes::read_proc(path).map_err(fail)?.trim().to_owned())
}

#[cfg(test)]
mod tests;
