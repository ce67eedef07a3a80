//! The bytes of a new, empty image.
//!
//! The layout, each part at a cluster boundary:
//!
//! ```text
//! | header | refcount table | refcount blocks ... | L1 table (zeros) |
//! ```
//!
//! The refcount blocks count every cluster of the image, themselves included. The L1 table is all
//! zeros and last, so it is a hole at the end of the file: it is never handed out as bytes. Where
//! the bytes go, and in which order, is the caller's business; until all are written the file is no
//! image.

use crate::{
    Compression, CryptMethod, Field, FormatError, Geometry, Header, HostOffset, RefcountTableEntry, Version,
    extension::{FeatureName, KNOWN_FEATURES},
    geometry::*,
    header::{self, V2_HEADER_BYTES, V3_HEADER_BYTES},
    refcount, word,
};

/// What a new image overlays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name to store: a path, relative ones being relative to the new image.
    pub name: Vec<u8>,
    /// Its format ("qcow2", "raw"); without it no reader can open the file without guessing.
    pub format: String,
}

/// The choices for a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the virtual disk in bytes; rounded up to a multiple of 512.
    pub virtual_size: u64,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Format version.
    pub version: Version,
    /// log2 of the refcount width in bits.
    pub refcount_order: u32,
    /// The image that it overlays.
    pub backing: Option<Backing>,
    /// Compression of compressed clusters to come.
    pub compression: Compression,
    /// Whether refcount updates may be postponed under the dirty bit.
    pub lazy_refcounts: bool,
}

impl Default for CreateOptions {
    /// As `qemu-img create`: version 3, 64 KiB clusters, 16-bit refcounts; an empty disk.
    fn default() -> Self {
        Self {
            virtual_size: 0,
            cluster_bits: 16,
            version: Version::V3,
            refcount_order: V2_REFCOUNT_ORDER,
            backing: None,
            compression: Compression::Zlib,
            lazy_refcounts: false,
        }
    }
}

/// A planned image.
#[derive(Clone, Debug)]
pub struct Blueprint {
    header: Header,
    first_cluster: Vec<u8>,
    layout: Layout,
}

/// How many clusters each part has, in the order of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    refcount_table: u64,
    refcount_blocks: u64,
    l1_table: u64,
}

impl Blueprint {
    /// Plans an image.
    ///
    /// # Errors
    /// An option outside the format's limits, one that the version cannot express, a disk too large
    /// for the cluster size, or a backing file name that does not fit into the first cluster.
    pub fn new(options: &CreateOptions) -> Result<Self, FormatError> {
        let geometry = checked_geometry(options)?;
        let layout = Layout::plan(&geometry);
        let clusters = layout.refcount_table;
        let max = MAX_REFTABLE_BYTES / geometry.cluster_size();
        if clusters > max {
            return Err(FormatError::RefcountTableTooLarge { clusters, max });
        }
        let mut header = new_header(options, &geometry, &layout);
        let first_cluster = match header.encode() {
            // With the smallest clusters a long name leaves no room for the optional table.
            Err(FormatError::HeaderTooLarge { .. }) if !header.feature_names.is_empty() => {
                header.feature_names.clear();
                header.encode()?
            }
            encoded => encoded?,
        };
        // The decoder is the judge of names and formats, too.
        Header::decode(&first_cluster, layout.total() << geometry.cluster_bits)?;
        Ok(Self { header, first_cluster, layout })
    }

    /// The header of the new image.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Length of the new file in bytes: all clusters, the L1 table's included.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.layout.total() << self.header.cluster_bits
    }

    /// What to write where, as (file offset, bytes), one item per cluster, in ascending order.
    /// Everything in `0..file_len()` that is not named reads as zeros: the file is made empty and
    /// extended to [`Blueprint::file_len`].
    ///
    /// A crash between the writes leaves no valid image when the first item, the header, is written
    /// last.
    pub fn writes(&self) -> impl Iterator<Item = (u64, Vec<u8>)> + '_ {
        let first = std::iter::once((0, self.first_cluster.clone()));
        let table = (0..self.layout.refcount_table).map(|index| self.refcount_table_cluster(index));
        let blocks = (0..self.layout.refcount_blocks).map(|index| self.refcount_block(index));
        first.chain(table).chain(blocks)
    }

    /// The whole file, for images that are made in memory.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.file_len() as usize];
        for (at, part) in self.writes() {
            bytes[at as usize..][..part.len()].copy_from_slice(&part);
        }
        bytes
    }

    /// The range that must read as zeros although it is metadata: the L1 table, as file offset and
    /// length in bytes. Only of interest where extending a file does not give zeros.
    #[must_use]
    pub fn zero_range(&self) -> (u64, u64) {
        (self.header.l1_table.0, self.layout.l1_table << self.header.cluster_bits)
    }

    /// Cluster `index` of the refcount table.
    fn refcount_table_cluster(&self, index: u64) -> (u64, Vec<u8>) {
        let geometry = self.header.geometry();
        let cluster_size = geometry.cluster_size();
        let per_cluster = cluster_size / TABLE_ENTRY_BYTES;
        let block = |block: u64| {
            let first = 1 + self.layout.refcount_table;
            let offset = (block < self.layout.refcount_blocks)
                .then(|| HostOffset((first + block) << geometry.cluster_bits));
            RefcountTableEntry::encode(offset)
        };
        let bytes = word::to_bytes((index * per_cluster..(index + 1) * per_cluster).map(block));
        ((1 + index) << geometry.cluster_bits, bytes)
    }

    /// Refcount block `index`: 1 for every cluster of the image.
    fn refcount_block(&self, index: u64) -> (u64, Vec<u8>) {
        let geometry = self.header.geometry();
        let per_block = geometry.refcounts_per_block();
        let counted = (self.layout.total() - index * per_block).min(per_block);
        let mut bytes = vec![0; geometry.cluster_size() as usize];
        for cluster in 0..counted as usize {
            refcount::set(&mut bytes, geometry.refcount_order, cluster, 1);
        }
        ((1 + self.layout.refcount_table + index) << geometry.cluster_bits, bytes)
    }
}

impl Layout {
    /// The smallest numbers that agree: blocks enough to count everything, a table enough to hold
    /// the blocks. Each grows with the other, and stops, since a block counts many clusters.
    fn plan(geometry: &Geometry) -> Self {
        let l1_table = geometry.clusters_for(geometry.l1_entries() * TABLE_ENTRY_BYTES);
        let mut layout = Self { refcount_table: 1, refcount_blocks: 1, l1_table };
        loop {
            let refcount_blocks = layout.total().div_ceil(geometry.refcounts_per_block());
            let refcount_table = geometry.clusters_for(refcount_blocks * TABLE_ENTRY_BYTES);
            let next = Self { refcount_table, refcount_blocks, l1_table };
            if next == layout {
                return layout;
            }
            layout = next;
        }
    }

    /// Clusters of the whole image.
    const fn total(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks + self.l1_table
    }
}

/// The options as a geometry, after the checks that the arithmetic relies on.
fn checked_geometry(options: &CreateOptions) -> Result<Geometry, FormatError> {
    let &CreateOptions { virtual_size, cluster_bits, version, refcount_order, .. } = options;
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
        let (min, max) = (MIN_CLUSTER_BITS, MAX_CLUSTER_BITS);
        return Err(FormatError::ClusterBits { value: cluster_bits, min, max });
    }
    if refcount_order > MAX_REFCOUNT_ORDER {
        return Err(FormatError::RefcountOrder { value: refcount_order });
    }
    let too_large = FormatError::VirtualSize { value: virtual_size, max: MAX_VIRTUAL_SIZE };
    let virtual_size =
        virtual_size.checked_next_multiple_of(SECTOR_BYTES).filter(|size| *size <= MAX_VIRTUAL_SIZE);
    let virtual_size = virtual_size.ok_or(too_large)?;
    let geometry = Geometry { version, cluster_bits, refcount_order, extended_l2: false, virtual_size };
    let entries = geometry.l1_entries();
    if entries > MAX_L1_ENTRIES {
        let field = Field::new("l1_size", header::L1_SIZE_OFFSET);
        return Err(FormatError::L1TooLarge { field, entries, max: MAX_L1_ENTRIES });
    }
    Ok(geometry)
}

/// The header of the new image.
fn new_header(options: &CreateOptions, geometry: &Geometry, layout: &Layout) -> Header {
    let at = |cluster: u64| HostOffset(cluster << geometry.cluster_bits);
    let v3 = options.version == Version::V3;
    let zstd = options.compression == Compression::Zstd;
    Header {
        version: options.version,
        cluster_bits: options.cluster_bits,
        virtual_size: geometry.virtual_size,
        crypt: CryptMethod::None,
        l1_entries: geometry.l1_entries() as u32,
        l1_table: at(1 + layout.refcount_table + layout.refcount_blocks),
        refcount_table: at(1),
        refcount_table_clusters: layout.refcount_table as u32,
        snapshot_count: 0,
        snapshot_table: HostOffset(0),
        incompatible: if v3 && zstd { header::COMPRESSION } else { 0 },
        compatible: if options.lazy_refcounts { header::LAZY_REFCOUNTS } else { 0 },
        autoclear: 0,
        refcount_order: options.refcount_order,
        header_length: if v3 { V3_HEADER_BYTES } else { V2_HEADER_BYTES },
        compression: options.compression,
        unknown_fields: if v3 { vec![0; 7] } else { Vec::new() },
        backing_file: options.backing.as_ref().map(|backing| backing.name.clone()),
        backing_format: options.backing.as_ref().map(|backing| backing.format.clone()),
        data_file: None,
        feature_names: if v3 { feature_names() } else { Vec::new() },
        bitmaps: None,
        crypto_header: None,
        unknown_extensions: Vec::new(),
    }
}

/// Names of all feature bits that are known.
fn feature_names() -> Vec<FeatureName> {
    let table = KNOWN_FEATURES.into_iter();
    table.map(|(kind, bit, name)| FeatureName { kind: kind.number(), bit, name: name.into() }).collect()
}

#[cfg(test)]
mod tests;
