//! Asynchronous locks on ranges of numbers.
//!
//! Requests that change the mapping of the same clusters, and loads of the same metadata page,
//! happen one after the other. A range is held by a guard; whoever overlaps waits for its drop.
//! [`Locks`] has those of an image, and their order.

use crate::waiters::Waiters;
use parking_lot::Mutex;
use qcow2_format::GuestCluster;
use std::{future::poll_fn, ops::Range, task::Poll};

/// The locks of an image, in the order in which they are taken: under one of them those below it may be
/// waited for, and the end of a cut, which takes none. The metadata lock comes after all of them.
#[derive(Default)]
pub(crate) struct Locks {
    /// Clearing the autoclear bits; nothing but a cut is waited for under it.
    pub(crate) clearing: OneAtATime,
    /// Searching for leaks; no request's lock (the next four) is taken under it.
    pub(crate) searching: OneAtATime,
    /// Guest clusters whose mapping is being changed.
    pub(crate) mappings: RangeLocks<GuestCluster>,
    /// L1 entries whose table is being made or copied.
    pub(crate) tables: RangeLocks<u64>,
    /// Lanes that look for an extent.
    pub(crate) refills: RangeLocks<u64>,
    /// Claiming free clusters, and growing the file over them.
    pub(crate) growth: OneAtATime,
    /// Giving freed clusters back.
    pub(crate) reclaiming: OneAtATime,
    /// Metadata pages that are being read from the file, as `load.rs` numbers them.
    pub(crate) loads: RangeLocks<u64>,
}

/// The held ranges of one kind.
#[derive(Default)]
pub(crate) struct RangeLocks<T>(Mutex<State<T>>);

#[derive(Default)]
struct State<T> {
    held: Vec<Range<T>>,
    waiting: Waiters,
}

/// Holds a range until it is dropped.
pub(crate) struct RangeGuard<'a, T: Ord + Copy> {
    locks: &'a RangeLocks<T>,
    range: Range<T>,
}

/// Something that is done by one at a time.
#[derive(Default)]
pub(crate) struct OneAtATime(RangeLocks<u64>);

impl OneAtATime {
    /// Waits until nobody else does it.
    pub(crate) async fn acquire(&self) -> RangeGuard<'_, u64> {
        self.0.acquire(0..1).await
    }
}

impl<T: Ord + Copy> RangeLocks<T> {
    /// Waits until nobody else holds a part of `range`, then holds it.
    pub(crate) async fn acquire(&self, range: Range<T>) -> RangeGuard<'_, T> {
        poll_fn(|context| {
            let mut state = self.0.lock();
            if state.held.iter().any(|held| held.start < range.end && range.start < held.end) {
                state.waiting.add(context);
                return Poll::Pending;
            }
            state.held.push(range.clone());
            Poll::Ready(())
        })
        .await;
        RangeGuard { locks: self, range }
    }
}

impl<T: Ord + Copy> Drop for RangeGuard<'_, T> {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.locks.0.lock();
            let index = state.held.iter().position(|held| *held == self.range);
            state.held.swap_remove(index.expect("a guard's range is held until its drop"));
            state.waiting.take()
        };
        waiting.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        future::Future,
        pin::pin,
        task::{Context, Waker},
    };

    #[test]
    fn an_overlap_waits_and_a_neighbour_does_not() {
        let locks = RangeLocks::<u64>::default();
        let mut context = Context::from_waker(Waker::noop());
        let Poll::Ready(first) = pin!(locks.acquire(4..8)).poll(&mut context) else { panic!("free range") };
        assert!(pin!(locks.acquire(8..9)).poll(&mut context).is_ready());
        let mut overlapping = pin!(locks.acquire(7..9));
        assert!(overlapping.as_mut().poll(&mut context).is_pending());
        drop(first);
        assert!(overlapping.poll(&mut context).is_ready());
    }
}
