//! From a range of the virtual disk to where its bytes are: the read side of the mapping.
//!
//! Resolving is synchronous. It goes cluster by cluster, asks the top layer and then the flattened rest
//! of the chain ([`flat`](crate::flat)), or each layer in turn where there is nothing to flatten, and joins
//! what is contiguous on the host; when a slice is not in memory it stops and names it. The payload is
//! moved by whoever asked.

use crate::{
    cache::slices::{SliceCache, SliceKey},
    error::{Error, Result},
    flat::{Answer, Flat},
    io::FileId,
    layer::{Layer, Lookup, Qcow2Layer},
};
use qcow2_format::{CompressedRange, Mapping};
use smallvec::SmallVec;

/// A part of a request whose bytes come from one place. Lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Bytes of a file, contiguous from `at`.
    Data {
        /// The file.
        file: FileId,
        /// Byte offset in it.
        at: u64,
        /// Length.
        len: u64,
    },
    /// Reads as zeros.
    Zero {
        /// Length.
        len: u64,
    },
    /// A part of a compressed cluster.
    Compressed {
        /// The layer of the chain whose cluster it is; 0 is the top.
        layer: u16,
        /// The compressed bytes.
        range: CompressedRange,
        /// Bytes of the decompressed cluster before the part.
        skip: u64,
        /// Length.
        len: u64,
    },
}

/// The extents of a request, in guest order.
pub type Extents = SmallVec<[Extent; 2]>;

/// Why a range could not be resolved.
#[derive(Debug)]
pub(crate) enum Stop {
    /// This slice has to be loaded first.
    Miss(SliceKey),
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Extent {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match *self {
            Self::Data { len, .. } | Self::Zero { len } | Self::Compressed { len, .. } => len,
        }
    }

    /// Whether it covers nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it reads as zeros because there is no data.
    pub(crate) fn is_zero(&self) -> bool {
        matches!(self, Self::Zero { .. })
    }

    /// Appends `next` when it goes on where this one ends.
    fn join(&mut self, next: &Self) -> bool {
        match (self, *next) {
            (Self::Data { file, at, len }, Self::Data { file: next_file, at: next_at, len: more })
                if *file == next_file && *at + *len == next_at =>
            {
                *len += more;
                true
            }
            (Self::Zero { len }, Self::Zero { len: more }) => {
                *len += more;
                true
            }
            (
                Self::Compressed { layer, range, skip, len },
                Self::Compressed { layer: next_layer, range: next_range, skip: next_skip, len: more },
            ) if *layer == next_layer && *range == next_range && *skip + *len == next_skip => {
                *len += more;
                true
            }
            _ => false,
        }
    }
}

/// A chain and what is in memory of its tables.
#[derive(Clone, Copy)]
pub(crate) struct Chain<'a> {
    pub(crate) layers: &'a [Layer],
    pub(crate) flat: Option<&'a Flat>,
    pub(crate) cache: &'a SliceCache,
}

/// What some layers say about a range.
enum Said {
    Extent(Extent),
    /// Nothing, for so many bytes from its start.
    Nothing(u64),
}

impl Chain<'_> {
    /// Resolves `len` bytes at guest offset `at`, from where `extents` ends. What has been resolved
    /// before a miss stays: a request may need more slices than the cache holds at a time, so it must
    /// never need one of them twice.
    pub(crate) fn resolve(&self, at: u64, len: u64, extents: &mut Extents) -> Result<(), Stop> {
        let mut done: u64 = extents.iter().map(Extent::len).sum();
        while done < len {
            let next = self.step(at + done, len - done)?;
            done += next.len();
            if !extents.last_mut().is_some_and(|last| last.join(&next)) {
                extents.push(next);
            }
        }
        Ok(())
    }

    /// Resolves the longest prefix of the range that one look-up answers.
    #[inline]
    pub(crate) fn step(&self, at: u64, len: u64) -> Result<Extent, Stop> {
        match self.ask(0, at, len)? {
            Said::Extent(extent) => Ok(extent),
            Said::Nothing(len) => self.below(at, len),
        }
    }

    /// Whether the top layer has what one look-up there answers, the longest prefix of the range, and its length.
    pub(crate) fn top_has(&self, at: u64, len: u64) -> Result<(bool, u64), Stop> {
        Ok(match self.ask(0, at, len)? {
            Said::Extent(extent) => (true, extent.len()),
            Said::Nothing(len) => (false, len),
        })
    }

    /// [`Self::step`], for a range of which the top layer says nothing.
    #[inline]
    pub(crate) fn below(&self, at: u64, len: u64) -> Result<Extent, Stop> {
        let Some(flat) = self.flat else { return self.walk(1, at, len) };
        let len = len.min(to_boundary(at, flat.granule()));
        match flat.look_up(self.cache, at).map_err(Stop::Miss)? {
            Answer::Zero => Ok(Extent::Zero { len }),
            Answer::Data { layer, at: granule } => {
                let file = self.layers[usize::from(layer)].file();
                Ok(Extent::Data { file, at: granule + (at & (flat.granule() - 1)), len })
            }
            Answer::Ask { layer } => self.walk(usize::from(layer), at, len),
        }
    }

    /// Asks the layers from `first` on, one after the other.
    fn walk(&self, first: usize, at: u64, mut len: u64) -> Result<Extent, Stop> {
        for index in first..self.layers.len() {
            match self.ask(index, at, len)? {
                Said::Extent(extent) => return Ok(extent),
                Said::Nothing(less) => len = less,
            }
        }
        Ok(Extent::Zero { len })
    }

    /// Asks one layer.
    #[inline]
    fn ask(&self, index: usize, at: u64, mut len: u64) -> Result<Said, Stop> {
        let layer = match &self.layers[index] {
            Layer::Raw(raw) if at >= raw.len => return Ok(Said::Extent(Extent::Zero { len })),
            Layer::Raw(raw) => {
                return Ok(Said::Extent(Extent::Data { file: raw.file, at, len: len.min(raw.len - at) }));
            }
            Layer::Qcow2(layer) => layer,
        };
        // A shorter backing file reads as zeros beyond its end; what is below it does not show.
        let Some(rest) = layer.size().checked_sub(at).filter(|&rest| rest > 0) else {
            return Ok(Said::Extent(Extent::Zero { len }));
        };
        len = len.min(rest);
        Ok(match layer.look_up(self.cache, at)? {
            Lookup::Miss(key) => return Err(Stop::Miss(key)),
            Lookup::NoTable => Said::Nothing(len.min(to_boundary(at, layer.geometry.l2_coverage_bytes()))),
            Lookup::Entry(mapping) => {
                len = len.min(to_boundary(at, layer.geometry.cluster_size()));
                place(layer, mapping, at, len).map_or(Said::Nothing(len), Said::Extent)
            }
        })
    }
}

/// The extent that a mapping gives, or `None` where the next layer has the bytes.
#[inline]
fn place(layer: &Qcow2Layer, mapping: Mapping, at: u64, len: u64) -> Option<Extent> {
    let skip = layer.geometry.in_cluster(at);
    Some(match mapping {
        Mapping::Unallocated => return None,
        Mapping::Zero { .. } => Extent::Zero { len },
        Mapping::Data { host, .. } => Extent::Data { file: layer.file, at: host.0 + skip, len },
        Mapping::Compressed(range) => Extent::Compressed { layer: layer.index, range, skip, len },
    })
}

/// Bytes from `at` to the next multiple of `unit`, a power of two.
#[inline]
pub(crate) fn to_boundary(at: u64, unit: u64) -> u64 {
    unit - (at & (unit - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_on_the_host_are_joined() {
        let data = |at, len| Extent::Data { file: FileId(0), at, len };
        let mut first = data(4096, 512);
        assert!(first.join(&data(4608, 1024)));
        assert_eq!(first, data(4096, 1536));
        assert!(!first.join(&data(0, 512)));
        assert!(!first.join(&Extent::Zero { len: 512 }));
        assert!(!first.join(&Extent::Data { file: FileId(1), at: 5632, len: 512 }));
    }

    #[test]
    fn a_boundary_counts_from_the_offset() {
        assert_eq!([0, 1, 511, 512].map(|at| to_boundary(at, 512)), [512, 511, 1, 512]);
    }
}
