//! What a crash may leave of a file.
//!
//! The candidates are the changes that are completed but not durable and those in flight. Kept may
//! be: none; all; all but one; one alone; every subset while there are few; random subsets beyond.
//! A write of several sectors may be torn between any two. The file's length is a change like
//! the others, so it may be lost or kept by itself.
//!
//! The states of one moment differ in a few sectors of a large file. So the file is not copied for
//! each: changes are made in place, and undone.

use super::{
    file::{Change, File, SECTOR},
    rng::Rng,
};

/// Up to this many candidates every subset is tried.
const EXHAUSTIVE: usize = 6;
/// Random subsets beyond that.
const RANDOM_SUBSETS: usize = 24;
/// A write of at most so many sectors and one is torn at every place; a page of metadata is no longer.
const ALL_CUTS: usize = 7;

/// A state of the file that a crash may leave.
#[derive(Clone, Copy, Debug)]
pub struct Crashed<'a> {
    /// The bytes.
    pub bytes: &'a [u8],
    /// Tells it from other states.
    pub hash: u64,
}

/// Calls `judge` with every state of the file that is tried; stops at the first failure.
///
/// # Errors
/// What `judge` says.
pub fn for_each<E>(
    file: &mut File,
    in_flight: Vec<Change>,
    rng: &mut Rng,
    mut judge: impl FnMut(Crashed<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let mut candidates: Vec<Change> = file.pending.iter().map(|(_, change)| change.clone()).collect();
    candidates.extend(in_flight);
    let count = candidates.len();
    let durable = &mut file.durable;
    let mut undos = Vec::new();
    let mut attempt = |keep: &dyn Fn(usize) -> bool, torn: Option<(usize, &Change)>| {
        for (index, change) in candidates.iter().enumerate() {
            match torn {
                Some((at, half)) if at == index => undos.push(durable.apply(half)),
                _ if keep(index) => undos.push(durable.apply(change)),
                _ => {}
            }
        }
        let verdict = judge(Crashed { bytes: durable.bytes(), hash: durable.hash() });
        undos.drain(..).rev().for_each(|undo| durable.undo(undo));
        verdict
    };
    if count <= EXHAUSTIVE {
        for subset in 0..1_u32 << count {
            attempt(&|index| subset & (1 << index) != 0, None)?;
        }
    } else {
        attempt(&|_| false, None)?;
        attempt(&|_| true, None)?;
        for one in 0..count {
            attempt(&|index| index != one, None)?;
            attempt(&|index| index == one, None)?;
        }
        for _ in 0..RANDOM_SUBSETS {
            let bits: Vec<u64> = (0..count.div_ceil(64)).map(|_| rng.draw()).collect();
            attempt(&|index| bits[index / 64] & (1 << (index % 64)) != 0, None)?;
        }
    }
    for (index, change) in candidates.iter().enumerate() {
        for half in torn(change, rng) {
            attempt(&|_| true, Some((index, &half)))?;
            attempt(&|other| other < index, Some((index, &half)))?;
        }
    }
    Ok(())
}

/// The parts of a write that may arrive alone: each prefix and each suffix of whole sectors, of a long write
/// some.
fn torn(change: &Change, rng: &mut Rng) -> Vec<Change> {
    let Change::Write { at, bytes } = change else { return Vec::new() };
    let places = bytes.len().div_ceil(SECTOR).saturating_sub(1);
    let is_tried = |rng: &mut Rng| places <= ALL_CUTS || rng.below(places as u64) < ALL_CUTS as u64 / 2;
    let cuts = (1..=places).filter(|_| is_tried(rng)).map(|sectors| sectors * SECTOR);
    cuts.flat_map(|cut| {
        [
            Change::Write { at: *at, bytes: bytes[..cut].into() },
            Change::Write { at: at + cut as u64, bytes: bytes[cut..].into() },
        ]
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::{super::contents::Contents, *};
    use std::collections::BTreeSet;

    #[test]
    fn all_subsets_and_tears_of_few_changes_are_tried() {
        let write = |at: u64, byte: u8, len: usize| Change::Write { at, bytes: vec![byte; len].into() };
        let mut file = File {
            current: vec![0; 2048],
            durable: Contents::new(vec![0; 2048]),
            pending: vec![(1, write(0, 1, 512)), (2, write(512, 2, 1024))],
            ..File::default()
        };
        let mut seen = BTreeSet::new();
        for_each(&mut file, vec![write(1536, 3, 512)], &mut Rng::new(1), |Crashed { bytes, .. }| {
            seen.insert([bytes[0], bytes[512], bytes[1024], bytes[1536]]);
            Ok::<(), ()>(())
        })
        .unwrap();
        // 2 × 4 (nothing, either half, both) × 2, less tears with the later write kept alone.
        assert!(seen.contains(&[0, 2, 0, 3]) || seen.contains(&[1, 2, 0, 3]));
        assert!(seen.contains(&[0, 0, 0, 3]), "a later write alone");
        assert!(seen.len() >= 12, "{seen:?}");
    }
}
