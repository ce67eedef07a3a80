//! Which clusters have changed hands since the search for leaks took its window up.
//!
//! Part of the metadata: whoever counts a cluster, lets go of one or puts one into an extent says
//! so here, under the metadata lock, in the same step. What was touched is out of the search's
//! reach. Without a search the window is empty and a touch is one comparison.

use crate::order::rules::{Disabled, RuleName};
use qcow2_format::{Clusters, HostCluster};
use std::ops::Range;

/// The clusters under consideration, and those of them that have been touched.
#[derive(Default)]
pub(crate) struct Watch {
    window: Range<HostCluster>,
    /// A bit per cluster of the window.
    touched: Vec<u64>,
    /// Those to which something may come to refer that was not there when the references were counted.
    fresh: Vec<u64>,
    /// It is no longer known who uses what.
    is_blind: bool,
    disabled: Disabled,
}

impl Watch {
    /// Takes a window up; none of its clusters has been touched yet.
    pub(crate) fn begin(&mut self, window: Range<HostCluster>) {
        // Takes memory where it is touched.
        let words = window.cluster_count().div_ceil(64) as usize;
        (self.touched, self.fresh) = (vec![0; words], vec![0; words]);
        self.window = window;
    }

    /// Puts the window down.
    pub(crate) fn end(&mut self) {
        (self.window, self.touched, self.fresh) = (Range::default(), Vec::new(), Vec::new());
    }

    /// The counts of these clusters change.
    pub(crate) fn counted(&mut self, clusters: Range<HostCluster>) {
        self.touch(RuleName::CountedIsNoLeak, clusters);
    }

    /// The mapping has let go of these clusters.
    pub(crate) fn unmapped(&mut self, clusters: Range<HostCluster>) {
        self.touch(RuleName::UnmappedIsNoLeak, clusters);
    }

    /// These clusters are in a lane's extent, and the next ones to be referred to.
    pub(crate) fn reserved(&mut self, clusters: Range<HostCluster>) {
        self.touch(RuleName::ReservedIsNoLeak, clusters.clone());
        self.allocated(clusters);
    }

    /// These clusters were free, and are somebody's now.
    pub(crate) fn allocated(&mut self, clusters: Range<HostCluster>) {
        let inside = self.inside(clusters);
        mark(&mut self.fresh, inside);
    }

    /// Switches a touch off, for the mutation check.
    #[cfg(feature = "sim")]
    pub(crate) fn disable(&mut self, rule: RuleName) {
        self.disabled.set(rule);
    }

    /// What refers to these clusters, or may come to refer to them, has changed.
    fn touch(&mut self, rule: RuleName, clusters: Range<HostCluster>) {
        if self.disabled.is(rule) {
            return;
        }
        let inside = self.inside(clusters);
        mark(&mut self.touched, inside);
    }

    /// Which bits of the window these have.
    fn inside(&self, clusters: Range<HostCluster>) -> Range<u64> {
        let Range { start, end } = self.window;
        clusters.start.max(start) - start..clusters.end.clamp(start, end) - start
    }

    /// From now on until the image is opened again, everything counts as touched.
    pub(crate) fn go_blind(&mut self) {
        self.is_blind = true;
    }

    /// Whether a cluster was touched, or is not watched.
    pub(crate) fn is_touched(&self, cluster: HostCluster) -> bool {
        self.is_blind
            || !self.window.contains(&cluster)
            || is_marked(&self.touched, cluster - self.window.start)
    }

    /// Whether a cluster of the window was free, or in an extent, at some time since.
    pub(crate) fn is_fresh(&self, cluster: HostCluster) -> bool {
        is_marked(&self.fresh, cluster - self.window.start)
    }
}

fn mark(bits: &mut [u64], indices: Range<u64>) {
    indices.for_each(|index| bits[index as usize / 64] |= 1 << (index % 64));
}

fn is_marked(bits: &[u64], index: u64) -> bool {
    bits[index as usize / 64] & (1 << (index % 64)) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r8_what_changes_hands_is_touched() {
        let row = |start, end| HostCluster(start)..HostCluster(end);
        let mut watch = Watch::default();
        watch.counted(row(0, 1000));
        assert!(watch.is_touched(HostCluster(7)), "nothing is watched");
        watch.begin(row(100, 230));
        watch.counted(row(90, 101));
        watch.unmapped(row(164, 166));
        watch.reserved(row(229, 400));
        let untouched: Vec<_> = (0..500).filter(|&cluster| !watch.is_touched(HostCluster(cluster))).collect();
        let expected: Vec<_> = (101..164).chain(166..229).collect();
        assert_eq!(untouched, expected);
        watch.allocated(row(120, 121));
        watch.allocated(row(300, 301));
        let fresh: Vec<_> = (100..230).filter(|&cluster| watch.is_fresh(HostCluster(cluster))).collect();
        assert_eq!(fresh, [120, 229], "what was unmapped or counted was somebody's before");
        watch.begin(row(100, 230));
        assert!(!watch.is_touched(HostCluster(100)), "a new window begins untouched");
        watch.go_blind();
        assert!(watch.is_touched(HostCluster(100)));
        watch.end();
        assert!(watch.is_touched(HostCluster(100)));
    }
}
