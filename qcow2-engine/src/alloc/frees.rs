//! Clusters that nothing maps any more, on their way back (R5).
//!
//! A freed cluster may be reused, and its space on the host given up, only when (a) the cut that
//! unmaps it is durable and (b) every request that was in flight at the time has ended. Until then
//! it waits here, still counted. This module decides what is ready; `reclaim.rs` carries it out.

use crate::epoch::Epoch;
use std::{
    collections::{BTreeMap, VecDeque, btree_map::Entry},
    ops::Range,
};

/// Freed clusters.
#[derive(Default)]
pub(crate) struct Frees {
    /// Oldest first.
    waiting: VecDeque<Free>,
    /// The same by their places, and how many references to each: every run that is handed out is looked for here.
    places: BTreeMap<u64, u64>,
    /// What was taken out last and has not been given back yet: cluster → references.
    taken: BTreeMap<u64, u64>,
}

/// One reference to a host cluster that is gone from the mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Free {
    pub(crate) cluster: u64,
    /// The first cut whose pages do not refer to it.
    pub(crate) cut: u64,
    /// The last epoch whose requests may still use it.
    pub(crate) epoch: Epoch,
}

impl Frees {
    pub(crate) fn push(&mut self, free: Free) {
        self.waiting.push_back(free);
        *self.places.entry(free.cluster).or_default() += 1;
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// A cluster of `run` that has not been given back yet.
    pub(crate) fn find(&self, run: &Range<u64>) -> Option<u64> {
        [&self.taken, &self.places]
            .into_iter()
            .find_map(|places| places.range(run.clone()).next())
            .map(|(&cluster, _)| cluster)
    }

    /// All that was taken out of a cluster's references is given back, under the same lock that lowers its
    /// count: somebody else may be given it at once.
    pub(crate) fn given_back(&mut self, cluster: u64) {
        self.taken.remove(&cluster);
    }

    /// Takes what was taken out and has not been given back: it is to wait again.
    pub(crate) fn take_rest(&mut self) -> BTreeMap<u64, u64> {
        std::mem::take(&mut self.taken)
    }

    /// The clusters that have not been given back yet, as often as references to them.
    pub(crate) fn clusters(&self) -> impl Iterator<Item = u64> + '_ {
        let taken = self.taken.iter().flat_map(|(&cluster, &times)| (0..times).map(move |_| cluster));
        self.waiting.iter().map(|free| free.cluster).chain(taken)
    }

    /// What has waited longest.
    pub(crate) fn first(&self) -> Option<&Free> {
        self.waiting.front()
    }

    /// Takes out what may be given back, up to `max` references: clusters, and how many references to each.
    pub(crate) fn take_ready(&mut self, durable_cut: u64, oldest: Epoch, max: usize) -> Vec<(u64, u64)> {
        // Both stamps only ever grow along the queue.
        let ready =
            self.waiting.iter().take(max).take_while(|free| free.cut <= durable_cut && free.epoch < oldest);
        let count = ready.count();
        for free in self.waiting.drain(..count) {
            *self.taken.entry(free.cluster).or_default() += 1;
            if let Entry::Occupied(mut place) = self.places.entry(free.cluster) {
                *place.get_mut() -= 1;
                if *place.get() == 0 {
                    place.remove();
                }
            }
        }
        self.taken.iter().map(|(&cluster, &references)| (cluster, references)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::Epochs;

    #[test]
    fn r5_unmap_is_durable_and_requests_have_ended_before_reuse() {
        let epochs = Epochs::new();
        let lane = epochs.register(1);
        epochs.enter(&lane, 0);
        let mut frees = Frees::default();
        frees.push(Free { cluster: 9, cut: 4, epoch: epochs.advance() });
        let mut ready = |cut| frees.take_ready(cut, epochs.oldest(), 8);
        assert!(ready(4).is_empty(), "a request that began before the unmap may write to it");
        lane.leave(0);
        assert!(ready(3).is_empty(), "the unmap is not durable");
        assert_eq!(ready(4).len(), 1);
        assert_eq!((frees.find(&(0..10)), frees.clusters().count()), (Some(9), 1), "not given back yet");
        frees.given_back(9);
        assert_eq!((frees.find(&(0..10)), frees.clusters().count()), (None, 0));
        assert!(frees.take_ready(5, epochs.oldest(), 8).is_empty(), "once only");
    }
}
