//! Persistent dirty bitmaps: the directory, and entries of bitmap tables.
//!
//! Enough to list the bitmaps and to account for every cluster that they occupy: the directory, the
//! tables and the data. The bits themselves are not interpreted here. Nothing of this may be
//! trusted unless [`Header::bitmaps_consistent`](crate::Header::bitmaps_consistent).

use crate::{
    Corruption, Field, FormatError, Geometry, HostOffset,
    error::EntryKind,
    extension::{BitmapsExtension, in_range},
    geometry::TABLE_ENTRY_BYTES,
    raw::{self, RawBitmap},
    validate::check_table,
};
use std::{mem::offset_of, ops::Range};

/// Largest bitmap table in entries, as QEMU.
pub const MAX_TABLE_ENTRIES: u64 = 0x800_0000;
/// Longest bitmap name in bytes, as QEMU.
pub const MAX_NAME_BYTES: u64 = 1023;
/// Smallest and largest granularity_bits, as QEMU.
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Flag bit 0: the bitmap was not saved correctly.
pub const FLAG_IN_USE: u32 = 1 << 0;
/// Flag bit 1: the bitmap records every write.
pub const FLAG_AUTO: u32 = 1 << 1;
/// Flag bit 2: the bitmap may be used although its extra data is unknown.
pub const FLAG_EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;

const KNOWN_FLAGS: u32 = FLAG_IN_USE | FLAG_AUTO | FLAG_EXTRA_DATA_COMPATIBLE;
const FIXED_BYTES: u64 = size_of::<RawBitmap>() as u64;
/// The only type there is.
const DIRTY_TRACKING: u8 = 1;

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Where the bitmap table starts.
    pub table: HostOffset,
    /// Entries of the bitmap table.
    pub table_entries: u32,
    /// The flags; see the `FLAG_` constants.
    pub flags: u32,
    /// log2 of the bytes of disk that one bit stands for.
    pub granularity_bits: u8,
    /// The name, as stored.
    pub name: Vec<u8>,
    /// Extra data, as stored.
    pub extra: Vec<u8>,
}

impl Bitmap {
    /// Size of the bitmap table in bytes.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.table_entries) * TABLE_ENTRY_BYTES
    }

    /// Whether it says what it should: nothing is known to be missing from it.
    #[must_use]
    pub fn is_true(&self) -> bool {
        self.flags & FLAG_IN_USE == 0
    }

    /// Bytes of its directory entry.
    fn entry_bytes(&self) -> u64 {
        (FIXED_BYTES + self.extra.len() as u64 + self.name.len() as u64).next_multiple_of(8)
    }

    /// Entries of the table of a bitmap of the whole disk.
    fn entries_for(&self, geometry: &Geometry) -> u64 {
        let bits = geometry.virtual_size.div_ceil(1 << self.granularity_bits);
        geometry.clusters_for(bits.div_ceil(8))
    }
}

/// What a cluster of a bitmap is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapTableEntry {
    /// All bits are 0; nothing is stored.
    Zeros,
    /// All bits are 1; nothing is stored.
    Ones,
    /// A cluster of bits.
    Data(HostOffset),
}

impl BitmapTableEntry {
    /// Decodes a host-endian entry.
    ///
    /// Specification, "Bitmap table": bits 9 to 55 are the cluster-aligned offset; where it is 0, bit
    /// 0 tells zeros from ones, otherwise bit 0 must be 0; the rest is reserved.
    ///
    /// # Errors
    /// A reserved bit or a misaligned offset.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, Corruption> {
        let (entry, offset) = (EntryKind::BitmapTable, raw & crate::l2::OFFSET);
        match (offset, raw & !crate::l2::OFFSET) {
            (0, 0) => Ok(Self::Zeros),
            (0, 1) => Ok(Self::Ones),
            (_, 0) if geometry.in_cluster(offset) != 0 => Err(Corruption::Misaligned { entry, raw }),
            (_, 0) => Ok(Self::Data(HostOffset(offset))),
            _ => Err(Corruption::ReservedBits { entry, raw }),
        }
    }

    /// The host-endian entry.
    #[must_use]
    pub fn encode(self) -> u64 {
        match self {
            Self::Zeros => 0,
            Self::Ones => 1,
            Self::Data(offset) => offset.0,
        }
    }
}

/// Decodes the bitmap directory, whose bytes are `bytes`, exactly
/// [`BitmapsExtension::directory_bytes`] of them.
///
/// Specification, "Bitmap directory": entries of 24 fixed bytes, extra data, name and zero padding to a
/// multiple of 8; flag bits 3 to 31 are 0, the type is 1, the name is not empty, tables start at cluster
/// boundaries. A bitmap that was saved has a bit for each part of the disk, and QEMU opens no image where one
/// has fewer or more.
///
/// # Errors
/// Any field outside its limits, a table that is at no cluster boundary or over the header, or a directory that
/// is shorter or longer than its entries. Whether the file has the table is for those to say who read it.
pub fn decode_directory(
    bytes: &[u8],
    extension: &BitmapsExtension,
    geometry: &Geometry,
) -> Result<Vec<Bitmap>, FormatError> {
    let mut bitmaps = Vec::new();
    let mut at = 0usize;
    for _ in 0..extension.count {
        let start = HostOffset(extension.directory.0.saturating_add(at as u64));
        let bitmap = decode_entry(bytes.get(at..).unwrap_or_default(), start)?;
        if bitmap.is_true() {
            let entries = bitmap.entries_for(geometry);
            let field = Field::new("bitmap_table_size", start.0.saturating_add(8));
            in_range(field, bitmap.table_entries.into(), entries, entries)?;
        }
        let field = Field::new("bitmap_table_offset", start.0);
        check_table(field, bitmap.table, bitmap.table_bytes(), geometry.cluster_size(), u64::MAX)?;
        at += bitmap.entry_bytes() as usize;
        bitmaps.push(bitmap);
    }
    let rest = bytes.len().saturating_sub(at) as u64;
    let end = Field::new("end of the bitmap directory", extension.directory.0.saturating_add(at as u64));
    in_range(end, rest, 0, 0)?;
    Ok(bitmaps)
}

/// Marks, in the bytes of a directory, all bitmaps that are to record every write ("auto") as not saved correctly
/// ("in_use"): for who is going to write and does not record it. The others record nothing and stay what they are.
/// Returns the bytes that have changed, up to the last of them.
pub fn mark_in_use(directory: &mut [u8], bitmaps: &[Bitmap]) -> Option<Range<usize>> {
    let mut changed: Option<Range<usize>> = None;
    let mut at = 0;
    for bitmap in bitmaps {
        let start = at + offset_of!(RawBitmap, flags);
        let field = start..start + size_of::<u32>();
        at += bitmap.entry_bytes() as usize;
        if bitmap.is_true()
            && bitmap.flags & FLAG_AUTO != 0
            && let Some(bytes) = directory.get_mut(field.clone())
        {
            bytes.copy_from_slice(&(bitmap.flags | FLAG_IN_USE).to_be_bytes());
            changed = Some(changed.map_or(field.start, |part| part.start)..field.end);
        }
    }
    changed
}

/// One entry at file offset `start`.
fn decode_entry(bytes: &[u8], start: HostOffset) -> Result<Bitmap, FormatError> {
    let available = bytes.len() as u64;
    let truncated = |needed| FormatError::Truncated { what: "the bitmap directory", needed, available };
    let fixed: RawBitmap = raw::read(bytes).ok_or(truncated(FIXED_BYTES))?;
    let field = |name, at| Field::new(name, start.0.saturating_add(at));
    in_range(field("bitmap_table_size", 8), fixed.table_size.get().into(), 0, MAX_TABLE_ENTRIES)?;
    let value = u64::from(fixed.flags.get() & !KNOWN_FLAGS);
    if value != 0 {
        return Err(FormatError::Reserved { field: field("flags", 12), value });
    }
    in_range(field("type", 16), fixed.kind.into(), DIRTY_TRACKING.into(), DIRTY_TRACKING.into())?;
    let (min, max) = (*GRANULARITY_BITS.start(), *GRANULARITY_BITS.end());
    in_range(field("granularity_bits", 17), fixed.granularity_bits.into(), min.into(), max.into())?;
    let (name_len, extra_len) = (u64::from(fixed.name_size.get()), u64::from(fixed.extra_data_size.get()));
    in_range(field("name_size", 18), name_len, 1, MAX_NAME_BYTES)?;

    let len = (FIXED_BYTES + extra_len + name_len).next_multiple_of(8);
    let variable = bytes.get(FIXED_BYTES as usize..len as usize).ok_or(truncated(len))?;
    let (extra, rest) = variable.split_at(extra_len as usize);
    let (name, padding) = rest.split_at(name_len as usize);
    if let Some(byte) = padding.iter().find(|byte| **byte != 0) {
        let at = FIXED_BYTES + extra_len + name_len;
        return Err(FormatError::Reserved { field: field("padding", at), value: u64::from(*byte) });
    }
    Ok(Bitmap {
        table: HostOffset(fixed.table_offset.get()),
        table_entries: fixed.table_size.get(),
        flags: fixed.flags.get(),
        granularity_bits: fixed.granularity_bits,
        name: name.to_vec(),
        extra: extra.to_vec(),
    })
}

#[cfg(test)]
mod tests;
