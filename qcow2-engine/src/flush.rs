//! The life of a flush: a cut of the dirty metadata, written wave by wave with a barrier after each.
//!
//! Flushes that arrive while a cut is under way share the next one. The first of them carries it
//! out, on its own thread's ring; the others wait. R6: a flush returns when a cut that began after
//! it arrived is durable, and with it everything that was acknowledged before. Without dirty
//! metadata a cut is one fdatasync.

use crate::{
    alloc::refcounts::Refcounts,
    cache::slices::SliceKey,
    error::{Error, Result},
    image::Image,
    io::{Buf, Io, exact},
    lane::Lane,
    meta::Meta,
    order::{
        graph::Plan,
        rules::{Page, RuleName},
    },
    redo::{Barriers, RedoLog},
    waiters::Waiters,
};
use futures_util::future::join_all;
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    future::poll_fn,
    sync::{Arc, OnceLock},
    task::Poll,
};

/// Page writes of a wave that are in flight at the same time.
const PARALLEL_WRITES: usize = 64;
/// Contiguous pages are written together, up to this many bytes.
const MAX_WRITE_BYTES: usize = 1 << 20;
/// Dirty pages before writers have to help: 8 MiB of copies at the most while a cut is under way.
pub(crate) const MAX_DIRTY_PAGES: usize = 2048;

/// Who carries the next cut out, and how the last one went.
#[derive(Default)]
pub(crate) struct Flusher {
    state: Mutex<State>,
    /// After this nothing more is accepted. Every write asks for it, and is not to take a lock for that.
    poisoned: OnceLock<Error>,
    /// Where the next process reads how barriers have ended.
    barriers: Mutex<Option<Barriers>>,
}

#[derive(Default)]
struct State {
    leading: bool,
    waiting: Waiters,
    /// Number and outcome of the last cut that has ended.
    ended: u64,
    outcome: Option<Error>,
    /// The last cut that ended well.
    durable: u64,
}

/// What a waiting flush does next.
enum Turn {
    Lead,
    Done(Result<()>),
}

/// The right and the duty to carry one cut out. Dropped before its end, the cut has failed.
struct Lead<'a> {
    image: &'a Image,
    number: u64,
    plan: Plan,
    /// The records of the redo log before this one are covered.
    redo_end: u64,
}

/// A page of a cut: its place in the file and its bytes at the time of the cut.
struct Copy {
    at: u64,
    bytes: Vec<u8>,
}

impl Flusher {
    /// # Errors
    /// The failure after which nothing more is accepted.
    pub(crate) fn check(&self) -> Result<()> {
        self.poisoned.get().cloned().map_or(Ok(()), Err)
    }

    pub(crate) fn poison(&self, error: Error) {
        self.poisoned.get_or_init(|| error);
    }

    /// From now on the end of each barrier is noted there.
    pub(crate) fn note_in(&self, barriers: Barriers) {
        *self.barriers.lock() = Some(barriers);
    }

    pub(crate) fn durable_cut(&self) -> u64 {
        self.state.lock().durable
    }

    /// Waits until cut `wanted`, or a later one, has ended, or until it is the caller's turn.
    async fn turn(&self, wanted: u64) -> Turn {
        poll_fn(|context| {
            let mut state = self.state.lock();
            if state.ended >= wanted {
                // A later cut includes whatever an earlier one failed to write.
                return Poll::Ready(Turn::Done(state.outcome.clone().map_or(Ok(()), Err)));
            }
            if let Some(error) = self.poisoned.get() {
                // It has failed while this one waited, and the kernel tells of what it lost only once.
                return Poll::Ready(Turn::Done(Err(error.clone())));
            }
            if state.leading {
                state.waiting.add(context);
                return Poll::Pending;
            }
            state.leading = true;
            Poll::Ready(Turn::Lead)
        })
        .await
    }

    fn end(&self, number: u64, outcome: Option<Error>) {
        let waiting = {
            let mut state = self.state.lock();
            state.leading = false;
            state.ended = number;
            if outcome.is_none() {
                state.durable = number;
            }
            state.outcome = outcome;
            state.waiting.take()
        };
        waiting.wake();
    }
}

impl<I: Io> Lane<I> {
    /// Makes every write that was acknowledged before this call durable.
    ///
    /// # Errors
    /// A failed write of metadata: it stays dirty, and a later flush tries again. A failed barrier:
    /// the image then accepts nothing more, because what is on disk is not known.
    pub async fn flush(&self) -> Result<()> {
        if self.image().read_only || self.image().is_disabled(RuleName::CutBeforeFlushReturns) {
            return Ok(());
        }
        self.write_back().await
    }

    /// Writes the dirty metadata back and makes it durable.
    pub(crate) async fn write_back(&self) -> Result<()> {
        let image = self.image();
        image.flusher.check()?;
        let wanted = image.meta.lock().cuts_begun + 1;
        match image.flusher.turn(wanted).await {
            Turn::Done(outcome) => outcome,
            Turn::Lead => self.lead().await,
        }
    }

    /// Helps when too much is dirty or waits to be freed.
    pub(crate) async fn relieve(&self) -> Result<()> {
        let image = self.image();
        let (dirty, freed) = {
            let meta = image.meta.lock();
            let fills = meta.redo.as_ref().is_some_and(RedoLog::is_filling);
            (
                fills || meta.graph.len() > image.dirty_limit(),
                meta.frees.len() > image.paging.max_frees && image.can_free(&meta),
            )
        };
        if dirty || freed {
            self.write_back().await?;
        }
        if freed {
            self.reclaim().await?;
        }
        Ok(())
    }

    async fn lead(&self) -> Result<()> {
        let image = self.image();
        let (lead, copies) = image.begin_cut();
        let outcome = self.carry_out(&lead, copies).await;
        lead.end(outcome)
    }

    async fn carry_out(&self, lead: &Lead<'_>, mut copies: BTreeMap<Page, Copy>) -> Result<()> {
        let waves = &lead.plan.waves;
        if waves.is_empty() {
            return self.barrier().await;
        }
        for wave in waves {
            self.write_wave(wave.iter().filter_map(|page| copies.remove(page)).collect()).await?;
            self.barrier().await?;
            lead.image.retire(wave);
        }
        Ok(())
    }

    async fn write_wave(&self, mut copies: Vec<Copy>) -> Result<()> {
        let file = self.image().top().file;
        copies.sort_by_key(|copy| copy.at);
        let runs = join_neighbours(copies);
        for some in runs.chunks(PARALLEL_WRITES) {
            let writes = some.iter().map(|run| async move {
                exact::write_all(self.io(), file, run.at, &Buf::from_bytes(&run.bytes))
                    .await
                    .map_err(|source| self.image().io_error("metadata write", file, run.at, source))
            });
            join_all(writes).await.into_iter().collect::<Result<()>>()?;
        }
        Ok(())
    }

    /// A completed fdatasync, or the end of the image's service.
    pub(crate) async fn barrier(&self) -> Result<()> {
        let image = self.image();
        let file = image.top().file;
        let noted = image.flusher.barriers.lock().clone();
        if let Some(barriers) = &noted {
            barriers.begin();
        }
        // A barrier that is dropped here has not ended: its kernel may tell nobody how it does.
        let synced = self.io().sync(file).await;
        if let Some(barriers) = &noted {
            barriers.end(synced.is_ok());
        }
        synced.map_err(|source| {
            let error = image.io_error("fdatasync", file, None, source);
            image.flusher.poison(image.poisoned_by(&error.to_string()));
            error
        })?;
        // Of several at a time only one may have been told what all of them lost.
        image.flusher.check()
    }
}

impl Image {
    pub(crate) fn poisoned_by(&self, cause: &str) -> Error {
        Error::Poisoned { file: Arc::clone(&self.top().name), cause: cause.into() }
    }

    fn dirty_limit(&self) -> usize {
        MAX_DIRTY_PAGES.min(self.cache.slot_count() / 2)
    }

    /// Takes the cut: one consistent state of everything that is dirty, copied under the lock.
    fn begin_cut(&self) -> (Lead<'_>, BTreeMap<Page, Copy>) {
        let mut meta = self.meta.lock();
        meta.cuts_begun += 1;
        let plan = meta.graph.cut();
        let copies = plan.waves.iter().flatten().map(|&page| (page, self.copy_page(&meta, page))).collect();
        let redo_end = meta.redo.as_ref().map_or(0, RedoLog::tail);
        (Lead { image: self, number: meta.cuts_begun, plan, redo_end }, copies)
    }

    fn copy_page(&self, meta: &Meta, page: Page) -> Copy {
        let place = |at: Option<u64>, bytes: Option<Vec<u8>>| match (at, bytes) {
            (Some(at), Some(bytes)) => Copy { at, bytes },
            _ => unreachable!("a dirty page is in memory and has a place: {page:?}"),
        };
        let layer = self.top();
        match page {
            Page::Refcount(page) => {
                place(meta.refcounts.page_at(page).ok().flatten(), meta.refcounts.page_copy(page))
            }
            Page::RefcountTable(page) => table_page(&meta.refcounts, page),
            Page::L2(slice) => place(
                layer.slice_location(slice).ok().flatten(),
                self.cache.bytes(SliceKey { layer: 0, slice }, layer.slice_bytes as usize),
            ),
            Page::L1(page) => {
                let per_page = layer.slice_bytes / 8;
                let bytes = layer.l1.bytes(page * per_page, per_page);
                Copy { at: layer.l1_at.0 + page * layer.slice_bytes, bytes }
            }
            Page::Header => Copy { at: 0, bytes: meta.header.0.clone() },
        }
    }

    /// The pages of a wave are durable.
    fn retire(&self, wave: &[Page]) {
        let mut meta = self.meta.lock();
        for &page in wave {
            meta.graph.retire(page);
            if let (Page::L2(slice), false) = (page, meta.graph.holds(page)) {
                self.cache.set_pinned(SliceKey { layer: 0, slice }, false);
            }
        }
    }
}

impl Lead<'_> {
    fn end(mut self, outcome: Result<()>) -> Result<()> {
        self.finish(outcome.as_ref().err().cloned());
        std::mem::forget(self);
        outcome
    }

    fn finish(&mut self, error: Option<Error>) {
        {
            let mut meta = self.image.meta.lock();
            match (&error, &mut meta.redo) {
                (Some(_), _) => meta.graph.give_back(std::mem::take(&mut self.plan)),
                (None, Some(redo)) => redo.retire(self.redo_end),
                (None, None) => {}
            }
        }
        self.image.flusher.end(self.number, error);
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        // Page writes may be under way that nobody waits for; they must not land on newer ones.
        let error = Error::Interrupted { file: Arc::clone(&self.image.top().name) };
        self.image.flusher.poison(error.clone());
        self.finish(Some(error));
    }
}

fn table_page(refcounts: &Refcounts, page: u64) -> Copy {
    Copy {
        at: refcounts.table_place().0.0 + page * refcounts.page_bytes(),
        bytes: refcounts.table_page_copy(page),
    }
}

/// Joins copies, sorted by place, that touch each other.
fn join_neighbours(copies: Vec<Copy>) -> Vec<Copy> {
    let mut runs: Vec<Copy> = Vec::with_capacity(copies.len());
    for copy in copies {
        match runs.last_mut() {
            Some(run) if run.at + run.bytes.len() as u64 == copy.at && run.bytes.len() < MAX_WRITE_BYTES => {
                run.bytes.extend(copy.bytes);
            }
            _ => runs.push(copy),
        }
    }
    runs
}
