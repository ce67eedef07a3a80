//! Seeded random requests, carried out on a disk and on its mirror, and compared.
//!
//! A batch is a handful of requests that are in flight together. They share clusters and tables
//! freely but no sector, so that the outcome is known. Knows nothing of who serves the disk.

use crate::{
    content::{number_of, tagged},
    disk::{Disk, Op, SECTOR},
    mirror::Mirror,
};
use anyhow::{Context, Result};
use std::{fmt::Write as _, ops::Range};

/// Requests of a batch at most.
const MAX_BATCH: usize = 8;
/// The longest write or read of a sequence: more than the device takes in one piece.
const MAX_TRANSFER: u64 = 3 << 20;
/// Bytes per request when a disk is read through.
const READ_STRIDE: u64 = 1 << 20;
/// Bytes around a point of interest of a huge disk that a sequence works on.
const WINDOW: u64 = 4 << 20;
/// Numbers of writes begin here, above those of the tools that made the image.
const FIRST_NUMBER: u64 = 1_000_000;
/// Requests that a failure shows of those which touched the place.
const TOLD: usize = 12;

/// What a disk allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discards {
    /// Whole clusters read as zeros afterwards.
    Zero,
    /// The image cannot discard.
    Unsupported,
}

/// Makes and carries out requests.
pub struct Player {
    rng: fastrand::Rng,
    discards: Discards,
    windows: Vec<Range<u64>>,
    number: u64,
    /// Every change, in order.
    history: Vec<Op>,
}

impl Player {
    /// A player for the disk that `mirror` shows. Disks above 1 GiB are worked on in windows only.
    #[must_use]
    pub fn new(mirror: &Mirror, discards: Discards, seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let windows = windows(mirror, &mut rng);
        Self { rng, discards, windows, number: FIRST_NUMBER, history: Vec::new() }
    }

    /// Carries `batches` batches out and compares what is read on the way.
    ///
    /// # Errors
    /// A request failed, or a read shows what was never written.
    pub fn play(&mut self, disk: &mut impl Disk, mirror: &mut Mirror, batches: usize) -> Result<()> {
        for index in 0..batches {
            let mut batch = self.batch(mirror);
            if index % 4 == 3 {
                batch.push(Op::Flush);
            }
            self.carry_out(disk, mirror, &batch).with_context(|| format!("batch {index} of {batches}"))?;
        }
        self.carry_out(disk, mirror, &[Op::Flush])
    }

    /// Reads everything that the disk is known to hold, and its windows, and compares.
    ///
    /// # Errors
    /// A read failed or shows the wrong bytes.
    pub fn verify(&mut self, disk: &mut impl Disk, mirror: &mut Mirror) -> Result<()> {
        let mut ranges: Vec<_> = mirror.written().chain(self.windows.iter().cloned()).collect();
        ranges.sort_by_key(|range| range.start);
        let mut reads = Vec::new();
        let mut done = 0;
        for range in ranges {
            let mut at = range.start.max(done);
            while at < range.end {
                let len = READ_STRIDE.min(range.end - at);
                reads.push(Op::Read { at, len });
                at += len;
            }
            done = done.max(range.end);
        }
        for batch in reads.chunks(MAX_BATCH) {
            self.carry_out(disk, mirror, batch).context("reading the disk through")?;
        }
        Ok(())
    }

    /// One batch: on the disk, on the mirror, compared.
    fn carry_out(&mut self, disk: &mut impl Disk, mirror: &mut Mirror, batch: &[Op]) -> Result<()> {
        let answers = disk.run(batch).with_context(|| format!("in flight: {batch:?}"))?;
        for op in batch {
            mirror.apply(op);
            if !matches!(op, Op::Read { .. } | Op::Flush) {
                self.history.push(op.clone());
            }
        }
        for (op, answer) in batch.iter().zip(answers) {
            if let Op::Read { at, .. } = *op {
                mirror.compare(at, &answer).with_context(|| self.story(op, mirror.cluster()))?;
            }
        }
        Ok(())
    }

    /// The last changes in the neighbourhood of a request.
    fn story(&self, op: &Op, cluster: u64) -> String {
        let (at, len) = op.range();
        let near = at / cluster * cluster..(at + len).next_multiple_of(cluster);
        let touched = self.history.iter().filter(|op| {
            let (at, len) = op.range();
            at < near.end && at + len > near.start
        });
        let mut story = format!("{op:?}; the last changes there, newest first:");
        for op in touched.rev().take(TOLD) {
            let number = if let Op::Write { bytes, .. } = op { number_of(bytes) } else { None };
            let number = number.map_or(String::new(), |number| format!(" ({number})"));
            let _ = write!(story, " {op:?}{number};");
        }
        story
    }

    fn batch(&mut self, mirror: &Mirror) -> Vec<Op> {
        let wanted = self.rng.usize(1..=MAX_BATCH);
        let mut taken: Vec<Range<u64>> = Vec::new();
        let mut batch = Vec::new();
        // A request that would overlap is not replaced: batches vary in size anyway.
        for _ in 0..wanted {
            let op = self.op(mirror);
            let footprint = footprint(&op, mirror);
            if taken.iter().all(|other| footprint.end <= other.start || other.end <= footprint.start) {
                taken.push(footprint);
                batch.push(op);
            }
        }
        batch
    }

    fn op(&mut self, mirror: &Mirror) -> Op {
        let (at, len) = self.range(mirror);
        self.number += 1;
        match self.rng.u32(0..20) {
            0..=9 => {
                let len = len.min(MAX_TRANSFER);
                Op::Write { at, bytes: tagged(at, len, self.number).into() }
            }
            10..=13 => Op::Read { at, len: len.min(MAX_TRANSFER) },
            14..=16 => Op::Zero { at, len, unmap: self.rng.bool() },
            _ if self.discards == Discards::Unsupported => Op::Read { at, len: len.min(MAX_TRANSFER) },
            _ => Op::Discard { at, len },
        }
    }

    /// A range inside a window, its ends at sectors, pages or clusters.
    fn range(&mut self, mirror: &Mirror) -> (u64, u64) {
        let window = self.windows[self.rng.usize(0..self.windows.len())].clone();
        let unit = [SECTOR, 4096, mirror.cluster()][self.rng.usize(0..3)];
        let room = window.end - window.start;
        let at = (window.start + self.rng.u64(0..room)) / unit * unit;
        let at = at.max(window.start);
        let most = match self.rng.u32(0..10) {
            0..=4 => 8 * SECTOR,
            5..=7 => 2 * mirror.cluster(),
            8 => 256 << 10,
            _ => MAX_TRANSFER,
        };
        // `most` is a multiple of a sector, and so is `unit`.
        let len = self.rng.u64(1..=most).next_multiple_of(unit.min(most));
        debug_assert!(at.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR));
        (at, len.min(window.end - at))
    }
}

/// What a request must not share with another that is in flight: its sectors; a discard's clusters,
/// because the kernel may split it anywhere.
fn footprint(op: &Op, mirror: &Mirror) -> Range<u64> {
    let (at, len) = op.range();
    match op {
        Op::Discard { .. } => {
            at / mirror.cluster() * mirror.cluster()..(at + len).next_multiple_of(mirror.cluster())
        }
        _ => at..at + len,
    }
}

/// The whole disk and some hot spots in it: the borders of L2 tables, the end, random places.
fn windows(mirror: &Mirror, rng: &mut fastrand::Rng) -> Vec<Range<u64>> {
    let (size, cluster) = (mirror.size(), mirror.cluster());
    let table = cluster / 8 * cluster;
    let around = |point: u64, reach: u64| {
        let point = point / SECTOR * SECTOR;
        point.saturating_sub(reach)..(point + reach).min(size)
    };
    let is_huge = size > 1 << 30;
    let reach = if is_huge { WINDOW } else { (2 * cluster).min(size / 4 / SECTOR * SECTOR).max(SECTOR) };
    let mut windows = vec![around(0, reach), around(size, reach)];
    let tables = size / table;
    if tables > 0 {
        windows.push(around(rng.u64(1..=tables) * table, reach));
    }
    windows.extend((0..2).map(|_| around(rng.u64(0..size), reach)));
    if !is_huge {
        windows.push(0..size);
    }
    windows.retain(|window| window.start + SECTOR <= window.end);
    windows
}
