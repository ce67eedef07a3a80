//! Stand-in for the engine until it lands: serves a raw file one to one, with the engine's shape.

use qcow2_engine::io::{Access, Buf, FileId, Io, Storage, exact};
use std::{io, path::Path, sync::Arc};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorKind {
    NoSpace,
    ReadOnly,
    Unsupported,
    Io,
}

#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) struct Error(#[from] io::Error);

impl Error {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self.0.kind() {
            io::ErrorKind::StorageFull => ErrorKind::NoSpace,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct OpenOptions {
    pub(crate) read_only: bool,
    #[allow(dead_code, reason = "the stand-in caches nothing")]
    pub(crate) cache_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ZeroMode {
    Unmap,
    Keep,
}

pub(crate) struct Image {
    file: FileId,
    size: u64,
    read_only: bool,
}

pub(crate) struct Lane<I> {
    io: I,
    image: Arc<Image>,
}

impl Image {
    pub(crate) async fn open(
        _io: &impl Io,
        storage: &Arc<impl Storage>,
        path: &Path,
        options: OpenOptions,
    ) -> Result<Arc<Self>, Error> {
        let access = if options.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let file = storage.open(path, access)?;
        Ok(Arc::new(Self { file, size: storage.len(file)?, read_only: options.read_only }))
    }

    pub(crate) fn virtual_size(&self) -> u64 {
        self.size
    }

    pub(crate) fn cluster_bytes(&self) -> u32 {
        65536
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub(crate) fn lane<I: Io>(self: &Arc<Self>, io: I, _depth: u16) -> Lane<I> {
        Lane { io, image: Arc::clone(self) }
    }
}

impl<I: Io> Lane<I> {
    pub(crate) async fn read(&self, at: u64, buf: Buf) -> Result<(), Error> {
        Ok(exact::read_zero_extended(&self.io, self.image.file, at, &buf).await?)
    }

    pub(crate) async fn write(&self, at: u64, buf: Buf) -> Result<(), Error> {
        Ok(exact::write_all(&self.io, self.image.file, at, &buf).await?)
    }

    pub(crate) async fn write_zeroes(&self, at: u64, len: u64, _mode: ZeroMode) -> Result<(), Error> {
        Ok(self.io.punch_hole(self.image.file, at, len).await?)
    }

    pub(crate) async fn discard(&self, at: u64, len: u64) -> Result<(), Error> {
        Ok(self.io.punch_hole(self.image.file, at, len).await?)
    }

    pub(crate) async fn flush(&self) -> Result<(), Error> {
        Ok(self.io.sync(self.image.file).await?)
    }

    pub(crate) async fn close(&self) -> Result<(), Error> {
        if self.image.read_only { Ok(()) } else { self.flush().await }
    }
}
