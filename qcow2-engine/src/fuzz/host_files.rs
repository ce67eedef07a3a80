//! Real files, read and written by plain system calls: an [`Io`] whose operations complete at once.

use crate::io::{Access, Buf, FileId, Io, Storage};
use nix::fcntl::{FallocateFlags, fallocate};
use parking_lot::Mutex;
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

/// The open files; clones share them.
#[derive(Clone, Default)]
pub(super) struct HostFiles(Arc<Mutex<Vec<Arc<File>>>>);

impl HostFiles {
    fn file(&self, file: FileId) -> io::Result<Arc<File>> {
        self.0.lock().get(file.0 as usize).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn fallocate(&self, file: FileId, mode: FallocateFlags, at: u64, len: u64) -> io::Result<()> {
        Ok(fallocate(&*self.file(file)?, mode, at as i64, len as i64)?)
    }
}

impl Storage for HostFiles {
    fn open(&self, path: &Path, access: Access) -> io::Result<FileId> {
        let file = OpenOptions::new().read(true).write(access == Access::ReadWrite).open(path)?;
        let mut files = self.0.lock();
        files.push(Arc::new(file));
        Ok(FileId(files.len() as u32 - 1))
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        Ok(self.file(file)?.metadata()?.len())
    }
}

impl Io for HostFiles {
    async fn read(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        let mut bytes = vec![0; buf.len()];
        let count = self.file(file)?.read_at(&mut bytes, at)?;
        buf.copy_from(0, &bytes[..count]);
        Ok(count)
    }

    async fn write(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.file(file)?.write_at(&buf.to_vec(), at)
    }

    async fn sync(&self, _file: FileId) -> io::Result<()> {
        Ok(())
    }

    async fn allocate(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        // A hole will do, and costs no memory where the files are in memory.
        let end = at + len;
        if self.file(file)?.metadata()?.len() < end { self.file(file)?.set_len(end) } else { Ok(()) }
    }

    async fn punch_hole(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.fallocate(file, mode, at, len)
    }

    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.file(file)?.set_len(len)
    }
}
