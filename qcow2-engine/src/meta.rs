//! Everything about the top layer's metadata that changes under the one metadata lock.
//!
//! The lock is held for short, synchronous steps and never across an await. What readers need
//! (L1 entries and L2 slices) is not here: it is atomic and read without the lock, but *written*
//! only while it is held.

use crate::{
    alloc::{
        frees::{Due, Frees},
        refcounts::Refcounts,
        reserve::LaneSpace,
        space::Space,
    },
    epoch::Epochs,
    leaks::watch::Watch,
    order::{graph::Graph, rules::Page},
    redo::{Record, RedoLog},
    territory::Territory,
};
use qcow2_format::{Geometry, HostCluster, word};
use std::{ops::Range, sync::Arc};

/// The mutable metadata of the top layer.
pub(crate) struct Meta {
    pub(crate) file: Arc<str>,
    pub(crate) geometry: Geometry,
    pub(crate) graph: Graph,
    pub(crate) refcounts: Refcounts,
    pub(crate) space: Space,
    pub(crate) lanes: Vec<LaneSpace>,
    pub(crate) frees: Frees,
    /// Where live metadata is.
    pub(crate) territory: Territory,
    pub(crate) watch: Watch,
    pub(crate) header: HeaderPage,
    /// Cuts begun so far; the number of the cut under way or of the last one.
    pub(crate) cuts_begun: u64,
    pub(crate) epochs: Arc<Epochs>,
    /// Where changes are remembered for the next process, if anywhere.
    pub(crate) redo: Option<RedoLog>,
}

/// The first bytes of the file as they are, or are about to be, on disk.
pub(crate) struct HeaderPage(pub(crate) Vec<u8>);

impl HeaderPage {
    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.0[at..at + 4].try_into().unwrap_or_default())
    }

    pub(crate) fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.0[at..at + 8].try_into().unwrap_or_default())
    }

    pub(crate) fn set_u64(&mut self, at: usize, value: u64) {
        word::set(&mut self.0, at, value);
    }

    pub(crate) fn set_u32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
}

impl Meta {
    /// R7: remembers a change for the next process, the whole of it or nothing. Room has been asked for under
    /// the same lock.
    pub(crate) fn log(&mut self, change: impl IntoIterator<Item = Record>) {
        if let Some(redo) = &mut self.redo {
            redo.append(change);
        }
    }

    /// Whether the redo log, if there is one, has room for `records`; if not, a cut makes some.
    pub(crate) fn has_log_room(&self, records: u64) -> bool {
        self.redo.as_ref().is_none_or(|redo| redo.room() >= records)
    }

    /// Nothing in memory refers to these clusters any more, as of now: one reference to each is
    /// given back when R5 allows it.
    pub(crate) fn unmapped(&mut self, clusters: Range<HostCluster>) {
        if clusters.is_empty() {
            return;
        }
        self.watch.unmapped(clusters.clone());
        let (cut, epoch) = (self.cuts_begun + 1, self.epochs.advance());
        self.frees.push(clusters, Due { cut, epoch });
    }

    /// Sets the count of a cluster whose page is resident. All counts are changed here.
    pub(crate) fn set_count(&mut self, cluster: HostCluster, count: u64) {
        let page = self.refcounts.set(cluster, count);
        self.graph.touch(Page::Refcount(page));
        self.watch.counted(cluster.row(1));
    }

    /// Lowers the count of a cluster whose page is resident; at 0 the allocator may find it.
    pub(crate) fn lower_count(&mut self, cluster: HostCluster, count: u64) {
        self.set_count(cluster, count);
        if count == 0 {
            self.space.cursor = self.space.cursor.min(cluster);
        }
    }
}
