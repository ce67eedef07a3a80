//! Hosts without room, or with room up to some byte: what needs more fails, and what there is can be used.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, create, findings,
    hooked::{Hook, Hooked, Operation},
    image_len, run,
};
use futures_util::future::{join, join_all};
use qcow2_engine::{
    Error, ErrorKind, Lane, OpenOptions, Preallocation,
    io::{Buf, FileId, Io, mem::MemFiles},
};
use qcow2_format::CreateOptions;
use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    path::Path,
    task::Poll,
};

/// A host that cannot punch holes because it is full.
struct NoHoles;

impl Hook for NoHoles {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::PunchHole => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            _ => Ok(()),
        }
    }
}

/// On a full file system a hole may need room itself. What the guest discards can be used again all the same:
/// otherwise nothing that it does could make room.
#[test]
fn what_is_discarded_is_free_though_no_hole_can_be_punched() {
    const CLUSTER: u64 = 4096;
    let host = Hooked::new(&MemFiles::default(), NoHoles);
    let options = CreateOptions { virtual_size: 256 * CLUSTER, cluster_bits: 12, ..CreateOptions::default() };
    create(&host.files, IMAGE, &options);
    let image = host.open(4 * CLUSTER);
    let lane = host.lane(&image);
    run(lane.write(0, Buf::from_bytes(&[7; 32 * CLUSTER as usize]))).expect("write");
    let len = image_len(&host.files);
    for round in 1..8 {
        run(lane.discard(0, 256 * CLUSTER)).expect("discard");
        run(lane.flush()).expect("flush");
        run(lane.maintain()).expect("gives back");
        run(lane.write(round * 32 * CLUSTER, Buf::from_bytes(&[7; 31 * CLUSTER as usize + 512])))
            .expect("write");
        let buf = Buf::zeroed(CLUSTER as usize - 512);
        run(lane.read((round * 32 + 31) * CLUSTER + 512, buf.clone())).expect("read");
        assert!(buf.to_vec().iter().all(|&byte| byte == 0), "what the cluster held before shows");
    }
    assert!(image_len(&host.files) <= len + 8 * CLUSTER, "the freed clusters are used again");
    run(lane.close()).expect("close");
    assert!(findings(&host.files).is_empty(), "{:?}", findings(&host.files));
}

/// A host that has room up to some byte of the file, and not one block more.
struct Full {
    room: Cell<u64>,
    /// With which it says so.
    errno: i32,
}

impl Full {
    fn with_room(bytes: u64) -> Self {
        Self { room: Cell::new(bytes), errno: libc::ENOSPC }
    }
}

impl Hook for Full {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        let end = match operation {
            Operation::Allocate { end, .. } => end,
            Operation::Write { at, buf } => at + buf.len() as u64,
            _ => 0,
        };
        if end > self.room.get() { Err(io::Error::from_raw_os_error(self.errno)) } else { Ok(()) }
    }
}

/// A write needs a new extent, with a refcount block for it or a longer refcount table, and the host has no
/// room. The write fails, and nothing else: the block was made all the same, behind the end of the file, so
/// that every flush failed with it until there was room; and with room for the block, but not for what it
/// counts, closing cut it off again.
#[test]
fn a_full_host_fails_writes_that_allocate_and_no_flush() {
    const CLUSTER: u64 = 512;
    const STEP: u64 = 16 * CLUSTER;
    // The table has 64 entries for blocks that count 64 clusters each, with 64 bits.
    const TABLE: u64 = 64 * 64 * CLUSTER;
    const SIZE: u64 = 4608 * CLUSTER;
    let (blocks, table) = (0..3 * 64, (TABLE / CLUSTER - 70..TABLE / CLUSTER + 130).step_by(9));
    for room in blocks.chain(table).map(|clusters| clusters * CLUSTER) {
        let host = Hooked::new(&MemFiles::default(), Full::with_room(u64::MAX));
        let options = CreateOptions {
            virtual_size: SIZE,
            cluster_bits: 9,
            refcount_order: 6,
            ..CreateOptions::default()
        };
        create(&host.files, IMAGE, &options);
        let image = host.open(STEP);
        let lane = host.lane(&image);
        host.hook.room.set(room.max(image_len(&host.files)));
        let mut written = 0;
        let write = |at: u64| lane.write(at, Buf::from_bytes(&[5; STEP as usize]));
        let refused = loop {
            match run(write(written)) {
                Ok(()) => written += STEP,
                Err(error) => break error,
            }
        };
        assert_eq!(refused.kind(), ErrorKind::NoSpace, "room for {room} bytes: {refused}");
        run(lane.flush()).unwrap_or_else(|error| panic!("room for {room} bytes: {error}"));
        run(lane.maintain()).unwrap_or_else(|error| panic!("room for {room} bytes: {error}"));
        host.hook.room.set(u64::MAX);
        run(write(written)).expect("there is room now");
        run(lane.close()).expect("closes");
        assert_eq!(findings(&host.files), Vec::<String>::new(), "room for {room} bytes");
    }
}

/// What there is room for, in clusters of 512 bytes: a lane's extent of 16 does not fit, and what was cut off
/// from it had to wait as freed clusters do, while the next write looked for room behind it.
fn fills_up(host: &Hooked<impl Hook>, lane: &Lane<Hooked<impl Hook>>, room: u64) {
    let mut written = 0;
    let refused = loop {
        match run(lane.write(written, Buf::from_bytes(&[5; 512]))) {
            Ok(()) => written += 512,
            Err(error) => break error,
        }
    };
    assert_eq!(refused.kind(), ErrorKind::NoSpace, "{refused}");
    // Header, refcount table, refcount block, L1 and L2 table; the rest is the guest's.
    assert_eq!((image_len(&host.files), written / 512 + 5), (room, room / 512));
    run(lane.flush()).expect("flush");
    // No later than the next request needs it: it was refused what the next flush would have made room for.
    run(lane.discard(0, 1024)).expect("discard");
    run(lane.write(written, Buf::from_bytes(&[5; 512])))
        .expect("there is room where the discarded clusters were");
}

/// Each queue has an extent of its own, and a full host one more cluster for none: what the others had
/// counted and not used was not to be had.
#[test]
fn a_full_host_is_filled_whichever_queue_has_the_room() {
    let host = Hooked::new(&MemFiles::default(), Full::with_room(u64::MAX));
    let options = CreateOptions { virtual_size: 64 * 512, cluster_bits: 9, ..CreateOptions::default() };
    create(&host.files, IMAGE, &options);
    let image = host.open(16 * 512);
    let (lane, other) = (host.lane(&image), host.lane(&image));
    run(other.write(0, Buf::from_bytes(&[1; 512]))).expect("an extent with room for 16");
    host.hook.room.set(image_len(&host.files));
    // The L2 table has one of them.
    for cluster in 1..15 {
        run(lane.write(cluster * 512, Buf::from_bytes(&[cluster as u8; 512]))).expect("the other lane's");
    }
    let refused = run(lane.write(15 * 512, Buf::from_bytes(&[15; 512]))).expect_err("nobody has any");
    assert_eq!(refused.kind(), ErrorKind::NoSpace, "{refused}");
    run(other.close()).expect("close");
    assert_eq!(findings(&host.files), Vec::<String>::new());
}

/// A full host that takes its time to allocate, and for the next read.
struct FullAndSlow {
    full: Full,
    polls_to_read: Cell<u32>,
}

impl Hook for FullAndSlow {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        let mut polls = match operation {
            Operation::Allocate { .. } => 4,
            Operation::Read { .. } => self.polls_to_read.take(),
            _ => 0,
        };
        poll_fn(|_| {
            polls = polls.saturating_sub(1);
            if polls == 0 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        self.full.before(operation).await
    }
}

/// Such a host, and two queues of an image whose first extent of 16 is in use: for the L2 table and the first 15
/// clusters. There is room for some more.
fn full_and_slow(room: u64) -> (Hooked<FullAndSlow>, [Lane<Hooked<FullAndSlow>>; 2]) {
    let slow = FullAndSlow { full: Full::with_room(u64::MAX), polls_to_read: Cell::new(0) };
    let host = Hooked::new(&MemFiles::default(), slow);
    let options = CreateOptions { virtual_size: 64 * 512, cluster_bits: 9, ..CreateOptions::default() };
    create(&host.files, IMAGE, &options);
    let image = host.open(16 * 512);
    let lanes = [host.lane(&image), host.lane(&image)];
    run(lanes[0].write(0, Buf::from_bytes(&[1; 15 * 512]))).expect("write");
    host.hook.full.room.set(image_len(&host.files) + room * 512);
    (host, lanes)
}

async fn write_cluster(lane: &Lane<Hooked<FullAndSlow>>, cluster: u64) -> Result<(), Error> {
    lane.write(cluster * 512, Buf::from_bytes(&[2; 512])).await
}

/// While the file was being extended for one queue another one claimed what comes next, and could not have it:
/// the file had to reach over all that the first one had claimed, and gave up for want of room.
#[test]
fn a_full_host_is_filled_by_queues_that_look_for_room_at_once() {
    for room in 0..20 {
        let (host, [lane, other]) = full_and_slow(room);
        let mut written = 0;
        loop {
            let left = room - written;
            let (one, two) =
                run(join(write_cluster(&lane, 15 + written), write_cluster(&other, 16 + written)));
            let done = u64::from(one.is_ok()) + u64::from(two.is_ok());
            assert_eq!(done, left.min(2), "{left} of {room} left: {one:?}, {two:?}");
            if done < 2 {
                break;
            }
            written += done;
        }
        assert_eq!(image_len(&host.files), host.hook.full.room.get(), "{room}");
        run(lane.close()).expect("close");
        assert_eq!(findings(&host.files), Vec::<String>::new(), "{room}");
    }
}

/// A cluster was discarded and flushed, and a read that may still look at it was slow: the next write was refused
/// at once. One that hangs is not waited for.
#[test]
fn what_a_slow_request_holds_back_is_waited_for() {
    for (polls, ends_in_time) in [(3, true), (50, true), (1000, false)] {
        let (host, [lane, other]) = full_and_slow(0);
        host.hook.polls_to_read.set(polls);
        let is_read = Cell::new(false);
        let read = async {
            other.read(0, Buf::zeroed(512)).await.expect("read");
            is_read.set(true);
        };
        let write = async {
            lane.discard(0, 2 * 512).await.expect("discard");
            lane.flush().await.expect("flush");
            let written = write_cluster(&lane, 20).await;
            assert_eq!((written.is_ok(), is_read.get()), (ends_in_time, ends_in_time), "{written:?}");
        };
        run(join(read, write));
        run(write_cluster(&lane, 21)).expect("the read is over");
        run(lane.close()).expect("close");
        assert_eq!(findings(&host.files), Vec::<String>::new(), "{polls}");
    }
}

/// Requests that found no room while clusters were being discarded kept each other from those.
#[test]
fn requests_that_wait_for_room_do_not_wait_for_each_other() {
    let (host, lanes) = full_and_slow(0);
    let writes = (20..24).map(|cluster| write_cluster(&lanes[cluster as usize % 2], cluster));
    let (written, discarded) = run(join(join_all(writes), lanes[0].discard(0, 4 * 512)));
    discarded.expect("discard");
    assert!(
        written.iter().all(Result::is_ok),
        "there is room where the discarded clusters were: {written:?}"
    );
    run(lanes[0].close()).expect("close");
    assert_eq!(findings(&host.files), Vec::<String>::new());
}

/// A host whose file grows by a half of what is asked for, as ext4's does when it has no room for the rest.
struct Halfway {
    files: MemFiles,
    is_full: Cell<bool>,
}

impl Hook for Halfway {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::Allocate { at, end } if self.is_full.get() => {
                self.files.allocate(FileId(0), at, (end - at) / 2).await?;
                Err(io::Error::from_raw_os_error(libc::ENOSPC))
            }
            _ => Ok(()),
        }
    }
}

/// What a failed allocation had added stayed for good, on a host that is full: no count, and so no check,
/// tells of it.
#[test]
fn what_a_failed_allocation_has_added_is_cut_off() {
    let files = MemFiles::default();
    let host = Hooked::new(&files, Halfway { files: files.clone(), is_full: Cell::new(false) });
    let options = CreateOptions { virtual_size: 64 * 512, cluster_bits: 9, ..CreateOptions::default() };
    create(&host.files, IMAGE, &options);
    let image = host.open(4 * 512);
    let lane = host.lane(&image);
    // The extent is used up, with the L2 table: the last cluster of the file stays.
    run(lane.write(0, Buf::from_bytes(&[1; 3 * 512]))).expect("write");
    let len = image_len(&host.files);
    host.hook.is_full.set(true);
    run(lane.write(3 * 512, Buf::from_bytes(&[2; 4 * 512]))).expect_err("no room");
    assert!(image_len(&host.files) > len, "it has grown all the same");
    run(lane.close()).expect("close");
    assert_eq!(image_len(&host.files), len);
}

/// The file ended in the middle of its last cluster, as one may that QEMU has not made, and became longer when
/// the guest wrote to the rest of it; a later allocation that failed had the close cut that off again.
#[test]
fn what_was_written_to_the_rest_of_the_last_cluster_is_not_cut_off() {
    const CLUSTER: u64 = 4096;
    let files = MemFiles::default();
    let host = Hooked::new(&files, Halfway { files: files.clone(), is_full: Cell::new(false) });
    let options = CreateOptions { virtual_size: 64 * CLUSTER, cluster_bits: 12, ..CreateOptions::default() };
    create(&files, IMAGE, &options);
    let lane = host.lane(&host.open(CLUSTER));
    run(lane.write(0, Buf::from_bytes(&[1; CLUSTER as usize]))).expect("write");
    run(lane.close()).expect("close");
    let mut bytes = files.get(IMAGE).expect("made");
    assert_eq!(bytes[bytes.len() - CLUSTER as usize], 1, "the guest's cluster is the last one");
    bytes.truncate(bytes.len() - 3072);
    files.put(IMAGE, bytes);

    let lane = host.lane(&host.open(CLUSTER));
    run(lane.write(CLUSTER - 512, Buf::from_bytes(&[2; 512]))).expect("write in place");
    run(lane.flush()).expect("flush");
    host.hook.is_full.set(true);
    run(lane.write(CLUSTER, Buf::from_bytes(&[3; CLUSTER as usize]))).expect_err("no room");
    run(lane.close()).expect("close");
    let buf = Buf::zeroed(512);
    run(host.lane(&host.open(CLUSTER)).read(CLUSTER - 512, buf.clone())).expect("read");
    assert_eq!(buf.to_vec(), [2; 512]);
    assert!(findings(&files).is_empty(), "{:?}", findings(&files));
}

/// A file may also be as long as its file system lets it be: that was an I/O error for the guest, and an extent
/// too early.
#[test]
fn a_full_host_is_filled_to_the_last_cluster() {
    for (clusters, errno) in (30..50).flat_map(|clusters| [(clusters, libc::ENOSPC), (clusters, libc::EFBIG)])
    {
        let room = clusters * 512;
        let host = Hooked::new(&MemFiles::default(), Full { errno, ..Full::with_room(room) });
        create(
            &host.files,
            IMAGE,
            &CreateOptions { virtual_size: 64 * 512, cluster_bits: 9, ..CreateOptions::default() },
        );
        let image = host.open(16 * 512);
        fills_up(&host, &host.lane(&image), room);
    }
}

/// A block device as the kernel has it: it cannot allocate, and what begins behind its end is full.
struct Device {
    capacity: u64,
}

impl Hook for Device {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::Allocate { .. } => Err(io::ErrorKind::Unsupported.into()),
            Operation::Write { at, buf } if at + buf.len() as u64 > self.capacity => {
                Err(io::Error::from_raw_os_error(libc::ENOSPC))
            }
            Operation::SetLen => Err(io::ErrorKind::InvalidInput.into()),
            _ => Ok(()),
        }
    }
}

#[test]
fn an_image_on_a_block_device_can_use_all_of_it() {
    for clusters in 30..50 {
        let host = Hooked::new(&MemFiles::default(), Device { capacity: clusters * 512 });
        create(
            &host.files,
            IMAGE,
            &CreateOptions { virtual_size: 64 * 512, cluster_bits: 9, ..CreateOptions::default() },
        );
        let mut bytes = host.files.get(IMAGE).expect("kept");
        bytes.resize(clusters as usize * 512, 0xee);
        host.files.put(IMAGE, bytes);
        let image = host.open(16 * 512);
        fills_up(&host, &host.lane(&image), clusters * 512);
    }
}

/// On a block device, which cannot be truncated, an image whose preallocation had failed stayed behind.
#[test]
fn a_device_without_room_for_a_preallocated_image_holds_none_afterwards() {
    let capacity = 1 << 20;
    let host = Hooked::new(&MemFiles::default(), Device { capacity });
    host.files.put(IMAGE, vec![0xee; capacity as usize]);
    let options = CreateOptions { virtual_size: 4 << 20, ..CreateOptions::default() };
    let made =
        qcow2_engine::create::create(&host, &host.files, Path::new(IMAGE), &options, Preallocation::Full);
    assert_eq!(run(made).map_err(|error| error.kind()), Err(ErrorKind::NoSpace));
    let bytes = host.files.get(IMAGE).expect("kept");
    assert!(qcow2_format::Header::decode(&bytes, capacity).is_err(), "an image is left");
}

/// The longer L1 table was to lie behind the end of the file, so that an image that fills a block device
/// could not be grown though nearly all of it was free.
#[test]
fn the_longer_table_lies_inside_a_file_that_cannot_grow() {
    const CLUSTER: u64 = 64 << 10;
    /// Its L1 table has 10 clusters.
    const NEW_SIZE: u64 = 40 << 40;
    // What there is of the image without data, and so much more.
    for (spare, fits) in [(10, true), (60, true), (9, false)] {
        let options = CreateOptions { virtual_size: 1 << 20, ..CreateOptions::default() };
        let files = MemFiles::default();
        create(&files, IMAGE, &options);
        let mut bytes = files.get(IMAGE).expect("made");
        let size = (bytes.len() as u64).next_multiple_of(CLUSTER) + spare * CLUSTER;
        bytes.resize(size as usize, 0xee);
        files.put(IMAGE, bytes);
        let host = Hooked::new(&files, Device { capacity: size });
        let before = files.get(IMAGE);
        let outcome = run(qcow2_engine::grow(
            host.clone(),
            &files,
            Path::new(IMAGE),
            &OpenOptions::default(),
            NEW_SIZE,
        ));
        assert_eq!(
            outcome.as_ref().map_err(qcow2_engine::Error::kind).err(),
            (!fits).then_some(ErrorKind::NoSpace)
        );
        assert!(fits || files.get(IMAGE) == before, "it was changed");
        assert_eq!(host.open(CLUSTER).virtual_size(), if fits { NEW_SIZE } else { 1 << 20 });
        assert_eq!(findings(&files), Vec::<String>::new());
        assert_eq!(image_len(&files), size);
    }
}

/// A host with room for a number of sectors more than the image has, which came with a hole at its end.
struct Sparse {
    has_space: RefCell<Vec<bool>>,
    left: Cell<usize>,
}

impl Sparse {
    fn take(&self, at: u64, end: u64) -> io::Result<()> {
        let mut has_space = self.has_space.borrow_mut();
        let sectors = (at / 512) as usize..(end / 512) as usize;
        if has_space.len() < sectors.end {
            has_space.resize(sectors.end, false);
        }
        let needed = has_space[sectors.clone()].iter().filter(|&&has_space| !has_space).count();
        let left = self.left.get().checked_sub(needed);
        self.left.set(left.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?);
        has_space[sectors].fill(true);
        Ok(())
    }
}

impl Hook for Sparse {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::Allocate { at, end } => self.take(at, end),
            Operation::Write { at, buf } => self.take(at, at + buf.len() as u64),
            _ => Ok(()),
        }
    }
}

/// A file can be longer than what is counted of it, and have a hole there. A new refcount block was put into
/// the hole, inside the file as it should be, and every flush failed with it where the host was full.
#[test]
fn a_refcount_block_in_a_hole_fails_no_flush() {
    const CLUSTER: u64 = 512;
    let options = CreateOptions {
        virtual_size: 512 * CLUSTER,
        cluster_bits: 9,
        refcount_order: 6,
        ..CreateOptions::default()
    };
    for room in 0..200 {
        let files = MemFiles::default();
        create(&files, IMAGE, &options);
        let mut bytes = files.get(IMAGE).expect("made");
        let has_space = RefCell::new(vec![true; bytes.len() / 512]);
        bytes.resize(400 * 512, 0);
        files.put(IMAGE, bytes);
        let host = Hooked::new(&files, Sparse { has_space, left: Cell::new(room) });
        let image = host.open(4 * CLUSTER);
        let lane = host.lane(&image);
        let mut written = 0;
        let write = |at: u64| lane.write(at, Buf::from_bytes(&[5; CLUSTER as usize]));
        let refused = loop {
            match run(write(written)) {
                Ok(()) => written += CLUSTER,
                Err(error) => break error,
            }
        };
        assert_eq!(refused.kind(), ErrorKind::NoSpace, "room for {room}: {refused}");
        run(lane.flush()).unwrap_or_else(|error| panic!("room for {room}: {error}"));
        run(lane.maintain()).unwrap_or_else(|error| panic!("room for {room}: {error}"));
        host.hook.left.set(usize::MAX);
        run(write(written)).expect("there is room now");
        run(lane.close()).expect("closes");
        assert_eq!(findings(&host.files), Vec::<String>::new(), "room for {room}");
    }
}
