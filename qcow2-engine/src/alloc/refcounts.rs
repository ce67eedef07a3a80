//! The reference counts of host clusters, as far as they are in memory.
//!
//! The refcount table is always resident; its blocks are cached in pages of up to 4 KiB. Everything
//! here is synchronous and belongs to the metadata lock. A page that is needed but not resident is
//! named to the caller, who loads it and tries again.

use crate::{
    error::{Error, Result},
    paging::Paging,
};
use qcow2_format::{Clusters, Geometry, HostCluster, HostOffset, RefcountTableEntry, refcount, word};
use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, DefaultHasher},
    ops::{ControlFlow, Range},
    sync::Arc,
};

/// The refcount table and the resident pages.
pub(crate) struct Refcounts {
    file: Arc<str>,
    geometry: Geometry,
    /// Raw entries in host byte order, as many as fit in the table's clusters.
    table: Vec<u64>,
    table_at: HostOffset,
    page_bytes: u64,
    /// Evicted in the order in which they lie there, which is the same in each process: a simulated life can be
    /// lived again.
    pages: HashMap<u64, Resident, BuildHasherDefault<DefaultHasher>>,
    /// Pages to keep, if not dirty.
    limit: usize,
    /// Pages in which no count was zero when they were looked through, a bit each, and none was set to zero
    /// since. Without it a single freed cluster would have the allocator read all pages between it and the
    /// next free one again.
    full: Vec<u64>,
}

struct Resident {
    bytes: Box<[u8]>,
    used: bool,
}

/// An answer that may need a page first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count<T> {
    Is(T),
    /// Load this page and ask again.
    Needs(u64),
}

impl<T> Count<T> {
    /// What follows from an answer.
    pub(crate) fn map<U>(self, follow: impl FnOnce(T) -> U) -> Count<U> {
        match self {
            Self::Is(answer) => Count::Is(follow(answer)),
            Self::Needs(page) => Count::Needs(page),
        }
    }
}

/// Where in the table a cluster's count is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a block that exists; the page of it.
    Page(u64),
    /// The table has room for the block, but there is none: all its counts are zero.
    NoBlock { block: u64 },
    /// The table ends before it.
    BeyondTable,
}

impl Refcounts {
    pub(crate) fn new(
        file: Arc<str>,
        geometry: Geometry,
        table: Vec<u64>,
        table_at: HostOffset,
        paging: Paging,
        limit: usize,
    ) -> Self {
        let page_bytes = geometry.cluster_size().min(paging.page_bytes);
        Self {
            file,
            geometry,
            table,
            table_at,
            page_bytes,
            pages: HashMap::default(),
            limit,
            full: Vec::new(),
        }
    }

    /// Bytes of a page.
    pub(crate) fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Clusters that a page counts.
    pub(crate) fn clusters_per_page(&self) -> u64 {
        self.page_bytes() * 8 / u64::from(self.geometry.refcount_bits())
    }

    pub(crate) fn pages_per_block(&self) -> u64 {
        self.geometry.cluster_size() / self.page_bytes()
    }

    /// The pages of a block.
    pub(crate) fn block_pages(&self, block: u64) -> Range<u64> {
        block * self.pages_per_block()..(block + 1) * self.pages_per_block()
    }

    /// The page of the refcount *table* that holds a block's entry.
    pub(crate) fn table_page(&self, block: u64) -> u64 {
        block * 8 / self.page_bytes()
    }

    /// Where the table lies, and its entries.
    pub(crate) fn table_place(&self) -> (HostOffset, u64) {
        (self.table_at, self.table.len() as u64)
    }

    pub(crate) fn page_of(&self, cluster: HostCluster) -> u64 {
        cluster.0 / self.clusters_per_page()
    }

    /// The pages that count clusters in a row, of which there is one at least.
    pub(crate) fn pages_of(&self, clusters: &Range<HostCluster>) -> Range<u64> {
        self.page_of(clusters.start)..(clusters.end.0 - 1) / self.clusters_per_page() + 1
    }

    pub(crate) fn block_of(&self, cluster: HostCluster) -> u64 {
        cluster.0 / self.geometry.refcounts_per_block()
    }

    /// The blocks that count clusters in a row, of which there is one at least.
    pub(crate) fn blocks_of(&self, clusters: &Range<HostCluster>) -> Range<u64> {
        self.block_of(clusters.start)..(clusters.end.0 - 1) / self.geometry.refcounts_per_block() + 1
    }

    /// The first cluster that a page counts.
    pub(crate) fn first_in_page(&self, page: u64) -> HostCluster {
        HostCluster(page * self.clusters_per_page())
    }

    /// The first cluster that a block counts.
    pub(crate) fn first_in_block(&self, block: u64) -> HostCluster {
        HostCluster(block * self.geometry.refcounts_per_block())
    }

    /// Where in its page a cluster's count is.
    fn index_in_page(&self, cluster: HostCluster) -> usize {
        (cluster.0 % self.clusters_per_page()) as usize
    }

    /// Where the block lies in the file, if it exists.
    pub(crate) fn block_at(&self, block: u64) -> Result<Option<HostOffset>> {
        let raw = usize::try_from(block).ok().and_then(|block| self.table.get(block)).copied().unwrap_or(0);
        RefcountTableEntry::decode(raw, &self.geometry).map_err(|source| Error::Corrupt {
            file: Arc::clone(&self.file),
            table: "refcount table",
            at: self.geometry.host_offset(self.first_in_block(block)).0,
            source,
        })
    }

    /// The number of the first block after which there is none.
    pub(crate) fn blocks_end(&self) -> u64 {
        self.table.iter().rposition(|&raw| raw != 0).map_or(0, |last| last as u64 + 1)
    }

    /// Where a page lies in the file, if its block exists.
    pub(crate) fn page_at(&self, page: u64) -> Result<Option<u64>> {
        let block = self.block_at(page / self.pages_per_block())?;
        Ok(block.map(|at| at.0 + page % self.pages_per_block() * self.page_bytes()))
    }

    /// Where a cluster's count is to be found.
    pub(crate) fn place(&self, cluster: HostCluster) -> Result<Place> {
        let block = self.block_of(cluster);
        Ok(if block >= self.table.len() as u64 {
            Place::BeyondTable
        } else if self.block_at(block)?.is_none() {
            Place::NoBlock { block }
        } else {
            Place::Page(self.page_of(cluster))
        })
    }

    /// The count of a cluster.
    pub(crate) fn get(&mut self, cluster: HostCluster) -> Result<Count<u64>> {
        let Place::Page(page) = self.place(cluster)? else { return Ok(Count::Is(0)) };
        let index = self.index_in_page(cluster);
        let order = self.geometry.refcount_order;
        Ok(match self.pages.get_mut(&page) {
            None => Count::Needs(page),
            Some(resident) => {
                resident.used = true;
                Count::Is(refcount::get(&resident.bytes, order, index))
            }
        })
    }

    /// Sets the count of a cluster whose page is resident; returns the page, to be marked dirty.
    ///
    /// # Panics
    /// When the page is not resident: callers asked for the count under the same lock.
    pub(crate) fn set(&mut self, cluster: HostCluster, value: u64) -> u64 {
        let page = self.page_of(cluster);
        let index = self.index_in_page(cluster);
        let order = self.geometry.refcount_order;
        let resident = self.pages.get_mut(&page).expect("the count was read under the same lock");
        refcount::set(&mut resident.bytes, order, index, value);
        if value == 0 {
            self.note_free(page);
        }
        page
    }

    /// The first page from `page` on that may have a free cluster.
    pub(crate) fn next_not_full(&self, page: u64) -> u64 {
        let mut word = (page / 64) as usize;
        let mut below = (1 << (page % 64)) - 1;
        while let Some(&full) = self.full.get(word) {
            match (full | below).trailing_ones() {
                64 => (word, below) = (word + 1, 0),
                first => return word as u64 * 64 + u64::from(first),
            }
        }
        page.max(word as u64 * 64)
    }

    fn note_full(&mut self, page: u64) {
        let word = (page / 64) as usize;
        if word >= self.full.len() {
            self.full.resize(word + 1, 0);
        }
        self.full[word] |= 1 << (page % 64);
    }

    fn note_free(&mut self, page: u64) {
        if let Some(full) = self.full.get_mut((page / 64) as usize) {
            *full &= !(1 << (page % 64));
        }
    }

    /// The first run of free clusters at or after `from` in a resident page, at most `max` long.
    pub(crate) fn free_run(
        &mut self,
        page: u64,
        from: HostCluster,
        max: u64,
    ) -> Count<Option<Range<HostCluster>>> {
        let (first, end) = (self.first_in_page(page), self.first_in_page(page + 1));
        let order = self.geometry.refcount_order;
        let Some(resident) = self.pages.get_mut(&page) else { return Count::Needs(page) };
        resident.used = true;
        let is_free =
            |cluster: &HostCluster| refcount::get(&resident.bytes, order, (*cluster - first) as usize) == 0;
        let Some(start) = (from.max(first)..end).each().find(is_free) else {
            if !(first..from).each().any(|cluster| is_free(&cluster)) {
                self.note_full(page);
            }
            return Count::Is(None);
        };
        let end = end.min(HostCluster(start.0.saturating_add(max)));
        let stop = (start..end).each().find(|cluster| !is_free(cluster));
        Count::Is(Some(start..stop.unwrap_or(end)))
    }

    /// A page that was read from the file becomes resident. `keep` says which pages may not go.
    pub(crate) fn insert(&mut self, page: u64, bytes: Box<[u8]>, keep: impl Fn(u64) -> bool) {
        if self.pages.len() >= self.limit {
            self.evict(keep);
        }
        self.pages.entry(page).or_insert(Resident { bytes, used: true });
    }

    pub(crate) fn is_resident(&self, page: u64) -> bool {
        self.pages.contains_key(&page)
    }

    /// The bytes of a resident page.
    pub(crate) fn page_copy(&self, page: u64) -> Option<Vec<u8>> {
        self.pages.get(&page).map(|resident| resident.bytes.to_vec())
    }

    /// The bytes of a page of the table.
    pub(crate) fn table_page_copy(&self, page: u64) -> Vec<u8> {
        let per_page = (self.page_bytes() / 8) as usize;
        let first = page as usize * per_page;
        word::to_bytes(self.table[first..first + per_page].iter().copied())
    }

    /// Some of the table's entries.
    pub(crate) fn table_entries(&self, range: Range<u64>) -> &[u64] {
        self.table.get(range.start as usize..range.end as usize).unwrap_or_default()
    }

    /// Enters a new, empty block at `at`; its pages are resident from now on. `keep` says which others may
    /// not go.
    pub(crate) fn add_block(&mut self, block: u64, at: HostOffset, keep: impl Fn(u64) -> bool) {
        let bytes = self.page_bytes() as usize;
        let pages = self.block_pages(block);
        for page in pages.clone() {
            self.insert(page, vec![0; bytes].into(), |other| pages.contains(&other) || keep(other));
        }
        self.table[block as usize] = RefcountTableEntry::encode(Some(at));
    }

    /// Moves the table to `at` with room for `entries`.
    pub(crate) fn move_table(&mut self, at: HostOffset, entries: usize) {
        self.table.resize(entries, 0);
        self.table_at = at;
    }

    /// Second chance over the clean pages, one eighth of them at a time.
    fn evict(&mut self, keep: impl Fn(u64) -> bool) {
        let goal = (self.limit / 8).max(1);
        let mut victims = Vec::with_capacity(goal);
        let _ = self.pages.iter_mut().try_for_each(|(&page, resident)| {
            if !std::mem::take(&mut resident.used) && !keep(page) {
                victims.push(page);
            }
            if victims.len() < goal { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        for page in victims {
            self.pages.remove(&page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_without_free_clusters_is_passed_over_until_one_is_free() {
        // 64 counts of 64 bits in a page.
        let geometry = Geometry {
            version: qcow2_format::Version::V3,
            cluster_bits: 9,
            refcount_order: 6,
            extended_l2: false,
            virtual_size: 1 << 20,
        };
        let table = vec![512; 200];
        let mut counts = Refcounts::new("image".into(), geometry, table, HostOffset(0), Paging::default(), 8);
        let full: Box<[u8]> = vec![1; 512].into();
        for page in [0, 1, 63, 64, 130] {
            counts.insert(page, full.clone(), |_| true);
            assert_eq!(counts.free_run(page, HostCluster(0), 8), Count::Is(None));
        }
        let next = [0, 1, 2, 63, 64, 130, 1000].map(|page| counts.next_not_full(page));
        assert_eq!(next, [2, 2, 2, 65, 65, 131, 1000]);
        (65..128).for_each(|page| counts.note_full(page));
        assert_eq!(counts.next_not_full(63), 128);
        counts.set(HostCluster(64 * 64 + 5), 0);
        assert_eq!(counts.next_not_full(63), 64);
        assert_eq!(counts.free_run(64, HostCluster(64 * 64 + 6), 8), Count::Is(None));
        assert_eq!(
            counts.next_not_full(63),
            64,
            "what is free lies before the place from which it was looked through"
        );
    }
}
