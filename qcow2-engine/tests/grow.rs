//! Growing a virtual disk, held against an array and against qemu-img.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;
#[allow(dead_code, reason = "shared by several test programs")]
#[path = "common/damaged.rs"]
mod damaged;

use common::{
    IMAGE, Mirror, create,
    hooked::{Hook, Hooked, Operation},
    run,
};
use damaged::{Parts, tool};
use qcow2_engine::{
    ErrorKind, Image, Lane, OpenOptions, grow,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::{Backing, CreateOptions, Header, Version, header, word};
use std::{cell::Cell, io, path::Path};

fn options(cluster_bits: u32, refcount_order: u32, version: Version) -> CreateOptions {
    CreateOptions { virtual_size: 1 << 20, cluster_bits, refcount_order, version, ..CreateOptions::default() }
}

#[test]
fn the_l1_table_grows_where_it_must_and_nothing_is_lost() {
    // With 512-byte clusters an L1 entry maps 32 KiB, and a 64-bit refcount block counts 64 clusters:
    // 160 MiB need a table of 80 clusters, longer than what a block counts.
    for (bits, order, version, last) in [
        (9, 4, Version::V2, 12 << 20),
        (9, 6, Version::V3, 160 << 20),
        (12, 0, Version::V3, 12 << 20),
        (16, 4, Version::V3, 12 << 20),
    ] {
        let files = MemFiles::default();
        create(&files, IMAGE, &options(bits, order, version));
        let mut mirror = Mirror::open(&files, vec![0; 1 << 20]);
        mirror.write(100 << 10, 1, 200 << 10);
        run(mirror.lane.close()).expect("close");
        let mut bytes = mirror.bytes;
        for size in [(1 << 20) + 512, 3 << 20, last] {
            run(grow(files.clone(), &files, Path::new(IMAGE), &OpenOptions::default(), size as u64))
                .expect("grow");
            bytes.resize(size, 0);
            let mut mirror = Mirror::open(&files, bytes);
            mirror.write(size as u64 - 4096, 9, 4096);
            if size <= 12 << 20 {
                mirror.verify();
            }
            run(mirror.lane.close()).expect("close");
            bytes = mirror.bytes;
        }
        Mirror::open(&files, bytes).close_and_judge();
    }
}

/// `qemu-img resize --shrink` leaves the bytes of the last cluster behind the new end as they are, and they
/// came back when the disk was made larger again.
#[test]
fn what_the_last_cluster_had_behind_the_end_does_not_come_back() {
    const KEPT: usize = 1536;
    let mut cases = Vec::new();
    for options in ["cluster_size=4096", "compat=0.10,cluster_size=64k"] {
        cases.push((options, "shrunk", Parts::compressed(options, true), 0x33));
        cases.push((options, "compressed", Parts::compressed(options, false), 0x5a));
    }
    cases.push((
        "cluster_size=4096",
        "shared with a snapshot",
        Parts::shared("cluster_size=4096", 1 << 20),
        7,
    ));
    for (options, what, parts, byte) in cases {
        let what = format!("{options}: {what}");
        let cluster = parts.cluster() as usize;
        let last = if byte == 0x33 { cluster } else { 0 };
        let files = MemFiles::default();
        files.put(IMAGE, with_size(&parts, (last + KEPT) as u64));
        run(grow(files.clone(), &files, Path::new(IMAGE), &OpenOptions::default(), 2 * cluster as u64))
            .expect("grows");
        let kept = vec![byte; last + KEPT];
        let buf = Buf::zeroed(2 * cluster);
        let image =
            run(Image::open(&files, &files, Path::new(IMAGE), &OpenOptions::default())).expect("opens");
        run(Lane::new(&image, files.clone(), 1).read(0, buf.clone())).expect("read");
        let end = if last == 0 && byte == 7 { cluster } else { 2 * cluster };
        let found = buf.to_vec();
        assert!(found[last..last + KEPT] == kept[last..], "{what}: the disk");
        assert!(found[last + KEPT..end].iter().all(|byte| *byte == 0), "{what}: the new part");
        let after = files.get(IMAGE).expect("kept");
        let directory = tempfile::tempdir().expect("temporary directory");
        std::fs::write(directory.path().join(IMAGE), after).expect("written");
        tool("qemu-img", &["check", "-q", "-f", "qcow2", &directory.path().join(IMAGE).to_string_lossy()]);
    }
}

/// The image with another size of its disk.
fn with_size(parts: &Parts, size: u64) -> Vec<u8> {
    let mut parts = parts.clone();
    parts.set(header::SIZE_OFFSET, size);
    parts.bytes
}

/// Whoever made the disk smaller may have left L2 tables behind its end, and so has `qemu-img snapshot -a`, where
/// the snapshot has the machine's memory there: it showed in the new part.
#[test]
fn what_tables_behind_the_end_map_does_not_come_back() {
    const SIZE: usize = 160 << 10;
    const KEPT: usize = 20 << 10;
    for version in [Version::V2, Version::V3] {
        let files = MemFiles::default();
        create(&files, IMAGE, &CreateOptions { virtual_size: SIZE as u64, ..options(9, 4, version) });
        let mut mirror = Mirror::open(&files, vec![0; SIZE]);
        mirror.write(0, 7, SIZE);
        run(mirror.lane.close()).expect("close");
        let mut content = mirror.bytes;
        let mut bytes = files.get(IMAGE).expect("made");
        word::set(&mut bytes, header::SIZE_OFFSET as usize, KEPT as u64);
        files.put(IMAGE, bytes);

        let size = 2 * SIZE;
        run(grow(files.clone(), &files, Path::new(IMAGE), &OpenOptions::default(), size as u64))
            .expect("grow");
        content.truncate(KEPT);
        content.resize(size, 0);
        let mirror = Mirror::open(&files, content);
        mirror.verify();
        mirror.close_and_judge();
    }
}

/// Behind the L1 table's entries, in the rest of its cluster, may be anything: QEMU writes no more than the
/// entries, and the cluster may have had other content. Here it names an L2 table that is in use.
#[test]
fn what_lies_behind_the_l1_table_is_not_taken_for_entries() {
    const SIZE: u64 = 64 << 10;
    let files = MemFiles::default();
    create(&files, IMAGE, &CreateOptions { virtual_size: SIZE, ..options(9, 4, Version::V3) });
    let mut mirror = Mirror::open(&files, vec![0; SIZE as usize]);
    mirror.write(0, 7, 4096);
    run(mirror.lane.close()).expect("close");
    let mut bytes = files.get(IMAGE).expect("made");
    let header = Header::decode(&bytes, bytes.len() as u64).expect("sound");
    let table = header.l1_table.0 as usize;
    let behind = table + header.l1_entries as usize * 8..table + 512;
    assert!(!behind.is_empty(), "the table leaves room in its cluster");
    let stale = bytes[table..table + 8].repeat(behind.len() / 8);
    bytes[behind].copy_from_slice(&stale);
    files.put(IMAGE, bytes);

    let size = 40 * SIZE;
    run(grow(files.clone(), &files, Path::new(IMAGE), &OpenOptions::default(), size)).expect("grow");
    let mut content = mirror.bytes;
    content.resize(size as usize, 0);
    let mirror = Mirror::open(&files, content);
    mirror.verify();
    mirror.close_and_judge();
}

/// The longer table lies at the end of the file, not where the next refcount block's clusters begin: that is
/// 2 GiB on with clusters of 64 KiB, and more than a file system takes with clusters of 2 MiB.
#[test]
fn the_file_grows_by_what_the_table_needs() {
    for (bits, order, size) in [(16, 4, 40 << 40), (21, 0, 2 << 40), (12, 4, 64 << 30)] {
        let files = MemFiles::default();
        create(&files, IMAGE, &options(bits, order, Version::V3));
        let before = files.get(IMAGE).expect("made").len();
        run(grow(files.clone(), &files, Path::new(IMAGE), &OpenOptions::default(), size)).expect("grow");
        let table = (((size >> bits) * 8) >> bits) * 8;
        let most = before as u64 + table + (4 << bits);
        let after = files.get(IMAGE).expect("kept").len() as u64;
        assert!(after <= most, "{after} bytes, not {most}, with clusters of {}", 1 << bits);
    }
}

#[test]
fn what_cannot_be_grown_is_refused_and_unchanged() {
    let files = MemFiles::default();
    over_sevens(&files, 2 << 20, &options(16, 4, Version::V2));
    let before = files.get(IMAGE);
    for (size, kind) in [
        (512 << 10, ErrorKind::Unsupported),
        // Where version 2 would have to write the zeros. QEMU does not do it either.
        (4 << 20, ErrorKind::Unsupported),
        (u64::MAX / 2 - 511, ErrorKind::TooLarge),
    ] {
        let error = run(grow(files.clone(), &files, Path::new(IMAGE), &OpenOptions::default(), size))
            .expect_err("refused");
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(files.get(IMAGE), before);
    }
}

/// An empty image over a raw file of sevens.
fn over_sevens(files: &MemFiles, backing_size: usize, options: &CreateOptions) {
    files.put("base.raw", vec![7; backing_size]);
    let backing = Some(Backing { name: b"base.raw".to_vec(), format: "raw".into() });
    create(files, IMAGE, &CreateOptions { backing, ..options.clone() });
}

/// An image over a backing file that was longer could not be grown, where QEMU's tools write zeros over what
/// would show.
#[test]
fn a_longer_backing_file_does_not_show_in_the_new_part() {
    const K: usize = 1 << 10;
    for (bits, version) in [(9, Version::V3), (12, Version::V3), (16, Version::V3), (16, Version::V2)] {
        for (old, backing, new) in [
            (1024 * K, 2048 * K, 3072 * K),
            (1024 * K, 2048 * K, 2048 * K),
            (1024 * K, 3072 * K, 2048 * K),
            (100 * K + 512, 300 * K + 512, 200 * K + 1536),
            (100 * K + 512, 150 * K + 512, 200 * K + 1536),
            // Inside the last cluster, which is where version 2 can do it.
            (100 * K + 512, 101 * K, 102 * K),
            (100 * K + 512, 101 * K, 300 * K),
        ] {
            if version == Version::V2 && backing.min(new) > 128 * K {
                continue;
            }
            for is_written in [false, true] {
                let files = MemFiles::default();
                let options = CreateOptions { virtual_size: old as u64, ..options(bits, 4, version) };
                over_sevens(&files, backing, &options);
                let mut mirror = Mirror::open(&files, vec![7; old]);
                if is_written {
                    mirror.write(old as u64 - 512, 9, 512);
                }
                run(mirror.lane.close()).expect("close");
                let mut bytes = mirror.bytes;
                for size in [new, new + 5 * K] {
                    let options = OpenOptions::default();
                    run(grow(files.clone(), &files, Path::new(IMAGE), &options, size as u64)).expect("grow");
                    bytes.resize(size, 0);
                }
                let mirror = Mirror::open(&files, bytes);
                mirror.verify();
                mirror.close_and_judge();
            }
        }
    }
}

/// Notes whether the header says the new size before all that was written is durable.
struct Order {
    new_size: u64,
    is_durable: Cell<bool>,
    has_grown: Cell<bool>,
}

impl Hook for Order {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::Write { at: 0, buf } if buf.to_vec()[24..32] == self.new_size.to_be_bytes() => {
                assert!(self.is_durable.get(), "what the new part has may be lost, and the new size not");
                self.has_grown.set(true);
            }
            Operation::Write { .. } => self.is_durable.set(false),
            Operation::Sync(_) => self.is_durable.set(true),
            _ => {}
        }
        Ok(())
    }
}

#[test]
fn the_new_size_follows_the_zeros_in_the_new_part() {
    let new_size = 40 << 20;
    let order = Order { new_size, is_durable: Cell::new(true), has_grown: Cell::new(false) };
    let host = Hooked::new(&MemFiles::default(), order);
    over_sevens(&host.files, 2 << 20, &options(12, 4, Version::V3));
    run(grow(host.clone(), &host.files, Path::new(IMAGE), &OpenOptions::default(), new_size)).expect("grow");
    assert!(host.hook.has_grown.get());
}
