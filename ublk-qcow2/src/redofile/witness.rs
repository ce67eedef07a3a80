//! Who notes beside a redo log which file its image is, and that it is ours.

use super::{Mapped, RedoFileError};
use crate::safety;
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
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

/// Which file an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) inode: u64,
    /// When it was made, in nanoseconds, or 0 where that is not known: the number of an inode is given out
    /// again.
    pub(super) born: u64,
}

/// What is seen of an image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) identity: Identity,
    /// When it was last modified, in seconds; 0 where that is not known.
    pub(super) modified: u64,
}

/// What is noted of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Noted {
    pub(super) identity: Identity,
    /// Until then nobody else can have modified it, in seconds.
    pub(super) ours_until: u64,
}

impl Seen {
    fn of(image: &File) -> io::Result<Self> {
        let it = image.metadata()?;
        if it.file_type().is_block_device() {
            // Its node may be made anew; when it was modified says nothing of what is in the device, only
            // when udev has set its owner and mode, which it does at every event.
            return Ok(Self { identity: Identity { inode: it.rdev(), born: 0 }, modified: 0 });
        }
        // A file from before 1970 counts as old.
        let modified = u64::try_from(it.mtime()).unwrap_or(0);
        let born = it.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let born = born.map_or(0, |time| time.as_nanos() as u64);
        Ok(Self { identity: Identity { inode: it.ino(), born }, modified })
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
        // An image that cannot be looked at just now was noted a second ago.
        if let Ok(Seen { identity, modified }) = Seen::of(&self.image) {
            // Another machine, whose clock is ahead, may say when a file was modified.
            self.map.note(Noted { identity, ours_until: now().max(modified) });
        }
    }
}

/// In seconds, as the times of files.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

pub(super) fn open_to_look(image: &Path) -> Result<File, RedoFileError> {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(image);
    opened.map_err(|source| cannot_look_at(image, source))
}

pub(super) fn look_at(image: &Path) -> Result<Seen, RedoFileError> {
    Seen::of(&open_to_look(image)?).map_err(|source| cannot_look_at(image, source))
}

pub(super) fn cannot_look_at(image: &Path, source: io::Error) -> RedoFileError {
    RedoFileError::Io { what: "cannot look at", path: image.to_owned(), source, hint: "" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, path::PathBuf};

    /// udev sets owner and mode of a block device's node at every event, which counts as a modification of
    /// it: its image could neither be recovered nor settled.
    #[test]
    fn when_a_node_was_modified_says_nothing_of_its_block_device() {
        let is_block = |path: &PathBuf| fs::metadata(path).is_ok_and(|it| it.file_type().is_block_device());
        let nodes = fs::read_dir("/dev").unwrap().flatten().map(|node| node.path());
        // A container may have none.
        let Some(node) = nodes.into_iter().find(is_block) else { return };
        assert_eq!(look_at(&node).unwrap().modified, 0, "{}", node.display());
        assert_ne!(look_at(&node).unwrap().identity.inode, 0, "its number still tells which it is");
    }
}
