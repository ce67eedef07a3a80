//! R7: what was acknowledged is there when the process dies and the next one replays the redo log.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, Mirror, create,
    hooked::{Hook, Hooked, Operation},
    run,
};
use qcow2_engine::{
    CheckOptions, Error, ErrorKind, Image, Lane, MIN_REDO_BYTES, OpenOptions, RedoLog, RedoMemory, ZeroMode,
    check,
    io::{Buf, FileId, Io, mem::MemFiles},
};
use qcow2_format::{CreateOptions, header};
use std::{
    cell::Cell,
    collections::BTreeSet,
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
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

/// A server that had condemned its image was killed: nobody could replay its log, so all I/O hung, reads too,
/// and the image could not be repaired either.
#[test]
fn a_condemned_image_is_gone_on_with() {
    let (size, memory) = (8 << 20, memory());
    let mut killed = first_process(&empty(size, 16), &memory, size);
    killed.write(0, 1, 128 << 10);
    killed.flush();
    killed.write(1 << 20, 2, 128 << 10);
    let Mirror { files, lane, bytes } = killed;
    drop(lane);
    let mut marked = files.get(IMAGE).expect("there");
    marked[header::INCOMPATIBLE_OFFSET as usize + 7] |= header::CORRUPT as u8;
    files.put(IMAGE, marked);

    let open = |options| run(Image::open(&files, &files, Path::new(IMAGE), &options));
    let refused = open(OpenOptions::default()).err().expect("refused");
    assert!(refused.to_string().contains("corrupt"), "{refused}");
    let image = open(OpenOptions { serve_corrupt: true, ..OpenOptions::default() }).expect("opens");
    let next = Mirror::around(&files, &image, bytes);
    let log = RedoLog::open(Arc::clone(&memory)).expect("sound");
    assert!(run(next.lane.replay(&log)).expect("replays") > 0);
    image.keep_redo_log(RedoLog::create(Arc::clone(&memory)).expect("large enough"));
    next.verify();
    let write = run(next.lane.write(2 << 20, Buf::from_bytes(&[3; 512]))).expect_err("refused");
    assert!(matches!(write, Error::Condemned { .. }), "{write}");
    assert!(next.lane.direct_write(0, 512).is_none(), "nor by the short cut");
    next.verify();
    run(next.lane.flush()).expect("flushes");
    run(next.lane.close()).expect("closes");
    assert!(RedoLog::open(memory).unwrap().is_empty());
    assert!(open(OpenOptions::default()).is_err(), "still marked");
    let read_only = OpenOptions { read_only: true, ..OpenOptions::default() };
    let again = Mirror::around(&files, &open(read_only).expect("readers go on"), next.bytes);
    again.verify();
}

/// Words that note how long the log has been: what a process that is killed may leave.
struct Watched {
    words: Vec<AtomicU64>,
    tails: Mutex<BTreeSet<u64>>,
}

impl AsRef<[AtomicU64]> for Watched {
    fn as_ref(&self) -> &[AtomicU64] {
        self.tails.lock().expect("one thread").insert(self.words[2].load(Relaxed));
        &self.words
    }
}

/// The refcount table is moved, and new blocks count the clusters that it lies in. A process that was killed
/// between the records of the one and the others left a log that could not be replayed, with all that it had
/// acknowledged.
#[test]
fn r7_a_change_is_in_the_log_whole_or_not_at_all() {
    // The table has 64 entries for blocks that count 64 clusters each.
    let size = 3 << 20;
    let files = MemFiles::default();
    let options =
        CreateOptions { virtual_size: size, cluster_bits: 9, refcount_order: 6, ..CreateOptions::default() };
    create(&files, IMAGE, &options);
    let words = (0..MIN_REDO_BYTES / 8).map(|_| AtomicU64::new(0)).collect();
    let watched = Arc::new(Watched { words, tails: Mutex::default() });
    let memory: RedoMemory = watched.clone();
    let mut mirror = Mirror::open(&files, vec![0; size as usize]);
    mirror.lane.image().keep_redo_log(RedoLog::create(memory).expect("large enough"));
    let table = |files: &MemFiles| files.get(IMAGE).expect("kept")[48..56].to_vec();
    let old = table(&files);
    let step = 8 << 10;
    for at in (0..size).step_by(step) {
        run(mirror.lane.flush()).expect("flush");
        watched.tails.lock().expect("one thread").clear();
        let before = files.get(IMAGE).expect("kept");
        mirror.write(at, 7, step);
        let after = files.get(IMAGE).expect("kept");
        let tails = watched.tails.lock().expect("one thread").clone();
        for tail in tails {
            let left: Vec<_> = watched.words.iter().map(|word| AtomicU64::new(word.load(Relaxed))).collect();
            left[2].store(tail, Relaxed);
            let files = MemFiles::default();
            // Whatever was written since is payload, and space.
            files.put(IMAGE, after.clone());
            let next = Mirror::open(&files, vec![0; size as usize]);
            let log = RedoLog::open(Arc::new(Words(left))).expect("sound");
            run(next.lane.replay(&log)).unwrap_or_else(|error| panic!("{tail} records at {at}: {error}"));
        }
        run(mirror.lane.flush()).expect("flush");
        if table(&files) != old {
            assert!(before.len() < after.len());
            return;
        }
    }
    panic!("the table has not moved");
}

/// A copy of an image, and of the memory of a log.
fn copy(files: &MemFiles) -> MemFiles {
    let copy = MemFiles::default();
    copy.put(IMAGE, files.get(IMAGE).expect("kept"));
    copy
}

fn copy_of(memory: &RedoMemory) -> RedoMemory {
    let words = (**memory).as_ref().iter();
    Arc::new(Words(words.map(|word| AtomicU64::new(word.load(Relaxed))).collect()))
}

/// What lies below the host's cache gets what is written from now on.
struct Below(MemFiles);

impl Hook for Below {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        if let Operation::Write { at, buf } = operation {
            self.0.write(FileId(0), at, buf.clone()).await?;
        }
        Ok(())
    }
}

/// The disk had not taken what a cut had written, and the host's cache went on showing it. The next process
/// found it there already, and left it alone: with the cache it was gone, and all that was built on it damaged.
#[test]
fn a_replay_does_not_believe_that_what_it_reads_is_on_disk() {
    // New tables, new refcount blocks, a refcount table that moves; an L2 table maps 32 KiB.
    let size = 3 << 20;
    let files = MemFiles::default();
    let options =
        CreateOptions { virtual_size: size, cluster_bits: 9, refcount_order: 6, ..CreateOptions::default() };
    create(&files, IMAGE, &options);
    let memory = memory();
    let mut mirror = first_process(&files, &memory, size);
    let table = |files: &MemFiles| files.get(IMAGE).expect("kept")[48..56].to_vec();
    let old = table(&files);
    let step = 8 << 10;
    for at in (0..size).step_by(step) {
        mirror.write(at, 7, step);
        if at > 0 {
            mirror.discard(at - 1024, 1024);
        }
        let (below, left) = (copy(&files), copy_of(&memory));
        mirror.flush();
        let has_moved = table(&files) != old;
        if !has_moved && at % (128 << 10) != 0 {
            continue;
        }
        let host = Hooked::new(&copy(&files), Below(below.clone()));
        let lane = host.lane(&host.open(1 << 20));
        run(lane.replay(&RedoLog::open(left).expect("sound"))).expect("replays");
        Mirror::open(&below, mirror.bytes.clone()).verify();
        let report = run(check(&below, &below, Path::new(IMAGE), CheckOptions::default())).expect("checks");
        assert_eq!(report.found.corruptions, 0, "at {at}: {:?}", report.found.list);
        if has_moved {
            return;
        }
    }
    panic!("the table has not moved");
}

/// A disk on which barriers may fail.
#[derive(Default)]
struct Barriers {
    fail: Cell<bool>,
    issued: Cell<usize>,
}

impl Hook for Barriers {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        if let Operation::Sync(_) = operation {
            self.issued.set(self.issued.get() + 1);
            if self.fail.get() {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
        }
        Ok(())
    }
}

/// An fdatasync failed, and the server was killed. The kernel tells of that once: the next one's flushes
/// succeeded, over what had never reached the disk.
#[test]
fn the_next_process_knows_of_a_failed_fdatasync() {
    let memory = memory();
    let files = empty(8 << 20, 16);
    let host = Hooked::new(&files, Barriers::default());
    let page = |byte| Buf::from_bytes(&[byte; 4096]);
    let log = || RedoLog::open(Arc::clone(&memory)).expect("sound");
    {
        let image = host.open(1 << 20);
        image.keep_redo_log(RedoLog::create(Arc::clone(&memory)).expect("large enough"));
        let lane = host.lane(&image);
        run(lane.write(0, page(1))).expect("writes");
        run(lane.flush()).expect("flushes");
        run(lane.write(1 << 20, page(2))).expect("writes");
        assert!(!log().has_failed());
        host.hook.fail.set(true);
        run(lane.flush()).expect_err("its fdatasync fails");
    }
    host.hook.fail.set(false);
    let issued = host.hook.issued.get();
    for _ in 0..2 {
        assert!(log().has_failed() && !log().is_at_barrier());
        let image = host.open(1 << 20);
        let lane = host.lane(&image);
        let poisoned = |outcome: qcow2_engine::Result<()>| {
            assert_eq!(outcome.map_err(|error| error.kind()), Err(ErrorKind::Poisoned));
        };
        poisoned(run(lane.replay(&log())).map(drop));
        image.keep_redo_log(log());
        poisoned(run(lane.flush()));
        poisoned(run(lane.write(0, page(3))));
        poisoned(run(lane.discard(0, 65536)));
        poisoned(run(lane.close()));
        assert!(lane.direct_write(0, 4096).is_none(), "the short cut accepts nothing either");
        let read = Buf::zeroed(4096);
        run(lane.read(0, read.clone())).expect("reads go on");
        assert_eq!(read.to_vec(), [1; 4096]);
    }
    assert_eq!(host.hook.issued.get(), issued, "no barrier is tried again");
    // Opened anew it is as after a loss of power.
    let image = host.open(1 << 20);
    image.keep_redo_log(RedoLog::create(Arc::clone(&memory)).expect("large enough"));
    let lane = host.lane(&image);
    run(lane.write(0, page(4))).expect("writes");
    run(lane.flush()).expect("flushes");
    assert!(!log().has_failed());
}

/// What the dead process had written is lost as well when the barrier fails that is to make its replay durable.
#[test]
fn a_barrier_that_fails_under_a_replay_is_known_to_the_next_process() {
    let memory = memory();
    let mut mirror = first_process(&empty(8 << 20, 16), &memory, 8 << 20);
    mirror.write(0, 1, 4096);
    let host = Hooked::new(&mirror.files, Barriers::default());
    host.hook.fail.set(true);
    let log = || RedoLog::open(Arc::clone(&memory)).expect("sound");
    let replay = || run(host.lane(&host.open(1 << 20)).replay(&log()));
    let failed = replay().expect_err("its fdatasync fails").kind();
    assert_eq!(failed, ErrorKind::Io(Some(libc::EIO)));
    host.hook.fail.set(false);
    assert_eq!(replay().expect_err("refused").kind(), ErrorKind::Poisoned);
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
