//! Replaying a redo log: the mapping becomes what the dead process had acknowledged.
//!
//! Used once, on an image that was just opened and serves nobody yet. [`Outcome`] condenses the log
//! to its last word on each entry; that is carried out in the order in which the pieces build on each
//! other: the refcount table's place, refcount blocks, counts, L2 tables, mappings. The changes go
//! through the same publication as a request's, with the same rules, so a crash during a replay
//! leaves an image as sound as any other. At the end a cut makes everything durable. A replay that was
//! itself cut short is simply done again.
//!
//! What is there already is written all the same. It may be in the host's memory only: after a write-back that
//! has failed the page cache passes what the disk has not taken off as clean, and only the dead process was told.
//! L2 tables that the image does not name yet are made anew for the same reason: the log has every entry that
//! was set in them.
//!
//! Counts are not logged: what the log's entries refer to counts once, because only clusters that the
//! image owns alone are ever published. What the dead process had counted ahead and not used, or freed
//! and not given back, stays counted: leaks.

use crate::{
    alloc::refcounts::Place,
    error::{Error, Result},
    image::{FAILED_BEFORE, Image},
    io::{Buf, Io},
    lane::Lane,
    order::rules::Page,
    redo::{Record, RedoLog},
};
use qcow2_format::{
    Clusters, Geometry, GuestCluster, HostCluster, HostOffset, L1Entry, Mapping,
    geometry::{MAX_MAPPED_HOST_BYTES, MAX_REFTABLE_BYTES},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

/// A log's last word on everything that it mentions.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    /// First cluster and length in clusters.
    refcount_table: Option<(HostCluster, u64)>,
    /// By block.
    blocks: BTreeMap<u64, HostCluster>,
    /// By L1 index.
    tables: BTreeMap<u64, HostCluster>,
    /// Raw L2 entries.
    mappings: BTreeMap<GuestCluster, u64>,
}

impl<I: Io> Lane<I> {
    /// Does what the log says and makes it durable. Returns the number of records. Nothing else may
    /// use the image meanwhile. The log is not changed: start a new one for what follows.
    ///
    /// # Errors
    /// As for a write and a flush; a log that is damaged or does not belong to this image. The image
    /// is then as after a crash, and the log can be replayed again. A log in which a barrier has failed: it never
    /// can.
    pub async fn replay(&self, log: &RedoLog) -> Result<usize> {
        let image = self.image();
        if log.has_failed() {
            return Err(image.poisoned_by(FAILED_BEFORE));
        }
        // What the dead process has written is covered by our barriers, too, and lost if they fail.
        image.flusher.note_in(log.barriers());
        let records = log.records().map_err(|error| image.bad_log(error.to_string()))?;
        if records.is_empty() {
            return Ok(0);
        }
        let outcome = Outcome::of(&records);
        outcome.check(image.geometry()).map_err(|reason| image.bad_log(reason))?;
        image.restore_refcount_table(&outcome)?;
        let clusters = outcome.clusters(image)?;
        for cluster in clusters {
            self.restore_count(cluster).await?;
        }
        for (&index, &cluster) in &outcome.tables {
            self.restore_table(index, cluster).await?;
        }
        for (&cluster, &entry) in &outcome.mappings {
            self.restore_mapping(cluster, entry).await?;
        }
        self.write_back().await?;
        Ok(records.len())
    }

    /// Counts a cluster once.
    async fn restore_count(&self, cluster: HostCluster) -> Result<()> {
        let image = self.image();
        self.with_counts(|meta| {
            if !matches!(meta.refcounts.place(cluster)?, Place::Page(_)) {
                return Err(image.bad_log(format!("no refcount block counts cluster {}", cluster.0)));
            }
            Ok(meta.refcounts.get(cluster)?.map(|_| meta.set_count(cluster, 1)))
        })
        .await
    }

    /// Points an L1 entry at its table. One that does not name it yet has nothing durable in it: a new table
    /// was empty, or a copy of the one that is named still.
    async fn restore_table(&self, index: u64, cluster: HostCluster) -> Result<()> {
        let image = self.image();
        let (content, old) = match image.named_table(index)? {
            L1Entry::Table { offset, copied: true } if image.geometry().host_cluster(offset) == cluster => {
                let mut meta = image.meta.lock();
                let page = image.l1_page(index);
                meta.graph.touch(page);
                meta.refer(cluster.row(1), page);
                return Ok(());
            }
            L1Entry::Table { offset, .. } => {
                (self.shared_table(offset).await?, image.geometry().host_cluster(offset).row(1))
            }
            L1Entry::Unallocated => (Buf::zeroed(image.geometry().cluster_size() as usize), Range::default()),
        };
        self.write_table(cluster, &content).await?;
        image.publish_table(&mut image.meta.lock(), index, cluster, old);
        Ok(())
    }

    async fn restore_mapping(&self, cluster: GuestCluster, entry: u64) -> Result<()> {
        let image = self.image();
        let layer = image.top();
        let guest = layer.geometry.guest_offset(cluster);
        if !matches!(layer.l1_entry(guest)?, L1Entry::Table { copied: true, .. }) {
            return Err(image.bad_log(format!("guest cluster {} has no L2 table", cluster.0)));
        }
        let mapping = image.logged_mapping(cluster, entry)?;
        let referred = mapping.host().map(|host| layer.geometry.host_cluster(host).row(1));
        self.publish_anew(cluster, referred, mapping).await
    }
}

impl Image {
    fn bad_log(&self, reason: String) -> Error {
        Error::Redo { file: Arc::clone(&self.top().name), reason }
    }

    fn logged_mapping(&self, cluster: GuestCluster, entry: u64) -> Result<Mapping> {
        Mapping::decode(entry, self.geometry())
            .map_err(|source| self.top().corrupt("logged L2", self.geometry().guest_offset(cluster), source))
    }

    /// The refcount table's place, and the blocks that it did not have yet.
    fn restore_refcount_table(&self, outcome: &Outcome) -> Result<()> {
        let mut meta = self.meta.lock();
        match outcome.refcount_table {
            Some((first, _)) if meta.refcounts.table_place().0 == self.geometry().host_offset(first) => {
                meta.write_refcount_table();
            }
            Some((first, clusters)) => meta.place_refcount_table(first.row(clusters)),
            None => {}
        }
        for (&block, &cluster) in &outcome.blocks {
            let wanted = self.geometry().host_offset(cluster);
            match meta.refcounts.block_at(block)? {
                Some(present) if present == wanted => {
                    let page = meta.refcounts.table_page(block);
                    meta.graph.touch(Page::RefcountTable(page));
                }
                None if block < meta.refcounts.table_place().1 => {
                    meta.add_refcount_block(block, cluster);
                }
                _ => return Err(self.bad_log(format!("refcount block {block} is elsewhere"))),
            }
        }
        Ok(())
    }

    /// What an L1 entry names now.
    fn named_table(&self, index: u64) -> Result<L1Entry> {
        let layer = self.top();
        if index >= layer.l1.len() as u64 {
            return Err(self.bad_log(format!("the L1 table has no entry {index}")));
        }
        layer.l1_entry(index * layer.geometry.l2_coverage_bytes())
    }
}

impl Outcome {
    fn of(records: &[Record]) -> Self {
        let mut outcome = Self::default();
        for &record in records {
            match record {
                Record::Mapping { cluster, entry } => drop(outcome.mappings.insert(cluster, entry)),
                Record::Table { index, cluster } => drop(outcome.tables.insert(index, cluster)),
                Record::Block { block, cluster } => drop(outcome.blocks.insert(block, cluster)),
                Record::RefcountTable { clusters, first } => outcome.refcount_table = Some((first, clusters)),
            }
        }
        outcome
    }

    /// Refuses numbers that no image of this geometry has, before anything is made of them. Whether its
    /// tables have such entries is seen when these are looked up.
    fn check(&self, geometry: &Geometry) -> std::result::Result<(), String> {
        let beyond = |at| at >= geometry.host_cluster(HostOffset(MAX_MAPPED_HOST_BYTES));
        if let Some((first, clusters)) = self.refcount_table
            && (beyond(first) || clusters > geometry.clusters_for(MAX_REFTABLE_BYTES))
        {
            return Err(format!("a refcount table of {clusters} clusters at cluster {}", first.0));
        }
        if let Some(cluster) = self.blocks.values().chain(self.tables.values()).find(|&&at| beyond(at)) {
            return Err(format!("a table at host cluster {}", cluster.0));
        }
        let guest_clusters = geometry.clusters_for(geometry.virtual_size);
        match self.mappings.last_key_value() {
            Some((&GuestCluster(cluster), _)) if cluster >= guest_clusters => {
                Err(format!("guest cluster {cluster} of {guest_clusters}"))
            }
            _ => Ok(()),
        }
    }

    /// Every host cluster that the outcome refers to.
    fn clusters(&self, image: &Image) -> Result<BTreeSet<HostCluster>> {
        let mut clusters: BTreeSet<_> = self.blocks.values().chain(self.tables.values()).copied().collect();
        if let Some((first, count)) = self.refcount_table {
            clusters.extend(first.row(count).each());
        }
        for (&cluster, &entry) in &self.mappings {
            let host = image.logged_mapping(cluster, entry)?.host();
            clusters.extend(host.map(|host| image.geometry().host_cluster(host)));
        }
        Ok(clusters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_format::Version;

    #[test]
    fn numbers_that_no_image_has_are_refused() {
        let geometry = Geometry {
            version: Version::V3,
            cluster_bits: 16,
            refcount_order: 4,
            extended_l2: false,
            virtual_size: 1 << 20,
        };
        let check = |record| Outcome::of(&[record]).check(&geometry);
        let last = HostCluster((1 << 40) - 1);
        assert_eq!(check(Record::Table { index: 0, cluster: last }), Ok(()));
        assert_eq!(check(Record::RefcountTable { clusters: 128, first: last }), Ok(()));
        assert_eq!(check(Record::Mapping { cluster: GuestCluster(15), entry: 0 }), Ok(()));
        for record in [
            Record::Table { index: 0, cluster: last + 1 },
            Record::Block { block: 0, cluster: HostCluster(u64::MAX) },
            Record::RefcountTable { clusters: 1, first: last + 1 },
            Record::RefcountTable { clusters: 129, first: HostCluster(5) },
            Record::Mapping { cluster: GuestCluster(16), entry: 0 },
        ] {
            check(record).expect_err("too large");
        }
    }

    #[test]
    fn the_last_word_on_each_entry_counts() {
        let outcome = Outcome::of(&[
            Record::Mapping { cluster: GuestCluster(5), entry: 1 },
            Record::Table { index: 0, cluster: HostCluster(9) },
            Record::RefcountTable { clusters: 2, first: HostCluster(40) },
            Record::Mapping { cluster: GuestCluster(5), entry: 2 },
            Record::RefcountTable { clusters: 3, first: HostCluster(90) },
            Record::Block { block: 1, cluster: HostCluster(64) },
        ]);
        let expected = Outcome {
            refcount_table: Some((HostCluster(90), 3)),
            blocks: [(1, HostCluster(64))].into(),
            tables: [(0, HostCluster(9))].into(),
            mappings: [(GuestCluster(5), 2)].into(),
        };
        assert_eq!(outcome, expected);
    }
}
