//! How often each cluster is referred to, and what it is: sparse, so that memory follows what is
//! really referred to and not what an image claims.

use super::findings::Owner;
use qcow2_format::{Clusters, HostCluster};
use std::{collections::HashMap, ops::Range};

/// Clusters of a chunk. A refcount block counts a whole number of chunks, because the smallest
/// counts 64 clusters. Small, so that scattered references cost little more than their entries.
pub(crate) const CHUNK: u64 = 64;
/// A count in a chunk that stands for one in `large`.
const IN_LARGE: u8 = u8::MAX;

/// The references that a survey has found: how many there are to each cluster, and what a cluster is that is
/// metadata. By whom it is referred to is not kept.
#[derive(Default)]
pub(super) struct Tally {
    references: Counts,
    /// [`Owner`] of each cluster of metadata.
    owners: Bytes,
}

impl Tally {
    /// References to a cluster.
    pub(super) fn references(&self, cluster: HostCluster) -> u64 {
        self.references.get(cluster)
    }

    pub(super) fn add(&mut self, cluster: HostCluster, times: u64) {
        self.references.add(cluster, times);
    }

    /// A reference is gone.
    pub(super) fn take_back(&mut self, cluster: HostCluster) {
        self.references.set(cluster, self.references.get(cluster).saturating_sub(1));
    }

    /// The metadata that a cluster is.
    pub(super) fn metadata(&self, cluster: HostCluster) -> Option<Owner> {
        Owner::metadata(self.owners.get(cluster))
    }

    pub(super) fn set_metadata(&mut self, cluster: HostCluster, owner: Owner) {
        self.owners.set(cluster, owner as u8);
    }

    /// The first of `len` clusters in a row, all of them before `end`, that have no reference.
    pub(super) fn unused_row(&self, len: u64, end: HostCluster) -> Option<HostCluster> {
        self.references.unused_row(len, end)
    }

    /// Whether any cluster of the chunk that begins here may have references.
    pub(super) fn has_chunk(&self, first: HostCluster) -> bool {
        self.references.small.0.contains_key(&chunk_of(first))
    }

    /// One more than the last cluster that has a reference.
    pub(super) fn end(&self) -> HostCluster {
        self.references.end()
    }

    /// The chunks in which clusters may have references, in ascending order.
    pub(super) fn chunks(&self) -> Vec<Range<HostCluster>> {
        self.references.chunks()
    }
}

/// A small number per cluster; 0 where nothing was said.
#[derive(Default)]
struct Bytes(HashMap<u64, [u8; CHUNK as usize]>);

fn chunk_of(cluster: HostCluster) -> u64 {
    cluster.0 / CHUNK
}

fn in_chunk(cluster: HostCluster) -> usize {
    (cluster.0 % CHUNK) as usize
}

impl Bytes {
    fn get(&self, cluster: HostCluster) -> u8 {
        self.0.get(&chunk_of(cluster)).map_or(0, |chunk| chunk[in_chunk(cluster)])
    }

    fn set(&mut self, cluster: HostCluster, value: u8) {
        let chunk = self.0.entry(chunk_of(cluster)).or_insert([0; CHUNK as usize]);
        chunk[in_chunk(cluster)] = value;
    }
}

/// A count per cluster.
#[derive(Default)]
struct Counts {
    small: Bytes,
    large: HashMap<HostCluster, u64>,
}

impl Counts {
    fn get(&self, cluster: HostCluster) -> u64 {
        match self.small.get(cluster) {
            IN_LARGE => self.large.get(&cluster).copied().unwrap_or(0),
            small => small.into(),
        }
    }

    fn add(&mut self, cluster: HostCluster, times: u64) {
        self.set(cluster, self.get(cluster).saturating_add(times));
    }

    fn set(&mut self, cluster: HostCluster, count: u64) {
        match u8::try_from(count) {
            Ok(small) if small < IN_LARGE => self.small.set(cluster, small),
            _ => {
                self.small.set(cluster, IN_LARGE);
                self.large.insert(cluster, count);
            }
        }
    }

    fn unused_row(&self, len: u64, end: HostCluster) -> Option<HostCluster> {
        let mut first = HostCluster(0);
        for cluster in self.chunks().into_iter().flat_map(Clusters::each) {
            if (first..cluster.min(end)).cluster_count() >= len {
                return Some(first);
            }
            if self.get(cluster) > 0 {
                first = cluster + 1;
            }
        }
        ((first..end).cluster_count() >= len).then_some(first)
    }

    fn end(&self) -> HostCluster {
        // A chunk may have none any more.
        let mut downwards = self.chunks().into_iter().rev().flat_map(|chunk| chunk.each().rev());
        downwards.find(|&cluster| self.get(cluster) > 0).map_or(HostCluster(0), |last| last + 1)
    }

    fn chunks(&self) -> Vec<Range<HostCluster>> {
        let mut chunks: Vec<_> = self.small.0.keys().copied().collect();
        chunks.sort_unstable();
        chunks.into_iter().map(|chunk| HostCluster(chunk * CHUNK).row(CHUNK)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_without_counts_are_found_between_chunks_and_inside_them() {
        let mut counts = Counts::default();
        let unused_row =
            |counts: &Counts, len, end| counts.unused_row(len, HostCluster(end)).map(|first| first.0);
        assert_eq!((unused_row(&counts, 5, 5), unused_row(&counts, 5, 4)), (Some(0), None));
        for cluster in [0, 1, 4, 10, 3 * CHUNK, 3 * CHUNK + 5] {
            counts.add(HostCluster(cluster), 1);
        }
        for (len, end, row) in [
            (2, 100, Some(2)),
            (3, 100, Some(5)),
            (5, 10, Some(5)),
            (5, 9, None),
            (6, 17, Some(11)),
            (3 * CHUNK - 11, 1000, Some(11)),
            (3 * CHUNK - 10, 1000, Some(3 * CHUNK + 6)),
            (1, 2, None),
            (1, 3, Some(2)),
            (1, 0, None),
        ] {
            assert_eq!(unused_row(&counts, len, end), row, "{len} before {end}");
        }
        counts.set(HostCluster(2), 0);
        assert_eq!(unused_row(&counts, 2, 4), Some(2));
    }

    #[test]
    fn counts_of_any_size_are_kept_apart() {
        let mut counts = Counts::default();
        counts.add(HostCluster(5), 1);
        counts.add(HostCluster(5), 253);
        assert_eq!(counts.get(HostCluster(5)), 254);
        counts.add(HostCluster(5), 1);
        counts.add(HostCluster(5), 1 << 40);
        assert_eq!((counts.get(HostCluster(5)), counts.get(HostCluster(6))), ((1 << 40) + 255, 0));
        counts.add(HostCluster(1 << 50), 2);
        assert_eq!(counts.chunks(), [0, 1 << 50].map(|first| HostCluster(first).row(CHUNK)));
        assert_eq!(counts.end(), HostCluster((1 << 50) + 1));
        counts.set(HostCluster(1 << 50), 0);
        assert_eq!(counts.end(), HostCluster(6));
        counts.set(HostCluster(5), 3);
        assert_eq!(counts.get(HostCluster(5)), 3);
    }
}
