//! The descriptor of a compressed cluster: a byte range of the image file.
//!
//! Which algorithm made the bytes is the header's business; how far they are valid only the
//! decompressor finds out, since the descriptor counts whole 512-byte sectors.

use crate::{
    Corruption, Geometry, HostCluster, HostOffset,
    error::EntryKind,
    geometry::{MAX_MAPPED_HOST_BYTES, SECTOR_BYTES},
    l2::{COMPRESSED, COPIED},
};
use std::ops::Range;

/// Where the bytes of a compressed cluster lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CompressedRange {
    /// First byte in the image file; usually not aligned to anything.
    pub offset: u64,
    /// Bytes up to the end of the last sector; the compressed stream may end earlier.
    pub len: u64,
}

impl CompressedRange {
    /// The range that a descriptor for `len` compressed bytes at `offset` names: up to the end of
    /// the last sector touched. `None` when the descriptor has no room for it: `len` 0, or an offset
    /// or a sector count beyond the bits of this cluster size.
    #[must_use]
    pub fn new(offset: u64, len: u64, geometry: &Geometry) -> Option<Self> {
        let shift = offset_bits(geometry);
        let end = offset.checked_add(len)?.checked_next_multiple_of(SECTOR_BYTES)?;
        let extra_sectors = (end.checked_sub(offset & !(SECTOR_BYTES - 1))? / SECTOR_BYTES).checked_sub(1)?;
        let fits = len > 0 && offset < offset_limit(shift) && extra_sectors < 1 << (62 - shift);
        (fits && offset >= geometry.cluster_size()).then_some(Self { offset, len: end - offset })
    }

    /// Decodes a host-endian L2 entry whose bit 62 is set.
    ///
    /// Specification, "Compressed Clusters Descriptor": with `x = 62 - (cluster_bits - 8)`, bits 0 to
    /// x-1 are the byte offset, of which bits above 55 must be 0; bits x to 61 count the additional
    /// sectors beyond the one that holds the first byte. Bit 63 is 0 for compressed clusters.
    ///
    /// # Errors
    /// Bit 63 set, offset bits above 55, or an offset inside the header cluster.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, Corruption> {
        debug_assert!(raw & COMPRESSED != 0);
        if raw & COPIED != 0 {
            return Err(Corruption::CompressedCopied { raw });
        }
        let shift = offset_bits(geometry);
        let descriptor = raw & !(COPIED | COMPRESSED);
        let offset = descriptor & ((1 << shift) - 1);
        if offset >= offset_limit(shift) {
            return Err(Corruption::ReservedBits { entry: EntryKind::L2, raw });
        }
        if offset < geometry.cluster_size() {
            return Err(Corruption::CompressedInHeader { raw });
        }
        let sectors = (descriptor >> shift) + 1;
        Ok(Self { offset, len: sectors * SECTOR_BYTES - offset % SECTOR_BYTES })
    }

    /// The host-endian L2 entry, bit 62 included.
    #[must_use]
    pub fn encode(&self, geometry: &Geometry) -> u64 {
        debug_assert_eq!(Self::new(self.offset, self.len, geometry), Some(*self));
        let extra_sectors = (self.offset % SECTOR_BYTES + self.len).div_ceil(SECTOR_BYTES).saturating_sub(1);
        COMPRESSED | extra_sectors << offset_bits(geometry) | self.offset
    }

    /// The part that a compressor can have filled: what does not become smaller than a cluster is kept
    /// as it is. A descriptor may claim nearly twice as much, and then names somebody else's clusters.
    #[must_use]
    pub fn plausible(&self, geometry: &Geometry) -> Self {
        let end = (self.offset + geometry.cluster_size()).next_multiple_of(SECTOR_BYTES);
        Self { offset: self.offset, len: self.len.min(end - self.offset) }
    }

    /// The host clusters that the range touches; each holds one reference per compressed cluster.
    #[must_use]
    pub fn host_clusters(&self, geometry: &Geometry) -> Range<HostCluster> {
        geometry.host_clusters(&HostOffset(self.offset).bytes(self.len.max(1)))
    }
}

/// The specification's `x`: how many bits of the descriptor are offset.
fn offset_bits(geometry: &Geometry) -> u32 {
    62 - (geometry.cluster_bits - 8)
}

/// First offset that no descriptor may hold.
fn offset_limit(shift: u32) -> u64 {
    (1 << shift).min(MAX_MAPPED_HOST_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::tests::{any_geometry, geometry};
    use proptest::prelude::*;

    #[test]
    fn no_more_than_a_cluster_is_plausible() {
        let g = geometry(16);
        let longest = CompressedRange::new(0x5_0064, (64 << 10) - 1, &g).unwrap();
        assert_eq!(longest.plausible(&g), longest);
        let claimed = CompressedRange { offset: 0x5_0000, len: 128 << 10 };
        assert_eq!(claimed.plausible(&g).host_clusters(&g), HostCluster(5).row(1));
    }

    #[test]
    fn the_length_ends_with_the_last_sector() {
        let g = geometry(16);
        // x = 54; two additional sectors; the first byte is byte 100 of its sector.
        let raw = COMPRESSED | 2 << 54 | (0x5_0000 + 100);
        let range = CompressedRange::decode(raw, &g).unwrap();
        assert_eq!(range, CompressedRange { offset: 0x5_0064, len: 3 * 512 - 100 });
        assert_eq!(range.encode(&g), raw);
        assert_eq!(CompressedRange::new(0x5_0064, 1100, &g), Some(range));
        assert_eq!(range.host_clusters(&g), HostCluster(5).row(1));
    }

    #[test]
    fn a_range_may_cross_into_the_next_cluster() {
        let range = CompressedRange::new(0x5_ff00, 600, &geometry(16)).unwrap();
        assert_eq!(range.host_clusters(&geometry(16)), HostCluster(5).row(2));
        let flush = CompressedRange::new(0x5_fe00, 512, &geometry(16)).unwrap();
        assert_eq!(flush.host_clusters(&geometry(16)), HostCluster(5).row(1));
    }

    #[test]
    fn damage_is_told_apart() {
        let g = geometry(9); // x = 61: offset bits 56 to 60 exist and must be 0
        let raw = COMPRESSED | 1 << 56 | 0x1000;
        let reserved = Corruption::ReservedBits { entry: EntryKind::L2, raw };
        assert_eq!(CompressedRange::decode(raw, &g), Err(reserved));
        let raw = COMPRESSED | COPIED | 0x1000;
        assert_eq!(CompressedRange::decode(raw, &g), Err(Corruption::CompressedCopied { raw }));
        let raw = COMPRESSED | 0x1ff;
        assert_eq!(CompressedRange::decode(raw, &g), Err(Corruption::CompressedInHeader { raw }));
    }

    #[test]
    fn what_does_not_fit_is_not_encoded() {
        let g = geometry(21); // x = 49
        assert_eq!(CompressedRange::new(1 << 49, 512, &g), None);
        assert_eq!(CompressedRange::new(1 << 22, 0, &g), None);
        assert_eq!(CompressedRange::new(1 << 22, 8193 * 512, &g), None);
        assert!(CompressedRange::new(1 << 22, 8192 * 512, &g).is_some());
        assert_eq!(CompressedRange::new(u64::MAX, 2, &g), None);
    }

    proptest! {
        #[test]
        fn ranges_survive_the_round_trip(g in any_geometry(), offset in 0u64..1 << 57, len in 0u64..5 << 20) {
            let offset = offset >> (g.cluster_bits - 8);
            if let Some(range) = CompressedRange::new(offset, len, &g) {
                prop_assert!(range.len >= len && range.len < len + SECTOR_BYTES);
                prop_assert_eq!(CompressedRange::decode(range.encode(&g), &g), Ok(range));
            }
        }
    }
}
