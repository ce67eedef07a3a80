//! Aligned memory that an I/O operation can own while the kernel works on it.

#![allow(unsafe_code, reason = "memory that the kernel fills")]

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    cell::{Cell, RefCell},
    fmt,
    ops::Range,
    ptr::NonNull,
    rc::Rc,
};

/// Alignment of every buffer: enough for direct I/O on any block size up to a page.
pub const ALIGNMENT: usize = 4096;
/// From this length on, memory that is not used should not be touched, in bytes.
const LAZY: usize = 256 << 10;

/// What memory is to be made of, if the system has a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Pages of the usual size, each when it is used.
    Small,
    /// Huge pages: quickly looked up by the kernel, but taken as a whole.
    Huge,
}

/// A window on a shared, page-aligned allocation.
///
/// Cloning and slicing are cheap and share the bytes; an operation in flight holds a clone, so the
/// memory outlives it whatever becomes of its future. A `Buf` never leaves its thread. The bytes
/// are reached by copying only: no reference into the memory exists while the kernel writes it.
#[derive(Clone)]
pub struct Buf {
    owner: Rc<Allocation>,
    start: usize,
    len: usize,
}

/// Buffers that are used again, so that what is in memory for a moment costs neither an allocation nor
/// clearing. The one that was used last is the next. Of one thread, as they are.
pub struct Pool {
    /// Length of the buffers.
    bytes: usize,
    /// How many are kept.
    most: usize,
    kept: RefCell<Vec<Buf>>,
}

struct Allocation {
    ptr: NonNull<u8>,
    layout: Layout,
    registered: Cell<Option<Registration>>,
    /// The ring that keeps it as long as it exists; 0 if none does.
    keeper: Cell<usize>,
}

/// A part of an allocation whose pages a ring holds, so that operations on it need not look them up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Registration {
    /// Names the ring.
    pub(super) ring: usize,
    /// The part's number in the ring's table of buffers.
    pub(super) index: u16,
    /// The number of the part's first [`ALIGNMENT`] bytes, which are in the table by themselves as well.
    pub(super) head: u16,
    /// Byte offset in the allocation.
    start: usize,
    len: usize,
}

/// Memory as a submission names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) ptr: *mut u8,
    /// Bytes.
    pub(super) len: usize,
    /// The number of the registered buffer in which it lies, if there is one.
    pub(super) registered: Option<u16>,
}

impl Registration {
    /// The number of the smallest buffer of `ring` in which these bytes of the allocation lie.
    #[inline]
    fn holding(self, bytes: Range<usize>, ring: usize) -> Option<u16> {
        if self.ring != ring || bytes.start < self.start || bytes.end > self.start + self.len {
            return None;
        }
        Some(if bytes.end <= self.start + ALIGNMENT { self.head } else { self.index })
    }
}

impl Buf {
    /// Allocates `len` zeroed bytes. A large buffer takes memory only where it is used.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        // Asked for more than its own alignment, the allocator writes the zeros itself; asked for
        // no more, it passes on fresh pages untouched. So large buffers are aligned here.
        let (size, align) = if len < LAZY { (len.max(1), ALIGNMENT) } else { (len + ALIGNMENT, 1) };
        let layout = Layout::from_size_align(size, align).expect("length is far below isize::MAX");
        // SAFETY: the layout's size is at least one byte.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(layout) };
        let start = ptr.as_ptr().align_offset(ALIGNMENT);
        let (registered, keeper) = (Cell::new(None), Cell::new(0));
        Self { owner: Rc::new(Allocation { ptr, layout, registered, keeper }), start, len }
    }

    /// Allocates a copy of `bytes`.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let buf = Self::zeroed(bytes.len());
        buf.copy_from(0, bytes);
        buf
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The window's part `range`, sharing the memory.
    ///
    /// # Panics
    /// When `range` does not lie inside the window.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "slice {range:?} of {} bytes", self.len);
        Self { owner: Rc::clone(&self.owner), start: self.start + range.start, len: range.end - range.start }
    }

    /// Says what the window's memory should be made of. The kernel may do otherwise.
    pub fn advise(&self, pages: Pages) {
        let advice = match pages {
            Pages::Small => libc::MADV_NOHUGEPAGE,
            Pages::Huge => libc::MADV_HUGEPAGE,
        };
        let whole_pages = self.len - self.len % ALIGNMENT;
        // SAFETY: the range lies inside an allocation that is alive, and neither advice changes its content.
        // Its neighbours in the last page, if the kernel's pages are larger than ours, are served as well.
        unsafe { libc::madvise(self.as_ptr().cast(), whole_pages, advice) };
    }

    /// Whether this window is the only one on its memory, and so no operation in flight has one.
    #[must_use]
    pub fn is_sole(&self) -> bool {
        Rc::strong_count(&self.owner) == 1
    }

    /// Copies bytes from `at` on into `out`.
    ///
    /// # Panics
    /// When the range does not lie inside the window.
    pub fn copy_to(&self, at: usize, out: &mut [u8]) {
        let from = self.slice(at..at + out.len());
        // SAFETY: `from` lies inside the allocation that it keeps alive, `out` is exclusive and
        // distinct from it, because no reference into an allocation is ever handed out.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr(), out.len()) }
    }

    /// Copies `bytes` in from `at` on.
    ///
    /// # Panics
    /// When the range does not lie inside the window.
    pub fn copy_from(&self, at: usize, bytes: &[u8]) {
        let to = self.slice(at..at + bytes.len());
        // SAFETY: as in `copy_to`, with the directions exchanged.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) }
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        // SAFETY: the window lies inside the allocation that it keeps alive.
        unsafe { std::ptr::write_bytes(self.as_ptr(), byte, self.len) }
    }

    /// A copy of the bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.copy_to(0, &mut bytes);
        bytes
    }

    /// Notes that `ring` keeps the allocation as long as it exists; 0: that it does no longer.
    pub(super) fn set_keeper(&self, ring: usize) {
        self.owner.keeper.set(ring);
    }

    /// Whether `ring` keeps the allocation.
    #[inline]
    pub(super) fn is_kept_by(&self, ring: usize) -> bool {
        self.owner.keeper.get() == ring
    }

    /// Notes that `ring` holds the window's pages as its buffer `index`, and the first [`ALIGNMENT`] bytes of it
    /// as its buffer `head`.
    pub(super) fn set_registered(&self, ring: usize, index: u16, head: u16) {
        let Self { start, len, .. } = *self;
        self.owner.registered.set(Some(Registration { ring, index, head, start, len }));
    }

    /// Takes [`Self::set_registered`] back.
    pub(super) fn clear_registered(&self) {
        self.owner.registered.set(None);
    }

    /// How an operation of `ring` names the window's part `range`.
    ///
    /// # Panics
    /// When `range` does not lie inside the window.
    #[inline]
    pub(super) fn named(&self, range: Range<usize>, ring: usize) -> Named {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {} bytes", self.len);
        let (start, end) = (self.start + range.start, self.start + range.end);
        let registered = self.owner.registered.get().and_then(|part| part.holding(start..end, ring));
        Named { ptr: self.as_ptr().wrapping_add(range.start), len: end - start, registered }
    }

    /// Where the window begins, for the kernel.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        // SAFETY: `start` is at most the allocation's size: every constructor and `slice` keep it so.
        unsafe { self.owner.ptr.as_ptr().add(self.start) }
    }

    /// The window's address, for a kernel interface that takes it as a number.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.as_ptr() as u64
    }
}

impl Pool {
    /// An empty pool for buffers of `bytes`, of which it keeps `most`.
    #[must_use]
    pub fn new(bytes: usize, most: usize) -> Self {
        Self { bytes, most, kept: RefCell::default() }
    }

    /// A buffer of `len` bytes, at most as many as the pool's have; what is in it is of no meaning.
    ///
    /// # Panics
    /// When it is longer.
    #[must_use]
    pub fn take(&self, len: usize) -> Buf {
        let whole = self.kept.borrow_mut().pop();
        whole.unwrap_or_else(|| Buf::zeroed(self.bytes)).slice(0..len)
    }

    /// Takes back what [`Self::take`] gave, unless somebody else has it as well: the kernel, perhaps.
    pub fn give_back(&self, buf: Buf) {
        let mut kept = self.kept.borrow_mut();
        let room = buf.owner.layout.size() - buf.start;
        if buf.is_sole() && room >= self.bytes && kept.len() < self.most {
            kept.push(Buf { len: self.bytes, ..buf });
        }
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated in `Buf::zeroed` with this layout, and this is the last owner.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_share_their_bytes_and_outlive_the_whole() {
        let whole = Buf::zeroed(8192);
        let part = whole.slice(512..1024);
        whole.copy_from(510, &[7; 4]);
        assert_eq!(part.to_vec()[..3], [7, 7, 0]);
        assert!(!whole.is_sole());
        drop(whole);
        assert!(part.is_sole());
        part.fill(9);
        assert!(part.to_vec().iter().all(|&b| b == 9));
        assert_eq!(part.address() % 512, 0);
    }

    #[test]
    fn small_and_large_buffers_are_aligned_and_zeroed() {
        for len in [0, 1, 512, LAZY - 1, LAZY, 1 << 20] {
            let buf = Buf::zeroed(len);
            assert_eq!((buf.len(), buf.address() % ALIGNMENT as u64), (len, 0));
            assert!(buf.to_vec().iter().all(|&b| b == 0));
            buf.fill(1);
        }
    }

    #[test]
    fn a_pool_takes_back_only_what_is_long_enough() {
        let pool = Pool::new(4096, 2);
        pool.give_back(Buf::zeroed(512));
        let whole = Buf::zeroed(4096);
        let rest = whole.slice(512..4096);
        drop(whole);
        pool.give_back(rest);
        assert_eq!(pool.kept.borrow().len(), 0);
    }

    #[test]
    fn a_pool_takes_back_what_nobody_else_has() {
        for bytes in [4096, LAZY] {
            let pool = Pool::new(bytes, 1);
            let (first, second, third) = (pool.take(512), pool.take(bytes), pool.take(bytes));
            let (address, kept) = (first.address(), second.clone());
            pool.give_back(second);
            pool.give_back(first);
            pool.give_back(third);
            assert_eq!(pool.kept.borrow().len(), 1, "no more than it may");
            assert_eq!((pool.take(bytes).address(), pool.kept.borrow().len()), (address, 0));
            assert_eq!(kept.len(), bytes);
        }
    }

    #[test]
    #[should_panic(expected = "slice")]
    fn a_slice_beyond_the_window_is_refused() {
        let _ = Buf::zeroed(16).slice(0..17);
    }
}
