//! Clusters that nothing maps any more, on their way back (R5).
//!
//! A freed cluster may be reused, and its space on the host given up, only when (a) the cut that
//! unmaps it is durable and (b) every request that was in flight at the time has ended. Until then
//! it waits here, still counted. This module decides what is ready; `reclaim.rs` carries it out.

use crate::epoch::Epoch;
use qcow2_format::HostCluster;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque, btree_map::Entry},
    ops::Range,
};

/// Passes of maintenance, a second each, between two attempts at what cannot be given back, at the most.
const MAX_PAUSE: u32 = 64;

/// Freed clusters.
#[derive(Default)]
pub(crate) struct Frees {
    /// Oldest first.
    waiting: VecDeque<Free>,
    /// All that has not been given back yet, cluster → references: what is handed out is looked for here.
    references: BTreeMap<HostCluster, u64>,
    /// What was taken out last and has not been given back yet: cluster → references.
    taken: BTreeMap<HostCluster, u64>,
    aside: Aside,
}

/// What R5 allows to be given back, but its counts cannot be read.
#[derive(Default)]
struct Aside {
    /// Cluster → references.
    clusters: BTreeMap<HostCluster, u64>,
    /// Refcount pages whose reads have failed since the last attempt.
    pages: BTreeSet<u64>,
    /// Passes until the next attempt, and from that one to the one after it.
    pause: u32,
    next_pause: u32,
}

/// One reference to a host cluster that is gone from the mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Free {
    pub(crate) cluster: HostCluster,
    /// The first cut whose pages do not refer to it.
    pub(crate) cut: u64,
    /// The last epoch whose requests may still use it.
    pub(crate) epoch: Epoch,
}

impl Frees {
    pub(crate) fn push(&mut self, free: Free) {
        self.waiting.push_back(free);
        *self.references.entry(free.cluster).or_default() += 1;
    }

    /// References that wait for their turn.
    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether everything has been given back.
    pub(crate) fn all_given_back(&self) -> bool {
        self.references.is_empty()
    }

    /// A cluster of `run` that has not been given back yet.
    pub(crate) fn find(&self, run: &Range<HostCluster>) -> Option<HostCluster> {
        self.references.range(run.clone()).next().map(|(&cluster, _)| cluster)
    }

    /// All that was taken out of a cluster's references is given back, under the same lock that lowers its
    /// count: somebody else may be given it at once.
    pub(crate) fn given_back(&mut self, cluster: HostCluster) {
        if let Some(references) = self.taken.remove(&cluster) {
            self.forget(cluster, references);
        }
    }

    fn forget(&mut self, cluster: HostCluster, references: u64) {
        if let Entry::Occupied(mut left) = self.references.entry(cluster) {
            *left.get_mut() -= references;
            if *left.get() == 0 {
                left.remove();
            }
        }
    }

    /// Sets what was taken out of a cluster's references aside: `page`, which has its count, cannot be read.
    pub(crate) fn set_aside(&mut self, cluster: HostCluster, page: u64) {
        let Some(references) = self.taken.remove(&cluster) else { return };
        *self.aside.clusters.entry(cluster).or_default() += references;
        self.aside.pages.insert(page);
        if self.aside.pause == 0 {
            self.aside.pause = self.aside.next_pause.max(1);
            self.aside.next_pause = MAX_PAUSE.min(self.aside.pause * 2);
        }
    }

    /// Whether a refcount page could not be read at the last attempt.
    pub(crate) fn is_unreadable(&self, page: u64) -> bool {
        self.aside.pages.contains(&page)
    }

    /// Another pass of maintenance: what was set aside is due again when its pause is over, and pauses twice
    /// as long when that is of no use.
    pub(crate) fn begin_pass(&mut self) {
        if self.aside.clusters.is_empty() {
            self.aside = Aside::default();
            return;
        }
        self.aside.pause = self.aside.pause.saturating_sub(1);
        if self.aside.pause == 0 {
            self.try_again();
        }
    }

    /// What was set aside may be taken out again.
    pub(crate) fn try_again(&mut self) {
        self.aside.pages.clear();
        for (cluster, references) in std::mem::take(&mut self.aside.clusters) {
            let free = Free { cluster, cut: 0, epoch: Epoch::START };
            (0..references).for_each(|_| self.waiting.push_front(free));
        }
    }

    /// Takes what was taken out and has not been given back: it is to wait again.
    pub(crate) fn take_rest(&mut self) -> BTreeMap<HostCluster, u64> {
        let rest = std::mem::take(&mut self.taken);
        rest.iter().for_each(|(&cluster, &references)| self.forget(cluster, references));
        rest
    }

    /// The clusters that have not been given back yet, as often as references to them.
    pub(crate) fn clusters(&self) -> impl Iterator<Item = HostCluster> + '_ {
        self.references.iter().flat_map(|(&cluster, &times)| (0..times).map(move |_| cluster))
    }

    /// What has waited longest.
    pub(crate) fn first(&self) -> Option<&Free> {
        self.waiting.front()
    }

    /// Takes out what may be given back, up to `max` references: clusters, and how many references to each.
    pub(crate) fn take_ready(
        &mut self,
        durable_cut: u64,
        oldest: Epoch,
        max: usize,
    ) -> Vec<(HostCluster, u64)> {
        // Both stamps only ever grow along the queue.
        let ready =
            self.waiting.iter().take(max).take_while(|free| free.cut <= durable_cut && free.epoch < oldest);
        let count = ready.count();
        for free in self.waiting.drain(..count) {
            *self.taken.entry(free.cluster).or_default() += 1;
        }
        self.taken.iter().map(|(&cluster, &references)| (cluster, references)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::Epochs;

    /// A cluster of the few before it that has not been given back yet, and how many have not.
    fn left(frees: &Frees, before: u64) -> (Option<u64>, usize) {
        let found = frees.find(&(HostCluster(0)..HostCluster(before)));
        (found.map(|cluster| cluster.0), frees.clusters().count())
    }

    #[test]
    fn r5_unmap_is_durable_and_requests_have_ended_before_reuse() {
        let epochs = Epochs::new();
        let lane = epochs.register(1);
        epochs.enter(&lane, 0);
        let mut frees = Frees::default();
        frees.push(Free { cluster: HostCluster(9), cut: 4, epoch: epochs.advance() });
        let mut ready = |cut| frees.take_ready(cut, epochs.oldest(), 8);
        assert!(ready(4).is_empty(), "a request that began before the unmap may write to it");
        lane.leave(0);
        assert!(ready(3).is_empty(), "the unmap is not durable");
        assert_eq!(ready(4).len(), 1);
        assert_eq!(left(&frees, 10), (Some(9), 1), "not given back yet");
        frees.given_back(HostCluster(9));
        assert_eq!(left(&frees, 10), (None, 0));
        assert!(frees.take_ready(5, epochs.oldest(), 8).is_empty(), "once only");
    }

    /// What could not be counted was as ready as before, and whoever gives back until nothing is ready never
    /// came to an end.
    #[test]
    fn what_is_set_aside_is_due_again_after_ever_longer_pauses() {
        let mut frees = Frees::default();
        let epochs = Epochs::new();
        for cluster in [5, 6, 7, 6].map(HostCluster) {
            frees.push(Free { cluster, cut: 1, epoch: epochs.advance() });
        }
        let take = |frees: &mut Frees| -> Vec<(u64, u64)> {
            let ready = frees.take_ready(9, epochs.oldest(), 8);
            ready.into_iter().map(|(cluster, references)| (cluster.0, references)).collect()
        };
        assert_eq!(take(&mut frees), [(5, 1), (6, 2), (7, 1)]);
        frees.given_back(HostCluster(5));
        let mut tried = Vec::new();
        for pass in 0..200 {
            frees.begin_pass();
            if !take(&mut frees).is_empty() {
                tried.push(pass);
            }
            frees.set_aside(HostCluster(6), 1);
            frees.set_aside(HostCluster(7), 1);
            assert!(take(&mut frees).is_empty() && frees.is_unreadable(1) && !frees.is_unreadable(0));
            assert_eq!(left(&frees, 7), (Some(6), 3), "not given back yet");
        }
        assert_eq!(tried, [0, 1, 3, 7, 15, 31, 63, 127, 191]);
        frees.try_again();
        assert_eq!(take(&mut frees), [(6, 2), (7, 1)]);
        (6..8).for_each(|cluster| frees.given_back(HostCluster(cluster)));
        frees.begin_pass();
        assert!(frees.all_given_back() && !frees.is_unreadable(1));
    }
}
