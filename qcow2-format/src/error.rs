//! What can be wrong with an image: one variant per kind of damage.
//!
//! [`FormatError`] is about the structures that are read once, at open: header, extensions,
//! snapshot table, bitmap directory. [`Corruption`] is about a single table entry, met while
//! serving; it is small and `Copy`. [`Unsupported`] is about images that are in order but use what
//! the engine does not serve. The caller adds the file's name.

use crate::CryptMethod;
use std::fmt;
use thiserror::Error;

/// A field of an on-disk structure: its name in the specification and its byte offset in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// The specification's name of the field.
    pub name: &'static str,
    /// Where it lies in the image file, in bytes.
    pub offset: u64,
}

impl Field {
    /// A field by name and file offset.
    #[must_use]
    pub const fn new(name: &'static str, offset: u64) -> Self {
        Self { name, offset }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (byte {})", self.name, self.offset)
    }
}

/// Damage in, or a limit exceeded by, the header or a structure that the header points to.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The first four bytes are not the magic.
    #[error("not a QCOW2 image: byte 0 holds {found:02x?} instead of the magic \"QFI\\xfb\"")]
    Magic {
        /// What is there.
        found: [u8; 4],
    },
    /// A structure ends after the end of the file or of the bytes that were handed over.
    #[error("{what} is cut off: it needs {needed} bytes, there are {available}")]
    Truncated {
        /// The structure.
        what: &'static str,
        /// Bytes that it takes, at least.
        needed: u64,
        /// Bytes that there are.
        available: u64,
    },
    /// Neither version 2 nor 3.
    #[error("version (byte 4) is {version}; versions 2 and 3 exist")]
    Version {
        /// The field's value.
        version: u32,
    },
    /// A cluster size outside the limits.
    #[error("cluster_bits (byte 20) is {value}; it must be {min} to {max}")]
    ClusterBits {
        /// The field's value.
        value: u32,
        /// Smallest allowed: 9, or 14 with extended L2 entries.
        min: u32,
        /// Largest allowed: 21.
        max: u32,
    },
    /// A virtual size that no block device can have.
    #[error("size (byte 24) is {value}; a disk is at most {max} bytes")]
    VirtualSize {
        /// The field's value in bytes.
        value: u64,
        /// Largest allowed.
        max: u64,
    },
    /// An encryption method that the specification does not know.
    #[error("crypt_method (byte 32) is {value}; 0 (none), 1 (AES) and 2 (LUKS) exist")]
    CryptMethod {
        /// The field's value.
        value: u32,
    },
    /// Refcounts wider than 64 bits.
    #[error("refcount_order (byte 96) is {value}; it must be at most 6")]
    RefcountOrder {
        /// The field's value.
        value: u32,
    },
    /// A header length that is too short, too long or not a multiple of 8.
    #[error("header_length (byte 100) is {value}; it must be a multiple of 8 from 104 to {max}")]
    HeaderLength {
        /// The field's value in bytes.
        value: u32,
        /// The cluster size: the header lies in the first cluster.
        max: u64,
    },
    /// A compression type that the specification does not know.
    #[error("compression_type (byte 104) is {value}; 0 (deflate) and 1 (zstd) exist")]
    CompressionType {
        /// The field's value.
        value: u8,
    },
    /// The compression bit is set, but the type is absent or deflate.
    #[error("incompatible_features (byte 72) has the compression bit, but compression_type is absent or 0")]
    CompressionTypeMissing,
    /// A compression type other than deflate without the compression bit.
    #[error("compression_type (byte 104) is {value}, but incompatible_features lacks the compression bit")]
    CompressionTypeUnflagged {
        /// The field's value.
        value: u8,
    },
    /// The raw external data bit without the external data bit.
    #[error("autoclear_features (byte 88) says that the data file is raw, but there is no data file")]
    RawWithoutDataFile,
    /// Internal snapshots with the external data bit.
    #[error("nb_snapshots (byte 60) is {count}, and an image with a data file has none")]
    SnapshotsWithDataFile {
        /// How many there are.
        count: u32,
    },
    /// A table does not start at a cluster boundary.
    #[error("{field} is {value:#x}, which is not a multiple of the cluster size {cluster_size}")]
    TableMisaligned {
        /// The field that points to the table.
        field: Field,
        /// The offset that it holds.
        value: u64,
        /// Cluster size in bytes.
        cluster_size: u64,
    },
    /// A table lies in the first cluster, over the header.
    #[error("{field} is {value:#x}, inside the header's cluster")]
    TableInHeader {
        /// The field that points to the table.
        field: Field,
        /// The offset that it holds.
        value: u64,
    },
    /// A table ends after the end of the file, or after any offset that a file can have.
    #[error("{field} is {value:#x}: {len_bytes} bytes from there end after the file's {file_len} bytes")]
    TableBeyondFile {
        /// The field that points to the table.
        field: Field,
        /// The offset that it holds.
        value: u64,
        /// Size of the table in bytes.
        len_bytes: u64,
        /// Size of the file in bytes.
        file_len: u64,
    },
    /// Two tables share bytes.
    #[error("the tables that {first} and {second} point to overlap")]
    TablesOverlap {
        /// One pointer.
        first: Field,
        /// The other.
        second: Field,
    },
    /// More L1 entries than the limit.
    #[error("{field} is {entries} entries; an L1 table has at most {max}")]
    L1TooLarge {
        /// The field with the number of entries.
        field: Field,
        /// Its value, or what the virtual size would need.
        entries: u64,
        /// Largest allowed.
        max: u64,
    },
    /// Fewer L1 entries than the virtual size needs.
    #[error("l1_size (byte 36) is {entries} entries; the virtual size needs {needed}")]
    L1TooSmall {
        /// The field's value.
        entries: u32,
        /// What the virtual size needs.
        needed: u64,
    },
    /// An image without refcounts.
    #[error("refcount_table_clusters (byte 56) is 0: there is no refcount table")]
    RefcountTableMissing,
    /// A larger refcount table than the limit.
    #[error("refcount_table_clusters (byte 56) is {clusters}; at most {max} are allowed")]
    RefcountTableTooLarge {
        /// The field's value.
        clusters: u64,
        /// Largest allowed for this cluster size.
        max: u64,
    },
    /// More snapshots than the limit.
    #[error("nb_snapshots (byte 60) is {count}; at most {max} are allowed")]
    SnapshotCount {
        /// The field's value.
        count: u32,
        /// Largest allowed.
        max: u32,
    },
    /// The backing file name does not start between the header and the end of the first cluster.
    #[error("backing_file_offset (byte 8) is {value:#x}; it must be from {min:#x} to {max:#x}")]
    BackingNameOffset {
        /// The field's value.
        value: u64,
        /// End of the header.
        min: u64,
        /// End of the first cluster.
        max: u64,
    },
    /// The backing file name is longer than allowed, or than its cluster.
    #[error("backing_file_size (byte 16) is {len}; at most {max} bytes are allowed there")]
    BackingNameLength {
        /// The field's value in bytes.
        len: u64,
        /// Largest allowed at this offset.
        max: u64,
    },
    /// A backing file was asked for, but its name is empty.
    #[error("the backing file name is empty")]
    BackingNameEmpty,
    /// The backing file name holds a NUL byte, which no path does.
    #[error("the backing file name at byte {offset} contains a NUL byte")]
    BackingNameNul {
        /// Where the name starts.
        offset: u64,
    },
    /// A header extension is longer than the room that is left.
    #[error("header extension {kind:#010x} at byte {offset} is {len} bytes long; {available} are left")]
    ExtensionTooLong {
        /// The extension's type.
        kind: u32,
        /// Where it starts.
        offset: u64,
        /// Length of its data in bytes.
        len: u32,
        /// Bytes left for its data.
        available: u64,
    },
    /// A header extension of fixed size has another size.
    #[error("header extension {kind:#010x} at byte {offset} is {len} bytes long instead of {expected}")]
    ExtensionLength {
        /// The extension's type.
        kind: u32,
        /// Where it starts.
        offset: u64,
        /// Length of its data in bytes.
        len: u64,
        /// The length of this type.
        expected: u64,
    },
    /// The string of a header extension is not UTF-8 or contains NUL.
    #[error("header extension {kind:#010x} at byte {offset} is not a valid string")]
    ExtensionText {
        /// The extension's type.
        kind: u32,
        /// Where it starts.
        offset: u64,
    },
    /// A field of an extension or table that must be 0 is not.
    #[error("{field} is reserved and must be 0, but is {value:#x}")]
    Reserved {
        /// The field.
        field: Field,
        /// Its value.
        value: u64,
    },
    /// LUKS encryption without the encryption header pointer.
    #[error("crypt_method (byte 32) is LUKS, but the encryption header extension is missing")]
    CryptoHeaderMissing,
    /// An encryption header pointer without LUKS encryption.
    #[error("there is an encryption header extension, but crypt_method (byte 32) is not LUKS")]
    CryptoHeaderUnexpected,
    /// A number in the bitmaps extension or directory is outside its limits.
    #[error("{field} is {value}; it must be {min} to {max}")]
    OutOfRange {
        /// The field.
        field: Field,
        /// Its value.
        value: u64,
        /// Smallest allowed.
        min: u64,
        /// Largest allowed.
        max: u64,
    },
    /// A snapshot's extra data is longer than the limit, or shorter than version 3 demands.
    #[error("snapshot {index}: extra data of {len} bytes; {min} to {max} are allowed")]
    SnapshotExtraData {
        /// Position in the snapshot table.
        index: u32,
        /// Length of the extra data in bytes.
        len: u32,
        /// Smallest allowed.
        min: u32,
        /// Largest allowed.
        max: u32,
    },
    /// The snapshot table is longer than the limit.
    #[error("the snapshot table is at least {len} bytes long at snapshot {index}; at most {max} are allowed")]
    SnapshotTableTooLong {
        /// The snapshot at which the limit is passed.
        index: u32,
        /// Bytes up to its end.
        len: u64,
        /// Largest allowed.
        max: u64,
    },
    /// The L1 table of a snapshot is misplaced or too large.
    #[error("snapshot {index}: {source}")]
    SnapshotL1 {
        /// Position in the snapshot table.
        index: u32,
        /// What is wrong with it.
        source: Box<FormatError>,
    },
    /// A string is too long for its length field.
    #[error("{what} is {len} bytes long; at most {max} can be stored")]
    StringTooLong {
        /// What the string is.
        what: &'static str,
        /// Its length in bytes.
        len: u64,
        /// Largest that can be stored.
        max: u64,
    },
    /// Header, extensions and backing file name do not fit into one cluster.
    #[error("header, extensions and backing file name take {needed} bytes; a cluster has {cluster_size}")]
    HeaderTooLarge {
        /// Bytes needed.
        needed: u64,
        /// Bytes of a cluster.
        cluster_size: u64,
    },
    /// An option that version 2 cannot express.
    #[error("{option} needs version 3 (compat=1.1)")]
    NeedsVersion3 {
        /// The option.
        option: &'static str,
    },
}

/// Which kind of table entry is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// An entry of an L1 table.
    L1,
    /// An entry of an L2 table.
    L2,
    /// An entry of the refcount table.
    RefcountTable,
    /// An entry of a bitmap table.
    BitmapTable,
}

impl fmt::Display for EntryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::L1 => "L1 entry",
            Self::L2 => "L2 entry",
            Self::RefcountTable => "refcount table entry",
            Self::BitmapTable => "bitmap table entry",
        })
    }
}

/// Damage in one table entry, with the entry's host-endian value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum Corruption {
    /// The offset is not a multiple of the cluster size.
    #[error("{entry} {raw:#018x} names an offset that is not cluster-aligned")]
    Misaligned {
        /// Which entry.
        entry: EntryKind,
        /// Its value.
        raw: u64,
    },
    /// A bit is set that must be 0.
    #[error("{entry} {raw:#018x} has reserved bits set")]
    ReservedBits {
        /// Which entry.
        entry: EntryKind,
        /// Its value.
        raw: u64,
    },
    /// Bit 63 claims a refcount of one for a cluster that the entry does not name.
    #[error("{entry} {raw:#018x} has the copied flag but no offset")]
    CopiedWithoutOffset {
        /// Which entry.
        entry: EntryKind,
        /// Its value.
        raw: u64,
    },
    /// The offset is larger than any file can be.
    #[error("{entry} {raw:#018x} names an offset beyond any file")]
    BeyondAnyFile {
        /// Which entry.
        entry: EntryKind,
        /// Its value.
        raw: u64,
    },
    /// A zero cluster in a version 2 image.
    #[error("L2 entry {raw:#018x} has the zero flag, which version 2 does not know")]
    ZeroFlagInVersion2 {
        /// The entry's value.
        raw: u64,
    },
    /// The copied flag on a compressed cluster.
    #[error("L2 entry {raw:#018x} has the copied flag on a compressed cluster")]
    CompressedCopied {
        /// The entry's value.
        raw: u64,
    },
    /// Compressed data that would lie over the header.
    #[error("L2 entry {raw:#018x} names compressed data inside the header's cluster")]
    CompressedInHeader {
        /// The entry's value.
        raw: u64,
    },
    /// A compressed cluster with a subcluster bitmap.
    #[error("L2 entry {raw:#018x} is compressed but has the subcluster bitmap {bitmap:#018x}")]
    CompressedBitmap {
        /// The entry's first half.
        raw: u64,
        /// Its second half.
        bitmap: u64,
    },
    /// A subcluster is allocated and reads as zeros at once.
    #[error("L2 entry {raw:#018x} has subclusters that are both allocated and zero: {bitmap:#018x}")]
    SubclusterAllocatedAndZero {
        /// The entry's first half.
        raw: u64,
        /// Its second half.
        bitmap: u64,
    },
    /// Allocated subclusters of a cluster that does not exist.
    #[error("L2 entry {raw:#018x} has no offset but allocated subclusters: {bitmap:#018x}")]
    SubclusterWithoutHost {
        /// The entry's first half.
        raw: u64,
        /// Its second half.
        bitmap: u64,
    },
}

/// A sound image that uses something this engine does not serve.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// Bit 1: any structure may be wrong.
    #[error(
        "the image is marked corrupt (incompatible feature bit 1): it can be read only, until check --repair all \
         has repaired it"
    )]
    Corrupt,
    /// Bit 2: payload in another file.
    #[error("the image uses an external data file (incompatible feature bit 2), which is not supported")]
    ExternalDataFile,
    /// Bit 4: subclusters.
    #[error("the image uses extended L2 entries (incompatible feature bit 4), which are not supported")]
    ExtendedL2,
    /// The payload is encrypted.
    #[error("the image is encrypted with {0}, which is not supported")]
    Encryption(CryptMethod),
    /// Bits that the specification does not define.
    #[error("the image uses incompatible features that are not known: {}", .0.join(", "))]
    IncompatibleFeatures(
        /// Each bit that is set, by its number and the name in the image's feature name table, if it has one.
        Vec<String>,
    ),
}
