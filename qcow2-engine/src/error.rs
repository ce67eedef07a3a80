//! What can go wrong, told for people and sorted for control flow.
//!
//! Every error names the operation, the file and the offset or field that it concerns;
//! [`Error::kind`] is the small closed set that callers branch on (the daemon turns it into an
//! errno).

use crate::territory::Conflict;
use qcow2_format::{Corruption, FormatError, Unsupported};
use std::{io, path::PathBuf, sync::Arc};

/// The result of an engine operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed engine operation.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The host failed an operation on an image file.
    #[error("{operation} of {file}{}: {source}", at.map_or_else(String::new, |at| format!(" at offset {at}")))]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// The file's name.
        file: Arc<str>,
        /// Byte offset in the file, where it was at one.
        at: Option<u64>,
        /// The host's reason.
        source: Arc<io::Error>,
    },
    /// A file could not be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: Arc<io::Error>,
    },
    /// The image is damaged or not QCOW2 at all.
    #[error("{file}: {source}")]
    Format {
        /// The file's name.
        file: Arc<str>,
        /// Field and offset.
        source: Arc<FormatError>,
    },
    /// The image needs something that this build does not serve.
    #[error("{file}: {source}")]
    Unsupported {
        /// The file's name.
        file: Arc<str>,
        /// The feature.
        source: Arc<Unsupported>,
    },
    /// The image is marked dirty, and its refcounts cannot be repaired while it is opened.
    #[error(
        "{file} is marked dirty, and repairing its refcounts failed: {reason}; \
         run `ublk-qcow2 check --repair all`, or open it read-only"
    )]
    Dirty {
        /// The file's name.
        file: Arc<str>,
        /// What is in the way.
        reason: String,
    },
    /// A snapshot's L1 table is where the file does not reach yet.
    #[error(
        "{file}: {source}; a file that grows would be taken for that table: open it read-only (--read-only), \
         and copy the disk"
    )]
    SnapshotBeyondFile {
        /// The file's name.
        file: Arc<str>,
        /// Which snapshot.
        source: Arc<FormatError>,
    },
    /// The backing chain cannot be followed.
    #[error("{file}: {reason}")]
    Backing {
        /// The overlay whose backing file it is.
        file: Arc<str>,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A metadata entry is damaged.
    #[error("{file}: {table} entry for offset {at}: {source}")]
    Corrupt {
        /// The file's name.
        file: Arc<str>,
        /// Which table.
        table: &'static str,
        /// Guest or host offset that the entry stands for.
        at: u64,
        /// The damage.
        source: Corruption,
    },
    /// A reference count that the operation needs to change cannot be changed that way.
    #[error("{file}: refcount of the cluster at offset {at} is {value}, {reason}")]
    Refcount {
        /// The file's name.
        file: Arc<str>,
        /// Host offset of the cluster.
        at: u64,
        /// Its count.
        value: u64,
        /// Why that does not do.
        reason: String,
    },
    /// An entry names a cluster that is something else, or nothing.
    #[error("{file}: {table} entry for offset {at} names the cluster at {host}, which is {conflict}")]
    Conflict {
        /// The file's name.
        file: Arc<str>,
        /// Which table.
        table: &'static str,
        /// Guest or host offset that the entry stands for.
        at: u64,
        /// Host offset that it names.
        host: u64,
        /// What is there.
        conflict: Conflict,
    },
    /// Damage was met before: the image is not changed any more.
    #[error("{file} is damaged and not written to any more ({cause}); detach it and run check --repair all")]
    Condemned {
        /// The file's name.
        file: Arc<str>,
        /// What was met.
        cause: Arc<str>,
    },
    /// A compressed cluster does not decompress.
    #[error("{file}: compressed cluster at offset {at}: {reason}")]
    Decompress {
        /// The file's name.
        file: Arc<str>,
        /// Host offset of the compressed data.
        at: u64,
        /// The decompressor's reason.
        reason: String,
    },
    /// The request does not lie inside the virtual disk.
    #[error("request of {len} bytes at offset {at} is beyond the virtual disk of {size} bytes")]
    OutOfRange {
        /// First byte.
        at: u64,
        /// Length.
        len: u64,
        /// Virtual disk size.
        size: u64,
    },
    /// The image is open for reading only.
    #[error("{file} is open read-only")]
    ReadOnly {
        /// The file's name.
        file: Arc<str>,
    },
    /// The image cannot grow any further.
    #[error("{file}: {reason}")]
    TooLarge {
        /// The file's name.
        file: Arc<str>,
        /// Which limit was met.
        reason: &'static str,
    },
    /// The operation cannot be done on this image; nothing was changed.
    #[error("{file}: {reason}")]
    NotSupported {
        /// The file's name.
        file: Arc<str>,
        /// Why.
        reason: &'static str,
    },
    /// Whoever wrote the metadata back went away before the end: what is on disk is not known.
    #[error("{file}: a flush was interrupted; close and reopen the image")]
    Interrupted {
        /// The file's name.
        file: Arc<str>,
    },
    /// The log that a dead server has left cannot be replayed.
    #[error("{file}: its redo log cannot be replayed: {reason}")]
    Redo {
        /// The file's name.
        file: Arc<str>,
        /// What is wrong with the log.
        reason: String,
    },
    /// An earlier fdatasync failed: what is on disk is no longer known.
    #[error(
        "{file}: an earlier flush failed ({cause}), and what was written since the one before may be lost; \
         close and reopen the image"
    )]
    Poisoned {
        /// The file's name.
        file: Arc<str>,
        /// The failure.
        cause: Arc<str>,
    },
}

/// What a caller can branch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The host failed; the raw OS error where it gave one.
    Io(Option<i32>),
    /// No space left on the host.
    NoSpace,
    /// The image is damaged.
    Corrupt,
    /// Not served by this build, or not possible on this image.
    Unsupported,
    /// Outside of the virtual disk.
    OutOfRange,
    /// The image is read-only.
    ReadOnly,
    /// A limit of the format was met.
    TooLarge,
    /// The image was given up after a failed flush.
    Poisoned,
}

impl Error {
    /// Whether a file could not be opened because somebody else uses it in a way that excludes this.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        matches!(self, Self::Open { source, .. } if source.kind() == io::ErrorKind::ResourceBusy)
    }

    /// The error's class.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } | Self::Open { source, .. } => match source.raw_os_error() {
                // The host's largest file is as full as a disk can be.
                Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ErrorKind::NoSpace,
                errno => ErrorKind::Io(errno),
            },
            Self::Redo { .. }
            | Self::Format { .. }
            | Self::Corrupt { .. }
            | Self::Refcount { .. }
            | Self::Conflict { .. }
            | Self::Condemned { .. }
            | Self::SnapshotBeyondFile { .. }
            | Self::Dirty { .. }
            | Self::Decompress { .. } => ErrorKind::Corrupt,
            Self::Unsupported { .. } | Self::Backing { .. } | Self::NotSupported { .. } => {
                ErrorKind::Unsupported
            }
            Self::OutOfRange { .. } => ErrorKind::OutOfRange,
            Self::ReadOnly { .. } => ErrorKind::ReadOnly,
            Self::TooLarge { .. } => ErrorKind::TooLarge,
            Self::Interrupted { .. } | Self::Poisoned { .. } => ErrorKind::Poisoned,
        }
    }

    /// Whether it says that there is no room, and giving some back would help.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self.kind(), ErrorKind::NoSpace | ErrorKind::TooLarge)
    }

    /// Whether it says that the tables of the image `top` are damaged, so that no change to it is safe.
    pub(crate) fn condemns(&self, top: &Arc<str>) -> bool {
        match self {
            Self::Corrupt { file, .. } | Self::Refcount { file, .. } | Self::Conflict { file, .. } => {
                file == top
            }
            _ => false,
        }
    }
}
