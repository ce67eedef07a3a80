//! Snapshot tables, well-formed and not.

use super::*;
use crate::geometry::tests::geometry;
use proptest::prelude::*;

fn any_snapshot() -> impl Strategy<Value = Snapshot> {
    let text = prop::collection::vec(any::<u8>(), 0..20);
    let extra = prop_oneof![
        (0..=u64::from(u32::MAX)).prop_map(|state| (state, None, None, Vec::new())),
        any::<u64>().prop_map(|state| (state, Some(1), None, Vec::new())),
        (any::<u64>(), any::<u64>(), prop::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(size, icount, unknown)| (5, Some(size), Some(icount), unknown)),
    ];
    (any::<(u64, u32, u32, u32, u64)>(), text.clone(), text, extra).prop_map(|(numbers, id, name, extra)| {
        Snapshot {
            l1_table: HostOffset(numbers.0),
            l1_entries: numbers.1,
            id,
            name,
            date_sec: numbers.2,
            date_nsec: numbers.3,
            vm_clock_nsec: numbers.4,
            vm_state_bytes: extra.0,
            disk_size: extra.1,
            icount: extra.2,
            unknown_extra: extra.3,
        }
    })
}

fn sample() -> Snapshot {
    Snapshot {
        l1_table: HostOffset(0x5_0000),
        l1_entries: 1,
        id: b"1".to_vec(),
        name: b"before".to_vec(),
        date_sec: 1,
        date_nsec: 2,
        vm_clock_nsec: 3,
        vm_state_bytes: 0,
        disk_size: Some(1 << 20),
        icount: None,
        unknown_extra: Vec::new(),
    }
}

proptest! {
    #[test]
    fn tables_survive_the_round_trip(snapshots in prop::collection::vec(any_snapshot(), 0..6)) {
        let bytes = encode_table(&snapshots).unwrap();
        let count = snapshots.len() as u32;
        prop_assert_eq!(decode_table(&bytes, count), Ok(snapshots));
    }

    /// Reading in the steps that `table_extent` asks for ends at the table's end, each step longer.
    #[test]
    fn the_extent_is_found_from_prefixes(snapshots in prop::collection::vec(any_snapshot(), 0..6)) {
        let mut bytes = encode_table(&snapshots).unwrap();
        let (table_len, count) = (bytes.len() as u64, snapshots.len() as u32);
        bytes.extend_from_slice(&[0xee; 100]);
        let mut have = 0;
        let end = loop {
            match table_extent(&bytes[..have], count).unwrap() {
                TableExtent::Complete(end) => break end,
                TableExtent::NeedsAtLeast(needed) => {
                    prop_assert!(needed > have as u64 && needed <= table_len);
                    have = needed as usize;
                }
            }
        };
        prop_assert_eq!(end.next_multiple_of(8), table_len);
        prop_assert_eq!(decode_table(&bytes[..end as usize], count), Ok(snapshots));
    }

    #[test]
    fn noise_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), count: u32, small in 0u32..4) {
        let _ = decode_table(&bytes, count);
        let _ = decode_table(&bytes, small);
        let _ = salvage(&bytes, count, &geometry(16), u64::MAX);
        let _ = salvage(&bytes, small, &geometry(16), 100);
    }
}

#[test]
fn a_claimed_count_costs_nothing() {
    let bytes = encode_table(&[sample()]).unwrap();
    let (what, available) = ("the snapshot table", bytes.len() as u64);
    let needed = available + MIN_ENTRY_BYTES;
    let truncated = FormatError::Truncated { what, needed, available };
    assert_eq!(decode_table(&bytes, u32::MAX), Err(truncated));
}

#[test]
fn extra_data_is_bounded() {
    let mut bytes = encode_table(&[sample()]).unwrap();
    bytes[36..40].copy_from_slice(&1025u32.to_be_bytes());
    let extra = FormatError::SnapshotExtraData { index: 0, len: 1025, min: 0, max: 1024 };
    assert_eq!(decode_table(&bytes, 1), Err(extra));
    let long = Snapshot { icount: Some(0), unknown_extra: vec![0; 1001], ..sample() };
    let extra = FormatError::SnapshotExtraData { index: 0, len: 1025, min: 0, max: 1024 };
    assert_eq!(encode_table(&[long]), Err(extra));
}

#[test]
fn the_large_vm_state_size_replaces_the_old_one() {
    let mut bytes = encode_table(&[Snapshot { vm_state_bytes: 1 << 40, ..sample() }]).unwrap();
    assert_eq!(bytes[32..36], [0; 4]);
    bytes[32..36].copy_from_slice(&7u32.to_be_bytes());
    assert_eq!(decode_table(&bytes, 1).unwrap()[0].vm_state_bytes, 1 << 40);
}

#[test]
fn names_fit_their_length_field() {
    let long = Snapshot { name: vec![b'x'; 65536], ..sample() };
    let error = FormatError::StringTooLong { what: "a snapshot name", len: 65536, max: 65535 };
    assert_eq!(encode_table(&[long]), Err(error));
}

#[test]
fn the_l1_table_is_checked_against_the_image() {
    let (g, table) = (geometry(16), HostOffset(0x4_0000));
    let check = |snapshot: Snapshot| snapshot.check(3, table, &g, 1 << 30);
    assert_eq!(check(sample()), Ok(()));
    let misplaced = |value| match check(Snapshot { l1_table: HostOffset(value), ..sample() }) {
        Err(FormatError::SnapshotL1 { index: 3, source }) => *source,
        other => panic!("{other:?}"),
    };
    assert!(matches!(misplaced(0x5_0200), FormatError::TableMisaligned { .. }));
    assert!(matches!(misplaced(0), FormatError::TableInHeader { .. }));
    assert!(matches!(misplaced(1 << 30), FormatError::TableBeyondFile { .. }));
    // (Fuzzer, case 4037 of seed 4711: qemu-img check called the image corrupt after a repair, and ours did
    // not.)
    let empty = |l1_table| check(Snapshot { l1_table: HostOffset(l1_table), l1_entries: 0, ..sample() });
    assert!(matches!(empty(1), Err(FormatError::SnapshotL1 { .. })));
    assert_eq!(empty(0), Ok(()));
    let huge = check(Snapshot { l1_entries: u32::MAX, ..sample() });
    assert!(matches!(huge, Err(FormatError::SnapshotL1 { .. })));
    let bare = FormatError::SnapshotExtraData { index: 3, len: 0, min: 16, max: 1024 };
    assert_eq!(check(Snapshot { disk_size: None, ..sample() }), Err(bare));
}

/// What `salvage` says of a table that is given in ever longer parts, as it asks for them.
fn salvaged(bytes: &[u8], count: u32) -> Result<Salvage, u64> {
    let mut have = 0;
    loop {
        match salvage(&bytes[..have], count, &geometry(16), u64::MAX) {
            Ok(table) => return Ok(table),
            Err(needed) if needed > bytes.len() as u64 => return Err(needed),
            Err(needed) => {
                assert!(needed > have as u64, "{needed} after {have}");
                have = needed as usize;
            }
        }
    }
}

#[test]
fn a_sound_table_is_salvaged_as_it_is() {
    let snapshots = vec![sample(), Snapshot { icount: Some(3), unknown_extra: vec![7; 9], ..sample() }];
    let bytes = encode_table(&snapshots).unwrap();
    let table = salvaged(&bytes, 2).unwrap();
    assert_eq!((table.len.next_multiple_of(8), &table.defects[..]), (bytes.len() as u64, &[][..]));
    assert_eq!(table.snapshots, snapshots);
    assert_eq!(salvaged(&bytes, 3), Err(bytes.len() as u64 + MIN_ENTRY_BYTES));
    assert_eq!(salvaged(&[], 0), Ok(Salvage::default()));
}

#[test]
fn what_is_beyond_the_limits_is_not_salvaged() {
    let long = Snapshot { icount: Some(3), unknown_extra: vec![7; 1000], ..sample() };
    let mut bytes = encode_table(&[long, sample()]).unwrap();
    // One byte more of extra data: taken from the ID, which takes its own from the name.
    bytes[36..40].copy_from_slice(&1025u32.to_be_bytes());
    bytes[14..16].copy_from_slice(&5u16.to_be_bytes());
    let table = salvaged(&bytes, 2).unwrap();
    assert_eq!(table.defects, [FormatError::SnapshotExtraData { index: 0, len: 1025, min: 0, max: 1024 }]);
    assert_eq!(table.snapshots[0].unknown_extra, []);
    assert_eq!((table.snapshots[0].icount, &table.snapshots[1]), (Some(3), &sample()));

    let bare = encode_table(&[Snapshot { disk_size: None, ..sample() }]).unwrap();
    let table = salvaged(&bare, 1).unwrap();
    assert_eq!(table.defects, [FormatError::SnapshotExtraData { index: 0, len: 0, min: 16, max: 1024 }]);
    assert_eq!(table.snapshots[0].disk_size, Some(geometry(16).virtual_size));

    let mut bytes = encode_table(&[sample(), sample(), sample()]).unwrap();
    let second = bytes.len() / 3;
    bytes[second + 36..][..4].copy_from_slice(&(80_u32 << 20).to_be_bytes());
    let table = salvaged(&bytes, 3).unwrap();
    let len = (80 << 20) + second as u64 + MIN_ENTRY_BYTES + 7;
    assert_eq!(table.defects, [FormatError::SnapshotTableTooLong { index: 1, len, max: MAX_TABLE_BYTES }]);
    assert_eq!((table.snapshots, table.len.next_multiple_of(8)), (vec![sample()], second as u64));

    let many = encode_table(&vec![sample(); 65_537]).unwrap();
    let table = salvage(&many, 65_537, &geometry(16), u64::MAX).unwrap();
    assert_eq!(table.defects, [FormatError::SnapshotCount { count: 65_537, max: MAX_SNAPSHOTS }]);
    assert_eq!(table.snapshots.len(), 65_536);
}

/// A file that ends before its snapshot table does: what would begin behind the end is not there.
#[test]
fn what_the_file_does_not_have_is_not_salvaged() {
    let mut bytes = encode_table(&[sample(), sample()]).unwrap();
    let second = bytes.len() as u64 / 2;
    bytes.resize(1000, 0);
    let missing =
        |needed, available| FormatError::Truncated { what: "the snapshot table", needed, available };
    for (available, kept, needed) in
        [(0, 0, MIN_ENTRY_BYTES), (second, 1, second + MIN_ENTRY_BYTES), (second + 41, 2, 2 * second)]
    {
        let table = salvage(&bytes, 2, &geometry(16), available).unwrap();
        assert_eq!((table.snapshots.len(), table.defects.len()), (kept, 1), "{available}");
        let FormatError::Truncated { needed: said, .. } = table.defects[0] else {
            panic!("{:?}", table.defects)
        };
        assert_eq!(said.next_multiple_of(8), needed, "{available}");
        assert_eq!(table.defects[0], missing(said, available));
    }
}
