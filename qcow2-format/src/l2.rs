//! One standard (8-byte) entry of an L2 table: what a guest cluster is made of.
//!
//! This is the only decoder of these bits. It is on the path of every request, so it is small,
//! inlined, and tests for damage with one mask. Extended entries are in
//! [`subcluster`](crate::subcluster), compressed descriptors in [`compressed`](crate::compressed).

use crate::{CompressedRange, Corruption, Geometry, HostCluster, HostOffset, Version, error::EntryKind};

/// Bit 63: a standard cluster whose refcount is exactly one, so it may be written in place.
pub const COPIED: u64 = 1 << 63;
/// Bit 62: the other bits are a compressed cluster descriptor.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0: the cluster reads as zeros (version 3, standard entries).
pub const ZERO: u64 = 1;
/// Bits 9 to 55: the host cluster offset.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits 1 to 8 and 56 to 61 of a standard cluster descriptor.
pub const RESERVED: u64 = !(COPIED | COMPRESSED | OFFSET | ZERO);

/// What a guest cluster is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Reads go to the backing file; without one they are zeros.
    Unallocated,
    /// Reads are zeros, whatever the backing file holds.
    Zero {
        /// A cluster that is kept allocated for later writes; its content is not read.
        host: Option<HostOffset>,
        /// `host`'s refcount is exactly one.
        copied: bool,
    },
    /// A cluster of data.
    Data {
        /// Where it starts; cluster-aligned and not 0.
        host: HostOffset,
        /// Its refcount is exactly one. Only accurate in tables of the active L1 table.
        copied: bool,
    },
    /// A compressed cluster.
    Compressed(CompressedRange),
}

impl Mapping {
    /// Decodes a host-endian entry of an image without extended L2 entries.
    ///
    /// Specification, "L2 table entry" and "Standard Cluster Descriptor": bit 62 marks a compressed
    /// cluster; otherwise bit 0 is "reads as zeros" (always 0 with version 2), bits 9 to 55 are the
    /// cluster-aligned host offset, and the rest is reserved. Bit 63 says nothing where there is no offset, but
    /// with an external data file.
    ///
    /// # Errors
    /// See [`Corruption`]; every variant that names an L2 entry.
    #[inline]
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, Corruption> {
        if raw == 0 {
            return Ok(Self::Unallocated);
        }
        let in_cluster = geometry.cluster_size() - 1;
        let host = raw & OFFSET;
        let copied = raw & COPIED != 0;
        // A data cluster, by far the most frequent: offset set, nothing odd.
        if host != 0 && raw & (COMPRESSED | ZERO | RESERVED | (in_cluster & OFFSET)) == 0 {
            return Ok(Self::Data { host: HostOffset(host), copied });
        }
        Self::decode_rest(raw, geometry)
    }

    /// Everything but data clusters and empty entries.
    fn decode_rest(raw: u64, geometry: &Geometry) -> Result<Self, Corruption> {
        let (entry, host, copied) = (EntryKind::L2, raw & OFFSET, raw & COPIED != 0);
        if raw & COMPRESSED != 0 {
            return CompressedRange::decode(raw, geometry).map(Self::Compressed);
        }
        if raw & RESERVED != 0 || (raw & ZERO != 0 && geometry.extended_l2) {
            return Err(Corruption::ReservedBits { entry, raw });
        }
        if raw & ZERO != 0 && geometry.version == Version::V2 {
            return Err(Corruption::ZeroFlagInVersion2 { raw });
        }
        if geometry.in_cluster(host) != 0 {
            return Err(Corruption::Misaligned { entry, raw });
        }
        match (host, raw & ZERO != 0) {
            // A copied flag says nothing where there is no cluster; nor does QEMU's check look at it there.
            (0, true) => Ok(Self::Zero { host: None, copied: false }),
            (0, false) => Ok(Self::Unallocated),
            (_, true) => Ok(Self::Zero { host: Some(HostOffset(host)), copied }),
            (_, false) => Ok(Self::Data { host: HostOffset(host), copied }),
        }
    }

    /// The host-endian entry. Offsets are cluster-aligned and below 2^56; a zero mapping asks for
    /// version 3; a compressed range comes from [`CompressedRange::new`] or from decoding.
    #[inline]
    #[must_use]
    pub fn encode(self, geometry: &Geometry) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Zero { host, copied } => {
                debug_assert!(geometry.version == Version::V3 && !geometry.extended_l2);
                debug_assert!(host.is_some() || !copied, "only a cluster can be exclusively owned");
                ZERO | host.map_or(0, |host| standard(host, copied, geometry))
            }
            Self::Data { host, copied } => standard(host, copied, geometry),
            Self::Compressed(range) => range.encode(geometry),
        }
    }

    /// The whole host cluster that the entry owns, if it names one: data or preallocated zero.
    #[inline]
    #[must_use]
    pub const fn host(&self) -> Option<HostOffset> {
        match *self {
            Self::Data { host, .. } => Some(host),
            Self::Zero { host, .. } => host,
            Self::Unallocated | Self::Compressed(_) => None,
        }
    }
}

/// The host cluster that an entry which does not decode names without what is wrong with it: its reserved
/// bits, its place inside the cluster, the copied flag of compressed data. `None` where it names none.
#[must_use]
pub fn named_by_damaged(raw: u64, geometry: &Geometry) -> Option<HostCluster> {
    let host = if raw & COMPRESSED != 0 {
        CompressedRange::decode(raw & !COPIED, geometry).ok()?.offset
    } else {
        raw & OFFSET
    };
    Some(geometry.host_cluster(HostOffset(host))).filter(|&cluster| cluster != HostCluster(0))
}

/// Offset and copied bit of an entry that names a whole cluster.
#[inline]
fn standard(host: HostOffset, copied: bool, geometry: &Geometry) -> u64 {
    debug_assert!(host.0 != 0 && host.0 & !OFFSET == 0, "{host} does not fit an L2 entry");
    debug_assert!(host.is_aligned(geometry.cluster_size()), "{host} is not cluster-aligned");
    host.0 | if copied { COPIED } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::tests::{any_geometry, geometry};
    use proptest::prelude::*;

    const KIND: EntryKind = EntryKind::L2;

    #[test]
    fn the_standard_states_decode() {
        let g = geometry(16);
        let host = HostOffset(0x5_0000);
        let cases = [
            (0, Mapping::Unallocated),
            (1, Mapping::Zero { host: None, copied: false }),
            (0x5_0001, Mapping::Zero { host: Some(host), copied: false }),
            (COPIED | 0x5_0001, Mapping::Zero { host: Some(host), copied: true }),
            (0x5_0000, Mapping::Data { host, copied: false }),
            (COPIED | 0x5_0000, Mapping::Data { host, copied: true }),
        ];
        for (raw, mapping) in cases {
            assert_eq!(Mapping::decode(raw, &g), Ok(mapping), "{raw:#x}");
            assert_eq!(mapping.encode(&g), raw);
        }
    }

    #[test]
    fn damage_is_told_apart() {
        let g = geometry(16);
        for raw in [2, 0x5_0100, COPIED | 0x5_0080, 1 << 56 | 0x5_0000, 1 << 61] {
            assert_eq!(
                Mapping::decode(raw, &g),
                Err(Corruption::ReservedBits { entry: KIND, raw }),
                "{raw:#x}"
            );
        }
        for raw in [0x200, 0x5_8000, 0x5_8001] {
            assert_eq!(
                Mapping::decode(raw, &g),
                Err(Corruption::Misaligned { entry: KIND, raw }),
                "{raw:#x}"
            );
        }
    }

    #[test]
    fn a_copied_flag_of_no_cluster_means_nothing() {
        let g = geometry(16);
        assert_eq!(Mapping::decode(COPIED, &g), Ok(Mapping::Unallocated));
        assert_eq!(Mapping::decode(COPIED | ZERO, &g), Ok(Mapping::Zero { host: None, copied: false }));
    }

    #[test]
    fn what_a_damaged_entry_names_is_found() {
        let g = geometry(16);
        let five = Some(HostCluster(5));
        for raw in [0x5_2a00, COPIED | 0x5_8000, 1 << 61 | 0x5_0000, 0x5_0002, COMPRESSED | COPIED | 0x5_0000]
        {
            assert!(Mapping::decode(raw, &g).is_err(), "{raw:#x}");
            assert_eq!(named_by_damaged(raw, &g), five, "{raw:#x}");
        }
        for raw in [2, 1 << 57, COPIED | 0x2a00, COMPRESSED | 0x200] {
            assert_eq!(named_by_damaged(raw, &g), None, "{raw:#x}");
        }
    }

    #[test]
    fn version_2_has_no_zero_flag() {
        let g = Geometry { version: Version::V2, ..geometry(16) };
        for raw in [1, 0x5_0001] {
            assert_eq!(Mapping::decode(raw, &g), Err(Corruption::ZeroFlagInVersion2 { raw }));
        }
        assert!(Mapping::decode(0x5_0000, &g).is_ok());
    }

    #[test]
    fn extended_entries_have_no_zero_flag() {
        let g = Geometry { extended_l2: true, ..geometry(16) };
        assert_eq!(Mapping::decode(1, &g), Err(Corruption::ReservedBits { entry: KIND, raw: 1 }));
    }

    proptest! {
        #[test]
        fn mappings_survive_the_round_trip(
            g in any_geometry(), cluster in 1u64..1 << 35, copied: bool, zero: bool, owned: bool,
        ) {
            let host = HostOffset(cluster << g.cluster_bits);
            let mapping = if zero && g.version == Version::V3 && !g.extended_l2 {
                Mapping::Zero { host: owned.then_some(host), copied: copied && owned }
            } else {
                Mapping::Data { host, copied }
            };
            prop_assert_eq!(Mapping::decode(mapping.encode(&g), &g), Ok(mapping));
        }

        #[test]
        fn what_decodes_encodes_to_the_same_bits(g in any_geometry(), raw: u64, low in 0u32..64, flags: u64) {
            // Whole-word noise is nearly always damage; clear the low bits to reach the other states.
            let raw = (raw & (u64::MAX << low)) | (flags & (COPIED | COMPRESSED | ZERO));
            if let Ok(mapping) = Mapping::decode(raw, &g) {
                // The copied flag of no cluster is the one thing that is not kept.
                let kept = if raw & (OFFSET | COMPRESSED) == 0 { raw & !COPIED } else { raw };
                prop_assert_eq!(mapping.encode(&g), kept);
            }
        }
    }
}
