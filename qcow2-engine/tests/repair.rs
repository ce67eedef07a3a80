//! What a repair must not do.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;
#[allow(dead_code, reason = "shared by several test programs")]
#[path = "common/damaged.rs"]
mod damaged;

use common::{IMAGE, run};
use damaged::{COPIED, OFFSET, Parts, tool};
use qcow2_engine::{
    CheckOptions, CheckReport, Image, Lane, OpenOptions, Repair, check,
    check::{Finding, Problem},
    io::{Buf, mem::MemFiles},
};
use qcow2_format::{Version, header, l2};
use std::path::Path;

/// What a repair makes of an image.
fn repaired(parts: &Parts, repair: Repair) -> (CheckReport, Parts) {
    let files = MemFiles::default();
    files.put(IMAGE, parts.bytes.clone());
    let options = CheckOptions { repair, ..CheckOptions::default() };
    let report = run(check(&files, &files, Path::new(IMAGE), options)).expect("checks");
    (report, Parts::of(files.get(IMAGE).expect("kept")))
}

/// Opens an image, writes its first and its last clusters if there is something to write, and closes it.
fn written(parts: &Parts, write: &[(u64, u8)]) -> Parts {
    let files = MemFiles::default();
    files.put(IMAGE, parts.bytes.clone());
    let lane = lane(&files);
    for &(at, byte) in write {
        run(lane.write(at, Buf::from_bytes(&vec![byte; parts.cluster() as usize]))).expect("write");
        run(lane.flush()).expect("flush");
    }
    run(lane.close()).expect("close");
    Parts::of(files.get(IMAGE).expect("kept"))
}

fn lane(files: &MemFiles) -> Lane<MemFiles> {
    let image = run(Image::open(files, files, Path::new(IMAGE), &OpenOptions::default())).expect("opens");
    Lane::new(&image, files.clone(), 1)
}

/// The first two clusters.
fn content(parts: &Parts) -> Vec<u8> {
    let files = MemFiles::default();
    files.put(IMAGE, parts.bytes.clone());
    let buf = Buf::zeroed(2 * parts.cluster() as usize);
    run(lane(&files).read(0, buf.clone())).expect("read");
    buf.to_vec()
}

/// A compressed cluster at the end of the file whose entry claims more sectors than there are: the stream
/// ends before that, so that it can be read. Whoever took it for lost would free it, or have it read as
/// zeros.
#[test]
fn compressed_data_is_kept_whose_claim_goes_beyond_the_file() {
    for cluster in [512, 4096, 65536] {
        for repair in [Repair::Leaks, Repair::All] {
            let mut parts = Parts::compressed(&format!("cluster_size={cluster}"), false);
            parts.claim_too_much();
            let (report, after) = repaired(&parts, repair);
            assert!(report.found.corruptions > 0, "the claim is wrong");
            let expected = [vec![0x5a; cluster], vec![0; cluster]].concat();
            assert!(content(&after) == expected, "{cluster} {repair:?}");
            // Nor is its place given to somebody else.
            let after = written(&after, &[(512 << 10, 9), (600 << 10, 9)]);
            assert!(content(&after) == expected, "{cluster} {repair:?}, after writes");
        }
    }
}

/// The cluster after it is counted once, for its own owner: overwriting what claims it too must not free it.
#[test]
fn an_overwritten_cluster_gives_back_no_more_than_it_can_have_had() {
    for cluster in [512, 4096, 65536] {
        let mut parts = Parts::compressed(&format!("cluster_size={cluster}"), true);
        parts.claim_too_much();
        let after = written(&parts, &[(0, 9)]);
        assert!(content(&after) == [vec![9; cluster], vec![0x33; cluster]].concat(), "{cluster}");
    }
}

/// "may only write to an image with unknown auto-clear features if it clears the respective bits". They
/// stayed where nothing else was to be repaired, because nothing was written then; whoever asks for a repair
/// opens the image for writing, and QEMU clears them at that.
#[test]
fn a_repair_clears_the_autoclear_bits_that_it_does_not_know_and_no_others() {
    for repair in [Repair::Leaks, Repair::All] {
        let mut parts = Parts::with_snapshot("cluster_size=4096");
        let at = header::AUTOCLEAR_OFFSET;
        parts.set(at, 1 << 63 | 1 << 5 | header::BITMAPS);
        let looked_at = repaired(&parts, Repair::None).1;
        assert!(looked_at.bytes == parts.bytes, "a look changed the image");
        let (report, sound) = repaired(&parts, repair);
        assert!(report.found.is_clean(), "{:?}", report.found.list);
        assert_eq!(sound.word(at), header::BITMAPS);
        // Counted, and nothing refers to it.
        let end = parts.bytes.len() as u64;
        parts.bytes.resize(parts.bytes.len() + 4096, 0);
        parts.set_count(end, 1);
        let (report, after) = repaired(&parts, repair);
        assert_eq!((report.leaks_fixed(), report.remaining.leaks), (1, 0));
        assert_eq!(after.word(at), header::BITMAPS);
    }
}

/// A raw data file was vouched for where there is none. `check` found nothing wrong with such an image, and a
/// repair left it as it was; QEMU does not open it.
#[test]
fn a_bit_about_a_data_file_goes_where_there_is_none() {
    for repair in [Repair::Leaks, Repair::All] {
        let mut parts = Parts::with_snapshot("cluster_size=4096");
        let at = header::AUTOCLEAR_OFFSET;
        parts.set(at, header::RAW_EXTERNAL | header::BITMAPS);
        assert_eq!(repaired(&parts, Repair::None).0.found.corruptions, 1);
        let (report, after) = repaired(&parts, repair);
        assert_eq!((report.corruptions_fixed(), report.remaining.is_clean()), (1, true));
        assert_eq!(after.word(at), header::BITMAPS);
        qemu_checks(&after.bytes);
    }
}

/// An L1 table that says to be longer than it is covers the L2 tables and the data behind it. They were taken
/// for entries beyond the end of the file and cleared: a repair lost data that could be read.
#[test]
fn what_lies_in_an_l1_table_that_is_too_long_is_not_cleared() {
    let mut parts = Parts::with_snapshot("cluster_size=4096");
    let sound = parts.clone();
    let (l1, cluster) = (parts.header.l1_table.0, parts.cluster());
    let kept = [2, 3].map(|index| sound.data(index * cluster));
    let clusters = kept.iter().max().expect("two") / cluster + 1 - l1 / cluster;
    let entries = (clusters * cluster / 8) as u32;
    parts.bytes[header::L1_SIZE_OFFSET as usize..][..4].copy_from_slice(&entries.to_be_bytes());
    let (report, after) = repaired(&parts, Repair::All);
    assert!(report.remaining.corruptions > 0);
    for host in kept {
        assert_eq!(after.bytes[host as usize..][..cluster as usize], vec![0x11; cluster as usize]);
    }
    for guest in (0..16).map(|index| index * cluster) {
        assert_eq!(after.word(sound.l2_entry(guest)) & OFFSET, sound.data(guest), "{guest:#x}");
    }
    assert!(report.refused.iter().any(|reason| reason.contains("L1 tables that overlap")));
}

/// Where a header's L1 table is elsewhere, what lies there may be somebody's data. Words of it that do not make
/// sense as entries, and beyond the file if they did, were cleared as if they did: with the data the only trace of
/// the mistake was gone, and the next repair freed everything.
#[test]
fn what_makes_no_sense_as_an_l1_table_is_not_cleared() {
    let mut sound = Parts::with_snapshot("cluster_size=4096");
    // Of the active disk alone.
    let data = sound.data(8 * 4096);
    sound.bytes[data as usize..][..4096].fill(0x11);
    let mut parts = sound.clone();
    parts.set(header::L1_TABLE_OFFSET, data);
    for repair in [Repair::All, Repair::All] {
        let (report, after) = repaired(&parts, repair);
        assert!(after.bytes[data as usize..][..4096] == sound.bytes[data as usize..][..4096], "cleared");
        assert!(report.refused.iter().any(|reason| reason.contains("L1 tables with entries that make no")));
        parts = after;
    }
    parts.set(header::L1_TABLE_OFFSET, sound.header.l1_table.0);
    let (_, parts) = repaired(&parts, Repair::All);
    assert!(repaired(&parts, Repair::None).0.found.is_clean());
    assert!(content(&parts) == content(&sound));
}

/// An entry of a sound table that makes no sense, and would name a table beyond the file if it did. A repair said
/// in one breath that nobody knows what it should be and that it is cleared, and cleared it; the next one freed
/// all that it had named.
#[test]
fn an_l1_entry_that_makes_no_sense_is_kept_wherever_it_points() {
    let mut parts = Parts::with_snapshot("cluster_size=4096");
    let (entry, far) = (parts.l1_entry(0), 1 << 40);
    for table in [entry, parts.snapshot_l1()] {
        let mut parts = parts.clone();
        parts.set(table, parts.word(table) | far | 2);
        let wrong = parts.word(table);
        let (report, after) = repaired(&parts, Repair::All);
        assert_eq!(after.word(table) & !COPIED, wrong & !COPIED);
        let clears = |finding: &Finding| finding.to_string().contains("clear the entry");
        assert!(!report.found.list.iter().any(clears), "{:?}", report.found.list);
        let (report, again) = repaired(&after, Repair::All);
        assert!(again.bytes == after.bytes && report.remaining.corruptions > 0);
    }
    // Of one that makes sense a repair knows that there is nothing, but not beside one that does not: it was told
    // of those before that one that they are cleared.
    parts.set(entry, far);
    let mut beside = parts.clone();
    beside.set(entry + 8, far | 2);
    let (report, after) = repaired(&beside, Repair::All);
    assert_eq!(after.word(entry), far);
    let [of_first, ..] = &report.found.list[..] else { panic!("nothing is found") };
    assert!(of_first.to_string().ends_with("[no repair: the table may be something else]"), "{of_first}");
    assert_eq!(repaired(&parts, Repair::All).1.word(entry), 0);
}

/// Two entries of the active L1 table name one L2 table. When the counts said two a check found nothing, and the
/// first write condemned the image, after each repair anew.
#[test]
fn a_table_with_two_names_is_reported_however_often_it_is_counted() {
    let sound = Parts::with_snapshot("cluster_size=4096");
    let mut parts = sound.clone();
    let coverage = parts.geometry.l2_coverage_bytes();
    let second = parts.l1_entry(2 * coverage);
    parts.set(second, parts.l2_table(0));
    let (_, after) = repaired(&parts, Repair::All);
    let report = repaired(&after, Repair::None).0;
    assert_eq!((report.found.corruptions, report.found.leaks), (1, 0), "{:?}", report.found.list);
    let said = report.found.list[0].to_string();
    assert!(said.contains(&format!("byte {second:#x}")) && said.contains("is also the L2 table"), "{said}");
    let files = MemFiles::default();
    files.put(IMAGE, after.bytes);
    run(lane(&files).write(0, Buf::zeroed(4096))).expect_err("nor is it written to");
}

/// The bit that says that the data is in another file was set in an image whose data is its own. All of it was
/// taken for leaks, and freed.
#[test]
fn data_is_not_freed_because_a_bit_says_that_it_is_elsewhere() {
    let compressed = [false, true].map(|has_neighbour| Parts::compressed("cluster_size=4096", has_neighbour));
    for sound in compressed.into_iter().chain([Parts::with_snapshot("cluster_size=4096")]) {
        for repair in [Repair::Leaks, Repair::All] {
            let mut parts = sound.clone();
            let at = header::INCOMPATIBLE_OFFSET;
            parts.set(at, header::EXTERNAL_DATA);
            let (report, mut after) = repaired(&parts, repair);
            assert!(report.found.corruptions > 0 && report.remaining.leaks > 0);
            assert!(report.refused.iter().any(|reason| reason.contains("leaked clusters are kept")));
            after.set(at, 0);
            let (report, after) = repaired(&after, Repair::All);
            assert!(report.remaining.is_clean(), "{:?}", report.remaining.list);
            assert!(content(&after) == content(&sound));
        }
    }
}

/// An entry that reads as zeros may keep a cluster, and one that names a table there was left as it is: the
/// image stayed corrupt, although nobody loses anything when the entry keeps nothing.
#[test]
fn zeros_that_keep_a_table_for_themselves_let_go_of_it() {
    let sound = Parts::with_snapshot("cluster_size=4096");
    for (what, host) in sound.metadata() {
        let mut parts = sound.clone();
        let entry = parts.l2_entry(20 * 4096);
        parts.set(entry, host | COPIED | l2::ZERO);
        let (report, after) = repaired(&parts, Repair::All);
        assert_eq!(report.found.corruptions, 1, "{what}: {:?}", report.found.list);
        assert!(report.remaining.is_clean(), "{what}: {:?}", report.remaining.list);
        parts.set(entry, l2::ZERO);
        assert!(after.bytes == parts.bytes, "{what}: more was changed");
        qemu_checks(&after.bytes);
    }
}

/// An entry of the disk that names an L2 table which only the snapshot has. Once it is counted for both and
/// flagged as nobody's own, a write goes elsewhere and nothing is lost; but the overlap was reported for
/// ever, and the corrupt bit kept the image read-only. `qemu-img check -r all` clears it.
#[test]
fn data_over_a_snapshots_l2_table_is_repaired_when_both_are_counted() {
    for options in
        ["cluster_size=4096", "cluster_size=65536,refcount_bits=2", "compat=0.10,cluster_size=4096"]
    {
        let mut parts = Parts::with_snapshot(options);
        let table = parts.word(parts.snapshot_l1()) & OFFSET;
        assert_ne!(table, parts.l2_table(0), "the snapshot's own");
        let (guest, cluster) = (20 * parts.cluster(), parts.cluster() as usize);
        let entry = parts.l2_entry(guest);
        let sound = snapshot_content(&parts);
        parts.set(entry, table | COPIED);
        let has_mark = parts.header.version == Version::V3;
        if has_mark {
            parts.set(header::INCOMPATIBLE_OFFSET, header::CORRUPT);
        }
        for repair in [Repair::None, Repair::Leaks] {
            let report = repaired(&parts, repair).0;
            let is_overlap = |finding: &&Finding| matches!(finding.problem, Problem::Overlap { .. });
            assert_eq!(report.remaining.list.iter().filter(is_overlap).count(), 1, "{options}");
            assert_eq!(report.is_corrupt, has_mark, "{options}");
        }
        let (report, after) = repaired(&parts, Repair::All);
        assert!(report.remaining.is_clean(), "{options}: {:?}", report.remaining.list);
        assert!(report.refused.is_empty() && !report.is_corrupt, "{options}: {:?}", report.refused);
        assert_eq!(after.word(entry), table, "{options}");
        qemu_checks(&after.bytes);

        let files = MemFiles::default();
        files.put(IMAGE, after.bytes.clone());
        let lane = lane(&files);
        run(lane.write(guest, Buf::from_bytes(&[9; 512]))).expect("write");
        run(lane.close()).expect("close");
        let written = Parts::of(files.get(IMAGE).expect("kept"));
        let place = table as usize..table as usize + cluster;
        assert!(written.bytes[place.clone()] == parts.bytes[place.clone()], "{options}: the table");
        let new = &written.bytes[written.data(guest) as usize..][..cluster];
        assert!(new[..512] == [9; 512] && new[512..] == parts.bytes[place][512..], "{options}: a copy");
        assert!(snapshot_content(&written) == sound, "{options}: the snapshot");
        qemu_checks(&written.bytes);
    }
}

/// Over a table of the disk itself a write would be refused: such an overlap is not put right by counts.
#[test]
fn data_over_an_l2_table_in_use_stays_reported() {
    let shared = Parts::shared("cluster_size=4096", 1 << 20);
    let own = Parts::with_snapshot("cluster_size=4096");
    for (mut parts, what) in [(shared, "shared with the snapshot"), (own, "the disk's own")] {
        let (entry, table) = (parts.l2_entry(20 * 4096), parts.l2_table(0));
        parts.set(entry, table);
        parts.set(header::INCOMPATIBLE_OFFSET, header::CORRUPT);
        let (report, _) = repaired(&parts, Repair::All);
        assert!(report.remaining.corruptions > 0 && report.is_corrupt, "{what}: {:?}", report.remaining.list);
        assert!(!report.refused.is_empty(), "{what}");
    }
}

/// Five references cannot be counted in two bits.
#[test]
fn data_over_a_snapshots_l2_table_stays_reported_where_it_cannot_be_counted() {
    let mut parts = Parts::with_snapshot("cluster_size=4096,refcount_bits=2");
    let table = parts.word(parts.snapshot_l1()) & OFFSET;
    for guest in 20..24 {
        let entry = parts.l2_entry(guest * 4096);
        parts.set(entry, table | COPIED);
    }
    parts.set(header::INCOMPATIBLE_OFFSET, header::CORRUPT);
    let (report, _) = repaired(&parts, Repair::All);
    assert!(report.remaining.corruptions > 0 && report.is_corrupt, "{:?}", report.remaining.list);
}

/// What QEMU reads of the snapshot.
fn snapshot_content(parts: &Parts) -> Vec<u8> {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| directory.path().join(name).to_str().expect("UTF-8").to_owned();
    std::fs::write(path("image"), &parts.bytes).expect("written");
    let convert = ["convert", "-f", "qcow2", "-O", "qcow2", "-l", "one"];
    tool("qemu-img", &[&convert[..], &[&path("image"), &path("snapshot")]].concat());
    std::fs::read(path("snapshot")).expect("read")
}

fn qemu_checks(bytes: &[u8]) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join(IMAGE);
    std::fs::write(&path, bytes).expect("written");
    tool("qemu-img", &["check", "-q", "-f", "qcow2", path.to_str().expect("UTF-8")]);
}

/// Flags follow from the counts: wrong ones do not keep a repair of leaks from making the image clean.
#[test]
fn a_repair_of_leaks_puts_flags_right_where_nothing_else_is_wrong() {
    let mut parts = Parts::with_snapshot("cluster_size=4096");
    let at = parts.l2_entry(8 * 4096);
    parts.set(at, parts.word(at) ^ COPIED);
    let leaked = parts.data(9 * 4096);
    parts.set_count(leaked, 2);
    let (report, after) = repaired(&parts, Repair::Leaks);
    assert_eq!((report.found.corruptions, report.found.leaks), (2, 1));
    assert!(report.remaining.is_clean(), "{:?}", report.remaining.list);
    assert_eq!(after.word(at), parts.word(at) ^ COPIED);
}

/// A snapshot's L1 entry is damaged, and with it the references are out of sight that it holds to the L2
/// table and its clusters; their counts are one too low besides. A repair that then believed the counts
/// would flag them as the active mapping's own, and the next write would go over the snapshot's data.
#[test]
fn what_damage_may_still_refer_to_is_not_said_to_have_one_owner() {
    let mut parts = Parts::shared("cluster_size=4096", 1 << 20);
    for (entry, host) in [(parts.l1_entry(0), parts.l2_table(0)), (parts.l2_entry(0), parts.data(0))] {
        assert_eq!(parts.word(entry) & COPIED, 0, "the snapshot shares it");
        parts.set_count(host, 1);
    }
    // Not aligned to a cluster: it names nothing, and what it should name cannot be told.
    let at = parts.snapshot_l1();
    parts.set(at, parts.word(at) | 0x200);

    let (report, parts) = repaired(&parts, Repair::All);
    assert!(report.remaining.corruptions > 0, "the entry cannot be repaired");
    let (table, data) = (parts.word(parts.l1_entry(0)), parts.word(parts.l2_entry(0)));
    assert_eq!((table & COPIED, data & COPIED), (0, 0), "flagged, and the snapshot has them, too");
}
