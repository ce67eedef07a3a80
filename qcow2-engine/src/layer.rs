//! One file of a backing chain, and how a guest offset is found in it.
//!
//! A layer knows its geometry and its L1 table (always in memory, as atomics: only the top layer's
//! ever changes); L2 slices are in the cache that all layers share. Nothing here waits: a look-up
//! either answers or names the slice that has to be loaded.

use crate::{
    cache::{
        directory::Shape,
        slices::{SliceCache, SliceKey},
    },
    error::{Error, Result},
    io::{FileId, SECTOR, whole_sectors},
    l1::L1Table,
};
use qcow2_format::{Compression, Geometry, GuestCluster, HostOffset, L1Entry, Mapping};
use std::sync::Arc;

/// A file of the chain.
pub(crate) enum Layer {
    Qcow2(Qcow2Layer),
    Raw(RawLayer),
}

/// A raw backing file.
pub(crate) struct RawLayer {
    pub(crate) file: FileId,
    pub(crate) name: Arc<str>,
    /// Length in bytes, rounded up to a sector: the tail of an odd last sector reads as zeros.
    pub(crate) len: u64,
}

/// A QCOW2 file.
pub(crate) struct Qcow2Layer {
    pub(crate) index: u16,
    pub(crate) file: FileId,
    pub(crate) name: Arc<str>,
    pub(crate) geometry: Geometry,
    /// Bytes of an L2 slice: a page, or the whole table where that is smaller.
    pub(crate) slice_bytes: u64,
    pub(crate) compression: Compression,
    /// The L1 table, padded to whole pages.
    pub(crate) l1: L1Table,
    /// Where the L1 table lies in the file.
    pub(crate) l1_at: HostOffset,
}

/// What a disk of so many bytes shows to images above it: its whole sectors, as QEMU has it. A last sector
/// that it has a part of reads as zeros there, and so must it here: that is what guests of the overlay have
/// seen.
pub(crate) fn size_below(virtual_size: u64) -> u64 {
    virtual_size - virtual_size % SECTOR
}

/// What a look-up in one layer gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lookup<E = Mapping> {
    /// The L1 table has no L2 table for the offset.
    NoTable,
    /// The cluster's mapping, or its entry as it is.
    Entry(E),
    /// This slice has to be loaded first.
    Miss(SliceKey),
}

impl Layer {
    pub(crate) fn file(&self) -> FileId {
        match self {
            Self::Qcow2(layer) => layer.file,
            Self::Raw(layer) => layer.file,
        }
    }

    pub(crate) fn as_qcow2(&self) -> Option<&Qcow2Layer> {
        match self {
            Self::Qcow2(layer) => Some(layer),
            Self::Raw(_) => None,
        }
    }

    /// Its slices, for the cache.
    pub(crate) fn shape(&self) -> Shape {
        match self {
            Self::Qcow2(layer) => layer.shape(),
            Self::Raw(_) => Shape { slices: 0, entries: 0, step: 0 },
        }
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        match self {
            Self::Qcow2(layer) => &layer.name,
            Self::Raw(layer) => &layer.name,
        }
    }
}

impl Qcow2Layer {
    /// Clusters that a slice maps.
    pub(crate) fn slice_entries(&self) -> u64 {
        self.slice_bytes / self.geometry.l2_entry_bytes()
    }

    /// Bytes of the disk that a slice maps.
    pub(crate) fn slice_coverage(&self) -> u64 {
        self.slice_entries() * self.geometry.cluster_size()
    }

    /// Size of the disk in whole sectors: of the top with the last that it has a part of, of others as
    /// [`size_below`].
    pub(crate) fn size(&self) -> u64 {
        let size = self.geometry.virtual_size;
        if self.index == 0 { whole_sectors(size) } else { size_below(size) }
    }

    /// Whether a request lies inside the disk.
    #[inline]
    pub(crate) fn has_range(&self, at: u64, len: u64) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.size())
    }

    pub(crate) fn slices_per_table(&self) -> u64 {
        self.geometry.cluster_size() / self.slice_bytes
    }

    fn shape(&self) -> Shape {
        Shape {
            slices: self.l1.len() as u64 * self.slices_per_table(),
            entries: self.slice_entries() as usize,
            step: self.geometry.cluster_size(),
        }
    }

    /// The slice and the entry in it that map a guest offset.
    #[inline]
    pub(crate) fn slice_at(&self, guest: u64) -> (SliceKey, usize) {
        let GuestCluster(cluster) = self.geometry.guest_cluster(guest);
        let entries = self.slice_entries();
        (SliceKey { layer: self.index, slice: cluster / entries }, (cluster % entries) as usize)
    }

    /// The first cluster that a slice maps.
    pub(crate) fn first_in_slice(&self, slice: u64) -> GuestCluster {
        GuestCluster(slice * self.slice_entries())
    }

    /// The first cluster behind those that the same slice maps.
    pub(crate) fn slice_end(&self, cluster: GuestCluster) -> GuestCluster {
        self.first_in_slice(cluster.0 / self.slice_entries() + 1)
    }

    /// The L1 entry for a guest offset.
    pub(crate) fn l1_entry(&self, guest: u64) -> Result<L1Entry> {
        let raw = self.l1.get(self.geometry.l1_index(guest));
        L1Entry::decode(raw, &self.geometry).map_err(|source| self.corrupt("L1", guest, source))
    }

    /// Where a slice lies in the file, if its table exists.
    pub(crate) fn slice_location(&self, slice: u64) -> Result<Option<u64>> {
        let guest = self.geometry.guest_offset(self.first_in_slice(slice));
        Ok(match self.l1_entry(guest)? {
            L1Entry::Unallocated => None,
            L1Entry::Table { offset, .. } => {
                Some(offset.0 + slice % self.slices_per_table() * self.slice_bytes)
            }
        })
    }

    /// The mapping of a guest offset, if it is in memory and sound: [`Self::look_up`] tells what is amiss.
    #[inline]
    pub(crate) fn resident(&self, cache: &SliceCache, guest: u64) -> Option<Mapping> {
        let (key, index) = self.slice_at(guest);
        Mapping::decode(cache.entry(key, index)?, &self.geometry).ok()
    }

    /// Looks the mapping of a guest offset up.
    #[inline]
    pub(crate) fn look_up(&self, cache: &SliceCache, guest: u64) -> Result<Lookup> {
        Ok(match self.find(cache, guest)? {
            Lookup::NoTable => Lookup::NoTable,
            Lookup::Miss(key) => Lookup::Miss(key),
            Lookup::Entry(raw) => Mapping::decode(raw, &self.geometry)
                .map(Lookup::Entry)
                .map_err(|source| self.corrupt("L2", guest, source))?,
        })
    }

    /// [`Self::look_up`] of the entry as it is, whatever it means.
    #[inline]
    pub(crate) fn find(&self, cache: &SliceCache, guest: u64) -> Result<Lookup<u64>> {
        let (key, index) = self.slice_at(guest);
        if let Some(raw) = cache.entry(key, index) {
            return Ok(Lookup::Entry(raw));
        }
        Ok(match self.l1_entry(guest)? {
            L1Entry::Unallocated => Lookup::NoTable,
            L1Entry::Table { .. } => Lookup::Miss(key),
        })
    }

    pub(crate) fn corrupt(&self, table: &'static str, at: u64, source: qcow2_format::Corruption) -> Error {
        Error::Corrupt { file: Arc::clone(&self.name), table, at, source }
    }
}
