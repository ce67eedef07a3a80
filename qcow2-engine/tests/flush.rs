//! R6: a flush returns when a cut that began after it arrived is durable.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{IMAGE, create};
use qcow2_engine::{
    Image, Lane, OpenOptions,
    io::{Buf, FileId, Io, mem::MemFiles},
};
use qcow2_format::CreateOptions;
use std::{
    cell::Cell,
    future::{Future, poll_fn},
    io,
    path::Path,
    pin::pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

/// Files in memory whose barriers complete only when they are let through, one by one.
#[derive(Clone)]
struct Gated {
    files: MemFiles,
    issued: Rc<Cell<u32>>,
    allowed: Rc<Cell<u32>>,
}

impl Io for Gated {
    async fn read(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.files.read(file, at, buf).await
    }
    async fn write(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.files.write(file, at, buf).await
    }
    async fn sync(&self, _file: FileId) -> io::Result<()> {
        let number = self.issued.get() + 1;
        self.issued.set(number);
        poll_fn(|_| if self.allowed.get() >= number { Poll::Ready(()) } else { Poll::Pending }).await;
        Ok(())
    }
    async fn allocate(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        self.files.allocate(file, at, len).await
    }
    async fn punch_hole(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        self.files.punch_hole(file, at, len).await
    }
    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.files.set_len(file, len).await
    }
}

fn gated() -> (Gated, Lane<Gated>) {
    let files = MemFiles::default();
    create(&files, IMAGE, &CreateOptions { virtual_size: 8 << 20, ..CreateOptions::default() });
    let io = Gated { files: files.clone(), issued: Rc::default(), allowed: Rc::default() };
    let image =
        common::run(Image::open(&io, &files, Path::new(IMAGE), &OpenOptions::default())).expect("opens");
    let lane = Lane::new(&image, io.clone(), 8);
    (io, lane)
}

#[test]
fn r6_a_flush_is_covered_by_a_cut_that_began_after_it() {
    let (io, lane) = gated();
    let mut context = Context::from_waker(Waker::noop());
    let mut first = pin!(lane.flush());
    assert!(first.as_mut().poll(&mut context).is_pending());
    assert_eq!(io.issued.get(), 1, "a flush without dirty metadata is one barrier");

    // Written after the first barrier was issued: that barrier does not cover it.
    common::run(lane.write(0, Buf::from_bytes(&[7; 4096]))).unwrap();
    let (mut second, mut third) = (pin!(lane.flush()), pin!(lane.flush()));
    assert!(second.as_mut().poll(&mut context).is_pending());
    assert!(third.as_mut().poll(&mut context).is_pending());
    assert_eq!(io.issued.get(), 1, "one cut at a time");

    io.allowed.set(1);
    assert!(first.as_mut().poll(&mut context).is_ready());
    assert!(second.as_mut().poll(&mut context).is_pending(), "its cut has only begun");
    assert!(third.as_mut().poll(&mut context).is_pending());
    io.allowed.set(u32::MAX);
    assert!(second.as_mut().poll(&mut context).is_ready());
    let barriers = io.issued.get();
    assert!(third.as_mut().poll(&mut context).is_ready());
    assert_eq!(io.issued.get(), barriers, "the third shares the second one's cut");
}

#[test]
fn the_documented_number_of_barriers() {
    let (io, lane) = gated();
    io.allowed.set(u32::MAX);
    let barriers = |at| {
        common::run(lane.write(at, Buf::from_bytes(&[7; 65536]))).unwrap();
        let before = io.issued.get();
        common::run(lane.flush()).unwrap();
        io.issued.get() - before
    };
    assert_eq!(barriers(0), 3, "a new L2 table");
    assert_eq!(barriers(65536), 2, "a new cluster");
    assert_eq!(barriers(65536), 1, "an overwrite");
}
