//! New images as QEMU sees them: clean, with the properties that were asked for.

#![allow(clippy::unwrap_used, reason = "helpers of tests, where a panic is the verdict")]

mod common;

use common::{info, run};
use qcow2_format::{Backing, Blueprint, Compression, CreateOptions, Version};
use std::{fs::File, os::unix::fs::FileExt, path::Path};

/// Carries the plan out.
fn build(path: &Path, options: &CreateOptions) -> Blueprint {
    let blueprint = Blueprint::new(options).unwrap();
    let file = File::create(path).unwrap();
    file.set_len(blueprint.file_len()).unwrap();
    for (offset, bytes) in blueprint.writes() {
        file.write_all_at(&bytes, offset).unwrap();
    }
    blueprint
}

/// Builds an image, has it checked, and compares what QEMU reads in the header.
fn check(dir: &Path, options: &CreateOptions) {
    build(&dir.join("new.qcow2"), options);
    run(dir, "qemu-img", &["check", "-q", "new.qcow2"]);
    let info = info(dir, "new.qcow2");
    let data = &info["format-specific"]["data"];
    let v3 = options.version == Version::V3;
    let context = format!("{options:?}: {info}");
    assert_eq!(info["virtual-size"], options.virtual_size.next_multiple_of(512), "{context}");
    assert_eq!(info["cluster-size"], 1u64 << options.cluster_bits, "{context}");
    assert_eq!(data["compat"], if v3 { "1.1" } else { "0.10" }, "{context}");
    assert_eq!(data["refcount-bits"], 1 << options.refcount_order, "{context}");
    assert_eq!(data["compression-type"], options.compression.to_string(), "{context}");
    if v3 {
        assert_eq!(data["lazy-refcounts"], options.lazy_refcounts, "{context}");
    }
}

/// Every cluster size with every refcount width and version.
fn matrix() -> impl Iterator<Item = CreateOptions> {
    let orders = (0..=6).map(|order| (Version::V3, order)).chain([(Version::V2, 4)]);
    orders.flat_map(|(version, refcount_order)| {
        (9..=21).map(move |cluster_bits| CreateOptions {
            virtual_size: 100 << 20,
            cluster_bits,
            version,
            refcount_order,
            ..CreateOptions::default()
        })
    })
}

#[test]
fn qemu_calls_every_combination_clean() {
    let dir = tempfile::tempdir().unwrap();
    for options in matrix() {
        check(dir.path(), &options);
    }
}

#[test]
fn sizes_from_nothing_to_the_limit_are_clean() {
    let dir = tempfile::tempdir().unwrap();
    for (cluster_bits, virtual_size) in [
        (16, 0),
        (9, 0),
        (21, 0),
        (16, 1),
        (16, 512),
        (16, 1_000_001),
        (16, 64 << 40),
        (9, 128 << 30),
        (12, 8 << 40),
        (21, 1 << 60),
    ] {
        for refcount_order in [0, 4, 6] {
            let options =
                CreateOptions { virtual_size, cluster_bits, refcount_order, ..CreateOptions::default() };
            check(dir.path(), &options);
        }
    }
}

#[test]
fn features_are_what_qemu_reads() {
    let dir = tempfile::tempdir().unwrap();
    let virtual_size = 1 << 30;
    check(dir.path(), &CreateOptions { virtual_size, lazy_refcounts: true, ..CreateOptions::default() });
    let compression = Compression::Zstd;
    check(dir.path(), &CreateOptions { virtual_size, compression, ..CreateOptions::default() });
}

#[test]
fn backing_files_are_found_by_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    run(dir, "qemu-img", &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    run(dir, "qemu-io", &["-f", "raw", "-c", "write -q -P 0x5a 0 1M", "base.raw"]);
    for version in [Version::V2, Version::V3] {
        for cluster_bits in [9, 16, 21] {
            let backing = Some(Backing { name: b"base.raw".to_vec(), format: "raw".into() });
            let options = CreateOptions {
                virtual_size: 2 << 20,
                cluster_bits,
                version,
                backing,
                ..CreateOptions::default()
            };
            check(dir, &options);
            let info = info(dir, "new.qcow2");
            assert_eq!(
                (&info["backing-filename"], &info["backing-filename-format"]),
                (&"base.raw".into(), &"raw".into())
            );
            run(
                dir,
                "qemu-io",
                &["-f", "qcow2", "-c", "read -q -P 0x5a 0 1M", "-c", "read -q -P 0 1M 1M", "new.qcow2"],
            );
        }
    }
}

/// QEMU allocates in the new image, so that the tables that it found are put to use.
#[test]
fn qemu_writes_to_new_images() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for options in matrix().filter(|options| [9, 12, 16, 21].contains(&options.cluster_bits)) {
        build(&dir.join("new.qcow2"), &options);
        let steps =
            ["write -q -P 1 0 3M", "write -q -P 2 99M 1M", "read -q -P 1 0 3M", "read -q -P 0 3M 96M"];
        let args: Vec<&str> =
            ["-f", "qcow2"].into_iter().chain(steps.iter().flat_map(|step| ["-c", step])).collect();
        run(dir, "qemu-io", &[&args[..], &["new.qcow2"]].concat());
        run(dir, "qemu-img", &["check", "-q", "new.qcow2"]);
    }
}
