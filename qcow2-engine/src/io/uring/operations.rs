//! The engine's operations on its files: how each becomes a submission, and what is done about its result.

use super::{FIRST_GUEST_SLOT, Keep, MAX_RETRIES, OnDrop, Prepared, Target, Uring, entry_for};
use crate::io::{Buf, FileId, Io, buf::Named};
use io_uring::{opcode, squeue, types};
use std::{io, time::Duration};

/// The longest transfer that one operation asks for: what Linux moves at most, in bytes.
const MAX_TRANSFER: usize = 0x7fff_f000;
/// What a pause is.
const PAUSE: Duration = Duration::from_millis(10);

/// What a submission has to know of a file.
#[derive(Clone, Copy)]
pub(super) struct Known {
    pub(super) target: Target,
    pub(super) is_direct: bool,
}

impl Uring {
    /// What is known of `file`: its slot in the ring's table if it got one, else its descriptor.
    #[inline]
    pub(super) fn known(&self, file: FileId) -> io::Result<Known> {
        let known = self.0.known.borrow().get(file.0 as usize).copied().flatten();
        known.map_or_else(|| self.get_to_know(file), Ok)
    }

    #[cold]
    fn get_to_know(&self, file: FileId) -> io::Result<Known> {
        let fd = self.0.files.fd(file)?;
        let is_direct = self.0.files.is_direct(file)?;
        let fixed = self.0.has_file_table && file.0 < FIRST_GUEST_SLOT && self.0.update_file_slot(file.0, fd);
        let target = if fixed { Target::Fixed(file.0) } else { Target::Fd(fd) };
        let mut all = self.0.known.borrow_mut();
        let index = file.0 as usize;
        if all.len() <= index {
            all.resize(index + 1, None);
        }
        let known = Known { target, is_direct };
        all[index] = Some(known);
        Ok(known)
    }

    #[inline]
    pub(super) fn target(&self, file: FileId) -> io::Result<Target> {
        self.known(file).map(|known| known.target)
    }

    #[inline]
    pub(super) fn read_entry(&self, file: FileId, at: u64, into: Named) -> io::Result<squeue::Entry> {
        let Named { ptr, len, registered } = into;
        let len = len.min(MAX_TRANSFER) as u32;
        Ok(entry_for!(self.target(file)?, |fd| match registered {
            Some(index) => opcode::ReadFixed::new(fd, ptr, len, index).offset(at).build(),
            None => opcode::Read::new(fd, ptr, len).offset(at).build(),
        }))
    }

    #[inline]
    pub(super) fn write_entry(&self, file: FileId, at: u64, from: Named) -> io::Result<Prepared> {
        let Named { ptr, len, registered } = from;
        let len = len.min(MAX_TRANSFER) as u32;
        let known = self.known(file)?;
        let entry = entry_for!(known.target, |fd| match registered {
            Some(index) => opcode::WriteFixed::new(fd, ptr, len, index).offset(at).build(),
            None => opcode::Write::new(fd, ptr, len).offset(at).build(),
        });
        Ok(if known.is_direct { Prepared::DirectWrite(entry) } else { Prepared::Other(entry) })
    }

    /// How an operation names a whole window.
    fn whole(&self, buf: &Buf) -> Named {
        buf.named(0..buf.len(), self.id())
    }

    /// Runs a file operation, again if the kernel asks for that. The entry's memory lies in `buf`.
    async fn run(&self, prepared: Prepared, buf: Option<Buf>) -> io::Result<usize> {
        for _ in 0..MAX_RETRIES {
            let keep = buf.clone().map_or(Keep::Nothing, Keep::Buf);
            match self.start(prepared.clone(), keep, OnDrop::Leave).await {
                Ok(count) => return Ok(count as usize),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) => self.sleep(Duration::from_millis(1)).await?,
                    _ => return Err(error),
                },
            }
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }

    async fn fallocate(&self, file: FileId, mode: i32, at: u64, len: u64) -> io::Result<()> {
        let entry = entry_for!(self.target(file)?, |fd| opcode::Fallocate::new(fd, len)
            .offset(at)
            .mode(mode)
            .build());
        match self.run(Prepared::Other(entry), None).await {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                Err(io::Error::new(io::ErrorKind::Unsupported, error))
            }
            result => result.map(drop),
        }
    }
}

impl Io for Uring {
    async fn read(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.run(Prepared::Other(self.read_entry(file, at, self.whole(&buf))?), Some(buf)).await
    }

    async fn write(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.run(self.write_entry(file, at, self.whole(&buf))?, Some(buf)).await
    }

    async fn sync(&self, file: FileId) -> io::Result<()> {
        let flags = types::FsyncFlags::DATASYNC;
        let entry = entry_for!(self.target(file)?, |fd| opcode::Fsync::new(fd).flags(flags).build());
        self.run(Prepared::Other(entry), None).await.map(drop)
    }

    async fn allocate(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        match self.fallocate(file, 0, at, len).await {
            // What a block device says of what begins behind its end. A write there says that it is full.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Err(io::Error::new(io::ErrorKind::Unsupported, error))
            }
            result => result,
        }
    }

    async fn punch_hole(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        self.fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, at, len).await
    }

    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        if !self.0.has_ftruncate {
            // Kernels before 6.9. Lengths are set while an image is opened, closed or grown, not
            // by guest requests, so a blocking call is bearable.
            return self.0.files.set_len(file, len);
        }
        let entry = entry_for!(self.target(file)?, |fd| opcode::Ftruncate::new(fd, len).build());
        self.run(Prepared::Other(entry), None).await.map(drop)
    }

    async fn pause(&self) {
        // A ring that has failed says so to the next operation.
        let _ = self.sleep(PAUSE).await;
    }
}
