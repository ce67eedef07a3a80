//! R6: a flush returns when a cut that began after it arrived is durable.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, create,
    hooked::{Hook, Hooked, Operation},
};
use qcow2_engine::{
    ErrorKind, Lane, OpenOptions, ZeroMode,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::CreateOptions;
use std::{
    cell::Cell,
    future::{Future, poll_fn},
    io,
    pin::pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

/// Barriers complete only when they are let through, one by one; the one with the number `failing` fails.
#[derive(Default)]
struct Gate {
    issued: Cell<u32>,
    allowed: Cell<u32>,
    failing: Cell<u32>,
}

impl Hook for Gate {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        if let Operation::Sync(_) = operation {
            let number = self.issued.get() + 1;
            self.issued.set(number);
            poll_fn(|_| if self.allowed.get() >= number { Poll::Ready(()) } else { Poll::Pending }).await;
            if self.failing.get() == number {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
        }
        Ok(())
    }
}

fn gated() -> (Rc<Gate>, Lane<Hooked<Gate>>) {
    let files = MemFiles::default();
    create(&files, IMAGE, &CreateOptions { virtual_size: 8 << 20, ..CreateOptions::default() });
    let host = Hooked::new(&files, Gate::default());
    let lane = host.lane(&host.open(OpenOptions::default().extent_bytes));
    (host.hook, lane)
}

#[test]
fn r6_a_flush_is_covered_by_a_cut_that_began_after_it() {
    let (gate, lane) = gated();
    let mut context = Context::from_waker(Waker::noop());
    let mut first = pin!(lane.flush());
    assert!(first.as_mut().poll(&mut context).is_pending());
    assert_eq!(gate.issued.get(), 1, "a flush without dirty metadata is one barrier");

    // Written after the first barrier was issued: that barrier does not cover it.
    common::run(lane.write(0, Buf::from_bytes(&[7; 4096]))).unwrap();
    let (mut second, mut third) = (pin!(lane.flush()), pin!(lane.flush()));
    assert!(second.as_mut().poll(&mut context).is_pending());
    assert!(third.as_mut().poll(&mut context).is_pending());
    assert_eq!(gate.issued.get(), 1, "one cut at a time");

    gate.allowed.set(1);
    assert!(first.as_mut().poll(&mut context).is_ready());
    assert!(second.as_mut().poll(&mut context).is_pending(), "its cut has only begun");
    assert!(third.as_mut().poll(&mut context).is_pending());
    gate.allowed.set(u32::MAX);
    assert!(second.as_mut().poll(&mut context).is_ready());
    let barriers = gate.issued.get();
    assert!(third.as_mut().poll(&mut context).is_ready());
    assert_eq!(gate.issued.get(), barriers, "the third shares the second one's cut");
}

/// A flush that waited while another one's fdatasync failed carried out the next cut, whose fdatasync
/// succeeded, because a kernel tells of a failed write-back only once: it was reported as a success, and what
/// it covers was lost.
#[test]
fn after_a_failed_fdatasync_no_flush_succeeds_and_nothing_is_accepted() {
    let (gate, lane) = gated();
    let page = || Buf::from_bytes(&[7; 4096]);
    common::run(lane.write(0, page())).unwrap();
    gate.failing.set(1);
    let mut context = Context::from_waker(Waker::noop());
    let (mut first, mut second) = (pin!(lane.flush()), pin!(lane.flush()));
    assert!(first.as_mut().poll(&mut context).is_pending());
    assert!(second.as_mut().poll(&mut context).is_pending(), "one cut at a time");
    gate.allowed.set(u32::MAX);
    let Poll::Ready(Err(error)) = first.as_mut().poll(&mut context) else { panic!("its fdatasync fails") };
    assert_eq!(error.kind(), ErrorKind::Io(Some(libc::EIO)));
    let poisoned = |outcome: qcow2_engine::Result<()>| {
        assert_eq!(outcome.map_err(|error| error.kind()), Err(ErrorKind::Poisoned));
    };
    match second.as_mut().poll(&mut context) {
        Poll::Ready(outcome) => poisoned(outcome),
        Poll::Pending => panic!("nothing to wait for"),
    }
    poisoned(common::run(lane.flush()));
    poisoned(common::run(lane.write(0, page())));
    poisoned(common::run(lane.write_zeroes(0, 4096, ZeroMode::Keep)));
    poisoned(common::run(lane.discard(0, 65536)));
    poisoned(common::run(lane.close()));
    assert!(lane.direct_write(0, 4096).is_none(), "the short cut accepts nothing either");
    assert_eq!(gate.issued.get(), 1, "no barrier is tried again");
}

#[test]
fn the_documented_number_of_barriers() {
    let (gate, lane) = gated();
    gate.allowed.set(u32::MAX);
    let barriers = |at| {
        common::run(lane.write(at, Buf::from_bytes(&[7; 65536]))).unwrap();
        let before = gate.issued.get();
        common::run(lane.flush()).unwrap();
        gate.issued.get() - before
    };
    assert_eq!(barriers(0), 3, "a new L2 table");
    assert_eq!(barriers(65536), 2, "a new cluster");
    assert_eq!(barriers(65536), 1, "an overwrite");
}
