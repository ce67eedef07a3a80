//! The survey's walk over L1 and L2 tables.

use super::{
    entry::{L2Words, Target, l2_words},
    findings::{Owner, Problem, Remedy},
    survey::{Reference, Survey},
};
use crate::{error::Result, inspect::ImageFile, io::Io};
use futures_util::future::join_all;
use qcow2_format::{CompressedRange, Geometry, HostCluster, HostOffset, geometry::TABLE_ENTRY_BYTES};
use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

/// Bytes of L2 tables that are read at a time.
const BATCH_BYTES: u64 = 2 << 20;
/// L2 tables that are read at a time, at most.
const MAX_BATCH: usize = 64;

/// Entries of L1 tables that are read at a time.
const L1_ENTRIES: u64 = 64 << 10;
/// L2 tables of snapshots that are kept track of while an image is served: at most 20 MiB of memory.
const LIVE_TABLES: usize = 1 << 19;
/// Bytes of tables that are looked at in one step while the image is served: 2048 entries, less than
/// a tenth of a millisecond.
const LIVE_BYTES: u64 = 16 << 10;

/// Parts of tables that are passed by, because they are known to refer to nothing in the window, in one step.
const PASSED: u64 = 256;

/// Where an L2 table is walked, or a part of it.
#[derive(Clone, Copy)]
pub(super) struct Walk {
    pub(super) table: HostCluster,
    /// The bytes of the table: from here on, so many.
    pub(super) skip: u64,
    pub(super) len: u64,
    /// The L1 entry that leads to it, or the first of them.
    pub(super) l1_index: u64,
    /// L1 entries that lead to it.
    references: u64,
    /// It belongs to the active mapping, whose copied flags count.
    pub(super) is_active: bool,
}

/// An L1 table that can be walked.
#[derive(Clone, Copy, Debug)]
pub(super) struct L1Place {
    pub(super) at: u64,
    pub(super) entries: u64,
    pub(super) owner: Owner,
}

/// The tables that a mapping is made of, as far as they are known.
#[derive(Default)]
pub(super) struct Tables {
    /// L1 tables, the active one first.
    pub(super) l1: Vec<L1Place>,
    /// L1 entries that name each L2 table; what has been walked is gone.
    unwalked: HashMap<HostCluster, u64>,
    /// L2 tables of the active mapping.
    active: HashSet<HostCluster>,
}

impl Tables {
    /// Whether an L2 table belongs to the active mapping.
    pub(super) fn is_active(&self, table: HostCluster) -> bool {
        self.active.contains(&table)
    }
}

impl Walk {
    /// Where it begins, in bytes.
    pub(super) fn start(&self, geometry: &Geometry) -> u64 {
        geometry.host_offset(self.table).0 + self.skip
    }
}

impl L1Place {
    /// Its entries, as many at a time as are read.
    fn parts(&self, entries: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let end = self.entries;
        (0..end).step_by(entries as usize).map(move |first| first..end.min(first + entries))
    }
}

impl Survey {
    /// L1 entries: references to L2 tables.
    pub(super) async fn l1_entries(&mut self, file: &ImageFile<'_, impl Io>) {
        for l1 in self.tables.l1.clone() {
            for range in l1.parts(self.l1_step()) {
                let Some(entries) = self.l1_part(file, &l1, range.clone()).await else { break };
                for (index, &raw) in range.zip(&entries) {
                    if raw != 0 {
                        self.l1_entry(&l1, index, raw);
                    }
                }
                if self.is_over(file) {
                    return;
                }
            }
            if self.doubts.senseless_l1.contains(&l1.at) {
                let bytes = l1.at..l1.at + l1.entries * TABLE_ENTRY_BYTES;
                self.findings.take_back(l1.owner, bytes, "the table may be something else");
            }
        }
    }

    /// Some entries of an L1 table; that they cannot be read is noted.
    async fn l1_part(
        &mut self,
        file: &ImageFile<'_, impl Io>,
        l1: &L1Place,
        range: Range<u64>,
    ) -> Option<Vec<u64>> {
        let entries = file.l1_entries(l1, range).await;
        entries.map_err(|error| self.unusable(l1.owner, l1.at, error)).ok()
    }

    fn l1_step(&self) -> u64 {
        if self.window.is_some() { LIVE_BYTES / TABLE_ENTRY_BYTES } else { L1_ENTRIES }
    }

    fn l1_entry(&mut self, l1: &L1Place, index: u64, raw: u64) {
        let at = l1.at + index * TABLE_ENTRY_BYTES;
        let judged = self.rules.judge_l1(raw);
        if let Some(source) = judged.damage {
            self.findings.corruption(l1.owner, at, Problem::Entry(source), entry_remedy(judged.repaired));
            if judged.repaired.is_none() {
                self.doubts.hides_references = true;
                self.doubts.senseless_l1.insert(l1.at);
            }
        }
        let Some((table, _)) = judged.table else { return };
        let (host, len) = (self.geometry().host_offset(table).0, self.geometry().cluster_size());
        let (holder, owner) = (l1.owner, Owner::L2);
        if self.rules.is_table_beyond_file(table) {
            let remedy = Remedy::WithAll("clear the entry");
            self.findings.corruption(holder, at, Problem::BeyondFile { owner, host, len }, remedy);
            self.doubts.lost_tables = true;
            return;
        }
        if self.count_structure(Reference { holder, at, owner, host, len }) {
            self.note_table(l1.owner, at, table);
        }
    }

    /// The copied flags of some entries of the active L1 table.
    async fn l1_flags(&mut self, file: &ImageFile<'_, impl Io>, l1: &L1Place, first: u64, entries: &[u64]) {
        for (index, &raw) in (first..).zip(entries).filter(|(_, raw)| **raw != 0) {
            let table = self.rules.judge_l1(raw).table;
            let Some((host, copied)) = table.filter(|(host, _)| !self.rules.is_table_beyond_file(*host))
            else {
                continue;
            };
            let at = l1.at + index * TABLE_ENTRY_BYTES;
            if let Err(error) = self.copied_flag(file, l1.owner, at, host, copied).await {
                self.findings.structure(Owner::RefcountBlock, at, error);
            }
        }
    }

    /// L2 tables, each once, those of the active mapping first and in guest order.
    pub(super) async fn l2_tables(&mut self, file: &ImageFile<'_, impl Io>) {
        for l1 in self.tables.l1.clone() {
            for range in l1.parts(self.l1_step()) {
                // It was read before: a failure now has been reported as what it means, or is new.
                let Some(entries) = self.l1_part(file, &l1, range.clone()).await else { break };
                if l1.owner == Owner::ActiveL1 {
                    self.l1_flags(file, &l1, range.start, &entries).await;
                }
                let walks: Vec<_> =
                    range.zip(&entries).filter_map(|(index, &raw)| self.next_walk(&l1, index, raw)).collect();
                if self.window.is_some() {
                    self.walk_in_steps(file, &walks).await;
                } else {
                    self.walk(file, &walks).await;
                }
                if self.is_over(file) {
                    return;
                }
            }
        }
    }

    /// Walks whole tables, several at a time.
    async fn walk(&mut self, file: &ImageFile<'_, impl Io>, walks: &[Walk]) {
        let batch = ((BATCH_BYTES >> self.geometry().cluster_bits) as usize).clamp(1, MAX_BATCH);
        for walks in walks.chunks(batch) {
            let tables = join_all(walks.iter().map(|walk| file.l2_part(walk))).await;
            for (walk, table) in walks.iter().zip(tables) {
                self.l2_read(file, *walk, table).await;
            }
        }
    }

    /// Walks tables a part at a time.
    async fn walk_in_steps(&mut self, file: &ImageFile<'_, impl Io>, walks: &[Walk]) {
        let mut passed = 0;
        for walk in walks {
            for skip in (0..walk.len).step_by(LIVE_BYTES as usize) {
                let part = Walk { skip, len: LIVE_BYTES.min(walk.len - skip), ..*walk };
                if self.window.as_mut().is_some_and(|window| file.passes_by(&part, window)) {
                    passed += 1;
                    if passed % PASSED == 0 && file.rest().await.is_err() {
                        return;
                    }
                    continue;
                }
                let table = file.l2_part(&part).await;
                self.l2_read(file, part, table).await;
                if self.is_over(file) {
                    return;
                }
            }
        }
    }

    async fn l2_read(&mut self, file: &ImageFile<'_, impl Io>, walk: Walk, table: Result<Option<Vec<u8>>>) {
        match table {
            Ok(Some(table)) => self.l2_table(file, walk, &table).await,
            Ok(None) => {}
            Err(error) => self.unusable(Owner::L2, self.geometry().host_offset(walk.table).0, error),
        }
    }

    /// An L1 entry names a table. While an image is served its active mapping is walked by itself,
    /// because a table that it shares with a snapshot may be replaced at any moment.
    fn note_table(&mut self, l1: Owner, at: u64, table: HostCluster) {
        if self.window.is_some() && l1 == Owner::ActiveL1 {
            return;
        }
        *self.tables.unwalked.entry(table).or_default() += 1;
        if l1 == Owner::ActiveL1 && !self.tables.active.insert(table) {
            // Whatever it is counted, nobody writes through it.
            let (host, owner) = (self.geometry().host_offset(table).0, Owner::L2);
            let remedy = Remedy::None("it is not known which of the two entries is right");
            self.findings.corruption(l1, at, Problem::Overlap { host, owner, other: owner }, remedy);
        }
        if self.window.is_some() && self.tables.unwalked.len() > LIVE_TABLES {
            // More memory than a search may take.
            self.doubts.hides_references = true;
        }
    }

    /// The table that an L1 entry names, unless it has been walked or cannot be.
    fn next_walk(&mut self, l1: &L1Place, l1_index: u64, raw: u64) -> Option<Walk> {
        let (table, _) = self.rules.judge_l1(raw).table?;
        let is_active = l1.owner == Owner::ActiveL1;
        let references =
            if self.window.is_some() && is_active { 1 } else { self.tables.unwalked.remove(&table)? };
        let (skip, len) = (0, self.geometry().cluster_size());
        Some(Walk { table, skip, len, l1_index, references, is_active })
    }

    async fn l2_table(&mut self, file: &ImageFile<'_, impl Io>, walk: Walk, table: &[u8]) {
        let rules = self.rules;
        let mut expected = None;
        for (index, words) in (0..).zip(l2_words(table, &rules)) {
            if words == L2Words::default() {
                continue;
            }
            let at = walk.start(&rules.geometry) + index * rules.l2_entry_bytes();
            let judged = rules.judge(words);
            if let Target::External { host, .. } = judged.target {
                self.placed(walk, at, index, host);
            }
            if let Some(source) = judged.damage {
                let remedy = entry_remedy(judged.repaired);
                self.findings.corruption(Owner::L2, at, Problem::Entry(source), remedy);
                if judged.repaired.is_none() {
                    self.doubts.hides_references = true;
                    self.doubts.tables.insert(walk.table);
                }
            }
            if walk.is_active {
                self.statistics.count(&judged, &mut expected);
            }
            if let Err(error) = self.l2_entry(file, walk, at, words, judged.target).await {
                self.findings.structure(Owner::RefcountBlock, at, error);
            }
        }
    }

    /// "The offset field in the Standard Cluster Descriptor must match the guest offset." Where it does not, the
    /// clusters may be this file's own, and the bit that says otherwise wrong.
    fn placed(&mut self, walk: Walk, at: u64, index: u64, host: u64) {
        let geometry = self.geometry();
        let in_table = walk.skip / geometry.l2_entry_bytes() + index;
        let guest = walk.l1_index * geometry.l2_coverage_bytes() + in_table * geometry.cluster_size();
        if host != guest {
            let remedy = Remedy::None("what it should be is not known");
            self.findings.corruption(Owner::L2, at, Problem::MisplacedInDataFile { host, guest }, remedy);
            self.doubts.hides_references = true;
        }
    }

    async fn l2_entry(
        &mut self,
        file: &ImageFile<'_, impl Io>,
        walk: Walk,
        at: u64,
        words: L2Words,
        target: Target,
    ) -> Result<()> {
        let holder = Owner::L2;
        if matches!(target, Target::Compressed(_)) && self.rules.has_data_file {
            let remedy = Remedy::None("such an image cannot have compressed clusters");
            self.findings.corruption(holder, at, Problem::CompressedInDataFile, remedy);
            self.doubts.hides_references = true;
            return Ok(());
        }
        if let Some(missing) = self.rules.missing(target) {
            self.lost(walk.table, at, words, missing);
            return Ok(());
        }
        if let Some((host, other)) = self.needless(words) {
            let problem = Problem::Overlap { host: host.0, owner: Owner::Data, other };
            let remedy = Remedy::WithAll("have it read as zeros without the cluster");
            self.findings.corruption(holder, at, problem, remedy);
            return Ok(());
        }
        let (owner, start, len) = match target {
            Target::Nothing | Target::Unknown => return Ok(()),
            Target::External { copied, .. } => {
                if walk.is_active && !copied {
                    self.wrong_flag(holder, at, 0, 1, copied);
                }
                return Ok(());
            }
            Target::Compressed(range) => (Owner::Compressed, range.offset, self.in_file(holder, at, range)),
            Target::Cluster { host, .. } => {
                (Owner::Data, self.geometry().host_offset(host).0, self.geometry().cluster_size())
            }
        };
        self.count(Reference { holder, at, owner, host: start, len }, walk.references);
        match target {
            Target::Cluster { host, copied } if walk.is_active => {
                self.copied_flag(file, holder, at, host, copied).await
            }
            _ => Ok(()),
        }
    }

    /// Metadata that an entry claims to keep for a guest cluster of zeros. Without it the guest reads the same,
    /// and the metadata is what it was.
    pub(super) fn needless(&self, words: L2Words) -> Option<(HostOffset, Owner)> {
        let host = self.rules.kept_cluster(words)?;
        Some((host, self.tally.metadata(self.geometry().host_cluster(host))?))
    }

    /// The file does not have what an entry of a table refers to.
    fn lost(&mut self, table: HostCluster, at: u64, words: L2Words, (owner, host, len): (Owner, u64, u64)) {
        let remedy = match self.rules.without_cluster(words) {
            // Then what refers to the true table is lost, and what that refers to is out of sight.
            _ if self.contested.has_table(table) => {
                self.doubts.tables.insert(table);
                self.doubts.hides_references = true;
                Remedy::None("the table may be a part of the refcounts")
            }
            Some(_) => Remedy::WithAll("make it read as zeros"),
            None => Remedy::None("version 2 has no zero clusters, and the backing file would show"),
        };
        self.doubts.stuck_entries |= matches!(remedy, Remedy::None(_));
        self.findings.corruption(Owner::L2, at, Problem::BeyondFile { owner, host, len }, remedy);
    }

    /// How much of compressed data the file has. That an entry claims more is damage, and what there is may
    /// be all there ever was.
    fn in_file(&mut self, holder: Owner, at: u64, range: CompressedRange) -> u64 {
        if !self.rules.is_beyond_file(range.offset, range.len) {
            return range.len;
        }
        let problem = Problem::BeyondFile { owner: Owner::Compressed, host: range.offset, len: range.len };
        let remedy = Remedy::None("what the file has of it may be all there is: read it, and write it anew");
        self.findings.corruption(holder, at, problem, remedy);
        self.doubts.stuck_entries = true;
        self.rules.file_len - range.offset
    }

    /// "Set to 1 only if the refcount is exactly one."
    async fn copied_flag(
        &mut self,
        file: &ImageFile<'_, impl Io>,
        table: Owner,
        at: u64,
        host: HostCluster,
        copied: bool,
    ) -> Result<()> {
        if let Some(window) = &mut self.window {
            window.mark_active(host);
            return Ok(());
        }
        let count = self.on_disk.get(file, host).await?;
        if copied != (count == 1) {
            self.wrong_flag(table, at, self.geometry().host_offset(host).0, count, copied);
        }
        Ok(())
    }

    fn wrong_flag(&mut self, table: Owner, at: u64, host: u64, count: u64, is_set: bool) {
        let remedy = Remedy::WithAll("correct the flag");
        self.findings.corruption(table, at, Problem::CopiedFlag { host, count, is_set }, remedy);
    }
}

/// What becomes of a damaged entry, which a repair can make into `repaired`.
fn entry_remedy<T>(repaired: Option<T>) -> Remedy {
    match repaired {
        Some(_) => Remedy::WithAll("correct the entry"),
        None => Remedy::None("what it should be is not known"),
    }
}
