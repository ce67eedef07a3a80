//! Refcounts that a repair makes anew, as `qemu-img check -r all` does: a structure that cannot be used,
//! wherever the header or another table says that it is.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;
#[allow(dead_code, reason = "shared by several test programs")]
#[path = "common/damaged.rs"]
mod damaged;
#[allow(dead_code, reason = "shared by several test programs")]
#[path = "common/repaired.rs"]
mod repaired;

use common::{
    IMAGE, create,
    hooked::{FailingDisk, Hook, Hooked, Operation},
    run,
};
use damaged::{COPIED, Parts};
use qcow2_engine::{
    CheckOptions, ErrorKind, Lane, Repair, check,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::{CreateOptions, Version, header};
use repaired::{SHAPES, assert_repaired, open, put, qemu_img, repaired};
use std::{io, path::Path};

fn read(lane: &Lane<MemFiles>, at: u64) -> Vec<u8> {
    let buf = Buf::zeroed(512);
    run(lane.read(at, buf.clone())).expect("reads");
    buf.to_vec()
}

/// What can be wrong with a refcount table, without a byte of anything else being lost.
fn unusable_tables(sound: &Parts) -> Vec<(String, Parts)> {
    let behind = (sound.bytes.len() as u64).next_multiple_of(sound.cluster());
    let mut places = vec![
        ("right behind the end".to_owned(), behind),
        ("far behind the end".to_owned(), 1 << 40),
        ("at the end of numbers".to_owned(), u64::MAX - sound.cluster() + 1),
        ("not aligned".to_owned(), sound.header.refcount_table.0 + 256),
        ("over the header".to_owned(), 0),
        ("over data".to_owned(), sound.data(8 * sound.cluster())),
    ];
    for (name, place) in sound.metadata() {
        if !name.starts_with("refcount") {
            places.push((format!("over the {name} at {place:#x}"), place));
        }
    }
    let mut all = Vec::new();
    for (name, place) in places {
        let mut damaged = sound.clone();
        put(&mut damaged, header::REFCOUNT_TABLE_OFFSET, place, 8);
        all.push((format!("table {name}"), damaged));
    }
    for clusters in [0, u32::MAX] {
        let mut damaged = sound.clone();
        put(&mut damaged, header::REFCOUNT_TABLE_CLUSTERS_OFFSET, clusters.into(), 4);
        all.push((format!("table of {clusters} clusters"), damaged));
    }
    for (name, place) in sound.metadata() {
        // At itself it is a block with counts, like any other.
        if name != "refcount block" {
            let mut damaged = sound.clone();
            damaged.set(sound.header.refcount_table.0, place);
            all.push((format!("block over the {name} at {place:#x}"), damaged));
        }
    }
    let mut damaged = sound.clone();
    damaged.set(sound.header.refcount_table.0, sound.data(8 * sound.cluster()));
    all.push(("block over data".to_owned(), damaged));
    all
}

/// An image that says that it has no refcount table, or whose table is where none can be, was refused by
/// `check --repair all`; a block that was also an L2 table stopped the repair. `qemu-img check -r all` makes
/// new refcounts from everything else.
#[test]
fn refcounts_that_cannot_be_used_are_made_anew() {
    for shape in SHAPES {
        let sound = Parts::with_snapshot(shape);
        for (name, damaged) in unusable_tables(&sound) {
            assert_repaired(&format!("{shape}: {name}"), &sound, &damaged.bytes, true);
        }
    }
}

/// An entry for a guest's cluster that names a refcount block or the refcount table has lost its data. The
/// counts move away from it, without a byte being written there: it may be the entry that is right.
#[test]
fn refcounts_give_way_to_what_an_entry_names() {
    for shape in SHAPES {
        let sound = Parts::with_snapshot(shape);
        for place in [sound.refcount_block(), sound.header.refcount_table.0] {
            let mut damaged = sound.clone();
            damaged.set(damaged.l2_entry(9 * sound.cluster()), place | COPIED);
            let what = format!("{shape}: an entry names {place:#x}");
            let after = assert_repaired(&what, &sound, &damaged.bytes, false);
            let place = place as usize..place as usize + sound.cluster() as usize;
            assert!(after[place.clone()] == sound.bytes[place], "{what}: it was written to");
        }
    }
}

/// An image of which every cluster is counted once, so that a row of counts has no bit that an entry cannot
/// have.
fn without_snapshot() -> Parts {
    let files = MemFiles::default();
    create(&files, IMAGE, &CreateOptions { virtual_size: 1 << 24, ..CreateOptions::default() });
    let (lane, files) = open(&files.get(IMAGE).expect("made"), false).expect("opens");
    run(lane.write(0, Buf::from_bytes(&[1; 512]))).expect("writes");
    run(lane.close()).expect("closes");
    Parts::of(files.get(IMAGE).expect("kept"))
}

/// The other way round: the L1 table or one of its entries is said to be where refcounts are. Read as a
/// mapping, counts name what no file has. Clearing such entries would wipe the refcounts, and freeing what
/// nobody names any more the disk, which a right offset would bring back.
#[test]
fn refcounts_that_are_called_a_mapping_are_left_alone() {
    for (shape, sound) in [
        ("without a snapshot", without_snapshot()),
        ("compat=1.1,cluster_size=64k", Parts::with_snapshot("compat=1.1,cluster_size=64k")),
        ("compat=0.10,cluster_size=4k", Parts::with_snapshot("compat=0.10,cluster_size=4k")),
    ] {
        let mut l1 = sound.clone();
        put(&mut l1, header::L1_TABLE_OFFSET, sound.header.refcount_table.0, 8);
        let mut entry = sound.clone();
        entry.set(sound.l1_entry(0), sound.refcount_block() | COPIED);
        for (name, damaged) in [("the L1 table", l1), ("an L1 entry", entry)] {
            for repair in [Repair::Leaks, Repair::All] {
                let (report, after) = repaired(&damaged.bytes, repair);
                assert!(report.remaining.corruptions > 0, "{shape}: {name}");
                for place in [sound.refcount_block(), sound.header.refcount_table.0, sound.l2_table(0)] {
                    let place = place as usize..place as usize + sound.cluster() as usize;
                    assert!(after[place.clone()] == damaged.bytes[place], "{shape}: {name}: {repair:?}");
                }
                assert!(after.len() == damaged.bytes.len(), "{shape}: {name}: it has grown");
            }
        }
    }
}

/// For reading nobody needs refcounts: QEMU reads a file whose refcount table was cut off, as the end of a
/// copy that was interrupted may be. Ours refused it.
#[test]
fn what_has_no_refcounts_is_read_and_not_written() {
    let sound = Parts::with_snapshot(SHAPES[0]);
    for (name, damaged) in unusable_tables(&sound).iter().filter(|(name, _)| name.starts_with("table")) {
        let (lane, _) = open(&damaged.bytes, true).expect(name);
        assert_eq!(read(&lane, 8 * sound.cluster()), [0x22; 512], "{name}");
        // Over data, or an L2 table, it passes until something is changed.
        match open(&damaged.bytes, false) {
            Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}"),
            Ok((lane, _)) => {
                run(lane.write(20 * sound.cluster(), Buf::zeroed(512))).expect_err(name);
            }
        }
    }
}

/// A header that names a refcount table behind the end of the file protects the image: it is not written to.
/// The new structure grows into that place, where it would pass for a table, of no counts, if the header
/// still named it when the repair is cut short; and the next writer would hand out every cluster anew.
#[test]
fn a_repair_that_is_cut_short_leaves_no_image_that_seems_to_have_counts() {
    let sound = Parts::with_snapshot(SHAPES[0]);
    let behind = sound.bytes.len() as u64 / sound.cluster();
    for cluster in behind..behind + 3 {
        let mut damaged = sound.clone();
        put(&mut damaged, header::REFCOUNT_TABLE_OFFSET, cluster * sound.cluster(), 8);
        for writes in 0.. {
            let files = MemFiles::default();
            files.put(IMAGE, damaged.bytes.clone());
            let disk = Hooked::new(&files, FailingDisk::after(writes));
            let options = CheckOptions { repair: Repair::All, ..CheckOptions::default() };
            let is_done = run(check(&disk, &files, Path::new(IMAGE), options)).is_ok();
            let bytes = files.get(IMAGE).expect("kept");
            let (report, _) = repaired(&bytes, Repair::None);
            assert!(
                report.found.corruptions == 0 || open(&bytes, false).is_err(),
                "cluster {cluster}, {writes} writes: it can be written to, and {:?}",
                report.found.list.first()
            );
            let (report, _) = repaired(&bytes, Repair::All);
            assert!(report.remaining.is_clean(), "cluster {cluster}, {writes} writes");
            if is_done {
                break;
            }
        }
    }
}

/// A disk that does not grow, as a block device.
struct FullDisk {
    len: u64,
}

impl Hook for FullDisk {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        let end = match operation {
            Operation::Write { at, buf } => at + buf.len() as u64,
            Operation::SetLen => u64::MAX,
            _ => 0,
        };
        if end > self.len { Err(io::Error::from_raw_os_error(28)) } else { Ok(()) }
    }
}

/// The new structure was put behind the end of the file, also where there was room inside it. A block device
/// has nothing there: neither a repair nor the opening of an image that was marked dirty came to its end,
/// however often it was tried.
#[test]
fn refcounts_are_made_anew_inside_a_file_that_has_room() {
    for shape in SHAPES {
        let sound = Parts::with_snapshot(shape);
        let len = sound.bytes.len() as u64;
        let has_no_mark = sound.header.version == Version::V2;
        let mut damaged = sound.clone();
        damaged.bytes.resize((len + 16 * sound.cluster()) as usize, 0xee);
        // Two rows that are too short for it, before one that is not.
        for (guest, cluster) in [(20, 1), (21, 3)] {
            let host = len + cluster * sound.cluster();
            damaged.set(sound.l2_entry(0) + 8 * guest, host | COPIED);
        }
        damaged.set(sound.header.refcount_table.0, sound.refcount_block() + 8 * sound.cluster() + 512);
        let after = assert_repaired(shape, &sound, &damaged.bytes, false);
        assert_eq!(after.len(), damaged.bytes.len(), "{shape}: it has grown");
        let room = (len + 4 * sound.cluster()) as usize;
        assert!(after[..room][len as usize..] == damaged.bytes[..room][len as usize..], "{shape}");

        for is_dirty in [false, true] {
            if is_dirty && has_no_mark {
                continue;
            }
            let mut damaged = damaged.clone();
            if is_dirty {
                damaged.set(header::INCOMPATIBLE_OFFSET, header::DIRTY);
            }
            let files = MemFiles::default();
            files.put(IMAGE, damaged.bytes.clone());
            let disk = Hooked::new(&files, FullDisk { len: damaged.bytes.len() as u64 });
            if is_dirty {
                run(disk.lane(&disk.open(1 << 20)).close()).expect("closes");
            } else {
                let options = CheckOptions { repair: Repair::All, ..CheckOptions::default() };
                run(check(&disk, &files, Path::new(IMAGE), options)).expect("repairs");
            }
            let (code, text, _) = qemu_img(&files.get(IMAGE).expect("kept"), &["check", "-f", "qcow2"]);
            assert_eq!(code, 0, "{shape}: {text}");
        }
    }
}

/// A crash of QEMU may leave clusters counted that the file does not reach. They were leaks for our check,
/// with exit code 3, and are none for QEMU's. They cost nothing; a repair that somebody asks for clears them.
#[test]
fn counts_beyond_the_end_of_the_file_are_no_leaks() {
    for shape in SHAPES {
        let mut parts = Parts::with_snapshot(shape);
        let end = (parts.bytes.len() as u64).next_multiple_of(parts.cluster());
        for cluster in 0..3 {
            parts.set_count(end + cluster * parts.cluster(), 1);
        }
        let (report, _) = repaired(&parts.bytes, Repair::None);
        assert!(report.found.is_clean(), "{shape}: {:?}", report.found.list);
        assert_eq!(report.found.counted_beyond_end, 3, "{shape}");
        assert_eq!(qemu_img(&parts.bytes, &["check", "-f", "qcow2"]).0, 0, "{shape}");
        let (report, after) = repaired(&parts.bytes, Repair::Leaks);
        assert_eq!(report.remaining.counted_beyond_end, 0, "{shape}");
        assert_eq!(qemu_img(&after, &["check", "-f", "qcow2"]).0, 0, "{shape}");
        // The first cluster that does not fit is one: the file would grow over it.
        parts.bytes.resize((end + parts.cluster()) as usize, 0);
        assert_eq!(repaired(&parts.bytes, Repair::None).0.found.leaks, 1, "{shape}");
        assert_eq!(qemu_img(&parts.bytes, &["check", "-f", "qcow2"]).0, 3, "{shape}");
    }
}

/// The new structure went to where a chunk of 64 clusters ends, not to where the file does: up to 126 MiB behind
/// it, with clusters of 2 MiB.
#[test]
fn a_new_structure_lies_right_behind_the_file() {
    for shape in SHAPES {
        let mut parts = Parts::with_snapshot(shape);
        let end = (parts.bytes.len() as u64).next_multiple_of(parts.cluster());
        // Nothing inside the file is room for it then.
        parts.set(parts.l2_entry(9 * parts.cluster()), parts.header.refcount_table.0 | COPIED);
        let (_, after) = repaired(&parts.bytes, Repair::All);
        let after = Parts::of(after);
        assert_eq!(after.header.refcount_table.0, end, "{shape}");
        assert_eq!(after.bytes.len() as u64, end + 2 * parts.cluster(), "{shape}");
    }
}
