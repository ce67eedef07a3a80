//! One entry of an L1 table: where an L2 table lies.
//!
//! Only the entry itself is judged here; whether the table lies inside the file and is not also
//! something else is for the reader of the table to say.

use crate::{Corruption, Geometry, HostOffset, error::EntryKind};

/// Bit 63: the L2 table's refcount is exactly one, so it may be written in place.
pub const COPIED: u64 = 1 << 63;
/// Bits 9 to 55: the offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits 0 to 8 and 56 to 62.
const RESERVED: u64 = !(COPIED | OFFSET);

/// A decoded L1 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1Entry {
    /// No L2 table: everything that it would map is unallocated.
    Unallocated,
    /// An L2 table.
    Table {
        /// Where the table starts; cluster-aligned and not 0.
        offset: HostOffset,
        /// The table's refcount is exactly one. Only accurate in the active L1 table.
        copied: bool,
    },
}

impl L1Entry {
    /// Decodes a host-endian entry.
    ///
    /// Specification, "L1 table entry": bits 9 to 55 are the table's cluster-aligned offset, 0 when
    /// there is none; bit 63 is 0 for a table that is unused or needs copying; the rest is reserved.
    ///
    /// # Errors
    /// A reserved bit, a misaligned offset, or bit 63 without an offset.
    #[inline]
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, Corruption> {
        if raw == 0 {
            return Ok(Self::Unallocated);
        }
        let offset = raw & OFFSET;
        if raw & RESERVED != 0 {
            return Err(Corruption::ReservedBits { entry: EntryKind::L1, raw });
        }
        if geometry.in_cluster(offset) != 0 {
            return Err(Corruption::Misaligned { entry: EntryKind::L1, raw });
        }
        if offset == 0 {
            return Err(Corruption::CopiedWithoutOffset { entry: EntryKind::L1, raw });
        }
        Ok(Self::Table { offset: HostOffset(offset), copied: raw & COPIED != 0 })
    }

    /// The host-endian entry. The offset is cluster-aligned and below 2^56.
    #[inline]
    #[must_use]
    pub fn encode(self) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Table { offset, copied } => {
                debug_assert!(offset.0 != 0 && offset.0 & !OFFSET == 0, "{offset} is no table offset");
                offset.0 | if copied { COPIED } else { 0 }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::tests::{any_geometry, geometry};
    use proptest::prelude::*;

    #[test]
    fn damage_is_told_apart() {
        let g = geometry(16);
        let kind = EntryKind::L1;
        assert_eq!(L1Entry::decode(0, &g), Ok(L1Entry::Unallocated));
        for raw in [0x1_0001, 0x1_0100, 1 << 56, 1 << 62] {
            assert_eq!(L1Entry::decode(raw, &g), Err(Corruption::ReservedBits { entry: kind, raw }));
        }
        let raw = 0x8200;
        assert_eq!(L1Entry::decode(raw, &g), Err(Corruption::Misaligned { entry: kind, raw }));
        assert!(L1Entry::decode(raw, &geometry(9)).is_ok());
        let raw = COPIED;
        assert_eq!(L1Entry::decode(raw, &g), Err(Corruption::CopiedWithoutOffset { entry: kind, raw }));
    }

    proptest! {
        #[test]
        fn entries_survive_the_round_trip(g in any_geometry(), cluster in 1u64..1 << 35, copied: bool) {
            let entry = L1Entry::Table { offset: HostOffset(cluster << g.cluster_bits), copied };
            prop_assert_eq!(L1Entry::decode(entry.encode(), &g), Ok(entry));
        }

        #[test]
        fn what_decodes_encodes_to_the_same_bits(g in any_geometry(), raw: u64, mask in 0u32..64) {
            let raw = raw & !(u64::MAX >> mask);
            if let Ok(entry) = L1Entry::decode(raw, &g) {
                prop_assert_eq!(entry.encode(), raw);
            }
        }
    }
}
