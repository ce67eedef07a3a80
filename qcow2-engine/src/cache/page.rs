//! A part of a table as it lies in the file, read once.
//!
//! Most slices that are read turn out to be a run. So the bytes are compared with the run that the first
//! and the last entry promise before anything is decoded: in the file's byte order, a sector at a time
//! and without a branch, which costs an instruction or two for each entry.

use super::directory::Run;
use crate::io::Buf;
use std::sync::atomic::{AtomicU64, Ordering};

/// Entries of a sector.
const WORDS: usize = 64;
const SECTOR: usize = WORDS * size_of::<u64>();

/// A sector's entries as they lie there.
type Words = [[u8; size_of::<u64>()]; WORDS];

/// Big-endian entries, whole sectors of them.
pub(crate) struct TablePage<'a>(Bytes<'a>);

enum Bytes<'a> {
    InBuf(&'a Buf),
    Plain(&'a [u8]),
}

impl<'a> TablePage<'a> {
    /// The entries in a buffer. It is whole sectors long.
    pub(crate) fn in_buf(buf: &'a Buf) -> Self {
        debug_assert!(!buf.is_empty() && buf.len().is_multiple_of(SECTOR), "{buf:?}");
        Self(Bytes::InBuf(buf))
    }

    /// The entries in some bytes, which are whole sectors.
    pub(crate) fn of(bytes: &'a [u8]) -> Self {
        debug_assert!(!bytes.is_empty() && bytes.len().is_multiple_of(SECTOR), "{} bytes", bytes.len());
        Self(Bytes::Plain(bytes))
    }

    /// The run that the entries are, if they are one.
    pub(crate) fn run(&self, step: u64) -> Option<Run> {
        let count = self.sectors() * WORDS;
        let run = Run::through(self.entry(0), self.entry(count - 1), count, step)?;
        let mut words = [[0; 8]; WORDS];
        let is_run = |sector| {
            self.copy_sector(sector, &mut words);
            is_run(&words, run.entry(sector * WORDS), run.step())
        };
        (0..self.sectors()).all(is_run).then_some(run)
    }

    /// Whether all entries are 0.
    pub(crate) fn is_zero(&self) -> bool {
        let mut words = [[0; 8]; WORDS];
        (0..self.sectors()).all(|sector| {
            self.copy_sector(sector, &mut words);
            difference(&words, 0, 0) == 0
        })
    }

    /// Decodes the entries into a slot's, of which there may be more.
    pub(crate) fn store(&self, entries: &[AtomicU64]) {
        let mut words = [[0; 8]; WORDS];
        for (sector, entries) in (0..self.sectors()).zip(entries.chunks(WORDS)) {
            self.copy_sector(sector, &mut words);
            let decoded = words.map(u64::from_be_bytes);
            entries.iter().zip(decoded).for_each(|(slot, entry)| slot.store(entry, Ordering::Release));
        }
    }

    /// The entries in host byte order.
    pub(crate) fn entries(&self) -> Vec<u64> {
        let mut entries = Vec::with_capacity(self.sectors() * WORDS);
        let mut words = [[0; 8]; WORDS];
        for sector in 0..self.sectors() {
            self.copy_sector(sector, &mut words);
            entries.extend(words.map(u64::from_be_bytes));
        }
        entries
    }

    fn entry(&self, index: usize) -> u64 {
        let mut word = [0; 8];
        self.copy_to(index * word.len(), &mut word);
        u64::from_be_bytes(word)
    }

    fn sectors(&self) -> usize {
        match self.0 {
            Bytes::InBuf(buf) => buf.len() / SECTOR,
            Bytes::Plain(bytes) => bytes.len() / SECTOR,
        }
    }

    fn copy_sector(&self, sector: usize, words: &mut Words) {
        self.copy_to(sector * SECTOR, words.as_flattened_mut());
    }

    fn copy_to(&self, at: usize, out: &mut [u8]) {
        match self.0 {
            Bytes::InBuf(buf) => buf.copy_to(at, out),
            Bytes::Plain(bytes) => out.copy_from_slice(&bytes[at..at + out.len()]),
        }
    }
}

/// Whether a sector's entries begin with `first` and go on by `step`, which is 0 or a power of two.
fn is_run(words: &Words, first: u64, step: u64) -> bool {
    let last = first.wrapping_add(step.wrapping_mul(WORDS as u64 - 1));
    let byte = 0xff_u64.checked_shl(step.trailing_zeros() & !7).unwrap_or(0);
    // Where only one byte of the entries changes, adding needs no carry, so it needs no order of bytes.
    if (first ^ last) & !byte == 0 {
        difference(words, first.to_be(), step.to_be()) == 0
    } else {
        let mut expected =
            (0..WORDS as u64).map(|at| first.wrapping_add(step.wrapping_mul(at)).to_be_bytes());
        words.iter().all(|word| expected.next() == Some(*word))
    }
}

/// The bits in which some entry is not what it should be, by its distance from the first. Not inlined,
/// because the compiler uses vectors where it does not know how many there are.
#[inline(never)]
fn difference(words: &[[u8; 8]], first: u64, step: u64) -> u64 {
    let mut expected = first;
    words.iter().fold(0, |all, &word| {
        let next = expected;
        expected = expected.wrapping_add(step);
        all | (u64::from_ne_bytes(word) ^ next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buf(entries: &[u64]) -> Buf {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        Buf::from_bytes(&bytes)
    }

    fn rising(first: u64, step: u64, len: u64) -> Vec<u64> {
        (0..len).map(|index| first.wrapping_add(index * step)).collect()
    }

    /// Every cluster size; runs that begin so that they carry in each byte, and that do not.
    #[test]
    fn a_run_is_known_by_its_bytes() {
        for bits in 9..=21 {
            let step = 1 << bits;
            for first in [0, 1, 1 << 63 | 7 << bits, 0xff << bits, 0x1_ff80 << bits, 0xff_ffff << bits] {
                for (len, step) in [(64, step), (512, step), (512, 0)] {
                    let entries = rising(first, step, len);
                    let buf = buf(&entries);
                    let page = TablePage::in_buf(&buf);
                    let run = page.run(1 << bits).expect("a run");
                    assert!((0..entries.len()).all(|index| run.entry(index) == entries[index]));
                    assert_eq!(page.entries(), entries);
                }
            }
        }
    }

    #[test]
    fn one_odd_entry_anywhere_is_noticed() {
        for bits in [9, 12, 16, 21] {
            for (step, index) in
                [0, 1 << bits].into_iter().flat_map(|step| (0..512).map(move |at| (step, at)))
            {
                for change in [1, 1 << bits, 1 << 63] {
                    let mut entries = rising(5 << bits, step, 512);
                    entries[index] ^= change;
                    let buf = buf(&entries);
                    assert_eq!(
                        TablePage::in_buf(&buf).run(1 << bits),
                        None,
                        "{bits} {step} {index} {change}"
                    );
                }
            }
        }
    }

    #[test]
    fn entries_are_decoded_into_a_slot() {
        let entries: Vec<u64> = (0..128_u64).map(|index| (index * index) << 9).collect();
        let slot: Vec<_> = (0..512).map(|_| AtomicU64::new(0)).collect();
        TablePage::in_buf(&buf(&entries)).store(&slot);
        assert!(slot.iter().zip(&entries).all(|(slot, entry)| slot.load(Ordering::Relaxed) == *entry));
        assert_eq!(slot[128].load(Ordering::Relaxed), 0);
    }
}
