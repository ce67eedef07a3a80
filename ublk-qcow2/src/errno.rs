//! The one table from the engine's kinds of error to the errno that the block layer is told.

use qcow2_engine::ErrorKind;

/// The errno, positive, for a failed request.
pub(crate) fn errno(kind: ErrorKind) -> i32 {
    match kind {
        // The block layer keeps few errnos apart. Whatever the host's is, to the device's user it is
        // an I/O error: one such as EAGAIN would have a meaning there that it must not have.
        ErrorKind::Io(_) | ErrorKind::Corrupt | ErrorKind::Poisoned | ErrorKind::OutOfRange => libc::EIO,
        ErrorKind::NoSpace | ErrorKind::TooLarge => libc::ENOSPC,
        ErrorKind::Unsupported => libc::EOPNOTSUPP,
        ErrorKind::ReadOnly => libc::EROFS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_host_errno_reaches_the_guest_unchanged() {
        assert_eq!(errno(ErrorKind::Io(Some(libc::EAGAIN))), libc::EIO);
        assert_eq!(errno(ErrorKind::NoSpace), libc::ENOSPC);
    }
}
