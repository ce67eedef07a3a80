//! The one table from the engine's kinds of error to the errno that the block layer is told.

use qcow2_engine::ErrorKind;

/// The errno, positive, for a failed request.
pub(crate) fn errno(kind: ErrorKind) -> i32 {
    match kind {
        ErrorKind::NoSpace | ErrorKind::TooLarge => libc::ENOSPC,
        ErrorKind::ReadOnly => libc::EROFS,
        ErrorKind::Unsupported => libc::EOPNOTSUPP,
        ErrorKind::Io(_) | ErrorKind::Corrupt | ErrorKind::OutOfRange | ErrorKind::Poisoned => libc::EIO,
    }
}
