//! Where the files of servers lie, and what is found there.

use super::{
    Entry, Record, RunFileError,
    lock::{self, Named, lock_named, read_held},
};
use nix::fcntl::FlockArg;
use std::{
    env,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Where the files are, unless the environment variable [`DIRECTORY_VARIABLE`] names another place.
const DIRECTORY: &str = "/run/ublk-qcow2";
/// Names another run directory: for tests, and for several instances that must not meet.
pub(crate) const DIRECTORY_VARIABLE: &str = "UBLK_QCOW2_RUN_DIR";

/// The run directory.
pub(crate) fn directory() -> PathBuf {
    named().unwrap_or_else(|| PathBuf::from(DIRECTORY))
}

/// What the environment says. An empty value names nothing.
fn named() -> Option<PathBuf> {
    env::var_os(DIRECTORY_VARIABLE).filter(|name| !name.is_empty()).map(PathBuf::from)
}

/// Makes sure that the run directory is the same one for whoever looks for it: servers have another working
/// directory.
pub(crate) fn check_directory() -> Result<(), NotAbsolute> {
    match named() {
        Some(path) if !path.is_absolute() => Err(NotAbsolute(path)),
        _ => Ok(()),
    }
}

/// The run directory depends on who looks for it.
#[derive(Debug, thiserror::Error)]
#[error("{DIRECTORY_VARIABLE} is {}; it must be an absolute path, or not be set", .0.display())]
pub(crate) struct NotAbsolute(PathBuf);

/// Makes the run directory, and those above it. Whatever mask of modes was inherited, nobody else may write
/// there: who can puts another record in the place of one.
pub(crate) fn make_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(path)
}

/// Opens the log of a server, to which nobody else may write either.
pub(crate) fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o644).open(path)
}

/// The run file of device `id`.
pub(crate) fn path_of(id: u32) -> PathBuf {
    directory().join(format!("{id}.json"))
}

/// Where the next run file of device `id` is written.
pub(crate) fn spare_path(id: u32) -> PathBuf {
    lock::spare_path(&path_of(id))
}

/// Where a server keeps its redo log.
pub(crate) fn redo_path(id: u32) -> PathBuf {
    directory().join(format!("{id}.redo"))
}

/// Where a server in the background writes what it has to say.
pub(crate) fn log_path(id: u32) -> PathBuf {
    directory().join(format!("{id}.log"))
}

/// The run file of device `id`, if there is one.
pub(crate) fn load(id: u32) -> Result<Option<Entry>, RunFileError> {
    load_path(&path_of(id))
}

/// All run files that make sense, in the order of their ids. One that does not hides no other.
pub(crate) fn load_all() -> Result<Vec<Entry>, RunFileError> {
    let mut readable = Vec::new();
    for entry in load_each()? {
        match entry {
            Ok(entry) => readable.push(entry),
            Err(error) if error.is_refusal() => return Err(error),
            Err(error) => tracing::warn!("{error}"),
        }
    }
    Ok(readable)
}

/// What is left of the device that was made with this cookie, however far its server had come.
pub(crate) fn load_made(cookie: u64) -> Option<Record> {
    load_made_in(&directory(), cookie)
}

pub(super) fn load_made_in(directory: &Path, cookie: u64) -> Option<Record> {
    let records = load_each_in(directory).unwrap_or_default().into_iter().filter_map(Result::ok);
    records.map(|entry| entry.record).find(|record| record.cookie == cookie)
}

/// All run files, in the order of their ids.
pub(crate) fn load_each() -> Result<Vec<Result<Entry, RunFileError>>, RunFileError> {
    load_each_in(&directory())
}

pub(super) fn load_each_in(directory: &Path) -> Result<Vec<Result<Entry, RunFileError>>, RunFileError> {
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

pub(super) fn load_path(path: &Path) -> Result<Option<Entry>, RunFileError> {
    let read = || loop {
        return Ok(match lock_named(path, FlockArg::LockSharedNonblock)? {
            Named::Missing => None,
            Named::Held(file) => match read_held(&file, path)? {
                Some(text) => Some(Entry { record: serde_json::from_str(&text)?, is_alive: true }),
                None => continue,
            },
            Named::Locked(file) => Some(Entry { record: serde_json::from_reader(&*file)?, is_alive: false }),
        });
    };
    read().map_err(|source| RunFileError { what: "cannot read", path: path.to_owned(), source })
}

/// Removes what a server has in the run directory. The run file must be locked, or a new device of the same
/// number loses its.
pub(super) fn remove_files(id: u32) {
    // The log first: it is of no use without the run file, but not the other way round. The run file last: the spare
    // is that of a new device's from then on.
    for path in [redo_path(id), log_path(id), spare_path(id), path_of(id)] {
        let _ = fs::remove_file(path);
    }
}
