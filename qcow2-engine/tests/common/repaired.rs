//! Damaged images that are repaired, and what QEMU makes of them.

use super::{
    common::{IMAGE, run},
    damaged::Parts,
};
use qcow2_engine::{CheckOptions, CheckReport, Image, Lane, OpenOptions, Repair, check, io::mem::MemFiles};
use std::{fs, path::Path, process::Command};

pub(crate) const SHAPES: [&str; 2] =
    ["compat=1.1,cluster_size=4k,refcount_bits=64", "compat=0.10,cluster_size=4k"];

pub(crate) fn repaired(bytes: &[u8], repair: Repair) -> (CheckReport, Vec<u8>) {
    let files = MemFiles::default();
    files.put(IMAGE, bytes.to_vec());
    let options = CheckOptions { repair, ..CheckOptions::default() };
    let report = run(check(&files, &files, Path::new(IMAGE), options)).expect("checks");
    (report, files.get(IMAGE).expect("kept"))
}

pub(crate) fn open(bytes: &[u8], read_only: bool) -> qcow2_engine::Result<(Lane<MemFiles>, MemFiles)> {
    let files = MemFiles::default();
    files.put(IMAGE, bytes.to_vec());
    let options = OpenOptions { read_only, ..OpenOptions::default() };
    let image = run(Image::open(&files, &files, Path::new(IMAGE), &options))?;
    Ok((Lane::new(&image, files.clone(), 1), files))
}

/// Runs qemu-img on an image with `arguments` before its name; exit code, and the image after it.
pub(crate) fn qemu_img(bytes: &[u8], arguments: &[&str]) -> (i32, String, Vec<u8>) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join(IMAGE);
    fs::write(&path, bytes).expect("written");
    let output = Command::new("qemu-img").args(arguments).arg(&path).output().expect("cargo xtask setup");
    let text = [output.stdout, output.stderr].concat();
    let code = output.status.code().expect("an exit code");
    (code, String::from_utf8_lossy(&text).into_owned(), fs::read(&path).expect("kept"))
}

/// Whether QEMU reads the same disk of both images, and if it is asked for, the same snapshot.
pub(crate) fn is_same(ours: &[u8], sound: &[u8], with_snapshot: bool) -> bool {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| directory.path().join(name);
    let qemu_img = |args: &[&str]| {
        let output = Command::new("qemu-img").args(args).current_dir(directory.path()).output();
        output.expect("cargo xtask setup").status.success()
    };
    for (name, bytes) in [("ours", ours), ("sound", sound)] {
        fs::write(path(name), bytes).expect("written");
        let convert = ["convert", "-f", "qcow2", "-O", "qcow2", "-l", "one", name, &format!("{name}.one")];
        assert!(!with_snapshot || qemu_img(&convert), "{name} has no snapshot any more");
    }
    let compare = ["compare", "-f", "qcow2", "-F", "qcow2"];
    qemu_img(&[&compare[..], &["ours", "sound"]].concat())
        && (!with_snapshot || qemu_img(&[&compare[..], &["ours.one", "sound.one"]].concat()))
}

/// The image is repaired as QEMU's is, and nothing but a repair of all has changed it.
pub(crate) fn assert_repaired(what: &str, sound: &Parts, damaged: &[u8], disk_is_whole: bool) -> Vec<u8> {
    let (report, _) = repaired(damaged, Repair::None);
    assert!(report.found.corruptions > 0, "{what}");
    if disk_is_whole {
        let (_, after) = repaired(damaged, Repair::Leaks);
        assert!(after == damaged, "{what}: freeing leaks changed it");
    }
    let (report, after) = repaired(damaged, Repair::All);
    assert!(report.remaining.is_clean(), "{what}: {:?} {:?}", report.refused, report.remaining.list);
    let (code, text, _) = qemu_img(&after, &["check", "-f", "qcow2"]);
    assert_eq!(code, 0, "{what}: {text}");
    if disk_is_whole {
        assert!(is_same(&after, &sound.bytes, true), "{what}: the disk or the snapshot has changed");
    }
    after
}

/// Puts a number of `len` bytes into the header.
pub(crate) fn put(parts: &mut Parts, at: u64, value: u64, len: usize) {
    parts.bytes[at as usize..][..len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
}
