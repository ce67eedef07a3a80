//! Look-up hit and miss, write in place, allocating write, flush, decode; hits on one thread and on two.

use benches::{fill, image, run};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use qcow2_engine::{Lane, io::Buf};
use qcow2_format::{Geometry, HostOffset, Mapping, Version};
use std::{hint::black_box, time::Instant};

const MIB: u64 = 1 << 20;

fn decode(criterion: &mut Criterion) {
    let geometry = Geometry {
        version: Version::V3,
        cluster_bits: 16,
        refcount_order: 4,
        extended_l2: false,
        virtual_size: 64 * MIB,
    };
    let raw = Mapping::Data { host: HostOffset(5 << 16), copied: true }.encode(&geometry);
    criterion.bench_function("decode an L2 entry", |bencher| {
        bencher.iter(|| Mapping::decode(black_box(raw), &geometry));
    });
}

fn look_up(criterion: &mut Criterion) {
    let (_, lane) = image(64 * MIB, 32 * MIB);
    fill(&lane);
    let mut at = 0;
    criterion.bench_function("look-up hit", |bencher| {
        bencher.iter(|| {
            at = (at + 17 * 65536 + 4096) % (64 * MIB);
            run(lane.map(at & !4095, 4096))
        });
    });
    // 128 slices of 32 MiB each, and a cache of 64.
    let (_, lane) = image(4096 * MIB, 0);
    for at in (0..4096 * MIB).step_by(32 << 20) {
        run(lane.write(at, Buf::zeroed(512))).expect("write");
    }
    run(lane.flush()).expect("flush");
    let mut at = 0;
    criterion.bench_function("look-up miss", |bencher| {
        bencher.iter(|| {
            at = (at + (32 << 20)) % (4096 * MIB);
            run(lane.map(at, 4096))
        });
    });
}

fn overwrite(criterion: &mut Criterion) {
    let (_, lane) = image(64 * MIB, 32 * MIB);
    fill(&lane);
    let data = Buf::zeroed(4096);
    let mut at = 0;
    criterion.bench_function("write in place of 4 KiB", |bencher| {
        bencher.iter(|| {
            at = (at + 17 * 65536 + 4096) % (64 * MIB);
            run(lane.write(at & !4095, data.clone()))
        });
    });
}

fn two_threads(criterion: &mut Criterion) {
    let (image, lane) = image(64 * MIB, 32 * MIB);
    fill(&lane);
    let files = lane.io().clone();
    for threads in [1_u64, 2] {
        criterion.bench_function(&format!("look-up hit, {threads} threads"), |bencher| {
            bencher.iter_custom(|iterations| {
                let begun = Instant::now();
                std::thread::scope(|scope| {
                    for thread in 0..threads {
                        let (image, files) = (image.clone(), files.clone());
                        scope.spawn(move || {
                            let lane = Lane::new(&image, files, 1);
                            for step in 0..iterations / threads {
                                let at = (step + thread * 311) * 17 * 65536 % (64 * MIB);
                                let _ = black_box(run(lane.map(at, 4096)));
                            }
                        });
                    }
                });
                begun.elapsed()
            });
        });
    }
}

fn allocate(criterion: &mut Criterion) {
    criterion.bench_function("allocating write of 64 KiB", |bencher| {
        let data = Buf::zeroed(65536);
        let fresh = || (image(1024 * MIB, 32 * MIB).1, 0);
        let mut state = fresh();
        bencher.iter(|| {
            let (lane, at) = &mut state;
            run(lane.write(*at, data.clone())).expect("write");
            *at += 65536;
            if *at == 256 * MIB {
                state = fresh();
            }
        });
    });
    for slices in [1_u64, 64] {
        criterion.bench_function(&format!("flush of {slices} dirty slices"), |bencher| {
            bencher.iter_batched(
                || {
                    let (_, lane) = image(4096 * MIB, 32 * MIB);
                    for slice in 0..slices {
                        run(lane.write(slice * (32 << 20), Buf::zeroed(512))).expect("write");
                    }
                    lane
                },
                |lane| run(lane.flush()),
                BatchSize::SmallInput,
            );
        });
    }
}

criterion_group!(engine, decode, look_up, overwrite, two_threads, allocate);
criterion_main!(engine);
