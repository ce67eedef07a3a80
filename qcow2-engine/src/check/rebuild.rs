//! A new refcount structure behind the end of the file.
//!
//! Nothing that exists is overwritten until one write of the header's first sector switches from
//! the old structure to the new one, whose content is durable by then. The old one's clusters have
//! no count in the new one: they are free.

use super::{counts::CHUNK, refcounts::Refcounts, survey::Survey};
use crate::{
    error::Result,
    inspect::{ImageFile, SECTOR},
    io::Io,
    order::rules::RuleName,
};
use qcow2_format::{
    HostOffset, RefcountTableEntry,
    geometry::{MAX_REFTABLE_BYTES, TABLE_ENTRY_BYTES},
    header::{REFCOUNT_TABLE_CLUSTERS_OFFSET, REFCOUNT_TABLE_OFFSET},
    refcount,
};
use std::{collections::BTreeMap, ops::Range};

/// Where the new structure goes: the table, then the blocks.
struct Plan {
    table: Range<u64>,
    /// Table index → cluster of the block.
    blocks: BTreeMap<u64, u64>,
}

/// Writes a new structure and switches to it. Returns why not, where that would not be safe.
pub(super) async fn run(
    file: &mut ImageFile<'_, impl Io>,
    survey: &mut Survey,
) -> Result<Option<&'static str>> {
    if survey.hides_references {
        return Ok(Some("the refcounts are not rebuilt: damaged tables may hide references"));
    }
    if survey.stuck_entries || !survey.doubtful.is_empty() {
        return Ok(Some("the refcounts are not rebuilt: the file would grow over what entries refer to"));
    }
    drop_lost_blocks(file, survey).await?;
    survey.release_old_structure(file);
    let Some(plan) = Plan::make(survey) else {
        return Ok(Some("the refcounts are not rebuilt: the file is too large for a refcount table"));
    };
    for cluster in plan.clusters() {
        survey.refs.add(cluster, 1);
    }
    let old_len = file.file_len;
    if let Err(error) = write(file, survey, &plan).await {
        // Not referred to yet; if it cannot be cut off either it is a tail that nobody reads.
        let _ = file.set_len(old_len).await;
        return Err(error);
    }
    switch(file, &plan).await?;
    let bits = survey.geometry().cluster_bits;
    let blocks = plan.blocks.iter().map(|(&index, &cluster)| (index, cluster << bits)).collect();
    survey.refcounts = Refcounts::new(*survey.geometry(), blocks);
    file.file_len = file.file_len.max(plan.clusters().end << bits);
    Ok(None)
}

/// Clears the old table's entries that name blocks beyond the end of the file: it is about to grow
/// over them. Without a block all counts are 0, which is what they are already.
async fn drop_lost_blocks(file: &ImageFile<'_, impl Io>, survey: &Survey) -> Result<()> {
    let geometry = survey.geometry();
    let at = file.header().refcount_table.0;
    let len = u64::from(file.header().refcount_table_clusters) * geometry.cluster_size();
    let old = file.read(at, len).await?;
    let mut new = old.clone();
    for entry in new.chunks_exact_mut(TABLE_ENTRY_BYTES as usize) {
        let raw = u64::from_be_bytes((&*entry).try_into().unwrap_or_default());
        if let Ok(Some(block)) = RefcountTableEntry::decode(raw, geometry)
            && survey.rules.is_beyond_file(block.0, geometry.cluster_size())
        {
            entry.fill(0);
        }
    }
    file.write_changes(at, &old, &new).await?;
    file.barrier(RuleName::EntriesBeforeGrowth).await
}

impl Survey {
    /// Takes the references to the old structure back.
    fn release_old_structure(&mut self, file: &ImageFile<'_, impl Io>) {
        let bits = self.geometry().cluster_bits;
        let table = file.header().refcount_table.0 >> bits;
        let table = table..table + u64::from(file.header().refcount_table_clusters);
        let blocks = std::mem::take(&mut self.claimed_blocks);
        for cluster in table.chain(blocks.into_iter().map(|block| block >> bits)) {
            self.refs.set(cluster, self.refs.get(cluster).saturating_sub(1));
        }
    }
}

impl Plan {
    /// The smallest structure that counts everything, itself included.
    fn make(survey: &Survey) -> Option<Self> {
        let geometry = survey.geometry();
        let per_block = geometry.refcounts_per_block();
        let used = survey.blocks_in_use();
        let last = survey.refs.chunks().last().map_or(0, |chunk| (chunk + 1) * CHUNK);
        let first = geometry.clusters_for(survey.rules.file_len).max(last);
        let mut clusters = 2;
        loop {
            let mut indices = used.clone();
            indices.extend(first / per_block..=(first + clusters - 1) / per_block);
            let entries = indices.last().map_or(0, |last| last + 1);
            let table = geometry.clusters_for(entries.checked_mul(TABLE_ENTRY_BYTES)?);
            if table * geometry.cluster_size() > MAX_REFTABLE_BYTES {
                return None;
            }
            let needed = table + indices.len() as u64;
            if needed <= clusters {
                let blocks = indices.into_iter().zip(first + table..).collect();
                return Some(Self { table: first..first + table, blocks });
            }
            clusters = needed;
        }
    }

    fn clusters(&self) -> Range<u64> {
        self.table.start..self.table.end + self.blocks.len() as u64
    }
}

async fn write(file: &ImageFile<'_, impl Io>, survey: &Survey, plan: &Plan) -> Result<()> {
    let geometry = survey.geometry();
    let (bits, cluster_size) = (geometry.cluster_bits, geometry.cluster_size());
    for (&index, &cluster) in &plan.blocks {
        let mut block = vec![0; cluster_size as usize];
        let first = index * geometry.refcounts_per_block();
        for in_block in 0..geometry.refcounts_per_block() {
            let count = survey.refs.get(first + in_block).min(geometry.refcount_max());
            refcount::set(&mut block, geometry.refcount_order, in_block as usize, count);
        }
        file.write(cluster << bits, &block).await?;
    }
    let entries = (plan.table.end - plan.table.start) * cluster_size / TABLE_ENTRY_BYTES;
    let table: Vec<u8> = (0..entries)
        .map(|index| plan.blocks.get(&index).map(|&cluster| HostOffset(cluster << bits)))
        .flat_map(|block| RefcountTableEntry::encode(block).to_be_bytes())
        .collect();
    file.write(plan.table.start << bits, &table).await?;
    file.barrier(RuleName::RebuiltBeforeHeader).await
}

/// One sector, which a disk writes whole or not at all.
async fn switch(file: &mut ImageFile<'_, impl Io>, plan: &Plan) -> Result<()> {
    let at = plan.table.start << file.geometry().cluster_bits;
    let clusters = (plan.table.end - plan.table.start) as u32;
    let mut sector = file.read(0, SECTOR).await?;
    sector[REFCOUNT_TABLE_OFFSET as usize..][..8].copy_from_slice(&at.to_be_bytes());
    sector[REFCOUNT_TABLE_CLUSTERS_OFFSET as usize..][..4].copy_from_slice(&clusters.to_be_bytes());
    file.write(0, &sector).await?;
    file.sync().await?;
    file.header.refcount_table = HostOffset(at);
    file.header.refcount_table_clusters = clusters;
    Ok(())
}
