//! What is freed while a request goes on for long: it comes back before the end, and costs no more.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, create, findings,
    hooked::{Hook, Hooked, Operation},
    image_len, run,
};
use qcow2_engine::{
    ZeroMode,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::{CreateOptions, Version};
use std::{
    cell::Cell,
    io,
    task::{Context, Poll, Waker},
};

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
