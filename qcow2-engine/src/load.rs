//! Bringing metadata into memory: slices of L2 tables, windows of the flattened chain, refcount pages.
//!
//! One loader per page (`Locks::loads`): what is read from a file is never put in place of something
//! newer. A page that nobody loads and that is not in memory cannot change, because a change needs it
//! in memory and what is dirty stays there.

use crate::{
    alloc::refcounts::Count,
    cache::{page::TablePage, slices::SliceKey},
    error::{Error, Result},
    flat::{Flat, Window},
    image::Image,
    io::{Buf, FileId, Io, exact},
    lane::Lane,
    layer::{Layer, Qcow2Layer},
    meta::Meta,
    order::rules::Page,
    paging::MAX_PAGE,
    resolve::{Extents, Stop},
};
use futures_util::future::join_all;
use std::ops::Range;

/// `loads` numbers refcount pages above every slice of every layer.
const REFCOUNT_LOADS: u64 = 1 << 63;
/// Layers that are asked for their part of a window at the same time: it may need few of them, and all
/// their slices are in memory until it is done.
const LAYERS_AT_A_TIME: usize = 8;

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

    /// Whether the image itself has the bytes from `at` on, and not what is below it, and for how many of `len` that is
    /// so.
    pub(crate) async fn top_has(&self, at: u64, len: u64) -> Result<(bool, u64)> {
        let mut known = None;
        let mut done = 0;
        while done < len {
            match self.image().top_has(at + done, len - done) {
                Ok((has_it, _)) if known.is_some_and(|known| known != has_it) => break,
                Ok((has_it, more)) => {
                    known = Some(has_it);
                    done += more;
                }
                Err(Stop::Failed(error)) => return Err(error),
                Err(Stop::Miss(key)) => self.load_slice(key).await?,
            }
        }
        Ok((known.unwrap_or(false), done))
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
            let load = image.locks.loads.acquire(load_number(key)).await;
            let Some(at) = layer.slice_location(key.slice)? else { return Ok(()) };
            if image.has_in_memory(key) {
                return Ok(());
            }
            let buf = self.read_page(layer.file, at, layer.slice_bytes).await?;
            let page = TablePage::in_buf(&buf);
            let run = image.cache.run_in(key, &page);
            let inserted = {
                let _meta = image.meta.lock();
                // The table may have been copied to another place while it was read.
                if layer.slice_location(key.slice)? != Some(at) {
                    continue;
                }
                image.cache.insert_page(key, run, &page)
            };
            self.pages().give_back(buf);
            if inserted {
                return Ok(());
            }
            // Every slot is dirty: writing back makes room.
            drop(load);
            self.write_back().await?;
        }
    }

    /// Works a window of the flattened chain out.
    async fn load_window(&self, flat: &Flat, key: SliceKey) -> Result<()> {
        let image = self.image();
        loop {
            let load = image.locks.loads.acquire(load_number(key)).await;
            if image.has_in_memory(key) {
                return Ok(());
            }
            let mut window = flat.window(key);
            let mut next = 1;
            while next < image.layers.len() && !window.is_answered() {
                let end = image.layers.len().min(next + LAYERS_AT_A_TIME);
                self.ask_layers(next..end, &mut window).await;
                next = end;
            }
            let inserted = {
                let _meta = image.meta.lock();
                image.cache.insert(key, &window.words())
            };
            if inserted {
                return Ok(());
            }
            drop(load);
            self.write_back().await?;
        }
    }

    /// Asks some layers, from the higher to the lower, for what is open in a window.
    async fn ask_layers(&self, indices: Range<usize>, window: &mut Window) {
        let start = window.start();
        let layers = &self.image().layers[indices.clone()];
        let parts = join_all(layers.iter().map(|layer| async move {
            match layer {
                Layer::Qcow2(layer) if start < layer.size() => self.table_entries(layer, start).await,
                _ => Ok(Part::Nothing),
            }
        }));
        for ((index, layer), part) in indices.zip(layers).zip(parts.await) {
            match (layer, part) {
                (Layer::Raw(raw), _) => window.ask_raw(index as u16, raw),
                (Layer::Qcow2(layer), Ok(Part::Nothing)) => window.ask_qcow2(layer, None),
                (Layer::Qcow2(layer), Ok(Part::Entries(entries))) => window.ask_qcow2(layer, Some(&entries)),
                // Whoever needs this layer is told what is wrong with it, and nobody else.
                (Layer::Qcow2(layer), Ok(Part::Damaged) | Err(_)) => window.leave_to(layer.index),
            }
        }
    }

    /// The slice of a lower layer's table that maps a byte, from the file.
    async fn table_entries(&self, layer: &Qcow2Layer, guest: u64) -> Result<Part> {
        let Ok(place) = layer.slice_location(layer.slice_at(guest).0.slice) else { return Ok(Part::Damaged) };
        let Some(at) = place else { return Ok(Part::Nothing) };
        self.read_entries(layer.file, at, layer.slice_bytes).await.map(Part::Entries)
    }

    /// Takes a step under the metadata lock that needs counts: again and again, with the page in memory that
    /// it has named, until it has an answer.
    pub(crate) async fn with_counts<T, E: From<Error>>(
        &self,
        mut step: impl FnMut(&mut Meta) -> Result<Count<T>, E>,
    ) -> Result<T, E> {
        loop {
            let count = step(&mut self.image().meta.lock())?;
            match count {
                Count::Is(answer) => return Ok(answer),
                Count::Needs(page) => self.load_refcount_page(page).await?,
            }
        }
    }

    /// Brings a refcount page into memory.
    pub(crate) async fn load_refcount_page(&self, page: u64) -> Result<()> {
        let image = self.image();
        let _load = image.locks.loads.acquire(REFCOUNT_LOADS + page..REFCOUNT_LOADS + page + 1).await;
        let (at, len) = {
            let meta = image.meta.lock();
            match meta.refcounts.page_at(page)? {
                Some(at) if !meta.refcounts.is_resident(page) => (at, meta.refcounts.page_bytes()),
                _ => return Ok(()),
            }
        };
        let buf = self.read_page(image.top().file, at, len).await?;
        let bytes = buf.to_vec();
        self.pages().give_back(buf);
        let mut meta = image.meta.lock();
        let meta = &mut *meta;
        meta.refcounts.insert(page, bytes.into(), |page| meta.graph.holds(Page::Refcount(page)));
        Ok(())
    }

    /// The entries of a part of a table.
    async fn read_entries(&self, file: FileId, at: u64, len: u64) -> Result<Vec<u64>> {
        let buf = self.read_page(file, at, len).await?;
        let entries = TablePage::in_buf(&buf).entries();
        self.pages().give_back(buf);
        Ok(entries)
    }

    /// Reads a page of a table, into a buffer that should be given back.
    async fn read_page(&self, file: FileId, at: u64, len: u64) -> Result<Buf> {
        debug_assert!(len <= MAX_PAGE);
        let buf = self.pages().take(len as usize);
        exact::read_zero_extended(self.io(), file, at, &buf)
            .await
            .map_err(|source| self.image().io_error("metadata read", file, at, source))?;
        Ok(buf)
    }
}

/// What a layer has of a window.
enum Part {
    Nothing,
    Entries(Vec<u64>),
    /// Its L1 entry cannot be read.
    Damaged,
}

/// The number of a slice in `Locks::loads`; that of the top layer's is its own.
fn load_number(key: SliceKey) -> Range<u64> {
    let number = u64::from(key.layer) << 48 | key.slice;
    number..number + 1
}

impl Image {
    fn has_in_memory(&self, key: SliceKey) -> bool {
        let _meta = self.meta.lock();
        self.cache.contains(key)
    }
}
