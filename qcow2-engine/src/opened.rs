//! A file that has been opened, and the header in it: where an image that is served and one that is only
//! looked at begin alike. What of a header's defects and features somebody can live with is not known here.

use crate::{
    error::{Error, Result},
    io::{Access, Buf, FileId, Io, Storage, exact, whole_sectors},
};
use qcow2_format::{Defects, FormatError, Header, Unsupported, header::HEADER_READ_BYTES};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// An open file.
pub(crate) struct Opened {
    pub(crate) file: FileId,
    pub(crate) path: PathBuf,
    pub(crate) name: Arc<str>,
    /// Its length in bytes when it was opened.
    pub(crate) len: u64,
}

impl Opened {
    /// Opens a file.
    pub(crate) fn open(storage: &(impl Storage + ?Sized), path: &Path, access: Access) -> Result<Self> {
        let failed = |source| Error::Open { path: path.to_owned(), source: Arc::new(source) };
        let file = storage.open(path, access).map_err(failed)?;
        let len = storage.len(file).map_err(failed)?;
        Ok(Self { file, path: path.to_owned(), name: Arc::from(path.to_string_lossy()), len })
    }

    /// Reads and decodes the header. Also what is wrong with it and can be repaired, and the bytes of it.
    pub(crate) async fn header(&self, io: &impl Io) -> Result<(Header, Defects, Vec<u8>)> {
        let damaged = |source| self.damaged(source);
        let some = (HEADER_READ_BYTES as u64).min(self.len) as usize;
        let mut bytes = self.read(io, "header read", 0, some).await?;
        let needed = Header::decode_prefix(&bytes, self.len).map_err(damaged)?;
        if needed > bytes.len() {
            bytes = self.read(io, "header read", 0, needed).await?;
        }
        let (header, defects) = Header::decode_repairable(&bytes, self.len).map_err(damaged)?;
        Ok((header, defects, bytes))
    }

    /// Reads `len` bytes, rounded up to whole sectors for direct I/O.
    pub(crate) async fn read(
        &self,
        io: &impl Io,
        operation: &'static str,
        at: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        let buf = Buf::zeroed(whole_sectors(len as u64) as usize);
        exact::read_zero_extended(io, self.file, at, &buf)
            .await
            .map_err(|source| self.failed(operation, at, source))?;
        let mut bytes = buf.to_vec();
        bytes.truncate(len);
        Ok(bytes)
    }

    fn failed(&self, operation: &'static str, at: impl Into<Option<u64>>, source: io::Error) -> Error {
        Error::Io { operation, file: Arc::clone(&self.name), at: at.into(), source: Arc::new(source) }
    }

    pub(crate) fn damaged(&self, source: FormatError) -> Error {
        Error::Format { file: Arc::clone(&self.name), source: Arc::new(source) }
    }

    pub(crate) fn unsupported(&self, source: Unsupported) -> Error {
        Error::Unsupported { file: Arc::clone(&self.name), source: Arc::new(source) }
    }
}
