//! Asynchronous locks on ranges of numbers.
//!
//! Requests that change the mapping of the same clusters, and loads of the same metadata page,
//! happen one after the other. A range is held by a guard; whoever overlaps waits for its drop. The
//! numbers' meaning is the owner's (guest clusters, L2 slices, …).

use parking_lot::Mutex;
use std::{
    future::poll_fn,
    ops::Range,
    task::{Poll, Waker},
};

/// The held ranges of one kind.
#[derive(Default)]
pub(crate) struct RangeLocks(Mutex<State>);

#[derive(Default)]
struct State {
    held: Vec<Range<u64>>,
    waiting: Vec<Waker>,
}

/// Holds a range until it is dropped.
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    range: Range<u64>,
}

impl RangeLocks {
    /// Waits until nobody else holds a part of `range`, then holds it.
    pub(crate) async fn acquire(&self, range: Range<u64>) -> RangeGuard<'_> {
        poll_fn(|context| {
            let mut state = self.0.lock();
            if state.held.iter().any(|held| held.start < range.end && range.start < held.end) {
                state.waiting.push(context.waker().clone());
                return Poll::Pending;
            }
            state.held.push(range.clone());
            Poll::Ready(())
        })
        .await;
        RangeGuard { locks: self, range }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.locks.0.lock();
            let index = state.held.iter().position(|held| *held == self.range);
            state.held.swap_remove(index.expect("a guard's range is held until its drop"));
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{future::Future, pin::pin, task::Context};

    #[test]
    fn an_overlap_waits_and_a_neighbour_does_not() {
        let locks = RangeLocks::default();
        let mut context = Context::from_waker(Waker::noop());
        let Poll::Ready(first) = pin!(locks.acquire(4..8)).poll(&mut context) else { panic!("free range") };
        assert!(pin!(locks.acquire(8..9)).poll(&mut context).is_ready());
        let mut overlapping = pin!(locks.acquire(7..9));
        assert!(overlapping.as_mut().poll(&mut context).is_pending());
        drop(first);
        assert!(overlapping.poll(&mut context).is_ready());
    }
}
