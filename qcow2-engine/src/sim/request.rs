//! What is asked of an image, in sectors of its virtual disk.

use super::{rng::Rng, workload::SECTORS};

/// Requests from this sector on are meant for what is behind the gap of a disk that has one.
const BEHIND: usize = 224;

/// The disk that requests are for.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Its length.
    pub sectors: usize,
    /// Of a cluster.
    pub cluster_sectors: usize,
    /// What no request is meant for.
    pub gap: usize,
}

/// A request of a workload. Sectors are of the virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Write sectors.
    Write(usize, usize),
    /// Read sectors.
    Read(usize, usize),
    /// Write zeroes; whether the space is kept.
    Zero(usize, usize, bool),
    /// Discard.
    Discard(usize, usize),
    /// Flush.
    Flush,
    /// The periodic work: write back, give freed clusters back.
    Maintain,
    /// The search for leaks, with windows of so many clusters.
    Reclaim(u64),
}

impl Request {
    /// The requests of the exhaustive sequences: around one cluster, and across two L2 tables.
    pub const ALPHABET: [Self; 10] = [
        Self::Read(5, 5),
        Self::Write(7, 1),
        Self::Write(6, 2),
        Self::Write(253, 6),
        Self::Zero(6, 2, false),
        Self::Zero(6, 3, true),
        Self::Discard(4, 6),
        Self::Discard(252, 8),
        Self::Flush,
        Self::Maintain,
    ];

    /// Any request.
    #[must_use]
    pub fn random(rng: &mut Rng) -> Self {
        let at = rng.below(SECTORS as u64) as usize;
        let count = 1 + rng.below((SECTORS - at).min(24) as u64) as usize;
        match rng.below(16) {
            0..=6 => Self::Write(at, count),
            7 => Self::Read(at, count),
            8..=9 => Self::Zero(at, count, rng.below(2) == 0),
            10..=11 => Self::Discard(at, count),
            12..=13 => Self::Flush,
            _ => Self::Maintain,
        }
    }

    /// The request as it is for such a disk.
    #[must_use]
    pub fn on(self, shape: Shape) -> Self {
        let behind = |at: usize| if at < BEHIND { at } else { at + shape.gap };
        match self {
            Self::Write(at, count) => Self::Write(behind(at), count),
            Self::Read(at, count) => Self::Read(behind(at), count),
            Self::Zero(at, count, keeps) => Self::Zero(behind(at), count, keeps),
            Self::Discard(at, count) => Self::Discard(behind(at), count),
            Self::Flush | Self::Maintain | Self::Reclaim(_) => self,
        }
    }

    /// The sectors whose content it changes.
    #[must_use]
    pub fn sectors(&self, shape: Shape) -> std::ops::Range<usize> {
        match *self {
            Self::Write(at, count) | Self::Zero(at, count, _) => at..at + count,
            Self::Discard(at, count) => {
                let (size, end) = (shape.cluster_sectors, at + count);
                let first = at.next_multiple_of(size);
                let end = if end == shape.sectors { end } else { end / size * size };
                first..end.max(first)
            }
            Self::Read(..) | Self::Flush | Self::Maintain | Self::Reclaim(_) => 0..0,
        }
    }
}
