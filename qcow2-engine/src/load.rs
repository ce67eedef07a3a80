//! Bringing metadata into memory: slices of L2 tables, windows of the flattened chain, refcount pages.
//!
//! One loader per page (`Image::loads`): what is read from a file is never put in place of something
//! newer. A page that nobody loads and that is not in memory cannot change, because a change needs it
//! in memory and what is dirty stays there.

use crate::{
    cache::slices::SliceKey,
    error::Result,
    flat::{Flat, Window},
    image::Image,
    io::{Buf, FileId, Io, exact},
    lane::Lane,
    layer::{Layer, Qcow2Layer},
    open::table_entries,
    order::rules::Page,
    resolve::{Extents, Stop},
};
use futures_util::future::join_all;
use std::ops::Range;

/// `loads` numbers refcount pages above every slice of every layer.
const REFCOUNT_LOADS: u64 = 1 << 63;
/// Bytes of an L2 table that are read at the first look at one of its slices. What is one run of the others
/// then costs no read of its own: a disk that was allocated ahead is known after one read for each 512 MiB
/// (in clusters of 64 KiB).
const NEIGHBOURHOOD_BYTES: u64 = 64 << 10;
/// Layers that are asked for their part of a window at the same time: it may need few of them, and all
/// their slices are in memory until it is done.
const LAYERS_AT_A_TIME: usize = 8;

/// Slices of one L2 table that are read together.
struct Neighbourhood {
    slices: Range<u64>,
    /// Where the first one lies in the file.
    at: u64,
}

impl Neighbourhood {
    fn is_many(&self) -> bool {
        self.slices.end - self.slices.start > 1
    }
}

impl<I: Io> Lane<I> {
    /// Resolves a range, loading what is missing. The answer holds as long as the request that
    /// asks is in flight.
    pub(crate) async fn resolve(&self, at: u64, len: u64) -> Result<Extents> {
        let mut extents = Extents::new();
        loop {
            match self.image().resolve(at, len, &mut extents) {
                Ok(()) => return Ok(extents),
                Err(Stop::Failed(error)) => return Err(error),
                Err(Stop::Miss(key)) => self.load_slice(key).await?,
            }
        }
    }

    /// Brings a slice into memory: of an L2 table, if that exists, or a window.
    pub(crate) async fn load_slice(&self, key: SliceKey) -> Result<()> {
        match &self.image().flat {
            Some(flat) if flat.has(key) => self.load_window(flat, key).await,
            _ => self.load_table_slice(key).await,
        }
    }

    async fn load_table_slice(&self, key: SliceKey) -> Result<()> {
        let image = self.image();
        let layer = image.qcow2_layer(key.layer);
        loop {
            let Some(wanted) = image.neighbourhood(layer, key)? else { return Ok(()) };
            let _load = image.loads.acquire(load_numbers(key.layer, &wanted.slices)).await;
            if image.has_in_memory(key) {
                return Ok(());
            }
            if wanted.is_many() && !image.cache.is_unknown(key) {
                // Whoever held the lock has read the neighbours, and this one is not among the runs.
                continue;
            }
            let len = (wanted.slices.end - wanted.slices.start) * layer.slice_bytes();
            let bytes = self.read_page(layer.file, wanted.at, len).await?;
            let inserted = {
                let _meta = image.meta.lock();
                // The table may have been copied to another place while it was read.
                if layer.slice_location(wanted.slices.start)? != Some(wanted.at) {
                    continue;
                }
                image.insert_neighbourhood(layer, key, &wanted, &bytes)
            };
            if inserted {
                return Ok(());
            }
            // Every slot is dirty: writing back makes room.
            drop(_load);
            self.write_back().await?;
        }
    }

    /// Works a window of the flattened chain out.
    async fn load_window(&self, flat: &Flat, key: SliceKey) -> Result<()> {
        let image = self.image();
        loop {
            let _load = image.loads.acquire(load_numbers(key.layer, &(key.slice..key.slice + 1))).await;
            if image.has_in_memory(key) {
                return Ok(());
            }
            let mut window = flat.window(key);
            let mut next = 1;
            while next < image.layers.len() && !window.is_answered() {
                let end = image.layers.len().min(next + LAYERS_AT_A_TIME);
                self.ask_layers(next..end, &mut window).await?;
                next = end;
            }
            let inserted = {
                let _meta = image.meta.lock();
                image.cache.insert(key, window.words())
            };
            if inserted {
                return Ok(());
            }
            drop(_load);
            self.write_back().await?;
        }
    }

    /// Asks some layers, from the higher to the lower, for what is open in a window.
    async fn ask_layers(&self, indices: Range<usize>, window: &mut Window) -> Result<()> {
        let start = window.start();
        let layers = &self.image().layers[indices.clone()];
        let parts = join_all(layers.iter().map(|layer| async move {
            match layer {
                Layer::Qcow2(layer) if start < layer.size() => self.table_entries(layer, start).await,
                _ => Ok(Part::Nothing),
            }
        }));
        for ((index, layer), part) in indices.zip(layers).zip(parts.await) {
            match (layer, part?) {
                (Layer::Raw(raw), _) => window.ask_raw(index as u16, raw),
                (Layer::Qcow2(layer), Part::Nothing) => window.ask_qcow2(layer, None),
                (Layer::Qcow2(layer), Part::Entries(entries)) => window.ask_qcow2(layer, Some(&entries)),
                (Layer::Qcow2(layer), Part::Damaged) => window.leave_to(layer.index),
            }
        }
        Ok(())
    }

    /// The slice of a lower layer's table that maps a byte, from the file.
    async fn table_entries(&self, layer: &Qcow2Layer, guest: u64) -> Result<Part> {
        let Ok(place) = layer.slice_location(layer.slice_at(guest).0.slice) else { return Ok(Part::Damaged) };
        let Some(at) = place else { return Ok(Part::Nothing) };
        let bytes = self.read_page(layer.file, at, layer.slice_bytes()).await?;
        Ok(Part::Entries(table_entries(&bytes).collect()))
    }

    /// Brings a refcount page into memory.
    pub(crate) async fn load_refcount_page(&self, page: u64) -> Result<()> {
        let image = self.image();
        let _load = image.loads.acquire(REFCOUNT_LOADS + page..REFCOUNT_LOADS + page + 1).await;
        let (at, len) = {
            let meta = image.meta.lock();
            match meta.refcounts.page_at(page)? {
                Some(at) if !meta.refcounts.is_resident(page) => (at, meta.refcounts.page_bytes()),
                _ => return Ok(()),
            }
        };
        let bytes = self.read_page(image.top().file, at, len).await?;
        let mut meta = image.meta.lock();
        let meta = &mut *meta;
        meta.refcounts.insert(page, bytes.into(), |page| meta.graph.holds(Page::Refcount(page)));
        Ok(())
    }

    async fn read_page(&self, file: FileId, at: u64, len: u64) -> Result<Vec<u8>> {
        let buf = Buf::zeroed(len as usize);
        exact::read_zero_extended(self.io(), file, at, &buf)
            .await
            .map_err(|source| self.image().io_error("metadata read", file, at, source))?;
        Ok(buf.to_vec())
    }
}

/// What a layer has of a window.
enum Part {
    Nothing,
    Entries(Vec<u64>),
    /// Its L1 entry cannot be read.
    Damaged,
}

/// The numbers of slices in `Image::loads`.
fn load_numbers(layer: u16, slices: &Range<u64>) -> Range<u64> {
    let base = u64::from(layer) << 48;
    base + slices.start..base + slices.end
}

impl Image {
    fn has_in_memory(&self, key: SliceKey) -> bool {
        let _meta = self.meta.lock();
        self.cache.contains(key)
    }

    /// What is read for a slice: it alone if it was in memory before, else its neighbours, too. `None`
    /// without an L2 table.
    fn neighbourhood(&self, layer: &Qcow2Layer, key: SliceKey) -> Result<Option<Neighbourhood>> {
        let count = match self.cache.is_unknown(key) {
            true => layer.slices_per_table().min(NEIGHBOURHOOD_BYTES / layer.slice_bytes()),
            false => 1,
        };
        let first = key.slice / count * count;
        let place = layer.slice_location(first)?;
        Ok(place.map(|at| Neighbourhood { slices: first..first + count, at }))
    }

    /// Enters a slice, and what costs no slot of its neighbours. Returns false when every slot is dirty.
    fn insert_neighbourhood(
        &self,
        layer: &Qcow2Layer,
        wanted: SliceKey,
        read: &Neighbourhood,
        bytes: &[u8],
    ) -> bool {
        let slices = bytes.chunks_exact(layer.slice_bytes() as usize);
        let mut inserted = true;
        for (slice, bytes) in read.slices.clone().zip(slices) {
            let key = SliceKey { slice, ..wanted };
            if key == wanted {
                inserted = self.cache.insert(key, table_entries(bytes));
            } else if self.cache.is_unknown(key) {
                self.cache.note(key, table_entries(bytes));
            }
        }
        inserted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{OpenOptions, Preallocation, create::create, io::mem::MemFiles};
    use qcow2_format::CreateOptions;
    use std::{
        path::Path,
        pin::pin,
        task::{Context, Poll, Waker},
    };

    /// I/O in memory ends at once.
    fn run<T>(future: impl Future<Output = T>) -> T {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => output,
            Poll::Pending => panic!("waits for nobody"),
        }
    }

    const SLICE: u64 = 512 << 14;

    /// One table of four slices, allocated ahead.
    fn files() -> MemFiles {
        let files = MemFiles::default();
        files.put("it", Vec::new());
        let options = CreateOptions { virtual_size: 4 * SLICE, cluster_bits: 14, ..CreateOptions::default() };
        run(create(&files, &files, Path::new("it"), &options, Preallocation::Metadata)).unwrap();
        files
    }

    fn open(files: &MemFiles) -> Lane<MemFiles> {
        let image = run(Image::open(files, files, Path::new("it"), &OpenOptions::default())).unwrap();
        Lane::new(&image, files.clone(), 2)
    }

    const fn key(slice: u64) -> SliceKey {
        SliceKey { layer: 0, slice }
    }

    #[test]
    fn neighbours_that_are_runs_come_along() {
        let files = files();
        let lane = open(&files);
        run(lane.discard(2 * SLICE, 1 << 14)).unwrap();
        run(lane.close()).unwrap();

        let lane = open(&files);
        let cache = &lane.image().cache;
        run(lane.resolve(SLICE, 4096)).unwrap();
        assert_eq!([0, 1, 2, 3].map(|slice| cache.contains(key(slice))), [true, true, false, true]);
        assert!(!cache.is_unknown(key(2)), "to be read alone");
        run(lane.resolve(2 * SLICE, 4096)).unwrap();
        assert!(cache.contains(key(2)));
    }

    /// A slice that was in memory before is not entered again with what a neighbour's read had.
    #[test]
    fn what_is_known_is_not_overwritten_by_a_neighbours_read() {
        let files = files();
        let lane = open(&files);
        let image = lane.image();
        let read = image.neighbourhood(image.top(), key(0)).unwrap().unwrap();
        let bytes = run(lane.read_page(image.top().file, read.at, 4 * 4096)).unwrap();
        run(lane.discard(3 * SLICE, 1 << 14)).unwrap();
        let changed = image.cache.entry(key(3), 0);
        // As if the read had begun before the change. None of the four is wanted.
        assert!(image.insert_neighbourhood(image.top(), key(4), &read, &bytes));
        assert_eq!(image.cache.entry(key(3), 0), changed);
        assert_ne!(image.cache.entry(key(3), 1), changed, "the others are data");
    }
}
