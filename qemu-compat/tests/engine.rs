//! The matrix through the engine in this process: lanes on threads, real files, QEMU as the judge.
//!
//! Environment: `QEMU_COMPAT_SEED=N` repeats one seed; `QEMU_COMPAT_FULL=1` takes the full matrix;
//! `QEMU_COMPAT_BATCHES=N` takes more than 60 batches of requests per round; `QEMU_COMPAT_FILTER=TEXT` only
//! images whose name contains it.

use anyhow::Context;
use qemu_compat::{
    content::tagged,
    disk::{Disk, Op, Server},
    engine::Engine,
    journey::{Effort, journey},
    matrix, qemu_img,
};
use std::{env, sync::mpsc, thread, time::Duration};

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
    let wanted: Vec<_> = recipes.iter().filter(|recipe| recipe.name().contains(&filter)).collect();
    assert!(!wanted.is_empty(), "QEMU_COMPAT_FILTER={filter}: no image is called like that");
    let mut failures = Vec::new();
    for recipe in wanted {
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

/// A request that needs more slices of L2 tables than the cache holds began anew after each miss,
/// evicted what it had just loaded, and never ended: 3 MiB at 512-byte clusters are 96 slices, and
/// the smallest cache has 64. Found by the matrix on a 120 GiB disk with 512-byte clusters.
#[test]
fn a_request_may_need_more_slices_than_the_cache_holds() {
    const LEN: u64 = 3 << 20;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("image.qcow2");
    qemu_img::create(&image, "cluster_size=512", None, LEN).unwrap();
    let (sender, ended) = mpsc::channel();
    let path = image.clone();
    thread::spawn(move || {
        let mut disk = Engine { cache_bytes: 0 }.attach(&path, 1).unwrap();
        // Allocating, in place, and by several at a time.
        for number in 1..3 {
            let bytes = tagged(0, LEN, number);
            disk.run(&[Op::Write { at: 0, bytes: bytes.clone().into() }]).unwrap();
            let answers = disk.run(&vec![Op::Read { at: 0, len: LEN }; 4]).unwrap();
            assert!(answers.iter().all(|answer| *answer == bytes));
        }
        disk.run(&[Op::Zero { at: 512, len: LEN - 512, unmap: true }]).unwrap();
        disk.detach().unwrap();
        sender.send(()).unwrap();
    });
    ended.recv_timeout(Duration::from_secs(60)).expect("the requests end");
    qemu_img::check_clean(&image).unwrap();
}
