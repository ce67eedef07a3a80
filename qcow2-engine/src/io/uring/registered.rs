//! What the ring has registered besides the image's files: descriptors, buffers of ours whose pages it holds,
//! and buffers of the kernel's.

use super::{Inner, Target, Uring, entry_for, operations::Known, submit::Prepared};
use crate::io::{Buf, FileId, buf::ALIGNMENT};
use io_uring::{opcode, squeue};
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
};

/// A part of a buffer that the kernel puts into the ring's table itself, for as long as it likes: the pages
/// of a block request, for one. See [`Uring::reserve_buffers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelBuf {
    /// Its number in the table.
    pub index: u16,
    /// Where the part begins in it, in bytes.
    pub offset: u64,
    /// The part's length.
    pub len: u32,
}

/// A descriptor in the ring's table of files. See [`Uring::register_fd`].
pub struct Registered<'fd> {
    ring: Uring,
    fd: BorrowedFd<'fd>,
    slot: Option<u32>,
}

impl Registered<'_> {
    /// How to name the descriptor in a submission.
    #[must_use]
    pub fn target(&self) -> Target {
        self.slot.map_or(Target::Fd(self.fd.as_raw_fd()), Target::Fixed)
    }
}

impl Inner {
    /// Puts `fd` (-1: nothing) into the ring's table of files. Returns whether that worked.
    pub(super) fn update_file_slot(&self, slot: u32, fd: RawFd) -> bool {
        self.ring.borrow().submitter().register_files_update(slot, &[fd]).is_ok()
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot
            && self.ring.0.update_file_slot(slot, -1)
        {
            self.ring.0.guest_slots.borrow_mut().push(slot);
        }
    }
}

impl Uring {
    /// Registers a descriptor that is not in [`Files`](crate::io::Files), for cheap use in submissions. It
    /// counts as open until the guard is dropped *and* its operations have completed.
    #[must_use]
    pub fn register_fd<'fd>(&self, fd: BorrowedFd<'fd>) -> Registered<'fd> {
        let slot = if self.0.has_file_table { self.0.guest_slots.borrow_mut().pop() } else { None };
        let slot = slot.filter(|&slot| self.0.update_file_slot(slot, fd.as_raw_fd()));
        Registered { ring: self.clone(), fd, slot }
    }

    /// Has the kernel look up and hold the pages of these windows once, instead of for each read and
    /// write that lies wholly inside one of them. They take up memory, used or not, until the ring
    /// is gone.
    ///
    /// The beginning of each window is held by itself as well: of a buffer that is one page the kernel knows
    /// without looking that a request in it need not be split.
    ///
    /// # Errors
    /// The limit on locked memory; a second call for the same ring.
    pub fn register_buffers(&self, windows: Vec<Buf>) -> io::Result<()> {
        let vector = |window: &Buf, most: usize| libc::iovec {
            iov_base: window.as_ptr().cast(),
            iov_len: window.len().min(most),
        };
        let whole = windows.iter().map(|window| vector(window, usize::MAX));
        let heads = windows.iter().map(|window| vector(window, ALIGNMENT));
        let vectors: Vec<_> = whole.chain(heads).collect();
        // SAFETY: the windows' memory stays allocated as long as the ring, which keeps them.
        unsafe { self.0.ring.borrow().submitter().register_buffers(&vectors)? };
        // The kernel takes 2^14 at most.
        let numbers = (0..).zip(windows.len() as u16..);
        for (window, (index, head)) in windows.iter().zip(numbers) {
            window.set_registered(self.id(), index, head);
        }
        self.keep(windows);
        Ok(())
    }

    /// Keeps memory as long as the ring exists, so that operations on it need not hold it each for itself.
    pub fn keep(&self, memory: Vec<Buf>) {
        memory.iter().for_each(|buf| buf.set_keeper(self.id()));
        self.0.kept.borrow_mut().extend(memory);
    }

    /// Makes room in the ring's table for `count` buffers of the kernel's own.
    ///
    /// # Errors
    /// Linux before 5.19; a ring that has buffers already.
    pub fn reserve_buffers(&self, count: u32) -> io::Result<()> {
        self.0.ring.borrow().submitter().register_buffers_sparse(count)
    }

    /// A read into a buffer of the kernel's. The kernel checks that it is there, and its length.
    #[inline]
    pub(super) fn read_into_entry(&self, file: FileId, at: u64, buf: KernelBuf) -> io::Result<squeue::Entry> {
        let KernelBuf { index, offset, len } = buf;
        Ok(entry_for!(self.target(file)?, |fd| {
            // What stands for an address in such a buffer is an offset.
            opcode::ReadFixed::new(fd, std::ptr::without_provenance_mut(offset as usize), len, index)
                .offset(at)
                .build()
        }))
    }

    /// A write out of a buffer of the kernel's; see [`Self::read_into_entry`].
    pub(super) fn write_from_entry(&self, file: FileId, at: u64, buf: KernelBuf) -> io::Result<Prepared> {
        let KernelBuf { index, offset, len } = buf;
        let Known { target, is_direct } = self.known(file)?;
        let entry = entry_for!(target, |fd| {
            opcode::WriteFixed::new(fd, std::ptr::without_provenance(offset as usize), len, index)
                .offset(at)
                .build()
        });
        Ok(if is_direct { Prepared::DirectWrite(entry) } else { Prepared::Other(entry) })
    }
}
