//! The bounded cache of L2 slices.
//!
//! A slice is a page of an L2 table (4 KiB, or the whole table where a cluster is smaller), kept as
//! atomic entries in host byte order. A look-up that hits takes no lock and writes nothing but a
//! "recently used" mark. Slots are never freed, only refilled, so a reader always touches valid
//! memory; a version per slot tells it when the slot was refilled under it.
//!
//! Everything that changes a slot is called under the image's metadata lock: the cache itself does
//! not check that, it only promises that readers never see a mixture. Which slices are dirty is
//! known to the order graph; the cache is told, so that it never evicts them.

use super::directory::Directory;
use std::sync::{
    OnceLock,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
};

/// Bytes of a slice on disk, at the most.
pub(crate) const SLICE_BYTES: u64 = 4096;
const ENTRIES: usize = SLICE_BYTES as usize / 8;
/// The fewest slots that a cache has: enough that a request which needs two slices, on each of
/// several queues, cannot starve.
const MIN_SLOTS: usize = 64;
/// Slots per layer, at the least: one look-up needs a slice of each layer at the same time.
const MIN_SLOTS_PER_LAYER: usize = 4;

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
    /// A cache of `bytes` for layers with the given numbers of slices.
    pub(crate) fn new(bytes: u64, slices_per_layer: &[u64]) -> Self {
        let least = MIN_SLOTS.max(MIN_SLOTS_PER_LAYER * slices_per_layer.len());
        let slots =
            usize::try_from(bytes / SLICE_BYTES).unwrap_or(usize::MAX).clamp(least, u32::MAX as usize - 1);
        Self {
            slots: (0..slots).map(|_| Slot::empty()).collect(),
            directories: slices_per_layer.iter().map(|&count| Directory::new(count)).collect(),
            hand: AtomicUsize::new(0),
        }
    }

    /// How many slots there are.
    pub(crate) fn slot_count(&self) -> usize {
        self.slots.len()
    }

    /// Entry `index` of a slice, or `None` when the slice is not in memory.
    #[inline]
    pub(crate) fn entry(&self, key: SliceKey, index: usize) -> Option<u64> {
        let slot = &self.slots[self.directories[usize::from(key.layer)].get(key.slice)?];
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
        self.slot_of(key).is_some()
    }

    /// Changes one entry of a resident slice; readers see the old value or the new one.
    ///
    /// # Panics
    /// When the slice is not in memory: callers check under the same lock.
    pub(crate) fn set_entry(&self, key: SliceKey, index: usize, value: u64) {
        let slot = self.slot_of(key).expect("the slice was found resident under the metadata lock");
        slot.entries()[index].store(value, Ordering::Release);
    }

    /// Says whether a resident slice may be evicted.
    pub(crate) fn set_pinned(&self, key: SliceKey, pinned: bool) {
        if let Some(slot) = self.slot_of(key) {
            slot.pinned.store(pinned, Ordering::Relaxed);
        }
    }

    /// Brings a slice in, evicting another one if need be. Returns false when every slot is pinned.
    pub(crate) fn insert(&self, key: SliceKey, entries: impl Iterator<Item = u64>) -> bool {
        debug_assert!(!self.contains(key), "one loader per slice");
        let Some(number) = self.victim() else { return false };
        let slot = &self.slots[number];
        let old = slot.holds.load(Ordering::Relaxed);
        if old != EMPTY {
            let old = SliceKey::unpack(old);
            self.directories[usize::from(old.layer)].set(old.slice, None);
        }
        slot.refill(key, entries);
        self.directories[usize::from(key.layer)].set(key.slice, Some(number));
        true
    }

    /// The bytes of a resident slice as they go to disk: `len` of them.
    pub(crate) fn bytes(&self, key: SliceKey, len: usize) -> Option<Vec<u8>> {
        let entries = self.slot_of(key)?.entries();
        Some(
            entries[..len / 8].iter().flat_map(|entry| entry.load(Ordering::Acquire).to_be_bytes()).collect(),
        )
    }

    fn slot_of(&self, key: SliceKey) -> Option<&Slot> {
        let slot = &self.slots[self.directories[usize::from(key.layer)].get(key.slice)?];
        (slot.holds.load(Ordering::Relaxed) == key.pack()).then_some(slot)
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

    fn refill(&self, key: SliceKey, entries: impl Iterator<Item = u64>) {
        // A reader that sees any of the new entries then also sees that the version has moved.
        self.version.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.holds.store(key.pack(), Ordering::Relaxed);
        self.entries().iter().zip(entries).for_each(|(slot, entry)| slot.store(entry, Ordering::Release));
        self.used.store(true, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    const fn key(slice: u64) -> SliceKey {
        SliceKey { layer: 0, slice }
    }

    #[test]
    fn pinned_slices_stay_and_others_make_room() {
        let cache = SliceCache::new(0, &[1 << 20]);
        assert!(cache.insert(key(7), [42].into_iter()));
        cache.set_pinned(key(7), true);
        for slice in 100..400 {
            assert!(cache.insert(key(slice), [slice].into_iter()));
            assert_eq!(cache.entry(key(slice), 0), Some(slice));
        }
        assert_eq!(cache.entry(key(7), 0), Some(42));
        assert_eq!(cache.entry(key(100), 0), None, "evicted long ago");
    }

    #[test]
    fn a_cache_of_pinned_slices_takes_no_more() {
        let cache = SliceCache::new(0, &[1 << 20]);
        for slice in 0..cache.slot_count() as u64 {
            assert!(cache.insert(key(slice), std::iter::empty()));
            cache.set_pinned(key(slice), true);
        }
        assert!(!cache.insert(key(1 << 19), std::iter::empty()));
    }

    /// Readers race with refills; an entry must always be one that belonged to the slice asked for.
    #[test]
    fn readers_never_see_another_slices_entry() {
        let cache = SliceCache::new(0, &[1 << 20]);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for slice in 0..256 {
                        if let Some(entry) = cache.entry(key(slice), 3) {
                            assert_eq!(entry, slice);
                        }
                    }
                }
            });
            let mut inserted = true;
            for round in 0..40_000_u64 {
                let slice = round * 7 % 256;
                if !cache.contains(key(slice)) {
                    inserted &= cache.insert(key(slice), std::iter::repeat_n(slice, ENTRIES));
                }
            }
            stop.store(true, Ordering::Relaxed);
            assert!(inserted, "some slot can always go");
        });
    }
}
