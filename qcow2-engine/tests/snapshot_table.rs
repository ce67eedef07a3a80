//! Snapshot tables that a repair makes anew, as `qemu-img check -r all` does: those beyond their limits.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;
#[allow(dead_code, reason = "shared by several test programs")]
#[path = "common/damaged.rs"]
mod damaged;
#[allow(dead_code, reason = "shared by several test programs")]
#[path = "common/repaired.rs"]
mod repaired;

use common::{IMAGE, run};
use damaged::{COPIED, Parts};
use qcow2_engine::{
    ErrorKind, Pace, Repair, Verdict, ZeroMode,
    check::{Problem, Remedy},
    inspect::ImageFile,
    io::{Access, Buf, mem::MemFiles},
};
use qcow2_format::{HostOffset, Snapshot, Version, header, snapshot};
use repaired::{SHAPES, assert_repaired, is_same, open, put, qemu_img, repaired};
use std::{future::Future, path::Path, pin::Pin};

/// The snapshots of an image.
fn snapshots(parts: &Parts) -> Vec<Snapshot> {
    let table = &parts.bytes[parts.header.snapshot_table.0 as usize..];
    snapshot::decode_table(table, parts.header.snapshot_count).expect("sound")
}

/// The image with another snapshot table, at the end of the file and counted.
fn with_table(sound: &Parts, table: &[u8], count: u32) -> Parts {
    let mut parts = sound.clone();
    let at = (sound.bytes.len() as u64).next_multiple_of(sound.cluster());
    parts.bytes.resize((at + (table.len() as u64).next_multiple_of(sound.cluster())) as usize, 0);
    parts.bytes[at as usize..][..table.len()].copy_from_slice(table);
    put(&mut parts, header::SNAPSHOT_COUNT_OFFSET, count.into(), 4);
    put(&mut parts, header::SNAPSHOT_TABLE_OFFSET, at, 8);
    parts.set_count(sound.header.snapshot_table.0, 0);
    (at..parts.bytes.len() as u64)
        .step_by(sound.cluster() as usize)
        .for_each(|host| parts.set_count(host, 1));
    parts
}

/// One entry with extra data of any length: the first bytes of it are what the format knows.
fn entry(one: &Snapshot, extra: &[u8], claimed: u32) -> Vec<u8> {
    let mut bytes =
        snapshot::encode_table(&[Snapshot { disk_size: None, icount: None, ..one.clone() }]).expect("short");
    bytes.truncate(40);
    bytes[36..40].copy_from_slice(&claimed.to_be_bytes());
    let bytes = [&bytes[..], extra, &one.id, &one.name].concat();
    let padded = bytes.len().next_multiple_of(8);
    let mut bytes = bytes;
    bytes.resize(padded, 0);
    bytes
}

/// A snapshot of nothing.
fn empty(id: u32) -> Snapshot {
    Snapshot {
        l1_table: HostOffset(0),
        l1_entries: 0,
        id: id.to_string().into_bytes(),
        name: b"empty".to_vec(),
        date_sec: 0,
        date_nsec: 0,
        vm_clock_nsec: 0,
        vm_state_bytes: 0,
        disk_size: Some(1 << 30),
        icount: None,
        unknown_extra: Vec::new(),
    }
}

/// What `qemu-img snapshot -l` tells, without the line that names the image.
fn listed(bytes: &[u8]) -> String {
    let (code, text, _) = qemu_img(bytes, &["snapshot", "-l"]);
    assert_eq!(code, 0, "{text}");
    text
}

/// Snapshots' entries with more extra data than the limit, or in version 3 with too little, kept an image
/// from being opened, and `check --repair all` from doing anything about it. `qemu-img check -r all` writes
/// the table anew, without the unknown extra data and with the disk's size.
#[test]
fn extra_data_of_snapshots_is_brought_within_the_limits() {
    for shape in SHAPES {
        let sound = Parts::with_snapshot(shape);
        let one = snapshots(&sound).remove(0);
        let known = [0u64.to_be_bytes(), (1u64 << 30).to_be_bytes()].concat();
        let long = [&known[..], &[0xee; 2000]].concat();
        let mut tables = vec![("too much", entry(&one, &long, long.len() as u32))];
        if sound.header.version == Version::V3 {
            tables.push(("too little", entry(&one, &known[..8], 8)));
            tables.push(("none", entry(&one, &[], 0)));
        }
        for (name, table) in tables {
            let what = format!("{shape}: extra data: {name}");
            let damaged = with_table(&sound, &table, 1);
            let after = assert_repaired(&what, &sound, &damaged.bytes, true);
            let found = snapshots(&Parts::of(after.clone()));
            assert_eq!(
                (&found[0].name, found[0].disk_size.unwrap_or(1 << 30)),
                (&one.name, 1 << 30),
                "{what}"
            );
            let (code, text, theirs) = qemu_img(&damaged.bytes, &["check", "-f", "qcow2", "-r", "all"]);
            assert_eq!(code, 0, "{what}: {text}");
            assert_eq!(listed(&after), listed(&theirs), "{what}");
            run(open(&after, false).expect("opens").0.close()).expect("closes");
        }
    }
}

/// A table that goes on beyond its limits: what overhangs is dropped by a repair of all, as QEMU does it, and
/// what only the dropped ones had is free. Before that nothing is freed: the snapshots are still in the
/// table.
#[test]
fn snapshots_beyond_the_limits_are_dropped_and_their_clusters_freed() {
    let sound = Parts::with_snapshot("compat=1.1,cluster_size=64k");
    let one = snapshots(&sound).remove(0);
    let known = [0u64.to_be_bytes(), (1u64 << 30).to_be_bytes()].concat();
    let many: Vec<u8> = (0..65536).flat_map(|id| entry(&empty(id + 10), &known, 16)).collect();
    let last = entry(&one, &known, 16);
    // The first one's extra data is longer than what is looked through.
    let long = entry(&empty(10), &known, 80 << 20);
    for (name, kept, table, count) in
        [("too many", 65536, [many, last.clone()].concat(), 65537), ("too long", 0, [long, last].concat(), 2)]
    {
        let mut damaged = with_table(&sound, &table, count);
        if name == "too long" {
            // A hole is as good as extra data.
            let end = damaged.bytes.len() + (80 << 20);
            damaged.bytes.resize(end, 0);
        }
        let (report, _) = repaired(&damaged.bytes, Repair::None);
        assert!(report.found.corruptions > 0, "{name}");
        let is_of_table = |problem: &Problem| matches!(problem, Problem::Structure(error) if error.kind() == ErrorKind::Corrupt);
        let of_table: Vec<_> = report.found.list.iter().filter(|found| is_of_table(&found.problem)).collect();
        assert!(
            of_table.iter().all(|found| matches!(found.remedy, Remedy::WithAll(_))),
            "{name}: {of_table:?}"
        );
        let (_, after) = repaired(&damaged.bytes, Repair::Leaks);
        assert!(after == damaged.bytes, "{name}: freeing leaks changed it");
        let (report, after) = repaired(&damaged.bytes, Repair::All);
        assert!(report.remaining.is_clean(), "{name}: {:?} {:?}", report.refused, report.remaining.list);
        let parts = Parts::of(after);
        assert_eq!(parts.header.snapshot_count, kept, "{name}");
        let (code, text, _) = qemu_img(&parts.bytes, &["check", "-f", "qcow2"]);
        assert_eq!(code, 0, "{name}: {text}");
        assert!(is_same(&parts.bytes, &sound.bytes, false), "{name}: the disk has changed");
        // The active mapping shares nothing any more: its table can be written to in place.
        assert_ne!(parts.word(parts.l1_entry(0)) & COPIED, 0, "{name}");
    }
}

/// An entry with so much extra data that it goes beyond the end of the file kept the table from being
/// repaired, and one that needed the room of others had them dropped, though all fit in when it is cut short.
/// (QEMU's iotest 261.)
#[test]
fn what_an_entry_says_too_much_of_itself_costs_no_other_snapshot() {
    let sound = Parts::with_snapshot("compat=1.1,cluster_size=64k");
    let one = snapshots(&sound).remove(0);
    let known = [0u64.to_be_bytes(), (1u64 << 30).to_be_bytes()].concat();
    let beyond = [entry(&one, &known, 16), entry(&empty(7), &known, 65536)].concat();
    let long = entry(&empty(7), &vec![0; 64 << 20], 64 << 20);
    for (name, table) in [("beyond the end", beyond), ("too long", [long, entry(&one, &known, 16)].concat())]
    {
        let damaged = with_table(&sound, &table, 2);
        let (_, after) = repaired(&damaged.bytes, Repair::Leaks);
        assert!(after == damaged.bytes, "{name}: freeing leaks changed it");
        let (report, after) = repaired(&damaged.bytes, Repair::All);
        assert!(report.remaining.is_clean(), "{name}: {:?} {:?}", report.refused, report.remaining.list);
        let (code, text, theirs) = qemu_img(&damaged.bytes, &["check", "-f", "qcow2", "-r", "all"]);
        assert_eq!(code, 0, "{name}: {text}");
        let count = |bytes: &[u8]| Parts::of(bytes.to_vec()).header.snapshot_count;
        assert_eq!((count(&after), count(&theirs)), (2, 2), "{name}");
        let (code, text, _) = qemu_img(&after, &["check", "-f", "qcow2"]);
        assert_eq!(code, 0, "{name}: {text}");
        assert!(is_same(&after, &sound.bytes, true), "{name}: the disk or the snapshot has changed");
    }
}

/// What is dropped with the snapshot table goes when that is replaced, and not where it cannot be: an entry
/// that names an L2 table keeps the repair from making anything new.
#[test]
fn snapshots_that_stay_in_the_table_keep_their_clusters() {
    let sound = Parts::with_snapshot("compat=1.1,cluster_size=64k");
    let one = snapshots(&sound).remove(0);
    let known = [0u64.to_be_bytes(), (1u64 << 30).to_be_bytes()].concat();
    let long = entry(&empty(10), &known, (64 << 20) - 64);
    let mut damaged = with_table(&sound, &[long, entry(&one, &known, 16)].concat(), 2);
    let end = damaged.bytes.len() + (80 << 20);
    damaged.bytes.resize(end, 0);
    damaged.set(damaged.l2_entry(9 * sound.cluster()), sound.l2_table(sound.geometry.l2_coverage_bytes()));
    let (report, after) = repaired(&damaged.bytes, Repair::All);
    assert!(!report.refused.is_empty() && report.remaining.corruptions > 0);
    let count = |bytes: &[u8]| {
        let block = &bytes[sound.refcount_block() as usize..][..sound.cluster() as usize];
        qcow2_format::refcount::get(block, 4, (sound.snapshot_l1() / sound.cluster()) as usize)
    };
    assert_eq!((count(&damaged.bytes), count(&after)), (1, 1), "the snapshot's L1 table");
}

/// A number of snapshots that is nonsense takes what follows the table for entries. They make no sense, so
/// nothing is dropped for it.
#[test]
fn a_table_that_is_none_is_left_alone() {
    let sound = Parts::with_snapshot("compat=1.1,cluster_size=4k");
    let mut damaged = sound.clone();
    put(&mut damaged, header::SNAPSHOT_COUNT_OFFSET, 1 << 20, 4);
    damaged.bytes.resize(16 << 20, 0x5a);
    let (report, after) = repaired(&damaged.bytes, Repair::All);
    assert!(report.remaining.corruptions > 0 && !report.refused.is_empty());
    assert_eq!(after[60..72], damaged.bytes[60..72], "the header's word on the snapshots");
    let old = sound.header.snapshot_table.0 as usize;
    assert!(after[old..old + 4096] == damaged.bytes[old..old + 4096], "the table");
}

/// `info` and all that opens an image for writing still want what QEMU wants.
#[test]
fn only_a_check_takes_too_many_snapshots() {
    let mut damaged = Parts::with_snapshot("compat=1.1,cluster_size=4k");
    damaged.bytes.resize(16 << 20, 0);
    put(&mut damaged, header::SNAPSHOT_COUNT_OFFSET, 65537, 4);
    for read_only in [true, false] {
        let error = open(&damaged.bytes, read_only).err().expect("refused");
        assert!(error.to_string().contains("nb_snapshots"), "{error}");
    }
    let files = MemFiles::default();
    files.put(IMAGE, damaged.bytes);
    let file = run(ImageFile::open(&files, &files, Path::new(IMAGE), Access::ReadOnly)).expect("opens");
    let error = run(file.snapshots()).expect_err("refused");
    assert!(error.to_string().contains("nb_snapshots"), "{error}");
}

/// A snapshot table that is nowhere, beyond the end of the file or over the header, kept even the active disk
/// from being read, and `info` and `check` from saying anything. QEMU reads the disk, and its repair gives
/// the snapshots up.
#[test]
fn a_snapshot_table_that_is_nowhere_hides_no_disk() {
    for shape in SHAPES {
        let sound = Parts::with_snapshot(shape);
        let end = (sound.bytes.len() as u64).next_multiple_of(sound.cluster());
        for (name, count, at) in [
            ("behind the end", 1, end),
            ("far beyond it", 3, 1 << 56),
            ("more of them than fit", 65536, end),
            ("in the header", 1, 0),
        ] {
            let what = format!("{shape}: {name}");
            let mut damaged = sound.clone();
            put(&mut damaged, header::SNAPSHOT_COUNT_OFFSET, count, 4);
            put(&mut damaged, header::SNAPSHOT_TABLE_OFFSET, at, 8);
            assert_only_readable(&what, &damaged.bytes, "snapshots_offset");
            let (_, after) = repaired(&damaged.bytes, Repair::Leaks);
            assert!(after == damaged.bytes, "{what}: freeing leaks changed it");
            let (report, after) = repaired(&damaged.bytes, Repair::All);
            assert!(report.remaining.is_clean(), "{what}: {:?} {:?}", report.refused, report.remaining.list);
            assert_eq!(Parts::of(after.clone()).header.snapshot_count, 0, "{what}");
            let (code, text, _) = qemu_img(&after, &["check", "-f", "qcow2"]);
            assert_eq!(code, 0, "{what}: {text}");
            assert!(is_same(&after, &sound.bytes, false), "{what}: the disk has changed");
            run(open(&after, false).expect("opens").0.close()).expect("closes");
        }
    }
}

/// Readers get the disk, `info` does not fail, and writers are told what is wrong.
fn assert_only_readable(what: &str, damaged: &[u8], words: &str) {
    let (lane, _) = open(damaged, true).expect(what);
    let buf = Buf::zeroed(512);
    run(lane.read(0, buf.clone())).expect(what);
    assert!(buf.to_vec().iter().all(|byte| *byte == 0x22), "{what}");
    let error = open(damaged, false).err().expect(what);
    assert!(error.to_string().contains(words), "{what}: {error}");
    let files = MemFiles::default();
    files.put(IMAGE, damaged.to_vec());
    let file = run(ImageFile::open(&files, &files, Path::new(IMAGE), Access::ReadOnly)).expect(what);
    // In the header anything may stand for a snapshot.
    let listed = run(file.snapshots());
    assert!(listed.is_ok() || file.header().snapshot_table == HostOffset(0), "{what}: {listed:?}");
}

/// A file that ends within its last snapshot's name could not be read. The disk is, the snapshot stays when
/// the table is written anew, and of a table over the L1 table nothing is believed.
#[test]
fn a_snapshot_table_that_is_cut_off_or_over_another_is_read_past() {
    let sound = Parts::with_snapshot("compat=1.1,cluster_size=64k");
    let one = snapshots(&sound).remove(0);
    let table = snapshot::encode_table(&[Snapshot { name: vec![b'n'; 600], ..one.clone() }]).expect("short");
    let mut cut_off = with_table(&sound, &table, 1);
    cut_off.bytes.truncate(cut_off.header.snapshot_table.0.max(sound.bytes.len() as u64) as usize + 200);
    assert_only_readable("cut off", &cut_off.bytes, "the snapshot table");
    let (report, after) = repaired(&cut_off.bytes, Repair::All);
    assert!(report.remaining.is_clean(), "{:?} {:?}", report.refused, report.remaining.list);
    let (code, text, _) = qemu_img(&after, &["check", "-f", "qcow2"]);
    assert_eq!(code, 0, "{text}");
    assert!(is_same(&after, &sound.bytes, false), "the disk has changed");
    let kept = snapshots(&Parts::of(after));
    assert_eq!((kept.len(), kept[0].l1_table), (1, one.l1_table));

    let mut over = sound.clone();
    put(&mut over, header::SNAPSHOT_TABLE_OFFSET, sound.header.l1_table.0, 8);
    let (lane, _) = open(&over.bytes, true).expect("opens");
    run(lane.read(0, Buf::zeroed(512))).expect("reads");
    let error = open(&over.bytes, false).err().expect("refused");
    assert!(error.to_string().contains("snapshots_offset"), "{error}");
    let (report, _) = repaired(&over.bytes, Repair::All);
    assert!(report.remaining.corruptions > 0);
}

/// A snapshot whose L1 table is nowhere kept the disk from being written to, and no command changes its entry.
/// QEMU writes (iotest 080, "Invalid snapshot L1 table"). What the snapshot has is still counted: with its
/// entry mended it is what it was.
#[test]
fn a_snapshot_whose_l1_table_is_nowhere_costs_no_write_and_loses_nothing() {
    for shape in SHAPES {
        let sound = Parts::with_snapshot(shape);
        let (at, one) = (sound.header.snapshot_table.0, snapshots(&sound).remove(0));
        let place = |offset: u64| [&offset.to_be_bytes()[..], &one.l1_entries.to_be_bytes()].concat();
        let long = [&one.l1_table.0.to_be_bytes()[..], &0x1000_0000_u32.to_be_bytes()].concat();
        let leaked = sound.data(11 * sound.cluster());
        let mut expected = sound.clone();
        expected.bytes = changed(&expected.bytes, false);
        for (name, fields) in [
            ("at no cluster's boundary", place(one.l1_table.0 + 0x200)),
            ("that, and beyond the end", place(0x40_0200)),
            ("in the header", place(0)),
            ("too far for anything", place(1 << 63)),
            ("too large", long),
        ] {
            let what = format!("{shape}: {name}");
            let mut damaged = sound.clone();
            damaged.bytes[at as usize..][..12].copy_from_slice(&fields);
            let mut after = changed(&damaged.bytes, true);
            assert_eq!(after[at as usize..][..12], fields, "{what}");
            let (report, unchanged) = repaired(&after, Repair::Leaks);
            assert!(report.remaining.corruptions > 0, "{what}");
            assert!(after == unchanged, "{what}: freeing leaks changed it");
            after[at as usize..][..12].copy_from_slice(&place(one.l1_table.0));
            let (code, text, _) = qemu_img(&after, &["check", "-f", "qcow2"]);
            assert_eq!(code, 0, "{what}: {text}");
            assert!(is_same(&after, &expected.bytes, true), "{what}: the disk or the snapshot has changed");

            // Nor does a search for leaks take anything, where there are some.
            damaged.set_count(leaked, 2);
            let after = changed(&damaged.bytes, true);
            let (report, _) = repaired(&after, Repair::None);
            assert!(report.found.leaks > 0 && report.found.corruptions > 0, "{what}");
        }
    }
}

/// The image after requests of every kind on what it shares with its snapshot, on what it does not, and with
/// room for the file to grow.
fn changed(bytes: &[u8], is_lost: bool) -> Vec<u8> {
    let (lane, files) = open(bytes, false).expect("opens");
    let cluster = lane.image().geometry().cluster_size();
    let table = lane.image().geometry().l2_coverage_bytes();
    let write = |at, byte, len: u64| run(lane.write(at, Buf::from_bytes(&vec![byte; len as usize])));
    write(0, 0x31, 512).expect("writes");
    write(table, 0x32, cluster).expect("writes");
    write(8 * cluster, 0x33, cluster).expect("writes");
    run(lane.discard(2 * cluster, cluster)).expect("discards");
    run(lane.discard(9 * cluster, cluster)).expect("discards");
    run(lane.flush()).expect("flushes");
    write(32 * cluster, 0x34, 5 << 20).expect("writes");
    run(lane.write_zeroes(3 * cluster, 512, ZeroMode::Unmap)).expect("zeroes");
    run(lane.maintain()).expect("maintains");
    let found = run(lane.reclaim_leaks(&Idle)).expect("searches");
    assert_eq!(matches!(found.verdict, Verdict::Doubt(_)), is_lost, "{found:?}");
    assert_eq!((found.freed, found.lowered), (0, 0));
    run(lane.close()).expect("closes");
    files.get(IMAGE).expect("kept")
}

/// When the file has grown over it, what lies there would be taken for the table, and what the snapshot has
/// for leaks.
#[test]
fn a_snapshot_whose_l1_table_is_beyond_the_end_keeps_the_file_from_growing() {
    let mut damaged = Parts::with_snapshot("compat=1.1,cluster_size=4k");
    let end = (damaged.bytes.len() as u64).next_multiple_of(4096);
    damaged.set(damaged.header.snapshot_table.0, end);
    let error = open(&damaged.bytes, false).err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("snapshot 0") && error.to_string().contains("--read-only"), "{error}");
    run(open(&damaged.bytes, true).expect("opens").0.read(0, Buf::zeroed(512))).expect("reads");
}

/// Rests without doing anything.
struct Idle;

impl Pace for Idle {
    fn rest(&self) -> Pin<Box<dyn Future<Output = bool> + '_>> {
        Box::pin(std::future::ready(true))
    }
}
