//! Images over chains of QCOW2 files: longer and shorter than the disk and than each other, with other
//! clusters, and with compressed, plain and zero clusters in them and none.
//!
//! A file that is shorter than what is over it reads as zeros behind its end. So that it shows where an engine
//! forgets that, each has content there all the same: in the cluster that its end is in and in those behind
//! it, and so has the file below it.

use super::{
    file::{SECTOR, sector_bytes},
    mixed::stamps,
    model::{INITIAL, Value},
    oracle::Reader,
    workload::{BASE, Below, Fixture, IMAGE, Initial, Maker, Past, SECTORS, Variant},
};
use qcow2_format::{L1Entry, Mapping, header};
use std::{collections::BTreeSet, io, ops::Range};

/// A file over a compressed base that has compressed clusters at the same places.
const PATCH: &str = "patch";
/// The files between the image and the base, the higher one first.
const MIDDLE: &str = "middle";
const LOWER: &str = "lower";
/// The number of the data in the higher one, apart from those of the base and of requests, and in the other.
const IN_MIDDLE: u32 = 1 << 22;
const IN_LOWER: u32 = 3 << 21;
const IN_PATCH: u32 = 5 << 21;
/// Sectors of a file that is longer than the disk. Every file has so many first, and is cut off then.
const LONG: usize = SECTORS + 30;
/// Of a compressed file, what is plain, and what is zeros; in whole clusters.
const PLAIN: Range<usize> = 40..300;
const ZERO: Range<usize> = 64..88;
/// What the file over it has of its own, a cluster each.
const PATCHES: [Range<usize>; 4] = [8..12, 24..28, 28..32, 304..308];
/// What the middle has of its own,
const DATA: [Range<usize>; 3] = [2..9, 60..61, 126..140];
const ZEROS: [Range<usize>; 3] = [4..8, 20..36, 248..260];
/// and the lower one.
const LOWER_DATA: Range<usize> = 390..LONG;

/// Where the files of a chain end, in sectors: inside clusters or between them, the higher ones first or the
/// lower ones. Clusters have two sectors in the middle, and four in the others.
struct Ends {
    /// The last file below an image, which is compressed,
    compressed: usize,
    /// and whether it is not the only one.
    is_patched: bool,
    middle: usize,
    lower: usize,
    raw: usize,
    /// From here on the middle has data of its own.
    data_from: usize,
}

impl Ends {
    /// Those of a variant.
    fn of(variant: Variant) -> Self {
        let (compressed, middle, lower, raw, data_from) = match (variant.compat, variant.refcount_bits) {
            // A longer one would show when an image of version 2 grows, which cannot hide it.
            ("0.10", _) => (398, 397, 421, LONG, 390),
            (_, 64) if variant == Variant::SMALL_BLOCKS => (399, 426, 400, 389, 412),
            (_, 64) => (400, 398, 424, LONG, LONG),
            _ if variant == Variant::LARGE => (404, 399, 427, LONG, LONG),
            _ => (LONG, 427, 398, LONG, 412),
        };
        let is_patched = variant.refcount_bits == 64 && variant != Variant::SMALL_BLOCKS;
        Self { compressed, is_patched, middle, lower, raw, data_from }
    }
}

impl Maker {
    /// Makes an image that has nothing of its own, over one QCOW2 file or two, or over two and a raw one.
    pub(super) fn make_over_chain(&self, variant: Variant, initial: Initial) -> io::Result<Fixture> {
        let ends = Ends::of(variant);
        let (shown, names) = match initial {
            Initial::OverFile if ends.is_patched => (self.make_patched(ends.compressed)?, vec![PATCH, BASE]),
            Initial::OverFile => (self.make_compressed(ends.compressed)?, vec![BASE]),
            _ => (self.make_middle(&ends)?, vec![MIDDLE, LOWER, BASE]),
        };
        let size = (SECTORS * SECTOR).to_string();
        let over = ["-b", names[0], "-F", "qcow2", IMAGE, &size];
        self.qemu_img(&[&["create", "-f", "qcow2", "-o", &variant.options()], &over[..]].concat())?;
        let mut content = shown.clone();
        content.resize(SECTORS, Value::Zero);
        self.check_content(&content)?;
        let read =
            |&name: &&'static str| Ok(Below { name, bytes: std::fs::read(self.directory.join(name))? });
        Ok(Fixture {
            name: format!("{initial:?} {}", variant.name()),
            initial,
            variant,
            image: self.made(variant)?,
            can_discard: variant.compat == "1.1",
            backing: Some(shown.into_iter().flat_map(Value::bytes).collect()),
            below: names.iter().map(read).collect::<io::Result<_>>()?,
            snapshots: Vec::new(),
            content,
            past: Past::Made,
            gap: 0,
            hole: 0,
        })
    }

    /// What QEMU reads of the image is what it is said to hold.
    fn check_content(&self, content: &[Value]) -> io::Result<()> {
        self.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", IMAGE, "shown"])?;
        let found = std::fs::read(self.directory.join("shown"))?;
        let wrong = found.chunks(SECTOR).zip(content).position(|(found, value)| found != value.bytes());
        match wrong {
            None if found.len() == content.len() * SECTOR => Ok(()),
            wrong => Err(io::Error::other(format!("QEMU reads something else in sector {wrong:?}"))),
        }
    }

    /// A file that is compressed but for some clusters. Returns what it holds.
    fn make_compressed(&self, end: usize) -> io::Result<Vec<Value>> {
        let mut content: Vec<_> = stamps(INITIAL, 0..LONG).collect();
        self.put("raw", &content)?;
        let to_qcow2 = ["-O", "qcow2", "-o", "cluster_size=2048", "raw", BASE];
        self.qemu_img(&[&["convert", "-c", "-f", "raw"], &to_qcow2[..]].concat())?;
        self.put("part", &content[PLAIN])?;
        self.change(BASE, "write -s part", &PLAIN)?;
        self.change(BASE, "write -z", &ZERO)?;
        content[ZERO].fill(Value::Zero);
        self.cut_off(BASE, end)?;
        content.truncate(end);
        Ok(content)
    }

    /// A file with compressed clusters over one that is compressed. What is at some place in one is something
    /// else in the other. Returns what they show.
    fn make_patched(&self, end: usize) -> io::Result<Vec<Value>> {
        let mut shown = self.make_compressed(end)?;
        shown.resize(LONG, Value::Zero);
        self.overlay(PATCH, 2048, &[BASE, "qcow2"])?;
        for sectors in PATCHES {
            let data: Vec<_> = stamps(IN_PATCH, sectors.clone()).collect();
            self.put("part", &data)?;
            self.change(PATCH, "write -c -s part", &sectors)?;
            shown[sectors].copy_from_slice(&data);
        }
        let [patch, base] = [PATCH, BASE].map(|name| self.compressed_places(name));
        if patch?.is_disjoint(&base?) {
            return Err(io::Error::other("no place has compressed clusters in both files"));
        }
        Ok(shown)
    }

    /// Where a file has compressed clusters.
    fn compressed_places(&self, file: &str) -> io::Result<BTreeSet<u64>> {
        let bytes = std::fs::read(self.directory.join(file))?;
        let reader = Reader::of(&bytes).map_err(io::Error::other)?;
        let (l1, entries) = (reader.header.l1_table.0, reader.header.l1_entries as usize);
        let mut places = BTreeSet::new();
        for raw in reader.table(l1, entries).map_err(io::Error::other)? {
            let Ok(L1Entry::Table { offset, .. }) = L1Entry::decode(raw, &reader.geometry) else { continue };
            let table = reader.table(offset.0, reader.geometry.l2_entries() as usize);
            for raw in table.map_err(io::Error::other)? {
                if let Ok(Mapping::Compressed(range)) = Mapping::decode(raw, &reader.geometry) {
                    places.insert(range.offset);
                }
            }
        }
        Ok(places)
    }

    /// The upper two files of a chain, over a raw one. Returns what they show.
    fn make_middle(&self, ends: &Ends) -> io::Result<Vec<Value>> {
        let mut shown: Vec<_> = stamps(INITIAL, 0..ends.raw).collect();
        self.put(BASE, &shown)?;
        self.overlay(LOWER, 2048, &[BASE, "raw"])?;
        shown.resize(LONG, Value::Zero);
        self.fill(LOWER, IN_LOWER, &[LOWER_DATA], &[ZERO], &mut shown)?;
        self.cut_off(LOWER, ends.lower)?;
        shown[ends.lower..].fill(Value::Zero);
        self.overlay(MIDDLE, 1024, &[LOWER, "qcow2"])?;
        let behind = ends.data_from..LONG;
        let data: Vec<_> = DATA.into_iter().chain([behind]).collect();
        self.fill(MIDDLE, IN_MIDDLE, &data, &ZEROS, &mut shown)?;
        self.cut_off(MIDDLE, ends.middle)?;
        shown.truncate(ends.middle);
        Ok(shown)
    }

    /// Writes data and zeros into a file of a chain, which then is `shown`.
    fn fill(
        &self,
        file: &str,
        request: u32,
        data: &[Range<usize>],
        zeros: &[Range<usize>],
        shown: &mut [Value],
    ) -> io::Result<()> {
        for sectors in data.iter().filter(|sectors| !sectors.is_empty()) {
            let data: Vec<_> = stamps(request, sectors.clone()).collect();
            self.put("part", &data)?;
            self.change(file, "write -s part", sectors)?;
            shown[sectors.clone()].copy_from_slice(&data);
        }
        for sectors in zeros {
            self.change(file, "write -z", sectors)?;
            shown[sectors.clone()].fill(Value::Zero);
        }
        Ok(())
    }

    /// Has a file say that its disk ends here. What it has behind that stays.
    fn cut_off(&self, file: &str, end: usize) -> io::Result<()> {
        let path = self.directory.join(file);
        let mut bytes = std::fs::read(&path)?;
        bytes[header::SIZE_OFFSET as usize..][..8].copy_from_slice(&sector_bytes(end).to_be_bytes());
        std::fs::write(path, bytes)
    }

    fn overlay(&self, name: &str, cluster: usize, over: &[&str; 2]) -> io::Result<()> {
        let (options, size) = (format!("cluster_size={cluster}"), sector_bytes(LONG).to_string());
        self.qemu_img(&["create", "-f", "qcow2", "-o", &options, "-b", over[0], "-F", over[1], name, &size])
    }
}
