//! The bounded cache of L2 slices.
//!
//! A slice is a page of an L2 table (4 KiB, or the whole table where a cluster is smaller), kept as
//! atomic entries in host byte order. A look-up that hits takes no lock and writes nothing but a
//! "recently used" mark. Slots are never freed, only refilled, so a reader always touches valid
//! memory; a version per slot tells it when the slot was refilled under it.
//!
//! A slice whose entries are one run needs no slot: the directory has it in a word. So it is when it
//! comes in, and when it is evicted after it has become a run. Before an entry of it is changed it gets
//! a slot ([`SliceCache::unfold`]): what is dirty is in a slot, and what is in a word is as on disk.
//!
//! Everything that changes a slot is called under the image's metadata lock: the cache itself does
//! not check that, it only promises that readers never see a mixture. Which slices are dirty is
//! known to the order graph; the cache is told, so that it never evicts them.

use super::{
    directory::{Directory, Place, Run, Shape},
    page::TablePage,
};
use crate::{flush::MAX_DIRTY_PAGES, paging::MAX_PAGE};
use qcow2_format::word;
use std::sync::{
    OnceLock,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
};

const ENTRIES: usize = MAX_PAGE as usize / 8;
/// Slots per layer, at the least: one look-up needs a slice of each layer at the same time.
const MIN_SLOTS_PER_LAYER: usize = 4;
/// Slots at the most: a word of a directory holds their numbers.
const MAX_SLOTS: usize = u32::MAX as usize - 1;
/// Slots beyond one for every slice there is: half of all may be dirty ([`MAX_DIRTY_PAGES`] counts pages of all
/// kinds), which is not to be less because an image is small. One that was never filled takes some 50 bytes.
const SPARE: usize = 2 * MAX_DIRTY_PAGES;

/// Names a slice: the layer of the chain and the slice's number in guest order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SliceKey {
    pub(crate) layer: u16,
    pub(crate) slice: u64,
}

/// All slots, shared by all layers of a chain.
pub(crate) struct SliceCache {
    slots: Box<[Slot]>,
    directories: Vec<Directory>,
    /// Next slot that the clock looks at.
    hand: AtomicUsize,
    /// Slots that may not be evicted; changed under the metadata lock.
    pinned: AtomicUsize,
}

struct Slot {
    /// Odd while the slot is refilled, different after each refill.
    version: AtomicU64,
    /// The packed key, or `EMPTY`.
    holds: AtomicU64,
    used: AtomicBool,
    /// Dirty or being written back: not to be evicted.
    pinned: AtomicBool,
    entries: OnceLock<Box<[AtomicU64]>>,
}

const EMPTY: u64 = u64::MAX;
const LAYER_SHIFT: u32 = 48;

impl SliceKey {
    fn pack(self) -> u64 {
        u64::from(self.layer) << LAYER_SHIFT | self.slice
    }

    fn unpack(packed: u64) -> Self {
        Self { layer: (packed >> LAYER_SHIFT) as u16, slice: packed & ((1 << LAYER_SHIFT) - 1) }
    }
}

impl SliceCache {
    /// The slots that `bytes` are good for, and so many at the least, for so many layers.
    pub(crate) fn slots_in(bytes: u64, least_slots: usize, layers: usize) -> usize {
        let least = least_slots.max(MIN_SLOTS_PER_LAYER * layers);
        usize::try_from(bytes / MAX_PAGE).unwrap_or(usize::MAX).clamp(least, MAX_SLOTS)
    }

    /// A cache of so many slots, as far as layers of these shapes have use for them.
    pub(crate) fn new(slots: usize, layers: &[Shape]) -> Self {
        let slices = layers.iter().fold(0_u64, |sum, shape| sum.saturating_add(shape.slices));
        let slots =
            slots.min(usize::try_from(slices).map_or(MAX_SLOTS, |slices| slices.saturating_add(SPARE)));
        Self {
            slots: (0..slots).map(|_| Slot::empty()).collect(),
            directories: layers.iter().map(|&shape| Directory::new(shape)).collect(),
            hand: AtomicUsize::new(0),
            pinned: AtomicUsize::new(0),
        }
    }

    /// How many slots there are.
    pub(crate) fn slot_count(&self) -> usize {
        self.slots.len()
    }

    /// Entry `index` of a slice, or `None` when the slice is not in memory.
    #[inline]
    pub(crate) fn entry(&self, key: SliceKey, index: usize) -> Option<u64> {
        let slot = match self.place(key) {
            Place::Run(run) => return Some(run.entry(index)),
            Place::Slot(number) => &self.slots[number],
            Place::Absent => return None,
        };
        let version = slot.version.load(Ordering::Acquire);
        if slot.holds.load(Ordering::Relaxed) != key.pack() {
            return None;
        }
        let entry = slot.entries.get()?[index].load(Ordering::Acquire);
        fence(Ordering::Acquire);
        if slot.version.load(Ordering::Relaxed) != version || version % 2 == 1 {
            return None;
        }
        if !slot.used.load(Ordering::Relaxed) {
            slot.used.store(true, Ordering::Relaxed);
        }
        Some(entry)
    }

    /// Whether a slice is in memory. Under the metadata lock the answer stays true.
    pub(crate) fn contains(&self, key: SliceKey) -> bool {
        matches!(self.place(key), Place::Run(_)) || self.slot_of(key).is_some()
    }

    /// The run that a slice in memory is, if it has no slot: as it is on disk.
    pub(crate) fn run(&self, key: SliceKey) -> Option<Run> {
        if let Place::Run(run) = self.place(key) { Some(run) } else { None }
    }

    /// Takes a slice in if it is a run. It is not in memory.
    pub(crate) fn learn(&self, key: SliceKey, page: &TablePage<'_>) {
        debug_assert!(!self.contains(key), "one loader per slice");
        if let Some(run) = self.run_in(key, page) {
            self.directory(key).set(key.slice, Place::Run(run));
        }
    }

    /// Gives a slice in memory a slot, so that its entries can be changed. Returns false when every slot
    /// is pinned.
    pub(crate) fn unfold(&self, key: SliceKey) -> bool {
        let Place::Run(run) = self.place(key) else { return true };
        let entries = self.directory(key).slice_entries();
        // A reader that still has the word has what the entries were before the change to come.
        self.put_in_slot(key, |slot| {
            let entries = (0..entries).map(|index| run.entry(index));
            slot.iter().zip(entries).for_each(|(slot, entry)| slot.store(entry, Ordering::Release));
        })
    }

    /// Changes one entry of a resident slice; readers see the old value or the new one.
    ///
    /// # Panics
    /// When the slice is not in a slot: callers check under the same lock.
    pub(crate) fn set_entry(&self, key: SliceKey, index: usize, value: u64) {
        let slot = self.slot_of(key).expect("the slice was found resident under the metadata lock");
        slot.entries()[index].store(value, Ordering::Release);
    }

    /// Says whether a resident slice may be evicted.
    pub(crate) fn set_pinned(&self, key: SliceKey, pinned: bool) {
        if let Some(slot) = self.slot_of(key) {
            match (slot.pinned.swap(pinned, Ordering::Relaxed), pinned) {
                (false, true) => drop(self.pinned.fetch_add(1, Ordering::Relaxed)),
                (true, false) => drop(self.pinned.fetch_sub(1, Ordering::Relaxed)),
                _ => {}
            }
        }
    }

    /// Whether a slice in a slot may be pinned, as it may be already: look-ups need one slot for each layer at the
    /// same time, and with fewer left each would drive out what the other needs, for as long as nothing can be
    /// written back.
    pub(crate) fn may_pin(&self, key: SliceKey) -> bool {
        let left = (MIN_SLOTS_PER_LAYER / 2 * self.directories.len()).min(self.slots.len() / 2);
        self.slot_of(key).is_some_and(|slot| slot.pinned.load(Ordering::Relaxed))
            || self.pinned.load(Ordering::Relaxed) + left < self.slots.len()
    }

    /// Brings a slice in, evicting another one if need be. Returns false when every slot is pinned.
    pub(crate) fn insert(&self, key: SliceKey, entries: &[u64]) -> bool {
        let run = self.directory(key).run_of(|index| entries[index]);
        self.insert_as(key, run, |slot| {
            slot.iter().zip(entries).for_each(|(slot, &entry)| slot.store(entry, Ordering::Release));
        })
    }

    /// The run that a slice is, if it is one.
    pub(crate) fn run_in(&self, key: SliceKey, page: &TablePage<'_>) -> Option<Run> {
        page.run(self.directory(key).step())
    }

    /// [`Self::insert`], with what [`Self::run_in`] has said.
    pub(crate) fn insert_page(&self, key: SliceKey, run: Option<Run>, page: &TablePage<'_>) -> bool {
        self.insert_as(key, run, |slot| page.store(slot))
    }

    fn insert_as(&self, key: SliceKey, run: Option<Run>, fill: impl FnOnce(&[AtomicU64])) -> bool {
        debug_assert!(!self.contains(key), "one loader per slice");
        let Some(run) = run else { return self.put_in_slot(key, fill) };
        self.directory(key).set(key.slice, Place::Run(run));
        true
    }

    fn put_in_slot(&self, key: SliceKey, fill: impl FnOnce(&[AtomicU64])) -> bool {
        let Some(number) = self.victim() else { return false };
        let slot = &self.slots[number];
        let old = slot.holds.load(Ordering::Relaxed);
        if old != EMPTY {
            self.fold(SliceKey::unpack(old), slot);
        }
        slot.refill(key, fill);
        self.directory(key).set(key.slice, Place::Slot(number));
        true
    }

    /// Keeps of an evicted slice what a word can say.
    fn fold(&self, key: SliceKey, slot: &Slot) {
        let (directory, entries) = (self.directory(key), slot.entries());
        let run = directory.run_of(|index| entries[index].load(Ordering::Relaxed));
        directory.set(key.slice, run.map_or(Place::Absent, Place::Run));
    }

    /// The bytes of a resident slice as they go to disk: `len` of them.
    pub(crate) fn bytes(&self, key: SliceKey, len: usize) -> Option<Vec<u8>> {
        let entries = self.slot_of(key)?.entries();
        Some(word::to_bytes(entries[..len / 8].iter().map(|entry| entry.load(Ordering::Acquire))))
    }

    fn slot_of(&self, key: SliceKey) -> Option<&Slot> {
        let Place::Slot(number) = self.place(key) else { return None };
        let slot = &self.slots[number];
        (slot.holds.load(Ordering::Relaxed) == key.pack()).then_some(slot)
    }

    #[inline]
    fn place(&self, key: SliceKey) -> Place {
        self.directory(key).get(key.slice)
    }

    #[inline]
    fn directory(&self, key: SliceKey) -> &Directory {
        &self.directories[usize::from(key.layer)]
    }

    /// Second chance: the first slot from the hand on that was not used since the hand last passed;
    /// when readers are faster than the hand, the first that may go at all.
    fn victim(&self) -> Option<usize> {
        let count = self.slots.len();
        for step in 0..2 * count {
            let number = self.hand.fetch_add(1, Ordering::Relaxed) % count;
            let slot = &self.slots[number];
            let was_used = slot.used.swap(false, Ordering::Relaxed);
            if !slot.pinned.load(Ordering::Relaxed) && (!was_used || step >= count) {
                return Some(number);
            }
        }
        None
    }
}

impl Slot {
    fn empty() -> Self {
        Self {
            version: AtomicU64::new(0),
            holds: AtomicU64::new(EMPTY),
            used: AtomicBool::new(false),
            pinned: AtomicBool::new(false),
            entries: OnceLock::new(),
        }
    }

    fn entries(&self) -> &[AtomicU64] {
        self.entries.get_or_init(|| (0..ENTRIES).map(|_| AtomicU64::new(0)).collect())
    }

    fn refill(&self, key: SliceKey, fill: impl FnOnce(&[AtomicU64])) {
        // A reader that sees any of the new entries then also sees that the version has moved.
        self.version.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.holds.store(key.pack(), Ordering::Relaxed);
        fill(self.entries());
        self.used.store(true, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
