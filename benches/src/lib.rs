//! What the benchmarks share: images in memory, and a way to wait for them.
//!
//! I/O in memory completes at once, so what is measured is the engine's own work.

use qcow2_engine::{
    Image, Lane, OpenOptions,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::{Blueprint, CreateOptions};
use std::{
    future::Future,
    path::Path,
    pin::pin,
    sync::{Arc, Barrier},
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

const NAME: &str = "bench.qcow2";

/// A new, empty image of `virtual_size` bytes in memory, with a lane to it.
///
/// # Panics
/// When it cannot be made: a defect of the benchmark.
#[must_use]
pub fn image(virtual_size: u64, cache_bytes: u64) -> (Arc<Image>, Lane<MemFiles>) {
    let files = MemFiles::default();
    let blueprint =
        Blueprint::new(&CreateOptions { virtual_size, ..CreateOptions::default() }).expect("sound options");
    files.put(NAME, blueprint.to_bytes());
    let options = OpenOptions { cache_bytes, ..OpenOptions::default() };
    let image = run(Image::open(&files, &files, Path::new(NAME), &options)).expect("it was just made");
    let lane = Lane::new(&image, files, 8);
    (image, lane)
}

/// Writes the first sector of every cluster, so that all are allocated.
///
/// # Panics
/// When a write fails.
pub fn fill(lane: &Lane<MemFiles>) {
    let cluster = lane.image().geometry().cluster_size();
    for at in (0..lane.image().virtual_size()).step_by(cluster as usize) {
        run(lane.write(at, Buf::zeroed(512))).expect("write");
    }
    run(lane.flush()).expect("flush");
}

/// Waits for a future which at most another thread keeps waiting.
pub fn run<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return output;
        }
        thread::yield_now();
    }
}

/// Has some threads work at once, each on what it has made ready for itself, and says how long the slowest took.
///
/// # Panics
/// When one of them does.
pub fn together<T>(threads: usize, ready: impl Fn(usize) -> T + Sync, work: impl Fn(T) + Sync) -> Duration {
    let start = Barrier::new(threads);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let (start, ready, work) = (&start, &ready, &work);
                scope.spawn(move || {
                    let state = ready(thread);
                    start.wait();
                    let begun = Instant::now();
                    work(state);
                    begun.elapsed()
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("a worker")).max().unwrap_or_default()
    })
}
