//! The header: what an image is, where its tables are, which features it uses.
//!
//! [`Header`] is the checked form. Decoding and its limits are in `validate.rs`, header extensions
//! in [`extension`]; this module holds the type, the feature bits, the questions
//! that can be asked of a header, and the way back to bytes. What lies behind the table offsets is
//! not looked at.

use crate::{
    FormatError, Geometry, HostOffset, Unsupported, Version,
    extension::{
        self, BitmapsExtension, CryptoHeader, FeatureKind, FeatureName, KNOWN_FEATURES, UnknownExtension,
    },
    raw::{MAGIC, RawHeader, RawHeaderV3},
};
use std::fmt;
use zerocopy::IntoBytes;

/// Incompatible feature bit 0: refcounts may be inconsistent.
pub const DIRTY: u64 = 1 << 0;
/// Incompatible feature bit 1: any structure may be corrupt; the image must not be written to.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible feature bit 2: guest clusters are in an external data file.
pub const EXTERNAL_DATA: u64 = 1 << 2;
/// Incompatible feature bit 3: compressed clusters are not deflate.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible feature bit 4: 16-byte L2 entries with subclusters.
pub const EXTENDED_L2: u64 = 1 << 4;
/// All incompatible feature bits that the specification defines.
pub const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2;
/// Compatible feature bit 0: refcount updates may be postponed under the dirty bit.
pub const LAZY_REFCOUNTS: u64 = 1 << 0;
/// All compatible feature bits that the specification defines.
pub const KNOWN_COMPATIBLE: u64 = LAZY_REFCOUNTS;
/// Autoclear feature bit 0: the bitmaps extension is consistent.
pub const BITMAPS: u64 = 1 << 0;
/// Autoclear feature bit 1: the external data file is a raw image of the disk.
pub const RAW_EXTERNAL: u64 = 1 << 1;
/// All autoclear feature bits that the specification defines.
pub const KNOWN_AUTOCLEAR: u64 = BITMAPS | RAW_EXTERNAL;

/// File offset of the virtual size (8 bytes, big-endian, as all that follow).
pub const SIZE_OFFSET: u64 = 24;
/// File offset of the number of L1 entries (4 bytes), directly followed by the table's offset.
pub const L1_SIZE_OFFSET: u64 = 36;
/// File offset of the L1 table's offset (8 bytes).
pub const L1_TABLE_OFFSET: u64 = 40;
/// File offset of the refcount table's offset (8 bytes), directly followed by its clusters.
pub const REFCOUNT_TABLE_OFFSET: u64 = 48;
/// File offset of the refcount table's size in clusters (4 bytes).
pub const REFCOUNT_TABLE_CLUSTERS_OFFSET: u64 = 56;
/// File offset of the number of snapshots (4 bytes), directly followed by the table's offset.
pub const SNAPSHOT_COUNT_OFFSET: u64 = 60;
/// File offset of the snapshot table's offset (8 bytes).
pub const SNAPSHOT_TABLE_OFFSET: u64 = 64;
/// File offset of the incompatible features (8 bytes, version 3).
pub const INCOMPATIBLE_OFFSET: u64 = 72;
/// File offset of the compatible features (8 bytes, version 3).
pub const COMPATIBLE_OFFSET: u64 = 80;
/// File offset of the autoclear features (8 bytes, version 3).
pub const AUTOCLEAR_OFFSET: u64 = 88;
/// File offset of the compression type (1 byte, version 3 with a header of 112 bytes or more).
pub const COMPRESSION_TYPE_OFFSET: u64 = 104;

/// Length in bytes of a version 2 header.
pub const V2_HEADER_BYTES: u32 = 72;
/// Length in bytes of the shortest version 3 header.
pub const V3_MIN_HEADER_BYTES: u32 = 104;
/// Length in bytes of the version 3 header with every field that is known here.
pub const V3_HEADER_BYTES: u32 = 112;
/// Longest backing file name in bytes.
pub const MAX_BACKING_NAME_BYTES: u64 = 1023;

/// How many bytes to read for a first try at [`Header::decode`]: the whole first cluster for every
/// cluster size up to the usual 64 KiB. [`Header::decode_prefix`] says when there are more.
pub const HEADER_READ_BYTES: usize = 64 << 10;

/// The payload's encryption.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CryptMethod {
    /// Plain text.
    None,
    /// The legacy AES-CBC method.
    Aes,
    /// LUKS.
    Luks,
}

impl fmt::Display for CryptMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Aes => "AES",
            Self::Luks => "LUKS",
        })
    }
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Raw deflate, which QEMU calls zlib; there is no zlib header.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        })
    }
}

/// A checked header with its extensions and the backing file name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Format version.
    pub version: Version,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Size of the virtual disk in bytes.
    pub virtual_size: u64,
    /// Encryption of the payload.
    pub crypt: CryptMethod,
    /// Entries of the active L1 table; at least what `virtual_size` needs.
    pub l1_entries: u32,
    /// Where the active L1 table starts; meaningless when it has no entries.
    pub l1_table: HostOffset,
    /// Where the refcount table starts.
    pub refcount_table: HostOffset,
    /// Size of the refcount table in clusters; at least 1, or 0 where [`Defects`] say why.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub snapshot_count: u32,
    /// Where the snapshot table starts; meaningless without snapshots.
    pub snapshot_table: HostOffset,
    /// Incompatible feature bits; 0 for version 2.
    pub incompatible: u64,
    /// Compatible feature bits; 0 for version 2.
    pub compatible: u64,
    /// Autoclear feature bits; 0 for version 2.
    pub autoclear: u64,
    /// log2 of the refcount width in bits; 4 for version 2.
    pub refcount_order: u32,
    /// Length of the header in bytes, without extensions; 72 for version 2.
    pub header_length: u32,
    /// Compression of compressed clusters.
    pub compression: Compression,
    /// Bytes 105 to `header_length`: padding, and fields that are not known here.
    pub unknown_fields: Vec<u8>,
    /// Name of the backing file, as stored: a path relative to this image, or something that only
    /// QEMU understands. Never empty, never with a NUL byte.
    pub backing_file: Option<Vec<u8>>,
    /// Format of the backing file, as stored ("qcow2", "raw").
    pub backing_format: Option<String>,
    /// Name of the external data file, as stored.
    pub data_file: Option<Vec<u8>>,
    /// Names of feature bits, for messages.
    pub feature_names: Vec<FeatureName>,
    /// Where the bitmap directory is. Only to be trusted as [`Header::bitmaps_consistent`] says.
    pub bitmaps: Option<BitmapsExtension>,
    /// Where the LUKS header is.
    pub crypto_header: Option<CryptoHeader>,
    /// Extensions that are not known here, kept in their order.
    pub unknown_extensions: Vec<UnknownExtension>,
}

/// What is wrong with a header that can be put right from the rest of the image, or does not keep it from
/// being described.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Defects {
    /// That the L1 table goes on beyond the end of the file: without it there is no disk. What the header says
    /// of it is kept.
    pub l1_table: Option<FormatError>,
    /// Why the refcount table cannot be used: it is missing, too large, not where a table can be, or over
    /// another table. The header then says that there is none: no clusters, at offset 0.
    pub refcount_table: Option<FormatError>,
    /// That there are more snapshots than the limit; the header says how many.
    pub snapshot_count: Option<FormatError>,
    /// Why the snapshot table cannot be used: it goes on beyond the end of the file, or is where another
    /// table or the header is. What the header says of it is kept.
    pub snapshot_table: Option<FormatError>,
}

impl Header {
    /// How many bytes from the start of the file [`Header::decode`] needs: the first cluster, at
    /// most 2 MiB, or the file if that is shorter. `bytes` are at least the first 24, or the file.
    ///
    /// # Errors
    /// The magic, the version or the cluster size is wrong, or the file is too short for a header.
    pub fn decode_prefix(bytes: &[u8], file_len: u64) -> Result<usize, FormatError> {
        crate::validate::prefix_bytes(bytes, file_len)
    }

    /// Decodes and checks the header, its extensions and the backing file name.
    ///
    /// `bytes` start at the start of the file and are at least as many as
    /// [`Header::decode_prefix`] asks for; `file_len` is the length of the file in bytes, or the
    /// capacity of the block device that holds the image.
    ///
    /// # Errors
    /// See [`FormatError`]; every field is checked, whether it will be used or not. Features that
    /// are not served are no error here: see [`Header::check_supported`].
    pub fn decode(bytes: &[u8], file_len: u64) -> Result<Self, FormatError> {
        let (header, defects) = Self::decode_repairable(bytes, file_len)?;
        let Defects { l1_table, refcount_table, snapshot_count, snapshot_table } = defects;
        l1_table.or(refcount_table).or(snapshot_count).or(snapshot_table).map_or(Ok(header), Err)
    }

    /// [`Header::decode`] for those who can do without what [`Defects`] are about, or repair it.
    ///
    /// # Errors
    /// As [`Header::decode`], for everything else.
    pub fn decode_repairable(bytes: &[u8], file_len: u64) -> Result<(Self, Defects), FormatError> {
        crate::validate::decode(bytes, file_len)
    }

    /// The numbers for address computations.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry {
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.incompatible & EXTENDED_L2 != 0,
            virtual_size: self.virtual_size,
        }
    }

    /// Refuses what the engine does not serve, by name, the least understood first: unknown
    /// incompatible bits, encryption, external data file, extended L2 entries. What it serves for reading
    /// only: see [`Header::check_writable`].
    ///
    /// # Errors
    /// The first feature that is not served.
    pub fn check_supported(&self) -> Result<(), Unsupported> {
        let unknown = self.incompatible & !KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            let set = (0..64).filter(|bit| unknown >> bit & 1 != 0);
            let told = |bit| match self.feature_name(FeatureKind::Incompatible, bit) {
                Some(name) => format!("\"{name}\" (bit {bit})"),
                None => format!("bit {bit}"),
            };
            return Err(Unsupported::IncompatibleFeatures(set.map(told).collect()));
        }
        let is_set = |bit| self.incompatible & bit != 0;
        match self.crypt {
            CryptMethod::Aes | CryptMethod::Luks => Err(Unsupported::Encryption(self.crypt)),
            CryptMethod::None if is_set(EXTERNAL_DATA) => Err(Unsupported::ExternalDataFile),
            CryptMethod::None if is_set(EXTENDED_L2) => Err(Unsupported::ExtendedL2),
            CryptMethod::None => Ok(()),
        }
    }

    /// Refuses what must not be written to: an image that is marked corrupt.
    ///
    /// # Errors
    /// That it is.
    pub fn check_writable(&self) -> Result<(), Unsupported> {
        if self.incompatible & CORRUPT != 0 { Err(Unsupported::Corrupt) } else { Ok(()) }
    }

    /// The name that the image itself gives a feature bit; where it gives none (a header in a cluster of 512 bytes
    /// has no room for names), that of the specification.
    #[must_use]
    pub fn feature_name(&self, kind: FeatureKind, bit: u8) -> Option<String> {
        let own = self.feature_names.iter().find(|name| name.kind == kind.number() && name.bit == bit);
        let known = || KNOWN_FEATURES.iter().find(|&&(of, at, _)| (of, at) == (kind, bit));
        own.map(ToString::to_string).or_else(|| known().map(|&(_, _, name)| name.to_owned()))
    }

    /// The autoclear bits that a writer must clear before its first write: all that it does not
    /// keep true, known or not. `kept` are those that it does.
    #[must_use]
    pub fn stale_autoclear(&self, kept: u64) -> u64 {
        self.autoclear & !kept
    }

    /// Whether the raw external data bit is set where there is no data file, which the specification rules
    /// out.
    #[must_use]
    pub fn has_stray_raw_bit(&self) -> bool {
        self.autoclear & RAW_EXTERNAL != 0 && self.incompatible & EXTERNAL_DATA == 0
    }

    /// Whether the bitmaps extension says the truth: "if the bit is unset, the bitmaps extension
    /// data must be considered inconsistent".
    #[must_use]
    pub fn bitmaps_consistent(&self) -> bool {
        self.autoclear & BITMAPS != 0 && self.bitmaps.is_some()
    }

    /// The bitmaps extension, if it says the truth.
    #[must_use]
    pub fn consistent_bitmaps(&self) -> Option<BitmapsExtension> {
        self.bitmaps.filter(|_| self.bitmaps_consistent())
    }

    /// The bytes of the first cluster: header, extensions, backing file name, zeros.
    ///
    /// Extensions are written in a fixed order, unknown ones last. Lengths and offsets inside the
    /// header are computed; fields that point to tables are written as they are.
    ///
    /// # Errors
    /// It does not fit into a cluster, a name is too long, or version 2 cannot express it.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.check_expressible()?;
        let mut body = extension::encode(self)?;
        if self.backing_file.as_ref().is_some_and(Vec::is_empty) {
            return Err(FormatError::BackingNameEmpty);
        }
        let name = self.backing_file.as_deref().unwrap_or_default();
        if name.len() as u64 > MAX_BACKING_NAME_BYTES {
            let len = name.len() as u64;
            return Err(FormatError::BackingNameLength { len, max: MAX_BACKING_NAME_BYTES });
        }
        let name_at = u64::from(self.header_length) + body.len() as u64;
        body.extend_from_slice(name);

        let cluster_size = 1u64 << self.cluster_bits;
        let needed = u64::from(self.header_length) + body.len() as u64;
        if needed > cluster_size {
            return Err(FormatError::HeaderTooLarge { needed, cluster_size });
        }
        let mut bytes = self.encode_fields(if name.is_empty() { 0 } else { name_at }, name.len() as u32);
        bytes.resize(self.header_length as usize, 0);
        bytes.extend_from_slice(&body);
        bytes.resize(cluster_size as usize, 0);
        Ok(bytes)
    }

    /// Header fields up to `header_length`.
    fn encode_fields(&self, backing_file_offset: u64, backing_file_size: u32) -> Vec<u8> {
        let fixed = RawHeader {
            magic: MAGIC,
            version: self.version.number().into(),
            backing_file_offset: backing_file_offset.into(),
            backing_file_size: backing_file_size.into(),
            cluster_bits: self.cluster_bits.into(),
            size: self.virtual_size.into(),
            crypt_method: (self.crypt as u32).into(),
            l1_size: self.l1_entries.into(),
            l1_table_offset: self.l1_table.0.into(),
            refcount_table_offset: self.refcount_table.0.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.snapshot_count.into(),
            snapshots_offset: self.snapshot_table.0.into(),
        };
        let mut bytes = fixed.as_bytes().to_vec();
        if self.version == Version::V3 {
            let v3 = RawHeaderV3 {
                incompatible_features: self.incompatible.into(),
                compatible_features: self.compatible.into(),
                autoclear_features: self.autoclear.into(),
                refcount_order: self.refcount_order.into(),
                header_length: self.header_length.into(),
            };
            bytes.extend_from_slice(v3.as_bytes());
            if self.header_length > V3_MIN_HEADER_BYTES {
                bytes.push(self.compression as u8);
                bytes.extend_from_slice(&self.unknown_fields);
            }
        }
        bytes
    }

    /// Refuses combinations that the header's version or length cannot carry.
    fn check_expressible(&self) -> Result<(), FormatError> {
        let needs = |option| Err(FormatError::NeedsVersion3 { option });
        match self.version {
            Version::V3 => {}
            Version::V2 if self.refcount_order != crate::geometry::V2_REFCOUNT_ORDER => {
                return needs("a refcount width other than 16 bits");
            }
            Version::V2 if self.compression != Compression::Zlib => return needs("zstd compression"),
            Version::V2 if self.compatible & LAZY_REFCOUNTS != 0 => return needs("lazy refcounts"),
            Version::V2 if (self.incompatible | self.compatible | self.autoclear) != 0 => {
                return needs("a feature bit");
            }
            Version::V2 => {}
        }
        crate::validate::header_length(self.version, self.header_length, 1 << self.cluster_bits)?;
        let holds_type = self.header_length >= V3_HEADER_BYTES;
        let flagged = self.incompatible & COMPRESSION != 0;
        match self.compression {
            Compression::Zlib if flagged => Err(FormatError::CompressionTypeMissing),
            Compression::Zstd if !holds_type => Err(FormatError::CompressionTypeMissing),
            Compression::Zstd if !flagged => Err(FormatError::CompressionTypeUnflagged { value: 1 }),
            _ => Ok(()),
        }
    }
}
