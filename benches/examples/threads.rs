//! Look-ups that hit, on one thread and on two, in turn: the best of many rounds of each.
//!
//! `cargo run --release -p benches --example threads`. On a machine that does other work, too, only the best
//! round of each says something, and two processors must have been free for it.

use benches::{fill, image, together};
use qcow2_engine::{Image, Lane, io::mem::MemFiles};
use std::{hint::black_box, sync::Arc, time::Duration};

const ROUNDS: usize = 400;
const LOOK_UPS: u64 = 100_000;
const SIZE: u64 = 64 << 20;

fn main() {
    let (image, lane) = image(SIZE, 32 << 20);
    fill(&lane);
    let mut best = [Duration::MAX; 2];
    for _ in 0..ROUNDS {
        for (threads, best) in (1..).zip(&mut best) {
            *best = (*best).min(round(&image, lane.io(), threads));
        }
    }
    let [one, two] = best.map(|time| time.as_nanos() as f64 / LOOK_UPS as f64);
    println!(
        "one thread: {one:.1} ns a look-up; two: {two:.1} ns each; two do {:.2} of what one does",
        2.0 * one / two
    );
}

/// The time in which each of some threads does its look-ups, the slowest.
fn round(image: &Arc<Image>, files: &MemFiles, threads: usize) -> Duration {
    let lane = |thread: usize| (Lane::new(image, files.clone(), 1), thread as u64 * 311);
    together(threads, lane, |(lane, first)| {
        for step in 0..LOOK_UPS {
            let at = (step + first) * 17 * 65536 % SIZE;
            let direct = lane.direct_read(black_box(at), 4096).expect("it is all there");
            lane.end_direct(black_box(direct));
        }
    })
}
