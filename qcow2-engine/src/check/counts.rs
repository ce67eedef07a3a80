//! How often each cluster is referred to, and what it is: sparse, so that memory follows what is
//! really referred to and not what an image claims.

use std::collections::HashMap;

/// Clusters of a chunk. A refcount block counts a whole number of chunks, because the smallest
/// counts 64 clusters. Small, so that scattered references cost little more than their entries.
pub(crate) const CHUNK: u64 = 64;
/// A count in a chunk that stands for one in `large`.
const IN_LARGE: u8 = u8::MAX;

/// A small number per cluster; 0 where nothing was said.
#[derive(Default)]
pub(super) struct Bytes(HashMap<u64, [u8; CHUNK as usize]>);

impl Bytes {
    pub(super) fn get(&self, cluster: u64) -> u8 {
        self.0.get(&(cluster / CHUNK)).map_or(0, |chunk| chunk[(cluster % CHUNK) as usize])
    }

    pub(super) fn set(&mut self, cluster: u64, value: u8) {
        let chunk = self.0.entry(cluster / CHUNK).or_insert([0; CHUNK as usize]);
        chunk[(cluster % CHUNK) as usize] = value;
    }
}

/// A count per cluster.
#[derive(Default)]
pub(super) struct Counts {
    small: Bytes,
    large: HashMap<u64, u64>,
}

impl Counts {
    pub(super) fn get(&self, cluster: u64) -> u64 {
        match self.small.get(cluster) {
            IN_LARGE => self.large.get(&cluster).copied().unwrap_or(0),
            small => small.into(),
        }
    }

    pub(super) fn add(&mut self, cluster: u64, references: u64) {
        self.set(cluster, self.get(cluster).saturating_add(references));
    }

    pub(super) fn set(&mut self, cluster: u64, count: u64) {
        match u8::try_from(count) {
            Ok(small) if small < IN_LARGE => self.small.set(cluster, small),
            _ => {
                self.small.set(cluster, IN_LARGE);
                self.large.insert(cluster, count);
            }
        }
    }

    /// The first of `len` clusters in a row, all of them before `end`, that have no count.
    pub(super) fn unused_row(&self, len: u64, end: u64) -> Option<u64> {
        let mut first = 0;
        for chunk in self.chunks() {
            for cluster in chunk * CHUNK..(chunk + 1) * CHUNK {
                if cluster.min(end).saturating_sub(first) >= len {
                    return Some(first);
                }
                if self.get(cluster) > 0 {
                    first = cluster + 1;
                }
            }
        }
        (end.saturating_sub(first) >= len).then_some(first)
    }

    /// Whether any cluster of a chunk may have a count.
    pub(super) fn has_chunk(&self, chunk: u64) -> bool {
        self.small.0.contains_key(&chunk)
    }

    /// The chunks in which clusters may have counts, in ascending order.
    pub(super) fn chunks(&self) -> Vec<u64> {
        let mut chunks: Vec<_> = self.small.0.keys().copied().collect();
        chunks.sort_unstable();
        chunks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_without_counts_are_found_between_chunks_and_inside_them() {
        let mut counts = Counts::default();
        assert_eq!((counts.unused_row(5, 5), counts.unused_row(5, 4)), (Some(0), None));
        for cluster in [0, 1, 4, 10, 3 * CHUNK, 3 * CHUNK + 5] {
            counts.add(cluster, 1);
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
            assert_eq!(counts.unused_row(len, end), row, "{len} before {end}");
        }
        counts.set(2, 0);
        assert_eq!(counts.unused_row(2, 4), Some(2));
    }

    #[test]
    fn counts_of_any_size_are_kept_apart() {
        let mut counts = Counts::default();
        counts.add(5, 1);
        counts.add(5, 253);
        assert_eq!(counts.get(5), 254);
        counts.add(5, 1);
        counts.add(5, 1 << 40);
        assert_eq!((counts.get(5), counts.get(6)), ((1 << 40) + 255, 0));
        counts.add(1 << 50, 2);
        assert_eq!(counts.chunks(), [0, (1 << 50) / CHUNK]);
        counts.set(5, 3);
        assert_eq!(counts.get(5), 3);
    }
}
