use super::{witness::PAUSE, *};
use crate::alone;
use std::{
    fs,
    os::unix::fs::FileExt,
    process::Command,
    thread,
    time::{Duration, SystemTime},
};

/// An image, open, and a log, in a directory that is kept as long as they are of use.
fn image_and_log() -> (tempfile::TempDir, PathBuf, File, RedoFile) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let file = File::create(&image).unwrap();
    let log = file_at(dir.path().join("0.redo"));
    (dir, image, file, log)
}

fn file_at(path: PathBuf) -> RedoFile {
    RedoFile { map: map(&make(&path).unwrap()).unwrap(), path }
}

#[test]
fn what_is_stored_is_in_the_file_for_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/3.redo");
    let log = file_at(path.clone());
    (*log.memory()).as_ref()[5].store(77, Ordering::Relaxed);
    drop(log);
    let again = file_at(path.clone());
    assert_eq!((*again.memory()).as_ref()[5].load(Ordering::Relaxed), 77, "taken over as it is");
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    assert!(adopt(&file).unwrap().is_some());
    file.set_len(4096).unwrap();
    assert!(adopt(&file).is_err());
}

/// They could neither be recovered nor settled, for ever.
#[test]
fn servers_that_were_killed_while_they_made_their_log_have_left_an_empty_one_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.redo");
    File::create(&path).unwrap();
    assert!(RedoFile::open_at(path.clone()).unwrap().is_none());
    make(&path).unwrap();
    let file = RedoFile::open_at(path).unwrap().unwrap();
    assert!(RedoLog::open(file.memory()).unwrap().is_empty());
}

#[test]
fn a_log_owes_nothing_only_if_it_is_sound_and_empty() {
    let dir = tempfile::tempdir().unwrap();
    let file = file_at(dir.path().join("0.redo"));
    RedoLog::create(file.memory()).unwrap();
    assert!(!file.owes());
    let memory = file.memory();
    let tail = &(*memory).as_ref()[2];
    tail.store(1, Ordering::Relaxed);
    assert!(file.owes());
    tail.store(u64::MAX, Ordering::Relaxed);
    assert!(file.owes(), "its counters make no sense");
}

#[test]
fn an_image_that_was_changed_later_is_noticed() {
    let (_dir, image, file, log) = image_and_log();
    let sight = log.sight(&image).unwrap();
    sight.note();
    assert!(log.check_unchanged(&image).is_ok());
    let later = SystemTime::now() + Duration::from_secs(TOLERANCE_SECONDS + 2);
    file.set_modified(later).unwrap();
    assert!(matches!(log.check_unchanged(&image), Err(RedoFileError::Changed { .. })));
    sight.note();
    assert!(log.check_unchanged(&image).is_ok());
}

#[test]
fn how_a_dead_server_left_its_image_is_known_to_the_moment() {
    let (_dir, image, file, log) = image_and_log();
    let sight = log.sight(&image).unwrap();
    sight.note();
    let left = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 5_000_000);
    let (tick, whole) = (Duration::from_millis(1), Duration::from_millis(5));
    file.set_modified(left).unwrap();
    log.map.note_left(look_at(&image).unwrap().state);
    for (modified, len, is_ours) in [
        (left, 0, true),
        (left - whole, 0, true),
        (left + tick, 0, false),
        (left - 2 * Duration::from_secs(1), 0, false),
        (left, 512, false),
    ] {
        file.set_len(len).unwrap();
        file.set_modified(modified).unwrap();
        assert_eq!(log.check_unchanged(&image).is_ok(), is_ours, "{modified:?}, {len}");
    }
    sight.note();
    assert!(log.check_unchanged(&image).is_ok(), "a successor has it");
}

/// A block device that is a file.
struct Loop(PathBuf);

impl Loop {
    /// None where there is none to be had.
    fn over(file: &Path) -> Option<Self> {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        let name = String::from_utf8(made.stdout).ok()?;
        made.status.success().then(|| Self(name.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// Of a block device nothing was noticed: QEMU had written to it, and what its dead server had acknowledged
/// was replayed over that.
#[test]
fn what_others_write_to_a_block_device_is_noticed() {
    let (_dir, below, file, log) = image_and_log();
    file.set_len(1 << 20).unwrap();
    let Some(device) = Loop::over(&below) else {
        return alone::skip("what others write to a block device: no loop device can be had");
    };
    let config = Config { image: device.0.clone(), ..crate::config::example() };
    log.sight(&device.0).unwrap().note();
    let write = || {
        let device = OpenOptions::new().write(true).open(&device.0).unwrap();
        device.write_all_at(&[7; 4096], 8192).unwrap();
    };
    write();
    log.note_left(&config);
    assert!(log.check_unchanged(&device.0).is_ok());
    write();
    assert!(matches!(log.check_unchanged(&device.0), Err(RedoFileError::Changed { .. })));
}

/// A replay that was cut short could not be repeated, nor what an idle server had begun to write when it
/// was killed: the image was modified, and that had not been noted yet.
#[test]
fn who_has_the_image_may_modify_it_at_any_time() {
    let (_dir, image, file, log) = image_and_log();
    let long_ago = SystemTime::now() - Duration::from_secs(3600);
    file.set_modified(long_ago).unwrap();
    log.sight(&image).unwrap().note();
    file.set_modified(SystemTime::now()).unwrap();
    assert!(log.check_unchanged(&image).is_ok());
}

/// Nothing was noted while a server stopped, for minutes perhaps: killed then, it could not be recovered.
#[test]
fn a_witness_looks_until_it_is_dropped_and_lets_go_of_the_image_then() {
    let (_dir, image, file, log) = image_and_log();
    let witness = log.witness(&image).unwrap();
    let forget = || log.map.note(Noted { ours_until: 0, ..log.map.witness() });
    let deadline = SystemTime::now() + 20 * PAUSE;
    forget();
    while log.check_unchanged(&image).is_err() {
        assert!(SystemTime::now() < deadline, "it has not looked again");
        thread::sleep(PAUSE / 10);
    }
    forget();
    file.set_modified(SystemTime::now()).unwrap();
    drop(witness);
    assert!(log.check_unchanged(&image).is_ok(), "nor at the end");
    assert_eq!(Arc::strong_count(&log.map), 1, "it is still there");
}

/// A backup was moved over an image while a server had it open; that was killed, and its successor
/// replayed the log on the backup and served it under a mounted file system.
#[test]
fn another_file_under_the_image_s_name_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    File::create(&image).unwrap();
    let log = file_at(dir.path().join("0.redo"));
    assert!(log.check_same(&image).is_ok(), "nothing was noted");
    let sight = log.sight(&image).unwrap();
    sight.note();
    assert!(log.check_same(&image).is_ok());
    let other = dir.path().join("other");
    File::create(&other).unwrap();
    fs::rename(&other, &image).unwrap();
    // It has its own open.
    sight.note();
    assert!(matches!(log.check_same(&image), Err(RedoFileError::Replaced { .. })));
}
