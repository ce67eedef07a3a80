//! Reads an image that a crash left, and says what is wrong with it.
//!
//! Shares nothing with the engine but the format crate and the decompressor: a second reading of the
//! specification. The image is a slice of bytes; nothing is cached and nothing is trusted.

use super::{
    contents,
    model::{Model, Value},
};
use crate::unpack::decompress;
use qcow2_format::{
    Clusters, Geometry, Header, L1Entry, Mapping, RefcountTableEntry,
    bitmap::{BitmapTableEntry, FLAG_AUTO, decode_directory},
    header, refcount,
    snapshot::{Snapshot, decode_table},
    word,
};
use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap},
};

/// What is judged besides the image itself.
pub struct Case<'a> {
    /// What each sector may hold.
    pub model: &'a Model,
    /// The sizes that the virtual disk may have, in bytes.
    pub sizes: [u64; 2],
    /// The raw backing file.
    pub backing: Option<&'a [u8]>,
    /// What every sector holds in each internal snapshot; there are no others.
    pub snapshots: &'a [Vec<Value>],
    /// What every sector held at first: it still does while an unknown autoclear bit is set, or a bitmap is true.
    pub initial: &'a [Value],
    /// Compressed clusters that were decompressed before.
    pub memo: &'a Memo,
}

/// What compressed bytes decompress to, so that the same bytes are decompressed once only. By the hash of the
/// bytes, of which the first that has it is kept.
#[derive(Default)]
pub struct Memo(RefCell<HashMap<u64, Decompressed>>);

struct Decompressed {
    input: Vec<u8>,
    values: Vec<Value>,
}

/// What was found in a sound image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Clusters that are counted and not referred to.
    pub leaks: u64,
    /// Clusters of the file.
    pub clusters: u64,
}

/// For messages that cost nothing until they are needed.
const L2_NAMES: [&str; 4] = [
    "an entry of L2 table 0",
    "an entry of L2 table 1",
    "an entry of L2 table 2",
    "an entry of a later L2 table",
];

/// An image as it is read.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    pub(super) header: Header,
    pub(super) geometry: Geometry,
    /// References that were counted, by cluster.
    references: Vec<u64>,
    /// Whether a cluster belongs to one owner alone.
    exclusive: Vec<bool>,
    /// Whether an entry of the active mapping refers to it and does not say that it is its own.
    unflagged: Vec<bool>,
}

/// Judges an image.
///
/// # Errors
/// The first violation, in words.
pub fn judge(bytes: &[u8], case: &Case<'_>) -> Result<Findings, String> {
    let mut reader = Reader::open(bytes)?;
    reader.own(0, 1, "the header")?;
    reader.count_refcounts()?;
    let l1 = reader.l1(reader.header.l1_table.0, reader.header.l1_entries, "the active L1 table")?;
    for (index, &raw) in l1.iter().enumerate() {
        reader.count_l2(raw, index, true)?;
    }
    let snapshots = reader.snapshots()?;
    for snapshot in &snapshots {
        for (index, &raw) in
            reader.l1(snapshot.l1_table.0, snapshot.l1_entries, "a snapshot's L1 table")?.iter().enumerate()
        {
            reader.count_l2(raw, index, false)?;
        }
    }
    let vouched = reader.count_bitmaps()? || reader.header.autoclear & !header::BITMAPS != 0;
    let findings = reader.compare_refcounts()?;
    let size = reader.header.virtual_size;
    if !case.sizes.contains(&size) {
        return Err(format!("the virtual disk has {size} bytes"));
    }
    for sector in 0..case.model.len().min(size as usize / 512) {
        let found = reader.sector(&l1, sector, case.backing, case.memo)?;
        case.model
            .check(sector, found)
            .map_err(|allowed| format!("sector {sector} holds {found:?}, allowed are {allowed:?}"))?;
        if vouched && case.initial.get(sector).is_some_and(|&initial| initial != found) {
            return Err(format!(
                "sector {sector} holds {found:?}, and an autoclear bit or a bitmap says otherwise"
            ));
        }
    }
    if snapshots.len() != case.snapshots.len() {
        return Err(format!("there are {} snapshots", snapshots.len()));
    }
    for (snapshot, content) in snapshots.iter().zip(case.snapshots) {
        let l1 = reader.table(snapshot.l1_table.0, snapshot.l1_entries as usize)?;
        for (sector, &expected) in content.iter().enumerate() {
            let found = reader.sector(&l1, sector, case.backing, case.memo)?;
            if found != expected {
                return Err(format!("sector {sector} of a snapshot holds {found:?}, not {expected:?}"));
            }
        }
    }
    Ok(findings)
}

/// The clusters of a sound image that are counted by nobody.
///
/// # Errors
/// It cannot be read.
pub(super) fn free_clusters(bytes: &[u8]) -> Result<BTreeSet<usize>, String> {
    let reader = Reader::of(bytes)?;
    let per_block = reader.geometry.refcounts_per_block() as usize;
    let mut free = BTreeSet::new();
    for cluster in 0..reader.references.len() {
        let counts = reader.refcount_block((cluster / per_block) as u64)?;
        let order = reader.geometry.refcount_order;
        if counts.is_none_or(|bytes| refcount::get(bytes, order, cluster % per_block) == 0) {
            free.insert(cluster);
        }
    }
    Ok(free)
}

/// What the sectors of a damaged image hold, and then those of each snapshot; `None` where that cannot
/// be told.
///
/// # Errors
/// The header or the snapshot table cannot be read.
pub fn read(
    bytes: &[u8],
    backing: Option<&[u8]>,
    sectors: usize,
    memo: &Memo,
) -> Result<Vec<Option<Value>>, String> {
    let mut reader = Reader::of(bytes)?;
    let mut tables = vec![(reader.header.l1_table.0, reader.header.l1_entries)];
    tables.extend(reader.snapshots()?.iter().map(|snapshot| (snapshot.l1_table.0, snapshot.l1_entries)));
    let mut values = Vec::with_capacity(tables.len() * sectors);
    for (at, entries) in tables {
        let l1 = reader.table(at, entries as usize)?;
        values.extend((0..sectors).map(|sector| reader.sector(&l1, sector, backing, memo).ok()));
    }
    Ok(values)
}

impl<'a> Reader<'a> {
    fn open(bytes: &'a [u8]) -> Result<Self, String> {
        let reader = Self::of(bytes)?;
        let header = &reader.header;
        header.check_supported().and(header.check_writable()).map_err(|error| error.to_string())?;
        if header.incompatible & qcow2_format::header::DIRTY != 0 {
            return Err("it is marked dirty".to_owned());
        }
        Ok(reader)
    }

    pub(super) fn of(bytes: &'a [u8]) -> Result<Self, String> {
        let header = Header::decode(bytes, bytes.len() as u64).map_err(|error| error.to_string())?;
        let geometry = header.geometry();
        let clusters = geometry.clusters_for(bytes.len() as u64) as usize;
        Ok(Self {
            bytes,
            header,
            geometry,
            references: vec![0; clusters],
            exclusive: vec![false; clusters],
            unflagged: vec![false; clusters],
        })
    }

    fn slice(&self, at: u64, len: u64) -> Result<&'a [u8], String> {
        let range = at as usize..(at + len) as usize;
        self.bytes.get(range).ok_or_else(|| format!("{len} bytes at {at} are beyond the end of the file"))
    }

    pub(super) fn table(&self, at: u64, entries: usize) -> Result<Vec<u64>, String> {
        Ok(word::all(self.slice(at, entries as u64 * 8)?).collect())
    }

    /// One entry of a table.
    fn entry(&self, at: u64) -> Result<u64, String> {
        Ok(word::get(self.slice(at, 8)?, 0).unwrap_or(0))
    }

    /// Counts a reference to a cluster.
    fn refer(&mut self, at: u64, what: &str) -> Result<usize, String> {
        let cluster = (at >> self.geometry.cluster_bits) as usize;
        match self.references.get_mut(cluster) {
            None => Err(format!("{what} at {at} is beyond the end of the file")),
            Some(count) => {
                *count += 1;
                Ok(cluster)
            }
        }
    }

    /// Counts clusters that nothing else may refer to.
    fn own(&mut self, at: u64, len: u64, what: &str) -> Result<(), String> {
        for cluster in 0..self.geometry.clusters_for(len) {
            let index = self.refer(at + (cluster << self.geometry.cluster_bits), what)?;
            if self.references[index] > 1 || self.exclusive[index] {
                return Err(format!("{what} at {at} shares cluster {index} with something else"));
            }
            self.exclusive[index] = true;
        }
        Ok(())
    }

    fn count_refcounts(&mut self) -> Result<(), String> {
        let (at, clusters) = (self.header.refcount_table.0, u64::from(self.header.refcount_table_clusters));
        let len = clusters << self.geometry.cluster_bits;
        self.own(at, len, "the refcount table")?;
        for raw in self.table(at, len as usize / 8)? {
            if let Some(block) = RefcountTableEntry::decode(raw, &self.geometry).map_err(|e| e.to_string())? {
                self.own(block.0, self.geometry.cluster_size(), "a refcount block")?;
            }
        }
        Ok(())
    }

    fn l1(&mut self, at: u64, entries: u32, what: &str) -> Result<Vec<u64>, String> {
        self.own(at, u64::from(entries) * 8, what)?;
        self.table(at, entries as usize)
    }

    pub(super) fn snapshots(&mut self) -> Result<Vec<Snapshot>, String> {
        if self.header.snapshot_count == 0 {
            return Ok(Vec::new());
        }
        let at = self.header.snapshot_table.0;
        self.own(at, 1, "the snapshot table")?;
        let rest = self.bytes.get(at as usize..).unwrap_or_default();
        decode_table(rest, self.header.snapshot_count).map_err(|error| error.to_string())
    }

    /// Counts the clusters of bitmaps. Returns whether one that records every write says that there was none.
    fn count_bitmaps(&mut self) -> Result<bool, String> {
        let Some(extension) = self.header.bitmaps else { return Ok(false) };
        if !self.header.bitmaps_consistent() {
            return Err("the bitmaps have been given up".to_owned());
        }
        let (at, len) = (extension.directory.0, extension.directory_bytes);
        self.own(at, len, "the bitmap directory")?;
        let directory = self.slice(at, len)?;
        let bitmaps =
            decode_directory(directory, &extension, &self.geometry).map_err(|error| error.to_string())?;
        let mut vouches = false;
        for bitmap in bitmaps {
            self.own(bitmap.table.0, bitmap.table_bytes(), "a bitmap's table")?;
            for raw in self.table(bitmap.table.0, bitmap.table_entries as usize)? {
                let entry = BitmapTableEntry::decode(raw, &self.geometry);
                if let BitmapTableEntry::Data(bits) = entry.map_err(|error| error.to_string())? {
                    self.own(bits.0, self.geometry.cluster_size(), "a bitmap")?;
                }
            }
            match (bitmap.flags & FLAG_AUTO != 0, bitmap.is_true()) {
                (is_auto, true) => vouches |= is_auto,
                (true, false) => {}
                (false, false) => return Err("a bitmap that records nothing is marked as stale".to_owned()),
            }
        }
        Ok(vouches)
    }

    /// Counts an L2 table and what it maps. A table or cluster of the active mapping that is marked
    /// COPIED is nobody else's.
    fn count_l2(&mut self, raw: u64, index: usize, is_active: bool) -> Result<(), String> {
        let entry = L1Entry::decode(raw, &self.geometry).map_err(|error| error.to_string())?;
        let L1Entry::Table { offset, copied } = entry else { return Ok(()) };
        let cluster = self.refer(offset.0, "an L2 table")?;
        self.check_copied(cluster, copied && is_active, "L2 table")?;
        self.unflagged[cluster] |= is_active && !copied;
        let what = L2_NAMES[index.min(L2_NAMES.len() - 1)];
        for raw in self.table(offset.0, self.geometry.l2_entries() as usize)? {
            if raw == 0 {
                continue;
            }
            let mapping = Mapping::decode(raw, &self.geometry).map_err(|error| error.to_string())?;
            match mapping {
                Mapping::Compressed(range) => {
                    for cluster in range.host_clusters(&self.geometry).each() {
                        self.refer(self.geometry.host_offset(cluster).0, what)?;
                    }
                }
                Mapping::Data { host, copied } | Mapping::Zero { host: Some(host), copied } => {
                    let cluster = self.refer(host.0, what)?;
                    self.check_copied(cluster, copied && is_active, what)?;
                    self.unflagged[cluster] |= is_active && !copied;
                    self.slice(host.0, self.geometry.cluster_size())?;
                }
                Mapping::Unallocated | Mapping::Zero { host: None, .. } => {}
            }
        }
        Ok(())
    }

    fn check_copied(&mut self, cluster: usize, copied: bool, what: &str) -> Result<(), String> {
        if self.exclusive[cluster] || (copied && self.references[cluster] > 1) {
            return Err(format!("{what}: cluster {cluster} has another owner"));
        }
        self.exclusive[cluster] = copied;
        Ok(())
    }

    fn compare_refcounts(&self) -> Result<Findings, String> {
        let mut findings = Findings { leaks: 0, clusters: self.references.len() as u64 };
        let per_block = self.geometry.refcounts_per_block() as usize;
        for (block, references) in self.references.chunks(per_block).enumerate() {
            let counts = self.refcount_block(block as u64)?;
            for (index, &references) in references.iter().enumerate() {
                let cluster = block * per_block + index;
                let count =
                    counts.map_or(0, |bytes| refcount::get(bytes, self.geometry.refcount_order, index));
                if count < references {
                    return Err(format!(
                        "cluster {cluster} has refcount {count} and {references} references"
                    ));
                }
                if self.exclusive[cluster] && count != 1 {
                    return Err(format!("cluster {cluster} has one owner and refcount {count}"));
                }
                if self.unflagged[cluster] && count == 1 {
                    return Err(format!("cluster {cluster} has one owner, which does not say so"));
                }
                findings.leaks += u64::from(count > references);
            }
        }
        findings.leaks += self.counted_behind()?;
        Ok(findings)
    }

    /// How many clusters behind the end of the file are counted.
    fn counted_behind(&self) -> Result<u64, String> {
        let (per_block, order) = (self.geometry.refcounts_per_block() as usize, self.geometry.refcount_order);
        let (first, mut counted) = (self.references.len(), 0);
        for block in first / per_block..self.refcount_table_entries() as usize {
            let Some(counts) = self.refcount_block(block as u64)? else { continue };
            let unused = first.saturating_sub(block * per_block)..per_block;
            let is_counted = |&index: &usize| refcount::get(counts, order, index) > 0;
            if counts[(unused.start << order) / 8..].iter().any(|&byte| byte != 0) {
                counted += unused.filter(is_counted).count() as u64;
            }
        }
        Ok(counted)
    }

    fn refcount_table_entries(&self) -> u64 {
        (u64::from(self.header.refcount_table_clusters) << self.geometry.cluster_bits) / 8
    }

    /// The counts of a block's clusters; `None` where there is no block, and all are 0.
    pub(super) fn refcount_block(&self, block: u64) -> Result<Option<&'a [u8]>, String> {
        if block >= self.refcount_table_entries() {
            return Ok(None);
        }
        let raw = self.entry(self.header.refcount_table.0 + block * 8)?;
        let at = RefcountTableEntry::decode(raw, &self.geometry).map_err(|error| error.to_string())?;
        at.map(|at| self.slice(at.0, self.geometry.cluster_size())).transpose()
    }

    /// The content of a sector under an L1 table.
    fn sector(
        &self,
        l1: &[u64],
        sector: usize,
        backing: Option<&[u8]>,
        memo: &Memo,
    ) -> Result<Value, String> {
        let guest = sector as u64 * 512;
        let index = self.geometry.l1_index(guest) as usize;
        let mapping = match L1Entry::decode(l1[index], &self.geometry).map_err(|error| error.to_string())? {
            L1Entry::Unallocated => Mapping::Unallocated,
            L1Entry::Table { offset, .. } => {
                let raw = self.entry(offset.0 + self.geometry.l2_index(guest) * 8)?;
                Mapping::decode(raw, &self.geometry).map_err(|error| error.to_string())?
            }
        };
        let skip = self.geometry.in_cluster(guest);
        Ok(match mapping {
            Mapping::Unallocated => {
                let bytes = backing.and_then(|bytes| bytes.get(guest as usize..guest as usize + 512));
                bytes.map_or(Value::Zero, Value::read)
            }
            Mapping::Zero { .. } => Value::Zero,
            Mapping::Data { host, .. } => Value::read(self.slice(host.0 + skip, 512)?),
            Mapping::Compressed(range) => {
                let end = (range.offset + range.len).min(self.bytes.len() as u64);
                let input = self.slice(range.offset, end.saturating_sub(range.offset))?;
                let hash = contents::sum(0, input);
                if let Some(known) = memo.0.borrow().get(&hash).filter(|known| known.input == input) {
                    return Ok(known.values[skip as usize / 512]);
                }
                let len = self.geometry.cluster_size() as usize;
                let cluster = decompress::cluster(self.header.compression, input, len)
                    .map_err(|error| error.to_string())?;
                let values: Vec<Value> = cluster.chunks_exact(512).map(Value::read).collect();
                let value = values[skip as usize / 512];
                memo.0.borrow_mut().entry(hash).or_insert(Decompressed { input: input.to_vec(), values });
                value
            }
        })
    }
}
