use super::*;
use std::path::PathBuf;

struct Image(PathBuf, #[expect(dead_code, reason = "removes the directory")] tempfile::TempDir);

impl Image {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, [0; 512]).unwrap();
        Self(path, dir)
    }

    /// Opens and claims, as another process would.
    fn claim(&self, access: Access, locking: Locking) -> io::Result<(File, Claim)> {
        let file = File::options().read(true).write(true).open(&self.0)?;
        let claim = extend(&file, &self.0, Claim::default(), Claim::of(access, locking)?)?;
        Ok((file, claim))
    }
}

use Access::{ReadOnly, ReadWrite};
use Locking::{AsQemu, ForceShare};

#[test]
fn the_bytes_are_those_that_qemu_locks() {
    let bytes = |access, locking| -> Vec<u8> {
        Claim::of(access, locking).unwrap().bytes_beyond(Claim::default()).collect()
    };
    // Seen in /proc/locks of qemu-io 10.0: of an image, of a backing file, and with -U.
    assert_eq!(bytes(ReadWrite, AsQemu), [100, 101, 103, 201, 203]);
    assert_eq!(bytes(ReadOnly, AsQemu), [100, 201, 203]);
    assert_eq!(bytes(ReadOnly, ForceShare), [100]);
    assert_eq!(Claim::of(ReadWrite, ForceShare).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn one_writer_or_many_readers() {
    let image = Image::new();
    let refused = |access| {
        let error = image.claim(access, AsQemu).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        error.to_string()
    };
    let writer = image.claim(ReadWrite, AsQemu).unwrap();
    let me = format!("(process {})", std::process::id());
    let error = refused(ReadOnly);
    assert!(error.contains(&me) && error.contains("shared \"write\" lock"), "{error}");
    assert!(refused(ReadWrite).contains("\"write\" lock"));
    assert!(image.claim(ReadOnly, ForceShare).is_ok());
    drop(writer);
    let readers = [image.claim(ReadOnly, AsQemu).unwrap(), image.claim(ReadOnly, AsQemu).unwrap()];
    assert!(refused(ReadWrite).contains("nobody else may write to it (\"write\" lock)"));
    drop(readers);
    assert!(image.claim(ReadWrite, AsQemu).is_ok());
}

#[test]
fn a_claim_grows_and_is_as_before_when_it_cannot() {
    let image = Image::new();
    let (file, reading) = image.claim(ReadOnly, AsQemu).unwrap();
    let other = image.claim(ReadOnly, AsQemu).unwrap();
    let writing = Claim::of(ReadWrite, AsQemu).unwrap();
    assert!(extend(&file, &image.0, reading, writing).is_err());
    assert!(image.claim(ReadOnly, AsQemu).is_ok(), "the locks of the attempt are gone");
    drop(other);
    let both = extend(&file, &image.0, reading, writing).unwrap();
    assert!(image.claim(ReadOnly, AsQemu).is_err());
    let copy = file.try_clone().unwrap();
    drop(file);
    assert!(image.claim(ReadOnly, AsQemu).is_err(), "a copy of the descriptor keeps the locks");
    release(&copy, both);
    assert!(image.claim(ReadWrite, AsQemu).is_ok());
}

#[test]
fn a_short_conflict_is_waited_for() {
    let image = Image::new();
    let writer = image.claim(ReadWrite, AsQemu).unwrap();
    let ending = std::thread::spawn(move || {
        std::thread::sleep(CONFLICT_WAIT / 5);
        drop(writer);
    });
    assert!(image.claim(ReadWrite, AsQemu).is_ok());
    ending.join().unwrap();
}

#[test]
fn locks_are_found_in_a_descriptors_information() {
    let line = "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:1234 200 203";
    assert!(covers(line, 1234, 200) && covers(line, 1234, 203));
    assert!(!covers(line, 1234, 204) && !covers(line, 1235, 200) && !covers("pos:\t0", 1234, 200));
    assert!(covers("lock:\t1: POSIX  ADVISORY  WRITE 77 08:01:5 0 EOF", 5, 101));
}
