//! The image of a device: opened, brought up to what its dead server had acknowledged, and closed.
//!
//! None of this runs while the device is served: each step has a ring of its own, and waits for it.

use super::ServeError;
use crate::{
    config::Config,
    crew,
    device::Device,
    identity::{self, KnownFile},
    queue::Search,
    redofile::{RedoFile, Witness},
    runfile::Record,
    wait,
};
use qcow2_engine::{
    Image, Lane, OpenOptions, Pace, RedoLog,
    exec::block_on,
    io::{Files, uring::Uring},
};
use std::{
    future::{Future, ready},
    path::Path,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

/// Submission slots of the ring that opens the image.
const OPENING_RING: u32 = 64;
/// How long the kernel may take to let go of the image of a server that was killed.
const DEAD_LOCK_WAIT: Duration = Duration::from_secs(60);
/// How long the end of a device may be put off by a search for leaks.
const CLOSING_SEARCH: Duration = Duration::from_secs(5);
/// Between two attempts to open it.
const DEAD_LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Opens an image, as anybody does.
pub(super) fn open_image(
    path: &Path,
    options: &OpenOptions,
    files: &Arc<Files>,
) -> Result<Arc<Image>, ServeError> {
    let ring = Uring::new(Arc::clone(files), OPENING_RING).map_err(ServeError::SetUp)?;
    let opened = block_on(&ring, Image::open(&ring, &**files, path, options)).map_err(ServeError::SetUp)?;
    let image = opened.map_err(ServeError::Open)?;
    for path in files.fallen_back() {
        let path = path.display();
        tracing::info!(
            "{path} goes through the page cache: direct I/O of 512 bytes is not possible there, or not safe (FUSE)"
        );
    }
    Ok(image)
}

/// Opens the image of a dead server for its successor, and keeps a log for the next.
pub(super) fn take_image_over(
    record: &Record,
    device: &Device,
    files: &Arc<Files>,
) -> Result<(Arc<Image>, Option<Witness>), ServeError> {
    let (image, log) = match RedoFile::open(record.id)? {
        Some(file) => {
            let memory = file.memory();
            let (image, log) = open_as_left(record, files, file, |image| check_files(record, image, files))?;
            let left = RedoLog::open(memory)?;
            if left.has_failed() {
                // The same log: whoever comes next has to know, too.
                image.keep_redo_log(left);
                return Ok((image, Some(log.witness)));
            }
            (image, Some(log))
        }
        // The dead server was not to change it, or had not got to changing it, or its writes were given up.
        None => {
            let image = open_when_let_go(&record.config, files)?;
            check_files(record, &image, files)?;
            let log = new_log(device, &image, &record.config)?;
            (image, log)
        }
    };
    let witness = keep_log(&image, log)?;
    Ok((image, witness))
}

/// Keeps a log of an image that is served for the first time, if there is to be one.
pub(super) fn keep_new_log(
    device: &Device,
    image: &Image,
    config: &Config,
) -> Result<Option<Witness>, ServeError> {
    keep_log(image, new_log(device, image, config)?)
}

/// Makes everything durable and leaves no leak, when nobody serves the image any more. Where a server has been
/// killed before, nor of what that had in reserve, if the search for it has not come to its end and takes no longer
/// than [`CLOSING_SEARCH`].
pub(super) fn close_image(image: &Arc<Image>, files: &Arc<Files>, search: Search) -> Result<(), ServeError> {
    let ring = Uring::new(Arc::clone(files), OPENING_RING).map_err(ServeError::SetUp)?;
    let lane = Lane::new(image, ring.clone(), 1);
    let close = async {
        if search == Search::AtOnce
            && !image.is_searched()
            && let Err(error) = lane.reclaim_leaks(&Until(Instant::now() + CLOSING_SEARCH)).await
        {
            tracing::warn!("leaked clusters were not all given back: {error}");
        }
        lane.close().await
    };
    block_on(&ring, close).map_err(ServeError::SetUp)?.map_err(ServeError::Close)
}

/// The pace of work that somebody waits for, up to a moment.
struct Until(Instant);

impl Pace for Until {
    fn rest(&self) -> Pin<Box<dyn Future<Output = bool> + '_>> {
        Box::pin(ready(Instant::now() < self.0))
    }
}

/// What has become of what a dead server had acknowledged.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// All of it is in the image.
    Whole,
    /// It may be lost, and why.
    Lost(String),
}

/// Writes to the image what a dead server had acknowledged, when nobody is to serve it any more. After a barrier
/// that has failed nobody knows what that would have to be written to: the image is left as a loss of power would
/// leave it.
pub(crate) fn settle(record: &Record) -> Result<Settled, ServeError> {
    let Some(file) = RedoFile::open(record.id)? else { return Ok(Settled::Whole) };
    if file.has_failed() {
        let image = record.config.image.display();
        return Ok(Settled::Lost(format!(
            "an fdatasync of {image} has failed, and what was written since the last flush before it may be lost"
        )));
    }
    settle_log(record, file).map(|()| Settled::Whole)
}

fn settle_log(record: &Record, file: RedoFile) -> Result<(), ServeError> {
    let owes = file.owes();
    let files = Arc::new(record.config.files());
    // What is owed is owed to the image, whatever has become of the files below it.
    match open_as_left(record, &files, file, |_| Ok(())) {
        Ok((image, _log)) => close_image(&image, &files, Search::AtOnce.if_wanted(&record.config)),
        // What the error advises is for who is owed something.
        Err(_) if !owes => {
            tracing::info!(
                id = record.id,
                "nothing is owed to the image, which is left alone: it is gone, cannot be opened, or is not as its server had left it"
            );
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// A redo log, and who testifies that its image is ours.
struct Log {
    file: RedoFile,
    witness: Witness,
}

impl Log {
    /// For who has the image open: from now on it may be modified.
    fn begin(file: RedoFile, config: &Config) -> Result<Self, ServeError> {
        let witness = file.witness(&config.image)?;
        Ok(Self { file, witness })
    }
}

/// The log of a device that has none yet, if it is to have one: its image may be changed, and its server
/// replaced.
fn new_log(device: &Device, image: &Image, config: &Config) -> Result<Option<Log>, ServeError> {
    if !device.is_recoverable() || image.is_read_only() {
        return Ok(None);
    }
    Ok(Some(Log::begin(RedoFile::create(device.id())?, config)?))
}

/// From now on changes are remembered for the next server, in a log that begins empty.
fn keep_log(image: &Image, log: Option<Log>) -> Result<Option<Witness>, ServeError> {
    let Some(Log { file, witness }) = log else { return Ok(None) };
    image.keep_redo_log(RedoLog::create(file.memory())?);
    Ok(Some(witness))
}

/// Opens the image of a dead server, which the kernel may not have let go of yet, and which that may have
/// condemned.
fn open_when_let_go(config: &Config, files: &Arc<Files>) -> Result<Arc<Image>, ServeError> {
    let options = OpenOptions { serve_corrupt: true, ..config.open_options() };
    let is_locked = |opened: &_| matches!(opened, Err(ServeError::Open(error)) if error.is_locked());
    let attempt = || open_image(&config.image, &options, files);
    let open = || wait::patiently(DEAD_LOCK_WAIT, DEAD_LOCK_PAUSE, is_locked, attempt);
    crew::interruptible(open).map_err(ServeError::SetUp)?
}

/// Makes sure that a dead server's device goes on with the files that it had.
fn check_files(record: &Record, image: &Image, files: &Files) -> Result<(), ServeError> {
    let now = KnownFile::of_chain(image, files, &record.config).map_err(ServeError::SetUp)?;
    Ok(identity::check_same(&record.files, &now, record.id)?)
}

/// Opens the image of a dead server and, if it passes, replays the redo log that it has left; but not one in which
/// a barrier has failed.
fn open_as_left(
    record: &Record,
    files: &Arc<Files>,
    file: RedoFile,
    check: impl FnOnce(&Image) -> Result<(), ServeError>,
) -> Result<(Arc<Image>, Log), ServeError> {
    let config = &record.config;
    file.check_same(&config.image)?;
    let image = open_when_let_go(config, files)?;
    check(&image)?;
    let left = RedoLog::open(file.memory())?;
    if left.has_failed() {
        tracing::error!(
            id = record.id,
            "an fdatasync of the dead server failed: nothing is accepted until the image is attached anew, and what \
             was written since the last flush before it may be lost"
        );
        return Ok((image, Log::begin(file, config)?));
    }
    if !left.is_empty() {
        file.check_unchanged(&config.image)?;
    }
    // Before the replay: should it be cut short it is to be done again.
    let log = Log::begin(file, config)?;
    if !left.is_empty() {
        let replayed = replay(&image, files, &left)?;
        tracing::info!(id = record.id, replayed, "changes of the dead server were replayed");
    }
    Ok((image, log))
}

fn replay(image: &Arc<Image>, files: &Arc<Files>, log: &RedoLog) -> Result<usize, ServeError> {
    let ring = Uring::new(Arc::clone(files), OPENING_RING).map_err(ServeError::SetUp)?;
    let lane = Lane::new(image, ring.clone(), 1);
    let replay = || block_on(&ring, lane.replay(log));
    crew::interruptible(replay)
        .map_err(ServeError::SetUp)?
        .map_err(ServeError::SetUp)?
        .map_err(ServeError::Open)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{alone, cli::IoMode, runfile};
    use qcow2_engine::{BackingPolicy, Preallocation, create::create};
    use qcow2_format::{Backing, CreateOptions};
    use std::{fs, sync::atomic::Ordering};

    /// Another file was put in a backing file's place, or in that of a read-only image, and its server was killed:
    /// the successor served the other disk to those who had the first one half in their memory.
    #[test]
    fn a_successor_serves_the_files_that_the_dead_server_had() {
        let dir = tempfile::tempdir().unwrap();
        let (image, base) = (dir.path().join("image"), dir.path().join("base"));
        let mut record = runfile::example();
        record.config = Config {
            image: image.clone(),
            io: IoMode::Buffered,
            backing_policy: BackingPolicy::Any,
            read_only: true,
            ..record.config
        };
        let new_files = || Arc::new(record.config.files());
        fs::write(&base, [1; 4096]).unwrap();
        let backing = Backing { name: b"base".to_vec(), format: "raw".to_owned() };
        let options =
            CreateOptions { virtual_size: 4096, backing: Some(backing), ..CreateOptions::default() };
        {
            let files = new_files();
            fs::write(&image, "").unwrap();
            let ring = Uring::new(Arc::clone(&files), OPENING_RING).unwrap();
            block_on(&ring, create(&ring, &*files, &image, &options, Preallocation::Off)).unwrap().unwrap();
        }
        let open = || {
            let files = new_files();
            (open_when_let_go(&record.config, &files).unwrap(), files)
        };
        let (opened, files) = open();
        let known = KnownFile::of_chain(&opened, &files, &record.config).unwrap();
        drop((opened, files));
        let check = |record: &Record| {
            let (opened, files) = open();
            check_files(record, &opened, &files)
        };
        let record = Record { files: known, ..record.clone() };
        check(&record).unwrap();
        fs::OpenOptions::new().append(true).open(&base).unwrap().set_len(8192).unwrap();
        let refused = check(&record).unwrap_err().to_string();
        assert!(refused.contains("base was changed by somebody else"), "{refused}");
        fs::write(dir.path().join("copy"), [1; 4096]).unwrap();
        fs::rename(dir.path().join("copy"), &base).unwrap();
        let refused = check(&record).unwrap_err().to_string();
        assert!(refused.contains("base is not the file that the dead server had open"), "{refused}");
    }

    /// An image was removed, and its server killed: the device could not be detached, for ever, though nothing
    /// was to be written to the image; and if there was, `del` did not say how to give that up.
    #[test]
    fn an_image_that_is_gone_keeps_nobody_to_whom_it_owes_nothing() {
        let test = "daemon::image::tests::an_image_that_is_gone_keeps_nobody_to_whom_it_owes_nothing";
        alone::in_a_directory(test, |directory| {
            let mut record = runfile::example();
            record.config.image = directory.join("gone");
            assert_eq!(settle(&record).unwrap(), Settled::Whole);
            let file = RedoFile::create(record.id).unwrap();
            let log = RedoLog::create(file.memory()).unwrap();
            assert_eq!(settle(&record).unwrap(), Settled::Whole);
            // The log's tail.
            (*file.memory()).as_ref()[2].store(1, Ordering::Relaxed);
            let told = settle(&record).unwrap_err().to_string();
            let path = runfile::redo_path(record.id);
            for part in ["gone", "No such file", "remove", &path.to_string_lossy()] {
                assert!(told.contains(part), "{part}: {told}");
            }
            log.note_failure();
            assert!(
                matches!(settle(&record).unwrap(), Settled::Lost(_)),
                "it is not to be put back for this"
            );
            assert!(!file.owes(), "nothing can be written any more, and the number is free");
        });
    }

    /// An fdatasync failed and the server was killed: its successor replayed the log over payload that was lost,
    /// and its flushes succeeded.
    #[test]
    fn a_successor_accepts_nothing_after_a_failed_fdatasync() {
        let test = "daemon::image::tests::a_successor_accepts_nothing_after_a_failed_fdatasync";
        alone::in_a_directory(test, |directory| {
            let mut record = runfile::example();
            record.config.image = directory.join("image");
            record.config.io = IoMode::Buffered;
            let files = Arc::new(record.config.files());
            fs::write(&record.config.image, "").unwrap();
            let options = CreateOptions { virtual_size: 1 << 20, ..CreateOptions::default() };
            {
                let ring = Uring::new(Arc::clone(&files), OPENING_RING).unwrap();
                let image = &record.config.image;
                block_on(&ring, create(&ring, &*files, image, &options, Preallocation::Off))
                    .unwrap()
                    .unwrap();
            }
            drop(files);
            let file = RedoFile::create(record.id).unwrap();
            let log = RedoLog::create(file.memory()).unwrap();
            // Something is in it, though nothing that could be replayed.
            (*file.memory()).as_ref()[2].store(1, Ordering::Relaxed);
            log.note_failure();
            let files = Arc::new(record.config.files());
            let (image, _log) = open_as_left(&record, &files, file.clone(), |_| Ok(())).unwrap();
            image.keep_redo_log(RedoLog::open(file.memory()).unwrap());
            let told = close_image(&image, &files, Search::Never).unwrap_err().to_string();
            assert!(told.contains("an earlier flush failed") && told.contains("may be lost"), "{told}");
            assert!(file.has_failed(), "the next one knows it, too");
        });
    }
}
