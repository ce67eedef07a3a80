//! R7: what was acknowledged is there when the process dies and the next one replays the redo log.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{IMAGE, Mirror, create, run};
use qcow2_engine::{
    Error, Image, Lane, MIN_REDO_BYTES, OpenOptions, RedoLog, RedoMemory, ZeroMode,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::CreateOptions;
use std::{
    path::Path,
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
