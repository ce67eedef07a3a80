use super::*;
use std::sync::atomic::AtomicBool;

const STEP: u64 = 65536;

const fn key(slice: u64) -> SliceKey {
    SliceKey { layer: 0, slice }
}

fn cache(bytes: u64) -> SliceCache {
    SliceCache::new(
        SliceCache::slots_in(bytes, 64, 1),
        &[Shape { slices: 1 << 20, entries: ENTRIES, step: STEP }],
    )
}

/// `--cache-size 1T` took 10 GiB at once, of memory that is locked, whatever the image was.
#[test]
fn there_are_no_more_slots_than_an_image_has_use_for() {
    let shape = Shape { slices: 1000, entries: ENTRIES, step: STEP };
    let slots = |bytes| SliceCache::new(SliceCache::slots_in(bytes, 64, 2), &[shape, shape]).slot_count();
    assert_eq!(slots(1 << 34), 2000 + SPARE);
    assert_eq!(slots(1 << 20), 256, "fewer, if that is what was asked for");
    assert_eq!(slots(0), 64);
}

/// Entries that are no run: `value`, then others.
fn scattered(value: u64) -> Vec<u64> {
    std::iter::once(value).chain((1..ENTRIES as u64).map(|index| (value + index * index) << 9)).collect()
}

#[test]
fn pinned_slices_stay_and_others_make_room() {
    let cache = cache(0);
    assert!(cache.insert(key(7), &scattered(42)));
    cache.set_pinned(key(7), true);
    for slice in 100..400 {
        assert!(cache.insert(key(slice), &scattered(slice)));
        assert_eq!(cache.entry(key(slice), 0), Some(slice));
    }
    assert_eq!(cache.entry(key(7), 0), Some(42));
    assert_eq!(cache.entry(key(100), 0), None, "evicted long ago");
}

#[test]
fn a_cache_of_pinned_slices_takes_no_more() {
    let cache = cache(0);
    assert!(cache.insert(key(1 << 18), &[0; ENTRIES]));
    for slice in 0..cache.slot_count() as u64 {
        assert!(cache.insert(key(slice), &scattered(slice)));
        cache.set_pinned(key(slice), true);
    }
    assert!(!cache.insert(key(1 << 19), &scattered(1)));
    assert!(!cache.unfold(key(1 << 18)), "a run that is to change needs a slot");
    assert!(cache.insert(key(1 << 19), &[0; ENTRIES]), "a run needs none");
}

/// Terabytes that are allocated in a row fit in the smallest cache.
#[test]
fn runs_need_no_slots() {
    let cache = cache(0);
    let entry = |slice: u64, index: u64| (slice * ENTRIES as u64 + index + 9) * STEP;
    for slice in 0..10_000 {
        let entries: Vec<u64> = (0..ENTRIES as u64).map(|index| entry(slice, index)).collect();
        assert!(cache.insert(key(slice), &entries));
    }
    for slice in 0..10_000 {
        assert_eq!(cache.entry(key(slice), 311), Some(entry(slice, 311)));
    }
}

/// What changes has a slot; what has become a run again loses it when its slot is wanted.
#[test]
fn a_run_unfolds_to_change_and_folds_when_it_goes() {
    let cache = cache(0);
    assert!(cache.insert(key(5), &[0; ENTRIES]));
    assert_eq!(cache.bytes(key(5), 8), None, "not in a slot");
    assert!(cache.unfold(key(5)) && cache.unfold(key(5)));
    for index in 0..ENTRIES {
        assert_eq!(cache.entry(key(5), index), Some(0));
        cache.set_entry(key(5), index, (index as u64 + 3) * STEP);
        assert_eq!(cache.entry(key(5), index), Some((index as u64 + 3) * STEP));
    }
    for slice in 100..400 {
        assert!(cache.insert(key(slice), &scattered(slice)));
    }
    assert_eq!(cache.bytes(key(5), 8), None, "evicted");
    assert_eq!(cache.entry(key(5), 500), Some(503 * STEP), "but known");
}

/// Readers race with refills; an entry must always be one that belonged to the slice asked for.
#[test]
fn readers_never_see_another_slices_entry() {
    let cache = cache(0);
    let stop = AtomicBool::new(false);
    // Every fifth is a run, every third of these is unfolded at once.
    let entry =
        |slice: u64, index: u64| if slice.is_multiple_of(5) { slice << 9 } else { slice << 9 | index << 32 };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for slice in 0..256 {
                    if let Some(found) = cache.entry(key(slice), 3) {
                        assert_eq!(found, entry(slice, 3));
                    }
                }
            }
        });
        let mut inserted = true;
        for round in 0..40_000_u64 {
            let slice = round * 7 % 256;
            if !cache.contains(key(slice)) {
                let entries: Vec<u64> = (0..ENTRIES as u64).map(|index| entry(slice, index)).collect();
                inserted &= cache.insert(key(slice), &entries);
            }
            if slice % 15 == 0 {
                inserted &= cache.unfold(key(slice));
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(inserted, "some slot can always go");
    });
}
