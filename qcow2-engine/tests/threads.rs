//! Lanes on threads of their own: what the simulator, which interleaves at waits only, cannot see.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;
#[allow(dead_code, reason = "shared by several test programs")]
#[path = "common/damaged.rs"]
mod damaged;

use common::{IMAGE, create, run};
use damaged::Parts;
use qcow2_engine::{
    CheckOptions, Image, Lane, OpenOptions, Pace, Verdict, check, io::Buf, io::mem::MemFiles,
};
use qcow2_format::CreateOptions;
use std::{
    collections::BTreeMap,
    future::Future,
    path::Path,
    pin::{Pin, pin},
    sync::{
        Arc, Barrier,
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
    close(&image, &files);
}

/// Closes the image, which is without a flaw then.
fn close(image: &Arc<Image>, files: &MemFiles) {
    run(Lane::new(image, files.clone(), 1).close()).expect("closes");
    let report = run(check(files, files, Path::new(IMAGE), CheckOptions::default())).expect("checks");
    assert!(report.found.is_clean(), "{:?}", report.found.list.first());
}

const SECTOR: u64 = 512;

/// How long the threads go on for; QCOW2_STRESS_SECONDS to hunt.
fn end() -> Instant {
    let seconds = std::env::var("QCOW2_STRESS_SECONDS").ok().and_then(|text| text.parse().ok());
    Instant::now() + Duration::from_secs(seconds.unwrap_or(2))
}

/// One thread with sectors of its own, and what they hold.
struct Worker {
    lane: Lane<MemFiles>,
    number: u64,
    rng: fastrand::Rng,
    /// What was written to sectors; another byte means that nothing was.
    written: BTreeMap<u64, u8>,
    /// What a sector holds that nothing was written to.
    initial: fn(u64) -> u8,
}

impl Worker {
    fn new(image: &Arc<Image>, files: &MemFiles, number: u64, initial: fn(u64) -> u8) -> Self {
        let lane = Lane::new(image, files.clone(), 4);
        Self { lane, number, rng: fastrand::Rng::with_seed(number), written: BTreeMap::new(), initial }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.rng.u64(..bound)
    }

    fn write(&mut self, sector: u64) {
        let byte = 1 + self.below(255) as u8;
        wait_for(self.lane.write(sector * SECTOR, Buf::from_bytes(&[byte; SECTOR as usize]))).expect("write");
        self.written.insert(sector, byte);
    }

    fn discard(&mut self, cluster: u64) {
        wait_for(self.lane.discard(cluster * CLUSTER, CLUSTER)).expect("discard");
        let per_cluster = CLUSTER / SECTOR;
        (cluster * per_cluster..(cluster + 1) * per_cluster).for_each(|sector| {
            self.written.insert(sector, 0);
        });
    }

    fn verify(&self, sector: u64) {
        let buf = Buf::zeroed(SECTOR as usize);
        wait_for(self.lane.read(sector * SECTOR, buf.clone())).expect("read");
        let expected = self.written.get(&sector).copied().unwrap_or_else(|| (self.initial)(sector));
        let found = buf.to_vec();
        assert!(
            found.iter().all(|&byte| byte == expected),
            "thread {}: sector {sector} holds {:#x}, not {expected:#x}",
            self.number,
            found[0]
        );
    }

    /// Verifies all that was written, on the image as it is.
    fn verify_all(&self) {
        self.written.keys().for_each(|&sector| self.verify(sector));
    }
}

/// Threads whose sectors are whole clusters, every other one: requests of any kind, until it is time.
fn work_on_clusters(worker: &mut Worker, clusters: u64, end: Instant) {
    let per_cluster = CLUSTER / SECTOR;
    while Instant::now() < end {
        let cluster = worker.below(clusters / 2) * 2 + worker.number;
        let sector = cluster * per_cluster + worker.below(per_cluster);
        match worker.below(16) {
            0..=6 => worker.write(sector),
            7..=9 => worker.discard(cluster),
            10 => wait_for(worker.lane.flush()).expect("flush"),
            11 => wait_for(worker.lane.maintain()).expect("maintain"),
            _ => worker.verify(sector),
        }
    }
}

/// Runs two workers at the same time, and gives them back.
fn both(image: &Arc<Image>, files: &MemFiles, initial: fn(u64) -> u8, work: impl Fn(&mut Worker) + Sync) {
    let written: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|number| {
                let work = &work;
                scope.spawn(move || {
                    let mut worker = Worker::new(image, files, number, initial);
                    work(&mut worker);
                    worker.written
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a worker")).collect()
    });
    for written in written {
        Worker { written, ..Worker::new(image, files, 9, initial) }.verify_all();
    }
}

/// An image that shares everything with a snapshot, each byte of its disk 7.
fn shared(size: u64, cluster: u64) -> MemFiles {
    let files = MemFiles::default();
    files.put(IMAGE, Parts::shared(&format!("cluster_size={cluster}"), size).bytes);
    files
}

/// Two threads write to, discard and read clusters of the same tables, which a snapshot shares at first.
#[test]
fn threads_share_the_tables_of_clusters_that_a_snapshot_has_too() {
    const CLUSTERS: u64 = 2048;
    // Eight of the threads' clusters in each table.
    let files = shared(CLUSTERS * CLUSTER, 512);
    let options = OpenOptions { extent_bytes: 16 * CLUSTER, ..OpenOptions::default() };
    let image = run(Image::open(&files, &files, Path::new(IMAGE), &options)).unwrap();
    let (end, start) = (end(), Barrier::new(2));
    let work = |worker: &mut Worker| {
        // Side by side through all tables, each of which is copied once.
        start.wait();
        for pair in 0..CLUSTERS / 2 {
            worker.write((pair * 2 + worker.number) * (CLUSTER / SECTOR));
        }
        work_on_clusters(worker, CLUSTERS, end);
    };
    both(&image, &files, |_| 7, work);
    close(&image, &files);
}

/// Two threads write to sectors next to each other, in tables of which the cache holds a few only.
#[test]
fn threads_write_to_the_same_clusters_while_their_slices_are_evicted() {
    const SECTORS: u64 = (256 << 20) / SECTOR;
    let files = MemFiles::default();
    let options =
        CreateOptions { virtual_size: SECTORS * SECTOR, cluster_bits: 12, ..CreateOptions::default() };
    create(&files, IMAGE, &options);
    let options = OpenOptions { cache_bytes: 64 << 10, extent_bytes: 16 * CLUSTER, ..OpenOptions::default() };
    let image = run(Image::open(&files, &files, Path::new(IMAGE), &options)).unwrap();
    let end = end();
    let work = |worker: &mut Worker| {
        while Instant::now() < end {
            // A few places in every table, so that clusters are met again.
            let pair = worker.below(SECTORS / 4096) * 4096 + worker.below(24) * 2;
            match worker.below(8) {
                0..=3 => worker.write(pair + worker.number),
                4 if worker.below(8) == 0 => wait_for(worker.lane.flush()).expect("flush"),
                _ => worker.verify(pair + worker.number),
            }
        }
    };
    both(&image, &files, |_| 0, work);
    close(&image, &files);
}

/// The search does not rest.
struct Restless;

impl Pace for Restless {
    fn rest(&self) -> Pin<Box<dyn Future<Output = bool> + '_>> {
        Box::pin(async {
            thread::yield_now();
            true
        })
    }
}

/// A crash has left leaks. Searches go on, one after the other, beside two threads that allocate and free.
#[test]
fn leaks_are_searched_for_beside_threads() {
    const CLUSTERS: u64 = 2048;
    let files = shared(CLUSTERS * CLUSTER, CLUSTER);
    let options = OpenOptions { extent_bytes: 64 * CLUSTER, ..OpenOptions::default() };
    {
        let image = run(Image::open(&files, &files, Path::new(IMAGE), &options)).unwrap();
        let lane = Lane::new(&image, files.clone(), 4);
        // Beyond what the threads touch.
        run(lane.write((CLUSTERS - 1) * CLUSTER, Buf::from_bytes(&[3; 512]))).expect("write");
        run(lane.flush()).expect("flush");
    }
    let image = run(Image::open(&files, &files, Path::new(IMAGE), &options)).unwrap();
    let (end, given_back) = (end(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            let lane = Lane::new(&image, files.clone(), 4);
            while Instant::now() < end || !given_back.load(Ordering::Relaxed) {
                assert!(Instant::now() < end + Duration::from_secs(120), "no search comes to its end");
                let reclaimed = wait_for(lane.reclaim_leaks(&Restless)).expect("a search");
                let is_done = reclaimed.verdict == Verdict::Complete && reclaimed.left == 0;
                given_back.fetch_or(is_done, Ordering::Relaxed);
            }
        });
        both(&image, &files, |_| 7, |worker| work_on_clusters(worker, CLUSTERS - 2, end));
    });
    close(&image, &files);
}
