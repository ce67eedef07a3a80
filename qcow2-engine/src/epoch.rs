//! Which requests are in flight, so that nothing is reused under them.
//!
//! A request that looked up a mapping may touch the cluster it found until it ends. When a cluster
//! is unmapped, the epoch moves on; the cluster is quiescent once no request of an earlier epoch is
//! left. Entering and leaving cost one store each and take no lock: every request in flight owns a
//! slot. This module knows nothing about clusters.
//!
//! ```text
//! request:  slot := epoch  ── fence ──  look the mapping up
//! freeing:  mapping changed  ── fence ──  look at the slots
//! ```
//!
//! Each stores, and then loads what the other one stores. Of two such sides one at least must see the other:
//! either the request is seen in its slot, or it sees that the cluster is unmapped. Nothing but a fence between
//! store and load on *both* sides gives that; a sequentially consistent store and look-ups of a weaker order
//! after it may change places (on ARM an `stlr` and an `ldr` do). The change of the mapping and the look at the
//! slots may be on different threads: the metadata lock is between them then.

use parking_lot::Mutex;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::SeqCst, compiler_fence, fence},
};

const IDLE: u64 = 0;

/// The epoch clock of one image and the slots of all its lanes.
pub(crate) struct Epochs {
    now: AtomicU64,
    lanes: Mutex<Vec<Arc<Slots>>>,
}

/// A moment: work that began before it may still see what was unmapped then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Epoch(u64);

impl Epoch {
    /// Before all others.
    pub(crate) const START: Self = Self(0);
    /// After all others.
    pub(crate) const END: Self = Self(u64::MAX);
}

/// One slot per request that a lane can have in flight; each holds the epoch in which it began.
pub(crate) struct Slots(Box<[Line]>);

/// Slots that share no memory with those of another lane, which another thread writes for each of its
/// requests. Processors fetch cache lines in pairs.
#[repr(align(128))]
struct Line([AtomicU64; Self::SLOTS]);

impl Line {
    const SLOTS: usize = 16;
}

impl Epochs {
    pub(crate) fn new() -> Self {
        Self { now: AtomicU64::new(1), lanes: Mutex::default() }
    }

    /// Makes the slots of a new lane.
    pub(crate) fn register(&self, depth: usize) -> Arc<Slots> {
        let slots = Arc::new(Slots::idle(depth));
        self.lanes.lock().push(Arc::clone(&slots));
        slots
    }

    /// Takes the slots of a lane that has ended out.
    pub(crate) fn unregister(&self, slots: &Arc<Slots>) {
        self.lanes.lock().retain(|other| !Arc::ptr_eq(other, slots));
    }

    /// Ends the epoch; call it after the mapping was changed.
    pub(crate) fn advance(&self) -> Epoch {
        Epoch(self.now.fetch_add(1, SeqCst))
    }

    /// The epoch in which the oldest request in flight began. Those before it have passed: none of their
    /// requests is left.
    pub(crate) fn oldest(&self) -> Epoch {
        fence(SeqCst);
        self.lanes.lock().iter().map(|slots| slots.oldest()).min().unwrap_or(Epoch::END)
    }

    /// Whether every request that began in `epoch` or earlier has ended.
    pub(crate) fn has_passed(&self, epoch: Epoch) -> bool {
        epoch < self.oldest()
    }

    /// Marks slot `index` as a request that begins now. The look-ups which follow are not ordered before it.
    #[inline]
    pub(crate) fn enter(&self, slots: &Slots, index: usize) {
        slots.at(index).store(self.now.load(SeqCst), SeqCst);
        fence_after_store();
    }
}

/// A fence right after a sequentially consistent store. On x86 such a store is a locked exchange, which no load
/// passes: there a second full fence would only cost every request some twenty cycles, and the compiler
/// alone is to be kept from moving loads.
#[inline]
fn fence_after_store() {
    if cfg!(any(target_arch = "x86", target_arch = "x86_64")) {
        compiler_fence(SeqCst);
    } else {
        fence(SeqCst);
    }
}

impl Slots {
    fn idle(count: usize) -> Self {
        let line = |_| Line([const { AtomicU64::new(IDLE) }; Line::SLOTS]);
        Self((0..count.div_ceil(Line::SLOTS)).map(line).collect())
    }

    #[inline]
    fn at(&self, index: usize) -> &AtomicU64 {
        &self.0[index / Line::SLOTS].0[index % Line::SLOTS]
    }

    #[inline]
    pub(crate) fn leave(&self, index: usize) {
        self.at(index).store(IDLE, std::sync::atomic::Ordering::Release);
    }

    fn oldest(&self) -> Epoch {
        let began = self.0.iter().flat_map(|line| &line.0).map(|slot| slot.load(SeqCst));
        began.filter(|&began| began != IDLE).min().map_or(Epoch::END, Epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_passes_when_its_requests_have_ended() {
        let epochs = Epochs::new();
        let lane = epochs.register(2);
        epochs.enter(&lane, 0);
        let unmapped = epochs.advance();
        epochs.enter(&lane, 1);
        assert!(epochs.oldest() <= unmapped, "request 0 may still use the cluster");
        lane.leave(0);
        assert!(epochs.oldest() > unmapped, "request 1 began later");
    }

    #[test]
    fn a_lane_that_ended_holds_nothing_back() {
        let epochs = Epochs::new();
        let lane = epochs.register(1);
        epochs.enter(&lane, 0);
        let unmapped = epochs.advance();
        epochs.unregister(&lane);
        assert!(epochs.oldest() > unmapped);
    }
}
