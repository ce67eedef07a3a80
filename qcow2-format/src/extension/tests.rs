//! Extension areas, well-formed and not.

use super::*;

fn area(records: &[(u32, &[u8])]) -> Vec<u8> {
    let mut area = Vec::new();
    for (kind, data) in records {
        push(&mut area, *kind, data).unwrap();
    }
    area
}

fn decode_error(records: &[(u32, &[u8])]) -> FormatError {
    decode(&area(records), 112, true).unwrap_err()
}

#[test]
fn records_behind_the_end_mark_do_not_count() {
    let bytes = area(&[(BACKING_FORMAT, b"raw"), (END, b""), (BACKING_FORMAT, b"qcow2")]);
    assert_eq!(decode(&bytes, 112, false).unwrap().backing_format.as_deref(), Some("raw"));
}

/// An end mark that claims more data than there is was taken; QEMU does not open such an image, and `check`
/// found nothing wrong with it.
#[test]
fn an_end_mark_fits_into_the_area() {
    let mut bytes = area(&[(END, &[7; 8])]);
    assert!(decode(&bytes, 112, false).is_ok());
    bytes[4..8].copy_from_slice(&9_u32.to_be_bytes());
    let long = FormatError::ExtensionTooLong { kind: END, offset: 112, len: 9, available: 8 };
    assert_eq!(decode(&bytes, 112, false).unwrap_err(), long);
}

#[test]
fn an_area_may_end_without_mark_or_padding() {
    let bytes = area(&[(0x1234, b"abc"), (BACKING_FORMAT, b"raw")]);
    for cut in [0, 1, 5] {
        let all = decode(&bytes[..bytes.len() - cut], 112, false).unwrap();
        assert_eq!(all.backing_format.as_deref(), Some("raw"));
        assert_eq!(all.unknown, [UnknownExtension { kind: 0x1234, data: b"abc".to_vec() }]);
    }
    let long = FormatError::ExtensionTooLong { kind: BACKING_FORMAT, offset: 128, len: 3, available: 2 };
    assert_eq!(decode(&bytes[..bytes.len() - 6], 112, false).unwrap_err(), long);
}

#[test]
fn a_length_near_the_end_of_the_number_range_is_too_long() {
    let mut bytes = area(&[(0x1234, b"")]);
    bytes[4..8].fill(0xff);
    let long = FormatError::ExtensionTooLong { kind: 0x1234, offset: 112, len: u32::MAX, available: 0 };
    assert_eq!(decode(&bytes, 112, false).unwrap_err(), long);
}

/// Images with two extensions of a type were refused by everything, which QEMU opens.
#[test]
fn of_several_of_a_known_type_the_last_counts_and_unknown_ones_are_all_kept() {
    let all = |records| decode(&area(records), 112, true).unwrap();
    let data_file = all(&[(DATA_FILE, b"a"), (9, b"c"), (DATA_FILE, b"b")]).data_file;
    assert_eq!(data_file.as_deref(), Some(&b"b"[..]));
    let format = all(&[(BACKING_FORMAT, b"raw"), (BACKING_FORMAT, b"qcow2")]).backing_format;
    assert_eq!(format.as_deref(), Some("qcow2"));
    assert_eq!(all(&[(9, b"a"), (9, b"b")]).unknown.len(), 2);
    // Each is judged, as by QEMU.
    assert!(matches!(
        decode_error(&[(CRYPTO_HEADER, b"short"), (CRYPTO_HEADER, &[0; 16])]),
        FormatError::ExtensionLength { .. }
    ));
}

#[test]
fn strings_are_strings() {
    for data in [&b"\xff\xfe"[..], b"raw\0"] {
        let text = FormatError::ExtensionText { kind: BACKING_FORMAT, offset: 112 };
        assert_eq!(decode_error(&[(BACKING_FORMAT, data)]), text);
    }
    let text = FormatError::ExtensionText { kind: DATA_FILE, offset: 112 };
    assert_eq!(decode_error(&[(DATA_FILE, b"/etc/passwd\0")]), text);
}

#[test]
fn fixed_sizes_are_exact() {
    let kind = CRYPTO_HEADER;
    let length = FormatError::ExtensionLength { kind, offset: 112, len: 15, expected: 16 };
    assert_eq!(decode_error(&[(kind, &[0; 15])]), length);
    let kind = BITMAPS;
    let length = FormatError::ExtensionLength { kind, offset: 112, len: 25, expected: 24 };
    assert_eq!(decode_error(&[(kind, &[0; 25])]), length);
    // Without the autoclear bit it is just something that somebody left there.
    assert_eq!(decode(&area(&[(kind, &[0; 25])]), 112, false).unwrap().unknown.len(), 1);
}

#[test]
fn bitmap_numbers_are_bounded() {
    let bitmaps = |count: u32, reserved: u32, size: u64| {
        let parts = [&count.to_be_bytes()[..], &reserved.to_be_bytes(), &size.to_be_bytes(), &[0; 8]];
        decode(&area(&[(BITMAPS, &parts.concat())]), 112, true)
    };
    assert!(bitmaps(1, 0, 32).is_ok());
    let field = |name, offset| Field::new(name, offset);
    for value in [0, 65536] {
        let range = FormatError::OutOfRange { field: field("nb_bitmaps", 120), value, min: 1, max: 65535 };
        assert_eq!(bitmaps(value as u32, 0, 32).unwrap_err(), range);
    }
    let reserved = FormatError::Reserved { field: field("reserved", 124), value: 7 };
    assert_eq!(bitmaps(1, 7, 32).unwrap_err(), reserved);
    for value in [63, u64::MAX] {
        let (min, max) = (64, MAX_BITMAP_DIRECTORY_BYTES);
        let size = FormatError::OutOfRange { field: field("bitmap_directory_size", 128), value, min, max };
        assert_eq!(bitmaps(2, 0, value).unwrap_err(), size);
    }
}

#[test]
fn feature_names_may_fill_their_field() {
    let mut table = vec![0u8; 96];
    table[..5].copy_from_slice(&[0, 5, b'a', 0, b'b']);
    table[48..50].copy_from_slice(&[2, 63]);
    table[50..].fill(b'x');
    table.extend_from_slice(&[1; 20]);
    let names = feature_names(&table);
    assert_eq!(names.len(), 2);
    assert_eq!((names[0].kind, names[0].bit, &names[0].name[..]), (0, 5, &b"a\0b"[..]));
    assert_eq!((names[1].kind, names[1].bit, &names[1].name[..]), (2, 63, &[b'x'; 46][..]));
}
