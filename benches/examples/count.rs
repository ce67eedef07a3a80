//! One kind of work, so many times, on a ring: for counting instructions.
//!
//! ```text
//! cargo build --release -p benches --example count
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null …/examples/count WORK TIMES IMAGE
//! ```
//!
//! The difference of two counts, divided by the difference of TIMES, is what the work costs in user
//! space, exactly. WORK is `map`, `direct`, `read`, `write` (of 4 KiB at places drawn from a fixed seed),
//! `serve` (as `direct`, with the transfer, and a no-op in the place of the commit), `open`, or `search` (for
//! leaks, without a rest).

#![allow(unsafe_code, reason = "a no-op on the ring")]

use io_uring::opcode;
use qcow2_engine::{
    Direct, Image, Lane, OpenOptions, Pace,
    exec::{Executor, block_on},
    io::{Buf, Files, files::Caching, uring::Uring},
};
use std::{error::Error, hint::black_box, io, path::Path, pin::Pin, process::ExitCode, sync::Arc};

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
    if work == "serve" {
        return Ok(block_on(&ring, serve(&lane, &ring, times))??);
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

/// What a queue does with reads that are answered directly: each token is a tag.
async fn serve(lane: &Lane<Uring>, ring: &Uring, times: u64) -> io::Result<()> {
    let blocks = lane.image().virtual_size() / BLOCK;
    let mut places = fastrand::Rng::with_seed(1);
    let bufs: Vec<_> = (0..DEPTH).map(|_| Buf::zeroed(BLOCK as usize)).collect();
    ring.keep(bufs.clone());
    ring.register_buffers(bufs.clone())?;
    let mut under_way: Vec<Option<Direct>> = (0..DEPTH).map(|_| None).collect();
    let no_op = |token: u32| {
        // SAFETY: a no-op names no memory.
        unsafe { ring.submit_reporting(opcode::Nop::new().build(), token) }
    };
    (0..DEPTH as u32).for_each(no_op);
    let (mut reports, mut begun, mut live) = (Vec::new(), 0, DEPTH);
    while live > 0 {
        ring.reports(&mut reports).await;
        for report in &reports {
            let tag = report.token as usize;
            if let Some(direct) = under_way[tag].take() {
                lane.end_direct(direct);
                no_op(report.token);
            } else if begun < times {
                begun += 1;
                let at = places.u64(..blocks) * BLOCK;
                match lane.direct_read(at, BLOCK) {
                    Some(direct) => {
                        let run = direct.runs()[0];
                        ring.read_reporting(run.file, run.at, &bufs[tag], 0..run.len as usize, report.token);
                        under_way[tag] = Some(direct);
                    }
                    None => {
                        lane.read(at, bufs[tag].clone()).await.map_err(io::Error::other)?;
                        no_op(report.token);
                    }
                }
            } else {
                live -= 1;
            }
        }
    }
    Ok(())
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
