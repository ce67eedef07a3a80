//! Images that a writer with lazy refcounts has left marked dirty.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, Mirror,
    hooked::{FailingDisk, Hooked},
    run,
};
use qcow2_engine::{Error, Image, OpenOptions, io::mem::MemFiles};
use qcow2_format::word;
use std::{path::Path, process::Command};

const DISK: usize = 8 << 20;
/// Lowest byte of the incompatible features.
const FEATURES: usize = 79;

/// What QEMU leaves when it is killed, and the content.
fn dirty(options: &str) -> (MemFiles, Vec<u8>) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join(IMAGE);
    let name = path.to_str().expect("UTF-8");
    let tool = |name: &str, args: &[&str]| {
        Command::new(name).args(args).output().expect("qemu-utils are installed: cargo xtask setup").status
    };
    let options = format!("lazy_refcounts=on,{options}");
    assert!(tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, name, "8M"]).success());
    let args = ["-f", "qcow2", "-c", "write -P 7 0 3M", "-c", "write -P 9 5M 1M", "-c", "discard 1M 1M"];
    let killed = tool("qemu-io", &[&args[..], &["-c", "flush", "-c", "abort", name]].concat());
    assert!(!killed.success(), "qemu-io was not killed");
    let files = MemFiles::default();
    let image = std::fs::read(&path).expect("image");
    assert_eq!(image[FEATURES] & 1, 1, "{options}: not marked dirty");
    files.put(IMAGE, image);
    let mut bytes = vec![0; DISK];
    bytes[..3 << 20].fill(7);
    bytes[1 << 20..2 << 20].fill(0);
    bytes[5 << 20..6 << 20].fill(9);
    (files, bytes)
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing() {
    for options in ["cluster_size=64k", "cluster_size=512", "cluster_size=4k,refcount_bits=64"] {
        let (files, bytes) = dirty(options);
        let mut mirror = Mirror::open(&files, bytes);
        assert_eq!(files.get(IMAGE).expect("kept")[FEATURES] & 1, 0, "{options}: still dirty");
        mirror.verify();
        mirror.write(4 << 20, 3, 200 << 10);
        mirror.write(0, 4, 100 << 10);
        mirror.verify();
        mirror.close_and_judge();
    }
}

#[test]
fn a_dirty_image_is_read_as_it_is() {
    let (files, bytes) = dirty("cluster_size=64k");
    let before = files.get(IMAGE);
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let image = run(Image::open(&files, &files, Path::new(IMAGE), &options)).expect("opens");
    Mirror::around(&files, &image, bytes).verify();
    assert!(files.get(IMAGE) == before);
}

#[test]
fn more_damage_than_lazy_refcounts_explain_is_refused_untouched() {
    let (files, _) = dirty("cluster_size=64k");
    let mut image = files.get(IMAGE).expect("kept");
    let word = |image: &[u8], at: usize| word::get(image, at).expect("8 bytes");
    let l2 = (word(&image, word(&image, 40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    for entry in [1_u64 << 63 | 0x5_0200, 1 << 63 | 0x7fff << 16, 1 << 63 | 1 << 57 | 0x5_0000] {
        image[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());
        files.put(IMAGE, image.clone());
        let refused = run(Image::open(&files, &files, Path::new(IMAGE), &OpenOptions::default()));
        let Err(error @ Error::Dirty { .. }) = refused.map(drop) else { panic!("{entry:#x} is accepted") };
        assert!(error.to_string().contains("check --repair all"), "{error}");
        assert!(files.get(IMAGE).expect("kept") == image, "{entry:#x}: the file was changed");
    }
}

#[test]
fn a_repair_that_ends_half_way_leaves_the_mark_and_the_next_one_finishes_it() {
    let (files, bytes) = dirty("cluster_size=512");
    let start = files.get(IMAGE).expect("kept");
    for left in 0.. {
        files.put(IMAGE, start.clone());
        let io = Hooked::new(&files, FailingDisk::after(left));
        if run(Image::open(&io, &files, Path::new(IMAGE), &OpenOptions::default())).is_ok() {
            assert!(left > 3, "only {left} changes");
            return;
        }
        assert_eq!(files.get(IMAGE).expect("kept")[FEATURES] & 1, 1, "the mark goes last");
        let mirror = Mirror::open(&files, bytes.clone());
        mirror.verify();
        if left % 8 == 0 {
            mirror.close_and_judge();
        }
    }
}
