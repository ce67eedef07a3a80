//! One extended (16-byte) entry of an L2 table: a cluster in 32 parts, each with its own state.
//!
//! The first 8 bytes are a standard entry without the zero flag, the second 8 a bitmap. A decoded
//! [`ExtendedEntry`] has passed every check, so asking for a subcluster's state cannot fail.

use crate::{
    CompressedRange, Corruption, Geometry, HostOffset, Mapping, error::EntryKind,
    geometry::SUBCLUSTERS_PER_CLUSTER,
};

/// What one subcluster is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subcluster {
    /// Reads go to the backing file; without one they are zeros.
    Unallocated,
    /// Reads are zeros.
    Zero,
    /// Data, at this byte of the image file.
    Data(HostOffset),
}

/// The two halves of a subcluster bitmap; no bit is set in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SubclusterBitmap {
    /// Bit n: subcluster n is allocated.
    pub allocated: u32,
    /// Bit n: subcluster n reads as zeros.
    pub zero: u32,
}

/// A decoded extended entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtendedEntry {
    /// A cluster in subclusters, of any mix of states, possibly all unallocated.
    Standard {
        /// The host cluster; there is one where a subcluster is allocated, and there may be one
        /// that no subcluster uses yet.
        host: Option<HostOffset>,
        /// `host`'s refcount is exactly one. Only accurate in tables of the active L1 table.
        copied: bool,
        /// The state of the subclusters.
        subclusters: SubclusterBitmap,
    },
    /// A compressed cluster; it has no subclusters.
    Compressed(CompressedRange),
}

impl ExtendedEntry {
    /// Decodes the two host-endian halves of an entry, in the order in which they are stored.
    ///
    /// Specification, "Extended L2 Entries": the first 64 bits are a standard entry whose bit 0 is
    /// always 0; bits 0 to 31 of the bitmap mean "allocated" and ask for a valid host offset, bits 32
    /// to 63 mean "reads as zeros" and ask for the allocation bit to be unset; for compressed
    /// clusters the bitmap is reserved.
    ///
    /// # Errors
    /// What [`Mapping::decode`] finds in the first half; both bits of a subcluster set; an allocated
    /// subcluster without host cluster; a compressed cluster with a bitmap.
    pub fn decode(entry: u64, bitmap: u64, geometry: &Geometry) -> Result<Self, Corruption> {
        debug_assert!(geometry.extended_l2);
        let subclusters = SubclusterBitmap { allocated: bitmap as u32, zero: (bitmap >> 32) as u32 };
        let (host, copied) = match Mapping::decode(entry, geometry)? {
            Mapping::Compressed(range) if bitmap == 0 => return Ok(Self::Compressed(range)),
            Mapping::Compressed(_) => return Err(Corruption::CompressedBitmap { raw: entry, bitmap }),
            Mapping::Data { host, copied } => (Some(host), copied),
            Mapping::Unallocated => (None, false),
            Mapping::Zero { .. } => {
                return Err(Corruption::ReservedBits { entry: EntryKind::L2, raw: entry });
            }
        };
        if subclusters.allocated & subclusters.zero != 0 {
            return Err(Corruption::SubclusterAllocatedAndZero { raw: entry, bitmap });
        }
        if host.is_none() && subclusters.allocated != 0 {
            return Err(Corruption::SubclusterWithoutHost { raw: entry, bitmap });
        }
        Ok(Self::Standard { host, copied, subclusters })
    }

    /// The two host-endian halves.
    #[must_use]
    pub fn encode(self, geometry: &Geometry) -> (u64, u64) {
        match self {
            Self::Compressed(range) => (range.encode(geometry), 0),
            Self::Standard { host, copied, subclusters } => {
                let mapping = host.map_or(Mapping::Unallocated, |host| Mapping::Data { host, copied });
                let SubclusterBitmap { allocated, zero } = subclusters;
                debug_assert!(allocated & zero == 0 && (host.is_some() || allocated == 0));
                (mapping.encode(geometry), u64::from(zero) << 32 | u64::from(allocated))
            }
        }
    }

    /// The state of subcluster `index` (0 to 31) of a standard entry; `None` for a compressed one.
    #[must_use]
    pub fn subcluster(&self, index: u32, geometry: &Geometry) -> Option<Subcluster> {
        debug_assert!(index < SUBCLUSTERS_PER_CLUSTER);
        let Self::Standard { host, subclusters, .. } = *self else { return None };
        let bit = 1u32 << index;
        Some(match host {
            _ if subclusters.zero & bit != 0 => Subcluster::Zero,
            Some(host) if subclusters.allocated & bit != 0 => {
                Subcluster::Data(HostOffset(host.0 + u64::from(index) * geometry.subcluster_size()))
            }
            _ => Subcluster::Unallocated,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{geometry::tests::geometry, l2};
    use proptest::prelude::*;

    fn extended(cluster_bits: u32) -> Geometry {
        Geometry { extended_l2: true, ..geometry(cluster_bits) }
    }

    #[test]
    fn each_subcluster_has_its_state() {
        let g = extended(16);
        let entry = ExtendedEntry::decode(l2::COPIED | 0x5_0000, 1 << 33 | 0b101, &g).unwrap();
        let state = |index| entry.subcluster(index, &g).unwrap();
        assert_eq!(state(0), Subcluster::Data(HostOffset(0x5_0000)));
        assert_eq!(state(1), Subcluster::Zero);
        assert_eq!(state(2), Subcluster::Data(HostOffset(0x5_0000 + 2 * 2048)));
        assert_eq!(state(31), Subcluster::Unallocated);
    }

    #[test]
    fn damage_is_told_apart() {
        let g = extended(16);
        let (raw, bitmap) = (0x5_0000, 1 << 32 | 1);
        let both = Corruption::SubclusterAllocatedAndZero { raw, bitmap };
        assert_eq!(ExtendedEntry::decode(raw, bitmap, &g), Err(both));
        let homeless = Corruption::SubclusterWithoutHost { raw: 0, bitmap: 2 };
        assert_eq!(ExtendedEntry::decode(0, 2, &g), Err(homeless));
        let raw = l2::COMPRESSED | 0x5_0000;
        let odd = Corruption::CompressedBitmap { raw, bitmap: 1 };
        assert_eq!(ExtendedEntry::decode(raw, 1, &g), Err(odd));
        let zero_flag = Corruption::ReservedBits { entry: EntryKind::L2, raw: 0x5_0001 };
        assert_eq!(ExtendedEntry::decode(0x5_0001, 0, &g), Err(zero_flag));
    }

    proptest! {
        #[test]
        fn entries_survive_the_round_trip(
            bits in 14u32..=21, cluster in 1u64..1 << 35, owned: bool, copied: bool, allocated: u32, zero: u32,
        ) {
            let g = extended(bits);
            let host = owned.then_some(HostOffset(cluster << bits));
            let subclusters =
                SubclusterBitmap { allocated: if owned { allocated & !zero } else { 0 }, zero };
            let entry = ExtendedEntry::Standard { host, copied: copied && owned, subclusters };
            let (raw, bitmap) = entry.encode(&g);
            prop_assert_eq!(ExtendedEntry::decode(raw, bitmap, &g), Ok(entry));
        }

        #[test]
        fn what_decodes_encodes_to_the_same_bits(bits in 14u32..=21, raw: u64, low in 0u32..64, bitmap: u64) {
            let (g, raw) = (extended(bits), raw & (u64::MAX << low));
            if let Ok(entry) = ExtendedEntry::decode(raw, bitmap, &g) {
                prop_assert_eq!(entry.encode(&g), (raw, bitmap));
            }
        }
    }
}
