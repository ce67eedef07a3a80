//! A new refcount structure where nothing refers to, and a new snapshot table with it where one is needed.
//!
//! It lies inside the file if there is room in a row, because a file may not be able to grow (a block
//! device), and else behind its end. Nothing that exists is overwritten until one write of the header's first
//! sector switches from the old structure to the new one, whose content is durable by then. The old one's
//! clusters have no count in the new one: they are free. So are those of snapshots that the new table leaves
//! out.

use super::{change_header, on_disk::CountsOnDisk, survey::Survey};
use crate::{
    error::Result,
    inspect::ImageFile,
    io::{Io, whole_sectors},
    order::rules::RuleName,
};
use qcow2_format::{
    Clusters, Defects, FormatError, HostCluster, HostOffset, RefcountTableEntry, Snapshot,
    geometry::{MAX_REFTABLE_BYTES, TABLE_ENTRY_BYTES},
    header::{
        REFCOUNT_TABLE_CLUSTERS_OFFSET, REFCOUNT_TABLE_OFFSET, SNAPSHOT_COUNT_OFFSET, SNAPSHOT_TABLE_OFFSET,
    },
    refcount,
    snapshot::encode_table,
    word,
};
use std::{collections::BTreeMap, ops::Range};

/// What a new structure needs to know of the old one.
#[derive(Default)]
pub(super) struct Replacement {
    /// The refcount structure cannot hold the counts as it is, or the snapshot table not be what it should.
    pub(super) is_needed: bool,
    /// The refcount table can be read, and is nothing else.
    pub(super) has_old_table: bool,
    /// Clusters whose only known use is one that a rebuild takes away: of the refcount structure, and of a
    /// snapshot table that is replaced.
    pub(super) old_clusters: Vec<HostCluster>,
    /// What the snapshot table should be, where it is something else.
    pub(super) snapshots: Option<Vec<Snapshot>>,
}

/// Where the new structure goes: the table, then the blocks, then the snapshot table.
struct Plan {
    table: Range<HostCluster>,
    /// Table index → cluster of the block.
    blocks: BTreeMap<u64, HostCluster>,
    snapshots: Option<SnapshotTable>,
    /// Clusters of the snapshot table.
    behind: u64,
}

/// A new snapshot table.
struct SnapshotTable {
    count: u32,
    bytes: Vec<u8>,
}

/// Writes a new structure and switches to it. Returns why not, where that would not be safe.
pub(super) async fn run(
    file: &mut ImageFile<'_, impl Io>,
    survey: &mut Survey,
) -> Result<Option<&'static str>> {
    if survey.doubts.hides_references {
        return Ok(Some("the refcounts are not rebuilt: damaged tables may hide references"));
    }
    let doubts = &survey.doubts;
    if doubts.stuck_entries || !doubts.tables.is_empty() || !doubts.under_data.is_empty() {
        return Ok(Some("the refcounts are not rebuilt: the file would grow over what entries refer to"));
    }
    let snapshots = match &survey.replacement.snapshots {
        None => None,
        Some(snapshots) => match SnapshotTable::of(snapshots) {
            Ok(table) => Some(table),
            Err(_) => return Ok(Some("the snapshot table is not written anew: it would be too long")),
        },
    };
    let Some(plan) = Plan::make(survey, snapshots, room_inside(file, survey)) else {
        return Ok(Some("the refcounts are not rebuilt: the file is too large for a refcount table"));
    };
    drop_lost_parts(file, survey).await?;
    survey.release_old_structure();
    for cluster in plan.clusters().each() {
        survey.tally.add(cluster, 1);
    }
    let old_len = file.file_len;
    if let Err(error) = write(file, survey, &plan).await {
        // Not referred to yet; if it cannot be cut off either it is a tail that nobody reads.
        let _ = file.set_len(old_len).await;
        return Err(error);
    }
    switch(file, &plan).await?;
    let geometry = *survey.geometry();
    let HostOffset(end) = geometry.host_offset(plan.clusters().end);
    survey.on_disk = CountsOnDisk::new(geometry, plan.blocks);
    survey.replacement.snapshots = None;
    file.file_len = file.file_len.max(end);
    Ok(None)
}

/// The end of the part of the file in which what has no references is room for the new structure: all of the
/// file but its last cluster, which may be cut off, or nothing. Nothing where the header goes on naming
/// something there until it is switched: snapshots that are going to be dropped, a refcount table that is not
/// counted because it is something else as well. Nor where a table is called a part of the refcounts: if it
/// is, what the right one names seems unused.
fn room_inside(file: &ImageFile<'_, impl Io>, survey: &Survey) -> HostCluster {
    let is_table_known = survey.replacement.has_old_table || file.defects.refcount_table.is_some();
    let is_room = is_table_known && !survey.doubts.lost_tables && !survey.contested.has_tables();
    let end = if is_room { survey.rules.file_len } else { 0 };
    survey.geometry().host_cluster(HostOffset(end))
}

/// Before the file grows: takes what is behind its end away from the old structure. Without a block all
/// counts are 0, which is what they are already. A table that cannot be used is struck out of the header:
/// what is written behind the end could pass for it, and an image with such counts, or with such snapshots,
/// for a sound one.
async fn drop_lost_parts(file: &ImageFile<'_, impl Io>, survey: &Survey) -> Result<()> {
    let header = file.header();
    let kept = survey.replacement.snapshots.as_deref();
    if file.defects.snapshot_table.is_some() && kept.is_some_and(<[_]>::is_empty) {
        let fields: [(u64, &[u8]); 2] = [(SNAPSHOT_COUNT_OFFSET, &[0; 4]), (SNAPSHOT_TABLE_OFFSET, &[0; 8])];
        change_header(file, &fields).await?;
    }
    if file.defects.refcount_table.is_some() {
        let fields: [(u64, &[u8]); 2] =
            [(REFCOUNT_TABLE_OFFSET, &[0; 8]), (REFCOUNT_TABLE_CLUSTERS_OFFSET, &[0; 4])];
        change_header(file, &fields).await?;
    } else if survey.replacement.has_old_table {
        let len = u64::from(header.refcount_table_clusters) * survey.geometry().cluster_size();
        drop_lost_blocks(file, survey, header.refcount_table.0, len).await?;
    }
    file.barrier(RuleName::EntriesBeforeGrowth).await
}

async fn drop_lost_blocks(file: &ImageFile<'_, impl Io>, survey: &Survey, at: u64, len: u64) -> Result<()> {
    let geometry = survey.geometry();
    let old = file.read(at, len).await?;
    let mut new = old.clone();
    for (index, raw) in word::all(&old).enumerate() {
        if let Ok(Some(block)) = RefcountTableEntry::decode(raw, geometry)
            && survey.rules.is_beyond_file(block.0, geometry.cluster_size())
        {
            word::set(&mut new, index * TABLE_ENTRY_BYTES as usize, 0);
        }
    }
    file.write_changes(at, &old, &new).await
}

impl Survey {
    /// Takes the references to the old structure back.
    fn release_old_structure(&mut self) {
        for cluster in std::mem::take(&mut self.replacement.old_clusters) {
            self.tally.take_back(cluster);
        }
    }
}

impl SnapshotTable {
    fn of(snapshots: &[Snapshot]) -> std::result::Result<Self, FormatError> {
        let mut bytes = encode_table(snapshots)?;
        bytes.resize(whole_sectors(bytes.len() as u64) as usize, 0);
        Ok(Self { count: snapshots.len() as u32, bytes })
    }
}

impl Plan {
    /// The smallest structure that counts everything, itself included: before `inside` if it fits there.
    fn make(survey: &Survey, snapshots: Option<SnapshotTable>, inside: HostCluster) -> Option<Self> {
        let geometry = survey.geometry();
        let snapshot_bytes = snapshots.as_ref().map_or(0, |table| table.bytes.len() as u64);
        let used = survey.blocks_in_use();
        let end = HostCluster(geometry.clusters_for(survey.rules.file_len)).max(survey.tally.end());
        let behind = geometry.clusters_for(snapshot_bytes);
        let mut clusters = 2 + behind;
        loop {
            let first = survey.tally.unused_row(clusters, inside).unwrap_or(end);
            let mut indices = used.clone();
            let block_of = |cluster: HostCluster| geometry.refcount_table_index(cluster);
            indices.extend(block_of(first)..=block_of(first + (clusters - 1)));
            let entries = indices.last().map_or(0, |last| last + 1);
            let table = geometry.clusters_for(entries.checked_mul(TABLE_ENTRY_BYTES)?);
            if table * geometry.cluster_size() > MAX_REFTABLE_BYTES {
                return None;
            }
            let needed = table + indices.len() as u64 + behind;
            if needed <= clusters {
                let table = first.row(table);
                let blocks = indices.into_iter().zip((table.end.0..).map(HostCluster)).collect();
                return Some(Self { table, blocks, snapshots, behind });
            }
            clusters = needed;
        }
    }

    fn clusters(&self) -> Range<HostCluster> {
        self.table.start..self.snapshot_table() + self.behind
    }

    /// The first cluster of the new snapshot table.
    fn snapshot_table(&self) -> HostCluster {
        self.table.end + self.blocks.len() as u64
    }
}

async fn write(file: &ImageFile<'_, impl Io>, survey: &Survey, plan: &Plan) -> Result<()> {
    let geometry = survey.geometry();
    let cluster_size = geometry.cluster_size();
    for (&index, &cluster) in &plan.blocks {
        let mut block = vec![0; cluster_size as usize];
        let per_block = geometry.refcounts_per_block();
        let counted = HostCluster(index * per_block).row(per_block);
        for (in_block, cluster) in counted.each().enumerate() {
            let count = survey.tally.references(cluster).min(geometry.refcount_max());
            refcount::set(&mut block, geometry.refcount_order, in_block, count);
        }
        file.write(geometry.host_offset(cluster).0, &block).await?;
    }
    let entries = plan.table.cluster_count() * cluster_size / TABLE_ENTRY_BYTES;
    let place = |index| plan.blocks.get(&index).map(|&block| geometry.host_offset(block));
    let table = word::to_bytes((0..entries).map(|index| RefcountTableEntry::encode(place(index))));
    file.write(geometry.host_offset(plan.table.start).0, &table).await?;
    if let Some(snapshots) = &plan.snapshots {
        file.write(geometry.host_offset(plan.snapshot_table()).0, &snapshots.bytes).await?;
    }
    file.barrier(RuleName::RebuiltBeforeHeader).await
}

/// From here on there is the new structure only.
async fn switch(file: &mut ImageFile<'_, impl Io>, plan: &Plan) -> Result<()> {
    let geometry = file.geometry();
    let (table, clusters) = (geometry.host_offset(plan.table.start), plan.table.cluster_count() as u32);
    let (count, snapshots) = match &plan.snapshots {
        Some(table) => (table.count, geometry.host_offset(plan.snapshot_table())),
        None => (file.header.snapshot_count, file.header.snapshot_table),
    };
    let fields: [(u64, &[u8]); 4] = [
        (REFCOUNT_TABLE_OFFSET, &table.0.to_be_bytes()),
        (REFCOUNT_TABLE_CLUSTERS_OFFSET, &clusters.to_be_bytes()),
        (SNAPSHOT_COUNT_OFFSET, &count.to_be_bytes()),
        (SNAPSHOT_TABLE_OFFSET, &snapshots.0.to_be_bytes()),
    ];
    change_header(file, &fields).await?;
    file.sync().await?;
    file.header.refcount_table = table;
    file.header.refcount_table_clusters = clusters;
    file.header.snapshot_count = count;
    file.header.snapshot_table = snapshots;
    file.defects = Defects::default();
    Ok(())
}
