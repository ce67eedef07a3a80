//! The references to the clusters of one part of a file, in memory of a fixed size: what the search
//! for leaks counts into, where a check keeps a sparse count of everything.

use super::{findings::Owner, survey::Reference};
use qcow2_format::{Clusters, HostCluster};
use std::ops::Range;

/// Clusters that are counted at a time, at the most: 16 MiB of counters, and twice 1 MiB for what is touched
/// or given to somebody meanwhile, for 512 GiB of a file at 64 KiB clusters. A larger file is surveyed several
/// times.
pub(crate) const MAX_WINDOW: u64 = 8 << 20;
/// The counters' upper bit: the active mapping has an entry for the cluster that should say whether
/// it is shared.
const IS_ACTIVE: u16 = 1 << 15;
/// A counter that has reached this counts no further: of its cluster it is not known whether it has leaked.
/// Enough for all compressed clusters that fit into one of 2 MiB, and for tens of thousands of snapshots.
pub(crate) const MANY: u16 = IS_ACTIVE - 1;

/// References to a window of clusters.
pub(crate) struct Window {
    clusters: Range<HostCluster>,
    counters: Vec<u16>,
    /// One more than the highest cluster that anything refers to and the file has to have, inside the window or
    /// not.
    pub(crate) referred_end: HostCluster,
    /// Bytes of the tables that can be referred to once only. In a sound image they lie side by side.
    pub(super) sole_bytes: u64,
}

impl Window {
    pub(crate) fn new(clusters: Range<HostCluster>) -> Self {
        let counters = vec![0; clusters.cluster_count() as usize];
        Self { clusters, counters, referred_end: HostCluster(0), sole_bytes: 0 }
    }

    /// References found to a cluster; `None` where there are [`MANY`] or more.
    pub(crate) fn references(&self, cluster: HostCluster) -> Option<u64> {
        let count = self.counter(cluster) & MANY;
        (count < MANY).then_some(count.into())
    }

    /// Whether the active mapping has an entry for it with a copied flag.
    pub(crate) fn is_active(&self, cluster: HostCluster) -> bool {
        self.counter(cluster) & IS_ACTIVE != 0
    }

    pub(super) fn count(&mut self, reference: &Reference, clusters: Range<HostCluster>, times: u64) {
        let is_shared = match reference.owner {
            Owner::Data | Owner::Compressed => true,
            Owner::L2 => reference.holder == Owner::SnapshotL1,
            _ => false,
        };
        if !is_shared {
            self.sole_bytes = self.sole_bytes.saturating_add(reference.len);
        }
        let needed_end = match reference.owner {
            // Its last sectors need not be there.
            Owner::Compressed => clusters.end.min(clusters.start + 1),
            _ => clusters.end,
        };
        self.referred_end = self.referred_end.max(needed_end);
        let times = u16::try_from(times).unwrap_or(MANY);
        let inside = clusters.start.max(self.clusters.start)..clusters.end.min(self.clusters.end);
        for cluster in inside.each() {
            let counter = &mut self.counters[(cluster - self.clusters.start) as usize];
            let sum = (*counter & MANY).saturating_add(times).min(MANY);
            *counter = *counter & IS_ACTIVE | sum;
        }
    }

    /// Takes note of references to data, if all of it is outside the window; then nothing is to be counted.
    pub(super) fn pass_by(&mut self, clusters: &Range<HostCluster>) -> bool {
        let is_outside = clusters.end <= self.clusters.start || self.clusters.end <= clusters.start;
        if is_outside {
            self.referred_end = self.referred_end.max(clusters.end);
        }
        is_outside
    }

    pub(super) fn mark_active(&mut self, cluster: HostCluster) {
        if self.clusters.contains(&cluster) {
            self.counters[(cluster - self.clusters.start) as usize] |= IS_ACTIVE;
        }
    }

    fn counter(&self, cluster: HostCluster) -> u16 {
        // Beyond the window nothing is known.
        let index = cluster.0.checked_sub(self.clusters.start.0).unwrap_or(u64::MAX);
        self.counters.get(index as usize).copied().unwrap_or(MANY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(clusters: Range<u64>) -> Range<HostCluster> {
        HostCluster(clusters.start)..HostCluster(clusters.end)
    }

    #[test]
    fn counters_stop_at_the_top_and_know_nothing_beyond_the_window() {
        let mut window = Window::new(row(10..20));
        let reference = Reference { holder: Owner::L2, at: 0, owner: Owner::Data, host: 0, len: 1 };
        window.count(&reference, row(8..12), 3);
        window.mark_active(HostCluster(11));
        window.mark_active(HostCluster(25));
        window.count(&reference, row(11..12), u64::MAX);
        window.count(&reference, row(11..12), 5);
        assert_eq!(
            [10, 11, 12, 9, 20].map(|at| window.references(HostCluster(at))),
            [Some(3), None, Some(0), None, None]
        );
        window.count(&reference, row(13..14), 254);
        window.count(&reference, row(13..14), u64::from(MANY) - 255);
        assert_eq!(window.references(HostCluster(13)), Some(u64::from(MANY) - 1));
        window.count(&reference, row(13..14), 1);
        assert_eq!(window.references(HostCluster(13)), None);
        assert!(window.is_active(HostCluster(11)) && !window.is_active(HostCluster(10)));
        window.count(&reference, row(12..13), 1);
        window.mark_active(HostCluster(12));
        assert_eq!((window.references(HostCluster(12)), window.referred_end.0), (Some(1), 14));
    }

    #[test]
    fn what_is_outside_is_passed_by() {
        let mut window = Window::new(row(10..20));
        assert!(window.pass_by(&row(0..10)) && window.pass_by(&row(20..500)) && window.pass_by(&row(0..0)));
        assert_eq!(window.referred_end.0, 500);
        assert!(
            !window.pass_by(&row(5..11)) && !window.pass_by(&row(19..900)) && !window.pass_by(&row(5..900))
        );
        assert_eq!(window.referred_end.0, 500);
    }

    #[test]
    fn what_can_be_referred_to_once_is_summed_up() {
        let mut window = Window::new(row(0..1));
        let mut count = |holder, owner| {
            window.count(&Reference { holder, at: 0, owner, host: 0, len: 100 }, row(0..1), 1);
            window.sole_bytes
        };
        assert_eq!(count(Owner::L2, Owner::Data), 0);
        assert_eq!(count(Owner::SnapshotL1, Owner::L2), 0, "snapshots share tables");
        assert_eq!(count(Owner::ActiveL1, Owner::L2), 100);
        assert_eq!(count(Owner::SnapshotTable, Owner::SnapshotL1), 200);
    }
}
