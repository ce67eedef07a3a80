//! Files in memory, for tests of the engine and for whoever wants an image without a disk.
//!
//! Every operation completes at once and is durable at once. What happens when a disk is slow,
//! reorders or fails is the simulator's subject, not this one's.

use super::{Access, Buf, FileId, Io, Storage};
use parking_lot::Mutex;
use std::{io, path::Path, path::PathBuf, sync::Arc};

/// A set of named files. Clones share them.
#[derive(Clone, Default)]
pub struct MemFiles(Arc<Mutex<Vec<MemFile>>>);

struct MemFile {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl MemFiles {
    /// Creates a file, or replaces its content.
    pub fn put(&self, path: impl Into<PathBuf>, bytes: Vec<u8>) {
        let path = path.into();
        let mut files = self.0.lock();
        match files.iter_mut().find(|file| file.path == path) {
            Some(file) => file.bytes = bytes,
            None => files.push(MemFile { path, bytes }),
        }
    }

    /// The content of a file.
    #[must_use]
    pub fn get(&self, path: impl AsRef<Path>) -> Option<Vec<u8>> {
        self.0.lock().iter().find(|file| file.path == path.as_ref()).map(|file| file.bytes.clone())
    }

    fn with<T>(&self, file: FileId, action: impl FnOnce(&mut Vec<u8>) -> T) -> io::Result<T> {
        let mut files = self.0.lock();
        let file = files.get_mut(file.0 as usize).ok_or(io::ErrorKind::NotFound)?;
        Ok(action(&mut file.bytes))
    }
}

impl Storage for MemFiles {
    fn open(&self, path: &Path, _access: Access) -> io::Result<FileId> {
        let index = self.0.lock().iter().position(|file| file.path == path).ok_or(io::ErrorKind::NotFound)?;
        Ok(FileId(index as u32))
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        self.with(file, |bytes| bytes.len() as u64)
    }
}

impl Io for MemFiles {
    async fn read(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.with(file, |bytes| {
            let start = bytes.len().min(usize::try_from(at).unwrap_or(usize::MAX));
            let part = &bytes[start..bytes.len().min(start + buf.len())];
            buf.copy_from(0, part);
            part.len()
        })
    }

    async fn write(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.with(file, |bytes| {
            let (start, end) = (at as usize, at as usize + buf.len());
            bytes.resize(bytes.len().max(end), 0);
            buf.copy_to(0, &mut bytes[start..end]);
            buf.len()
        })
    }

    async fn sync(&self, _file: FileId) -> io::Result<()> {
        Ok(())
    }

    async fn allocate(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        self.with(file, |bytes| bytes.resize(bytes.len().max((at + len) as usize), 0))
    }

    async fn punch_hole(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        self.with(file, |bytes| {
            let end = bytes.len().min((at + len) as usize);
            bytes[(at as usize).min(end)..end].fill(0);
        })
    }

    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.with(file, |bytes| bytes.resize(len as usize, 0))
    }
}
