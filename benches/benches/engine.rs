//! Decoding, look-ups that hit and miss, writes, flushes: each on one thread and on two.
//!
//! Two threads share the work, so a figure is the time that one piece of it takes all of them: half of what one
//! thread takes where nothing is in the way. `cargo xtask bench --mode engine` makes a page of the results.

use benches::{fill, image, run, together};
use criterion::{Criterion, criterion_group, criterion_main};
use qcow2_engine::{
    Image, Lane,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::{Geometry, HostOffset, Mapping, Version};
use std::{hint::black_box, sync::Arc, time::Duration};

const MIB: u64 = 1 << 20;
/// What a slice of an L2 table maps.
const SLICE: u64 = 32 * MIB;
const CLUSTER: u64 = 65536;
/// Images in memory are made anew when so many clusters of them have been written.
const CLUSTERS: u64 = 4096;

/// An image, and a lane to it for each thread.
struct Shared {
    image: Arc<Image>,
    files: MemFiles,
}

impl Shared {
    fn new(virtual_size: u64, cache_bytes: u64, fill: impl Fn(&Lane<MemFiles>)) -> Self {
        let (image, lane) = image(virtual_size, cache_bytes);
        fill(&lane);
        Self { image, files: lane.io().clone() }
    }

    fn lane(&self) -> Lane<MemFiles> {
        Lane::new(&self.image, self.files.clone(), 8)
    }
}

/// A benchmark on one thread and on two; `measure` takes the threads and how often to do it in all.
fn on_threads(criterion: &mut Criterion, name: &str, measure: impl Fn(usize, u64) -> Duration) {
    for (threads, text) in [(1, "1 thread"), (2, "2 threads")] {
        criterion.bench_function(&format!("{name}, {text}"), |bencher| {
            bencher.iter_custom(|iterations| measure(threads, iterations));
        });
    }
}

/// The part of a thread in so many steps, and where it begins.
fn part(thread: usize, threads: usize, steps: u64) -> std::ops::Range<u64> {
    let (thread, threads) = (thread as u64, threads as u64);
    steps * thread / threads..steps * (thread + 1) / threads
}

fn decode(criterion: &mut Criterion) {
    let geometry = Geometry {
        version: Version::V3,
        cluster_bits: 16,
        refcount_order: 4,
        extended_l2: false,
        virtual_size: 64 * MIB,
    };
    let raw = Mapping::Data { host: HostOffset(5 << 16), copied: true }.encode(&geometry);
    on_threads(criterion, "decode an L2 entry", |threads, iterations| {
        together(
            threads,
            |thread| part(thread, threads, iterations),
            |steps| {
                for _ in steps {
                    let _ = black_box(Mapping::decode(black_box(raw), &geometry));
                }
            },
        )
    });
}

/// As the short cut asks, and as a request does that goes the long way.
fn look_up(criterion: &mut Criterion) {
    let shared = Shared::new(64 * MIB, 32 * MIB, fill);
    let steps = |thread: usize, threads: usize, iterations: u64| {
        part(thread, threads, iterations).map(|step| step * 17 * CLUSTER % (64 * MIB))
    };
    on_threads(criterion, "look-up hit", |threads, iterations| {
        let ready = |thread| (shared.lane(), steps(thread, threads, iterations));
        together(threads, ready, |(lane, steps)| {
            for at in steps {
                let direct = lane.direct_read(black_box(at), 4096).expect("it is all there");
                lane.end_direct(black_box(direct));
            }
        })
    });
    on_threads(criterion, "look-up hit, with a future", |threads, iterations| {
        let ready = |thread| (shared.lane(), steps(thread, threads, iterations));
        together(threads, ready, |(lane, steps)| {
            steps.for_each(|at| drop(black_box(run(lane.map(at, 4096)))));
        })
    });
}

fn miss(criterion: &mut Criterion) {
    // 128 slices of 32 MiB each, and a cache of 64.
    let dirty = |lane: &Lane<MemFiles>| {
        for at in (0..4096 * MIB).step_by(SLICE as usize) {
            run(lane.write(at, Buf::zeroed(512))).expect("write");
        }
        run(lane.flush()).expect("flush");
    };
    let shared = Shared::new(4096 * MIB, 0, dirty);
    on_threads(criterion, "look-up miss", |threads, iterations| {
        let ready = |thread| (shared.lane(), part(thread, threads, iterations), thread as u64 * 64);
        together(threads, ready, |(lane, steps, first)| {
            for step in steps {
                let _ = black_box(run(lane.map((step + first) * SLICE % (4096 * MIB), 4096)));
            }
        })
    });
}

fn write(criterion: &mut Criterion) {
    let shared = Shared::new(64 * MIB, 32 * MIB, fill);
    on_threads(criterion, "write of 4 KiB in place", |threads, iterations| {
        let ready = |thread| (shared.lane(), part(thread, threads, iterations), Buf::zeroed(4096));
        together(threads, ready, |(lane, steps, data)| {
            for step in steps {
                run(lane.write(step * 17 * CLUSTER % (64 * MIB), data.clone())).expect("write");
            }
        })
    });
    on_threads(criterion, "allocating write of 64 KiB", |threads, iterations| {
        let mut left = iterations;
        let mut time = Duration::ZERO;
        while left > 0 {
            let now = left.min(CLUSTERS);
            left -= now;
            let shared = Shared::new(1024 * MIB, 32 * MIB, |_| ());
            let ready = |thread| (shared.lane(), part(thread, threads, now), Buf::zeroed(CLUSTER as usize));
            time += together(threads, ready, |(lane, clusters, data)| {
                for cluster in clusters {
                    run(lane.write(cluster * CLUSTER, data.clone())).expect("write");
                }
            });
        }
        time
    });
}

/// Two threads flush at once: one leads, and the other is served by the same cut or the next.
fn flush(criterion: &mut Criterion) {
    for slices in [1_u64, 64] {
        on_threads(criterion, &format!("flush of {slices} dirty slices"), |threads, iterations| {
            let once = || {
                let shared = Shared::new(4096 * MIB, 32 * MIB, |lane| {
                    for slice in 0..slices {
                        run(lane.write(slice * SLICE, Buf::zeroed(512))).expect("write");
                    }
                });
                together(threads, |_| shared.lane(), |lane| run(lane.flush()).expect("flush"))
            };
            (0..iterations).map(|_| once()).sum()
        });
    }
}

criterion_group!(engine, decode, look_up, miss, write, flush);
criterion_main!(engine);
