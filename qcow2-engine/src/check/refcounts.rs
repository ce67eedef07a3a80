//! The refcounts as they are on disk: which blocks can be trusted, and the counts in them.

use crate::{error::Result, inspect::ImageFile, io::Io, paging::MAX_PAGE};
use qcow2_format::{Geometry, refcount};
use std::collections::{BTreeMap, HashMap};

/// Pages kept in memory: 16 MiB of them.
const MAX_PAGES: usize = 4096;

/// Random access to the counts on disk, through a bounded cache.
pub(super) struct Refcounts {
    geometry: Geometry,
    /// Table index → file offset of each block that is where a block can be.
    pub(super) blocks: BTreeMap<u64, u64>,
    /// File offset → bytes.
    pages: HashMap<u64, Vec<u8>>,
}

impl Refcounts {
    pub(super) fn new(geometry: Geometry, blocks: BTreeMap<u64, u64>) -> Self {
        Self { geometry, blocks, pages: HashMap::new() }
    }

    /// Whether a block counts the cluster.
    pub(super) fn has_block(&self, cluster: u64) -> bool {
        self.blocks.contains_key(&self.geometry.refcount_table_index(cluster))
    }

    /// The refcount of a cluster; 0 without a block.
    pub(super) async fn get(&mut self, file: &ImageFile<'_, impl Io>, cluster: u64) -> Result<u64> {
        let order = self.geometry.refcount_order;
        let Some(&block) = self.blocks.get(&self.geometry.refcount_table_index(cluster)) else {
            return Ok(0);
        };
        let page_bytes = self.geometry.cluster_size().min(MAX_PAGE);
        let per_page = (page_bytes * 8) >> order;
        let in_block = self.geometry.refcount_block_index(cluster);
        let at = block + in_block / per_page * page_bytes;
        if !self.pages.contains_key(&at) {
            if self.pages.len() >= MAX_PAGES {
                self.pages.clear();
            }
            let bytes = file.read(at, page_bytes).await?;
            self.pages.insert(at, bytes);
        }
        let index = (in_block % per_page) as usize;
        Ok(self.pages.get(&at).map_or(0, |page| refcount::get(page, order, index)))
    }
}
