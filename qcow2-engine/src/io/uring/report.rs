//! Operations without a future: their completions gather in a list, which one task takes at a time.
//!
//! For a caller that keeps its own account of what is in flight, and for whom a future and a waker per
//! operation would cost more than the rest of its work. It gives each operation a token and finds
//! that in the report, and the ring keeps the memory from the first such operation on it as long as it exists
//! ([`Uring::keep`]). So the token is all that has to be known of an operation.

use super::{KernelBuf, REPORT, Uring};
use crate::io::{Buf, FileId};
use io_uring::squeue;
use std::{
    cell::{RefCell, RefMut},
    future::poll_fn,
    io, mem,
    ops::Range,
    task::{Poll, Waker},
};

/// The end of an operation that was started with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// What the operation was started with.
    pub token: u32,
    /// What the kernel says: a count, or a negative errno.
    pub result: i32,
}

#[derive(Default)]
pub(super) struct Reports {
    list: RefCell<Vec<Report>>,
    waker: RefCell<Option<Waker>>,
}

impl Reports {
    /// What has been reported and not been taken yet; [`Self::announce`] what is added.
    pub(super) fn list(&self) -> RefMut<'_, Vec<Report>> {
        self.list.borrow_mut()
    }

    /// Wakes the task that waits for reports, if there are any.
    pub(super) fn announce(&self) {
        if self.list.borrow().is_empty() {
            return;
        }
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Uring {
    /// Submits a prepared operation whose end is told by [`Uring::reports`].
    ///
    /// # Safety
    /// Memory that `entry` names stays valid until the ring is gone, as what it keeps does. The `user_data`
    /// of `entry` is replaced. `entry` completes exactly once.
    #[inline]
    pub unsafe fn submit_reporting(&self, entry: squeue::Entry, token: u32) {
        // SAFETY: the caller's word.
        self.start_reporting(token, |user_data| unsafe { self.push(&entry.user_data(user_data)) });
    }

    /// Starts a read into the part `range` of `buf`, as [`crate::io::Io::read`] but without repetition where the
    /// kernel asks for it (EAGAIN, EINTR).
    ///
    /// # Panics
    /// When `range` does not lie inside the buffer.
    #[inline]
    pub fn read_reporting(&self, file: FileId, at: u64, buf: &Buf, range: Range<usize>, token: u32) {
        self.keep_once(buf);
        let into = buf.named(range, self.id());
        // SAFETY: the ring keeps `buf`.
        self.start_reporting(token, |user_data| unsafe {
            self.push(&self.read_entry(file, at, into)?.user_data(user_data))
        });
    }

    /// Starts a write of the part `range` of `buf`; see [`Uring::read_reporting`].
    ///
    /// # Panics
    /// When `range` does not lie inside the buffer.
    pub fn write_reporting(&self, file: FileId, at: u64, buf: &Buf, range: Range<usize>, token: u32) {
        self.keep_once(buf);
        let from = buf.named(range, self.id());
        // SAFETY: the ring keeps `buf`.
        self.start_reporting(token, |user_data| unsafe {
            self.hand_over(self.write_entry(file, at, from)?, user_data)
        });
    }

    /// Starts a read into memory of the kernel's; otherwise as [`Uring::read_reporting`].
    pub fn read_into_reporting(&self, file: FileId, at: u64, buf: KernelBuf, token: u32) {
        // SAFETY: the entry names no memory of ours.
        self.start_reporting(token, |user_data| unsafe {
            self.push(&self.read_into_entry(file, at, buf)?.user_data(user_data))
        });
    }

    /// Starts a write from memory of the kernel's; otherwise as [`Uring::read_reporting`].
    pub fn write_from_reporting(&self, file: FileId, at: u64, buf: KernelBuf, token: u32) {
        // SAFETY: the entry names no memory of ours.
        self.start_reporting(token, |user_data| unsafe {
            self.hand_over(self.write_from_entry(file, at, buf)?, user_data)
        });
    }

    /// Waits for reports and exchanges them for `done`, whose content is lost. For one task at a time.
    pub async fn reports(&self, done: &mut Vec<Report>) {
        done.clear();
        poll_fn(|context| {
            let reports = &self.0.reports;
            mem::swap(&mut *reports.list.borrow_mut(), done);
            if !done.is_empty() {
                return Poll::Ready(());
            }
            reports.waker.replace(Some(context.waker().clone()));
            Poll::Pending
        })
        .await;
    }

    #[inline]
    fn keep_once(&self, buf: &Buf) {
        if !buf.is_kept_by(self.id()) {
            self.keep(vec![buf.clone()]);
        }
    }

    /// Has an operation handed to the kernel under the `user_data` that reports it.
    #[inline]
    fn start_reporting(&self, token: u32, hand_over: impl FnOnce(u64) -> io::Result<()>) {
        match hand_over(REPORT | u64::from(token)) {
            Ok(()) => self.0.reporting.set(self.0.reporting.get() + 1),
            Err(error) => self.report_failure(&error, token),
        }
    }

    #[cold]
    fn report_failure(&self, error: &io::Error, token: u32) {
        let result = -error.raw_os_error().unwrap_or(libc::EIO);
        self.0.reports.list().push(Report { token, result });
        self.0.reports.announce();
    }
}
