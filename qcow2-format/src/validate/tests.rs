//! Header round trips, one test per limit, and bytes made to break the decoder.

use super::*;
use crate::{
    Unsupported,
    extension::{BitmapsExtension, CryptoHeader, FeatureKind, FeatureName, UnknownExtension},
};
use proptest::prelude::*;

const FILE_LEN: u64 = 1 << 40;

/// A header with tables at clusters 1 (refcounts) and 64 (L1).
fn sample(version: Version, cluster_bits: u32) -> Header {
    let v3 = version == Version::V3;
    let mut header = Header {
        version,
        cluster_bits,
        virtual_size: 1 << 24,
        crypt: CryptMethod::None,
        l1_entries: 0,
        l1_table: HostOffset(64 << cluster_bits),
        refcount_table: HostOffset(1 << cluster_bits),
        refcount_table_clusters: 1,
        snapshot_count: 0,
        snapshot_table: HostOffset(0),
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        refcount_order: 4,
        header_length: if v3 { V3_HEADER_BYTES } else { V2_HEADER_BYTES },
        compression: Compression::Zlib,
        unknown_fields: if v3 { vec![0; 7] } else { Vec::new() },
        backing_file: None,
        backing_format: None,
        data_file: None,
        feature_names: Vec::new(),
        bitmaps: None,
        crypto_header: None,
        unknown_extensions: Vec::new(),
    };
    header.l1_entries = header.geometry().l1_entries() as u32;
    header
}

/// The sample's bytes with some of them replaced.
fn patched(header: &Header, patches: &[(u64, &[u8])]) -> Result<Header, FormatError> {
    let mut bytes = header.encode().unwrap();
    for (at, patch) in patches {
        bytes[*at as usize..][..patch.len()].copy_from_slice(patch);
    }
    Header::decode(&bytes, FILE_LEN)
}

fn v3() -> Header {
    sample(Version::V3, 16)
}

fn any_header() -> impl Strategy<Value = Header> {
    let name = prop::collection::vec(1u8.., 1..64);
    let unknown = (1u32..1000, prop::collection::vec(any::<u8>(), 0..40));
    let unknown = unknown.prop_map(|(kind, data)| UnknownExtension { kind, data });
    let feature = (0u8..3, 0u8..64, "[a-z ]{1,45}z");
    let feature = feature.prop_map(|(kind, bit, name)| FeatureName {
        kind,
        bit,
        name: name.trim().as_bytes().to_vec(),
    });
    let numbers = (any::<bool>(), 12u32..=21, 0u64..1 << 33, 0u32..=6, any::<u64>(), any::<u64>());
    let tables = (1u32..4, 0u32..4, any::<bool>(), any::<bool>(), prop::collection::vec(any::<u8>(), 7..48));
    let names = (
        prop::option::of(name.clone()),
        prop::option::of("[a-z0-9]{1,9}"),
        prop::option::of(name),
        prop::collection::vec(feature, 0..9),
        prop::collection::vec(unknown, 0..4),
    );
    (numbers, tables, names).prop_map(|(numbers, tables, names)| {
        let (is_v3, cluster_bits, virtual_size, refcount_order, compatible, autoclear) = numbers;
        let (refcount_table_clusters, snapshot_count, zstd, luks, unknown_fields) = tables;
        let mut header = sample(if is_v3 { Version::V3 } else { Version::V2 }, cluster_bits);
        (header.virtual_size, header.refcount_table_clusters) = (virtual_size, refcount_table_clusters);
        header.l1_entries = header.geometry().l1_entries() as u32;
        header.l1_table = HostOffset(1 << 30);
        (header.snapshot_count, header.snapshot_table) = (snapshot_count, HostOffset(1 << 29));
        (header.backing_file, header.backing_format, header.data_file, ..) = names.clone();
        (header.feature_names, header.unknown_extensions) = (names.3, names.4);
        let directory = HostOffset(1 << 28);
        header.bitmaps = Some(BitmapsExtension { count: 2, directory, directory_bytes: 64 });
        if luks {
            header.crypt = CryptMethod::Luks;
            header.crypto_header = Some(CryptoHeader { offset: HostOffset(1 << 27), len_bytes: 5000 });
        }
        if is_v3 {
            (header.refcount_order, header.compatible) = (refcount_order, compatible);
            header.autoclear = autoclear;
            header.unknown_fields = unknown_fields;
            header.unknown_fields.resize((header.unknown_fields.len() + 1).next_multiple_of(8) - 1, 0);
            header.header_length = 105 + header.unknown_fields.len() as u32;
            if zstd {
                (header.compression, header.incompatible) = (Compression::Zstd, COMPRESSION);
            }
        }
        header
    })
}

proptest! {
    #[test]
    fn headers_survive_the_round_trip(header in any_header()) {
        let bytes = header.encode().unwrap();
        prop_assert_eq!(bytes.len(), 1 << header.cluster_bits);
        prop_assert_eq!(Header::decode_prefix(&bytes[..24], FILE_LEN), Ok(bytes.len()));
        prop_assert_eq!(Header::decode(&bytes, FILE_LEN), Ok(header));
    }

    /// Damage never panics, and what still decodes can be written again without loss.
    #[test]
    fn damaged_headers_do_not_panic(
        header in any_header(),
        damage in prop::collection::vec((0usize..600, any::<u8>()), 1..6),
        file_len in prop_oneof![Just(FILE_LEN), any::<u64>(), 0u64..1 << 20],
        cut in 0usize..5000,
    ) {
        let mut bytes = header.encode().unwrap();
        for (at, byte) in damage {
            bytes[at] = byte;
        }
        let _ = Header::decode(&bytes[..cut.min(bytes.len())], file_len);
        if let Ok(decoded) = Header::decode(&bytes, file_len) {
            let _ = decoded.check_supported();
            if let Ok(again) = decoded.encode() {
                prop_assert_eq!(Header::decode(&again, file_len), Ok(decoded));
            }
        }
    }

    #[test]
    fn noise_does_not_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..2048), v3: bool, bits in 9u8..=11) {
        let fixed = [(0, b'Q'), (1, b'F'), (2, b'I'), (3, 0xfb), (4, 0), (5, 0), (6, 0), (7, 2 + u8::from(v3)),
            (20, 0), (21, 0), (22, 0), (23, bits)];
        for (at, byte) in fixed {
            if let Some(target) = bytes.get_mut(at) {
                *target = byte;
            }
        }
        let _ = Header::decode(&bytes, bytes.len() as u64);
        let _ = Header::decode(&bytes, u64::MAX);
    }
}

#[test]
fn files_that_are_no_images_say_so() {
    let bytes = [b'x'; 512];
    assert_eq!(Header::decode(&bytes, 512), Err(FormatError::Magic { found: *b"xxxx" }));
    assert_eq!(Header::decode(b"text", 4), Err(FormatError::Magic { found: *b"text" }));
    let (what, needed) = ("the header", 72);
    for len in [0, 3, 4, 7, 8, 23] {
        let short = FormatError::Truncated { what, needed, available: len as u64 };
        assert_eq!(Header::decode(&v3().encode().unwrap()[..len], len as u64), Err(short));
    }
    let head = &v3().encode().unwrap()[..80];
    let short = FormatError::Truncated { what, needed: 104, available: 80 };
    assert_eq!(Header::decode(head, 80), Err(short));
    assert_eq!(patched(&v3(), &[(4, &[0, 0, 0, 4])]), Err(FormatError::Version { version: 4 }));
}

#[test]
fn fewer_bytes_than_the_first_cluster_are_refused() {
    let bytes = v3().encode().unwrap();
    let short = FormatError::Truncated { what: "the header", needed: 65536, available: 4096 };
    assert_eq!(Header::decode(&bytes[..4096], FILE_LEN), Err(short));
}

#[test]
fn cluster_sizes_are_bounded() {
    for value in [0, 8, 22, 63, 64, u32::MAX] {
        let bits = FormatError::ClusterBits { value, min: 9, max: 21 };
        assert_eq!(patched(&v3(), &[(20, &value.to_be_bytes())]), Err(bits));
    }
    let small = sample(Version::V3, 13);
    let bits = FormatError::ClusterBits { value: 13, min: 14, max: 21 };
    assert_eq!(patched(&small, &[(INCOMPATIBLE_OFFSET, &EXTENDED_L2.to_be_bytes())]), Err(bits));
}

#[test]
fn scalar_fields_are_bounded() {
    let word = |at: u64, value: u32| patched(&v3(), &[(at, &value.to_be_bytes())]).unwrap_err();
    assert_eq!(word(32, 3), FormatError::CryptMethod { value: 3 });
    assert_eq!(word(96, 7), FormatError::RefcountOrder { value: 7 });
    for value in [0, 96, 103, 108, 65544, u32::MAX] {
        assert_eq!(word(100, value), FormatError::HeaderLength { value, max: 65536 });
    }
    let table: (u64, &[u8]) = (64, &(1u64 << 20).to_be_bytes());
    let many = patched(&v3(), &[table, (60, &65537u32.to_be_bytes())]).unwrap_err();
    assert_eq!(many, FormatError::SnapshotCount { count: 65537, max: 65536 });
    assert_eq!(word(56, 0), FormatError::RefcountTableMissing);
    assert_eq!(word(56, 129), FormatError::RefcountTableTooLarge { clusters: 129, max: 128 });
    let field = Field::new("l1_size", 36);
    assert_eq!(
        word(36, (4 << 20) + 1),
        FormatError::L1TooLarge { field, entries: (4 << 20) + 1, max: 4 << 20 }
    );
    assert_eq!(word(36, 0), FormatError::L1TooSmall { entries: 0, needed: 1 });
}

/// A refcount table can be made anew, and snapshots beyond the limit be dropped; the rest stands as it is.
#[test]
fn what_can_be_repaired_does_not_hide_the_rest() {
    let repairable = |patches: &[(u64, &[u8])]| {
        let mut bytes = v3().encode().unwrap();
        patches.iter().for_each(|(at, patch)| bytes[*at as usize..][..patch.len()].copy_from_slice(patch));
        let (header, defects) = Header::decode_repairable(&bytes, FILE_LEN).unwrap();
        assert_eq!(Header::decode(&bytes, FILE_LEN).is_ok(), defects == Defects::default());
        (header, defects)
    };
    assert_eq!(repairable(&[]), (v3(), Defects::default()));
    let table = |at: u64, patch: &[u8]| {
        let (header, defects) = repairable(&[(at, patch)]);
        assert_eq!((header.refcount_table, header.refcount_table_clusters), (HostOffset(0), 0));
        assert_eq!(header, Header { refcount_table: HostOffset(0), refcount_table_clusters: 0, ..v3() });
        defects.refcount_table.unwrap()
    };
    assert_eq!(table(56, &[0; 4]), FormatError::RefcountTableMissing);
    assert!(matches!(table(56, &[0xff; 4]), FormatError::RefcountTableTooLarge { .. }));
    assert!(matches!(table(48, &[0; 8]), FormatError::TableInHeader { .. }));
    assert!(matches!(table(48, &[0xff; 8]), FormatError::TableMisaligned { .. }));
    assert!(matches!(table(48, &FILE_LEN.to_be_bytes()), FormatError::TableBeyondFile { .. }));
    assert!(matches!(table(48, &v3().l1_table.0.to_be_bytes()), FormatError::TablesOverlap { .. }));
    let (header, defects) = repairable(&[(60, &65537u32.to_be_bytes()), (64, &(1u64 << 20).to_be_bytes())]);
    assert_eq!(header.snapshot_count, 65537);
    assert_eq!(defects.snapshot_count, Some(FormatError::SnapshotCount { count: 65537, max: 65536 }));
    let snapshots = |at: u64| {
        let (header, defects) = repairable(&[(60, &2u32.to_be_bytes()), (64, &at.to_be_bytes())]);
        assert_eq!((header.snapshot_count, header.snapshot_table), (2, HostOffset(at)));
        defects.snapshot_table.unwrap()
    };
    assert!(matches!(snapshots(0), FormatError::TableInHeader { .. }));
    assert!(matches!(snapshots(FILE_LEN), FormatError::TableBeyondFile { .. }));
    assert!(matches!(snapshots(1 << 56), FormatError::TableBeyondFile { .. }));
    assert!(matches!(snapshots(v3().l1_table.0), FormatError::TablesOverlap { .. }));
}

#[test]
fn virtual_sizes_near_the_ends_of_the_number_range_are_refused() {
    let size = |value: u64| patched(&v3(), &[(SIZE_OFFSET, &value.to_be_bytes())]).unwrap_err();
    for value in [u64::MAX, 1 << 63] {
        assert_eq!(size(value), FormatError::VirtualSize { value, max: i64::MAX as u64 });
    }
    assert!(matches!(size(i64::MAX as u64), FormatError::L1TooSmall { entries: 1, .. }));
}

#[test]
fn compression_type_and_bit_go_together() {
    let bit = COMPRESSION.to_be_bytes();
    let decode = |patches: &[(u64, &[u8])]| patched(&v3(), patches).map(|header| header.compression);
    let (flag, at) = (INCOMPATIBLE_OFFSET, COMPRESSION_TYPE_OFFSET);
    assert_eq!(decode(&[(flag, &bit), (at, &[1])]), Ok(Compression::Zstd));
    assert_eq!(decode(&[(flag, &bit)]), Err(FormatError::CompressionTypeMissing));
    assert_eq!(decode(&[(flag, &bit), (at, &[2])]), Err(FormatError::CompressionType { value: 2 }));
    assert_eq!(decode(&[(at, &[1])]), Err(FormatError::CompressionTypeUnflagged { value: 1 }));
}

#[test]
fn tables_lie_at_cluster_boundaries_inside_the_file() {
    let table = |at: u64, value: u64| patched(&v3(), &[(at, &value.to_be_bytes())]).unwrap_err();
    for (field, len_bytes) in [(L1_TABLE, 8), (REFCOUNT_TABLE, 65536)] {
        let at = field.offset;
        let (value, cluster_size) = (0x1_0200, 65536);
        assert_eq!(table(at, value), FormatError::TableMisaligned { field, value, cluster_size });
        assert_eq!(table(at, 0), FormatError::TableInHeader { field, value: 0 });
        for value in [FILE_LEN, i64::MAX as u64 & !0xffff, !0xffff] {
            let beyond = FormatError::TableBeyondFile { field, value, len_bytes, file_len: FILE_LEN };
            assert_eq!(table(at, value), beyond);
        }
    }
    let overlap = FormatError::TablesOverlap { first: L1_TABLE, second: REFCOUNT_TABLE };
    assert_eq!(table(L1_TABLE_OFFSET, 0x1_0000), overlap);
    let snapshots = [(60, &1u32.to_be_bytes()[..]), (64, &0x8100u64.to_be_bytes()[..])];
    let misaligned =
        FormatError::TableMisaligned { field: SNAPSHOT_TABLE, value: 0x8100, cluster_size: 65536 };
    assert_eq!(patched(&v3(), &snapshots), Err(misaligned));
}

/// An image without snapshots whose table was said to be at no cluster boundary was served, and `check`
/// found nothing wrong; QEMU does not open it.
#[test]
fn tables_without_entries_are_at_a_cluster_boundary() {
    let at = |value: u64| patched(&v3(), &[(SNAPSHOT_TABLE_OFFSET, &value.to_be_bytes())]);
    let header = at(FILE_LEN << 10).unwrap();
    assert_eq!((header.snapshot_count, header.snapshot_table), (0, HostOffset(FILE_LEN << 10)));
    let (field, cluster_size) = (SNAPSHOT_TABLE, 65536);
    for value in [3, 0x1_0200, 0x1234_5678_90ab_cdef] {
        assert_eq!(at(value), Err(FormatError::TableMisaligned { field, value, cluster_size }));
    }
    let value = 1 << 63;
    let beyond = FormatError::TableBeyondFile { field, value, len_bytes: 0, file_len: FILE_LEN };
    assert_eq!(at(value), Err(beyond));
}

#[test]
fn the_l1_table_may_end_with_the_file() {
    // qemu-img create ends the file after the last L1 entry, not after the cluster.
    let bytes = v3().encode().unwrap();
    assert!(Header::decode(&bytes, (64 << 16) + 8).is_ok());
    assert!(matches!(Header::decode(&bytes, (64 << 16) + 7), Err(FormatError::TableBeyondFile { .. })));
}

/// `info` said nothing of such an image; QEMU describes it.
#[test]
fn a_header_whose_l1_table_is_nowhere_can_be_described() {
    let bytes = v3().encode().unwrap();
    let (header, defects) = Header::decode_repairable(&bytes, (64 << 16) + 7).unwrap();
    assert_eq!(header, v3());
    assert!(matches!(defects.l1_table, Some(FormatError::TableBeyondFile { .. })));
    // Beyond any file is another matter, for QEMU too.
    let mut bytes = bytes;
    bytes[L1_TABLE_OFFSET as usize..][..8].copy_from_slice(&(1_u64 << 63).to_be_bytes());
    assert!(Header::decode_repairable(&bytes, FILE_LEN).is_err());
}

#[test]
fn backing_names_stay_in_the_first_cluster() {
    let header = Header { backing_file: Some(b"base.raw".to_vec()), ..v3() };
    let bytes = header.encode().unwrap();
    let at = u64::from_be_bytes(*bytes[8..].first_chunk().unwrap());
    assert_eq!(&bytes[at as usize..][..8], b"base.raw");

    let offset = |value: u64| patched(&header, &[(8, &value.to_be_bytes())]).unwrap_err();
    for value in [1, 104, 65537, u64::MAX] {
        assert_eq!(offset(value), FormatError::BackingNameOffset { value, min: 112, max: 65536 });
    }
    assert_eq!(offset(65533), FormatError::BackingNameLength { len: 8, max: 3 });
    let len = |value: u32| patched(&header, &[(16, &value.to_be_bytes())]);
    assert_eq!(len(1024), Err(FormatError::BackingNameLength { len: 1024, max: 1023 }));
    assert_eq!(len(9), Err(FormatError::BackingNameNul { offset: at }));
    assert_eq!(len(0).unwrap().backing_file, None);
}

#[test]
fn a_name_right_behind_a_version_2_header_is_no_extension() {
    let mut bytes = sample(Version::V2, 16).encode().unwrap();
    bytes[8..16].copy_from_slice(&72u64.to_be_bytes());
    bytes[16..20].copy_from_slice(&10u32.to_be_bytes());
    bytes[72..82].copy_from_slice(b"base.qcow2");
    let header = Header::decode(&bytes, FILE_LEN).unwrap();
    assert_eq!(header.backing_file.as_deref(), Some(&b"base.qcow2"[..]));
    assert!(header.unknown_extensions.is_empty());
}

#[test]
fn version_2_has_no_feature_fields() {
    let header = sample(Version::V2, 16);
    let mut bytes = header.encode().unwrap();
    // Offset 72 is where extensions start: an unknown one that would be feature bits in version 3.
    bytes[72..80].copy_from_slice(&[0, 0, 0, 0xff, 0, 0, 0, 8]);
    bytes[80..88].fill(0xff);
    let header = Header::decode(&bytes, FILE_LEN).unwrap();
    assert_eq!((header.incompatible, header.compatible, header.autoclear), (0, 0, 0));
    assert_eq!((header.refcount_order, header.header_length), (4, 72));
    assert_eq!(header.unknown_extensions, [UnknownExtension { kind: 0xff, data: vec![0xff; 8] }]);
}

#[test]
fn version_2_cannot_express_everything() {
    let needs = |header: Header| match header.encode() {
        Err(FormatError::NeedsVersion3 { option }) => option,
        other => panic!("{other:?}"),
    };
    let v2 = || sample(Version::V2, 16);
    assert_eq!(needs(Header { refcount_order: 3, ..v2() }), "a refcount width other than 16 bits");
    assert_eq!(needs(Header { compression: Compression::Zstd, ..v2() }), "zstd compression");
    assert_eq!(needs(Header { compatible: LAZY_REFCOUNTS, ..v2() }), "lazy refcounts");
    assert_eq!(needs(Header { autoclear: crate::header::BITMAPS, ..v2() }), "a feature bit");
}

#[test]
fn too_much_for_one_cluster_is_refused() {
    let header = Header { backing_file: Some(vec![b'x'; 500]), ..sample(Version::V3, 9) };
    assert_eq!(
        header.encode(),
        Err(FormatError::HeaderTooLarge { needed: 112 + 8 + 500, cluster_size: 512 })
    );
    let header = Header { backing_file: Some(vec![b'x'; 1024]), ..v3() };
    assert_eq!(header.encode(), Err(FormatError::BackingNameLength { len: 1024, max: 1023 }));
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    let with = |incompatible| Header { incompatible, ..v3() }.check_supported();
    assert_eq!(with(0), Ok(()));
    assert_eq!(with(COMPRESSION), Ok(()));
    assert_eq!(with(DIRTY), Ok(()), "it is repaired");
    assert_eq!(with(CORRUPT), Ok(()), "for reading");
    assert_eq!(with(EXTERNAL_DATA), Err(Unsupported::ExternalDataFile));
    assert_eq!(with(EXTENDED_L2), Err(Unsupported::ExtendedL2));
    let writable = |incompatible| Header { incompatible, ..v3() }.check_writable();
    assert_eq!((writable(0), writable(CORRUPT | DIRTY)), (Ok(()), Err(Unsupported::Corrupt)));
    let encrypted = Header { crypt: CryptMethod::Luks, ..v3() };
    assert_eq!(encrypted.check_supported(), Err(Unsupported::Encryption(CryptMethod::Luks)));

    let unknown = |feature_names| Header { incompatible: 1 << 62 | 1 << 60 | CORRUPT, feature_names, ..v3() };
    let refused = |names: [&str; 2]| Err(Unsupported::IncompatibleFeatures(names.map(Into::into).to_vec()));
    assert_eq!(unknown(Vec::new()).check_supported(), refused(["bit 60", "bit 62"]));
    let kind = FeatureKind::Incompatible.number();
    let table = vec![FeatureName { kind, bit: 62, name: b"quantum\x1b[31m".to_vec() }];
    assert_eq!(unknown(table).check_supported(), refused(["bit 60", "\"quantum\u{fffd}[31m\" (bit 62)"]));
}

#[test]
fn luks_and_its_header_pointer_go_together() {
    let crypto_header = Some(CryptoHeader { offset: HostOffset(1 << 20), len_bytes: 4096 });
    let decode = |header: Header| Header::decode(&header.encode().unwrap(), FILE_LEN);
    let missing = Header { crypt: CryptMethod::Luks, ..v3() };
    assert_eq!(decode(missing), Err(FormatError::CryptoHeaderMissing));
    assert_eq!(decode(Header { crypto_header, ..v3() }), Err(FormatError::CryptoHeaderUnexpected));
    let crypto_header = Some(CryptoHeader { offset: HostOffset(100), len_bytes: 4096 });
    let misaligned = decode(Header { crypt: CryptMethod::Luks, crypto_header, ..v3() });
    let field = Field::new("offset of the encryption header", 120);
    assert_eq!(misaligned, Err(FormatError::TableMisaligned { field, value: 100, cluster_size: 65536 }));
}

#[test]
fn the_bitmap_directory_is_only_judged_when_it_is_to_be_trusted() {
    let bitmaps = Some(BitmapsExtension { count: 1, directory: HostOffset(100), directory_bytes: 64 });
    let decode = |autoclear| {
        let header = Header { bitmaps, autoclear, ..v3() };
        Header::decode(&header.encode().unwrap(), FILE_LEN)
    };
    assert!(!decode(0).unwrap().bitmaps_consistent());
    let field = Field::new("bitmap_directory_offset", 112 + 8 + 16);
    let misaligned = FormatError::TableMisaligned { field, value: 100, cluster_size: 65536 };
    assert_eq!(decode(crate::header::BITMAPS), Err(misaligned));
    let header = Header { autoclear: 0b111, ..v3() };
    assert_eq!(header.stale_autoclear(crate::header::RAW_EXTERNAL), 0b101);
}
