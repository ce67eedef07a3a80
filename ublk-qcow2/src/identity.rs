//! Which files a server has open, for whoever looks for them by their names when it is dead.
//!
//! A name may lead to another file by then: a backup was moved there, or a file system is not mounted. A
//! successor that took it for the same would serve another disk to users who have the first one half in their
//! memory. So a record says which files they were ([`KnownFile`]), and a redo log which file its image is
//! ([`Identity`]). Another disk it is as well when somebody has changed a file below the image meanwhile, hence the
//! [`State`].

mod state;

pub(crate) use state::State;

use crate::config::Config;
use qcow2_engine::{
    Image,
    io::{FileId, Files},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::Metadata,
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
    time::UNIX_EPOCH,
};

/// Which file it is, of those on its file system, or which block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) inode: u64,
    /// When it was made, in nanoseconds, or 0 where that is not known: the number of an inode is given out
    /// again.
    pub(crate) born: u64,
}

impl Identity {
    pub(crate) fn of(it: &Metadata) -> Self {
        if it.file_type().is_block_device() {
            // Its node may be made anew.
            return Self { inode: it.rdev(), born: 0 };
        }
        let born = it.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Self { inode: it.ino(), born: born.map_or(0, |time| time.as_nanos() as u64) }
    }
}

/// A file of a chain, as a record has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KnownFile {
    /// For people.
    name: String,
    /// The number of its file system, which is another one when that was unmounted meanwhile; 0 for a block
    /// device.
    device: u64,
    identity: Identity,
    /// As it must be as long as it is served, unless it may change.
    #[serde(default)]
    state: State,
}

/// Why files are not those that a dead server had open.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OtherFiles {
    #[error(
        "{now} is not the file that the dead server had open as {then}: put that one back, or \
         `ublk-qcow2 del -n {id}` and attach the image anew"
    )]
    Replaced { now: String, then: String, id: u32 },
    #[error(
        "{name} was changed by somebody else since /dev/ublkb{id} was made ({then}; now {now}): put it back as it was, \
         its times too, or `ublk-qcow2 del -n {id}` and attach the image anew"
    )]
    Changed { name: String, now: State, then: State, id: u32 },
    #[error(
        "the image's chain has {now} files, and had {then} when its server died: put them back, or \
         `ublk-qcow2 del -n {id}` and attach the image anew"
    )]
    Rebased { now: usize, then: usize, id: u32 },
}

impl KnownFile {
    /// One that may change.
    pub(crate) fn of(name: String, it: &Metadata) -> Self {
        let device = if it.file_type().is_block_device() { 0 } else { it.dev() };
        Self { name, device, identity: Identity::of(it), state: State::Unknown }
    }

    /// The files of an image that is open as `config` says, the image itself first.
    pub(crate) fn of_chain(image: &Image, files: &Files, config: &Config) -> io::Result<Vec<Self>> {
        let known = |(depth, (name, file)): (usize, (&str, FileId))| {
            let it = files.metadata(file)?;
            let known = Self::of(name.to_owned(), &it);
            let may_change = config.force_share || (depth == 0 && !config.read_only);
            Ok(if may_change { known } else { known.in_state(&files.path(file)?, &it) })
        };
        image.chain().zip(image.files()).enumerate().map(known).collect()
    }

    fn in_state(self, path: &Path, it: &Metadata) -> Self {
        // Of a device that cannot be written to, say: nothing is known.
        Self { state: State::written(path, it).unwrap_or_default(), ..self }
    }

    /// The number of the block device that it is, or that its file system is on; of another number where that is on none.
    pub(crate) fn block_device(&self) -> u64 {
        if self.device == 0 { self.identity.inode } else { self.device }
    }

    /// Whether it is the same file, at the same time.
    pub(crate) fn is(&self, other: &Self) -> bool {
        (self.device, self.identity) == (other.device, other.identity)
    }
}

/// A file on the file system with this number, or with 0 the block device with the other one, for tests.
#[cfg(test)]
pub(crate) fn example(device: u64, inode: u64) -> KnownFile {
    KnownFile { name: String::new(), device, identity: Identity { inode, born: 0 }, state: State::Unknown }
}

/// Makes sure that the files `now` are those that device `id` was served from `then`, and as they were, as far as
/// that is known.
pub(crate) fn check_same(then: &[KnownFile], now: &[KnownFile], id: u32) -> Result<(), OtherFiles> {
    // A version of before has noted none.
    if then.is_empty() {
        return Ok(());
    }
    let mut pairs = then.iter().zip(now);
    if let Some((then, now)) = pairs.find(|(then, now)| then.identity != now.identity) {
        return Err(OtherFiles::Replaced { now: now.name.clone(), then: then.name.clone(), id });
    }
    if then.len() != now.len() {
        return Err(OtherFiles::Rebased { now: now.len(), then: then.len(), id });
    }
    let mut pairs = then.iter().zip(now);
    match pairs.find(|(then, now)| !now.state.is_still(then.state)) {
        Some((then, now)) => {
            Err(OtherFiles::Changed { name: now.name.clone(), now: now.state, then: then.state, id })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs::{self, File, FileTimes, Permissions},
        os::unix::fs::PermissionsExt,
        thread::sleep,
        time::Duration,
    };

    /// A backing file was changed, and its overlay's server killed: the successor served the other disk.
    #[test]
    fn who_reads_a_file_finds_what_was_read_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        fs::write(&path, "base").unwrap();
        let it = || fs::metadata(&path).unwrap();
        let now = || [KnownFile::of("base".to_owned(), &it()).in_state(&path, &it())];
        let (then, times) = (now(), FileTimes::new().set_modified(it().modified().unwrap()));
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        fs::read(&path).unwrap();
        check_same(&then, &now(), 7).unwrap();
        sleep(Duration::from_millis(20));
        fs::write(&path, "else").unwrap();
        let refused = check_same(&then, &now(), 7).unwrap_err().to_string();
        for part in ["base was changed", "4 bytes, modified @", "put it back", "del -n 7"] {
            assert!(refused.contains(part), "{part}: {refused}");
        }
        let may_change = [KnownFile::of("base".to_owned(), &it())];
        check_same(&may_change, &now(), 7).unwrap();
        File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
        check_same(&then, &now(), 7).unwrap();
        fs::write(&path, "longer").unwrap();
        File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
        assert!(check_same(&then, &now(), 7).is_err());
    }

    #[test]
    fn a_file_is_known_by_what_it_is_and_not_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let known = |name: &str| KnownFile::of(name.to_owned(), &fs::metadata(at(name)).unwrap());
        for name in ["top", "base", "other"] {
            fs::write(at(name), name).unwrap();
        }
        let then = [known("top"), known("base")];
        assert!(check_same(&then, &[known("top"), known("base")], 7).is_ok());
        assert!(check_same(&[], &then, 7).is_ok(), "nothing is known");
        fs::rename(at("base"), at("moved")).unwrap();
        assert!(check_same(&then, &[known("top"), known("moved")], 7).is_ok());
        assert!(then[1].is(&known("moved")) && !then[1].is(&then[0]));
        fs::rename(at("other"), at("base")).unwrap();
        let refused = check_same(&then, &[known("top"), known("base")], 7).unwrap_err().to_string();
        for part in ["base is not the file", "as base", "put that one back", "del -n 7"] {
            assert!(refused.contains(part), "{part}: {refused}");
        }
        let unmounted = KnownFile { device: then[1].device + 1, ..then[1].clone() };
        assert!(check_same(&then, &[known("top"), unmounted], 7).is_ok());
        let shorter = check_same(&then, &[known("top")], 7).unwrap_err().to_string();
        assert!(shorter.contains("1 files, and had 2"), "{shorter}");
    }
}
