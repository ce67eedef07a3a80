//! Header extensions: the optional records between the header and the backing file name.
//!
//! Records of unknown type are kept, byte for byte, since "other: unknown header extension, can be
//! safely ignored" must not turn into "lost". What the numbers inside point to is judged by
//! `validate.rs`, which knows the file.

use crate::{
    Field, FormatError, Header, HostOffset,
    raw::{self, RawBitmaps, RawCryptoHeader, RawExtension},
};
use std::fmt;
use zerocopy::IntoBytes;

/// End of the extension area.
pub const END: u32 = 0;
/// Backing file format name.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Feature name table.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Bitmaps extension.
pub const BITMAPS: u32 = 0x2385_2875;
/// Full disk encryption header pointer.
pub const CRYPTO_HEADER: u32 = 0x0537_be77;
/// External data file name.
pub const DATA_FILE: u32 = 0x4441_5441;

/// Most bitmaps per image, as QEMU.
pub const MAX_BITMAPS: u32 = 65535;
/// Largest bitmap directory in bytes, as QEMU.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 64 << 20;
/// Smallest bitmap directory entry: 24 fixed bytes and a name of 1, rounded up to 8.
pub const MIN_BITMAP_ENTRY_BYTES: u64 = 32;

/// Bytes of a record's head: type and length.
const HEAD_BYTES: usize = size_of::<RawExtension>();
/// Bytes of a feature name table entry.
const FEATURE_ENTRY_BYTES: usize = 48;
/// Longest feature name in bytes.
const FEATURE_NAME_BYTES: usize = FEATURE_ENTRY_BYTES - 2;

/// Which of the three feature bitmaps a name is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureKind {
    /// Type 0.
    Incompatible,
    /// Type 1.
    Compatible,
    /// Type 2.
    Autoclear,
}

/// The feature bits that the specification defines, and their names.
pub const KNOWN_FEATURES: [(FeatureKind, u8, &str); 8] = [
    (FeatureKind::Incompatible, 0, "dirty bit"),
    (FeatureKind::Incompatible, 1, "corrupt bit"),
    (FeatureKind::Incompatible, 2, "external data file"),
    (FeatureKind::Incompatible, 3, "compression type"),
    (FeatureKind::Incompatible, 4, "extended L2 entries"),
    (FeatureKind::Compatible, 0, "lazy refcounts"),
    (FeatureKind::Autoclear, 0, "bitmaps"),
    (FeatureKind::Autoclear, 1, "raw external data"),
];

impl FeatureKind {
    /// The number in the feature name table.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }
}

/// An entry of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// Which bitmap: see [`FeatureKind::number`]; other values are kept.
    pub kind: u8,
    /// Bit number.
    pub bit: u8,
    /// The name as stored, without the zeros at its end; at most 46 bytes.
    pub name: Vec<u8>,
}

/// The name for people: invalid UTF-8 and control characters replaced.
impl fmt::Display for FeatureName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
        f.write_str(&String::from_utf8_lossy(&self.name).chars().map(shown).collect::<String>())
    }
}

/// Where the bitmap directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps, at least 1.
    pub count: u32,
    /// Where the directory starts.
    pub directory: HostOffset,
    /// Size of the directory in bytes.
    pub directory_bytes: u64,
}

/// Where the encryption header is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoHeader {
    /// Where it starts; cluster-aligned.
    pub offset: HostOffset,
    /// Its length in bytes; the clusters that it occupies are this rounded up.
    pub len_bytes: u64,
}

/// An extension that is kept as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownExtension {
    /// The type.
    pub kind: u32,
    /// The data, without padding.
    pub data: Vec<u8>,
}

/// All extensions of a header.
#[derive(Debug, Default)]
pub(crate) struct Extensions {
    pub(crate) backing_format: Option<String>,
    pub(crate) data_file: Option<Vec<u8>>,
    pub(crate) feature_names: Vec<FeatureName>,
    pub(crate) bitmaps: Option<BitmapsExtension>,
    pub(crate) crypto_header: Option<CryptoHeader>,
    pub(crate) unknown: Vec<UnknownExtension>,
    pub(crate) places: Places,
}

/// File offsets of the data of the extensions that point elsewhere, for messages.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Places {
    pub(crate) bitmaps: u64,
    pub(crate) crypto_header: u64,
}

/// Decodes the extension area, whose first byte is byte `area_offset` of the file.
///
/// Specification, "Header extensions": each record is a 4-byte type, a 4-byte data length, the data,
/// and padding to a multiple of 8; type 0 ends the area (and has to fit into it, as for QEMU, whatever
/// length it claims). A type appears at most once; where it does not, QEMU opens the image all the same and the
/// last one counts, and who reads another one has another disk. An area without room for another head ends too:
/// that is how a backing file name right behind the header of a version 2 image looks.
pub(crate) fn decode(area: &[u8], area_offset: u64, bitmaps_flag: bool) -> Result<Extensions, FormatError> {
    let mut all = Extensions::default();
    let mut at = 0;
    while let Some(head) = area.get(at..).and_then(raw::read::<RawExtension>) {
        let (kind, len, offset) = (head.kind.get(), head.len.get(), area_offset + at as u64);
        let rest = &area[at + HEAD_BYTES..];
        let data = rest.get(..len as usize).ok_or(FormatError::ExtensionTooLong {
            kind,
            offset,
            len,
            available: rest.len() as u64,
        })?;
        if kind == END {
            break;
        }
        all.take(Record { kind, offset, data }, bitmaps_flag)?;
        at += HEAD_BYTES + data.len().next_multiple_of(8);
    }
    Ok(all)
}

/// One record of the extension area.
struct Record<'a> {
    kind: u32,
    /// Where its head is in the file.
    offset: u64,
    data: &'a [u8],
}

impl Extensions {
    /// Takes a record in, in the place of one of the same type if that is known.
    fn take(&mut self, record: Record<'_>, bitmaps_flag: bool) -> Result<(), FormatError> {
        let Record { kind, offset, data } = record;
        match kind {
            BACKING_FORMAT => self.backing_format = record.string()?,
            DATA_FILE if data.contains(&0) => return Err(FormatError::ExtensionText { kind, offset }),
            DATA_FILE => self.data_file = Some(data.to_vec()).filter(|name| !name.is_empty()),
            FEATURE_NAMES => self.feature_names = feature_names(data),
            CRYPTO_HEADER => {
                self.crypto_header = Some(record.crypto_header()?);
                self.places.crypto_header = offset + HEAD_BYTES as u64;
            }
            // "If the bit is unset, the extension's data must be considered inconsistent": then only
            // its shape matters, and any other shape is kept as unknown.
            BITMAPS if bitmaps_flag || data.len() == size_of::<RawBitmaps>() => {
                self.bitmaps = Some(record.bitmaps(bitmaps_flag)?);
                self.places.bitmaps = offset + HEAD_BYTES as u64;
            }
            _ => self.unknown.push(UnknownExtension { kind, data: data.to_vec() }),
        }
        Ok(())
    }
}

impl Record<'_> {
    /// Specification, "String header extensions": the length is the string's, without terminator.
    fn string(&self) -> Result<Option<String>, FormatError> {
        let error = FormatError::ExtensionText { kind: self.kind, offset: self.offset };
        match std::str::from_utf8(self.data) {
            Ok(text) if text.contains('\0') => Err(error),
            Ok(text) => Ok(Some(text.to_owned()).filter(|text| !text.is_empty())),
            Err(_) => Err(error),
        }
    }

    /// The data as a structure of fixed size.
    fn fixed<T: Copy>(&self, read: impl Fn(&[u8]) -> Option<T>) -> Result<T, FormatError> {
        let (expected, len) = (size_of::<T>() as u64, self.data.len() as u64);
        let wrong = FormatError::ExtensionLength { kind: self.kind, offset: self.offset, len, expected };
        if len != expected {
            return Err(wrong);
        }
        read(self.data).ok_or(wrong)
    }

    /// Specification, "Full disk encryption header pointer": offset and length, 8 bytes each.
    fn crypto_header(&self) -> Result<CryptoHeader, FormatError> {
        let raw: RawCryptoHeader = self.fixed(raw::read)?;
        Ok(CryptoHeader { offset: HostOffset(raw.offset.get()), len_bytes: raw.len.get() })
    }

    /// Specification, "Bitmaps extension": the number of bitmaps is at least 1, bytes 4 to 7 are 0,
    /// the directory's size is the sum of its entries. The upper limits are QEMU's. Without the
    /// autoclear bit the numbers mean nothing and are not judged.
    fn bitmaps(&self, judged: bool) -> Result<BitmapsExtension, FormatError> {
        let raw: RawBitmaps = self.fixed(raw::read)?;
        let (count, directory_bytes) = (raw.nb_bitmaps.get(), raw.directory_size.get());
        let field = |name, at| Field::new(name, self.offset + HEAD_BYTES as u64 + at);
        if judged {
            in_range(field("nb_bitmaps", 0), count.into(), 1, MAX_BITMAPS.into())?;
            let value = u64::from(raw.reserved.get());
            if value != 0 {
                return Err(FormatError::Reserved { field: field("reserved", 4), value });
            }
            let smallest = u64::from(count) * MIN_BITMAP_ENTRY_BYTES;
            let size = field("bitmap_directory_size", 8);
            in_range(size, directory_bytes, smallest, MAX_BITMAP_DIRECTORY_BYTES)?;
        }
        let directory = HostOffset(raw.directory_offset.get());
        Ok(BitmapsExtension { count, directory, directory_bytes })
    }
}

/// Specification, "Feature name table": entries of 48 bytes: bitmap, bit number, name padded with
/// zeros. A rest that is no whole entry says nothing.
fn feature_names(data: &[u8]) -> Vec<FeatureName> {
    let entry = |entry: &[u8]| {
        let end = entry[2..].iter().rposition(|byte| *byte != 0).map_or(2, |last| last + 3);
        FeatureName { kind: entry[0], bit: entry[1], name: entry[2..end].to_vec() }
    };
    data.chunks_exact(FEATURE_ENTRY_BYTES).map(entry).collect()
}

/// `value` within `min..=max`, or an error that names the field.
pub(crate) fn in_range(field: Field, value: u64, min: u64, max: u64) -> Result<(), FormatError> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(FormatError::OutOfRange { field, value, min, max })
    }
}

/// The extension area of a header, with its end mark.
pub(crate) fn encode(header: &Header) -> Result<Vec<u8>, FormatError> {
    let mut area = Vec::new();
    if let Some(format) = &header.backing_format {
        push(&mut area, BACKING_FORMAT, format.as_bytes())?;
    }
    if let Some(name) = &header.data_file {
        push(&mut area, DATA_FILE, name)?;
    }
    if let Some(crypto) = &header.crypto_header {
        let raw = RawCryptoHeader { offset: crypto.offset.0.into(), len: crypto.len_bytes.into() };
        push(&mut area, CRYPTO_HEADER, raw.as_bytes())?;
    }
    if !header.feature_names.is_empty() {
        let mut table = Vec::with_capacity(header.feature_names.len() * FEATURE_ENTRY_BYTES);
        for FeatureName { kind, bit, name } in &header.feature_names {
            let (len, max) = (name.len() as u64, FEATURE_NAME_BYTES as u64);
            if len > max {
                return Err(FormatError::StringTooLong { what: "a feature name", len, max });
            }
            table.extend_from_slice(&[*kind, *bit]);
            table.extend_from_slice(name);
            table.resize(table.len().next_multiple_of(FEATURE_ENTRY_BYTES), 0);
        }
        push(&mut area, FEATURE_NAMES, &table)?;
    }
    if let Some(bitmaps) = &header.bitmaps {
        let raw = RawBitmaps {
            nb_bitmaps: bitmaps.count.into(),
            reserved: 0.into(),
            directory_size: bitmaps.directory_bytes.into(),
            directory_offset: bitmaps.directory.0.into(),
        };
        push(&mut area, BITMAPS, raw.as_bytes())?;
    }
    for UnknownExtension { kind, data } in &header.unknown_extensions {
        push(&mut area, *kind, data)?;
    }
    push(&mut area, END, &[])?;
    Ok(area)
}

/// Appends one record with its padding.
fn push(area: &mut Vec<u8>, kind: u32, data: &[u8]) -> Result<(), FormatError> {
    let (len, max) = (data.len() as u64, u64::from(u32::MAX));
    let short = u32::try_from(len).map_err(|_| FormatError::StringTooLong {
        what: "a header extension",
        len,
        max,
    })?;
    area.extend_from_slice(RawExtension { kind: kind.into(), len: short.into() }.as_bytes());
    area.extend_from_slice(data);
    area.resize(area.len().next_multiple_of(8), 0);
    Ok(())
}

#[cfg(test)]
mod tests;
