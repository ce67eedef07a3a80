//! L2 entries that make no sense: a discard or zeros throw them away, and free nothing; everything else is
//! refused. (QEMU's iotest 060, "non-fatal corruption on freeing".)

#[allow(dead_code, reason = "shared by several test programs")]
mod common;
#[allow(dead_code, reason = "shared by several test programs")]
#[path = "common/damaged.rs"]
mod damaged;

use common::{IMAGE, Idle, findings, run};
use damaged::{COPIED, Parts, SHAPES, tool};
use qcow2_engine::{
    ErrorKind, Image, Lane, MIN_REDO_BYTES, OpenOptions, RedoLog, RedoMemory, Verdict, ZeroMode,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::{Version, header, word};
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// What is asked of the damaged image.
#[derive(Clone, Copy, Debug)]
enum Request {
    Discard,
    Zero(ZeroMode),
}

fn open(files: &MemFiles) -> Lane<MemFiles> {
    let image = run(Image::open(files, files, Path::new(IMAGE), &OpenOptions::default())).expect("opens");
    Lane::new(&image, files.clone(), 8)
}

/// The image with an entry for guest cluster 9, whose data is of 0x22.
fn with_entry(parts: &Parts, entry: u64) -> MemFiles {
    let mut damaged = parts.clone();
    damaged.set(parts.l2_entry(9 * parts.cluster()), entry);
    let files = MemFiles::default();
    files.put(IMAGE, damaged.bytes);
    files
}

fn carry_out(lane: &Lane<MemFiles>, request: Request, cluster: u64) -> qcow2_engine::Result<()> {
    match request {
        Request::Discard => run(lane.discard(9 * cluster, cluster)),
        Request::Zero(mode) => run(lane.write_zeroes(9 * cluster, cluster, mode)),
    }
}

fn assert_read(lane: &Lane<MemFiles>, at: u64, byte: u8, what: &str) {
    let buf = Buf::zeroed(512);
    run(lane.read(at, buf.clone())).expect(what);
    assert_eq!(buf.to_vec(), [byte; 512], "{what}");
}

fn is_marked(files: &MemFiles) -> bool {
    let bytes = files.get(IMAGE).expect("kept");
    word::get(&bytes, header::INCOMPATIBLE_OFFSET as usize).expect("eight bytes") & header::CORRUPT != 0
}

/// Entries that name the cluster at `host`, or would if they made sense.
fn senseless(parts: &Parts, host: u64) -> Vec<u64> {
    let mut entries =
        vec![host | COPIED | 1 << 57, host | 1 << 61, host | COPIED | 2, host | COPIED | 1 << 62];
    if parts.cluster() > 512 {
        entries.extend([host + 512, (host + parts.cluster() / 2) | COPIED]);
    }
    entries
}

/// A discard over such an entry condemned the image: an fstrim took the whole disk its write access, for good,
/// because no repair knew what the entry should be.
#[test]
fn an_entry_that_makes_no_sense_is_thrown_away_and_nothing_is_freed() {
    for options in SHAPES {
        let parts = Parts::with_snapshot(options);
        let (cluster, host) = (parts.cluster(), parts.data(9 * parts.cluster()));
        let requests = match parts.header.version {
            Version::V3 => {
                vec![Request::Discard, Request::Zero(ZeroMode::Unmap), Request::Zero(ZeroMode::Keep)]
            }
            // Zeros that keep their place are written, as content is.
            Version::V2 => vec![Request::Discard, Request::Zero(ZeroMode::Unmap)],
        };
        for (entry, request) in senseless(&parts, host)
            .into_iter()
            .flat_map(|entry| requests.iter().map(move |one| (entry, *one)))
        {
            let what = &format!("{options}: {entry:#x}, {request:?}");
            let files = with_entry(&parts, entry);
            let lane = open(&files);
            run(lane.read(9 * cluster, Buf::zeroed(512))).expect_err(what);
            carry_out(&lane, request, cluster).expect(what);
            assert_read(&lane, 9 * cluster, 0, what);
            run(lane.write(20 * cluster, Buf::from_bytes(&[7; 512]))).expect(what);
            run(lane.maintain()).expect(what);
            run(lane.close()).expect(what);
            let after = files.get(IMAGE).expect("kept");
            assert_eq!(after[host as usize..][..512], [0x22; 512], "{what}: a hole was punched");
            assert!(!is_marked(&files), "{what}");
            assert_eq!(findings(&files).len(), 1, "{what}: {:?}", findings(&files));
            assert!(
                findings(&files)[0].contains("refcount=1 references=0"),
                "{what}: {:?}",
                findings(&files)
            );

            let lane = open(&files);
            for (guest, byte) in [(8, 0x22), (9, 0), (10, 0x22), (20, 7), (2, 0x11)] {
                assert_read(&lane, guest * cluster, byte, what);
            }
            let found = run(lane.reclaim_leaks(&Idle)).expect(what);
            assert_eq!((found.verdict, found.freed), (Verdict::Complete, 1), "{what}");
            run(lane.close()).expect(what);
            assert_qemu_finds_nothing(&files);
        }
    }
}

/// In the same session, too, but not before the entry is durably gone.
#[test]
fn what_it_may_have_named_is_a_leak_then() {
    let parts = Parts::with_snapshot(SHAPES[1]);
    let files = with_entry(&parts, parts.data(9 * parts.cluster()) + 512);
    let lane = open(&files);
    let found = run(lane.reclaim_leaks(&Idle)).expect("searches");
    assert!(matches!(found.verdict, Verdict::Doubt(_)), "{found:?}");
    carry_out(&lane, Request::Discard, parts.cluster()).expect("discards");
    let found = run(lane.reclaim_leaks(&Idle)).expect("searches");
    assert_eq!((found.verdict, found.freed), (Verdict::Complete, 1));
    run(lane.close()).expect("closes");
    assert_qemu_finds_nothing(&files);
}

/// Content goes nowhere near such an entry, for QEMU either; nor does a change where the table may be none.
#[test]
fn what_may_be_no_table_is_not_written_to() {
    for options in SHAPES {
        let parts = Parts::with_snapshot(options);
        let (cluster, host) = (parts.cluster(), parts.data(9 * parts.cluster()));
        let refused = |what: &str, files: &MemFiles, write: bool| {
            let before = files.get(IMAGE).expect("there");
            let lane = open(files);
            let outcome = match write {
                true => run(lane.write(9 * cluster, Buf::from_bytes(&[7; 512]))),
                false => carry_out(&lane, Request::Discard, cluster),
            };
            let error = outcome.expect_err(what);
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{options}: {what}: {error}");
            run(lane.close()).expect(what);
            assert_eq!(is_marked(files), parts.header.version == Version::V3, "{options}: {what}");
            let (table, after) = (parts.l2_table(0) as usize, files.get(IMAGE).expect("kept"));
            let table = table..table + cluster as usize;
            assert!(after[table.clone()] == before[table], "{options}: {what}: the table was changed");
        };
        for entry in senseless(&parts, host) {
            refused(&format!("content over {entry:#x}"), &with_entry(&parts, entry), true);
        }
        let beyond = 1 << 50;
        for entry in [2, 1 << 57, beyond | 1 << 57, parts.header.l1_table.0 | 1 << 57] {
            refused(&format!("{entry:#x} names no data"), &with_entry(&parts, entry), false);
        }
        for other in [host | 1 << 57, beyond, parts.header.l1_table.0] {
            let mut damaged = parts.clone();
            damaged.set(parts.l2_entry(20 * cluster), other);
            let files = with_entry(&damaged, host | 1 << 57);
            refused(&format!("with {other:#x} beside it"), &files, false);
        }
    }
}

/// A table that a snapshot has too is copied, and the snapshot keeps the entry.
#[test]
fn a_snapshots_entry_stays_as_it_is() {
    let mut parts = Parts::shared(SHAPES[1], 1 << 20);
    let (cluster, at) = (parts.cluster(), parts.l2_entry(9 * parts.cluster()));
    let entry = parts.word(at) + 512;
    parts.set(at, entry);
    let files = MemFiles::default();
    files.put(IMAGE, parts.bytes.clone());
    let lane = open(&files);
    carry_out(&lane, Request::Discard, cluster).expect("discards");
    assert_read(&lane, 9 * cluster, 0, "the disk");
    run(lane.close()).expect("closes");
    let after = Parts::of(files.get(IMAGE).expect("kept"));
    assert_eq!(after.word(at), entry);
    assert_ne!(after.l2_table(0), parts.l2_table(0));
}

/// The log has the last word on an entry, which may be of data that was written after the discard.
#[test]
fn what_came_in_its_place_outlives_the_process() {
    let parts = Parts::with_snapshot(SHAPES[0]);
    let cluster = parts.cluster();
    for then_written in [false, true] {
        let files = with_entry(&parts, parts.data(9 * cluster) + 512);
        let words: Vec<_> = (0..MIN_REDO_BYTES / 8).map(|_| AtomicU64::new(0)).collect();
        let memory: RedoMemory = Arc::new(Words(words));
        let lane = open(&files);
        lane.image().keep_redo_log(RedoLog::create(Arc::clone(&memory)).expect("large enough"));
        carry_out(&lane, Request::Discard, cluster).expect("discards");
        if then_written {
            run(lane.write(9 * cluster, Buf::from_bytes(&[7; 512]))).expect("writes");
        }
        drop(lane);
        assert!(memory.as_ref().as_ref().iter().any(|word| word.load(Relaxed) != 0));
        let lane = open(&files);
        run(lane.replay(&RedoLog::open(memory).expect("sound"))).expect("replays");
        assert_read(&lane, 9 * cluster, if then_written { 7 } else { 0 }, "after the replay");
        run(lane.close()).expect("closes");
        assert!(!is_marked(&files));
    }
}

struct Words(Vec<AtomicU64>);

impl AsRef<[AtomicU64]> for Words {
    fn as_ref(&self) -> &[AtomicU64] {
        &self.0
    }
}

fn assert_qemu_finds_nothing(files: &MemFiles) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join(IMAGE);
    std::fs::write(&path, files.get(IMAGE).expect("kept")).expect("written");
    tool("qemu-img", &["check", "-q", "-f", "qcow2", path.to_str().expect("UTF-8")]);
}
