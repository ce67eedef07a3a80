//! What a device is known by until it has a record.
//!
//! Between the driver's making a device and its server's writing a record lies a moment in which that server
//! may be killed. The driver keeps a number of ours with each device, its cookie: half of it says which run
//! directory the device is of, the other half which device it is. So whoever comes later knows an orphan. A
//! device that is just being made looks like one, hence the lock: shared by all who make devices, until these
//! have their records, and held alone by who removes orphans.

use super::{
    Entry, RunFileError,
    directory::{load_path, make_directory},
    path_of,
};
use crate::wait;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

/// How long those who remove orphans may take, who wait for each until nobody has it open.
const REMOVERS_WAIT: Duration = Duration::from_secs(60);
/// Between two attempts to have the lock.
const PAUSE: Duration = Duration::from_millis(10);
/// The lower half of a cookie.
const DEVICE_BITS: u32 = 32;

/// A number by which a device is known that is to be made.
pub(crate) fn new_cookie() -> Result<u64, RunFileError> {
    let directory = super::directory();
    let fail = |what, path: &Path| {
        let path = path.to_owned();
        move |source| RunFileError { what, path, source }
    };
    make_directory(&directory).map_err(fail("cannot make", &directory))?;
    let mark = mark_of(&directory).map_err(fail("cannot look at", &directory))?;
    let random = Path::new("/dev/urandom");
    let mut bytes = [0; 4];
    File::open(random)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(fail("cannot read", random))?;
    Ok(u64::from(mark) << DEVICE_BITS | u64::from(u32::from_ne_bytes(bytes)))
}

/// Whether a device with this number and cookie was made for this run directory and has no record there. One that
/// cannot be read may be its.
pub(crate) fn lacks_record(id: u32, cookie: u64) -> bool {
    lacks_record_in(&super::directory(), &path_of(id), cookie)
}

fn lacks_record_in(directory: &Path, record: &Path, cookie: u64) -> bool {
    let is_ours = mark_of(directory).is_ok_and(|mark| cookie >> DEVICE_BITS == u64::from(mark));
    let is_another_s = |entry: Option<Entry>| entry.is_none_or(|entry| entry.record.cookie != cookie);
    is_ours && load_path(record).is_ok_and(is_another_s)
}

/// Tells this directory from others, and its devices from other programs'.
fn mark_of(directory: &Path) -> io::Result<u32> {
    let it = fs::metadata(directory)?;
    // FNV-1a of 32 bits.
    let bytes = *b"ublk-qcow2";
    let bytes = bytes.into_iter().chain(it.dev().to_ne_bytes()).chain(it.ino().to_ne_bytes());
    Ok(bytes.fold(0x811c_9dc5, |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)))
}

/// Held by who makes a device until that has a record, or by who removes orphans.
pub(crate) struct Making {
    _lock: Flock<File>,
}

impl Making {
    /// For who makes a device: waits until nobody removes orphans.
    pub(crate) fn begin() -> Result<Self, RunFileError> {
        let path = lock_path();
        let fail = |source| RunFileError { what: "cannot lock", path: path.clone(), source };
        let found = lock(&path, FlockArg::LockSharedNonblock, REMOVERS_WAIT).map_err(fail)?;
        found.ok_or_else(|| fail(io::Error::from(Errno::EWOULDBLOCK)))
    }

    /// For who removes orphans; nothing if somebody makes a device for longer than that.
    pub(crate) fn keep_out(patience: Duration) -> Result<Option<Self>, RunFileError> {
        let path = lock_path();
        let found = lock(&path, FlockArg::LockExclusiveNonblock, patience);
        found.map_err(|source| RunFileError { what: "cannot lock", path, source })
    }
}

fn lock_path() -> PathBuf {
    super::directory().join("making")
}

fn lock(path: &Path, how: FlockArg, patience: Duration) -> io::Result<Option<Making>> {
    // Nobody else may even read it: he could lock it.
    let open = || File::options().append(true).create(true).mode(0o600).open(path);
    let attempt = || match Flock::lock(open()?, how) {
        Ok(lock) => Ok(Some(Making { _lock: lock })),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(io::Error::from(errno)),
    };
    wait::patiently(patience, PAUSE, |found| matches!(found, Ok(None)), attempt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runfile::{Record, example};

    /// A server was killed when the driver had made its device and it had not written its record: a device was
    /// left of which nobody knew whose it was.
    #[test]
    fn a_device_without_a_record_is_known_to_the_directory_that_it_was_made_for() {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let record = ours.path().join("7.json");
        let cookie = u64::from(mark_of(ours.path()).unwrap()) << DEVICE_BITS | 5;
        let lacks = || lacks_record_in(ours.path(), &record, cookie);
        assert!(lacks());
        assert!(!lacks_record_in(theirs.path(), &theirs.path().join("7.json"), cookie), "another instance's");
        assert!(!lacks_record_in(ours.path(), &record, 5), "another program's");
        let write = |cookie| {
            fs::write(&record, serde_json::to_string(&Record { cookie, ..example() }).unwrap()).unwrap();
        };
        write(cookie + 1);
        assert!(lacks(), "the one before's");
        write(cookie);
        assert!(!lacks());
        fs::write(&record, "{").unwrap();
        assert!(!lacks(), "it may be its");
    }

    #[test]
    fn orphans_are_looked_for_while_nobody_makes_a_device() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("making");
        let (shared, alone) = (FlockArg::LockSharedNonblock, FlockArg::LockExclusiveNonblock);
        let take = |how| lock(&path, how, Duration::ZERO).unwrap();
        let makers = (take(shared), take(shared));
        assert!(makers.0.is_some() && makers.1.is_some(), "they are not in each other's way");
        assert!(take(alone).is_none());
        drop(makers);
        let remover = take(alone);
        assert!(remover.is_some() && take(shared).is_none());
    }
}
