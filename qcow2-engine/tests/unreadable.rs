//! Hosts that cannot read a part of what they hold: only what needs it fails, and nothing waits for it.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, create, findings,
    hooked::{Hook, Hooked, Operation},
    image_len, run,
};
use qcow2_engine::{
    Image, Lane, OpenOptions,
    io::{Access, Buf, FileId, Storage, mem::MemFiles},
};
use qcow2_format::{Backing, CreateOptions, word};
use std::{
    cell::{Cell, RefCell},
    io,
    path::Path,
};

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
