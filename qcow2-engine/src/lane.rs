//! A lane: one thread's way to an image.
//!
//! A lane joins an [`Image`], which all threads share, to the [`Io`] of one thread, and counts the
//! requests that this thread has in flight. The operations themselves are in the modules named
//! after them; each runs between [`Lane::begin`] and [`Lane::end`], or inside [`Lane::in_flight`]
//! or [`Lane::change`].

use crate::{
    alloc::reserve::LaneSpace,
    epoch::Slots,
    error::{Error, Result},
    image::Image,
    io::{Io, Pool},
    paging::MAX_PAGE,
    waiters::Waiters,
};
use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    rc::Rc,
    sync::Arc,
    task::Poll,
};

/// Buffers for metadata that a lane keeps.
const KEPT_PAGES: usize = 32;

/// One thread's handle of an image. Clones share the handle.
///
/// Futures of requests may be dropped, and what they have under way in the kernel goes on. A dropped request
/// stays in flight for good: nothing that is freed later is used again until the image is opened anew. A
/// dropped flush, or write into a zero cluster that keeps its place, leaves unknown what is in the file, and
/// the image accepts no more changes ([`Error::Interrupted`]).
pub struct Lane<I>(Rc<Inner<I>>);

struct Inner<I> {
    image: Arc<Image>,
    io: I,
    number: usize,
    depth: usize,
    slots: Arc<Slots>,
    free: RefCell<FreeSlots>,
    /// What metadata is read into.
    pages: Pool,
}

struct FreeSlots {
    indices: Vec<u32>,
    waiting: Waiters,
}

/// A request in flight, by its slot. Dropping it instead of ending it leaves the request in flight.
#[must_use = "a request that is not ended keeps freed clusters from being used"]
#[derive(Debug)]
pub struct Flight(u32);

impl<I> Clone for Lane<I> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<I: Io> Lane<I> {
    /// Makes a lane for up to `depth` requests at a time; more wait for their turn.
    #[must_use]
    pub fn new(image: &Arc<Image>, io: I, depth: usize) -> Self {
        let depth = depth.max(1);
        let number = {
            let mut meta = image.meta.lock();
            meta.lanes.push(LaneSpace::default());
            meta.lanes.len() - 1
        };
        // Far fewer requests than 2^32 fit in memory.
        let free = FreeSlots { indices: (0..depth as u32).rev().collect(), waiting: Waiters::default() };
        Self(Rc::new(Inner {
            slots: image.epochs.register(depth),
            image: Arc::clone(image),
            io,
            number,
            depth,
            free: RefCell::new(free),
            pages: Pool::new(MAX_PAGE as usize, KEPT_PAGES),
        }))
    }

    /// The image that it leads to.
    #[must_use]
    pub fn image(&self) -> &Arc<Image> {
        &self.0.image
    }

    /// The thread's I/O.
    #[must_use]
    pub fn io(&self) -> &I {
        &self.0.io
    }

    /// Buffers for metadata that is read.
    pub(crate) fn pages(&self) -> &Pool {
        &self.0.pages
    }

    /// Whether no request of this lane is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.0.free.borrow().indices.len() == self.0.depth
    }

    pub(crate) fn number(&self) -> usize {
        self.0.number
    }

    /// Carries a request out: what it may touch is not reused until it ends. A request whose future
    /// is dropped half-way never ends, because the kernel may still work on it; then nothing that is
    /// freed later is reused until the image is opened again.
    pub(crate) async fn in_flight<T>(&self, request: impl Future<Output = T>) -> T {
        let flight = self.begin().await;
        let output = request.await;
        self.end(flight);
        output
    }

    /// Carries a change out as a request in flight; and where there is no room for it, once more when what was
    /// freed before has been given back. To do a part of it twice is harmless, as it has not been answered.
    pub(crate) async fn change(&self, change: impl AsyncFn() -> Result<()>) -> Result<()> {
        let mut is_repeated = false;
        loop {
            let flight = self.begin().await;
            let outcome = change().await;
            self.end(flight);
            match outcome {
                Err(error) if error.is_full() && !is_repeated => {
                    if !self.await_frees().await? {
                        return Err(error);
                    }
                    is_repeated = true;
                }
                outcome => return outcome,
            }
        }
    }

    /// Begins a request. [`Self::in_flight`] for requests whose future should not be moved, as that
    /// costs small ones more than their look-up: [`Self::end`] must follow when it has ended.
    pub(crate) async fn begin(&self) -> Flight {
        let inner = &*self.0;
        let index = poll_fn(|context| {
            let mut free = inner.free.borrow_mut();
            match free.indices.pop() {
                Some(index) => Poll::Ready(index),
                None => {
                    free.waiting.add(context);
                    Poll::Pending
                }
            }
        })
        .await;
        inner.image.epochs.enter(&inner.slots, index as usize);
        Flight(index)
    }

    /// [`Self::begin`] for a request that does not wait; `None` where it would have to.
    #[inline]
    pub(crate) fn try_begin(&self) -> Option<Flight> {
        let inner = &*self.0;
        let index = inner.free.borrow_mut().indices.pop()?;
        inner.image.epochs.enter(&inner.slots, index as usize);
        Some(Flight(index))
    }

    /// Ends a request.
    #[inline]
    pub(crate) fn end(&self, Flight(index): Flight) {
        let inner = &*self.0;
        inner.slots.leave(index as usize);
        let waiting = {
            let mut free = inner.free.borrow_mut();
            free.indices.push(index);
            if free.waiting.is_empty() {
                return;
            }
            free.waiting.take()
        };
        waiting.wake();
    }

    /// Checks that a request lies inside the virtual disk.
    pub(crate) fn check_range(&self, at: u64, len: u64) -> Result<()> {
        let top = self.image().top();
        if top.has_range(at, len) { Ok(()) } else { Err(Error::OutOfRange { at, len, size: top.size() }) }
    }
}

impl<I> Drop for Inner<I> {
    /// What a request left in flight touches may be under the kernel's hands still (R5): its slots stay.
    fn drop(&mut self) {
        let FreeSlots { indices, .. } = self.free.get_mut();
        if indices.len() == self.depth {
            self.image.epochs.unregister(&self.slots);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{OpenOptions, Preallocation, create, exec::run_at_once, io::mem::MemFiles};
    use qcow2_format::CreateOptions;
    use std::path::Path;

    /// A queue fails while its transfers are in the kernel; the other queues go on.
    #[test]
    fn r5_a_request_outlives_its_lane() {
        let (files, path) = (MemFiles::default(), Path::new("image"));
        files.put("image", Vec::new());
        let options = CreateOptions { virtual_size: 1 << 20, ..CreateOptions::default() };
        run_at_once(create::create(&files, &files, path, &options, Preallocation::Off)).unwrap();
        let image = run_at_once(Image::open(&files, &files, path, &OpenOptions::default())).unwrap();
        let (failing, ending) = (Lane::new(&image, files.clone(), 2), Lane::new(&image, files.clone(), 2));
        let (lost, ended) = (run_at_once(failing.begin()), run_at_once(ending.begin()));
        let unmapped = image.epochs.advance();
        ending.end(ended);
        drop((failing, ending));
        assert!(image.epochs.oldest() <= unmapped, "{lost:?} may still write to what it looked up");
    }
}
