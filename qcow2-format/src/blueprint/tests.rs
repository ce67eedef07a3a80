//! The plan is consistent with itself. That QEMU agrees is in `tests/blueprint_qemu.rs`.

use super::*;
use proptest::prelude::*;

/// The file as a map from cluster to bytes; clusters that are not there are zeros.
fn clusters(blueprint: &Blueprint) -> std::collections::BTreeMap<u64, Vec<u8>> {
    let bits = blueprint.header().cluster_bits;
    blueprint
        .writes()
        .map(|(offset, bytes)| {
            assert_eq!((offset % (1 << bits), bytes.len()), (0, 1 << bits));
            (offset >> bits, bytes)
        })
        .collect()
}

fn options() -> impl Strategy<Value = CreateOptions> {
    (9u32..=21, 0u32..=6, 0u64..1 << 36, any::<bool>()).prop_map(|(cluster_bits, order, size, v3)| {
        CreateOptions {
            virtual_size: size,
            cluster_bits,
            version: if v3 { Version::V3 } else { Version::V2 },
            refcount_order: if v3 { order } else { 4 },
            ..CreateOptions::default()
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_cluster_is_counted_once(options in options()) {
        let blueprint = Blueprint::new(&options).unwrap();
        let (header, file) = (blueprint.header(), clusters(&blueprint));
        let g = header.geometry();
        let total = blueprint.file_len() >> g.cluster_bits;
        let table_at = header.refcount_table.0 >> g.cluster_bits;
        let mut counted = 0;
        for index in 0..u64::from(header.refcount_table_clusters) {
            for entry in file[&(table_at + index)].chunks_exact(8) {
                let raw = u64::from_be_bytes(entry.try_into().unwrap());
                let Some(block) = RefcountTableEntry::decode(raw, &g).unwrap() else { continue };
                let block = &file[&(block.0 >> g.cluster_bits)];
                for at in 0..g.refcounts_per_block() {
                    let expected = u64::from(counted < total);
                    prop_assert_eq!(refcount::get(block, g.refcount_order, at as usize), expected);
                    counted += 1;
                }
            }
        }
        prop_assert!(counted >= total);
        let (zeros, len) = blueprint.zero_range();
        prop_assert_eq!(zeros + len, blueprint.file_len());
        prop_assert!(len >= u64::from(header.l1_entries) * 8);
        let decoded = Header::decode(&file[&0], blueprint.file_len());
        prop_assert_eq!(decoded.as_ref(), Ok(header));
    }
}

#[test]
fn the_limits_of_the_cluster_size_hold() {
    let new = |cluster_bits, virtual_size| {
        Blueprint::new(&CreateOptions { cluster_bits, virtual_size, ..CreateOptions::default() })
    };
    // 4 Mi tables of 64 entries of 512 bytes: 128 GiB.
    assert!(new(9, 128 << 30).is_ok());
    let field = Field::new("l1_size", 36);
    let too_large = FormatError::L1TooLarge { field, entries: (4 << 20) + 1, max: 4 << 20 };
    assert_eq!(new(9, (128 << 30) + 1).unwrap_err(), too_large);
    assert!(matches!(new(16, u64::MAX), Err(FormatError::VirtualSize { .. })));
    assert!(matches!(new(8, 0), Err(FormatError::ClusterBits { value: 8, .. })));
    assert!(matches!(new(22, 0), Err(FormatError::ClusterBits { value: 22, .. })));
}

#[test]
fn odd_sizes_are_rounded_up_to_sectors() {
    let options = CreateOptions { virtual_size: 1_000_001, ..CreateOptions::default() };
    assert_eq!(Blueprint::new(&options).unwrap().header().virtual_size, 1954 * 512);
}

#[test]
fn version_2_takes_no_version_3_options() {
    let v2 = CreateOptions { version: Version::V2, ..CreateOptions::default() };
    let error = |options| Blueprint::new(&options).unwrap_err();
    let needs = |option| FormatError::NeedsVersion3 { option };
    assert_eq!(error(CreateOptions { lazy_refcounts: true, ..v2.clone() }), needs("lazy refcounts"));
    let zstd = CreateOptions { compression: Compression::Zstd, ..v2.clone() };
    assert_eq!(error(zstd), needs("zstd compression"));
    let narrow = CreateOptions { refcount_order: 0, ..v2 };
    assert_eq!(error(narrow), needs("a refcount width other than 16 bits"));
}

#[test]
fn names_that_no_reader_would_accept_are_refused() {
    let with = |name: &[u8], format: &str| {
        let backing = Some(Backing { name: name.to_vec(), format: format.into() });
        Blueprint::new(&CreateOptions { backing, cluster_bits: 9, ..CreateOptions::default() })
    };
    assert!(with(b"base.qcow2", "qcow2").is_ok());
    assert_eq!(with(b"", "raw").unwrap_err(), FormatError::BackingNameEmpty);
    assert!(matches!(with(b"a\0b", "raw"), Err(FormatError::BackingNameNul { .. })));
    assert!(matches!(with(b"base", "r\0w"), Err(FormatError::ExtensionText { .. })));
    assert!(matches!(with(&[b'x'; 1024], "raw"), Err(FormatError::BackingNameLength { .. })));
}

#[test]
fn a_long_name_costs_the_feature_name_table_not_the_image() {
    let new = |name_len| {
        let backing = Some(Backing { name: vec![b'x'; name_len], format: "raw".into() });
        Blueprint::new(&CreateOptions { backing, cluster_bits: 9, ..CreateOptions::default() })
    };
    // 512 - header 112 - format 16 - end mark 8
    assert!(new(376).unwrap().header().feature_names.is_empty());
    assert!(matches!(new(377), Err(FormatError::HeaderTooLarge { needed: 513, .. })));
}
