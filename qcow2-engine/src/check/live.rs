//! A survey of an image that is being served: the search for leaks (`leaks/`) counts references with
//! the same code as a check, but from a moving picture.
//!
//! What may have another place by the time that it is read is taken from memory, where it is always true: the
//! refcount table and the active L1 table. A part of an L2 table counts only if its L1 entry is the same
//! after the read. In return it teaches the cache which slices are runs, which requests and the next survey
//! then need not read. All else that is read does not move while an image is served: snapshots and what only
//! they refer to, bitmaps, refcount blocks. Which entries may be behind what is in memory, and why that does
//! no harm, is told in `leaks/mod.rs`.

use super::{
    findings::{Finding, Owner, Problem, Remedy, Severity},
    survey::Survey,
    tables::{L1Place, Walk},
    window::Window,
};
use crate::{
    cache::{page::TablePage, slices::SliceKey},
    error::{Error, Result},
    image::Image,
    inspect::ImageFile,
    io::Io,
    leaks::Pace,
};
use qcow2_format::{Defects, HostCluster, L1Entry, Mapping, geometry::TABLE_ENTRY_BYTES};
use std::{cell::Cell, ops::Range, sync::Arc};

/// Entries of a refcount table that are copied while the metadata lock is held.
const LOCKED_ENTRIES: u64 = 8 << 10;

/// A served image, and when to rest while it is read.
pub(crate) struct Live<'a> {
    image: &'a Image,
    pace: &'a dyn Pace,
    is_stopped: Cell<bool>,
}

/// How a survey of a served image ended.
pub(crate) enum Counted {
    /// With every reference to the window's clusters.
    All(Window),
    /// Because it was told to.
    Stopped,
    /// With something that makes no sense, in words.
    Doubt(String),
}

/// Counts the references to a window of a served image's clusters.
pub(crate) async fn count<I: Io>(io: &I, image: &Image, pace: &dyn Pace, window: Window) -> Counted {
    let live = Live { image, pace, is_stopped: Cell::new(false) };
    let file = ImageFile::served(io, image, live);
    let mut survey = Survey::live(&file, window);
    survey.count_references(&file).await;
    if file.live.as_ref().is_some_and(|live| live.is_stopped.get()) {
        return Counted::Stopped;
    }
    survey.bound_tables(&file);
    match (survey.window.take(), survey.findings.list.first()) {
        (Some(window), None) if !survey.doubts.hides_references => Counted::All(window),
        (_, Some(finding)) => Counted::Doubt(finding.to_string()),
        _ => Counted::Doubt("a structure that cannot be used hides references".to_owned()),
    }
}

impl<'a, I: Io> ImageFile<'a, I> {
    /// The top file of a served image.
    fn served(io: &'a I, image: &Image, live: Live<'a>) -> Self {
        let mut header = image.header.clone();
        let (table, entries, file_len) = {
            let meta = image.meta.lock();
            let (table, entries) = meta.refcounts.table_place();
            (table, entries, meta.space.file_end)
        };
        header.refcount_table = table;
        header.refcount_table_clusters =
            (entries * TABLE_ENTRY_BYTES / image.geometry().cluster_size()) as u32;
        let top = image.top();
        Self {
            io,
            is_hole: Box::new(|_, _| false),
            file: top.file,
            name: Arc::clone(&top.name),
            header,
            defects: Defects::default(),
            file_len,
            live: Some(live),
        }
    }

    /// Rests, if it should; an error where it should not go on.
    pub(crate) async fn rest(&self) -> Result<()> {
        let Some(live) = &self.live else { return Ok(()) };
        if !live.is_stopped.get() && live.pace.rest().await {
            return Ok(());
        }
        live.is_stopped.set(true);
        Err(Error::NotSupported { file: Arc::clone(self.name()), reason: "the search was stopped" })
    }

    /// Some entries of an L1 table.
    pub(super) async fn l1_entries(&self, l1: &L1Place, range: Range<u64>) -> Result<Vec<u64>> {
        if let (Some(live), Owner::ActiveL1) = (&self.live, l1.owner) {
            self.rest().await?;
            return Ok(range.map(|index| live.image.top().l1.get(index)).collect());
        }
        self.read_entries(l1.at + range.start * TABLE_ENTRY_BYTES, range.end - range.start).await
    }

    /// The first `count` entries of the refcount table.
    pub(super) async fn refcount_table_entries(&self, count: u64) -> Result<Vec<u64>> {
        let Some(live) = &self.live else {
            return self.read_entries(self.header.refcount_table.0, count).await;
        };
        let mut entries = Vec::with_capacity(count as usize);
        while (entries.len() as u64) < count {
            self.rest().await?;
            let at = entries.len() as u64;
            let meta = live.image.meta.lock();
            entries.extend(meta.refcounts.table_entries(at..count.min(at + LOCKED_ENTRIES)));
        }
        Ok(entries)
    }

    /// Whether a part of an L2 table is known to refer to nothing in a window. Then it is taken note of.
    pub(super) fn passes_by(&self, walk: &Walk, window: &mut Window) -> bool {
        let Some(live) = self.live.as_ref().filter(|_| walk.is_active) else { return false };
        live.slices(walk)
            .all(|slice| live.data_in_row(slice).is_some_and(|clusters| window.pass_by(&clusters)))
    }

    /// A part of an L2 table; `None` where the file has a hole. The table of the active mapping may be
    /// replaced by a copy, and its old place be used for something else, while it is read: then the
    /// copy is read, whose entries are the same or newer.
    pub(super) async fn l2_part(&self, walk: &Walk) -> Result<Option<Vec<u8>>> {
        let Some(live) = self.live.as_ref().filter(|_| walk.is_active) else {
            return self.read_part(walk.start(&self.geometry()), walk.len).await;
        };
        loop {
            self.rest().await?;
            let entry = live.image.top().l1.get(walk.l1_index);
            let damaged = |source| Error::Corrupt {
                file: Arc::clone(self.name()),
                table: "L1",
                at: self.geometry().host_offset(walk.table).0,
                source,
            };
            let table = L1Entry::decode(entry, &self.geometry()).map_err(damaged)?;
            let L1Entry::Table { offset, .. } = table else { return Ok(None) };
            let slices = live.slices(walk);
            if let Some(part) = live.known_part(&slices) {
                return Ok(Some(part));
            }
            // Whoever wants one of these slices now waits for this read, and mostly needs none of his own.
            let _loads = live.image.locks.loads.acquire(slices.clone()).await;
            let absent = live.absent(slices);
            let part = self.read_now(offset.0 + walk.skip, walk.len).await?;
            if live.image.top().l1.get(walk.l1_index) == entry {
                live.learn(&absent, offset.0 + walk.skip, &part);
                return Ok(Some(part));
            }
        }
    }
}

impl Live<'_> {
    /// The slices of the active mapping that a walk reads.
    fn slices(&self, walk: &Walk) -> Range<u64> {
        let top = self.image.top();
        let first = walk.l1_index * top.slices_per_table() + walk.skip / top.slice_bytes;
        first..first + walk.len.div_ceil(top.slice_bytes)
    }

    /// The bytes of slices all of which are runs: a run in memory is as on disk.
    fn known_part(&self, slices: &Range<u64>) -> Option<Vec<u8>> {
        let len = self.image.top().slice_entries() as usize;
        let mut part = Vec::with_capacity(len * 8 * (slices.end - slices.start) as usize);
        for slice in slices.clone() {
            let run = self.image.cache.run(SliceKey { layer: 0, slice })?;
            part.extend((0..len).flat_map(|index| run.entry(index).to_be_bytes()));
        }
        Some(part)
    }

    /// The host clusters to which the entries of a slice refer, where the slice is known to be nothing but
    /// data in a row, or nothing at all.
    fn data_in_row(&self, slice: u64) -> Option<Range<HostCluster>> {
        let geometry = self.image.geometry();
        let run = self.image.cache.run(SliceKey { layer: 0, slice })?;
        let last = run.entry(self.image.top().slice_entries() as usize - 1);
        // What is between two entries of a run differs from them in its offset only.
        match [run.entry(0), last].map(|raw| Mapping::decode(raw, geometry)) {
            [Ok(Mapping::Unallocated), Ok(Mapping::Unallocated)] => Some(HostCluster(0).row(0)),
            [Ok(Mapping::Data { host: first, .. }), Ok(Mapping::Data { host: last, .. })] => {
                Some(geometry.host_cluster(first)..geometry.host_cluster(last) + 1)
            }
            _ => None,
        }
    }

    /// Those that are not in memory. As long as nobody loads them they stay out of it, and cannot change.
    fn absent(&self, slices: Range<u64>) -> Vec<SliceKey> {
        let _meta = self.image.meta.lock();
        let keys = slices.map(|slice| SliceKey { layer: 0, slice });
        keys.filter(|&key| !self.image.cache.contains(key)).collect()
    }

    /// Remembers those of a part's slices that are runs: requests then need not read them.
    fn learn(&self, absent: &[SliceKey], at: u64, part: &[u8]) {
        let (top, _meta) = (self.image.top(), self.image.meta.lock());
        for &key in absent {
            // The table may be at another place by now.
            let place = top.slice_location(key.slice).ok().flatten().and_then(|slice| slice.checked_sub(at));
            let bytes = place.and_then(|start| part.get(start as usize..)?.get(..top.slice_bytes as usize));
            if let Some(bytes) = bytes {
                self.image.cache.learn(key, &TablePage::of(bytes));
            }
        }
    }
}

impl Survey {
    /// A survey that counts into a window, and for which any finding is the end.
    fn live(file: &ImageFile<'_, impl Io>, window: Window) -> Self {
        let mut survey = Self::new(file, 1);
        survey.window = Some(window);
        // The file grows meanwhile: what lies beyond its end is found at the end.
        survey.rules.file_len = u64::MAX;
        survey
    }

    /// Whether to go no further.
    pub(super) fn is_over(&mut self, file: &ImageFile<'_, impl Io>) -> bool {
        self.bound_tables(file);
        self.window.is_some() && (self.doubts.hides_references || !self.findings.is_clean())
    }

    /// Tables that nothing shares cannot take more than the file: with that the work is bounded, too.
    /// And nothing is referred to beyond its end.
    fn bound_tables(&mut self, file: &ImageFile<'_, impl Io>) {
        let (Some(window), Some(live)) = (&self.window, &file.live) else { return };
        let geometry = &self.rules.geometry;
        let len = live.image.meta.lock().space.file_end;
        let referred = geometry.host_offset(window.referred_end).0;
        let problem = if window.sole_bytes > len.saturating_add(geometry.cluster_size()) {
            Problem::Structure(Error::NotSupported {
                file: Arc::clone(file.name()),
                reason: "its tables claim more clusters than the file has",
            })
        } else if referred > len.next_multiple_of(geometry.cluster_size()) {
            Problem::BeyondFile { owner: Owner::Data, host: referred, len: 0 }
        } else {
            return;
        };
        let (severity, table) = (Severity::Corruption, Owner::Header);
        self.findings.push(Finding { severity, table, at: 0, problem, remedy: Remedy::None("not searched") });
    }
}
