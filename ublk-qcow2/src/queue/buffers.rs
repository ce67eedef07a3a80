//! The tags' buffers where the driver copies the data of requests.
//!
//! Each command names the buffer of its tag: the driver copies a read's data out of it when the result is
//! committed, and the next write's data into it. So a tag can have another one after each request, and it has
//! one of two:
//!
//! - its own, whose first pages the ring holds, so that small transfers need not look them up;
//! - while its requests are large, a chunk of a region of huge pages, of which looking up costs nothing to
//!   speak of.
//!
//! In huge pages alone an idle queue would hold all of its buffers; with its own alone a request of 512 KiB
//! costs a tenth more. Either has room for the longest request, because nothing tells how long the next write
//! is.
//!
//! Of each buffer it is known how many of its first bytes are zeros, so that reads of what the image has no data for
//! need not make them again. Whoever is about to put something else there says so ([`TagBuffers::spoil`]).

use super::Queue;
use qcow2_engine::io::{Buf, Pages, uring::Uring};
use std::cell::{Cell, RefCell};

/// The part of each tag's own buffer whose pages are held for good, in bytes: 2 MiB per queue of 128 tags.
/// A longer request is large.
const HELD_BYTES: usize = 16 << 10;
/// Bytes of a huge page; where it has another size the region's beginning is aligned for nothing.
const HUGE_PAGE: usize = 2 << 20;

/// The buffers of all tags of a queue.
pub(super) struct TagBuffers {
    /// The tags' own, in their order, and as many chunks.
    all: Box<[Buf]>,
    /// How many bytes at the beginning of each are known to be zeros.
    zeros: Box<[Cell<usize>]>,
    /// The one that each tag has.
    had: Box<[Cell<u16>]>,
    /// Chunks that no tag has; the last one was used last, and is the likeliest to have memory.
    spare: RefCell<Vec<u16>>,
}

impl TagBuffers {
    /// Makes the buffers, and registers the tags' own in part with the ring.
    pub(super) fn new(queue: &Queue, ring: &Uring) -> Self {
        let bytes = queue.bounds.buffer_bytes as usize;
        let this = Self::sized(queue.depth, bytes);
        ring.keep(this.all.to_vec());
        let own = &this.all[..usize::from(queue.depth)];
        let held = own.iter().map(|buf| buf.slice(0..bytes.min(HELD_BYTES))).collect();
        if let Err(error) = ring.register_buffers(held) {
            tracing::info!(queue = queue.index, "no registered buffers, small requests cost more: {error}");
        }
        this
    }

    /// Of at most 4096 tags, as the driver allows.
    fn sized(depth: u16, bytes: usize) -> Self {
        let tags = usize::from(depth);
        let own = (0..tags).map(|_| Buf::zeroed(bytes)).inspect(|buf| buf.advise(Pages::Small));
        let region = Buf::zeroed(tags * bytes + HUGE_PAGE);
        let start = region.address().next_multiple_of(HUGE_PAGE as u64) - region.address();
        let region = region.slice(start as usize..start as usize + tags * bytes);
        region.advise(Pages::Huge);
        let chunks = (0..tags).map(|at| region.slice(at * bytes..(at + 1) * bytes));
        Self {
            all: own.chain(chunks).collect(),
            zeros: (0..2 * tags).map(|_| Cell::new(bytes)).collect(),
            had: (0..depth).map(Cell::new).collect(),
            spare: RefCell::new((depth..2 * depth).rev().collect()),
        }
    }

    /// Where the buffer is that a tag has.
    #[inline]
    pub(super) fn address(&self, tag: u16) -> u64 {
        self.of(tag).address()
    }

    /// The buffer that a tag has.
    #[inline]
    pub(super) fn of(&self, tag: u16) -> &Buf {
        &self.all[usize::from(self.had[usize::from(tag)].get())]
    }

    /// Gives a tag the buffer for requests of `len` bytes: for a read before it is carried out, for a write
    /// when that is over, because its data is where the command before it said.
    #[inline]
    pub(super) fn suit(&self, tag: u16, len: u64) {
        let is_large = len > HELD_BYTES as u64;
        if is_large == (self.had[usize::from(tag)].get() == tag) {
            self.exchange(tag);
        }
    }

    /// Notes that the buffer that a tag has may have any content from now on.
    #[inline]
    pub(super) fn spoil(&self, tag: u16) {
        self.zeros_of(tag).set(0);
    }

    /// Makes the first `len` bytes of the buffer that a tag has zeros.
    pub(super) fn clear(&self, tag: u16, len: usize) {
        let zeros = self.zeros_of(tag);
        if zeros.get() < len {
            self.of(tag).slice(0..len).fill(0);
            zeros.set(len);
        } else {
            // Memory that has never been written to would become the kernel's page of zeros, and the huge page in its
            // place be small ones by the next write.
            self.of(tag).slice(0..len.min(1)).fill(0);
        }
    }

    #[inline]
    fn zeros_of(&self, tag: u16) -> &Cell<usize> {
        &self.zeros[usize::from(self.had[usize::from(tag)].get())]
    }

    /// Gives a tag a chunk in place of its own buffer, or takes it back.
    #[inline(never)]
    fn exchange(&self, tag: u16) {
        let had = &self.had[usize::from(tag)];
        let mut spare = self.spare.borrow_mut();
        if had.get() == tag {
            // There are as many as tags.
            had.set(spare.pop().unwrap_or(tag));
        } else {
            spare.push(had.replace(tag));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_take_memory_only_where_they_are_used() {
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
        };
        let before = resident();
        let buffers = TagBuffers::sized(512, 1 << 19);
        assert!(resident() < before + (16 << 20 >> 12), "of 512 MiB");
        assert_ne!(buffers.address(0), 0);
    }

    #[test]
    fn large_requests_share_the_chunks_that_were_used_last() {
        let buffers = TagBuffers::sized(2, 1 << 19);
        let own = [buffers.address(0), buffers.address(1)];
        buffers.suit(0, 4096);
        assert_eq!(buffers.address(0), own[0]);
        buffers.suit(0, 1 << 19);
        let chunk = buffers.of(0).clone();
        assert_eq!(chunk.address() % HUGE_PAGE as u64, 0);
        buffers.suit(0, 1 << 18);
        assert_eq!(buffers.address(0), chunk.address(), "kept while requests are large");
        buffers.suit(1, 1 << 19);
        assert_eq!(buffers.address(1), chunk.address() + (1 << 19));
        buffers.suit(0, 512);
        buffers.suit(1, 512);
        assert_eq!([buffers.address(0), buffers.address(1)], own);
        buffers.suit(0, 1 << 19);
        assert_eq!(buffers.address(0), chunk.address() + (1 << 19), "the warm one first");
    }

    #[test]
    fn zeros_are_made_where_they_are_not_known() {
        let buffers = TagBuffers::sized(2, 1 << 19);
        let is_zero =
            |tag: u16, len: usize| buffers.of(tag).slice(0..len).to_vec().iter().all(|byte| *byte == 0);
        let land = |tag: u16, len: usize| {
            buffers.spoil(tag);
            buffers.of(tag).slice(0..len).fill(1);
        };
        // A large write into its own buffer, and one into a chunk, then reads of zeros in the same memory.
        land(0, 1 << 19);
        buffers.suit(0, 1 << 19);
        land(0, 1 << 19);
        buffers.clear(0, 1 << 17);
        assert!(is_zero(0, 1 << 17) && !is_zero(0, (1 << 17) + 1));
        buffers.clear(0, 1 << 18);
        assert!(is_zero(0, 1 << 18));
        // In its own again; the chunk goes to another tag.
        buffers.suit(0, 4096);
        buffers.clear(0, 4096);
        assert!(is_zero(0, 4096) && !is_zero(0, 4097));
        buffers.suit(1, 1 << 19);
        buffers.clear(1, 1 << 18);
        assert!(is_zero(1, 1 << 18) && !is_zero(1, (1 << 18) + 1));
        buffers.clear(1, 1 << 19);
        assert!(is_zero(1, 1 << 19));
        land(0, 4096);
        buffers.clear(0, 512);
        assert!(is_zero(0, 512) && !is_zero(0, 513));
    }
}
