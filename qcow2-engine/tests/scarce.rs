//! Hosts that can do less: no space ahead, no truncation, no room.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, create,
    hooked::{Hook, Hooked, Operation},
    run,
};
use qcow2_engine::{
    CheckOptions, ErrorKind, Image, Lane, OpenOptions, Preallocation, ZeroMode, check,
    io::{Access, Buf, FileId, Io, Storage, mem::MemFiles},
};
use qcow2_format::{Backing, CreateOptions, Version, word};
use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    ops::Range,
    path::Path,
    task::{Context, Poll, Waker},
};

/// What becomes of an allocation of space.
#[derive(Clone, Copy)]
enum Allocation {
    Possible,
    /// Not on this file system.
    Unsupported,
}

/// Such a host.
struct Host {
    allocation: Allocation,
    truncates: bool,
}

impl Hook for Host {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        match (operation, self.allocation) {
            (Operation::Allocate { .. }, Allocation::Unsupported) => Err(io::ErrorKind::Unsupported.into()),
            (Operation::SetLen, _) if !self.truncates => Err(io::ErrorKind::InvalidInput.into()),
            _ => Ok(()),
        }
    }
}

fn findings(files: &MemFiles) -> Vec<String> {
    let report = run(check(files, files, Path::new(IMAGE), CheckOptions::default())).expect("checks");
    report.found.list.iter().map(ToString::to_string).collect()
}

/// Where fallocate is not possible a file was extended by a new length; but a cut had written a refcount
/// block behind the end meanwhile, and lost it. (Simulator, case 304 of seed 77.)
#[test]
fn a_file_without_fallocate_is_never_made_shorter_by_extending_it() {
    const CLUSTER: u64 = 4096;
    let host =
        Hooked::new(&MemFiles::default(), Host { allocation: Allocation::Unsupported, truncates: true });
    let options = CreateOptions { virtual_size: 64 * CLUSTER, cluster_bits: 12, ..CreateOptions::default() };
    create(&host.files, IMAGE, &options);
    let image = host.open(4 * CLUSTER);
    let behind = image_len(&host.files) + 100 * CLUSTER;
    run(host.files.write(FileId(0), behind, Buf::from_bytes(&[7; 512]))).expect("writes behind the end");
    run(host.lane(&image).write(0, Buf::from_bytes(&[1; 512]))).expect("a write that takes an extent");
    let bytes = host.files.get(IMAGE).expect("kept");
    assert_eq!(bytes.get(behind as usize..), Some(&[7; 512][..]), "what lay behind the end is lost");
}

fn image_len(files: &MemFiles) -> u64 {
    files.len(FileId(0)).expect("a file")
}

/// A block device, or a file that could not be truncated, is made an image with preallocation: what the
/// guest then read was what the device had held before.
#[test]
fn preallocation_over_old_content_that_stays_reads_as_zeros() {
    const SIZE: usize = 1 << 20;
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc] {
        let host =
            Hooked::new(&MemFiles::default(), Host { allocation: Allocation::Possible, truncates: false });
        // More than the one extent that is taken.
        host.files.put(IMAGE, vec![0xee; 20 * SIZE]);
        let options =
            CreateOptions { virtual_size: SIZE as u64, cluster_bits: 12, ..CreateOptions::default() };
        let made =
            qcow2_engine::create::create(&host, &host.files, Path::new(IMAGE), &options, preallocation);
        run(made).expect("makes an image");
        let image = host.open(1 << 20);
        let buf = Buf::zeroed(SIZE);
        run(host.lane(&image).read(0, buf.clone())).expect("reads");
        let old = buf.to_vec().iter().filter(|&&byte| byte != 0).count();
        assert_eq!(old, 0, "{preallocation:?}: bytes of the old content show");
    }
}

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

/// What was allocated or written of the file, and the first allocation waits until it is let go.
#[derive(Default)]
struct Slow {
    covered: RefCell<Vec<Range<u64>>>,
    is_let_go: Cell<bool>,
}

impl Hook for Slow {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        let part = match operation {
            Operation::Allocate { at, end } => at..end,
            Operation::Write { at, buf } => at..at + buf.len() as u64,
            _ => return Ok(()),
        };
        std::future::poll_fn(|_| if self.is_let_go.get() { Poll::Ready(()) } else { Poll::Pending }).await;
        self.covered.borrow_mut().push(part);
        Ok(())
    }
}

/// Three lanes take extents, and the one that lies last in the file is the first to extend it: the file is
/// long enough for the others' then, and their space has to be there, too. On a host that is full by the time
/// they are written to, it would be missing under metadata.
#[test]
fn the_file_is_never_extended_over_an_extent_without_space_for_it() {
    const CLUSTER: u64 = 4096;
    /// What an L2 table maps, so that none waits for another one's.
    const TABLE: u64 = 512 * CLUSTER;
    let host = Hooked::new(&MemFiles::default(), Slow::default());
    let options = CreateOptions { virtual_size: 3 * TABLE, cluster_bits: 12, ..CreateOptions::default() };
    create(&host.files, IMAGE, &options);
    let len = image_len(&host.files);
    let image = host.open(4 * CLUSTER);
    let lanes: Vec<_> = (0..3).map(|_| host.lane(&image)).collect();
    let mut writes: Vec<_> = (0..3)
        .map(|index| Box::pin(lanes[index].write(index as u64 * TABLE, Buf::from_bytes(&[7; 512]))))
        .collect();
    let mut context = Context::from_waker(Waker::noop());
    // All of them have their clusters, and the first holds the file.
    for write in &mut writes {
        assert!(write.as_mut().poll(&mut context).is_pending());
    }
    host.hook.is_let_go.set(true);
    let mut ended = [false; 3];
    while ended != [true; 3] {
        for index in [0, 2, 1] {
            ended[index] = ended[index] || writes[index].as_mut().poll(&mut context).is_ready();
        }
    }
    let covered = host.hook.covered.borrow();
    let missing =
        (len..image_len(&host.files)).step_by(512).find(|at| !covered.iter().any(|part| part.contains(at)));
    assert_eq!(missing, None, "of {covered:?}");
}

/// A host that cannot read one of the files any more.
#[derive(Default)]
struct BadDisk {
    file: Cell<Option<FileId>>,
}

impl Hook for BadDisk {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::Read { file, .. } if self.file.get() == Some(file) => {
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
            _ => Ok(()),
        }
    }
}

/// The lowest file of a chain cannot be read, and a layer above it has all that is asked for: that is read.
/// What is not there fails.
#[test]
fn a_layer_that_cannot_be_read_fails_only_what_needs_it() {
    const CLUSTER: usize = 4096;
    let host = Hooked::new(&MemFiles::default(), BadDisk::default());
    let names = ["lowest", "lower", "upper", IMAGE];
    for (index, name) in names.into_iter().enumerate() {
        let backing = index.checked_sub(1).map(|below| names[below].as_bytes().to_vec());
        let backing = backing.map(|name| Backing { name, format: "qcow2".into() });
        let options =
            CreateOptions { virtual_size: 1 << 20, cluster_bits: 12, backing, ..CreateOptions::default() };
        create(&host.files, name, &options);
    }
    for (name, at, byte) in [("lowest", 0, 1), ("lowest", 4 * CLUSTER, 1), ("lower", 4 * CLUSTER, 2)] {
        let image = run(Image::open(&host.files, &host.files, Path::new(name), &OpenOptions::default()))
            .expect("opens");
        let lane = Lane::new(&image, host.files.clone(), 1);
        run(lane.write(at as u64, Buf::from_bytes(&[byte; CLUSTER]))).expect("write");
        run(lane.close()).expect("close");
    }
    let image = host.open(1 << 20);
    let lowest = host.files.open(Path::new("lowest"), Access::ReadOnly).expect("a file");
    host.hook.file.set(Some(lowest));
    let lane = host.lane(&image);
    let buf = Buf::zeroed(CLUSTER);
    run(lane.read(4 * CLUSTER as u64, buf.clone())).expect("read");
    assert_eq!(buf.to_vec(), [2; CLUSTER]);
    run(lane.read(0, buf)).expect_err("what only the lowest file has");
}

/// A host that has room up to some byte of the file, and not one block more.
struct Full {
    room: Cell<u64>,
}

impl Hook for Full {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        let end = match operation {
            Operation::Allocate { end, .. } => end,
            Operation::Write { at, buf } => at + buf.len() as u64,
            _ => 0,
        };
        if end > self.room.get() { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
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
        let host = Hooked::new(&MemFiles::default(), Full { room: Cell::new(u64::MAX) });
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
    let host = Hooked::new(&MemFiles::default(), Full { room: Cell::new(u64::MAX) });
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

#[test]
fn a_full_host_is_filled_to_the_last_cluster() {
    for clusters in 30..50 {
        let room = clusters * 512;
        let host = Hooked::new(&MemFiles::default(), Full { room: Cell::new(room) });
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

/// The last cluster of a file may be cut short by its end. Where space cannot be allocated ahead the file is
/// extended by a sector of zeros, and that was the last one of this very cluster.
#[test]
fn what_ends_in_mid_cluster_is_kept_where_a_file_is_extended_by_writing() {
    let host =
        Hooked::new(&MemFiles::default(), Host { allocation: Allocation::Unsupported, truncates: true });
    create(
        &host.files,
        IMAGE,
        &CreateOptions { virtual_size: 1 << 20, cluster_bits: 9, ..CreateOptions::default() },
    );
    let lane = host.lane(&host.open(512));
    run(lane.write(0, Buf::from_bytes(&[7; 512]))).expect("write");
    run(lane.close()).expect("close");
    let mut bytes = host.files.get(IMAGE).expect("kept");
    bytes.truncate(bytes.len() - 100);
    let last = bytes.len() - 412;
    host.files.put(IMAGE, bytes.clone());
    assert!(bytes[last..].iter().any(|&byte| byte != 0), "it holds something");
    let options = OpenOptions::default();
    let grown = qcow2_engine::grow(host.clone(), &host.files, Path::new(IMAGE), &options, 64 << 20);
    run(grown).expect("needs a longer L1 table, behind the end");
    let after = host.files.get(IMAGE).expect("kept");
    assert_eq!(after[last..bytes.len()], bytes[last..]);
}

/// A host that cannot read some pages of a file, once it is told to.
#[derive(Default)]
struct BadPages {
    bad: RefCell<Vec<u64>>,
    failed: Cell<usize>,
}

impl Hook for BadPages {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::Read { at, .. } if self.bad.borrow().contains(&at) => {
                self.failed.set(self.failed.get() + 1);
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
            _ => Ok(()),
        }
    }
}

/// An image that has let go of the refcount pages of what it has discarded, and a disk that cannot read them
/// any more. Also its length, and how many pages there are.
fn with_bad_counts(host: &Hooked<BadPages>) -> (Lane<Hooked<BadPages>>, u64, usize) {
    // A block of a cluster has 64 counts of 64 bits: there are twice as many as are kept.
    let options =
        CreateOptions { virtual_size: SIZE, cluster_bits: 9, refcount_order: 6, ..CreateOptions::default() };
    create(&host.files, IMAGE, &options);
    let options = OpenOptions { extent_bytes: STEP, cache_bytes: 0, ..OpenOptions::default() };
    let image = run(Image::open(host, &host.files, Path::new(IMAGE), &options)).expect("opens");
    let lane = host.lane(&image);
    for at in (0..SIZE - STEP).step_by(STEP as usize) {
        run(lane.write(at, Buf::from_bytes(&[1; STEP as usize]))).expect("write");
    }
    run(lane.flush()).expect("flush");
    let bytes = host.files.get(IMAGE).expect("kept");
    let word = |at: usize| word::get(&bytes, at).expect("eight");
    let blocks = (0..128).map(|block| word(word(48) as usize + block * 8));
    host.hook.bad.borrow_mut().extend(blocks);
    run(lane.discard(0, SIZE)).expect("discard");
    run(lane.flush()).expect("flush");
    (lane, bytes.len() as u64, 128)
}

/// The disk of [`with_bad_counts`], and the extents that are taken.
const SIZE: u64 = 4 << 20;
const STEP: u64 = 64 << 10;

/// Refcount pages that were let go of cannot be read any more. What they count cannot be given back;
/// everything else waited with it, and in the end every write failed after it had been carried out.
#[test]
fn refcount_pages_that_cannot_be_read_hold_back_only_what_they_count() {
    let host = Hooked::new(&MemFiles::default(), BadPages::default());
    let (lane, len, _) = with_bad_counts(&host);
    run(lane.maintain()).expect("passes over what it cannot read");
    host.hook.bad.borrow_mut().clear();
    run(lane.write(SIZE - STEP, Buf::from_bytes(&[1; STEP as usize]))).expect("write");
    assert_eq!(image_len(&host.files), len, "others can be used again");
    run(lane.close()).expect("close");
    assert_eq!(findings(&host.files), Vec::<String>::new(), "what was passed over has waited");
}

/// Such a page was read once for each of its clusters, all of them once a second, and once more for each
/// round of closing. A disk that takes seconds to give up was kept from everything else.
#[test]
fn refcount_pages_that_cannot_be_read_are_seldom_tried_again() {
    let host = Hooked::new(&MemFiles::default(), BadPages::default());
    let (lane, _, pages) = with_bad_counts(&host);
    let taken = || host.hook.failed.take();
    taken();
    run(lane.maintain()).expect("passes over them");
    let first = taken();
    assert!((1..=pages).contains(&first), "{first} reads of {pages} pages");
    (0..100).for_each(|_| run(lane.maintain()).expect("passes over them"));
    let others = taken();
    assert!((1..=7 * pages).contains(&others), "{others} reads of {pages} pages in 100 passes");
    run(lane.close()).expect("close");
    let closing = taken();
    assert!((1..=5 * pages).contains(&closing), "{closing} reads of {pages} pages");
}

/// What a request of many clusters frees could not be given back before its end, and past 65536 of them each
/// further slice made a cut for nothing: tens of thousands of barriers for one discard.
#[test]
fn a_long_discard_does_not_make_a_cut_for_every_slice() {
    const SIZE: u64 = 80_000 * 512;
    let host = Hooked::new(&MemFiles::default(), Barriers::default());
    create(
        &host.files,
        IMAGE,
        &CreateOptions { virtual_size: SIZE, cluster_bits: 9, ..CreateOptions::default() },
    );
    let image = host.open(1 << 20);
    let lane = host.lane(&image);
    for at in (0..SIZE).step_by(1_024_000) {
        run(lane.write(at, Buf::from_bytes(&[1; 1_024_000]))).expect("write");
    }
    run(lane.flush()).expect("flush");
    let before = host.hook.count.get();
    run(lane.discard(0, SIZE)).expect("discard");
    let barriers = host.hook.count.get() - before;
    assert!(barriers <= 40, "{barriers} barriers");
    run(lane.close()).expect("close");
    assert_eq!(findings(&host.files), Vec::<String>::new());
}

/// Counts barriers.
#[derive(Default)]
struct Barriers {
    count: Cell<u64>,
}

impl Hook for Barriers {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        if matches!(operation, Operation::Sync(_)) {
            self.count.set(self.count.get() + 1);
        }
        Ok(())
    }
}

/// A host that carries out only so many writes of zeros, until it is allowed more.
#[derive(Default)]
struct Tired {
    allowed: Cell<u64>,
}

impl Hook for Tired {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        if let Operation::Write { buf, .. } = operation
            && buf.to_vec().iter().all(|&byte| byte == 0)
        {
            std::future::poll_fn(|_| if self.allowed.get() == 0 { Poll::Pending } else { Poll::Ready(()) })
                .await;
            self.allowed.set(self.allowed.get() - 1);
        }
        Ok(())
    }
}

/// An image of version 2 has zeros written, a gigabyte of them in one request: what others freed meanwhile
/// had to wait for its end.
#[test]
fn what_is_freed_does_not_wait_for_the_end_of_a_long_request() {
    const CLUSTER: u64 = 4096;
    let host = Hooked::new(&MemFiles::default(), Tired::default());
    let options = CreateOptions {
        version: Version::V2,
        virtual_size: 64 * CLUSTER,
        cluster_bits: 12,
        ..CreateOptions::default()
    };
    create(&host.files, IMAGE, &options);
    host.hook.allowed.set(u64::MAX);
    let image = host.open(4 * CLUSTER);
    let (lane, other) = (host.lane(&image), host.lane(&image));
    let data = Buf::from_bytes(&[7; 8 * CLUSTER as usize]);
    for at in [0, 32, 40] {
        run(lane.write(at * CLUSTER, data.clone())).expect("write");
    }
    host.hook.allowed.set(2);
    let mut zeros = Box::pin(lane.write_zeroes(0, 8 * CLUSTER, ZeroMode::Keep));
    let mut context = Context::from_waker(Waker::noop());
    assert!(zeros.as_mut().poll(&mut context).is_pending(), "in the third cluster");
    run(other.discard(32 * CLUSTER, 16 * CLUSTER)).expect("discard");
    host.hook.allowed.set(1);
    assert!(zeros.as_mut().poll(&mut context).is_pending(), "in the fourth");
    run(other.flush()).expect("flush");
    run(other.maintain()).expect("gives back");
    let len = image_len(&host.files);
    run(other.write(48 * CLUSTER, data.clone())).expect("write");
    run(other.write(56 * CLUSTER, data)).expect("write");
    let grown = image_len(&host.files) - len;
    assert!(grown <= 4 * CLUSTER, "the freed clusters are used again, not {grown} bytes behind the end");
    host.hook.allowed.set(u64::MAX);
    assert!(zeros.as_mut().poll(&mut context).is_ready());
}

/// A refcount block of several pages is made where the file has old bytes, as what a crash has left behind
/// the last count: all of its pages are written, not only the one that counts something.
#[test]
fn a_new_refcount_block_over_old_content_is_written_whole() {
    const CLUSTER: u64 = 8192;
    /// Clusters that a block counts, with 64 bits each, in two pages.
    const PER_BLOCK: u64 = 1024;
    let host = Hooked::new(&MemFiles::default(), Host { allocation: Allocation::Possible, truncates: true });
    let size = (PER_BLOCK + 8) * CLUSTER;
    let options =
        CreateOptions { virtual_size: size, cluster_bits: 13, refcount_order: 6, ..CreateOptions::default() };
    create(&host.files, IMAGE, &options);
    let mut bytes = host.files.get(IMAGE).expect("kept");
    bytes.resize((PER_BLOCK + 100) as usize * CLUSTER as usize, 0xee);
    host.files.put(IMAGE, bytes);
    let image = host.open(64 * CLUSTER);
    let lane = host.lane(&image);
    for at in (0..size).step_by(1 << 20) {
        let len = (size - at).min(1 << 20);
        run(lane.write(at, Buf::from_bytes(&vec![1; len as usize]))).expect("writes");
    }
    run(lane.close()).expect("closes");
    assert_eq!(findings(&host.files), Vec::<String>::new());
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
