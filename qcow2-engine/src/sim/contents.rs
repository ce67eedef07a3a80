//! The bytes of a file, with a hash that follows each change without reading all of them again.

use super::file::{Change, SECTOR};
use std::ops::Range;

/// Bytes that changes are made to and taken back from.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    bytes: Vec<u8>,
    /// Of each sector.
    sums: Vec<u64>,
    /// All sums together.
    hash: u64,
}

/// What a change has overwritten.
#[derive(Debug)]
pub(super) struct Undo {
    at: usize,
    old: Vec<u8>,
    /// The length of the file before.
    len: usize,
}

impl Contents {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        let len = bytes.len();
        let mut contents = Self { bytes, sums: Vec::new(), hash: 0 };
        contents.sum_up(0..len);
        contents
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Tells them from others.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.hash
    }

    pub(super) fn apply(&mut self, change: &Change) -> Undo {
        let len = self.bytes.len();
        let reach = change.reach(len);
        let old = self.bytes[reach.start.min(len)..reach.end.min(len)].to_vec();
        change.apply(&mut self.bytes);
        self.sum_up(reach.start..reach.end);
        Undo { at: reach.start, old, len }
    }

    /// Takes back the last change that was not taken back.
    pub(super) fn undo(&mut self, undo: Undo) {
        let changed = undo.at..undo.at + undo.old.len();
        self.bytes.resize(undo.len, 0);
        self.bytes[changed.clone()].copy_from_slice(&undo.old);
        self.sum_up(changed);
    }

    /// These bytes, or the length, have changed.
    fn sum_up(&mut self, changed: Range<usize>) {
        let present = self.sums.len();
        let sectors = self.bytes.len().div_ceil(SECTOR);
        self.sums.drain(sectors.min(present)..).for_each(|sum| self.hash ^= sum);
        self.sums.resize(sectors, 0);
        let first = (changed.start / SECTOR).min(present);
        let end = changed.end.div_ceil(SECTOR).max(if present < sectors { sectors } else { 0 });
        for sector in first..end.min(sectors) {
            let sum = sum(sector, &self.bytes[sector * SECTOR..self.bytes.len().min((sector + 1) * SECTOR)]);
            self.hash ^= sum ^ std::mem::replace(&mut self.sums[sector], sum);
        }
    }
}

/// A sector's part in the hash of the file, if it has whole words: eight interleaved lanes of a
/// multiplicative hash.
pub(super) fn sum(sector: usize, bytes: &[u8]) -> u64 {
    let mut lanes = [0_u64; 8];
    for chunk in bytes.chunks(64) {
        for (lane, word) in lanes.iter_mut().zip(chunk.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
            *lane = (*lane ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
        }
    }
    lanes.into_iter().fold(sector as u64 ^ (bytes.len() as u64) << 48, |sum, lane| {
        (sum ^ lane).wrapping_mul(0xD6E8_FEB8_6659_FD93).rotate_left(32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_can_be_made_and_taken_back_in_any_number() {
        let write = |at: u64, byte: u8, len: usize| Change::Write { at, bytes: vec![byte; len].into() };
        let changes = [
            write(100, 1, 700),
            Change::Length(1000),
            write(2000, 2, 600),
            Change::Extend { from: 0, end: 5000 },
            Change::Punch { at: 512, len: 9999 },
            Change::Extend { from: 0, end: 300 },
            Change::Length(2048),
        ];
        let durable = vec![7; 1536];
        let mut contents = Contents::new(durable.clone());
        for subset in 0..1_u32 << changes.len() {
            let kept = changes.iter().enumerate().filter(|(index, _)| subset & (1 << index) != 0);
            let mut anew = durable.clone();
            let mut undos = Vec::new();
            for (_, change) in kept {
                change.apply(&mut anew);
                undos.push(contents.apply(change));
            }
            assert_eq!(contents.bytes, anew, "{subset:b}");
            assert_eq!(contents.hash, Contents::new(anew.clone()).hash, "{subset:b}");
            undos.into_iter().rev().for_each(|undo| contents.undo(undo));
        }
        assert_eq!(contents.hash, Contents::new(durable.clone()).hash);
        assert_eq!(contents.bytes, durable);
    }
}
