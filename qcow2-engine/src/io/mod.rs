//! The one boundary between the engine and storage.
//!
//! Every byte that the engine reads or writes passes [`Io`]. It is implemented by the io_uring of a serving
//! thread ([`uring`]) and by files in memory ([`mem`]); with the feature `sim` also by a simulated disk and
//! by plain files. An `Io` belongs to one thread; the files it names belong to the [`Storage`] that opened
//! them and are shared by all threads, so a [`FileId`] means the same file on every ring.
//!
//! Contract of every operation: the future may be dropped at any time; the kernel may then still
//! carry the operation out, and the buffer stays alive until it has. Completion of a write says
//! nothing about durability: only a [`Io::sync`] *issued after* the write completed does.

mod buf;
pub mod exact;
pub mod files;
pub mod mem;
pub mod uring;

pub use buf::{ALIGNMENT, Buf, Pages, Pool};
pub use files::Files;

use crate::order::rules::RuleName;
use std::{
    future::{Future, poll_fn},
    io,
    path::Path,
    task::Poll,
};

/// The unit of every transfer, in bytes: what direct I/O asks for at most.
pub(crate) const SECTOR: u64 = 512;

/// So many bytes, rounded up to whole sectors.
pub(crate) const fn whole_sectors(bytes: u64) -> u64 {
    bytes.next_multiple_of(SECTOR)
}

/// Names an open file, in the order in which its [`Storage`] opened them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads only; the file is never changed.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// Opens files. Used while an image is opened, checked or made, never on the serving path, so it may block.
pub trait Storage: Send + Sync {
    /// Opens an existing file.
    ///
    /// # Errors
    /// The operating system's.
    fn open(&self, path: &Path, access: Access) -> io::Result<FileId>;

    /// The file's length in bytes (the capacity, for a block device).
    ///
    /// # Errors
    /// The operating system's.
    fn len(&self, file: FileId) -> io::Result<u64>;

    /// Whether the range is known to be a hole, and so to read as zeros. False is always right; it
    /// may cost reading what is not there.
    fn is_hole(&self, _file: FileId, _at: u64, _len: u64) -> bool {
        false
    }
}

/// Asynchronous file operations of one thread. Offsets and lengths are bytes; when the file is
/// open for direct I/O they must be multiples of 512, as must the buffer's address.
pub trait Io {
    /// Reads into `buf` from `at`; returns the bytes read, fewer than asked for only at the end of
    /// the file or where the kernel stopped early.
    fn read(&self, file: FileId, at: u64, buf: Buf) -> impl Future<Output = io::Result<usize>>;

    /// Writes `buf` at `at`; returns the bytes written.
    fn write(&self, file: FileId, at: u64, buf: Buf) -> impl Future<Output = io::Result<usize>>;

    /// Makes every write that completed before this call durable, with the file length that is
    /// needed to read it back (fdatasync).
    fn sync(&self, file: FileId) -> impl Future<Output = io::Result<()>>;

    /// [`Self::sync`], where a tool's ordering rule asks for it. The simulator leaves it out when a
    /// mutation check has taken the rule away.
    fn barrier(&self, file: FileId, _rule: RuleName) -> impl Future<Output = io::Result<()>> {
        self.sync(file)
    }

    /// Allocates space for the range and extends the file over it; bytes not written before read
    /// as zeros. `Unsupported` where the file system cannot.
    fn allocate(&self, file: FileId, at: u64, len: u64) -> impl Future<Output = io::Result<()>>;

    /// Deallocates the range, which then reads as zeros; the length stays. `Unsupported` where the
    /// file system cannot.
    fn punch_hole(&self, file: FileId, at: u64, len: u64) -> impl Future<Output = io::Result<()>>;

    /// Sets the file's length.
    fn set_len(&self, file: FileId, len: u64) -> impl Future<Output = io::Result<()>>;

    /// Lets some ten milliseconds pass. Where time is nothing to go by, others have their turn.
    fn pause(&self) -> impl Future<Output = ()> {
        let mut is_over = false;
        poll_fn(move |context| {
            if is_over {
                return Poll::Ready(());
            }
            is_over = true;
            context.waker().wake_by_ref();
            Poll::Pending
        })
    }
}
