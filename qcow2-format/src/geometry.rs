//! The numbers that every address computation of one image needs, and the arithmetic on them.
//!
//! A [`Geometry`] is a copy of a few header fields. The arithmetic is total for every geometry that
//! [`Header::decode`](crate::Header::decode) hands out: `cluster_bits` within
//! [`MIN_CLUSTER_BITS`]..=[`MAX_CLUSTER_BITS`] and `refcount_order` at most [`MAX_REFCOUNT_ORDER`].
//! It knows nothing of where tables lie in the file.

use crate::{GuestCluster, HostCluster, HostOffset};
use std::ops::Range;

/// Smallest cluster: 512 bytes ("must not be less than 9").
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster: 2 MiB. QEMU's limit; the specification names none.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Smallest cluster with extended L2 entries: 16 KiB, so that a subcluster is at least 512 bytes.
pub const MIN_CLUSTER_BITS_EXTENDED_L2: u32 = 14;
/// Subclusters per cluster with extended L2 entries.
pub const SUBCLUSTERS_PER_CLUSTER: u32 = 32;
/// Widest refcount: 1 << 6 = 64 bits.
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// The refcount order of every version 2 image: 16 bits.
pub const V2_REFCOUNT_ORDER: u32 = 4;
/// Largest L1 table in bytes, as QEMU: 4 Mi entries.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest L1 table in entries.
pub const MAX_L1_ENTRIES: u64 = MAX_L1_BYTES / TABLE_ENTRY_BYTES;
/// Largest refcount table in bytes, as QEMU: 1 Mi blocks.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots, as QEMU.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Largest virtual disk in bytes: offsets of a Linux block device are signed.
pub const MAX_VIRTUAL_SIZE: u64 = i64::MAX as u64;
/// L1, L2 and refcount table entries hold bits 9 to 55 of an offset: a cluster that a mapping can
/// name lies below 64 PiB.
pub const MAX_MAPPED_HOST_BYTES: u64 = 1 << 56;
/// The unit of a virtual disk's size, and of what a compressed cluster takes in the file, in bytes.
pub const SECTOR_BYTES: u64 = 512;
/// Size in bytes of an L1, refcount table or bitmap table entry.
pub const TABLE_ENTRY_BYTES: u64 = 8;

/// The version field of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// The format of QEMU 0.8.3: no feature bits, no zero clusters, 16-bit refcounts.
    V2,
    /// The format of QEMU 1.1 ("compat=1.1").
    V3,
}

impl Version {
    /// The number in the header's version field.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Self::V2 => 2,
            Self::V3 => 3,
        }
    }
}

/// Cluster, refcount and disk sizes of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Format version.
    pub version: Version,
    /// log2 of the cluster size in bytes.
    pub cluster_bits: u32,
    /// log2 of the refcount width in bits.
    pub refcount_order: u32,
    /// Whether L2 entries are 16 bytes with a subcluster bitmap.
    pub extended_l2: bool,
    /// Size of the virtual disk in bytes.
    pub virtual_size: u64,
}

impl Geometry {
    /// Cluster size in bytes.
    #[inline]
    #[must_use]
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// How many clusters `bytes` occupy, rounded up.
    #[inline]
    #[must_use]
    pub const fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// The cluster of the file that holds a byte.
    #[inline]
    #[must_use]
    pub const fn host_cluster(&self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    /// The clusters of the file that these bytes touch, the first and the last of them perhaps in part.
    #[inline]
    #[must_use]
    pub const fn host_clusters(&self, bytes: &Range<HostOffset>) -> Range<HostCluster> {
        self.host_cluster(bytes.start)..HostCluster(self.clusters_for(bytes.end.0))
    }

    /// Where a cluster of the file starts. The cluster comes from an offset, or was allocated.
    #[inline]
    #[must_use]
    pub const fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// The cluster of the virtual disk that holds a byte.
    #[inline]
    #[must_use]
    pub const fn guest_cluster(&self, offset: u64) -> GuestCluster {
        GuestCluster(offset >> self.cluster_bits)
    }

    /// Where a cluster of the virtual disk starts, in bytes.
    #[inline]
    #[must_use]
    pub const fn guest_offset(&self, cluster: GuestCluster) -> u64 {
        cluster.0 << self.cluster_bits
    }

    /// Offset of the byte within its cluster. The same for guest and host offsets.
    #[inline]
    #[must_use]
    pub const fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// The offset rounded down to the start of its cluster.
    #[inline]
    #[must_use]
    pub const fn cluster_start(&self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// Size of an L2 entry in bytes: 8, or 16 with extended L2 entries.
    #[inline]
    #[must_use]
    pub const fn l2_entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries per L2 table; a table is exactly one cluster.
    #[inline]
    #[must_use]
    pub const fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// Bytes of the virtual disk that one L2 table maps.
    #[inline]
    #[must_use]
    pub const fn l2_coverage_bytes(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// L1 entries that the virtual size needs, rounded up. An image may have more.
    #[inline]
    #[must_use]
    pub const fn l1_entries(&self) -> u64 {
        self.virtual_size.div_ceil(self.l2_coverage_bytes())
    }

    /// Index into the L1 table of a guest offset.
    #[inline]
    #[must_use]
    pub const fn l1_index(&self, guest: u64) -> u64 {
        guest >> (self.cluster_bits + self.l2_bits())
    }

    /// Index into its L2 table of a guest offset.
    #[inline]
    #[must_use]
    pub const fn l2_index(&self, guest: u64) -> u64 {
        (guest >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// Size of a subcluster in bytes; only meaningful with extended L2 entries.
    #[inline]
    #[must_use]
    pub const fn subcluster_size(&self) -> u64 {
        self.cluster_size() / SUBCLUSTERS_PER_CLUSTER as u64
    }

    /// Width of a refcount in bits: 1 to 64.
    #[inline]
    #[must_use]
    pub const fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Refcounts per refcount block; a block is exactly one cluster.
    #[inline]
    #[must_use]
    pub const fn refcounts_per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    /// The largest refcount that fits the width.
    #[inline]
    #[must_use]
    pub const fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Bytes of the image file that one refcount block covers.
    #[inline]
    #[must_use]
    pub const fn refcount_block_coverage_bytes(&self) -> u64 {
        1 << (2 * self.cluster_bits + 3 - self.refcount_order)
    }

    /// Index into the refcount table of the block that counts a host cluster.
    #[inline]
    #[must_use]
    pub const fn refcount_table_index(&self, cluster: HostCluster) -> u64 {
        cluster.0 / self.refcounts_per_block()
    }

    /// Index into its refcount block of a host cluster.
    #[inline]
    #[must_use]
    pub const fn refcount_block_index(&self, cluster: HostCluster) -> u64 {
        cluster.0 % self.refcounts_per_block()
    }

    /// log2 of the entries per L2 table: `cluster_size / 8`, halved by extended L2 entries.
    #[inline]
    const fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every geometry that a header may carry.
    pub(crate) fn any_geometry() -> impl Strategy<Value = Geometry> {
        let bits = MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS;
        (any::<bool>(), bits, 0..=MAX_REFCOUNT_ORDER, any::<bool>(), 0..=MAX_VIRTUAL_SIZE).prop_map(
            |(v3, cluster_bits, order, extended, virtual_size)| Geometry {
                version: if v3 { Version::V3 } else { Version::V2 },
                cluster_bits,
                refcount_order: if v3 { order } else { V2_REFCOUNT_ORDER },
                extended_l2: v3 && extended && cluster_bits >= MIN_CLUSTER_BITS_EXTENDED_L2,
                virtual_size,
            },
        )
    }

    pub(crate) fn geometry(cluster_bits: u32) -> Geometry {
        let (version, virtual_size) = (Version::V3, 1 << 30);
        Geometry { version, cluster_bits, refcount_order: 4, extended_l2: false, virtual_size }
    }

    #[test]
    fn default_clusters_cover_512_mib_per_table() {
        let g = geometry(16);
        assert_eq!(g.l2_entries(), 8192);
        assert_eq!(g.l2_coverage_bytes(), 512 << 20);
        assert_eq!(g.l1_entries(), 2);
        assert_eq!(g.refcounts_per_block(), 32768);
        assert_eq!(g.refcount_max(), 65535);
        assert_eq!(g.refcount_block_coverage_bytes(), 2 << 30);
    }

    #[test]
    fn bytes_touch_the_clusters_that_they_lie_in() {
        let g = geometry(16);
        let touched = |at, len| g.host_clusters(&HostOffset(at).bytes(len));
        assert_eq!(touched(0x5_0000, 0x1_0000), HostCluster(5).row(1));
        assert_eq!(touched(0x5_ffff, 2), HostCluster(5).row(2));
        assert_eq!(touched(0x5_0000, 0), HostCluster(5).row(0));
    }

    #[test]
    fn extended_entries_halve_the_table() {
        let g = Geometry { extended_l2: true, ..geometry(16) };
        assert_eq!((g.l2_entry_bytes(), g.l2_entries(), g.subcluster_size()), (16, 4096, 2048));
    }

    proptest! {
        #[test]
        fn an_offset_is_its_indices_put_together(g in any_geometry(), guest in any::<u64>()) {
            let cluster = g.l1_index(guest) * g.l2_entries() + g.l2_index(guest);
            prop_assert_eq!(cluster * g.cluster_size() + g.in_cluster(guest), guest);
            prop_assert_eq!(g.cluster_start(guest) + g.in_cluster(guest), guest);
            prop_assert!(g.l2_index(guest) < g.l2_entries());
        }

        #[test]
        fn the_l1_table_reaches_the_last_byte(g in any_geometry()) {
            prop_assume!(g.virtual_size > 0);
            prop_assert_eq!(g.l1_index(g.virtual_size - 1) + 1, g.l1_entries());
        }

        #[test]
        fn a_refcount_block_is_one_cluster(g in any_geometry()) {
            prop_assert_eq!(g.refcounts_per_block() * u64::from(g.refcount_bits()), g.cluster_size() * 8);
            prop_assert_eq!(g.refcount_block_coverage_bytes(), g.refcounts_per_block() * g.cluster_size());
        }
    }
}
