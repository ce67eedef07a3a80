//! Whether a half-done repair has left an image worse than it was: counts below the number of
//! references, and flags that promise a count which is not there.
//!
//! The oracle stops at the first thing that is wrong. Here much is wrong from the start; what cannot be
//! read is passed over, and two images are compared.

use super::oracle::Reader;
use qcow2_format::{Clusters, L1Entry, Mapping, RefcountTableEntry, refcount};
use std::collections::{BTreeMap, BTreeSet};

/// How an image's counts stand to its references.
#[derive(Clone, Debug, Default)]
pub(super) struct Standing {
    /// Cluster → references that are not counted.
    shortfalls: BTreeMap<u64, u64>,
    /// Clusters that an entry calls its own, and that are counted more often than referred to: a leak
    /// before the flag, damage with it.
    flagged_leaks: BTreeSet<u64>,
}

impl Standing {
    /// # Errors
    /// The header or the snapshot table cannot be read.
    pub(super) fn of(bytes: &[u8]) -> Result<Self, String> {
        let mut reader = Reader::of(bytes)?;
        let snapshots = reader.snapshots()?;
        let mut references =
            References { reader: &reader, counted: BTreeMap::new(), flagged: BTreeSet::new() };
        references.count_structure();
        let header = &reader.header;
        references.count_l1(header.l1_table.0, header.l1_entries, true);
        for snapshot in snapshots {
            references.count_l1(snapshot.l1_table.0, snapshot.l1_entries, false);
        }
        Ok(references.compare())
    }

    /// # Errors
    /// Something is worse than it was `before`.
    pub(super) fn check_no_worse(&self, before: &Self) -> Result<(), String> {
        let lacked = |cluster| before.shortfalls.get(cluster).copied().unwrap_or(0);
        if let Some((cluster, now)) = self.shortfalls.iter().find(|&(cluster, now)| *now > lacked(cluster)) {
            let then = lacked(cluster);
            return Err(format!("{now} references to cluster {cluster} are not counted, {then} were before"));
        }
        match self.flagged_leaks.difference(&before.flagged_leaks).next() {
            Some(cluster) => {
                Err(format!("cluster {cluster} is said to have one owner, and has a higher count"))
            }
            None => Ok(()),
        }
    }
}

struct References<'a> {
    reader: &'a Reader<'a>,
    counted: BTreeMap<u64, u64>,
    /// What an entry of the active mapping calls its own.
    flagged: BTreeSet<u64>,
}

impl References<'_> {
    fn refer(&mut self, host: u64, is_flagged: bool) {
        let cluster = host >> self.reader.geometry.cluster_bits;
        *self.counted.entry(cluster).or_default() += 1;
        if is_flagged {
            self.flagged.insert(cluster);
        }
    }

    fn table(&self, at: u64, entries: u64) -> Vec<u64> {
        self.reader.table(at, entries as usize).unwrap_or_default()
    }

    /// The refcount table and its blocks.
    fn count_structure(&mut self) {
        let (at, clusters) =
            (self.reader.header.refcount_table.0, self.reader.header.refcount_table_clusters);
        let bytes = u64::from(clusters) << self.reader.geometry.cluster_bits;
        (0..u64::from(clusters))
            .for_each(|index| self.refer(at + (index << self.reader.geometry.cluster_bits), false));
        for raw in self.table(at, bytes / 8) {
            if let Ok(Some(block)) = RefcountTableEntry::decode(raw, &self.reader.geometry) {
                self.refer(block.0, false);
            }
        }
    }

    fn count_l1(&mut self, at: u64, entries: u32, is_active: bool) {
        let geometry = &self.reader.geometry;
        for raw in self.table(at, u64::from(entries)) {
            let Ok(L1Entry::Table { offset, copied }) = L1Entry::decode(raw, geometry) else { continue };
            self.refer(offset.0, copied && is_active);
            for raw in self.table(offset.0, geometry.l2_entries()) {
                match Mapping::decode(raw, geometry) {
                    Ok(Mapping::Data { host, copied } | Mapping::Zero { host: Some(host), copied }) => {
                        self.refer(host.0, copied && is_active);
                    }
                    Ok(Mapping::Compressed(range)) => {
                        let clusters = range.host_clusters(geometry).each();
                        clusters.for_each(|cluster| self.refer(geometry.host_offset(cluster).0, false));
                    }
                    Ok(Mapping::Unallocated | Mapping::Zero { host: None, .. }) | Err(_) => {}
                }
            }
        }
    }

    fn compare(self) -> Standing {
        let mut standing = Standing::default();
        for (&cluster, &references) in &self.counted {
            let count = self.count(cluster);
            if count < references {
                standing.shortfalls.insert(cluster, references - count);
            }
            if count > references && self.flagged.contains(&cluster) {
                standing.flagged_leaks.insert(cluster);
            }
        }
        standing
    }

    fn count(&self, cluster: u64) -> u64 {
        let geometry = &self.reader.geometry;
        let per_block = geometry.refcounts_per_block();
        let block = self.reader.refcount_block(cluster / per_block).ok().flatten();
        block.map_or(0, |bytes| refcount::get(bytes, geometry.refcount_order, (cluster % per_block) as usize))
    }
}
