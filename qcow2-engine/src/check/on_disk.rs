//! The refcounts as they are on disk: which blocks can be trusted, and the counts in them.

use crate::{error::Result, inspect::ImageFile, io::Io, paging::MAX_PAGE};
use qcow2_format::{Geometry, HostCluster, refcount};
use std::collections::{BTreeMap, HashMap};

/// Bytes of pages kept in memory: the counts of 1 TiB at clusters of 64 KiB, of 8 GiB at the smallest.
const MAX_BYTES: u64 = 32 << 20;

/// Random access to the counts on disk, through a bounded cache.
pub(super) struct CountsOnDisk {
    geometry: Geometry,
    /// Table index → cluster of each block that is where a block can be.
    pub(super) blocks: BTreeMap<u64, HostCluster>,
    /// File offset → bytes.
    pages: HashMap<u64, Vec<u8>>,
}

impl CountsOnDisk {
    pub(super) fn new(geometry: Geometry, blocks: BTreeMap<u64, HostCluster>) -> Self {
        Self { geometry, blocks, pages: HashMap::new() }
    }

    /// Whether a block counts the cluster.
    pub(super) fn has_block(&self, cluster: HostCluster) -> bool {
        self.blocks.contains_key(&self.geometry.refcount_table_index(cluster))
    }

    /// The refcount of a cluster; 0 without a block.
    pub(super) async fn get(&mut self, file: &ImageFile<'_, impl Io>, cluster: HostCluster) -> Result<u64> {
        let order = self.geometry.refcount_order;
        let Some(&block) = self.blocks.get(&self.geometry.refcount_table_index(cluster)) else {
            return Ok(0);
        };
        let page_bytes = self.geometry.cluster_size().min(MAX_PAGE);
        let per_page = (page_bytes * 8) >> order;
        let in_block = self.geometry.refcount_block_index(cluster);
        let at = self.geometry.host_offset(block).0 + in_block / per_page * page_bytes;
        if !self.pages.contains_key(&at) {
            if self.pages.len() as u64 >= MAX_BYTES / page_bytes {
                self.pages.clear();
            }
            let bytes = file.read(at, page_bytes).await?;
            self.pages.insert(at, bytes);
        }
        let index = (in_block % per_page) as usize;
        Ok(self.pages.get(&at).map_or(0, |page| refcount::get(page, order, index)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Preallocation, create,
        exec::run_at_once,
        io::{Access, mem::MemFiles},
    };
    use qcow2_format::CreateOptions;
    use std::path::Path;

    /// As many pages were kept, whatever their size, and of small ones too few: where the clusters of a disk
    /// of 2 GiB lie in any order, nearly each entry had its page read again.
    #[test]
    fn what_is_kept_of_small_pages_is_as_much_as_of_large_ones() {
        for (cluster_bits, kept) in [(9, 65536), (16, 8192)] {
            let (files, path) = (MemFiles::default(), Path::new("image"));
            files.put("image", Vec::new());
            let options = CreateOptions { virtual_size: 1 << 20, cluster_bits, ..CreateOptions::default() };
            run_at_once(create::create(&files, &files, path, &options, Preallocation::Off)).unwrap();
            let file = run_at_once(ImageFile::open(&files, &files, path, Access::ReadOnly)).unwrap();
            let geometry = file.geometry();
            // What lies behind the end of the file reads as zeros.
            let blocks = (0..kept + 1).map(|block| (block, HostCluster(block))).collect();
            let mut counts = CountsOnDisk::new(geometry, blocks);
            let mut get = |block: u64| {
                let cluster = HostCluster(block * geometry.refcounts_per_block());
                run_at_once(counts.get(&file, cluster)).unwrap();
                counts.pages.len() as u64
            };
            assert_eq!((0..kept).map(&mut get).last(), Some(kept));
            assert_eq!(get(kept), 1, "no more than that");
        }
    }
}
