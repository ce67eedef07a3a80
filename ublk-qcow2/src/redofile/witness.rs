//! Who notes beside a redo log which file its image is, and that it is ours.

use super::{Mapped, RedoFileError};
use crate::{
    config::{Config, locking},
    identity::{Identity, State},
    safety, wait,
};
use qcow2_engine::io::{Access, Files, Storage, files::Caching};
use std::{
    fs::{File, Metadata, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Between two notes of a witness.
pub(super) const PAUSE: Duration = Duration::from_secs(1);
/// How long the end of one is waited for.
const END_WAIT: Duration = Duration::from_secs(2);
/// How long what a dead server had begun is waited for: if it takes longer, or somebody else was quicker, how
/// the image was left is not known.
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// Between two attempts to lock the image.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// What is seen of an image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) identity: Identity,
    pub(super) state: State,
}

/// What is noted of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Noted {
    pub(super) identity: Identity,
    /// Until then nobody else can have modified it, in seconds.
    pub(super) ours_until: u64,
}

impl Seen {
    fn of(it: &Metadata) -> Self {
        Self { identity: Identity::of(it), state: State::of(it) }
    }
}

/// Has it noted beside the log which file its image is, and that it is ours: now, every second, and when this
/// is dropped. For who has the image's locks, as long as it may modify the image.
///
/// It has a thread of its own, because who may modify the image may be busy with that, or wait for it, for
/// minutes.
pub(crate) struct Witness {
    /// Closed, it has the thread end.
    go_on: Option<Sender<()>>,
    /// Closed when the thread has let go of the image.
    ended: Receiver<()>,
}

impl Witness {
    pub(super) fn begin(sight: Sight) -> io::Result<Self> {
        sight.note();
        let (go_on, stop) = mpsc::channel();
        let (to_end, ended) = mpsc::channel();
        thread::Builder::new().name("witness".to_owned()).spawn(move || {
            safety::keep_nothing();
            while stop.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout) {
                sight.note();
            }
            sight.note();
            // In this order: whoever is told may want to unmount the image's file system.
            drop(sight);
            drop::<Sender<()>>(to_end);
        })?;
        Ok(Self { go_on: Some(go_on), ended })
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        drop(self.go_on.take());
        // It may hang with the file system that the image is on.
        let _ = self.ended.recv_timeout(END_WAIT);
    }
}

/// The image as a witness sees it.
pub(super) struct Sight {
    pub(super) map: Arc<Mapped>,
    /// Open, because it may not be found again without privileges.
    pub(super) image: File,
}

impl Sight {
    pub(super) fn note(&self) {
        // Its file system may take its time to answer.
        self.map.extend(now());
        // An image that cannot be looked at just now was noted a second ago.
        if let Ok(metadata) = self.image.metadata() {
            let Seen { identity, state } = Seen::of(&metadata);
            // Another machine, whose clock is ahead, may say when a file was modified.
            self.map.note(Noted { identity, ours_until: now().max(state.modified_seconds()) });
        }
    }
}

/// In seconds, as the times of files.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

pub(super) fn open_to_look(image: &Path) -> Result<File, RedoFileError> {
    open_path(image).map_err(|source| cannot_look_at(image, source))
}

fn open_path(image: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(image)
}

/// Which file it is, without a look at its state.
pub(super) fn identify(image: &Path) -> io::Result<Identity> {
    Ok(Identity::of(&open_path(image)?.metadata()?))
}

pub(super) fn look_at(image: &Path) -> Result<Seen, RedoFileError> {
    look(image).map_err(|source| cannot_look_at(image, source))
}

fn look(image: &Path) -> io::Result<Seen> {
    let it = open_path(image)?.metadata()?;
    Ok(Seen { identity: Identity::of(&it), state: State::written(image, &it)? })
}

/// What a dead server has left. What it had begun may end later than it: then it has the image locked until
/// that has, so this is seen under the image's locks, which say too that nobody else is at it.
pub(super) fn last_look(config: &Config) -> io::Result<Seen> {
    let files = Files::with_locking(Caching::Buffered, locking(config.force_share));
    let is_locked =
        |opened: &io::Result<_>| matches!(opened, Err(error) if error.kind() == io::ErrorKind::ResourceBusy);
    let open = || files.open(&config.image, Access::ReadWrite);
    wait::patiently(LOCK_WAIT, LOCK_PAUSE, is_locked, open)?;
    look(&config.image)
}

pub(super) fn cannot_look_at(image: &Path, source: io::Error) -> RedoFileError {
    RedoFileError::Io { what: "cannot look at", path: image.to_owned(), source, hint: "" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone;
    use std::{fs, os::unix::fs::FileTypeExt, path::PathBuf};

    /// udev sets owner and mode of a block device's node at every event, which counts as a modification of
    /// it: its image could neither be recovered nor settled.
    #[test]
    fn when_a_node_was_modified_says_nothing_of_its_block_device() {
        let is_block = |path: &PathBuf| fs::metadata(path).is_ok_and(|it| it.file_type().is_block_device());
        let nodes = fs::read_dir("/dev").unwrap().flatten().map(|node| node.path());
        let Some(node) = nodes.into_iter().find(is_block) else {
            return alone::skip("when a node was modified: a container may have no block device");
        };
        let seen = Seen::of(&fs::metadata(&node).unwrap());
        assert_eq!(seen.state.modified_seconds(), 0, "{}", node.display());
        assert_ne!(seen.identity.inode, 0, "its number still tells which it is");
    }
}
