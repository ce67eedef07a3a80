//! Host clusters, each any number of times, kept as rows of those that are there equally often: what is
//! freed lies in rows mostly, and a discarded disk is one, in whatever order its clusters come.
//!
//! Pure; memory follows the rows, not the clusters.

use qcow2_format::{Clusters, HostCluster};
use std::{collections::BTreeMap, ops::Range};

/// A multiset of clusters.
#[derive(Default)]
pub(crate) struct Rows {
    /// First cluster → the rest of its row. Rows are apart from each other, or differ in their times.
    rows: BTreeMap<HostCluster, Row>,
    /// Clusters, each as often as it is there.
    len: u64,
}

#[derive(Clone, Copy)]
struct Row {
    end: HostCluster,
    /// How often each of its clusters is there.
    times: u64,
}

impl Rows {
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Clusters, each as often as it is there.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// How often a cluster is there.
    pub(crate) fn times(&self, cluster: HostCluster) -> u64 {
        self.within(cluster.row(1)).map(|(_, times)| times).sum()
    }

    /// Each of these clusters is there so many times more.
    pub(crate) fn add(&mut self, clusters: Range<HostCluster>, times: u64) {
        self.len += clusters.cluster_count() * times;
        self.split(clusters.start);
        self.split(clusters.end);
        let Range { start: mut next, end } = clusters;
        while next < end {
            let row = self.rows.range_mut(next..end).next();
            match row {
                Some((&first, row)) if first == next => {
                    row.times += times;
                    next = row.end;
                }
                other => {
                    let gap_end = other.map_or(end, |(&first, _)| first);
                    self.rows.insert(next, Row { end: gap_end, times });
                    next = gap_end;
                }
            }
        }
        self.join(&clusters);
    }

    /// A cluster is there so many times less, or not at all any more.
    pub(crate) fn remove(&mut self, cluster: HostCluster, times: u64) {
        self.split(cluster);
        self.split(cluster + 1);
        let Some(row) = self.rows.get_mut(&cluster) else { return };
        let gone = times.min(row.times);
        row.times -= gone;
        self.len -= gone;
        if row.times == 0 {
            self.rows.remove(&cluster);
        }
        self.join(&cluster.row(1));
    }

    /// Takes the first cluster out, and says how often it was there.
    pub(crate) fn pop_first(&mut self) -> Option<(HostCluster, u64)> {
        let (first, row) = self.rows.pop_first()?;
        if first + 1 < row.end {
            self.rows.insert(first + 1, row);
        }
        self.len -= row.times;
        Some((first, row.times))
    }

    /// All that is in `other` is in this one, too.
    pub(crate) fn merge(&mut self, other: Self) {
        for (start, Row { end, times }) in other.rows {
            self.add(start..end, times);
        }
    }

    /// What of these clusters is there: rows, and how often.
    pub(crate) fn within(
        &self,
        clusters: Range<HostCluster>,
    ) -> impl Iterator<Item = (Range<HostCluster>, u64)> + '_ {
        let Range { start, end } = clusters;
        let before = self.rows.range(..start).next_back();
        let rows = before.into_iter().chain(self.rows.range(start..end.max(start)));
        rows.map(move |(&first, row)| (first.max(start)..row.end.min(end), row.times))
            .filter(|(row, _)| !row.is_empty())
    }

    /// Has a row begin at `at`, if one goes across it.
    fn split(&mut self, at: HostCluster) {
        if let Some((_, row)) = self.rows.range_mut(..at).next_back()
            && at < row.end
        {
            let rest = *row;
            row.end = at;
            self.rows.insert(at, rest);
        }
    }

    /// Joins the rows in and around `clusters` that are one.
    fn join(&mut self, clusters: &Range<HostCluster>) {
        let before = self.rows.range(..clusters.start).next_back();
        let mut first = before.map_or(clusters.start, |(&first, _)| first);
        while let Some(&Row { end, times }) = self.rows.get(&first) {
            match self.rows.get(&end) {
                Some(&next) if next.times == times && end <= clusters.end => {
                    self.rows.remove(&end);
                    self.rows.insert(first, next);
                }
                _ => match self.rows.range(end..=clusters.end.max(end)).next() {
                    Some((&next, _)) if next <= clusters.end => first = next,
                    _ => return,
                },
            }
        }
    }

    /// How many rows take memory.
    #[cfg(test)]
    pub(crate) fn row_count(&self) -> usize {
        self.rows.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As it must be: a count for each cluster.
    fn expected(counts: &[u64]) -> Vec<(Range<HostCluster>, u64)> {
        let mut rows: Vec<(Range<HostCluster>, u64)> = Vec::new();
        for (cluster, &times) in (0..).map(HostCluster).zip(counts).filter(|(_, times)| **times > 0) {
            match rows.last_mut() {
                Some((row, last)) if row.end == cluster && *last == times => row.end = cluster + 1,
                _ => rows.push((cluster.row(1), times)),
            }
        }
        rows
    }

    #[test]
    fn rows_are_as_long_as_they_can_be_and_forget_nothing() {
        let mut rng = fastrand::Rng::with_seed(7);
        let (mut rows, mut counts) = (Rows::default(), [0_u64; 40]);
        let all = HostCluster(0)..HostCluster(40);
        for _ in 0..20_000 {
            let start = rng.u64(0..40);
            let row = HostCluster(start)..HostCluster(rng.u64(start..=40).min(start + 9));
            match rng.u8(0..8) {
                0..3 => {
                    let times = rng.u64(1..3);
                    rows.add(row.clone(), times);
                    row.each().for_each(|cluster| counts[cluster.0 as usize] += times);
                }
                3..7 => {
                    let times = rng.u64(1..4);
                    rows.remove(HostCluster(start), times);
                    let count = &mut counts[start as usize];
                    *count = count.saturating_sub(times);
                }
                _ => {
                    let first = counts.iter().position(|&times| times > 0);
                    let popped = first.map(|at| (HostCluster(at as u64), std::mem::take(&mut counts[at])));
                    assert_eq!(rows.pop_first(), popped);
                }
            }
            assert_eq!(rows.times(HostCluster(start)), counts.get(start as usize).copied().unwrap_or(0));
            assert_eq!(rows.within(all.clone()).collect::<Vec<_>>(), expected(&counts));
            assert_eq!((rows.len(), rows.is_empty()), (counts.iter().sum(), counts == [0; 40]));
            let inside: Vec<_> = rows.within(HostCluster(10)..HostCluster(20)).collect();
            let mut others = counts;
            (0..10).chain(20..40).for_each(|at| others[at] = 0);
            assert_eq!(inside, expected(&others));
        }
    }

    #[test]
    fn what_comes_in_any_order_ends_as_one_row() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut clusters: Vec<_> = (0..1000).map(HostCluster).collect();
        rng.shuffle(&mut clusters);
        let (mut one, mut other) = (Rows::default(), Rows::default());
        for (index, &cluster) in clusters.iter().enumerate() {
            if index % 2 == 0 { &mut one } else { &mut other }.add(cluster.row(1), 1);
        }
        one.merge(other);
        assert_eq!((one.row_count(), one.len()), (1, 1000));
    }
}
