//! From a slice's number to where its entries are.
//!
//! A word for each slice, in chunks that come into being when first used, so that the directory of a
//! huge and mostly empty disk costs nearly nothing. A word points at a cache slot, or it is all that
//! there is to say: most slices of a disk that was allocated ahead are one [`Run`], whose entries
//! follow from the first one. Such a slice costs 8 bytes instead of 4 KiB and never goes.
//!
//! Reads take no lock. A slot's number is a hint (the slot itself says what it holds); a run is
//! the answer, taken with one load.

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering},
};

const CHUNK: usize = 1024;
/// The bits of a word that say what it is. A table entry in which they are set starts no run: in L2
/// entries they are reserved.
const KIND: u64 = 0b110;
const SLOT: u64 = 0b010;
const ALIKE: u64 = 0b100;
const RISING: u64 = 0b110;
const SLOT_SHIFT: u32 = 8;
/// Entries that are compared in one go.
const BLOCK: usize = 64;

/// Where the entries of a slice are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Not in memory.
    Absent,
    /// Here.
    Run(Run),
    /// In this slot of the cache, if it still holds the slice.
    Slot(usize),
}

/// The entries of a slice, all of which follow from the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    first: u64,
    /// From each entry to the next: 0, or the directory's step.
    step: u64,
}

/// The slices of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// How many there are.
    pub(crate) slices: u64,
    /// Entries of each.
    pub(crate) entries: usize,
    /// From an entry to the next, where neighbours in the guest are neighbours on the host.
    pub(crate) step: u64,
}

/// The directory of one layer.
pub(crate) struct Directory {
    shape: Shape,
    chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
}

impl Run {
    /// The run that `len` entries are, if they are one.
    fn of(len: usize, entry: impl Fn(usize) -> u64, step: u64) -> Option<Self> {
        let run = Self::through(entry(0), entry(len - 1), len, step)?;
        // A block at a time without a branch: most slices that get here are what they seem to be.
        let difference = |index| entry(index) ^ run.entry(index);
        let blocks = (0..len).step_by(BLOCK);
        let is_run =
            |start: usize| (start..len.min(start + BLOCK)).fold(0, |all, index| all | difference(index)) == 0;
        blocks.into_iter().all(is_run).then_some(run)
    }

    /// The run that `len` entries may be, by the first and the last of them.
    pub(super) fn through(first: u64, last: u64, len: usize, step: u64) -> Option<Self> {
        let goes_through = |run: &Self| first & KIND == 0 && run.entry(len - 1) == last;
        [0, step].map(|step| Self { first, step }).into_iter().find(goes_through)
    }

    /// From each entry to the next.
    pub(super) fn step(&self) -> u64 {
        self.step
    }

    /// Entry `index`.
    #[inline]
    pub(crate) fn entry(&self, index: usize) -> u64 {
        self.first.wrapping_add(self.step.wrapping_mul(index as u64))
    }
}

impl Directory {
    pub(crate) fn new(shape: Shape) -> Self {
        let chunks = usize::try_from(shape.slices.div_ceil(CHUNK as u64))
            .expect("bounded by the limits of L1 tables and of windows");
        Self { shape, chunks: (0..chunks).map(|_| OnceLock::new()).collect() }
    }

    /// Entries of each slice.
    pub(crate) fn slice_entries(&self) -> usize {
        self.shape.entries
    }

    /// From an entry to the next, in a run that rises.
    pub(super) fn step(&self) -> u64 {
        self.shape.step
    }

    /// The run that a slice's entries are, if they are one.
    pub(crate) fn run_of(&self, entry: impl Fn(usize) -> u64) -> Option<Run> {
        Run::of(self.shape.entries, entry, self.shape.step)
    }

    /// Where the entries of slice `slice` are.
    #[inline]
    pub(crate) fn get(&self, slice: u64) -> Place {
        let (chunk, within) = split(slice);
        let Some(chunk) = self.chunks.get(chunk).and_then(OnceLock::get) else { return Place::Absent };
        let word = chunk[within].load(Ordering::Acquire);
        match word & KIND {
            SLOT => Place::Slot((word >> SLOT_SHIFT) as usize),
            ALIKE => Place::Run(Run { first: word & !KIND, step: 0 }),
            RISING => Place::Run(Run { first: word & !KIND, step: self.shape.step }),
            _ => Place::Absent,
        }
    }

    /// Says where the entries of slice `slice` are.
    pub(crate) fn set(&self, slice: u64, place: Place) {
        let (chunk, within) = split(slice);
        let chunk = self.chunks[chunk].get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
        let word = match place {
            Place::Absent => 0,
            Place::Run(Run { first, step: 0 }) => first | ALIKE,
            Place::Run(Run { first, .. }) => first | RISING,
            Place::Slot(slot) => (slot as u64) << SLOT_SHIFT | SLOT,
        };
        chunk[within].store(word, Ordering::Release);
    }
}

#[inline]
fn split(slice: u64) -> (usize, usize) {
    ((slice / CHUNK as u64) as usize, (slice % CHUNK as u64) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: u64 = 65536;

    fn run(entries: &[u64]) -> Option<Run> {
        Run::of(entries.len(), |index| entries[index], STEP)
    }

    #[test]
    fn entries_that_follow_from_the_first_are_a_run() {
        let copied = 1 << 63;
        for entries in [
            vec![0; 512],
            vec![1; 512],
            (0..512).map(|index| copied | ((7 + index) * STEP)).collect(),
            (0..64).map(|index| 7 * STEP + index * STEP + 1).collect(),
            vec![42 << 9],
        ] {
            let run = run(&entries).expect("a run");
            assert!((0..entries.len()).all(|index| run.entry(index) == entries[index]));
            let directory = Directory::new(Shape { slices: 5000, entries: entries.len(), step: STEP });
            directory.set(4999, Place::Run(run));
            assert_eq!(directory.get(4999), Place::Run(run));
            assert_eq!([directory.get(0), directory.get(4998)], [Place::Absent; 2]);
        }
    }

    #[test]
    fn whatever_else_is_no_run() {
        assert_eq!(run(&[STEP, 2 * STEP, 4 * STEP]), None, "a gap");
        assert_eq!(run(&[2 * STEP, STEP]), None, "falling");
        assert_eq!(run(&[0, STEP / 2, STEP]), None, "another step");
        assert_eq!(run(&[0, 0, 0, STEP]), None, "the last one differs");
        let mut broken: Vec<u64> = (1..513).map(|index| index * STEP).collect();
        broken[300] += STEP;
        assert_eq!(run(&broken), None, "one in the middle differs");
        assert_eq!(run(&[KIND, KIND]), None, "damaged entries have no place in a word");
    }

    #[test]
    fn a_place_is_what_was_said_last() {
        let directory = Directory::new(Shape { slices: 1, entries: 512, step: STEP });
        for place in [Place::Slot(0), Place::Slot(u32::MAX as usize), Place::Absent] {
            directory.set(0, place);
            assert_eq!(directory.get(0), place);
        }
    }
}
