//! What a test can do to a disk, whoever serves it.
//!
//! [`Disk`] is implemented for a real block device ([`crate::device`]) and for lanes of the engine
//! in this process ([`crate::engine`]), so that the same sequences find bugs in minutes without a
//! device and prove the whole path with one.

use anyhow::Result;
use std::{fmt, path::Path, sync::Arc};

/// Bytes of a sector: the unit of every request.
pub const SECTOR: u64 = 512;

/// One request. Offsets and lengths are bytes and multiples of [`SECTOR`].
#[derive(Clone)]
pub enum Op {
    /// Fills a range with bytes.
    Write {
        /// First byte.
        at: u64,
        /// What to write.
        bytes: Arc<[u8]>,
    },
    /// Makes a range read as zeros.
    Zero {
        /// First byte.
        at: u64,
        /// Length.
        len: u64,
        /// Whether the space may be given back.
        unmap: bool,
    },
    /// Discards the whole clusters of a range.
    Discard {
        /// First byte.
        at: u64,
        /// Length.
        len: u64,
    },
    /// Reads a range.
    Read {
        /// First byte.
        at: u64,
        /// Length.
        len: u64,
    },
    /// Makes everything that was acknowledged durable.
    Flush,
}

impl Op {
    /// First byte and length; both 0 for a flush.
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        match *self {
            Self::Write { at, ref bytes } => (at, bytes.len() as u64),
            Self::Zero { at, len, .. } | Self::Discard { at, len } | Self::Read { at, len } => (at, len),
            Self::Flush => (0, 0),
        }
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (at, len) = self.range();
        match self {
            Self::Write { .. } => write!(f, "write {at:#x}+{len:#x}"),
            Self::Zero { unmap, .. } => write!(f, "zero{} {at:#x}+{len:#x}", if *unmap { " -u" } else { "" }),
            Self::Discard { .. } => write!(f, "discard {at:#x}+{len:#x}"),
            Self::Read { .. } => write!(f, "read {at:#x}+{len:#x}"),
            Self::Flush => f.write_str("flush"),
        }
    }
}

/// A disk that is being served.
pub trait Disk {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// Carries requests out, several in flight at a time and in no particular order. They do not
    /// overlap. Returns for each of them the bytes read, none for those that read nothing.
    ///
    /// # Errors
    /// The first request that failed.
    fn run(&mut self, batch: &[Op]) -> Result<Vec<Vec<u8>>>;

    /// Ends the service; the image is then whole and unused.
    ///
    /// # Errors
    /// It did not end cleanly.
    fn detach(self) -> Result<()>;
}

/// Serves images.
pub trait Server {
    /// What it serves them as.
    type Disk: Disk;

    /// Serves an image with so many queues (or lanes).
    ///
    /// # Errors
    /// The image cannot be served.
    fn attach(&self, image: &Path, queues: u16) -> Result<Self::Disk>;
}
