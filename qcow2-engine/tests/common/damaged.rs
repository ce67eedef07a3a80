//! Images of QEMU's, taken apart: where their tables are, and how to put wrong things into them.

use qcow2_format::{Geometry, Header, HostOffset, refcount, snapshot, word};
use std::{path::Path, process::Command};

/// Bit 63 of L1 and L2 entries.
pub(crate) const COPIED: u64 = 1 << 63;
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Options of images that differ in all that damage may look at.
pub(crate) const SHAPES: [&str; 4] = [
    "compat=1.1,cluster_size=64k",
    "compat=1.1,cluster_size=4k,refcount_bits=64",
    "compat=1.1,cluster_size=512,refcount_bits=8",
    "compat=0.10,cluster_size=4k",
];

pub(crate) fn tool(name: &str, args: &[&str]) {
    let output = Command::new(name).args(args).output().expect("qemu-utils: cargo xtask setup");
    assert!(output.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An image as bytes, with its header.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) bytes: Vec<u8>,
    pub(crate) header: Header,
    pub(crate) geometry: Geometry,
}

impl Parts {
    pub(crate) fn of(bytes: Vec<u8>) -> Self {
        let header = Header::decode(&bytes, bytes.len() as u64).expect("a sound header");
        let geometry = header.geometry();
        Self { bytes, header, geometry }
    }

    /// An image with two L2 tables and a snapshot: data of 0x11 before it, of 0x22 after it, an
    /// allocated cluster of zeros where the version has them.
    pub(crate) fn with_snapshot(options: &str) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("image.qcow2");
        let name = path.to_str().expect("UTF-8");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, name, "1G"]);
        let sizes = Self::of(std::fs::read(&path).expect("image")).geometry;
        let (cluster, table) = (sizes.cluster_size(), sizes.l2_coverage_bytes());
        let io = |commands: &[String]| {
            let mut args = vec!["-f", "qcow2"];
            commands.iter().for_each(|command| args.extend(["-c", command]));
            tool("qemu-io", &[&args[..], &[name]].concat());
        };
        io(&[format!("write -P 0x11 0 {}", 4 * cluster), format!("write -P 0x11 {table} {cluster}")]);
        tool("qemu-img", &["snapshot", "-c", "one", name]);
        io(&[
            format!("write -P 0x22 0 {}", 2 * cluster),
            format!("write -P 0x22 {table} {cluster}"),
            format!("write -P 0x22 {} {}", 8 * cluster, 4 * cluster),
        ]);
        Self::of(std::fs::read(path).expect("image"))
    }

    /// An image of which a snapshot has every table and every cluster too; each byte of the disk is 7.
    pub(crate) fn shared(options: &str, size: u64) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("image.qcow2");
        let name = path.to_str().expect("UTF-8");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, name, &size.to_string()]);
        tool("qemu-io", &["-f", "qcow2", "-c", &format!("write -q -P 7 0 {size}"), name]);
        tool("qemu-img", &["snapshot", "-c", "one", name]);
        Self::of(std::fs::read(path).expect("image"))
    }

    /// An image with one compressed cluster of 0x5a, and then perhaps one of 0x33 that is not compressed.
    pub(crate) fn compressed(options: &str, has_neighbour: bool) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("image.qcow2");
        let name = path.to_str().expect("UTF-8");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, name, "1M"]);
        let cluster = Self::of(std::fs::read(&path).expect("image")).cluster();
        tool("qemu-io", &["-f", "qcow2", "-c", &format!("write -q -c -P 0x5a 0 {cluster}"), name]);
        if has_neighbour {
            tool("qemu-io", &["-f", "qcow2", "-c", &format!("write -q -P 0x33 {cluster} {cluster}"), name]);
        }
        Self::of(std::fs::read(path).expect("image"))
    }

    /// Has the compressed cluster at guest offset 0 claim as many sectors as its descriptor can say.
    pub(crate) fn claim_too_much(&mut self) {
        let extra_sectors =
            ((1 << (self.geometry.cluster_bits - 8)) - 1) << (62 - (self.geometry.cluster_bits - 8));
        let at = self.l2_entry(0);
        self.set(at, self.word(at) | extra_sectors);
    }

    pub(crate) fn cluster(&self) -> u64 {
        self.geometry.cluster_size()
    }

    pub(crate) fn word(&self, at: u64) -> u64 {
        word::get(&self.bytes, at as usize).expect("eight bytes")
    }

    pub(crate) fn set(&mut self, at: u64, word: u64) {
        self.bytes[at as usize..at as usize + 8].copy_from_slice(&word.to_be_bytes());
    }

    /// File offset of the L1 entry for a guest offset.
    pub(crate) fn l1_entry(&self, guest: u64) -> u64 {
        self.header.l1_table.0 + self.geometry.l1_index(guest) * 8
    }

    /// File offset of the L2 table for a guest offset.
    pub(crate) fn l2_table(&self, guest: u64) -> u64 {
        self.word(self.l1_entry(guest)) & OFFSET
    }

    /// File offset of the L2 entry for a guest offset.
    pub(crate) fn l2_entry(&self, guest: u64) -> u64 {
        self.l2_table(guest) + self.geometry.l2_index(guest) * 8
    }

    pub(crate) fn data(&self, guest: u64) -> u64 {
        self.word(self.l2_entry(guest)) & OFFSET
    }

    /// File offset of the first refcount block.
    pub(crate) fn refcount_block(&self) -> u64 {
        self.word(self.header.refcount_table.0)
    }

    /// Sets the count of the cluster at a host offset; its block exists.
    pub(crate) fn set_count(&mut self, host: u64, count: u64) {
        let cluster = self.geometry.host_cluster(HostOffset(host));
        let block = self.header.refcount_table.0 + self.geometry.refcount_table_index(cluster) * 8;
        let block = self.word(block) as usize;
        let (order, index) = (self.geometry.refcount_order, self.geometry.refcount_block_index(cluster));
        let size = self.cluster() as usize;
        refcount::set(&mut self.bytes[block..block + size], order, index as usize, count);
    }

    /// File offset of the snapshot's L1 table.
    pub(crate) fn snapshot_l1(&self) -> u64 {
        let table = &self.bytes[self.header.snapshot_table.0 as usize..];
        snapshot::decode_table(table, self.header.snapshot_count).expect("sound")[0].l1_table.0
    }

    /// Every place with live metadata, but for the header.
    pub(crate) fn metadata(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("active L1 table", self.header.l1_table.0),
            ("refcount table", self.header.refcount_table.0),
            ("refcount block", self.refcount_block()),
            ("L2 table", self.l2_table(0)),
            ("L2 table", self.l2_table(self.geometry.l2_coverage_bytes())),
            ("snapshot table", self.header.snapshot_table.0),
            ("L1 table of a snapshot", self.snapshot_l1()),
        ]
    }
}

/// What `qemu-img info` says of an image's corrupt bit.
pub(crate) fn qemu_says_corrupt(path: &Path) -> bool {
    let output = Command::new("qemu-img").args(["info", "-f", "qcow2"]).arg(path).output().expect("qemu-img");
    String::from_utf8_lossy(&output.stdout).contains("corrupt: true")
}
