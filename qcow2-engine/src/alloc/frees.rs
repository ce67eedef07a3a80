//! Clusters that nothing maps any more, on their way back (R5).
//!
//! A freed cluster may be reused, and its space on the host given up, only when (a) the cut that
//! unmaps it is durable and (b) every request that was in flight at the time has ended. Until then
//! it waits here, still counted. This module decides what is ready; `reclaim.rs` carries it out.
//!
//! One request that hangs holds back all that is freed after it began, for as long as it hangs. So what
//! waits is kept as rows of clusters ([`Rows`]), and in a bounded number of batches ([`MAX_BATCHES`]): a row costs
//! some forty bytes in its batch and as many in the whole, however many clusters it has.

use super::rows::Rows;
use crate::epoch::Epoch;
use qcow2_format::HostCluster;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Range,
};

/// Passes of maintenance, a second each, between two attempts at what cannot be given back, at the most.
const MAX_PAUSE: u32 = 64;
/// Batches that wait, at the most, where the caller does not say: there is one for each cut. Of more the oldest two
/// become one, and wait as long as the younger one.
pub(crate) const MAX_BATCHES: usize = 64;

/// Freed clusters.
pub(crate) struct Frees {
    max_batches: usize,
    /// Oldest first: both stamps only ever grow along the queue.
    waiting: VecDeque<Batch>,
    /// All that has not been given back yet, a time for each reference: what is handed out is looked for here.
    references: Rows,
    /// What was taken out last and has not been given back yet: cluster → references.
    taken: BTreeMap<HostCluster, u64>,
    aside: Aside,
}

/// References to clusters that are gone from the mapping and wait for the same.
struct Batch {
    references: Rows,
    due: Due,
}

/// What R5 allows to be given back, but its counts cannot be read.
#[derive(Default)]
struct Aside {
    references: Rows,
    /// Refcount pages whose reads have failed since the last attempt.
    pages: BTreeSet<u64>,
    /// Passes until the next attempt, and from that one to the one after it.
    pause: u32,
    next_pause: u32,
}

/// What has to be over before freed clusters are given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Due {
    /// The first cut whose pages do not refer to them.
    pub(crate) cut: u64,
    /// The last epoch whose requests may still use them.
    pub(crate) epoch: Epoch,
}

impl Due {
    /// Nothing.
    const NOW: Self = Self { cut: 0, epoch: Epoch::START };
}

impl Frees {
    pub(crate) fn new(max_batches: usize) -> Self {
        Self {
            max_batches,
            waiting: VecDeque::new(),
            references: Rows::default(),
            taken: BTreeMap::new(),
            aside: Aside::default(),
        }
    }

    /// A reference to each of these clusters is gone. What is freed before a cut waits for the last of it:
    /// the cut comes later than all of it anyway.
    pub(crate) fn push(&mut self, clusters: Range<HostCluster>, due: Due) {
        self.references.add(clusters.clone(), 1);
        match self.waiting.back_mut() {
            Some(batch) if batch.due.cut == due.cut => {
                batch.references.add(clusters, 1);
                batch.due = due;
            }
            _ => {
                let mut references = Rows::default();
                references.add(clusters, 1);
                self.waiting.push_back(Batch { references, due });
                self.bound_batches();
            }
        }
    }

    fn bound_batches(&mut self) {
        if self.waiting.len() > self.max_batches
            && let Some(second) = self.waiting.remove(1)
            && let Some(first) = self.waiting.front_mut()
        {
            first.references.merge(second.references);
            first.due = second.due;
        }
    }

    /// References that wait for their turn.
    pub(crate) fn len(&self) -> u64 {
        self.waiting.iter().map(|batch| batch.references.len()).sum()
    }

    /// Whether everything has been given back.
    pub(crate) fn all_given_back(&self) -> bool {
        self.references.is_empty()
    }

    /// A cluster of `run` that has not been given back yet.
    pub(crate) fn find(&self, run: &Range<HostCluster>) -> Option<HostCluster> {
        self.within(run.clone()).next().map(|(row, _)| row.start)
    }

    /// Those of some clusters that have not been given back yet: rows, and how many references to each of a
    /// row's.
    pub(crate) fn within(
        &self,
        clusters: Range<HostCluster>,
    ) -> impl Iterator<Item = (Range<HostCluster>, u64)> + '_ {
        self.references.within(clusters)
    }

    /// All that was taken out of a cluster's references is given back, under the same lock that lowers its
    /// count: somebody else may be given it at once.
    pub(crate) fn given_back(&mut self, cluster: HostCluster) {
        if let Some(references) = self.taken.remove(&cluster) {
            self.references.remove(cluster, references);
        }
    }

    /// Sets what was taken out of a cluster's references aside: `page`, which has its count, cannot be read.
    pub(crate) fn set_aside(&mut self, cluster: HostCluster, page: u64) {
        let Some(references) = self.taken.remove(&cluster) else { return };
        self.aside.references.add(cluster.row(1), references);
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
        if self.aside.references.is_empty() {
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
        let references = std::mem::take(&mut self.aside.references);
        match self.waiting.front_mut() {
            _ if references.is_empty() => {}
            Some(first) if first.due == Due::NOW => first.references.merge(references),
            _ => self.waiting.push_front(Batch { references, due: Due::NOW }),
        }
    }

    /// Takes what was taken out and has not been given back: it is to wait again.
    pub(crate) fn take_rest(&mut self) -> BTreeMap<HostCluster, u64> {
        let rest = std::mem::take(&mut self.taken);
        rest.iter().for_each(|(&cluster, &references)| self.references.remove(cluster, references));
        rest
    }

    /// Whether somebody is giving some back.
    pub(crate) fn is_giving_back(&self) -> bool {
        !self.taken.is_empty()
    }

    /// What has to be over before any of it can be given back.
    pub(crate) fn first_due(&self) -> Option<Due> {
        self.waiting.front().map(|batch| batch.due)
    }

    /// Takes out what may be given back, up to `max` clusters, and how many references to each.
    pub(crate) fn take_ready(
        &mut self,
        durable_cut: u64,
        oldest: Epoch,
        max: usize,
    ) -> Vec<(HostCluster, u64)> {
        while let Some(batch) = self.waiting.front_mut()
            && self.taken.len() < max
            && batch.due.cut <= durable_cut
            && batch.due.epoch < oldest
        {
            if let Some((cluster, references)) = batch.references.pop_first() {
                *self.taken.entry(cluster).or_default() += references;
            }
            if batch.references.is_empty() {
                self.waiting.pop_front();
            }
        }
        self.taken.iter().map(|(&cluster, &references)| (cluster, references)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::Epochs;
    use qcow2_format::Clusters;

    /// A cluster of the few before it that has not been given back yet, and how many have not.
    fn left(frees: &Frees, before: u64) -> (Option<u64>, usize) {
        let found = frees.find(&(HostCluster(0)..HostCluster(before)));
        (found.map(|cluster| cluster.0), frees.references.len() as usize)
    }

    #[test]
    fn r5_unmap_is_durable_and_requests_have_ended_before_reuse() {
        let epochs = Epochs::new();
        let lane = epochs.register(1);
        epochs.enter(&lane, 0);
        let mut frees = Frees::new(MAX_BATCHES);
        frees.push(HostCluster(9).row(1), Due { cut: 4, epoch: epochs.advance() });
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
        let mut frees = Frees::new(MAX_BATCHES);
        let epochs = Epochs::new();
        for cluster in [5, 6, 7, 6].map(HostCluster) {
            frees.push(cluster.row(1), Due { cut: 1, epoch: epochs.advance() });
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

    /// Every cluster that was freed while one request hung was an entry of its own, twice: a gibibyte for a
    /// disk of a tebibyte that was discarded meanwhile.
    #[test]
    fn what_waits_for_a_request_that_hangs_takes_memory_by_rows() {
        const EACH: u64 = 64;
        let epochs = Epochs::new();
        let lane = epochs.register(1);
        epochs.enter(&lane, 0);
        let mut frees = Frees::new(MAX_BATCHES);
        let freed = |frees: &mut Frees, cut: u64| {
            let first = HostCluster(cut * EACH);
            // The odd ones, then the even ones.
            for cluster in first.row(EACH).each().filter(|cluster| cluster.0 % 2 == 1) {
                frees.push(cluster.row(1), Due { cut, epoch: epochs.advance() });
            }
            for cluster in first.row(EACH).each().filter(|cluster| cluster.0 % 2 == 0) {
                frees.push(cluster.row(1), Due { cut, epoch: epochs.advance() });
            }
        };
        (1..=1000).for_each(|cut| freed(&mut frees, cut));
        let rows: usize = frees.waiting.iter().map(|batch| batch.references.row_count()).sum();
        assert_eq!((frees.references.row_count(), rows), (1, MAX_BATCHES));
        assert_eq!((frees.len(), frees.first_due().map(|due| due.cut)), (1000 * EACH, Some(937)));
        assert!(frees.take_ready(2000, epochs.oldest(), 8).is_empty(), "it still hangs");
        lane.leave(0);
        let mut taken = 0;
        loop {
            let ready = frees.take_ready(1000, epochs.oldest(), 999);
            ready.iter().for_each(|&(cluster, _)| frees.given_back(cluster));
            taken += ready.len() as u64;
            if ready.is_empty() {
                break;
            }
        }
        assert!(taken == 1000 * EACH && frees.all_given_back() && frees.first_due().is_none());
    }
}
