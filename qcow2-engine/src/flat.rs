//! The chain below the top, seen as one table.
//!
//! ```text
//!   top        . A . . . B . .       changes; its own slices
//!   layer 1    c . . c . . . .  ┐
//!   layer 2    d d . . . d . .  ├─►  c d r c r d r r       one window of answers
//!   raw        r r r r r r r r  ┘
//! ```
//!
//! Nothing below the top ever changes while the image is open. So what a chain of files answers for a
//! range is worked out once, for a *window* of it, and kept in the cache of slices as a slice of one more
//! layer, behind the last: a look-up then costs two steps, however deep the chain is, and slices of the
//! layers below need not stay in memory.
//!
//! An [`Answer`] is given for each *granule*, the smallest cluster of the layers below. It says what the
//! layer-by-layer way ([`resolve::walk`](crate::resolve)) would say. Where it cannot (compressed clusters,
//! damaged entries, ends of files inside a granule) it names the layer to ask, and the walk begins there.

use crate::{
    cache::{
        directory::Shape,
        slices::{SliceCache, SliceKey},
    },
    layer::{Layer, Qcow2Layer, RawLayer},
};
use qcow2_format::Mapping;

/// Where the chain below the top is flattened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flat {
    /// The number under which the cache knows the windows: that of no layer.
    index: u16,
    granule_bits: u32,
    window_bits: u32,
    windows: u64,
}

/// What the chain below the top has for a granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Zero,
    /// In this layer's file, from this byte.
    Data {
        layer: u16,
        at: u64,
    },
    /// Look it up in the chain from this layer on.
    Ask {
        layer: u16,
    },
}

/// The answers for one window, as they are worked out from the layers, top first.
#[derive(Debug)]
pub(crate) struct Window {
    start: u64,
    granule_bits: u32,
    /// `None` where the layers so far say nothing.
    answers: Vec<Option<Answer>>,
}

/// A chain with more windows is not flattened: their directory alone takes 6 MiB of memory at this limit,
/// while the layers' tables may be a few bytes. It is reached with 64 TiB over a layer with clusters of 1
/// KiB.
const MAX_WINDOWS: u64 = 1 << 28;

const DATA: u64 = 1 << 3;
const ASK: u64 = 1 << 4;
/// Bits of a place in a file. Entries of a table cannot name others; a raw file may be longer.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
const LAYER_SHIFT: u32 = 56;

impl Answer {
    /// The word that the cache keeps. Where the data of neighbours lies in a row, so do the words.
    fn encode(self) -> u64 {
        match self {
            Self::Zero => 0,
            Self::Data { layer, at } if at & !PLACE == 0 && layer < 1 << 8 => {
                u64::from(layer) << LAYER_SHIFT | at | DATA
            }
            Self::Data { layer, .. } | Self::Ask { layer } => u64::from(layer) << 9 | ASK,
        }
    }

    #[inline]
    fn decode(word: u64) -> Self {
        if word & DATA != 0 {
            Self::Data { layer: (word >> LAYER_SHIFT) as u16, at: word & PLACE }
        } else if word & ASK != 0 {
            Self::Ask { layer: (word >> 9) as u16 }
        } else {
            Self::Zero
        }
    }
}

impl Flat {
    /// Flattens what lies below the top, if that is more than one table.
    pub(crate) fn over(layers: &[Layer]) -> Option<Self> {
        let (Layer::Qcow2(top), below) = layers.split_first()? else { return None };
        let tables = || {
            below.iter().filter_map(|layer| match layer {
                Layer::Qcow2(layer) => Some(layer),
                Layer::Raw(_) => None,
            })
        };
        if tables().count() < 2 {
            return None;
        }
        let granule_bits = tables().map(|layer| layer.geometry.cluster_bits).min()?;
        // So that each layer's part of a window lies in one slice.
        let window = tables().map(Qcow2Layer::slice_coverage).min()?;
        let windows = top.geometry.virtual_size.div_ceil(window);
        if windows > MAX_WINDOWS {
            return None;
        }
        Some(Self { index: layers.len() as u16, granule_bits, window_bits: window.trailing_zeros(), windows })
    }

    /// The windows, for the cache.
    pub(crate) fn shape(&self) -> Shape {
        let entries = 1 << (self.window_bits - self.granule_bits);
        Shape { slices: self.windows, entries, step: self.granule() }
    }

    /// Whether a key names a window.
    pub(crate) fn has(&self, key: SliceKey) -> bool {
        key.layer == self.index
    }

    pub(crate) fn granule(&self) -> u64 {
        1 << self.granule_bits
    }

    /// The answer for a byte, or the window that is needed for it.
    #[inline]
    pub(crate) fn look_up(&self, cache: &SliceCache, at: u64) -> Result<Answer, SliceKey> {
        let key = SliceKey { layer: self.index, slice: at >> self.window_bits };
        let index = (at & ((1 << self.window_bits) - 1)) >> self.granule_bits;
        cache.entry(key, index as usize).map(Answer::decode).ok_or(key)
    }

    /// A window about which nothing is known yet.
    pub(crate) fn window(&self, key: SliceKey) -> Window {
        Window {
            start: key.slice << self.window_bits,
            granule_bits: self.granule_bits,
            answers: vec![None; self.shape().entries],
        }
    }
}

impl Window {
    /// The first byte.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Whether no layer further down can have a say.
    pub(crate) fn is_answered(&self) -> bool {
        self.answers.iter().all(Option::is_some)
    }

    /// What is still open is what this raw file has.
    pub(crate) fn ask_raw(&mut self, index: u16, raw: &RawLayer) {
        self.answer(|at, end| {
            Some(if at >= raw.len {
                Answer::Zero
            } else if end <= raw.len {
                Answer::Data { layer: index, at }
            } else {
                Answer::Ask { layer: index }
            })
        });
    }

    /// What this layer has for what is still open. `entries` is the slice of its table that the window
    /// lies in, if there is one.
    pub(crate) fn ask_qcow2(&mut self, layer: &Qcow2Layer, entries: Option<&[u64]>) {
        let size = layer.size();
        self.answer(|at, end| {
            if at >= size {
                return Some(Answer::Zero);
            }
            if end > size {
                return Some(Answer::Ask { layer: layer.index });
            }
            let raw = *entries?.get(layer.slice_at(at).1)?;
            match Mapping::decode(raw, &layer.geometry) {
                Ok(Mapping::Unallocated) => None,
                Ok(Mapping::Zero { .. }) => Some(Answer::Zero),
                Ok(Mapping::Data { host, .. }) => {
                    Some(Answer::Data { layer: layer.index, at: host.0 + layer.geometry.in_cluster(at) })
                }
                Ok(Mapping::Compressed(_)) | Err(_) => Some(Answer::Ask { layer: layer.index }),
            }
        });
    }

    /// What is still open is left to the walk, which finds out what is wrong with this layer's table.
    pub(crate) fn leave_to(&mut self, layer: u16) {
        self.answer(|_, _| Some(Answer::Ask { layer }));
    }

    fn answer(&mut self, say: impl Fn(u64, u64) -> Option<Answer>) {
        let bits = self.granule_bits;
        for (index, answer) in (0_u64..).zip(&mut self.answers) {
            if answer.is_none() {
                let at = self.start + (index << bits);
                *answer = say(at, at + (1 << bits));
            }
        }
    }

    /// The words for the cache. What no layer has reads as zeros.
    pub(crate) fn words(&self) -> Vec<u64> {
        self.answers.iter().map(|answer| answer.unwrap_or(Answer::Zero).encode()).collect()
    }
}

#[cfg(test)]
mod tests;
