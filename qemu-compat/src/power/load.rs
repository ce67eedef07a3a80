//! The writer whose power will be cut: random changes, several in flight, and flushes beside them.
//!
//! The sequence follows from its seed alone, so that one who knows the seed and how far it came knows
//! what was issued. Small and overlapping again and again: the interesting thing is metadata.

use crate::{
    content::tagged,
    disk::{Op, SECTOR},
    sequence::Discards,
};
use std::ops::Range;

/// Requests of a batch at most.
const MAX_BATCH: usize = 6;
/// Bytes of a write at most.
const MAX_WRITE: u64 = 128 << 10;

/// An endless sequence of batches.
pub(super) struct Plan {
    rng: fastrand::Rng,
    size: u64,
    cluster: u64,
    discards: Discards,
    /// Of the request before.
    number: u64,
}

impl Plan {
    /// Changes for a disk of this size, whose writes are numbered from `first` on.
    #[must_use]
    pub(super) fn new(size: u64, cluster: u64, discards: Discards, seed: u64, first: u64) -> Self {
        Self { rng: fastrand::Rng::with_seed(seed), size, cluster, discards, number: first }
    }

    /// The next requests. They are in flight together and share no sector, a discard no cluster.
    pub(super) fn batch(&mut self) -> Vec<Op> {
        let mut taken: Vec<Range<u64>> = Vec::new();
        let mut batch = Vec::new();
        // What would overlap is left out: the first one never does.
        for _ in 0..self.rng.usize(1..=MAX_BATCH) {
            let op = self.op();
            let footprint = self.footprint(&op);
            if taken.iter().all(|other| footprint.end <= other.start || other.end <= footprint.start) {
                taken.push(footprint);
                batch.push(op);
            }
        }
        batch
    }

    fn op(&mut self) -> Op {
        self.number += 1;
        match self.rng.u32(0..20) {
            0..=13 => {
                let (at, len) = self.range(MAX_WRITE);
                Op::Write { at, bytes: tagged(at, len, self.number).into() }
            }
            14..=16 => {
                let (at, len) = self.range(4 * self.cluster.max(MAX_WRITE));
                Op::Zero { at, len, unmap: self.rng.bool() }
            }
            _ => {
                let (at, len) = self.range(8 * self.cluster.max(MAX_WRITE));
                match self.discards {
                    Discards::Zero => Op::Discard { at, len },
                    Discards::Unsupported => Op::Zero { at, len, unmap: true },
                }
            }
        }
    }

    /// A range of up to `most` bytes, more often short than long, and more often near the beginning:
    /// the same clusters are to change hands again and again.
    fn range(&mut self, most: u64) -> (u64, u64) {
        let unit = [SECTOR, 4096, self.cluster][self.rng.usize(0..3)];
        let reach = if self.rng.bool() { self.size / 8 } else { self.size };
        let at = self.rng.u64(0..reach) / unit * unit;
        let most = [4 * SECTOR, 4096, self.cluster, most][self.rng.usize(0..4)].min(most);
        let len = self.rng.u64(1..=most).next_multiple_of(unit.min(most));
        (at, len.next_multiple_of(SECTOR).min(self.size - at))
    }

    fn footprint(&self, op: &Op) -> Range<u64> {
        let (at, len) = op.range();
        match op {
            Op::Discard { .. } => at / self.cluster * self.cluster..(at + len).next_multiple_of(self.cluster),
            _ => at..at + len,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_requests_stay_on_the_disk() {
        let size = (8 << 20) + 512;
        let plan = |seed| Plan::new(size, 4096, Discards::Zero, seed, 1);
        let (mut one, mut same) = (plan(5), plan(5));
        let mut changes = 0;
        for _ in 0..500 {
            let batch = one.batch();
            assert_eq!(format!("{batch:?}"), format!("{:?}", same.batch()));
            for op in &batch {
                let (at, len) = op.range();
                assert!(len > 0 && at + len <= size, "{op:?}");
                assert!(at.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR), "{op:?}");
            }
            changes += batch.len();
        }
        assert!(changes > 1000, "{changes} changes in 500 batches");
    }
}
