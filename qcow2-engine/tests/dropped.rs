//! Queues that end while the kernel still works for them: what they had begun is not undone, and nothing may
//! meet it.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, create,
    hooked::{Hook, Hooked, Operation},
    run,
};
use qcow2_engine::{
    ErrorKind, ZeroMode,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::CreateOptions;
use std::{
    cell::Cell,
    future::{Future, pending},
    io,
    pin::pin,
    task::{Context, Waker},
};

const CLUSTER: u64 = 4096;

/// A host on which operations of one kind do not end, while it is told so.
#[derive(Default)]
struct Stuck {
    what: Cell<Option<What>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Writes,
    Punches,
}

impl Hook for Stuck {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        match (operation, self.what.get()) {
            (Operation::Write { .. }, Some(What::Writes)) | (Operation::PunchHole, Some(What::Punches)) => {
                pending().await
            }
            _ => Ok(()),
        }
    }
}

impl Stuck {
    /// Begins something that gets stuck in `what`, and drops it there.
    fn abandon(&self, what: What, work: impl Future) {
        self.what.set(Some(what));
        assert!(pin!(work).poll(&mut Context::from_waker(Waker::noop())).is_pending());
        self.what.set(None);
    }
}

fn host() -> Hooked<Stuck> {
    let host = Hooked::new(&MemFiles::default(), Stuck::default());
    create(
        &host.files,
        IMAGE,
        &CreateOptions { virtual_size: 1 << 20, cluster_bits: 12, ..CreateOptions::default() },
    );
    host
}

/// A write into a zero cluster that keeps its place writes zeros around its payload. They would land on what
/// another queue writes to the same cluster, and is acknowledged, when the first one has gone.
#[test]
fn nothing_is_written_to_a_cluster_whose_writer_has_gone() {
    let host = host();
    let image = host.open(CLUSTER);
    let (ending, other) = (host.lane(&image), host.lane(&image));
    run(other.write(0, Buf::from_bytes(&[1; CLUSTER as usize]))).expect("write");
    run(other.write_zeroes(0, CLUSTER, ZeroMode::Keep)).expect("write zeroes");
    host.hook.abandon(What::Writes, ending.write(5 * 512, Buf::from_bytes(&[2; 512])));
    drop(ending);
    let refused = run(other.write(7 * 512, Buf::from_bytes(&[3; 512]))).expect_err("zeros are on their way");
    assert_eq!(refused.kind(), ErrorKind::Poisoned, "{refused}");
}

/// A hole that is being punched for a queue that has gone takes what has been put there since.
#[test]
fn r5_a_cluster_whose_hole_is_being_punched_is_not_given_out() {
    let host = host();
    let image = host.open(CLUSTER);
    let (ending, other) = (host.lane(&image), host.lane(&image));
    run(other.write(0, Buf::from_bytes(&[1; CLUSTER as usize]))).expect("write");
    let bytes = host.files.get(IMAGE).expect("kept");
    let place = bytes.chunks(CLUSTER as usize).position(|cluster| cluster == [1; CLUSTER as usize]);
    let place = place.expect("written") * CLUSTER as usize;
    run(other.discard(0, CLUSTER)).expect("discard");
    host.hook.abandon(What::Punches, ending.maintain());
    drop(ending);
    for _ in 0..2 {
        run(other.write(CLUSTER, Buf::from_bytes(&[2; 512]))).expect("write");
        run(other.flush()).expect("flush");
        run(other.maintain()).expect("gives back");
    }
    run(other.write(2 * CLUSTER, Buf::from_bytes(&[3; CLUSTER as usize]))).expect("write");
    let bytes = host.files.get(IMAGE).expect("kept");
    assert_eq!(bytes[place], 1, "it was given out");
}
