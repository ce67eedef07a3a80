//! The matrix through the engine in this process: lanes on threads, real files, QEMU as the judge.
//!
//! Environment: `QEMU_COMPAT_SEED=N` repeats one seed; `QEMU_COMPAT_FULL=1` takes the full matrix;
//! `QEMU_COMPAT_BATCHES=N` takes more than 60 batches of requests per round; `QEMU_COMPAT_FILTER=TEXT` only
//! images whose name contains it.

use anyhow::Context;
use qemu_compat::{
    engine::Engine,
    journey::{Effort, journey},
    matrix,
};
use std::env;

#[test]
fn images_of_the_matrix_survive_random_requests() {
    // Without the tools nothing is proven: the test fails and says what to install.
    let tools = std::process::Command::new("qemu-img").arg("--version").output();
    assert!(tools.is_ok(), "qemu-img is missing: `cargo xtask setup` installs it");
    let seed = env::var("QEMU_COMPAT_SEED").map_or_else(|_| fastrand::u64(..), |text| text.parse().unwrap());
    let filter = env::var("QEMU_COMPAT_FILTER").unwrap_or_default();
    let recipes = if env::var_os("QEMU_COMPAT_FULL").is_some() { matrix::full() } else { matrix::quick() };
    let batches = env::var("QEMU_COMPAT_BATCHES").map_or(60, |text| text.parse().unwrap());
    println!("QEMU_COMPAT_SEED={seed}");
    let mut failures = Vec::new();
    for recipe in recipes.iter().filter(|recipe| recipe.name().contains(&filter)) {
        // The small cache makes slices come and go under the requests.
        for cache_bytes in [32 << 20, 64 << 10] {
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let effort = Effort { batches, returns: 1 };
            let start = std::time::Instant::now();
            let result = journey(&Engine { cache_bytes }, dir.path(), recipe, effort, seed)
                .with_context(|| format!("{} with a cache of {cache_bytes}", recipe.name()));
            println!("{:>6} ms {}", start.elapsed().as_millis(), recipe.name());
            if let Err(error) = result {
                println!("FAILED: {error:#}");
                failures.push(format!("{error:#}"));
            }
        }
    }
    assert!(failures.is_empty(), "QEMU_COMPAT_SEED={seed}: {} failures, see above", failures.len());
}
