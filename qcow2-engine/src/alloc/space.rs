//! Which host clusters come next.
//!
//! A cursor moves upwards over the refcounts and takes runs of free clusters; where the refcount
//! table or a block is missing, it is made on the way, out of the very clusters that it will count,
//! once the file reaches over them.
//! Everything is decided in memory and under the metadata lock; the order graph sees to it that the
//! disk follows in the right order.

use super::refcounts::{Count, Place};
use crate::{
    error::{Error, Result},
    meta::Meta,
    order::rules::{Page, Rule},
    owner::Owner,
    redo::Record,
};
use qcow2_format::{
    Clusters, HostCluster, HostOffset,
    geometry::{MAX_MAPPED_HOST_BYTES, MAX_REFTABLE_BYTES},
    header,
};
use std::{ops::Range, sync::Arc};

/// Records in the redo log of one growth of the refcount table: the largest table has 16384 clusters
/// of 512 bytes, which 256 blocks count, and has grown by a third.
const MAX_GROWTH_RECORDS: u64 = 512;

/// Free space as seen by the allocator.
pub(crate) struct Space {
    /// No free cluster lies below it, but for those that wait in `frees`.
    pub(crate) cursor: HostCluster,
    /// From here on no cluster was ever written: they read as zeros.
    pub(crate) fresh_from: HostCluster,
    /// The file extends at least to this byte.
    pub(crate) file_end: u64,
    /// Before this cluster the file may have come with holes.
    pub(crate) found_end: HostCluster,
    /// Where room was made last: no holes are there.
    pub(crate) room: Range<HostCluster>,
    /// An extension has failed, and may have gone a part of its way.
    pub(crate) may_be_longer: bool,
}

/// Clusters in a row, counted once and not referred to yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) clusters: Range<HostCluster>,
    /// Never written before: reads as zeros once the file extends over it.
    pub(crate) fresh: bool,
}

/// The allocator's answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Run(Run),
    /// Load this refcount page and ask again.
    Needs(u64),
    /// Make the file reach over these clusters and have space for them, and ask again: refcount blocks and a
    /// table are to lie there.
    NeedsRoom(Range<HostCluster>),
    /// The redo log is full: carry a cut out and ask again.
    NeedsCut,
}

impl Meta {
    /// Takes the next run of up to `max` free clusters and counts it.
    pub(crate) fn next_run(&mut self, max: u64) -> Result<Next> {
        loop {
            let cursor = self.space.cursor;
            match self.refcounts.place(cursor)? {
                Place::BeyondTable | Place::NoBlock { .. } if !self.has_log_room(MAX_GROWTH_RECORDS) => {
                    return Ok(Next::NeedsCut);
                }
                Place::BeyondTable => {
                    if let Some(needs) = self.grow_refcount_table(cursor)? {
                        return Ok(needs);
                    }
                }
                Place::NoBlock { block } => {
                    if let Some(needs) = self.lacks_room(cursor.row(1))? {
                        return Ok(needs);
                    }
                    self.claim(cursor.row(1))?;
                    self.log([Record::Block { block, cluster: cursor }]);
                    self.add_refcount_block(block, cursor);
                    self.count_once(cursor.row(1));
                }
                Place::Page(page) => match self.refcounts.free_run(page, cursor, max) {
                    Count::Needs(page) => return Ok(Next::Needs(page)),
                    Count::Is(None) => {
                        let next = self.refcounts.next_not_full(page + 1);
                        self.space.cursor = self.refcounts.first_in_page(next);
                    }
                    Count::Is(Some(clusters)) => {
                        let fresh = self.claim(clusters.clone())?;
                        self.count_once(clusters.clone());
                        return Ok(Next::Run(Run { clusters, fresh }));
                    }
                },
            }
        }
    }

    /// Takes `count` clusters in a row, and counts them: the first there are, or behind everything that is
    /// counted so far. `from` is where to go on looking; nothing is found below it.
    pub(crate) fn next_row(&mut self, count: u64, from: &mut HostCluster) -> Result<Next> {
        match self.row_in_page(count, from)? {
            Some(next) => Ok(next),
            None => self.row_with_blocks(count),
        }
    }

    /// A row of clusters that one refcount page counts, the first there is from `from` on. A file that cannot
    /// grow has no other room than what is free inside it.
    fn row_in_page(&mut self, count: u64, from: &mut HostCluster) -> Result<Option<Next>> {
        let per_page = self.refcounts.clusters_per_page();
        let end = self.refcounts.first_in_block(self.refcounts.blocks_end());
        *from = self.space.cursor.max(*from);
        while count <= per_page && *from < end {
            let Place::Page(page) = self.refcounts.place(*from)? else {
                *from = self.refcounts.first_in_block(self.refcounts.block_of(*from) + 1);
                continue;
            };
            match self.refcounts.free_run(page, *from, count) {
                Count::Needs(page) => return Ok(Some(Next::Needs(page))),
                Count::Is(None) => {
                    *from = self.refcounts.first_in_page(self.refcounts.next_not_full(page + 1));
                }
                Count::Is(Some(row)) if row.cluster_count() < count => *from = row.end,
                Count::Is(Some(row)) => return self.take_row(row, 0..0).map(Some),
            }
        }
        Ok(None)
    }

    /// Takes clusters in a row, of which the first become new refcount blocks. What is passed over is still
    /// free.
    fn take_row(&mut self, clusters: Range<HostCluster>, new_blocks: Range<u64>) -> Result<Next> {
        if let Some(needs) = self.lacks_room(clusters.clone())? {
            return Ok(needs);
        }
        let cursor = self.space.cursor;
        let fresh = self.claim(clusters.clone())?;
        let row = clusters.start + (new_blocks.end - new_blocks.start)..clusters.end;
        let blocks = new_blocks.zip(clusters.clone().each());
        self.log(blocks.clone().map(|(block, cluster)| Record::Block { block, cluster }));
        blocks.for_each(|(block, at)| self.add_refcount_block(block, at));
        self.count_once(clusters);
        self.space.cursor = cursor;
        Ok(Next::Run(Run { clusters: row, fresh }))
    }

    /// A row behind everything that is counted so far. The blocks that count it come first: it may be longer
    /// than what one block counts.
    fn row_with_blocks(&mut self, count: u64) -> Result<Next> {
        let per_block = self.geometry.refcounts_per_block();
        let blocks = count.div_ceil(per_block - 1);
        while self.refcounts.blocks_end() + blocks > self.refcounts.table_place().1 {
            let base = self.refcounts.first_in_block(self.refcounts.table_place().1);
            if let Some(needs) = self.grow_refcount_table(base)? {
                return Ok(needs);
            }
        }
        let first = self.refcounts.blocks_end();
        let clusters = self.refcounts.first_in_block(first).row(blocks + count);
        self.take_row(clusters, first..first + blocks)
    }

    /// `by` refers to these clusters from now on: their counts, and what leads to their counts, go
    /// to disk first (R1).
    pub(crate) fn refer(&mut self, clusters: Range<HostCluster>, by: Page) {
        for page in self.refcounts.pages_of(&clusters) {
            let table = self.refcounts.table_page(page / self.refcounts.pages_per_block());
            for count in [Page::Refcount(page), Page::RefcountTable(table), Page::Header] {
                self.graph.require(Rule::refcount_before_reference(count, by));
            }
        }
    }

    /// Moves the cursor over a run that is taken; says whether it is fresh.
    fn claim(&mut self, run: Range<HostCluster>) -> Result<bool> {
        self.check_reach(&run)?;
        self.check_unused(&run)?;
        let fresh = run.start >= self.space.fresh_from;
        self.space.fresh_from = self.space.fresh_from.max(run.end);
        self.space.cursor = run.end;
        if run.contains(&self.space.room.start) || self.space.room.contains(&run.start) {
            self.space.room = Range::default();
        }
        Ok(fresh)
    }

    /// Narrow counts of large clusters reach further than an entry can name.
    fn check_reach(&self, run: &Range<HostCluster>) -> Result<()> {
        if run.end > self.geometry.host_cluster(HostOffset(MAX_MAPPED_HOST_BYTES)) {
            return Err(Error::TooLarge {
                file: Arc::clone(&self.file),
                reason: "no free cluster is left below 64 PiB, beyond which no entry of a table can name one",
            });
        }
        Ok(())
    }

    /// A count of 0 is not enough: the count may be what is damaged.
    fn check_unused(&self, run: &Range<HostCluster>) -> Result<()> {
        let wrong = |cluster, reason| Error::Refcount {
            file: Arc::clone(&self.file),
            at: self.geometry.host_offset(cluster).0,
            value: 0,
            reason,
        };
        for cluster in run.clone().each() {
            if let Some(owner) = self.territory.owner(cluster) {
                return Err(wrong(cluster, format!("but it is in use as {owner}")));
            }
        }
        match self.frees.find(run) {
            Some(cluster) => Err(wrong(cluster, "but an entry named it until a moment ago".into())),
            None => Ok(()),
        }
    }

    /// Sets the counts of clusters whose pages are resident to one.
    fn count_once(&mut self, clusters: Range<HostCluster>) {
        self.watch.allocated(clusters.clone());
        clusters.each().for_each(|cluster| self.set_count(cluster, 1));
    }

    /// Enters a new refcount block that lies in cluster `at`. It has been logged, if it has to be.
    pub(crate) fn add_refcount_block(&mut self, block: u64, at: HostCluster) {
        let host = self.geometry.host_offset(at);
        self.refcounts.add_block(block, host, |page| self.graph.holds(Page::Refcount(page)));
        self.territory.add_refcount_block(at);
        let table = Page::RefcountTable(self.refcounts.table_page(block));
        for page in self.refcounts.block_pages(block).map(Page::Refcount) {
            self.graph.touch(page);
            self.graph.require(Rule::block_before_table(page, table));
        }
    }

    /// What metadata in these clusters needs first, unless the file has space for them: a flush that had to
    /// write behind its end, or into a hole, would fail where the host has no room.
    fn lacks_room(&self, clusters: Range<HostCluster>) -> Result<Option<Next>> {
        self.check_reach(&clusters)?;
        let Space { file_end, found_end, room, .. } = &self.space;
        let is_in_file = self.geometry.host_offset(clusters.end).0 <= *file_end;
        let may_be_hole =
            clusters.start < *found_end && (clusters.start < room.start || room.end < clusters.end);
        Ok((!is_in_file || may_be_hole).then_some(Next::NeedsRoom(clusters)))
    }

    /// Moves the refcount table to a larger place at `base`, the first cluster that it does not
    /// reach: new blocks first, then the table, all counted by those blocks. Or says what that needs first.
    fn grow_refcount_table(&mut self, base: HostCluster) -> Result<Option<Next>> {
        let (_, old_entries) = self.refcounts.table_place();
        let per_cluster = self.geometry.cluster_size() / 8;
        let plan =
            plan_table(base.0, old_entries / per_cluster, per_cluster, self.geometry.refcounts_per_block());
        if plan.table_clusters * self.geometry.cluster_size() > MAX_REFTABLE_BYTES {
            return Err(Error::TooLarge {
                file: Arc::clone(&self.file),
                reason: "the refcount table has reached its largest size",
            });
        }
        let taken = base.row(plan.blocks + plan.table_clusters);
        if let Some(needs) = self.lacks_room(taken.clone())? {
            return Ok(Some(needs));
        }
        self.claim(taken.clone())?;
        let table = base + plan.blocks..taken.end;
        let blocks = (self.refcounts.block_of(base)..).zip((base..table.start).each());
        // The blocks count the table's clusters: without them its record would be of no use.
        let moved = Record::RefcountTable { clusters: plan.table_clusters, first: table.start };
        let made = blocks.clone().map(|(block, cluster)| Record::Block { block, cluster });
        self.log([moved].into_iter().chain(made));
        self.place_refcount_table(table);
        blocks.for_each(|(block, at)| self.add_refcount_block(block, at));
        self.count_once(taken);
        Ok(None)
    }

    /// Has the refcount table lie in these clusters from now on, and lets go of the old ones. That has been
    /// logged, if it has to be.
    pub(crate) fn place_refcount_table(&mut self, clusters: Range<HostCluster>) {
        let (old_at, old_entries) = self.refcounts.table_place();
        let per_cluster = self.geometry.cluster_size() / 8;
        let (at, count) = (self.geometry.host_offset(clusters.start), clusters.cluster_count());
        let entries = count * per_cluster;
        self.refcounts.move_table(at, entries as usize);
        self.header.set_u64(header::REFCOUNT_TABLE_OFFSET as usize, at.0);
        self.header.set_u32(header::REFCOUNT_TABLE_CLUSTERS_OFFSET as usize, count as u32);
        self.write_refcount_table();
        self.territory.set_area(Owner::RefcountTable, clusters);
        self.unmapped(self.geometry.host_cluster(old_at).row(old_entries / per_cluster));
    }

    /// Has the refcount table written as a whole, and its place.
    pub(crate) fn write_refcount_table(&mut self) {
        let (_, entries) = self.refcounts.table_place();
        for block in (0..entries).step_by((self.refcounts.page_bytes() / 8) as usize) {
            let page = Page::RefcountTable(self.refcounts.table_page(block));
            self.graph.touch(page);
            self.graph.require(Rule::table_before_header(page));
        }
        self.graph.touch(Page::Header);
    }
}

/// How a grown refcount table is laid out.
#[derive(Debug, PartialEq, Eq)]
struct TablePlan {
    blocks: u64,
    table_clusters: u64,
}

/// The smallest table, half as large again as the old one at least, that reaches its own end.
fn plan_table(base: u64, old_clusters: u64, per_cluster: u64, per_block: u64) -> TablePlan {
    let mut plan = TablePlan { blocks: 1, table_clusters: old_clusters + old_clusters.div_ceil(2) };
    loop {
        let end = base + plan.blocks + plan.table_clusters;
        let blocks = (end - 1) / per_block - base / per_block + 1;
        let table_clusters = end.div_ceil(per_block * per_cluster).max(plan.table_clusters);
        if plan == (TablePlan { blocks, table_clusters }) {
            return plan;
        }
        plan = TablePlan { blocks: blocks.max(plan.blocks), table_clusters };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grown_table_reaches_its_own_end() {
        // 512-byte clusters: 64 entries a table cluster; 64-bit to 1-bit counts.
        for per_block in [64, 256, 4096] {
            for old in [1, 2, 7, 100, 5000] {
                let base = old * 64 * per_block;
                let plan = plan_table(base, old, 64, per_block);
                let end = base + plan.blocks + plan.table_clusters;
                assert!(plan.table_clusters * 64 * per_block >= end, "{plan:?}");
                assert!(plan.blocks * per_block >= plan.blocks + plan.table_clusters, "{plan:?}");
                assert!(plan.table_clusters > old);
            }
        }
    }
}
