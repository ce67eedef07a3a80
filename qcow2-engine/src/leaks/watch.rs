//! Which clusters have changed hands since the search for leaks took its window up.
//!
//! Part of the metadata: whoever counts a cluster, lets go of one or puts one into an extent says
//! so here, under the metadata lock, in the same step. What was touched is out of the search's
//! reach. Without a search the window is empty and a touch is one comparison.

use crate::{
    alloc::rows::Rows,
    order::rules::{Disabled, RuleName},
};
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
    /// References that are gone from the mapping since their counting began, and since it ended.
    gone_meanwhile: Rows,
    gone_afterwards: Rows,
    counting: Counting,
    /// It is no longer known who uses what.
    is_blind: bool,
    disabled: Disabled,
}

/// Whether the references to the window's clusters have been counted.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Counting {
    #[default]
    NotYet,
    Now,
    Done,
}

/// How many references to a cluster are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gone {
    /// While references were counted: these were or were not.
    pub(crate) meanwhile: u64,
    /// When they had been, and these too.
    pub(crate) afterwards: u64,
}

impl Watch {
    /// Takes a window up; none of its clusters has been touched yet.
    pub(crate) fn begin(&mut self, window: Range<HostCluster>) {
        // Takes memory where it is touched.
        let words = window.cluster_count().div_ceil(64) as usize;
        (self.touched, self.fresh) = (vec![0; words], vec![0; words]);
        self.set_counting(Counting::NotYet);
        self.window = window;
    }

    /// Puts the window down.
    pub(crate) fn end(&mut self) {
        (self.window, self.touched, self.fresh) = (Range::default(), Vec::new(), Vec::new());
        self.set_counting(Counting::NotYet);
    }

    /// What is unmapped by now will not be counted: a cut comes first.
    pub(crate) fn begin_counting(&mut self) {
        self.set_counting(Counting::Now);
    }

    /// What is mapped now has been counted, if it was before.
    pub(crate) fn end_counting(&mut self) {
        self.counting = Counting::Done;
    }

    fn set_counting(&mut self, counting: Counting) {
        (self.gone_meanwhile, self.gone_afterwards) = Default::default();
        self.counting = counting;
    }

    /// The counts of these clusters change.
    pub(crate) fn counted(&mut self, clusters: Range<HostCluster>) {
        self.touch(RuleName::CountedIsNoLeak, clusters);
    }

    /// The mapping has let go of these clusters.
    pub(crate) fn unmapped(&mut self, clusters: Range<HostCluster>) {
        self.going(clusters.clone());
        let Range { start, end } = self.window;
        let inside = clusters.start.max(start)..clusters.end.min(end);
        match self.counting {
            _ if inside.is_empty() => {}
            Counting::NotYet => {}
            Counting::Now => self.gone_meanwhile.add(inside, 1),
            Counting::Done => self.gone_afterwards.add(inside, 1),
        }
    }

    /// It had let go of these before, and they wait to be freed.
    pub(crate) fn going(&mut self, clusters: Range<HostCluster>) {
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

    /// How many references to a cluster of the window are gone since their counting began.
    pub(crate) fn gone(&self, cluster: HostCluster) -> Gone {
        Gone {
            meanwhile: self.gone_meanwhile.times(cluster),
            afterwards: self.gone_afterwards.times(cluster),
        }
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
        let gone = |watch: &Watch| {
            [163, 164, 165, 300]
                .map(|at| watch.gone(HostCluster(at)))
                .map(|gone| (gone.meanwhile, gone.afterwards))
        };
        assert_eq!(gone(&watch), [(0, 0); 4], "what was unmapped before is not counted");
        watch.begin_counting();
        watch.unmapped(row(164, 166));
        watch.end_counting();
        watch.unmapped(row(165, 400));
        watch.going(row(165, 166));
        assert_eq!(gone(&watch), [(0, 0), (1, 0), (1, 1), (0, 0)]);
        watch.begin(row(100, 230));
        assert!(!watch.is_touched(HostCluster(100)), "a new window begins untouched");
        assert_eq!(gone(&watch), [(0, 0); 4]);
        watch.go_blind();
        assert!(watch.is_touched(HostCluster(100)));
        watch.end();
        assert!(watch.is_touched(HostCluster(100)));
    }
}
