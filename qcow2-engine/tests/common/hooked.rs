//! Files in memory, and somebody who is asked before each operation on them: to fail it, to have it wait, to
//! take notes.

use super::{IMAGE, run};
use qcow2_engine::{
    Image, Lane, OpenOptions, RuleName,
    io::{Buf, FileId, Io, mem::MemFiles},
};
use std::{cell::Cell, io, path::Path, rc::Rc, sync::Arc};

/// What is about to be done.
pub(crate) enum Operation<'a> {
    Read {
        file: FileId,
        at: u64,
    },
    Write {
        at: u64,
        buf: &'a Buf,
    },
    /// For a tool's rule, if it is that.
    Sync(Option<RuleName>),
    /// A part of the file.
    Allocate {
        at: u64,
        end: u64,
    },
    PunchHole,
    SetLen,
}

/// Who is asked.
pub(crate) trait Hook {
    /// An error is what becomes of the operation.
    async fn before(&self, operation: Operation<'_>) -> io::Result<()>;
}

/// A disk that takes a number of operations that change it, and then fails all that do.
pub(crate) struct FailingDisk {
    left: Cell<usize>,
}

impl FailingDisk {
    pub(crate) fn after(changes: usize) -> Self {
        Self { left: Cell::new(changes) }
    }
}

impl Hook for FailingDisk {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        if !matches!(operation, Operation::Read { .. } | Operation::Sync(_)) {
            let left = self.left.get().checked_sub(1).ok_or_else(|| io::Error::from_raw_os_error(5))?;
            self.left.set(left);
        }
        Ok(())
    }
}

/// The files. Clones share them, and the hook.
pub(crate) struct Hooked<H> {
    pub(crate) files: MemFiles,
    pub(crate) hook: Rc<H>,
}

impl<H> Clone for Hooked<H> {
    fn clone(&self) -> Self {
        Self { files: self.files.clone(), hook: Rc::clone(&self.hook) }
    }
}

impl<H: Hook> Hooked<H> {
    pub(crate) fn new(files: &MemFiles, hook: H) -> Self {
        Self { files: files.clone(), hook: Rc::new(hook) }
    }

    pub(crate) fn open(&self, extent_bytes: u64) -> Arc<Image> {
        let options = OpenOptions { extent_bytes, ..OpenOptions::default() };
        run(Image::open(self, &self.files, Path::new(IMAGE), &options)).expect("opens")
    }

    pub(crate) fn lane(&self, image: &Arc<Image>) -> Lane<Self> {
        Lane::new(image, self.clone(), 8)
    }
}

impl<H: Hook> Io for Hooked<H> {
    async fn read(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.hook.before(Operation::Read { file, at }).await?;
        self.files.read(file, at, buf).await
    }
    async fn write(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.hook.before(Operation::Write { at, buf: &buf }).await?;
        self.files.write(file, at, buf).await
    }
    async fn sync(&self, file: FileId) -> io::Result<()> {
        self.hook.before(Operation::Sync(None)).await?;
        self.files.sync(file).await
    }
    async fn barrier(&self, file: FileId, rule: RuleName) -> io::Result<()> {
        self.hook.before(Operation::Sync(Some(rule))).await?;
        self.files.sync(file).await
    }
    async fn allocate(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        self.hook.before(Operation::Allocate { at, end: at + len }).await?;
        self.files.allocate(file, at, len).await
    }
    async fn punch_hole(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        self.hook.before(Operation::PunchHole).await?;
        self.files.punch_hole(file, at, len).await
    }
    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.hook.before(Operation::SetLen).await?;
        self.files.set_len(file, len).await
    }
}
