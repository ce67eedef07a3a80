//! What a repair makes anew, as `qemu-img check -r all` does: a refcount structure that cannot be used,
//! wherever the header or another table says that it is, and a snapshot table beyond its limits.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;
#[allow(dead_code, reason = "shared by several test programs")]
#[path = "common/damaged.rs"]
mod damaged;

use common::{
    IMAGE, create,
    hooked::{FailingDisk, Hook, Hooked, Operation},
    run,
};
use damaged::{COPIED, Parts};
use qcow2_engine::{
    CheckOptions, CheckReport, ErrorKind, Image, Lane, OpenOptions, Repair, check,
    check::{Problem, Remedy},
    inspect::ImageFile,
    io::{Access, Buf, mem::MemFiles},
};
use qcow2_format::{CreateOptions, HostOffset, Snapshot, Version, header, snapshot};
use std::{fs, io, path::Path, process::Command};

const SHAPES: [&str; 2] = ["compat=1.1,cluster_size=4k,refcount_bits=64", "compat=0.10,cluster_size=4k"];

fn repaired(bytes: &[u8], repair: Repair) -> (CheckReport, Vec<u8>) {
    let files = MemFiles::default();
    files.put(IMAGE, bytes.to_vec());
    let options = CheckOptions { repair, ..CheckOptions::default() };
    let report = run(check(&files, &files, Path::new(IMAGE), options)).expect("checks");
    (report, files.get(IMAGE).expect("kept"))
}

fn open(bytes: &[u8], read_only: bool) -> qcow2_engine::Result<(Lane<MemFiles>, MemFiles)> {
    let files = MemFiles::default();
    files.put(IMAGE, bytes.to_vec());
    let options = OpenOptions { read_only, ..OpenOptions::default() };
    let image = run(Image::open(&files, &files, Path::new(IMAGE), &options))?;
    Ok((Lane::new(&image, files.clone(), 1), files))
}

fn read(lane: &Lane<MemFiles>, at: u64) -> Vec<u8> {
    let buf = Buf::zeroed(512);
    run(lane.read(at, buf.clone())).expect("reads");
    buf.to_vec()
}

/// Runs qemu-img on an image with `arguments` before its name; exit code, and the image after it.
fn qemu_img(bytes: &[u8], arguments: &[&str]) -> (i32, String, Vec<u8>) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join(IMAGE);
    fs::write(&path, bytes).expect("written");
    let output = Command::new("qemu-img").args(arguments).arg(&path).output().expect("cargo xtask setup");
    let text = [output.stdout, output.stderr].concat();
    let code = output.status.code().expect("an exit code");
    (code, String::from_utf8_lossy(&text).into_owned(), fs::read(&path).expect("kept"))
}

/// Whether QEMU reads the same disk of both images, and if it is asked for, the same snapshot.
fn is_same(ours: &[u8], sound: &[u8], with_snapshot: bool) -> bool {
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
fn assert_repaired(what: &str, sound: &Parts, damaged: &[u8], disk_is_whole: bool) -> Vec<u8> {
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
fn put(parts: &mut Parts, at: u64, value: u64, len: usize) {
    parts.bytes[at as usize..][..len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
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
