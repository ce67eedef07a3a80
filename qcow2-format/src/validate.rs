//! Raw header bytes to a checked [`Header`]: every limit, each with its own error.
//!
//! The checks run in the order in which the fields depend on each other: version and cluster size
//! first, since they say how to read the rest. A value that passes here can be used in arithmetic
//! and as an allocation size without another thought.

use crate::{
    Defects, Field, FormatError, HostOffset, Version,
    extension::{self, Extensions, Places},
    geometry::*,
    header::*,
    raw::{self, MAGIC, RawHeader, RawHeaderV3},
    snapshot::MIN_ENTRY_BYTES,
};

const L1_TABLE: Field = Field::new("l1_table_offset", L1_TABLE_OFFSET);
const REFCOUNT_TABLE: Field = Field::new("refcount_table_offset", REFCOUNT_TABLE_OFFSET);
const SNAPSHOT_TABLE: Field = Field::new("snapshots_offset", SNAPSHOT_TABLE_OFFSET);

/// See [`Header::decode_prefix`].
pub(crate) fn prefix_bytes(bytes: &[u8], file_len: u64) -> Result<usize, FormatError> {
    let (version, cluster_bits) = basics(bytes)?;
    let shortest = match version {
        Version::V2 => u64::from(V2_HEADER_BYTES),
        Version::V3 => u64::from(V3_MIN_HEADER_BYTES),
    };
    if file_len < shortest {
        return Err(FormatError::Truncated { what: "the header", needed: shortest, available: file_len });
    }
    Ok(file_len.min(1 << cluster_bits) as usize)
}

/// See [`Header::decode_repairable`].
pub(crate) fn decode(bytes: &[u8], file_len: u64) -> Result<(Header, Defects), FormatError> {
    let needed = prefix_bytes(bytes, file_len)?;
    let truncated = || FormatError::Truncated {
        what: "the header",
        needed: needed as u64,
        available: bytes.len() as u64,
    };
    let cluster = bytes.get(..needed).ok_or_else(truncated)?;
    let fixed: RawHeader = raw::read(cluster).ok_or_else(truncated)?;
    let (version, cluster_bits) = basics(cluster)?;
    let cluster_size = 1u64 << cluster_bits;

    let features = Features::decode(version, cluster, cluster_size)?;
    if features.incompatible & EXTENDED_L2 != 0 && cluster_bits < MIN_CLUSTER_BITS_EXTENDED_L2 {
        let (value, min, max) = (cluster_bits, MIN_CLUSTER_BITS_EXTENDED_L2, MAX_CLUSTER_BITS);
        return Err(FormatError::ClusterBits { value, min, max });
    }
    let crypt = crypt_method(fixed.crypt_method.get())?;
    let backing = backing_name(&fixed, cluster, features.header_length)?;
    let area_end = backing.as_ref().map_or(cluster.len(), |(at, _)| *at);
    let area = cluster.get(features.header_length as usize..area_end).unwrap_or_default();
    let bitmaps_flag = features.autoclear & BITMAPS != 0;
    let extensions = extension::decode(area, u64::from(features.header_length), bitmaps_flag)?;
    let places = extensions.places;
    let backing_file = backing.map(|(_, name)| name).filter(|name| !name.is_empty());
    let mut header = put_together(version, &fixed, crypt, features, backing_file, extensions);
    let defects = check_tables(&header, file_len)?;
    check_pointers(&header, places, file_len)?;
    if defects.refcount_table.is_some() {
        (header.refcount_table, header.refcount_table_clusters) = (HostOffset(0), 0);
    }
    Ok((header, defects))
}

/// The header that the parts are of, its tables not checked yet.
fn put_together(
    version: Version,
    fixed: &RawHeader,
    crypt: CryptMethod,
    features: Features,
    backing_file: Option<Vec<u8>>,
    extensions: Extensions,
) -> Header {
    Header {
        version,
        cluster_bits: fixed.cluster_bits.get(),
        virtual_size: fixed.size.get(),
        crypt,
        l1_entries: fixed.l1_size.get(),
        l1_table: HostOffset(fixed.l1_table_offset.get()),
        refcount_table: HostOffset(fixed.refcount_table_offset.get()),
        refcount_table_clusters: fixed.refcount_table_clusters.get(),
        snapshot_count: fixed.nb_snapshots.get(),
        snapshot_table: HostOffset(fixed.snapshots_offset.get()),
        incompatible: features.incompatible,
        compatible: features.compatible,
        autoclear: features.autoclear,
        refcount_order: features.refcount_order,
        header_length: features.header_length,
        compression: features.compression,
        unknown_fields: features.unknown_fields,
        backing_file,
        backing_format: extensions.backing_format,
        data_file: extensions.data_file,
        feature_names: extensions.feature_names,
        bitmaps: extensions.bitmaps,
        crypto_header: extensions.crypto_header,
        unknown_extensions: extensions.unknown,
    }
}

/// Magic, version and cluster size.
///
/// Specification, "Header": the magic is "QFI\xfb"; valid versions are 2 and 3; cluster_bits is not
/// less than 9. That it is not more than 21 is QEMU's limit.
///
/// A file that is too short for a header is an image all the same if it begins as one.
fn basics(bytes: &[u8]) -> Result<(Version, u32), FormatError> {
    let word = |at: usize| {
        let word = bytes.get(at..).and_then(<[u8]>::first_chunk);
        word.copied().ok_or(FormatError::Truncated {
            what: "the header",
            needed: u64::from(V2_HEADER_BYTES),
            available: bytes.len() as u64,
        })
    };
    let found = word(0)?;
    if found != MAGIC {
        return Err(FormatError::Magic { found });
    }
    let version = match u32::from_be_bytes(word(4)?) {
        2 => Version::V2,
        3 => Version::V3,
        version => return Err(FormatError::Version { version }),
    };
    let value = u32::from_be_bytes(word(20)?);
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&value) {
        return Err(FormatError::ClusterBits { value, min: MIN_CLUSTER_BITS, max: MAX_CLUSTER_BITS });
    }
    Ok((version, value))
}

/// What version 3 added.
struct Features {
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_length: u32,
    compression: Compression,
    unknown_fields: Vec<u8>,
}

impl Features {
    /// Specification: version 2 ends at byte 72, its refcount order is 4. For version 3,
    /// header_length is at least 104 and a multiple of 8, refcount_order at most 6.
    fn decode(version: Version, cluster: &[u8], cluster_size: u64) -> Result<Self, FormatError> {
        if version == Version::V2 {
            return Ok(Self {
                incompatible: 0,
                compatible: 0,
                autoclear: 0,
                refcount_order: V2_REFCOUNT_ORDER,
                header_length: V2_HEADER_BYTES,
                compression: Compression::Zlib,
                unknown_fields: Vec::new(),
            });
        }
        let truncated = |needed| FormatError::Truncated {
            what: "the header",
            needed: u64::from(needed),
            available: cluster.len() as u64,
        };
        let v3 = cluster.get(V2_HEADER_BYTES as usize..).and_then(raw::read::<RawHeaderV3>);
        let v3 = v3.ok_or_else(|| truncated(V3_MIN_HEADER_BYTES))?;
        let length = v3.header_length.get();
        header_length(version, length, cluster_size)?;
        let additional = cluster.get(V3_MIN_HEADER_BYTES as usize..length as usize);
        let additional = additional.ok_or_else(|| truncated(length))?;
        let refcount_order = v3.refcount_order.get();
        if refcount_order > MAX_REFCOUNT_ORDER {
            return Err(FormatError::RefcountOrder { value: refcount_order });
        }
        let incompatible = v3.incompatible_features.get();
        Ok(Self {
            incompatible,
            compatible: v3.compatible_features.get(),
            autoclear: v3.autoclear_features.get(),
            refcount_order,
            header_length: length,
            compression: compression(incompatible, additional.first().copied())?,
            unknown_fields: additional.get(1..).unwrap_or_default().to_vec(),
        })
    }
}

/// Specification: for version 3 at least 104 and a multiple of 8. The header lies in the first
/// cluster.
pub(crate) fn header_length(version: Version, value: u32, cluster_size: u64) -> Result<(), FormatError> {
    let fits = match version {
        Version::V2 => value == V2_HEADER_BYTES,
        Version::V3 => {
            value >= V3_MIN_HEADER_BYTES && value.is_multiple_of(8) && u64::from(value) <= cluster_size
        }
    };
    if fits { Ok(()) } else { Err(FormatError::HeaderLength { value, max: cluster_size }) }
}

/// Specification, compression_type: with the incompatible bit the field must be present and not
/// zero; without, absent or zero. 0 is deflate, 1 is zstd.
fn compression(incompatible: u64, kind: Option<u8>) -> Result<Compression, FormatError> {
    match (incompatible & COMPRESSION != 0, kind.unwrap_or(0)) {
        (false, 0) => Ok(Compression::Zlib),
        (true, 1) => Ok(Compression::Zstd),
        (true, 0) => Err(FormatError::CompressionTypeMissing),
        (true, value) => Err(FormatError::CompressionType { value }),
        (false, value) => Err(FormatError::CompressionTypeUnflagged { value }),
    }
}

/// Specification, crypt_method: 0 none, 1 AES, 2 LUKS.
fn crypt_method(value: u32) -> Result<CryptMethod, FormatError> {
    match value {
        0 => Ok(CryptMethod::None),
        1 => Ok(CryptMethod::Aes),
        2 => Ok(CryptMethod::Luks),
        _ => Err(FormatError::CryptMethod { value }),
    }
}

/// The backing file name and where it starts.
///
/// Specification: an offset of 0 means that there is none; the name is at most 1023 bytes, not
/// terminated, and lies between the end of the extensions and the end of the first cluster.
fn backing_name(
    fixed: &RawHeader,
    cluster: &[u8],
    header_length: u32,
) -> Result<Option<(usize, Vec<u8>)>, FormatError> {
    let (value, len) = (fixed.backing_file_offset.get(), u64::from(fixed.backing_file_size.get()));
    if value == 0 {
        return Ok(None);
    }
    let (min, max) = (u64::from(header_length), cluster.len() as u64);
    if !(min..=max).contains(&value) {
        return Err(FormatError::BackingNameOffset { value, min, max });
    }
    let longest = MAX_BACKING_NAME_BYTES.min(max - value);
    if len > longest {
        return Err(FormatError::BackingNameLength { len, max: longest });
    }
    let name = &cluster[value as usize..][..len as usize];
    if name.contains(&0) {
        return Err(FormatError::BackingNameNul { offset: value });
    }
    Ok(Some((value as usize, name.to_vec())))
}

/// Sizes and places of the tables. What is wrong with the refcount table is a defect: it can be made anew
/// from all that the others say. So is a number of snapshots beyond the limit, and a snapshot table that is
/// nowhere: the active disk does not need it. An L1 table that is nowhere leaves a header all the same.
///
/// Specification: tables start at cluster boundaries; the L1 table covers the virtual size. The
/// upper limits are QEMU's. That tables lie inside the file, outside the first cluster and apart
/// from each other follows from what they are.
fn check_tables(header: &Header, file_len: u64) -> Result<Defects, FormatError> {
    if header.virtual_size > MAX_VIRTUAL_SIZE {
        return Err(FormatError::VirtualSize { value: header.virtual_size, max: MAX_VIRTUAL_SIZE });
    }
    let cluster_size = 1u64 << header.cluster_bits;
    let (entries, needed) = (header.l1_entries, header.geometry().l1_entries());
    if u64::from(entries) > MAX_L1_ENTRIES {
        let field = Field::new("l1_size", L1_SIZE_OFFSET);
        return Err(FormatError::L1TooLarge { field, entries: entries.into(), max: MAX_L1_ENTRIES });
    }
    if u64::from(entries) < needed {
        return Err(FormatError::L1TooSmall { entries, needed });
    }
    let (count, max) = (header.snapshot_count, MAX_SNAPSHOTS);
    let snapshot_count = (count > max).then_some(FormatError::SnapshotCount { count, max });

    let l1 = Place { field: L1_TABLE, start: header.l1_table, len: u64::from(entries) * TABLE_ENTRY_BYTES };
    let len = u64::from(count.min(max)) * MIN_ENTRY_BYTES;
    let snapshots = Place { field: SNAPSHOT_TABLE, start: header.snapshot_table, len };
    let l1_table = match check_table(l1.field, l1.start, l1.len, cluster_size, file_len) {
        Ok(()) => None,
        Err(defect @ FormatError::TableBeyondFile { .. }) if l1.is_addressable() => Some(defect),
        Err(error) => return Err(error),
    };
    let snapshot_table = check_snapshot_table(&snapshots, &l1, cluster_size, file_len)?;
    let others = if snapshot_table.is_none() { vec![l1, snapshots] } else { vec![l1] };
    let refcount_table = check_refcount_table(header, file_len, &others).err();
    Ok(Defects { l1_table, refcount_table, snapshot_count, snapshot_table })
}

/// What is wrong with a snapshot table that readers can do without. QEMU opens no image whose snapshot table
/// is at no cluster boundary or ends beyond the largest offset.
fn check_snapshot_table(
    table: &Place,
    l1: &Place,
    cluster_size: u64,
    file_len: u64,
) -> Result<Option<FormatError>, FormatError> {
    match check_table(table.field, table.start, table.len, cluster_size, file_len) {
        Ok(()) => Ok(table.is_apart_from(l1).err()),
        Err(defect) if table.is_addressable() && table.start.is_aligned(cluster_size) => Ok(Some(defect)),
        Err(error) => Err(error),
    }
}

fn check_refcount_table(header: &Header, file_len: u64, others: &[Place]) -> Result<(), FormatError> {
    let cluster_size = 1u64 << header.cluster_bits;
    let clusters = u64::from(header.refcount_table_clusters);
    let max = MAX_REFTABLE_BYTES / cluster_size;
    if clusters == 0 {
        return Err(FormatError::RefcountTableMissing);
    }
    if clusters > max {
        return Err(FormatError::RefcountTableTooLarge { clusters, max });
    }
    let table = Place { field: REFCOUNT_TABLE, start: header.refcount_table, len: clusters * cluster_size };
    check_table(table.field, table.start, table.len, cluster_size, file_len)?;
    others.iter().try_for_each(|other| table.is_apart_from(other))
}

/// Where the header says that a table is.
struct Place {
    field: Field,
    start: HostOffset,
    len: u64,
}

impl Place {
    /// Whether it ends before the largest offset.
    fn is_addressable(&self) -> bool {
        self.start.0.saturating_add(self.len) <= i64::MAX as u64
    }

    fn is_apart_from(&self, other: &Self) -> Result<(), FormatError> {
        let overlap = self.start.0 < other.start.0.saturating_add(other.len)
            && other.start.0 < self.start.0.saturating_add(self.len);
        if overlap && self.len > 0 && other.len > 0 {
            return Err(FormatError::TablesOverlap { first: other.field, second: self.field });
        }
        Ok(())
    }
}

/// One table of `len_bytes`: at a cluster boundary, after the header, inside the file. A table
/// without entries may be at any cluster boundary: QEMU does not open an image whose unused table is
/// elsewhere.
pub(crate) fn check_table(
    field: Field,
    start: HostOffset,
    len_bytes: u64,
    cluster_size: u64,
    file_len: u64,
) -> Result<(), FormatError> {
    let value = start.0;
    if !start.is_aligned(cluster_size) {
        return Err(FormatError::TableMisaligned { field, value, cluster_size });
    }
    if len_bytes == 0 && value <= i64::MAX as u64 {
        return Ok(());
    }
    if value < cluster_size {
        return Err(FormatError::TableInHeader { field, value });
    }
    match start.checked_add(len_bytes) {
        Some(end) if end.0 <= file_len.min(i64::MAX as u64) => Ok(()),
        _ => Err(FormatError::TableBeyondFile { field, value, len_bytes, file_len }),
    }
}

/// What extensions point to.
///
/// Specification: the encryption header pointer is there if, and only if, the method is LUKS; it
/// and the bitmap directory start at cluster boundaries.
fn check_pointers(header: &Header, places: Places, file_len: u64) -> Result<(), FormatError> {
    let cluster_size = 1u64 << header.cluster_bits;
    match (header.crypt, &header.crypto_header) {
        (CryptMethod::Luks, None) => return Err(FormatError::CryptoHeaderMissing),
        (CryptMethod::None | CryptMethod::Aes, Some(_)) => return Err(FormatError::CryptoHeaderUnexpected),
        (CryptMethod::Luks, Some(crypto)) => {
            let field = Field::new("offset of the encryption header", places.crypto_header);
            check_table(field, crypto.offset, crypto.len_bytes.max(1), cluster_size, file_len)?;
        }
        (CryptMethod::None | CryptMethod::Aes, None) => {}
    }
    if let Some(bitmaps) = header.consistent_bitmaps() {
        let field = Field::new("bitmap_directory_offset", places.bitmaps + 16);
        check_table(field, bitmaps.directory, bitmaps.directory_bytes, cluster_size, file_len)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
