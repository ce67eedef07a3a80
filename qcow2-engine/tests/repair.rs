//! What a repair must not do.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{IMAGE, run};
use qcow2_engine::{CheckOptions, Repair, check, io::mem::MemFiles};
use qcow2_format::{Geometry, Header, L1Entry, Mapping, RefcountTableEntry, l1, l2, refcount};
use std::{path::Path, process::Command};

/// An image of two clusters that a snapshot shares.
fn shared() -> Vec<u8> {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join(IMAGE);
    let path = path.to_str().expect("UTF-8");
    let steps: [&[&str]; 3] = [
        &["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "1M"],
        &["qemu-io", "-f", "qcow2", "-c", "write -q 0 8k", path],
        &["qemu-img", "snapshot", "-c", "first", path],
    ];
    for step in steps {
        let done = Command::new(step[0]).args(&step[1..]).status();
        assert!(done.expect("qemu-utils are installed: cargo xtask setup").success(), "{step:?}");
    }
    std::fs::read(path).expect("the image")
}

/// The parts of such an image that are damaged here.
struct Anatomy {
    geometry: Geometry,
    header: Header,
}

impl Anatomy {
    fn of(bytes: &[u8]) -> Self {
        let header = Header::decode(bytes, bytes.len() as u64).expect("a sound header");
        Self { geometry: header.geometry(), header }
    }

    /// Sets the count of a cluster.
    fn set_count(&self, bytes: &mut [u8], cluster: u64, count: u64) {
        let raw = entry(bytes, self.header.refcount_table.0);
        let block = RefcountTableEntry::decode(raw, &self.geometry).expect("sound").expect("a block").0;
        let block = &mut bytes[block as usize..][..self.geometry.cluster_size() as usize];
        refcount::set(block, self.geometry.refcount_order, cluster as usize, count);
    }

    /// The first entries of the active L1 table and of the L2 table that it names, with the clusters that
    /// they name.
    fn entries(&self, bytes: &[u8]) -> [(u64, u64); 2] {
        let raw = entry(bytes, self.header.l1_table.0);
        let Ok(L1Entry::Table { offset: table, .. }) = L1Entry::decode(raw, &self.geometry) else {
            panic!("no L2 table: {raw:#x}")
        };
        let data = entry(bytes, table.0);
        let Ok(Mapping::Data { host, .. }) = Mapping::decode(data, &self.geometry) else {
            panic!("no data: {data:#x}")
        };
        let bits = self.geometry.cluster_bits;
        [(raw, table.0 >> bits), (data, host.0 >> bits)]
    }
}

fn entry(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().expect("8 bytes"))
}

/// A snapshot's L1 entry is damaged, and with it the references are out of sight that it holds to the L2
/// table and its clusters; their counts are one too low besides. A repair that then believed the counts
/// would flag them as the active mapping's own, and the next write would go over the snapshot's data.
#[test]
fn what_damage_may_still_refer_to_is_not_said_to_have_one_owner() {
    let mut bytes = shared();
    let anatomy = Anatomy::of(&bytes);
    for (raw, cluster) in anatomy.entries(&bytes) {
        assert_eq!(raw & l2::COPIED, 0, "the snapshot shares it");
        anatomy.set_count(&mut bytes, cluster, 1);
    }
    let snapshots = &bytes[anatomy.header.snapshot_table.0 as usize..];
    let snapshots = qcow2_format::snapshot::decode_table(snapshots, 1).expect("a snapshot");
    // Not aligned to a cluster: it names nothing, and what it should name cannot be told.
    let at = snapshots[0].l1_table.0 as usize;
    let damaged = entry(&bytes, at as u64) | 0x200;
    bytes[at..at + 8].copy_from_slice(&damaged.to_be_bytes());

    let files = MemFiles::default();
    files.put(IMAGE, bytes);
    let options = CheckOptions { repair: Repair::All, ..CheckOptions::default() };
    let report = run(check(&files, &files, Path::new(IMAGE), options)).expect("checks");
    assert!(report.remaining.corruptions > 0, "the entry cannot be repaired");
    let [(table, _), (data, _)] = anatomy.entries(&files.get(IMAGE).expect("kept"));
    assert_eq!((table & l1::COPIED, data & l2::COPIED), (0, 0), "flagged, and the snapshot has them, too");
}
