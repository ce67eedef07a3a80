//! Images made by QEMU, decoded here down to the last entry.
//!
//! The strongest test of all decoders at once: walk everything that an image refers to, count the
//! references to each host cluster, and compare with the refcounts that QEMU has written. One bit
//! read wrongly in an L1, L2, compressed, snapshot, bitmap or refcount entry breaks the sum.

#![allow(clippy::unwrap_used, reason = "helpers of tests, where a panic is the verdict")]

mod common;

use common::{info, run, try_run};
use qcow2_format::{
    Clusters, Compression, CryptMethod, ExtendedEntry, Geometry, Header, HostOffset, L1Entry, Mapping,
    RefcountTableEntry, Unsupported, Version,
    bitmap::{self, BitmapTableEntry},
    header, refcount,
    snapshot::{self, TableExtent},
};
use std::{collections::BTreeMap, path::Path};

/// References per host cluster.
type Counts = BTreeMap<u64, u64>;

/// An image in memory.
struct Image {
    bytes: Vec<u8>,
    header: Header,
    geometry: Geometry,
}

impl Image {
    fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let header = Header::decode(&bytes, bytes.len() as u64).unwrap();
        let geometry = header.geometry();
        Self { bytes, header, geometry }
    }

    /// A table of 8-byte entries. QEMU may leave the end of a file short of the last cluster.
    fn words(&self, at: HostOffset, count: u64) -> Vec<u64> {
        let start = at.0 as usize;
        let end = (start + count as usize * 8).min(self.bytes.len());
        let words = self.bytes[start..end].chunks_exact(8);
        words.map(|word| u64::from_be_bytes(word.try_into().unwrap())).collect()
    }

    fn count_bytes(&self, counts: &mut Counts, at: HostOffset, len_bytes: u64) {
        let first = at.0 >> self.geometry.cluster_bits;
        for cluster in first..first + self.geometry.clusters_for(len_bytes) {
            *counts.entry(cluster).or_default() += 1;
        }
    }

    /// All that an L1 table refers to, itself included.
    fn count_mapping(&self, counts: &mut Counts, l1: HostOffset, entries: u32) {
        let g = &self.geometry;
        self.count_bytes(counts, l1, u64::from(entries) * 8);
        for raw in self.words(l1, entries.into()) {
            let L1Entry::Table { offset, .. } = L1Entry::decode(raw, g).unwrap() else { continue };
            self.count_bytes(counts, offset, g.cluster_size());
            let words = self.words(offset, g.cluster_size() / 8);
            for entry in words.chunks_exact(g.l2_entry_bytes() as usize / 8) {
                let (host, compressed) = if g.extended_l2 {
                    match ExtendedEntry::decode(entry[0], entry[1], g).unwrap() {
                        ExtendedEntry::Standard { host, .. } => (host, None),
                        ExtendedEntry::Compressed(range) => (None, Some(range)),
                    }
                } else {
                    match Mapping::decode(entry[0], g).unwrap() {
                        Mapping::Compressed(range) => (None, Some(range)),
                        mapping => (mapping.host(), None),
                    }
                };
                if let Some(host) = host {
                    self.count_bytes(counts, host, g.cluster_size());
                }
                for cluster in compressed.iter().flat_map(|range| range.host_clusters(g).each()) {
                    *counts.entry(cluster.0).or_default() += 1;
                }
            }
        }
    }

    fn snapshots(&self) -> (Vec<qcow2_format::Snapshot>, u64) {
        let count = self.header.snapshot_count;
        let table = &self.bytes[self.header.snapshot_table.0 as usize..];
        let TableExtent::Complete(len) = snapshot::table_extent(table, count).unwrap() else {
            panic!("the snapshot table is cut off");
        };
        (snapshot::decode_table(table, count).unwrap(), len)
    }

    fn bitmaps(&self) -> Vec<bitmap::Bitmap> {
        let extension = self.header.bitmaps.as_ref().unwrap();
        let directory = &self.bytes[extension.directory.0 as usize..][..extension.directory_bytes as usize];
        bitmap::decode_directory(directory, extension, &self.geometry).unwrap()
    }

    /// References as the metadata says.
    fn references(&self) -> Counts {
        let (g, header, mut counts) = (&self.geometry, &self.header, Counts::from([(0, 1)]));
        let table_bytes = u64::from(header.refcount_table_clusters) * g.cluster_size();
        self.count_bytes(&mut counts, header.refcount_table, table_bytes);
        for raw in self.words(header.refcount_table, table_bytes / 8) {
            if let Some(block) = RefcountTableEntry::decode(raw, g).unwrap() {
                self.count_bytes(&mut counts, block, g.cluster_size());
            }
        }
        self.count_mapping(&mut counts, header.l1_table, header.l1_entries);
        if header.snapshot_count > 0 {
            let (snapshots, len) = self.snapshots();
            self.count_bytes(&mut counts, header.snapshot_table, len);
            for (index, snapshot) in (0..).zip(snapshots) {
                snapshot.check(index, header.snapshot_table, g, self.bytes.len() as u64).unwrap();
                self.count_mapping(&mut counts, snapshot.l1_table, snapshot.l1_entries);
            }
        }
        if header.bitmaps_consistent() {
            let extension = header.bitmaps.as_ref().unwrap();
            self.count_bytes(&mut counts, extension.directory, extension.directory_bytes);
            for bitmap in self.bitmaps() {
                self.count_bytes(&mut counts, bitmap.table, bitmap.table_bytes());
                for raw in self.words(bitmap.table, bitmap.table_entries.into()) {
                    if let BitmapTableEntry::Data(data) = BitmapTableEntry::decode(raw, g).unwrap() {
                        self.count_bytes(&mut counts, data, g.cluster_size());
                    }
                }
            }
        }
        if let Some(crypto) = &header.crypto_header {
            self.count_bytes(&mut counts, crypto.offset, crypto.len_bytes);
        }
        counts
    }

    /// References as the refcount blocks say.
    fn refcounts(&self) -> Counts {
        let (g, mut counts) = (&self.geometry, Counts::new());
        let entries = u64::from(self.header.refcount_table_clusters) * g.cluster_size() / 8;
        for (index, raw) in (0u64..).zip(self.words(self.header.refcount_table, entries)) {
            let Some(block) = RefcountTableEntry::decode(raw, g).unwrap() else { continue };
            let block = &self.bytes[block.0 as usize..][..g.cluster_size() as usize];
            for at in 0..g.refcounts_per_block() {
                let count = refcount::get(block, g.refcount_order, at as usize);
                if count > 0 {
                    counts.insert(index * g.refcounts_per_block() + at, count);
                }
            }
        }
        counts
    }

    fn assert_counts_agree(&self, context: &str) {
        assert_eq!(self.references(), self.refcounts(), "{context}");
    }
}

/// Writes whole and partial clusters, zeros and discards.
fn fill(dir: &Path, image: &str) {
    let steps = [
        "write -q -P 1 0 300k",
        "write -q -P 2 5M 1k",
        "write -q -z 6M 1M",
        "write -q -P 3 8M 3M",
        "discard -q 9M 1M",
        "write -q -P 4 15M 1M",
    ];
    let args: Vec<&str> = steps.iter().flat_map(|step| ["-c", step]).collect();
    run(dir, "qemu-io", &[&["-f", "qcow2", "-d", "unmap"], &args[..], &[image]].concat());
}

#[test]
fn counts_agree_over_the_matrix() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for cluster in [512, 4096, 65536, 2 << 20] {
        for shape in [
            "compat=0.10",
            "refcount_bits=1",
            "refcount_bits=2",
            "refcount_bits=16",
            "refcount_bits=64",
            "extended_l2=on",
            "lazy_refcounts=on",
        ] {
            if shape == "extended_l2=on" && cluster < 16384 {
                continue;
            }
            let options = format!("cluster_size={cluster},{shape}");
            run(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, "a.qcow2", "16M"]);
            fill(dir, "a.qcow2");
            let image = Image::open(&dir.join("a.qcow2"));
            image.assert_counts_agree(&options);
            let (info, header) = (info(dir, "a.qcow2"), &image.header);
            let data = &info["format-specific"]["data"];
            assert_eq!(info["cluster-size"], image.geometry.cluster_size());
            assert_eq!(info["virtual-size"], header.virtual_size);
            assert_eq!(data["refcount-bits"], image.geometry.refcount_bits());
            assert_eq!(data["compat"], if header.version == Version::V3 { "1.1" } else { "0.10" });
            assert_eq!(header.compatible & header::LAZY_REFCOUNTS != 0, shape == "lazy_refcounts=on");
            // QEMU's header, written again here, is still an image to QEMU.
            let first = header.encode().unwrap();
            let mut bytes = image.bytes.clone();
            bytes[..first.len()].copy_from_slice(&first);
            std::fs::write(dir.join("b.qcow2"), bytes).unwrap();
            run(dir, "qemu-img", &["check", "-q", "b.qcow2"]);
            assert_eq!(Image::open(&dir.join("b.qcow2")).header, *header);
        }
    }
}

#[test]
fn counts_agree_with_compressed_clusters() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    run(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "16M"]);
    fill(dir, "a.qcow2");
    for cluster in [512, 4096, 65536, 2 << 20] {
        for shape in ["compat=0.10", "compression_type=zlib", "compression_type=zstd", "extended_l2=on"] {
            if shape == "extended_l2=on" && cluster < 16384 {
                continue;
            }
            let options = format!("cluster_size={cluster},{shape}");
            run(
                dir,
                "qemu-img",
                &["convert", "-q", "-c", "-O", "qcow2", "-o", &options, "a.qcow2", "c.qcow2"],
            );
            let image = Image::open(&dir.join("c.qcow2"));
            image.assert_counts_agree(&options);
            let zstd = image.header.compression == Compression::Zstd;
            assert_eq!(zstd, shape == "compression_type=zstd");
        }
    }
}

#[test]
fn counts_agree_with_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for options in ["compat=0.10", "cluster_size=512", "cluster_size=4k,refcount_bits=2", "refcount_bits=64"]
    {
        run(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "16M"]);
        fill(dir, "a.qcow2");
        run(dir, "qemu-img", &["snapshot", "-q", "-c", "before", "a.qcow2"]);
        run(dir, "qemu-io", &["-f", "qcow2", "-c", "write -q -P 9 100k 1M", "a.qcow2"]);
        run(dir, "qemu-img", &["snapshot", "-q", "-c", "a second, longer name", "a.qcow2"]);
        let image = Image::open(&dir.join("a.qcow2"));
        image.assert_counts_agree(options);
        let (snapshots, len) = image.snapshots();
        let names: Vec<&[u8]> = snapshots.iter().map(|snapshot| &snapshot.name[..]).collect();
        assert_eq!(names, [&b"before"[..], b"a second, longer name"]);
        assert_eq!((&snapshots[1].id[..], snapshots[1].disk_size), (&b"2"[..], Some(16 << 20)));
        // The table, encoded again, is the table; QEMU does not pad the last entry, even when the
        // file ends there.
        let table = snapshot::encode_table(&snapshots).unwrap();
        let stored = &image.bytes[image.header.snapshot_table.0 as usize..][..len as usize];
        assert_eq!(&table[..len as usize], stored);
    }
}

#[test]
fn counts_agree_with_bitmaps() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for options in ["cluster_size=512", "cluster_size=64k"] {
        run(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "16M"]);
        run(dir, "qemu-img", &["bitmap", "--add", "-g", "4096", "a.qcow2", "tracked"]);
        run(dir, "qemu-img", &["bitmap", "--add", "--disable", "a.qcow2", "off"]);
        fill(dir, "a.qcow2");
        let image = Image::open(&dir.join("a.qcow2"));
        assert!(image.header.bitmaps_consistent());
        image.assert_counts_agree(options);
        let mut bitmaps = image.bitmaps();
        bitmaps.sort_by_key(|bitmap| bitmap.name.clone());
        assert_eq!((&bitmaps[0].name[..], bitmaps[0].flags), (&b"off"[..], 0));
        assert_eq!((&bitmaps[1].name[..], bitmaps[1].flags), (&b"tracked"[..], bitmap::FLAG_AUTO));
        assert_eq!(bitmaps[1].granularity_bits, 12);
    }
}

#[test]
fn backing_name_and_format_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    run(dir, "qemu-img", &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    for options in ["compat=0.10", "compat=1.1", "cluster_size=512"] {
        let create = ["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "-o", options, "a.qcow2"];
        run(dir, "qemu-img", &create);
        let header = Image::open(&dir.join("a.qcow2")).header;
        assert_eq!(header.backing_file.as_deref(), Some(&b"base.raw"[..]));
        assert_eq!(header.backing_format.as_deref(), Some("raw"));
        assert_eq!(header.check_supported(), Ok(()));
    }
}

#[test]
fn what_is_not_served_is_recognised_in_real_images() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let create = |options: &[&str]| {
        let args = [&["create", "-q", "-f", "qcow2"], options, &["a.qcow2", "1M"]].concat();
        run(dir, "qemu-img", &args);
        Image::open(&dir.join("a.qcow2")).header
    };
    let extended = create(&["-o", "extended_l2=on"]);
    assert_eq!(extended.check_supported(), Err(Unsupported::ExtendedL2));

    let external = create(&["-o", "data_file=a.data,data_file_raw=on"]);
    assert_eq!(external.check_supported(), Err(Unsupported::ExternalDataFile));
    assert_eq!(external.data_file.as_deref(), Some(&b"a.data"[..]));
    assert_eq!(external.autoclear, header::RAW_EXTERNAL);

    let secret = ["--object", "secret,id=key,data=geheim"];
    let luks =
        [&secret[..], &["-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"]].concat();
    let args = [&["create", "-q", "-f", "qcow2"], &luks[..], &["a.qcow2", "1M"]].concat();
    // Some builds of QEMU have no LUKS; then there is no such image to look at.
    if try_run(dir, "qemu-img", &args).status.success() {
        let image = Image::open(&dir.join("a.qcow2"));
        assert_eq!(image.header.check_supported(), Err(Unsupported::Encryption(CryptMethod::Luks)));
        image.assert_counts_agree("luks");
    } else {
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "\n*** NOT TESTED: this qemu-img cannot make LUKS images ***");
    }
}

/// The dirty bit stays behind when a writer with lazy refcounts is killed.
#[test]
fn a_killed_writer_leaves_the_dirty_bit() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    run(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "a.qcow2", "1M"]);
    let killed =
        try_run(dir, "qemu-io", &["-c", "write -q 0 64k", "-c", "flush", "-c", "sigraise 9", "a.qcow2"]);
    assert!(!killed.status.success());
    let header = Image::open(&dir.join("a.qcow2")).header;
    assert_eq!(header.incompatible, header::DIRTY);
    assert_eq!(header.check_supported(), Ok(()));
}
