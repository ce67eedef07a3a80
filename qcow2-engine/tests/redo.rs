//! R7: what was acknowledged is there when the process dies and the next one replays the redo log.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, Mirror, create,
    hooked::{Hook, Hooked, Operation},
    run,
};
use qcow2_engine::{
    CheckOptions, Error, ErrorKind, Image, Lane, MIN_REDO_BYTES, OpenOptions, Pace, RedoLog, RedoMemory,
    Verdict, ZeroMode, check,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::CreateOptions;
use std::{
    future::{Future, ready},
    io,
    path::Path,
    pin::Pin,
    sync::{Arc, atomic::AtomicU64},
};

struct Words(Vec<AtomicU64>);

impl AsRef<[AtomicU64]> for Words {
    fn as_ref(&self) -> &[AtomicU64] {
        &self.0
    }
}

fn memory() -> RedoMemory {
    Arc::new(Words((0..MIN_REDO_BYTES / 8).map(|_| AtomicU64::new(0)).collect()))
}

fn empty(size: u64, cluster_bits: u32) -> MemFiles {
    let files = MemFiles::default();
    create(&files, IMAGE, &CreateOptions { virtual_size: size, cluster_bits, ..CreateOptions::default() });
    files
}

/// A process that keeps a log.
fn first_process(files: &MemFiles, memory: &RedoMemory, size: u64) -> Mirror {
    let mirror = Mirror::open(files, vec![0; size as usize]);
    mirror.lane.image().keep_redo_log(RedoLog::create(Arc::clone(memory)).expect("large enough"));
    mirror
}

/// Kills the process, and has the next one replay its log.
fn next_process(killed: Mirror, memory: &RedoMemory) -> (Mirror, usize) {
    let Mirror { files, lane, bytes } = killed;
    drop(lane);
    let next = Mirror::open(&files, bytes);
    let log = RedoLog::open(Arc::clone(memory)).expect("sound");
    let replayed = run(next.lane.replay(&log)).expect("replays");
    (next, replayed)
}

#[test]
fn r7_what_was_acknowledged_survives_the_process() {
    let (size, memory) = (8 << 20, memory());
    let mut mirror = first_process(&empty(size, 16), &memory, size);
    mirror.write(0, 1, 4096);
    mirror.write(1 << 20, 2, 300 << 10);
    mirror.flush();
    mirror.write(0, 3, 512);
    mirror.write(5 << 20, 4, 128 << 10);
    mirror.discard(1 << 20, 128 << 10);
    mirror.write_zeroes(5 << 20, 64 << 10, ZeroMode::Keep);
    let (next, replayed) = next_process(mirror, &memory);
    assert!(replayed >= 5, "only what the flush has not covered, but all of that: {replayed}");
    next.verify();
    // Once more: a replay that was itself cut short is done again.
    let (again, _) = next_process(next, &memory);
    again.verify();
}

#[test]
fn a_flush_empties_the_log() {
    let (size, memory) = (8 << 20, memory());
    let mut mirror = first_process(&empty(size, 16), &memory, size);
    mirror.write(0, 1, 1 << 20);
    assert!(!RedoLog::open(Arc::clone(&memory)).unwrap().is_empty());
    mirror.flush();
    assert!(RedoLog::open(Arc::clone(&memory)).unwrap().is_empty());
    let (next, replayed) = next_process(mirror, &memory);
    assert_eq!(replayed, 0);
    next.verify();
}

#[test]
fn a_full_log_makes_room_by_writing_back() {
    // 512-byte clusters: several times as many mappings, tables and refcount blocks as the log holds.
    let (size, memory) = (2 << 20, memory());
    let mut mirror = first_process(&empty(size, 9), &memory, size);
    for at in (0..size).step_by(16 << 10) {
        mirror.write(at, (at >> 14) as u8, 15 << 10);
    }
    let (next, replayed) = next_process(mirror, &memory);
    assert!(replayed > 0 && replayed <= 1024, "{replayed}");
    next.verify();
}

#[test]
fn the_log_of_another_image_is_refused() {
    let memory = memory();
    let mut large = first_process(&empty(64 << 20, 9), &memory, 64 << 20);
    large.write(60 << 20, 1, 4096);
    let files = empty(1 << 20, 9);
    let image = run(Image::open(&files, &files, Path::new(IMAGE), &OpenOptions::default())).unwrap();
    let lane = Lane::new(&image, files.clone(), 1);
    let refused = run(lane.replay(&RedoLog::open(memory).unwrap())).unwrap_err();
    assert!(matches!(refused, Error::Redo { .. }), "{refused}");
    let buf = Buf::zeroed(512);
    run(lane.read(0, buf.clone())).unwrap();
    assert_eq!(buf.to_vec(), [0; 512]);
}

/// A host without room beyond this byte for what is allocated ahead.
struct Full(u64);

impl Hook for Full {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::Allocate { end } if end > self.0 => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            _ => Ok(()),
        }
    }
}

/// Goes on at once.
struct Haste;

impl Pace for Haste {
    fn rest(&self) -> Pin<Box<dyn Future<Output = bool> + '_>> {
        Box::pin(ready(true))
    }
}

/// A lane needed a new extent: a refcount block was made for it, behind what lanes before it had
/// counted, and then the server was killed before the file had been extended over any of that (here because the
/// host had no room). The log has the block; that what lies before it was counted is not known any more. The
/// next server wrote the block, a hole before it, and knew neither of its place when it looked for
/// the last cluster in use on closing, so that it cut the block off, nor that the file reached so far when it
/// searched for leaks, so that it gave the search up.
#[test]
fn a_refcount_block_behind_what_the_dead_process_had_counted_stays() {
    const CLUSTER: u64 = 512;
    /// Clusters that a block counts, with 64 bits each.
    const PER_BLOCK: u64 = 64;
    /// Clusters that a lane reserves at a time.
    const EXTENT: u64 = 8;
    let (files, memory) = (MemFiles::default(), memory());
    let size = 64 * CLUSTER;
    let options =
        CreateOptions { virtual_size: size, cluster_bits: 9, refcount_order: 6, ..CreateOptions::default() };
    create(&files, IMAGE, &options);
    let killed = Hooked::new(&files, Full(4 * EXTENT * CLUSTER));
    let image = killed.open(EXTENT * CLUSTER);
    image.keep_redo_log(RedoLog::create(Arc::clone(&memory)).expect("large enough"));
    let mut last = Ok(());
    for number in 0..=PER_BLOCK / EXTENT {
        last = run(killed.lane(&image).write(number * CLUSTER, Buf::from_bytes(&[5; 512])));
    }
    let refused = last.map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::NoSpace), "the first ones had room");

    let next = Hooked::new(&files, Full(u64::MAX));
    let image = next.open(EXTENT * CLUSTER);
    let lane = next.lane(&image);
    run(lane.replay(&RedoLog::open(memory).expect("sound"))).expect("replays");
    let len = |files: &MemFiles| files.get(IMAGE).expect("kept").len() as u64;
    assert!(len(&files) > PER_BLOCK * CLUSTER, "the block lies behind what was counted");
    let reclaimed = run(lane.reclaim_leaks(&Haste)).expect("searches");
    assert_eq!(reclaimed.verdict, Verdict::Complete);
    run(lane.write(0, Buf::from_bytes(&[6; 40 * 512]))).expect("takes new extents");
    run(lane.discard(CLUSTER, size - CLUSTER)).expect("lets go of them");
    run(lane.close()).expect("closes");
    let report = run(check(&files, &files, Path::new(IMAGE), CheckOptions::default())).expect("checks");
    let found: Vec<_> = report.found.list.iter().map(ToString::to_string).collect();
    assert_eq!(found, Vec::<String>::new());
}
