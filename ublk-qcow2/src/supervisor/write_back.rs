//! What the kernel could not write to the image, heard by the supervisor as well.
//!
//! The kernel tells each open file once of a write-back that has failed. A server that is killed while it asks may
//! take the answer with it, and its successor, which opens the image after that, is told nothing: its flushes would
//! succeed, over what is lost. So the supervisor has the image open, too. When a server has died at a barrier it asks
//! for itself, and leaves what it hears in the redo log.
//!
//! A disk that refuses to empty its own cache (of an image that is opened for direct I/O) says that to who asks, and
//! not again to the next one.

use crate::{redofile::RedoFile, runfile};
use qcow2_engine::RedoLog;
use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
};

/// The image of a device, open since its first server served.
pub(super) struct WriteBack {
    image: Option<File>,
}

impl WriteBack {
    /// That of device `id`, if it may be changed.
    pub(super) fn of(id: u32) -> Self {
        let config = runfile::load(id).ok().flatten().map(|entry| entry.record.config);
        let path = config.filter(|config| config.recovery && !config.read_only).map(|config| config.image);
        // What was put in its place meanwhile may be a FIFO.
        let open = |path| OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        Self { image: path.and_then(|path| open(path).ok()) }
    }

    /// A server has been killed: notes for the next one whether its last barrier has failed.
    pub(super) fn judge(&self, id: u32) {
        let Some(image) = &self.image else { return };
        // What is wrong with these the successor will say.
        let Ok(Some(file)) = RedoFile::open(id) else { return };
        let Ok(log) = RedoLog::open(file.memory()) else { return };
        // Of a block device somebody has just asked who looked how it was left.
        let was_asked = image.metadata().is_ok_and(|it| it.file_type().is_block_device());
        if log.has_failed() || !log.is_at_barrier() && !was_asked {
            return;
        }
        if let Err(error) = image.sync_data() {
            tracing::error!(id, "what the dead server had written is not all on disk: {error}");
            log.note_failure();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone;

    /// A server was killed while its fdatasync failed: nobody had heard of that.
    #[test]
    fn a_barrier_that_failed_with_its_server_is_known() {
        let test = "supervisor::write_back::tests::a_barrier_that_failed_with_its_server_is_known";
        alone::in_a_directory(test, |directory| {
            let file = RedoFile::create(7).unwrap();
            let log = RedoLog::create(file.memory()).unwrap();
            let sound = directory.join("sound");
            let whole = WriteBack { image: Some(File::create(sound).unwrap()) };
            // It has nothing that could be written back.
            let failing = WriteBack { image: Some(File::open("/dev/null").unwrap()) };
            failing.judge(7);
            assert!(!log.has_failed(), "nobody had asked");
            // Barriers that are under way.
            (*file.memory()).as_ref()[4].store(1, std::sync::atomic::Ordering::Relaxed);
            whole.judge(7);
            assert!(log.is_at_barrier() && !log.has_failed(), "it went well after all");
            failing.judge(7);
            assert!(log.has_failed());
        });
    }
}
