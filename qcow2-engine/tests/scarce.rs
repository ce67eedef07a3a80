//! Hosts that can do less: no space ahead, no truncation, a last cluster cut short.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, create, findings,
    hooked::{Hook, Hooked, Operation},
    image_len, run,
};
use qcow2_engine::{
    OpenOptions, Preallocation,
    io::{Buf, FileId, Io, mem::MemFiles},
};
use qcow2_format::CreateOptions;
use std::{
    cell::{Cell, RefCell},
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

/// A block device, or a file that could not be truncated, is made an image with preallocation: what the
/// guest then read was what the device had held before.
#[test]
fn preallocation_over_old_content_that_stays_reads_as_zeros() {
    const SIZE: usize = 1 << 20;
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
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
