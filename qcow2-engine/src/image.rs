//! An open image: the state that all lanes share.

use crate::{
    autoclear::Autoclear,
    cache::slices::SliceCache,
    damage::Damage,
    epoch::Epochs,
    error::{Error, Result},
    flat::Flat,
    flush::Flusher,
    io::FileId,
    layer::{Layer, Qcow2Layer},
    locks::Locks,
    meta::Meta,
    paging::Paging,
    redo::RedoLog,
    resolve::{Chain, Extents, Stop},
    territory::Sieve,
    unpack::{Unpacked, Workers},
};
use parking_lot::Mutex;
use qcow2_format::{Geometry, Header};
use std::{
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// A QCOW2 image with its backing chain, open for reading or for reading and writing.
///
/// `Send + Sync`. Look-ups that hit the cache take no lock; changes to the metadata are short
/// critical sections under one lock that is never held across an await.
pub struct Image {
    /// The chain, top first; the top is always QCOW2.
    pub(crate) layers: Vec<Layer>,
    pub(crate) cache: SliceCache,
    /// The layers below the top, if there is something to flatten.
    pub(crate) flat: Option<Flat>,
    pub(crate) meta: Mutex<Meta>,
    pub(crate) epochs: Arc<Epochs>,
    pub(crate) flusher: Flusher,
    pub(crate) autoclear: Autoclear,
    /// A hole could not be punched, and that was said.
    pub(crate) has_told_of_holes: AtomicBool,
    /// A count of freed clusters could not be read, and that was said.
    pub(crate) has_told_of_counts: AtomicBool,
    /// An entry that made no sense was thrown away, and that was said.
    pub(crate) has_told_of_entries: AtomicBool,
    /// A search for leaks has come to its end.
    pub(crate) is_searched: AtomicBool,
    /// Which clusters may hold metadata.
    pub(crate) sieve: Arc<Sieve>,
    pub(crate) damage: Damage,
    /// There are snapshots whose tables cannot be found: what they refer to is not known.
    pub(crate) has_lost_snapshots: bool,
    /// A bit for each L1 entry whose table is known to be the active mapping's alone.
    pub(crate) vouched: Box<[AtomicU64]>,
    pub(crate) unpacked: Unpacked,
    /// Threads that decompress, if there are any.
    pub(crate) workers: OnceLock<Workers>,
    pub(crate) read_only: bool,
    /// The header as it was when the image was opened.
    pub(crate) header: Header,
    /// The file's length when it was opened: never cut shorter than that.
    pub(crate) opened_len: u64,
    /// Clusters that a lane reserves at a time.
    pub(crate) extent_clusters: u64,
    pub(crate) paging: Paging,
    pub(crate) locks: Locks,
}

/// What is known of a barrier that has failed in another process.
pub(crate) const FAILED_BEFORE: &str = "fdatasync in a process that has ended";

impl Image {
    /// Size of the virtual disk in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.geometry().virtual_size
    }

    /// Geometry of the top layer.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.top().geometry
    }

    /// Whether the image was opened for reading only.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether clusters that are discarded show what a backing file has: such an image of version 2
    /// cannot discard.
    #[must_use]
    pub fn can_discard(&self) -> bool {
        self.has_zero_clusters() || self.layers.len() == 1
    }

    /// Whether an entry can say that a cluster reads as zeros and keeps its place. In version 2 zeros have to
    /// be written.
    #[must_use]
    pub fn has_zero_clusters(&self) -> bool {
        self.geometry().version == qcow2_format::Version::V3
    }

    /// Whether a search for leaks ([`Lane::reclaim_leaks`](crate::Lane::reclaim_leaks)) has come to its end since the
    /// image was opened.
    #[must_use]
    pub fn is_searched(&self) -> bool {
        self.is_searched.load(Ordering::Relaxed)
    }

    /// The names of the chain's files, top first.
    pub fn chain(&self) -> impl Iterator<Item = &str> {
        self.layers.iter().map(|layer| &**layer.name())
    }

    /// The chain's files, top first.
    pub fn files(&self) -> impl Iterator<Item = FileId> {
        self.layers.iter().map(Layer::file)
    }

    /// From now on changes of the mapping are remembered in `log`, which is empty: what it held has
    /// been replayed. If it says that a barrier of another process has failed the image accepts nothing, as it
    /// did not there. To be called before the first request.
    pub fn keep_redo_log(&self, log: RedoLog) {
        if log.has_failed() {
            self.flusher.poison(self.poisoned_by(FAILED_BEFORE));
        }
        self.flusher.note_in(log.barriers());
        self.meta.lock().redo = Some(log);
    }

    /// Switches an ordering rule off, to see that its absence is noticed.
    #[cfg(feature = "sim")]
    pub fn disable_rule(&self, rule: crate::RuleName) {
        let mut meta = self.meta.lock();
        meta.graph.disable(rule);
        if let (crate::RuleName::RedoBeforeAcknowledgement, Some(redo)) = (rule, &mut meta.redo) {
            redo.mute();
        }
        meta.watch.disable(rule);
    }

    /// Whether a mutation check has switched the rule off.
    pub(crate) fn is_disabled(&self, rule: crate::RuleName) -> bool {
        cfg!(any(test, feature = "sim")) && self.meta.lock().graph.is_disabled(rule)
    }

    #[inline]
    pub(crate) fn top(&self) -> &Qcow2Layer {
        self.qcow2_layer(0)
    }

    #[inline]
    pub(crate) fn qcow2_layer(&self, index: u16) -> &Qcow2Layer {
        match &self.layers[usize::from(index)] {
            Layer::Qcow2(layer) => layer,
            Layer::Raw(_) => unreachable!("slices and compressed clusters belong to QCOW2 layers"),
        }
    }

    pub(crate) fn as_chain(&self) -> Chain<'_> {
        Chain { layers: &self.layers, flat: self.flat.as_ref(), cache: &self.cache }
    }

    /// Resolves a range of the virtual disk from where `extents` ends, without waiting.
    pub(crate) fn resolve(&self, at: u64, len: u64, extents: &mut Extents) -> Result<(), Stop> {
        self.as_chain().resolve(at, len, extents)
    }

    /// See [`Chain::top_has`].
    pub(crate) fn top_has(&self, at: u64, len: u64) -> Result<(bool, u64), Stop> {
        self.as_chain().top_has(at, len)
    }

    pub(crate) fn io_error(
        &self,
        operation: &'static str,
        file: FileId,
        at: impl Into<Option<u64>>,
        source: io::Error,
    ) -> Error {
        let layer = self.layers.iter().find(|layer| layer.file() == file);
        let name = layer.map_or_else(|| Arc::from("?"), |layer| Arc::clone(layer.name()));
        Error::Io { operation, file: name, at: at.into(), source: Arc::new(source) }
    }
}
