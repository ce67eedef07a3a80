//! Why a server could not start, or not end cleanly, and what that means for others.

use crate::{
    control::ControlError,
    device::DeviceError,
    identity::OtherFiles,
    queue::QueueError,
    redofile::RedoFileError,
    runfile::{CreateError, InUse, RunFileError, TakeOverError},
};
use nix::sys::signal::Signal;
use qcow2_engine::RedoError;
use std::{io, path::PathBuf, time::Duration};

/// Why a server could not start, or not end cleanly.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("{}{}", .0, open_hint(.0))]
    Open(qcow2_engine::Error),
    #[error("closing the image failed: {0}")]
    Close(qcow2_engine::Error),
    #[error("{}: the image is empty, and a block device cannot be", .0.display())]
    Empty(PathBuf),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    InUse(#[from] InUse),
    #[error(transparent)]
    RunFile(#[from] RunFileError),
    #[error(transparent)]
    Create(#[from] CreateError),
    #[error(transparent)]
    TakeOver(#[from] TakeOverError),
    #[error(transparent)]
    RedoFile(#[from] RedoFileError),
    #[error(transparent)]
    OtherFiles(#[from] OtherFiles),
    #[error("cannot use the redo log: {0}")]
    Redo(#[from] RedoError),
    #[error("cannot start the server: {0}")]
    SetUp(#[source] io::Error),
    #[error("a queue failed")]
    QueueFailed,
    #[error("queue {index}: {source}")]
    Queue { index: u16, source: QueueError },
    #[error("the queues did not {what} within {} s", .limit.as_secs())]
    TooSlow { what: &'static str, limit: Duration },
    #[error("stopped by {0} before the device served I/O")]
    Interrupted(Signal),
    #[error("nobody was told of the device: {0}")]
    Unannounced(io::Error),
}

impl ServeError {
    /// Whether a device that was to be recovered is not there to be recovered any more, by whomever.
    pub(crate) fn leaves_nothing(&self) -> bool {
        match self {
            Self::TakeOver(TakeOverError::Missing(_) | TakeOverError::OtherBoot(_)) => true,
            Self::Device(error) => error.is_of_none_of_ours(),
            _ => false,
        }
    }
}

/// The way out where the image can be read and not be written.
fn open_hint(error: &qcow2_engine::Error) -> &'static str {
    match error {
        // EPERM is what a file says that was made immutable.
        qcow2_engine::Error::Open { source, .. }
            if matches!(source.raw_os_error(), Some(libc::EROFS | libc::EPERM)) =>
        {
            "; `add --read-only` serves an image that cannot be written"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn an_image_that_cannot_be_written_can_be_read() {
        let told = |errno| {
            let source = Arc::new(io::Error::from_raw_os_error(errno));
            ServeError::Open(qcow2_engine::Error::Open { path: "image".into(), source }).to_string()
        };
        assert!(told(libc::EROFS).contains("--read-only") && told(libc::EPERM).contains("--read-only"));
        assert!(!told(libc::EACCES).contains("--read-only"), "nor may it be read");
    }
}
