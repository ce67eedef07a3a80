//! Persistent bitmaps of an image that is written to: which become stale, and what becomes of them.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;
#[allow(dead_code, reason = "shared by several test programs")]
#[path = "common/damaged.rs"]
mod damaged;

use common::{IMAGE, Idle, Mirror, leaks, run};
use damaged::tool;
use qcow2_engine::{
    Lane, OpenOptions, grow,
    inspect::ImageFile,
    io::{Access, mem::MemFiles},
};
use qcow2_format::{
    bitmap::{FLAG_AUTO, FLAG_IN_USE},
    word,
};
use std::path::Path;

const DISK: usize = 8 << 20;

/// The first write gave all bitmaps up: qemu-img found leaks, and no bitmap that it could have removed. Those that
/// record every write are marked as stale, and keep their clusters until they are removed; the others stay true.
#[test]
fn bitmaps_that_become_stale_stay_accounted_for() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join(IMAGE);
    let name = path.to_str().expect("UTF-8");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", name, "8M"]);
    // In the second sector of the directory, too.
    let long = "x".repeat(600);
    for bitmap in ["dirt", &long, "more"] {
        tool("qemu-img", &["bitmap", "--add", name, bitmap]);
    }
    tool("qemu-img", &["bitmap", "--add", "--disable", name, "off"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 1M", name]);
    let files = MemFiles::default();
    files.put(IMAGE, std::fs::read(&path).expect("image"));
    let flags = || -> Vec<(Vec<u8>, u32)> {
        let image = run(ImageFile::open(&files, &files, Path::new(IMAGE), Access::ReadOnly)).expect("opens");
        run(image.bitmaps()).expect("bitmaps").into_iter().map(|it| (it.name, it.flags)).collect()
    };
    let expected = |auto: u32| {
        let auto = ["dirt", &long, "more"].map(|name| (name.as_bytes().to_vec(), auto));
        auto.into_iter().chain([(b"off".to_vec(), 0)]).collect::<Vec<_>>()
    };
    assert_eq!(flags(), expected(FLAG_AUTO));
    let mut bytes = vec![0; DISK];
    bytes[..1 << 20].fill(7);
    let search = |lane: &Lane<MemFiles>| run(lane.reclaim_leaks(&Idle)).expect("search");
    for _ in 0..2 {
        let mut mirror = Mirror::open(&files, bytes);
        assert_eq!(search(&mirror.lane).freed, 0);
        mirror.write(1 << 20, 8, 64 << 10);
        assert_eq!(flags(), expected(FLAG_AUTO | FLAG_IN_USE), "before anything else changes");
        assert_eq!(search(&mirror.lane).freed, 0);
        run(mirror.lane.close()).expect("close");
        assert_eq!(leaks(&files), 0);
        bytes = mirror.bytes;
    }
    std::fs::write(&path, files.get(IMAGE).expect("kept")).expect("written");
    tool("qemu-img", &["check", "-q", name]);
    for bitmap in ["dirt", &long, "more", "off"] {
        tool("qemu-img", &["bitmap", "--remove", name, bitmap]);
    }
    tool("qemu-img", &["check", "-q", name]);
}

/// A directory that makes no sense cannot be marked; then the bit that vouches for it goes.
#[test]
fn bitmaps_of_a_damaged_directory_are_given_up() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join(IMAGE);
    let name = path.to_str().expect("UTF-8");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", name, "8M"]);
    tool("qemu-img", &["bitmap", "--add", name, "dirt"]);
    let mut image = std::fs::read(&path).expect("image");
    // QEMU has the directory in the first cluster behind the table of the first bitmap.
    let at = image.windows(4).rposition(|bytes| bytes == b"dirt").expect("the name") - 24;
    image[at + 16] = 9;
    let files = MemFiles::default();
    files.put(IMAGE, image);
    let mut mirror = Mirror::open(&files, vec![0; DISK]);
    mirror.write(0, 8, 4096);
    run(mirror.lane.close()).expect("close");
    let image = files.get(IMAGE).expect("kept");
    assert_eq!((word::get(&image, 88), image[at + 16]), (Some(0), 9));
}

/// The first change of an image makes its bitmaps stale, and whoever keeps backups by them has to make a full
/// one. To resize is not worth that without a word; and one that records nothing stays true, but not for a larger
/// disk.
#[test]
fn bitmaps_are_not_given_up_for_a_new_size() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join(IMAGE);
    let name = path.to_str().expect("UTF-8");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", name, "1M"]);
    tool("qemu-img", &["bitmap", "--add", name, "dirt"]);
    let files = MemFiles::default();
    files.put(IMAGE, std::fs::read(&path).expect("image"));
    let before = files.get(IMAGE);
    let resize = |size| run(grow(files.clone(), &files, Path::new(IMAGE), &OpenOptions::default(), size));
    let error = resize(2 << 20).expect_err("refused");
    assert!(error.to_string().contains("bitmaps would become stale"), "{error}");
    resize(1 << 20).expect("the size that it has");
    assert!(files.get(IMAGE) == before, "it was written to");

    // Once they are stale there is nothing to lose.
    let mut mirror = Mirror::open(&files, vec![0; 1 << 20]);
    mirror.write(0, 1, 4096);
    run(mirror.lane.close()).expect("close");
    resize(2 << 30).expect("grows");
    std::fs::write(&path, files.get(IMAGE).expect("kept")).expect("written");
    tool("qemu-img", &["check", "-q", name]);
    tool("qemu-img", &["bitmap", "--remove", name, "dirt"]);
    tool("qemu-img", &["check", "-q", name]);
}
