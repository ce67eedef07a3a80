//! One kind of work, so many times, on a ring: for counting instructions.
//!
//! ```text
//! cargo build --release -p benches --example count
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null …/examples/count WORK TIMES IMAGE
//! ```
//!
//! The difference of two counts, divided by the difference of TIMES, is what the work costs in user
//! space, exactly. WORK is `map`, `direct`, `read`, `write` (of 4 KiB at places drawn from a fixed seed)
//! `open`, or `search` (for leaks, without a rest).

use qcow2_engine::{
    Image, Lane, OpenOptions, Pace,
    exec::{Executor, block_on},
    io::{Buf, Files, files::Caching, uring::Uring},
};
use std::{error::Error, hint::black_box, path::Path, pin::Pin, process::ExitCode, sync::Arc};

/// Requests in flight.
const DEPTH: u64 = 64;
const BLOCK: u64 = 4096;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [work, times, path] = &arguments[..] else { return Err("count WORK TIMES IMAGE".into()) };
    let (times, path) = (times.parse()?, Path::new(path));
    if work == "open" {
        return (0..times).try_for_each(|_| open(path, false).map(drop));
    }
    let (image, ring) = open(path, !["write", "search"].contains(&&**work))?;
    let lane = Lane::new(&image, ring.clone(), DEPTH as usize);
    if work == "search" {
        return Ok(block_on(&ring, lane.reclaim_leaks(&Restless))?.map(|done| println!("{done:?}"))?);
    }
    let blocks = image.virtual_size() / BLOCK;
    let mut places = fastrand::Rng::with_seed(1);
    if work == "direct" {
        let at = places.u64(..blocks) * BLOCK;
        block_on(&ring, lane.read(at, Buf::zeroed(BLOCK as usize)))??;
        for _ in 0..times {
            let direct = black_box(&lane).direct_read(black_box(at), BLOCK).ok_or("not direct")?;
            lane.end_direct(black_box(direct));
        }
        return Ok(());
    }
    let executor = Executor::new(ring);
    for task in 0..DEPTH {
        let (lane, work) = (lane.clone(), work.clone());
        let mut places = fastrand::Rng::with_seed(task);
        executor.spawn(async move {
            let buf = Buf::zeroed(BLOCK as usize);
            for _ in (task..times).step_by(DEPTH as usize) {
                let at = places.u64(..blocks) * BLOCK;
                let done = match &*work {
                    "map" => lane.map(at, BLOCK).await.map(drop),
                    "read" => lane.read(at, buf.clone()).await,
                    "write" => lane.write(at, buf.clone()).await,
                    _ => panic!("unknown work {work}"),
                };
                done.expect("the image is sound");
            }
        });
    }
    Ok(executor.run()?)
}

struct Restless;

impl Pace for Restless {
    fn rest(&self) -> Pin<Box<dyn Future<Output = bool> + '_>> {
        Box::pin(std::future::ready(true))
    }
}

/// Opens an image on a new ring.
fn open(path: &Path, read_only: bool) -> Result<(Arc<Image>, Uring), Box<dyn Error>> {
    let files = Arc::new(Files::new(Caching::Auto));
    let ring = Uring::new(Arc::clone(&files), 128)?;
    let options = OpenOptions { read_only, ..OpenOptions::default() };
    let image = block_on(&ring, Image::open(&ring, &*files, path, &options))??;
    Ok((image, ring))
}
