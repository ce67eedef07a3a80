//! Reference counts: entries of the refcount table, and counts inside a refcount block.
//!
//! A block is handled as the bytes it has on disk, so that it needs no conversion between cache
//! and file. What a count means (free, owned, shared) is the allocator's business.

use crate::{Corruption, Geometry, HostOffset, error::EntryKind, geometry::MAX_REFCOUNT_ORDER};

/// Bits 0 to 8.
const RESERVED: u64 = 0x1ff;

/// The codec of refcount table entries.
#[derive(Clone, Copy, Debug)]
pub enum RefcountTableEntry {}

impl RefcountTableEntry {
    /// Decodes a host-endian entry: the block's offset, or `None` where no block is allocated and
    /// all counts that it would hold are 0.
    ///
    /// Specification, "Refcount table entry": bits 9 to 63 are the cluster-aligned offset of the
    /// block, 0 when there is none; bits 0 to 8 are reserved.
    ///
    /// # Errors
    /// A reserved bit, a misaligned offset, or one that no file can reach (bit 63).
    #[inline]
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Option<HostOffset>, Corruption> {
        let entry = EntryKind::RefcountTable;
        if raw == 0 {
            return Ok(None);
        }
        if raw & RESERVED != 0 {
            return Err(Corruption::ReservedBits { entry, raw });
        }
        if geometry.in_cluster(raw) != 0 {
            return Err(Corruption::Misaligned { entry, raw });
        }
        if raw > i64::MAX as u64 {
            return Err(Corruption::BeyondAnyFile { entry, raw });
        }
        Ok(Some(HostOffset(raw)))
    }

    /// The host-endian entry. The offset is cluster-aligned.
    #[inline]
    #[must_use]
    pub fn encode(block: Option<HostOffset>) -> u64 {
        let raw = block.map_or(0, |block| block.0);
        debug_assert!(raw & RESERVED == 0, "{raw:#x} is no block offset");
        raw
    }
}

/// Reads count `index` of a block whose counts are `1 << order` bits wide.
///
/// Specification, "Refcount block entry": counts follow each other; whole bytes are big-endian;
/// of counts narrower than a byte the first has the least significant bits.
///
/// `order` is at most 6 and the count lies inside `block`; both are the caller's to know, and a
/// slice index panics where they do not hold.
#[inline]
#[must_use]
pub fn get(block: &[u8], order: u32, index: usize) -> u64 {
    debug_assert!(order <= MAX_REFCOUNT_ORDER);
    match order {
        0..=2 => {
            let (byte, shift, mask) = sub_byte(order, index);
            u64::from((block[byte] >> shift) & mask)
        }
        _ => {
            let width = 1 << (order - 3);
            let bytes = &block[index * width..][..width];
            bytes.iter().fold(0, |count, byte| count << 8 | u64::from(*byte))
        }
    }
}

/// Writes count `index` of a block; see [`get`]. `value` fits the width.
#[inline]
pub fn set(block: &mut [u8], order: u32, index: usize, value: u64) {
    debug_assert!(order <= MAX_REFCOUNT_ORDER);
    debug_assert!(value <= u64::MAX >> (64 - (1 << order)), "{value} does not fit order {order}");
    match order {
        0..=2 => {
            let (byte, shift, mask) = sub_byte(order, index);
            block[byte] = (block[byte] & !(mask << shift)) | ((value as u8 & mask) << shift);
        }
        _ => {
            let width = 1 << (order - 3);
            block[index * width..][..width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        }
    }
}

/// Byte, shift and mask of a count of 1, 2 or 4 bits.
#[inline]
const fn sub_byte(order: u32, index: usize) -> (usize, u32, u8) {
    let per_byte_log2 = 3 - order;
    let within = index & ((1 << per_byte_log2) - 1);
    let mask = ((1u16 << (1 << order)) - 1) as u8;
    (index >> per_byte_log2, (within as u32) << order, mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::tests::{any_geometry, geometry};
    use proptest::prelude::*;

    /// The same by the letter of the specification, one bit at a time. Bit `b` of count `i` is bit
    /// `i * width + b` of the block where the width is below 8; wider counts are big-endian bytes.
    fn model_get(block: &[u8], order: u32, index: usize) -> u64 {
        let width = 1usize << order;
        (0..width).fold(0, |count, bit| {
            let (byte, in_byte) = if width < 8 {
                ((index * width + bit) / 8, (index * width + bit) % 8)
            } else {
                (index * width / 8 + width / 8 - 1 - bit / 8, bit % 8)
            };
            count | u64::from(block[byte] >> in_byte & 1) << bit
        })
    }

    #[test]
    fn narrow_counts_start_at_the_least_significant_bit() {
        assert_eq!((get(&[0b0000_0010], 0, 0), get(&[0b0000_0010], 0, 1)), (0, 1));
        assert_eq!((get(&[0x4f], 2, 0), get(&[0x4f], 2, 1)), (0xf, 4));
        assert_eq!(get(&[0, 0, 0x12, 0x34], 4, 1), 0x1234);
    }

    #[test]
    fn table_entries_are_judged() {
        let (g, entry) = (geometry(16), EntryKind::RefcountTable);
        assert_eq!(RefcountTableEntry::decode(0, &g), Ok(None));
        assert_eq!(RefcountTableEntry::decode(0x3_0000, &g), Ok(Some(HostOffset(0x3_0000))));
        let raw = 0x3_0001;
        assert_eq!(RefcountTableEntry::decode(raw, &g), Err(Corruption::ReservedBits { entry, raw }));
        let raw = 0x3_8000;
        assert_eq!(RefcountTableEntry::decode(raw, &g), Err(Corruption::Misaligned { entry, raw }));
        let raw = 1 << 63;
        assert_eq!(RefcountTableEntry::decode(raw, &g), Err(Corruption::BeyondAnyFile { entry, raw }));
    }

    proptest! {
        #[test]
        fn counts_read_as_the_bit_model_says(
            block in prop::collection::vec(any::<u8>(), 64), order in 0..=MAX_REFCOUNT_ORDER, at: prop::sample::Index,
        ) {
            let index = at.index(512 >> order);
            prop_assert_eq!(get(&block, order, index), model_get(&block, order, index));
        }

        #[test]
        fn a_write_changes_one_count_only(
            block in prop::collection::vec(any::<u8>(), 64), order in 0..=MAX_REFCOUNT_ORDER,
            at: prop::sample::Index, value: u64,
        ) {
            let (count, value) = (512usize >> order, value >> (64 - (1u32 << order)));
            let index = at.index(count);
            let mut changed = block.clone();
            set(&mut changed, order, index, value);
            for other in 0..count {
                let expected = if other == index { value } else { model_get(&block, order, other) };
                prop_assert_eq!(model_get(&changed, order, other), expected);
            }
        }

        #[test]
        fn table_entries_survive_the_round_trip(g in any_geometry(), raw: u64, low in 0u32..64) {
            if let Ok(block) = RefcountTableEntry::decode(raw & (u64::MAX << low), &g) {
                prop_assert_eq!(RefcountTableEntry::encode(block), raw & (u64::MAX << low));
            }
        }
    }
}
