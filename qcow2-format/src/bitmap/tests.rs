//! Bitmap directories, well-formed and not.

use super::*;
use crate::geometry::tests::{any_geometry, geometry};
use proptest::prelude::*;
use zerocopy::IntoBytes;

const START: u64 = 0x9_0000;

fn entry(change: impl FnOnce(&mut RawBitmap), extra: &[u8], name: &[u8]) -> Vec<u8> {
    let mut fixed = RawBitmap {
        table_offset: 0xa_0000.into(),
        table_size: 1.into(),
        flags: FLAG_AUTO.into(),
        kind: 1,
        granularity_bits: 16,
        name_size: (name.len() as u16).into(),
        extra_data_size: (extra.len() as u32).into(),
    };
    change(&mut fixed);
    let mut bytes = [fixed.as_bytes(), extra, name].concat();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

fn decode(bytes: &[u8], count: u32) -> Result<Vec<Bitmap>, FormatError> {
    let (directory, directory_bytes) = (HostOffset(START), bytes.len() as u64);
    let extension = BitmapsExtension { count, directory, directory_bytes };
    decode_directory(bytes, &extension, &geometry(16))
}

#[test]
fn a_directory_decodes() {
    let bytes =
        [entry(|_| {}, b"", b"first"), entry(|raw| raw.flags = 4.into(), b"more", b"second!")].concat();
    let bitmaps = decode(&bytes, 2).unwrap();
    assert_eq!(
        (&bitmaps[0].name[..], bitmaps[0].flags, bitmaps[0].table_bytes()),
        (&b"first"[..], FLAG_AUTO, 8)
    );
    assert_eq!((&bitmaps[1].name[..], &bitmaps[1].extra[..]), (&b"second!"[..], &b"more"[..]));
}

/// QEMU does not open such an image, and it was called sound.
#[test]
fn a_table_has_as_many_entries_as_the_disk_needs() {
    let disk = Geometry { virtual_size: (64 << 30) + 1, ..geometry(16) };
    let decode = |entries: u32, flags: u32| {
        let change = |raw: &mut RawBitmap| (raw.table_size, raw.flags) = (entries.into(), flags.into());
        let bytes = entry(change, b"", b"name");
        let (directory, directory_bytes) = (HostOffset(START), bytes.len() as u64);
        decode_directory(&bytes, &BitmapsExtension { count: 1, directory, directory_bytes }, &disk)
    };
    // A cluster of bits is for 32 GiB.
    for entries in [0, 1, 2, 4, 100] {
        let error = decode(entries, FLAG_AUTO).unwrap_err();
        assert!(
            matches!(error, FormatError::OutOfRange { field, .. } if field.offset == START + 8),
            "{error:?}"
        );
        // It was not saved, and nobody reads it.
        decode(entries, FLAG_IN_USE).unwrap();
    }
    decode(3, 0).unwrap();
}

#[test]
fn each_field_is_judged() {
    let error = |change: fn(&mut RawBitmap)| decode(&entry(change, b"", b"name"), 1).unwrap_err();
    let out_of_range = |change, offset| match error(change) {
        FormatError::OutOfRange { field, .. } => assert_eq!(field.offset, START + offset),
        other => panic!("{other:?}"),
    };
    out_of_range(|raw| raw.table_size = u32::MAX.into(), 8);
    out_of_range(|raw| raw.kind = 2, 16);
    out_of_range(|raw| raw.granularity_bits = 64, 17);
    out_of_range(|raw| raw.name_size = 0.into(), 18);
    out_of_range(|raw| raw.name_size = 1024.into(), 18);
    let flags = FormatError::Reserved { field: Field::new("flags", START + 12), value: 8 };
    assert_eq!(error(|raw| raw.flags = 9.into()), flags);
    assert!(matches!(error(|raw| raw.extra_data_size = u32::MAX.into()), FormatError::Truncated { .. }));
    assert!(matches!(error(|raw| raw.table_offset = 512.into()), FormatError::TableMisaligned { .. }));
    let far: u64 = 1 << 40;
    // The others can be listed all the same.
    decode(&entry(|raw| raw.table_offset = far.into(), b"", b"name"), 1).unwrap();
    assert!(matches!(error(|raw| raw.table_offset = 0.into()), FormatError::TableInHeader { .. }));
}

#[test]
fn the_directory_ends_with_its_last_entry() {
    let bytes = entry(|_| {}, b"", b"name");
    assert!(matches!(decode(&bytes, 2), Err(FormatError::Truncated { .. })));
    let longer = [&bytes[..], &[0; 8]].concat();
    assert!(matches!(decode(&longer, 1), Err(FormatError::OutOfRange { value: 8, .. })));
    let mut padded = bytes.clone();
    *padded.last_mut().unwrap() = 1;
    assert!(matches!(decode(&padded, 1), Err(FormatError::Reserved { value: 1, .. })));
}

#[test]
fn table_entries_are_judged() {
    let (g, entry) = (geometry(16), EntryKind::BitmapTable);
    assert_eq!(BitmapTableEntry::decode(0, &g), Ok(BitmapTableEntry::Zeros));
    assert_eq!(BitmapTableEntry::decode(1, &g), Ok(BitmapTableEntry::Ones));
    assert_eq!(BitmapTableEntry::decode(0x5_0000, &g), Ok(BitmapTableEntry::Data(HostOffset(0x5_0000))));
    for raw in [0x5_0001, 2, 1 << 63, 1 << 56 | 0x5_0000] {
        assert_eq!(BitmapTableEntry::decode(raw, &g), Err(Corruption::ReservedBits { entry, raw }));
    }
    let raw = 0x5_0200;
    assert_eq!(BitmapTableEntry::decode(raw, &g), Err(Corruption::Misaligned { entry, raw }));
}

proptest! {
    #[test]
    fn noise_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), count: u32) {
        let _ = decode(&bytes, count);
    }

    #[test]
    fn what_decodes_encodes_to_the_same_bits(g in any_geometry(), raw: u64, low in 0u32..64, one in 0u64..2) {
        let raw = (raw & (u64::MAX << low)) | one;
        if let Ok(entry) = BitmapTableEntry::decode(raw, &g) {
            prop_assert_eq!(entry.encode(), raw);
        }
    }
}
