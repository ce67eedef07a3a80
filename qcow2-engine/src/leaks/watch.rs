//! Which clusters have changed hands since the search for leaks took its window up.
//!
//! Part of the metadata: whoever counts a cluster, lets go of one or puts one into an extent says
//! so here, under the metadata lock, in the same step. What was touched is out of the search's
//! reach. Without a search the window is empty and a touch is one comparison.

use crate::order::rules::RuleName;
use std::ops::Range;

/// The clusters under consideration, and those of them that have been touched.
#[derive(Default)]
pub(crate) struct Watch {
    window: Range<u64>,
    /// A bit per cluster of the window.
    touched: Vec<u64>,
    /// It is no longer known who uses what.
    is_blind: bool,
    /// The touch that a mutation check has switched off.
    disabled: Option<RuleName>,
}

impl Watch {
    /// Takes a window up; none of its clusters has been touched yet.
    pub(crate) fn begin(&mut self, window: Range<u64>) {
        // Takes memory where it is touched.
        self.touched = vec![0; (window.end - window.start).div_ceil(64) as usize];
        self.window = window;
    }

    /// Puts the window down.
    pub(crate) fn end(&mut self) {
        (self.window, self.touched) = (0..0, Vec::new());
    }

    /// The counts of these clusters change.
    pub(crate) fn counted(&mut self, clusters: Range<u64>) {
        self.touch(RuleName::CountedIsNoLeak, clusters);
    }

    /// The mapping has let go of these clusters.
    pub(crate) fn unmapped(&mut self, clusters: Range<u64>) {
        self.touch(RuleName::UnmappedIsNoLeak, clusters);
    }

    /// These clusters are in a lane's extent, and the next ones to be referred to.
    pub(crate) fn reserved(&mut self, clusters: Range<u64>) {
        self.touch(RuleName::ReservedIsNoLeak, clusters);
    }

    /// Switches a touch off, for the mutation check.
    #[cfg(feature = "sim")]
    pub(crate) fn disable(&mut self, rule: RuleName) {
        self.disabled = Some(rule);
    }

    /// What refers to these clusters, or may come to refer to them, has changed.
    fn touch(&mut self, rule: RuleName, clusters: Range<u64>) {
        if self.disabled == Some(rule) {
            return;
        }
        let inside = clusters.start.max(self.window.start)..clusters.end.min(self.window.end);
        for index in inside.map(|cluster| cluster - self.window.start) {
            self.touched[index as usize / 64] |= 1 << (index % 64);
        }
    }

    /// From now on until the image is opened again, everything counts as touched.
    pub(crate) fn go_blind(&mut self) {
        self.is_blind = true;
    }

    /// Whether a cluster was touched, or is not watched.
    pub(crate) fn is_touched(&self, cluster: u64) -> bool {
        let index = cluster.wrapping_sub(self.window.start);
        self.is_blind
            || !self.window.contains(&cluster)
            || self.touched[index as usize / 64] & (1 << (index % 64)) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_not_touched_inside_the_window_is_free_to_be_judged() {
        let mut watch = Watch::default();
        watch.counted(0..1000);
        assert!(watch.is_touched(7), "nothing is watched");
        watch.begin(100..230);
        watch.counted(90..101);
        watch.unmapped(164..166);
        watch.reserved(229..400);
        let untouched: Vec<_> = (0..500).filter(|&cluster| !watch.is_touched(cluster)).collect();
        let expected: Vec<_> = (101..164).chain(166..229).collect();
        assert_eq!(untouched, expected);
        watch.begin(100..230);
        assert!(!watch.is_touched(100), "a new window begins untouched");
        watch.go_blind();
        assert!(watch.is_touched(100));
        watch.end();
        assert!(watch.is_touched(100));
    }
}
