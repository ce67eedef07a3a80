//! R6: a flush returns when a cut that began after it arrived is durable.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, create,
    hooked::{Hook, Hooked, Operation},
};
use qcow2_engine::{
    Lane, OpenOptions,
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

/// Barriers complete only when they are let through, one by one.
#[derive(Default)]
struct Gate {
    issued: Cell<u32>,
    allowed: Cell<u32>,
}

impl Hook for Gate {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        if let Operation::Sync(_) = operation {
            let number = self.issued.get() + 1;
            self.issued.set(number);
            poll_fn(|_| if self.allowed.get() >= number { Poll::Ready(()) } else { Poll::Pending }).await;
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
