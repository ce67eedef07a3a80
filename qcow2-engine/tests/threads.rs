//! Lanes on threads of their own: what the simulator, which interleaves at waits only, cannot see.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{IMAGE, create, run};
use qcow2_engine::{CheckOptions, Image, Lane, OpenOptions, check, io::Buf, io::mem::MemFiles};
use qcow2_format::CreateOptions;
use std::{
    future::Future,
    path::Path,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

const CLUSTER: u64 = 4096;
/// Clusters that each thread works on.
const SHARE: u64 = 512;
const ROUNDS: usize = 40;

/// Polls until the other threads have done their part.
fn wait_for<T>(future: impl Future<Output = T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return output;
        }
        assert!(Instant::now() < deadline, "it hangs");
        thread::yield_now();
    }
}

/// What one thread gives back another may be given in the same moment.
#[test]
fn clusters_are_freed_and_allocated_at_the_same_time() {
    let files = MemFiles::default();
    let options =
        CreateOptions { virtual_size: 4 * SHARE * CLUSTER, cluster_bits: 12, ..CreateOptions::default() };
    create(&files, IMAGE, &options);
    let small_extents = OpenOptions { extent_bytes: CLUSTER, ..OpenOptions::default() };
    let image = run(Image::open(&files, &files, Path::new(IMAGE), &small_extents)).unwrap();
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|share| {
                let (image, files) = (Arc::clone(&image), files.clone());
                scope.spawn(move || {
                    let lane = Lane::new(&image, files, 4);
                    let start = share * SHARE * CLUSTER;
                    for _ in 0..ROUNDS {
                        for cluster in 0..SHARE {
                            let buf = Buf::from_bytes(&[share as u8 + 1; 512]);
                            wait_for(lane.write(start + cluster * CLUSTER, buf)).expect("write");
                        }
                        wait_for(lane.discard(start, SHARE * CLUSTER)).expect("discard");
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let lane = Lane::new(&image, files.clone(), 4);
            while !is_done.load(Ordering::Relaxed) {
                wait_for(lane.maintain()).expect("maintain");
            }
        });
        let outcomes: Vec<_> = writers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        is_done.store(true, Ordering::Relaxed);
        assert!(outcomes.iter().all(Result::is_ok));
    });
    run(Lane::new(&image, files.clone(), 1).close()).unwrap();
    let report = run(check(&files, &files, Path::new(IMAGE), CheckOptions::default())).unwrap();
    assert!(report.found.is_clean(), "{:?}", report.found.list);
}
