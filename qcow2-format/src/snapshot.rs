//! The snapshot table: a packed list of entries of variable length.
//!
//! The table's length is not stored anywhere; only reading it tells. [`table_extent`] finds it from
//! a prefix, so that a caller can read in steps and never more than [`MAX_TABLE_BYTES`], or
//! [`MAX_SALVAGE_BYTES`] where a damaged one is salvaged. What the L1 tables of the snapshots hold is not known here.

use crate::{
    Field, FormatError, Geometry, HostOffset, Version,
    geometry::{MAX_L1_ENTRIES, MAX_SNAPSHOTS, TABLE_ENTRY_BYTES},
    raw::{self, RawSnapshot},
    validate::check_table,
    word,
};
use zerocopy::IntoBytes;

/// Smallest entry: the fixed part.
pub const MIN_ENTRY_BYTES: u64 = size_of::<RawSnapshot>() as u64;
/// Longest table in bytes, as QEMU: 65536 snapshots of 1 KiB.
pub const MAX_TABLE_BYTES: u64 = 64 << 20;
/// Longest stretch of a file over which a table is salvaged whose entries say too much of themselves: with
/// what is cut off of them it may be within its limits.
pub const MAX_SALVAGE_BYTES: u64 = MAX_TABLE_BYTES + (16 << 20);
/// Longest extra data in bytes, as QEMU.
pub const MAX_EXTRA_BYTES: u32 = 1024;

/// Extra data up to the size of the VM state, up to the disk size, and up to the icount.
const EXTRA_VM_STATE: usize = 8;
const EXTRA_DISK_SIZE: usize = 16;
const EXTRA_ICOUNT: usize = 24;
/// Entries are padded to this.
const ENTRY_ALIGN: u64 = 8;

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where the snapshot's L1 table starts.
    pub l1_table: HostOffset,
    /// Entries of that table.
    pub l1_entries: u32,
    /// The unique ID, as stored; QEMU uses decimal numbers.
    pub id: Vec<u8>,
    /// The name, as stored.
    pub name: Vec<u8>,
    /// When it was taken: seconds since the epoch.
    pub date_sec: u32,
    /// The part below a second, in nanoseconds.
    pub date_nsec: u32,
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Size of the VM state in bytes; 0 when there is none.
    pub vm_state_bytes: u64,
    /// Size of the virtual disk at that time in bytes; `None` in entries of old version 2 images:
    /// the disk has not been resized since.
    pub disk_size: Option<u64>,
    /// Record/replay instruction count, where it is stored.
    pub icount: Option<u64>,
    /// Extra data that is not known here: all from its byte 24.
    pub unknown_extra: Vec<u8>,
}

/// What is known of the length of a snapshot table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableExtent {
    /// The table is exactly this many bytes long, without padding after the last entry.
    Complete(u64),
    /// To find out, at least this many bytes from its start are needed. Each question starts from
    /// the first entry again, so a reader had better double what it has, too.
    NeedsAtLeast(u64),
}

/// The length of a table of `count` snapshots that starts with `bytes`.
///
/// # Errors
/// Extra data or the whole table is longer than the limit.
pub fn table_extent(bytes: &[u8], count: u32) -> Result<TableExtent, FormatError> {
    let mut end = 0u64;
    for index in 0..count {
        let start = end.next_multiple_of(ENTRY_ALIGN);
        let Some(fixed) = bytes.get(start as usize..).and_then(raw::read::<RawSnapshot>) else {
            return Ok(TableExtent::NeedsAtLeast(start + MIN_ENTRY_BYTES));
        };
        extra_data(&fixed, index)?;
        end = start + entry_bytes(&fixed);
        if end > MAX_TABLE_BYTES {
            return Err(FormatError::SnapshotTableTooLong { index, len: end, max: MAX_TABLE_BYTES });
        }
    }
    if (bytes.len() as u64) < end {
        return Ok(TableExtent::NeedsAtLeast(end));
    }
    Ok(TableExtent::Complete(end))
}

/// Decodes a table of `count` snapshots. `bytes` may go on after its end.
///
/// Specification, "Snapshots": entries follow each other at multiples of 8 bytes; each is 40 fixed
/// bytes, extra data, ID, name, padding.
///
/// # Errors
/// What [`table_extent`] finds, and `Truncated` when `bytes` end before the table does.
pub fn decode_table(bytes: &[u8], count: u32) -> Result<Vec<Snapshot>, FormatError> {
    let available = bytes.len() as u64;
    let truncated = |needed| FormatError::Truncated { what: "the snapshot table", needed, available };
    if let TableExtent::NeedsAtLeast(needed) = table_extent(bytes, count)? {
        return Err(truncated(needed));
    }
    let mut snapshots = Vec::new();
    let mut at = 0usize;
    for _ in 0..count {
        let entry = bytes.get(at..).unwrap_or_default();
        let (snapshot, len) = Snapshot::decode(entry).ok_or_else(|| truncated(available + 1))?;
        snapshots.push(snapshot);
        at += len.next_multiple_of(ENTRY_ALIGN as usize);
    }
    Ok(snapshots)
}

/// What can be kept of a table that goes beyond the limits, or lacks what version 3 demands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Salvage {
    /// The snapshots that are within the limits, made complete.
    pub snapshots: Vec<Snapshot>,
    /// Length of their entries in bytes, as they are, without padding after the last one.
    pub len: u64,
    /// What is wrong: each is gone from `snapshots`.
    pub defects: Vec<FormatError>,
}

/// What can be kept of a table that says of itself that it has `count` snapshots. `bytes` may go on after
/// its end, and with zeros after the end of the file, which has `available` bytes from the table's start.
///
/// What the file does not have is missing: entries that would begin there are gone, the last one ends with
/// zeros.
///
/// Gone are snapshots above the largest number, those that end beyond the longest table (counted without what
/// is cut off), and unknown extra data of an entry that has too much of it. The disk's size, where an entry
/// of version 3 lacks it, is the present one.
///
/// # Errors
/// How many bytes from the table's start are needed at least.
pub fn salvage(bytes: &[u8], count: u32, geometry: &Geometry, available: u64) -> Result<Salvage, u64> {
    let missing = |needed| FormatError::Truncated { what: "the snapshot table", needed, available };
    let mut table = Salvage::default();
    if count > MAX_SNAPSHOTS {
        table.defects.push(FormatError::SnapshotCount { count, max: MAX_SNAPSHOTS });
    }
    let mut cut_off = 0;
    for index in 0..count.min(MAX_SNAPSHOTS) {
        let start = table.len.next_multiple_of(ENTRY_ALIGN);
        if start >= available {
            table.defects.push(missing(start + MIN_ENTRY_BYTES));
            return Ok(table);
        }
        let entry = bytes.get(start as usize..).unwrap_or_default();
        let fixed: RawSnapshot = raw::read(entry).ok_or(start + MIN_ENTRY_BYTES)?;
        let len = start + entry_bytes(&fixed);
        cut_off += u64::from(fixed.extra_data_size.get().saturating_sub(MAX_EXTRA_BYTES));
        if len.saturating_sub(cut_off) > MAX_TABLE_BYTES || len > MAX_SALVAGE_BYTES {
            table.defects.push(FormatError::SnapshotTableTooLong { index, len, max: MAX_TABLE_BYTES });
            break;
        }
        let (mut snapshot, _) = Snapshot::decode(entry).ok_or(len)?;
        table.defects.extend(snapshot.complete(&fixed, index, geometry).err());
        table.snapshots.push(snapshot);
        table.len = len;
    }
    if table.len > available {
        table.defects.push(missing(table.len));
    }
    Ok(table)
}

/// The bytes of a table, padded to a multiple of 8.
///
/// # Errors
/// An ID, a name or extra data too long for its length field, or the table too long altogether.
pub fn encode_table(snapshots: &[Snapshot]) -> Result<Vec<u8>, FormatError> {
    let mut bytes = Vec::new();
    for (index, snapshot) in (0u32..).zip(snapshots) {
        snapshot.encode(index, &mut bytes)?;
        let len = bytes.len() as u64;
        if len > MAX_TABLE_BYTES {
            return Err(FormatError::SnapshotTableTooLong { index, len, max: MAX_TABLE_BYTES });
        }
    }
    Ok(bytes)
}

/// Length of an entry, without padding.
fn entry_bytes(fixed: &RawSnapshot) -> u64 {
    let variable = [fixed.extra_data_size.get(), fixed.id_len.get().into(), fixed.name_len.get().into()];
    MIN_ENTRY_BYTES + variable.into_iter().map(u64::from).sum::<u64>()
}

/// Refuses an entry with too much extra data.
fn extra_data(fixed: &RawSnapshot, index: u32) -> Result<(), FormatError> {
    let (len, max) = (fixed.extra_data_size.get(), MAX_EXTRA_BYTES);
    if len > max { Err(FormatError::SnapshotExtraData { index, len, min: 0, max }) } else { Ok(()) }
}

impl Snapshot {
    /// Decodes the entry at the start of `bytes`; also its length without padding. `None` when it
    /// is cut off.
    ///
    /// Specification, "Snapshot table entry": of the extra data, bytes 40 to 47 of the entry replace
    /// the 32-bit size of the VM state, 48 to 55 are the disk size, 56 to 63 the icount.
    fn decode(bytes: &[u8]) -> Option<(Self, usize)> {
        let fixed: RawSnapshot = raw::read(bytes)?;
        let variable = bytes.get(MIN_ENTRY_BYTES as usize..)?;
        let (extra, rest) = variable.split_at_checked(fixed.extra_data_size.get() as usize)?;
        let (id, rest) = rest.split_at_checked(usize::from(fixed.id_len.get()))?;
        let (name, rest) = rest.split_at_checked(usize::from(fixed.name_len.get()))?;
        let word = |at| word::get(extra, at);
        let snapshot = Self {
            l1_table: HostOffset(fixed.l1_table_offset.get()),
            l1_entries: fixed.l1_size.get(),
            id: id.to_vec(),
            name: name.to_vec(),
            date_sec: fixed.date_sec.get(),
            date_nsec: fixed.date_nsec.get(),
            vm_clock_nsec: fixed.vm_clock_nsec.get(),
            vm_state_bytes: word(0).unwrap_or(fixed.vm_state_size.get().into()),
            disk_size: word(EXTRA_VM_STATE),
            icount: word(EXTRA_DISK_SIZE),
            unknown_extra: extra.get(EXTRA_ICOUNT..).unwrap_or_default().to_vec(),
        };
        Some((snapshot, bytes.len() - rest.len()))
    }

    /// Brings an entry within the limits; says what was wrong.
    fn complete(&mut self, fixed: &RawSnapshot, index: u32, geometry: &Geometry) -> Result<(), FormatError> {
        let too_long = extra_data(fixed, index);
        if too_long.is_err() {
            self.unknown_extra.clear();
        }
        let too_short = self.lacks_disk_size(fixed.extra_data_size.get(), index, geometry);
        if too_short.is_err() {
            self.disk_size = Some(geometry.virtual_size);
        }
        too_long.and(too_short)
    }

    /// Specification: version 3 entries have at least 16 bytes of extra data, up to the disk size.
    fn lacks_disk_size(&self, len: u32, index: u32, geometry: &Geometry) -> Result<(), FormatError> {
        if geometry.version == Version::V3 && self.disk_size.is_none() {
            let (min, max) = (EXTRA_DISK_SIZE as u32, MAX_EXTRA_BYTES);
            return Err(FormatError::SnapshotExtraData { index, len, min, max });
        }
        Ok(())
    }

    /// Appends the entry with its padding. Extra data is written as far as there is something to
    /// say, at least up to the disk size where that is known. A VM state that does not fit 32 bits
    /// is 0 in the old field, so that old software sees a snapshot of the disk alone.
    fn encode(&self, index: u32, bytes: &mut Vec<u8>) -> Result<(), FormatError> {
        let mut extra = Vec::new();
        let has_icount = self.icount.is_some() || !self.unknown_extra.is_empty();
        if self.disk_size.is_some() || has_icount || self.vm_state_bytes > u64::from(u32::MAX) {
            extra.extend_from_slice(&self.vm_state_bytes.to_be_bytes());
        }
        if self.disk_size.is_some() || has_icount {
            extra.extend_from_slice(&self.disk_size.unwrap_or(0).to_be_bytes());
        }
        if has_icount {
            // -1 means "icount was disabled".
            extra.extend_from_slice(&self.icount.unwrap_or(u64::MAX).to_be_bytes());
            extra.extend_from_slice(&self.unknown_extra);
        }
        if extra.len() > MAX_EXTRA_BYTES as usize {
            let (len, max) = (u32::try_from(extra.len()).unwrap_or(u32::MAX), MAX_EXTRA_BYTES);
            return Err(FormatError::SnapshotExtraData { index, len, min: 0, max });
        }
        let fixed = RawSnapshot {
            l1_table_offset: self.l1_table.0.into(),
            l1_size: self.l1_entries.into(),
            id_len: short_len("a snapshot ID", &self.id)?.into(),
            name_len: short_len("a snapshot name", &self.name)?.into(),
            date_sec: self.date_sec.into(),
            date_nsec: self.date_nsec.into(),
            vm_clock_nsec: self.vm_clock_nsec.into(),
            vm_state_size: u32::try_from(self.vm_state_bytes).unwrap_or(0).into(),
            extra_data_size: (extra.len() as u32).into(),
        };
        for part in [fixed.as_bytes(), &extra, &self.id, &self.name] {
            bytes.extend_from_slice(part);
        }
        bytes.resize(bytes.len().next_multiple_of(ENTRY_ALIGN as usize), 0);
        Ok(())
    }

    /// Checks what the entry says against the image: the L1 table's size and place, and the extra
    /// data that version 3 demands. `index` is the entry's position, `table` the table's place.
    ///
    /// # Errors
    /// `SnapshotL1` or `SnapshotExtraData`.
    pub fn check(
        &self,
        index: u32,
        table: HostOffset,
        geometry: &Geometry,
        file_len: u64,
    ) -> Result<(), FormatError> {
        let wrong = |source| FormatError::SnapshotL1 { index, source: Box::new(source) };
        let entries = u64::from(self.l1_entries);
        if entries > MAX_L1_ENTRIES {
            let field = Field::new("the snapshot table's l1_size", table.0);
            return Err(wrong(FormatError::L1TooLarge { field, entries, max: MAX_L1_ENTRIES }));
        }
        let field = Field::new("the snapshot table's l1_table_offset", table.0);
        let (value, cluster_size) = (self.l1_table.0, geometry.cluster_size());
        // Of a snapshot's table without entries, too: QEMU calls the snapshot's entry corrupt.
        if !self.l1_table.is_aligned(cluster_size) {
            return Err(wrong(FormatError::TableMisaligned { field, value, cluster_size }));
        }
        check_table(field, self.l1_table, entries * TABLE_ENTRY_BYTES, cluster_size, file_len)
            .map_err(wrong)?;
        self.lacks_disk_size(0, index, geometry)
    }
}

/// A length that fits 16 bits.
fn short_len(what: &'static str, text: &[u8]) -> Result<u16, FormatError> {
    let (len, max) = (text.len() as u64, u64::from(u16::MAX));
    u16::try_from(text.len()).map_err(|_| FormatError::StringTooLong { what, len, max })
}

#[cfg(test)]
mod tests;
