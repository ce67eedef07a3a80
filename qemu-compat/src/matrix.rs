//! Which images the suite goes through.
//!
//! [`quick`] shows each feature at least once; [`full`] adds every pair of features that QEMU
//! allows together, found greedily, and the extremes of size.

use crate::fixture::{Backing, Compat, Compression, Preallocation, Recipe, small_size};
use std::collections::BTreeSet;

/// What makes a size no multiple of a cluster.
const ODD_BYTES: u64 = 1536;
/// 64 TiB less a bit: the largest disk that QEMU makes with 64 KiB clusters is 64 TiB.
const NEAR_64_TIB: u64 = (64 << 40) - (1 << 20) - ODD_BYTES;

/// Each feature at least once.
#[must_use]
pub fn quick() -> Vec<Recipe> {
    use Compat::{V2, V3};
    let plain = Recipe::plain;
    let odd = |recipe: Recipe| Recipe { size: recipe.size + ODD_BYTES, ..recipe };
    vec![
        plain(16),
        Recipe { queues: 2, lazy_refcounts: true, ..odd(plain(16)) },
        Recipe { compat: V3(1), queues: 2, ..plain(9) },
        Recipe { compat: V3(64), preallocation: Preallocation::Metadata, ..plain(12) },
        Recipe { compat: V2, preallocation: Preallocation::Full, ..plain(16) },
        Recipe { preallocation: Preallocation::Falloc, queues: 2, ..odd(plain(21)) },
        Recipe { compat: V2, backing: Backing::Raw, ..odd(plain(12)) },
        Recipe { backing: Backing::Qcow2, compression: Compression::Zlib, queues: 2, ..plain(16) },
        Recipe { backing: Backing::Chain, compat: V3(64), ..odd(plain(12)) },
        Recipe { backing: Backing::Shorter, snapshots: 2, queues: 2, ..plain(9) },
        Recipe { backing: Backing::Longer, compat: V3(1), ..odd(plain(21)) },
        Recipe { compression: Compression::Zstd, snapshots: 2, queues: 2, ..odd(plain(16)) },
        Recipe { compat: V2, snapshots: 2, ..plain(12) },
        Recipe { size: NEAR_64_TIB, queues: 2, ..plain(16) },
    ]
}

/// The quick ones, every possible pair of features, and the extremes.
#[must_use]
pub fn full() -> Vec<Recipe> {
    let mut recipes = quick();
    recipes.extend([
        Recipe { size: NEAR_64_TIB, compat: Compat::V3(64), ..Recipe::plain(21) },
        Recipe { size: (120 << 30) + ODD_BYTES, queues: 2, ..Recipe::plain(9) },
        // qemu-img compares L2 table by L2 table: 4 TiB in clusters of 4 KiB take it ten minutes here.
        Recipe { size: (1 << 40) + ODD_BYTES, compat: Compat::V3(1), queues: 2, ..Recipe::plain(12) },
        Recipe { size: 2 << 40, compat: Compat::V2, ..Recipe::plain(16) },
        Recipe { size: 512, ..Recipe::plain(16) },
        Recipe { size: 512 * 3, compat: Compat::V2, ..Recipe::plain(21) },
        Recipe { compat: Compat::V3(2), ..Recipe::plain(10) },
        Recipe { compat: Compat::V3(4), backing: Backing::Raw, ..Recipe::plain(14) },
        Recipe { compat: Compat::V3(8), snapshots: 2, ..Recipe::plain(18) },
        Recipe { compat: Compat::V3(32), backing: Backing::Chain, queues: 2, ..Recipe::plain(20) },
    ]);
    let mut missing: BTreeSet<_> = possible().iter().flat_map(pairs).collect();
    recipes.iter().for_each(|recipe| missing = &missing - &pairs(recipe).into_iter().collect());
    let candidates = possible();
    while !missing.is_empty() {
        let gain = |recipe: &&Recipe| pairs(recipe).iter().filter(|pair| missing.contains(*pair)).count();
        let Some(best) = candidates.iter().max_by_key(gain) else { break };
        missing = &missing - &pairs(best).into_iter().collect();
        recipes.push(*best);
    }
    let mut names = BTreeSet::new();
    recipes.retain(|recipe| names.insert(recipe.name()));
    recipes
}

/// A feature of a recipe, as (which, value).
type Feature = (usize, u32);

fn pairs(recipe: &Recipe) -> Vec<(Feature, Feature)> {
    let features = features(recipe);
    let mut pairs = Vec::new();
    for (index, &first) in features.iter().enumerate() {
        pairs.extend(features[index + 1..].iter().map(|&second| (first, second)));
    }
    pairs
}

fn features(recipe: &Recipe) -> [Feature; 8] {
    let is_odd = !recipe.size.is_multiple_of(recipe.cluster().max(4096));
    let compat = match recipe.compat {
        Compat::V2 => 0,
        Compat::V3(bits) => bits,
    };
    [
        (0, recipe.cluster_bits),
        (1, compat),
        (2, recipe.preallocation as u32),
        (3, recipe.backing as u32),
        (4, recipe.compression as u32),
        (5, recipe.snapshots),
        (6, u32::from(is_odd)),
        (7, u32::from(recipe.queues)),
    ]
}

/// Every combination that QEMU makes.
fn possible() -> Vec<Recipe> {
    let mut all = Vec::new();
    for cluster_bits in [9, 12, 16, 21] {
        all.push(Recipe::plain(cluster_bits));
    }
    all = vary(&all, &[Compat::V2, Compat::V3(1), Compat::V3(16), Compat::V3(64)], |recipe, it| {
        recipe.compat = it
    });
    let preallocations =
        [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    all = vary(&all, &preallocations, |recipe, it| recipe.preallocation = it);
    let backings =
        [Backing::None, Backing::Raw, Backing::Qcow2, Backing::Chain, Backing::Shorter, Backing::Longer];
    all = vary(&all, &backings, |recipe, it| recipe.backing = it);
    let compressions = [Compression::None, Compression::Zlib, Compression::Zstd];
    all = vary(&all, &compressions, |recipe, it| recipe.compression = it);
    all = vary(&all, &[0, 2], |recipe, it| recipe.snapshots = it);
    all = vary(&all, &[0, ODD_BYTES], |recipe, it| recipe.size = small_size(recipe.cluster_bits) + it);
    all = vary(&all, &[1, 2], |recipe, it| recipe.queues = it);
    all.retain(Recipe::is_possible);
    all
}

fn vary<T: Copy>(recipes: &[Recipe], values: &[T], set: impl Fn(&mut Recipe, T)) -> Vec<Recipe> {
    let with = |recipe: &Recipe, value: T| {
        let mut recipe = *recipe;
        set(&mut recipe, value);
        recipe
    };
    recipes
        .iter()
        .flat_map(|recipe| values.iter().map(move |&value| (*recipe, value)))
        .map(|(r, v)| with(&r, v))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_full_matrix_has_every_possible_pair_and_the_quick_one_every_feature() {
        let wanted: BTreeSet<_> = possible().iter().flat_map(pairs).collect();
        let found: BTreeSet<_> = full().iter().flat_map(pairs).collect();
        assert!(wanted.is_subset(&found));
        assert!(full().len() < 80, "{}", full().len());
        let wanted: BTreeSet<_> = possible().iter().flat_map(features).collect();
        let found: BTreeSet<_> = quick().iter().flat_map(features).collect();
        assert_eq!(wanted.difference(&found).collect::<Vec<_>>(), Vec::<&Feature>::new());
        assert!(full().iter().all(Recipe::is_possible));
    }
}
