//! From a slice's number to the cache slot that holds it.
//!
//! An array of slot numbers in chunks that come into being when first used, so that the directory
//! of a huge and mostly empty disk costs nearly nothing. Reads take no lock. An answer is a hint:
//! the slot itself says what it holds.

use std::sync::{
    OnceLock,
    atomic::{AtomicU32, Ordering},
};

const CHUNK: usize = 1024;
const ABSENT: u32 = 0;

/// The directory of one layer.
pub(crate) struct Directory {
    chunks: Box<[OnceLock<Box<[AtomicU32]>>]>,
}

impl Directory {
    /// A directory for the slices `0..slices`.
    pub(crate) fn new(slices: u64) -> Self {
        let chunks =
            usize::try_from(slices.div_ceil(CHUNK as u64)).expect("bounded by the L1 table's size limit");
        Self { chunks: (0..chunks).map(|_| OnceLock::new()).collect() }
    }

    /// The slot that may hold slice `slice`.
    #[inline]
    pub(crate) fn get(&self, slice: u64) -> Option<usize> {
        let (chunk, within) = split(slice);
        match self.chunks.get(chunk)?.get()?[within].load(Ordering::Acquire) {
            ABSENT => None,
            slot => Some(slot as usize - 1),
        }
    }

    /// Points slice `slice` at a slot, or nowhere.
    pub(crate) fn set(&self, slice: u64, slot: Option<usize>) {
        let (chunk, within) = split(slice);
        let chunk = self.chunks[chunk].get_or_init(|| (0..CHUNK).map(|_| AtomicU32::new(ABSENT)).collect());
        let value =
            slot.map_or(ABSENT, |slot| u32::try_from(slot + 1).expect("bounded by the cache's slot count"));
        chunk[within].store(value, Ordering::Release);
    }
}

#[inline]
fn split(slice: u64) -> (usize, usize) {
    ((slice / CHUNK as u64) as usize, (slice % CHUNK as u64) as usize)
}
