//! The memory of a redo log: a file in the run directory, mapped.
//!
//! The run directory is on a tmpfs, so the file is memory that outlives the server and does not
//! outlive the machine's uptime: just as long as its log is of use. What is in it is the engine's
//! affair ([`RedoLog`]). The file's space is allocated before it is mapped: a
//! store can then not fail for lack of it.
//!
//! A log must not be replayed on an image that somebody else has changed since. While the server lives its
//! locks see to that; it also notes, every second, which file the image is and that it was ours until now
//! ([`Witness`]). Whoever takes the log over compares: before the image is opened, because its path may lead
//! to another file by then, which a living server does not notice ([`RedoFile::check_same`]), and before the
//! log is replayed ([`RedoFile::check_unchanged`]): then the image must not have been modified since.
//!
//! Its supervisor sees a server die: it notes how the image was left, when what the server had begun has ended
//! too ([`note_end`]): how long the file is and when it was modified, or how much this host has written to the
//! block device. That is how it must be found. Where nobody saw the death it must not have been modified later
//! than the last note, and a few seconds for what came after that. When it was last modified would not do for
//! such notes: who then modifies it for the first time in a while, with a request or by a replay, may be killed
//! before it can note that.
//!
//! This cannot tell: changes within one tick of the clock that the file system keeps its times by (2 s on some,
//! mostly milliseconds); a file whose times somebody has set back; what is written to a block device by another
//! host, past it (to the disk that a partition is on), or after a death that nobody saw.

#![allow(unsafe_code, reason = "a mapping seen as atomic words")]

mod witness;

pub(crate) use witness::Witness;

use crate::{
    config::Config,
    identity::{Identity, State},
    runfile,
};
use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, fallocate};
use qcow2_engine::{REDO_BYTES, RedoLog, RedoMemory};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use witness::{Noted, Seen, Sight, cannot_look_at, look_at, open_to_look};

/// Bytes of the file: the log, and a page with the witness.
const FILE_BYTES: usize = REDO_BYTES + 4096;
/// The witness' words.
const OURS_UNTIL: usize = REDO_BYTES / 8;
const INODE: usize = OURS_UNTIL + 1;
const BORN: usize = OURS_UNTIL + 2;
const LEFT: usize = OURS_UNTIL + 3;
/// Seconds by which the image may have changed after its dead server last looked, if nobody saw its death: the
/// pause until it would have looked again, and what it had begun.
const TOLERANCE_SECONDS: u64 = 3;

/// Why a redo log's memory could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RedoFileError {
    #[error("{what} {}: {source}{hint}", .path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error, hint: &'static str },
    #[error(
        "{} was changed by somebody else after its server had died: what is in {} does not fit it any more; \
         remove that file to give up the writes in it that were acknowledged and not flushed",
        .image.display(), .log.display()
    )]
    Changed { image: PathBuf, log: PathBuf },
    #[error(
        "cannot look at {}: {source}; put it back, or remove {} to give up what was acknowledged and is not in it yet",
        .image.display(), .log.display()
    )]
    Gone { image: PathBuf, log: PathBuf, source: io::Error },
    #[error(
        "{} is not the file that the dead server had open: put that one back, or remove {} to give it up",
        .image.display(), .log.display()
    )]
    Replaced { image: PathBuf, log: PathBuf },
}

/// A redo log's memory, and the witness beside it.
#[derive(Clone)]
pub(crate) struct RedoFile {
    map: Arc<Mapped>,
    path: PathBuf,
}

impl RedoFile {
    /// Makes the file of device `id`, or takes over the one that is there.
    pub(crate) fn create(id: u32) -> Result<Self, RedoFileError> {
        let path = runfile::redo_path(id);
        match make(&path).and_then(|file| map(&file)) {
            Ok(map) => Ok(Self { map, path }),
            Err(source) => Err(RedoFileError::Io {
                what: "cannot make the redo log",
                path,
                source,
                hint: "; without one (add --no-recovery) a server that dies cannot be replaced",
            }),
        }
    }

    /// The file that the dead server of device `id` has left; none if it kept no log, or was killed before
    /// there could be anything in it.
    pub(crate) fn open(id: u32) -> Result<Option<Self>, RedoFileError> {
        Self::open_at(runfile::redo_path(id))
    }

    fn open_at(path: PathBuf) -> Result<Option<Self>, RedoFileError> {
        let opened = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.and_then(|file| adopt(&file)),
        };
        match opened {
            Ok(map) => Ok(map.map(|map| Self { map, path })),
            Err(source) => {
                Err(RedoFileError::Io { what: "cannot open the redo log", path, source, hint: "" })
            }
        }
    }

    /// Whether there is something in it that is in no image yet, or may be, and can still be written there.
    pub(crate) fn owes(&self) -> bool {
        !RedoLog::open(self.memory()).is_ok_and(|log| log.is_empty() || log.has_failed())
    }

    /// Whether a barrier of its server has failed, so that nobody knows what is on disk.
    pub(crate) fn has_failed(&self) -> bool {
        RedoLog::open(self.memory()).is_ok_and(|log| log.has_failed())
    }

    /// The memory for the log.
    pub(crate) fn memory(&self) -> RedoMemory {
        Arc::clone(&self.map) as RedoMemory
    }

    /// A witness of the image, from now on.
    pub(crate) fn witness(&self, image: &Path) -> Result<Witness, RedoFileError> {
        Witness::begin(self.sight(image)?).map_err(|source| cannot_look_at(image, source))
    }

    fn sight(&self, image: &Path) -> Result<Sight, RedoFileError> {
        Ok(Sight { map: Arc::clone(&self.map), image: open_to_look(image)? })
    }

    /// Makes sure that the image is still the file that the dead server had open.
    pub(crate) fn check_same(&self, image: &Path) -> Result<(), RedoFileError> {
        let (noted, now) = (self.map.witness(), self.identify(image)?);
        // One that was killed before it could look has noted nothing.
        if noted.identity.inode == 0 || now == noted.identity {
            return Ok(());
        }
        Err(RedoFileError::Replaced { image: image.to_owned(), log: self.path.clone() })
    }

    /// Which file is there now under the name of the dead server's.
    fn identify(&self, image: &Path) -> Result<Identity, RedoFileError> {
        witness::identify(image).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => {
                RedoFileError::Gone { image: image.to_owned(), log: self.path.clone(), source }
            }
            _ => cannot_look_at(image, source),
        })
    }

    /// Makes sure that nobody but the dead server has changed the image.
    pub(crate) fn check_unchanged(&self, image: &Path) -> Result<(), RedoFileError> {
        let (noted, now) = (self.map.witness(), look_at(image)?);
        let is_ours = match self.map.left() {
            Some(left) => now.state.is_still(left),
            None => now.state.modified_seconds() <= noted.ours_until.saturating_add(TOLERANCE_SECONDS),
        };
        match is_ours {
            true => Ok(()),
            false => Err(RedoFileError::Changed { image: image.to_owned(), log: self.path.clone() }),
        }
    }

    /// Notes how a dead server has left its image.
    fn note_left(&self, config: &Config) {
        match witness::last_look(config) {
            Ok(Seen { identity, state }) if identity == self.map.witness().identity => {
                self.map.note_left(state);
            }
            // What has become of that file its successor will say.
            Ok(_) => {}
            Err(error) => tracing::warn!(
                "how the dead server has left {} is not known to the moment: {error}",
                config.image.display()
            ),
        }
    }
}

/// Notes how the killed server of device `id` has left its image: for who sees its death.
pub(crate) fn note_end(id: u32) {
    // What is wrong with these its successor will say.
    let Ok(Some(file)) = RedoFile::open(id) else { return };
    if file.map.left().is_some() {
        return; // the server had not come to open the image, so others may have
    }
    file.map.extend(witness::now());
    if let Ok(Some(entry)) = runfile::load(id) {
        file.note_left(&entry.record.config);
    }
}

/// Whether there is something in the log of device `id` that is in no image yet, or may be: a log that cannot
/// be read is not known to be of no use.
pub(crate) fn owes(id: u32) -> bool {
    match RedoFile::open(id) {
        Ok(None) => false,
        Ok(Some(file)) => file.owes(),
        Err(_) => true,
    }
}

fn make(path: &Path) -> io::Result<File> {
    if let Some(directory) = path.parent() {
        runfile::make_directory(directory)?;
    }
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let is_new = file.metadata()?.len() == 0;
    // First of all: one that is found as long as this and not whole is allocated by whoever finds it.
    file.set_len(FILE_BYTES as u64)?;
    if is_new {
        fill(&file)?
    } else {
        allocate(&file)?
    }
    Ok(file)
}

/// Allocates a new file by writing zeros: its pages, unlike those that are only allocated, can be mapped and locked
/// many at a time.
fn fill(file: &File) -> io::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut at = 0;
    while at < FILE_BYTES {
        let len = ZEROS.len().min(FILE_BYTES - at);
        file.write_all_at(&ZEROS[..len], at as u64)?;
        at += len;
    }
    Ok(())
}

/// Maps a file that another process has made. Nothing if it had only begun to: then nothing was acknowledged
/// yet.
fn adopt(file: &File) -> io::Result<Option<Arc<Mapped>>> {
    match file.metadata()?.len() {
        0 => Ok(None),
        len if len == FILE_BYTES as u64 => {
            // It may have been killed before this.
            allocate(file)?;
            map(file).map(Some)
        }
        len => Err(io::Error::other(format!("it has {len} bytes, not {FILE_BYTES}"))),
    }
}

fn allocate(file: &File) -> io::Result<()> {
    Ok(fallocate(file, FallocateFlags::empty(), 0, FILE_BYTES as libc::off_t)?)
}

fn map(file: &File) -> io::Result<Arc<Mapped>> {
    let map = MmapOptions::new().len(FILE_BYTES).map_raw(file)?;
    // All of it now: pages that wait to be touched may be swapped out meanwhile, to the device that they
    // belong to.
    if let Err(error) = map.lock() {
        tracing::warn!(
            "the redo log is not locked in memory: {error}; with swap space on the device it may deadlock"
        );
    }
    Ok(Arc::new(Mapped(map)))
}

/// A shared mapping of the whole file.
struct Mapped(MmapRaw);

impl AsRef<[AtomicU64]> for Mapped {
    fn as_ref(&self) -> &[AtomicU64] {
        &self.words()[..REDO_BYTES / 8]
    }
}

impl Mapped {
    fn witness(&self) -> Noted {
        let [ours_until, inode, born] =
            [OURS_UNTIL, INODE, BORN].map(|word| self.words()[word].load(Ordering::Relaxed));
        Noted { identity: Identity { inode, born }, ours_until }
    }

    /// For who has the image: what a server before it has left is no more.
    fn note(&self, Noted { identity: Identity { inode, born }, ours_until }: Noted) {
        for (word, value) in [(LEFT, 0), (OURS_UNTIL, ours_until), (INODE, inode), (BORN, born)] {
            self.words()[word].store(value, Ordering::Relaxed);
        }
    }

    /// How the dead server has left the image, if somebody saw its death.
    fn left(&self) -> Option<State> {
        let kind = self.words()[LEFT].load(Ordering::Acquire);
        let [first, second] = [1, 2].map(|word| self.words()[LEFT + word].load(Ordering::Relaxed));
        Some(State::from_words([kind, first, second])).filter(|state| *state != State::Unknown)
    }

    fn note_left(&self, state: State) {
        let [kind, first, second] = state.to_words();
        self.words()[LEFT + 1].store(first, Ordering::Relaxed);
        self.words()[LEFT + 2].store(second, Ordering::Relaxed);
        self.words()[LEFT].store(kind, Ordering::Release);
    }

    /// Time does not go back with the clock.
    fn extend(&self, ours_until: u64) {
        self.words()[OURS_UNTIL].fetch_max(ours_until, Ordering::Relaxed);
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping begins at a page, has that many bytes, and lives as long as `self`. Its
        // file, which only root can open, keeps its length, so every byte is there. Atomics may be
        // shared with whoever else maps the file.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast::<AtomicU64>(), FILE_BYTES / 8) }
    }
}

#[cfg(test)]
mod tests;
