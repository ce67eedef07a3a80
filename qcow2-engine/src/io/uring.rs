//! The io_uring of one serving thread, and the engine's [`Io`](super::Io) on it.
//!
//! [`Uring`] is a cheap handle that never leaves its thread. An operation is put on the submission
//! queue when its future is made; one [`Uring::turn`] submits all that has gathered, waits if there
//! is nothing else to do, and hands out completions. Whoever drives the futures calls it
//! ([`crate::exec`]). What the ring carries besides the engine's file operations comes in through
//! [`Uring::submit`]: this module knows nothing of ublk or of image formats.
//!
//! Invariants: memory that the kernel may touch belongs to a slot until its completion
//! (`slots`); a dropped future cancels nothing (except a timer), and dropping the last handle
//! waits for what is in flight, for `TEARDOWN` at most, and then leaks the memory rather than free it.

#![allow(unsafe_code, reason = "submissions name memory; its parts are covered")]

mod operations;
mod registered;
mod report;
mod setup;
mod slots;
mod submit;
#[cfg(test)]
mod tests;

use super::{Buf, Files};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use nix::sys::eventfd::{EfdFlags, EventFd};
use operations::Known;
pub use registered::{KernelBuf, Registered};
pub use report::Report;
use report::Reports;
use slots::{Keep, Key, Slots};
use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};
use submit::{Prepared, Writes};

/// Slots of the ring's table of registered files; further files go by descriptor.
const FILE_SLOTS: u32 = 128;
/// Registered-file slots from here on are for [`Uring::register_fd`].
const FIRST_GUEST_SLOT: u32 = FILE_SLOTS - 8;
/// How often in a row an operation that ends in EAGAIN is tried again, 1 ms apart.
const MAX_RETRIES: u32 = 5_000;
/// How long dropping the ring waits for operations in flight.
const TEARDOWN: Duration = Duration::from_secs(5);

/// `user_data` of the read that waits for a [`Kick`].
const KICK: u64 = 1 << 63;
/// `user_data` of a cancellation, whose own result is of no interest.
const CANCEL: u64 = KICK | 1;
/// With this bit: `user_data` of an operation without a slot; its token is below.
const REPORT: u64 = 1 << 62;

/// A handle to this thread's ring.
#[derive(Clone)]
pub struct Uring(Rc<Inner>);

struct Inner {
    ring: RefCell<IoUring>,
    slots: RefCell<Slots>,
    reports: Reports,
    writes: Writes,
    files: Arc<Files>,
    /// What is known of each file, in the order of their ids; filled when first used.
    known: RefCell<Vec<Option<Known>>>,
    guest_slots: RefCell<Vec<u32>>,
    /// Memory that stays as long as the ring; see [`Uring::keep`].
    kept: RefCell<Vec<Buf>>,
    /// Operations in flight that have no slot: see `report`.
    reporting: Cell<usize>,
    has_file_table: bool,
    has_ftruncate: bool,
    kick: Arc<Kick>,
    kick_buf: Buf,
    kick_armed: Cell<bool>,
    /// The error of a call into the kernel that was given up.
    failure: Cell<Option<i32>>,
}

/// A file as a submission names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// An open descriptor.
    Fd(RawFd),
    /// A slot of the ring's table of registered files.
    Fixed(u32),
}

/// Builds a submission for a [`Target`], whichever kind it is.
#[macro_export]
macro_rules! entry_for {
    ($target:expr, |$fd:ident| $entry:expr) => {
        match $target {
            $crate::io::uring::Target::Fd(raw) => {
                let $fd = ::io_uring::types::Fd(raw);
                $entry
            }
            $crate::io::uring::Target::Fixed(slot) => {
                let $fd = ::io_uring::types::Fixed(slot);
                $entry
            }
        }
    };
}

use entry_for;

/// How long [`Uring::turn`] waits for a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all.
    No,
    /// Until a completion or a [`Kick`].
    Forever,
    /// The same, but for so long at most.
    For(Duration),
}

/// Wakes a ring's thread from any other thread.
#[derive(Debug)]
pub struct Kick {
    event: EventFd,
    asleep: AtomicBool,
}

impl Kick {
    /// Ends the thread's wait if it waits. Call it *after* making visible what it shall find.
    pub fn kick(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            // It can only fail when 2^64 - 2 kicks are unread; then the thread wakes anyway.
            let _ = self.event.write(1);
        }
    }
}

impl Uring {
    /// Makes a ring for this thread with `entries` submission slots (a power of two; more
    /// operations than that may be in flight).
    ///
    /// # Errors
    /// `Unsupported` with the way out when io_uring is missing or forbidden; the operating system's.
    pub fn new(files: Arc<Files>, entries: u32) -> io::Result<Self> {
        let ring = setup::set_up(entries)?;
        let mut probe = Probe::new();
        let has_ftruncate = ring.submitter().register_probe(&mut probe).is_ok()
            && probe.is_supported(opcode::Ftruncate::CODE);
        let has_file_table = ring.submitter().register_files_sparse(FILE_SLOTS).is_ok();
        // Not non-blocking: the ring's read of it must wait.
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        Ok(Self(Rc::new(Inner {
            slots: RefCell::new(Slots::with_capacity(ring.params().cq_entries() as usize)),
            ring: RefCell::new(ring),
            reports: Reports::default(),
            writes: Writes::default(),
            files,
            known: RefCell::default(),
            guest_slots: RefCell::new((FIRST_GUEST_SLOT..FILE_SLOTS).collect()),
            kept: RefCell::default(),
            reporting: Cell::new(0),
            has_file_table,
            has_ftruncate,
            kick: Arc::new(Kick { event, asleep: AtomicBool::new(false) }),
            kick_buf: Buf::zeroed(size_of::<u64>()),
            kick_armed: Cell::new(false),
            failure: Cell::new(None),
        })))
    }

    /// Submits a prepared operation. Completion of the future gives the result, or the error that
    /// a negative result stands for. Dropping it leaves the operation to the kernel.
    ///
    /// # Safety
    /// Memory that `entry` names must lie in `keep`, or stay valid until the operation completes
    /// or the ring is gone. The `user_data` of `entry` is replaced. `entry` completes exactly once.
    pub unsafe fn submit(&self, entry: squeue::Entry, keep: Option<Buf>) -> Op {
        self.start(Prepared::Other(entry), keep.map_or(Keep::Nothing, Keep::Buf), OnDrop::Leave)
    }

    /// Completes after `duration`. Dropping it cancels the timer.
    ///
    /// # Errors
    /// The ring's.
    pub async fn sleep(&self, duration: Duration) -> io::Result<()> {
        let time = Box::new(types::Timespec::from(duration));
        let entry = opcode::Timeout::new(&raw const *time).build();
        match self.start(Prepared::Other(entry), Keep::Time(time), OnDrop::Cancel).await {
            Err(error) if error.raw_os_error() != Some(libc::ETIME) => Err(error),
            _ => Ok(()),
        }
    }

    /// Submits everything new, waits as told, and hands out the completions that have arrived.
    ///
    /// # Errors
    /// The ring's: it is of no use afterwards.
    pub fn turn(&self, wait: Wait) -> io::Result<()> {
        if let Some(errno) = self.0.failure.get() {
            // While something was queued. What was to go along with it may never have reached the kernel.
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.submit_writes()?;
        if wait != Wait::No && self.0.arrived() == 0 {
            self.arm_kick();
            self.enter(wait)?;
        } else if self.0.queued() > 0 || self.0.has_deferred() {
            self.enter(Wait::No)?;
        }
        // This thread looks for work again: whom the completions wake need not kick it, which would cost a write
        // and a read each time.
        self.end_wait();
        self.reap();
        Ok(())
    }

    /// Announces that this thread is about to wait: until [`Uring::turn`] has waited a [`Kick`] is delivered.
    /// Look for work once more after this call and before the turn.
    pub fn prepare_wait(&self) {
        self.0.kick.asleep.store(true, Ordering::SeqCst);
    }

    /// Takes [`Uring::prepare_wait`] back.
    fn end_wait(&self) {
        self.0.kick.asleep.store(false, Ordering::Relaxed);
    }

    /// What other threads wake this ring's thread with.
    #[must_use]
    pub fn kick_handle(&self) -> Arc<Kick> {
        Arc::clone(&self.0.kick)
    }

    /// The files that this ring works on.
    #[must_use]
    pub fn files(&self) -> &Arc<Files> {
        &self.0.files
    }

    /// Operations in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.slots.borrow().in_flight() + self.0.reporting.get()
    }

    /// Tells this ring from the others that exist at the same time.
    fn id(&self) -> usize {
        Rc::as_ptr(&self.0).addr()
    }

    /// The memory that the entry names lies in `keep`.
    fn start(&self, prepared: Prepared, keep: Keep, on_drop: OnDrop) -> Op {
        let key = self.0.slots.borrow_mut().take(keep);
        // SAFETY: `keep` is in the slot `key` until the completion.
        if let Err(error) = unsafe { self.hand_over(prepared, u64::from(key)) } {
            self.0.slots.borrow_mut().complete(key, -error.raw_os_error().unwrap_or(libc::EIO));
        }
        Op { ring: self.clone(), key, on_drop }
    }

    /// Hands out the completions that are in the queue.
    fn reap(&self) {
        // Nothing is borrowed while wakers run.
        while let Some(entry) = self.next_unreported() {
            self.complete(&entry);
        }
        self.0.reports.announce();
    }

    /// Takes completions up to one that is for somebody else than the list of reports.
    fn next_unreported(&self) -> Option<cqueue::Entry> {
        let mut reports = self.0.reports.list();
        self.0.ring.borrow_mut().completion().find(|entry| {
            let user_data = entry.user_data();
            if user_data & REPORT == 0 {
                return true;
            }
            self.0.reporting.set(self.0.reporting.get() - 1);
            reports.push(Report { token: user_data as u32, result: entry.result() });
            false
        })
    }

    fn complete(&self, entry: &cqueue::Entry) {
        match entry.user_data() {
            CANCEL => {}
            KICK => self.0.kick_armed.set(false),
            key => {
                // The slots are not borrowed while the waker runs.
                let waker = self.0.slots.borrow_mut().complete(key as Key, entry.result());
                waker.into_iter().for_each(Waker::wake);
            }
        }
    }

    /// Keeps a read of the eventfd in flight, so that a kick is a completion.
    fn arm_kick(&self) {
        if self.0.kick_armed.get() {
            return;
        }
        let (fd, buf) = (types::Fd(self.0.kick.event.as_fd().as_raw_fd()), &self.0.kick_buf);
        let read = opcode::Read::new(fd, buf.as_ptr(), buf.len() as u32).build().user_data(KICK);
        // SAFETY: the ring has `kick_buf`, and leaks it if it ends before the read.
        self.0.kick_armed.set(unsafe { self.push(&read) }.is_ok());
    }
}

/// What dropping an unfinished [`Op`] does to the operation.
#[derive(Clone, Copy)]
enum OnDrop {
    Leave,
    Cancel,
}

/// An operation in flight. See [`Uring::submit`].
#[must_use = "the operation runs, but its result is lost"]
pub struct Op {
    ring: Uring,
    key: Key,
    on_drop: OnDrop,
}

impl Future for Op {
    type Output = io::Result<u32>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.ring.0.slots.borrow_mut().poll(self.key, context).map(|result| {
            u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.saturating_neg()))
        })
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        let in_flight = self.ring.0.slots.borrow_mut().abandon(self.key);
        if let (true, OnDrop::Cancel) = (in_flight, self.on_drop) {
            // If it cannot be submitted the operation runs its course: nobody waits for it.
            let cancel = opcode::AsyncCancel::new(u64::from(self.key)).build().user_data(CANCEL);
            // SAFETY: it names no memory.
            let _ = unsafe { self.ring.push(&cancel) };
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for buf in self.kept.get_mut() {
            buf.clear_registered();
            buf.set_keeper(0);
        }
        // The kernel would close them some time after the ring, and keep the image's file system busy until
        // then. With operations in flight it would wait for them.
        if self.has_file_table && self.slots.get_mut().in_flight() + self.reporting.get() == 0 {
            let _ = self.ring.get_mut().submitter().unregister_files();
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if Rc::strong_count(&self.0) == 1 {
            self.drain();
        }
    }
}

impl Uring {
    /// Waits until the kernel is done with all memory, or leaks what it is not done with.
    fn drain(&self) {
        if self.in_flight() == 0 && !self.0.kick_armed.get() {
            return;
        }
        let everything = types::CancelBuilder::any();
        // SAFETY: it names no memory.
        let _ = unsafe { self.push(&opcode::AsyncCancel2::new(everything).build().user_data(CANCEL)) };
        let deadline = Instant::now() + TEARDOWN;
        while self.in_flight() > 0 || self.0.kick_armed.get() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.enter(Wait::For(left.min(Duration::from_millis(100)))).is_err() {
                tracing::error!(in_flight = self.in_flight(), "leaking the memory of I/O that does not end");
                self.0.slots.borrow_mut().leak();
                std::mem::forget(self.0.kept.borrow().clone());
                std::mem::forget(self.0.kick_buf.clone());
                // What may still be written must not lose its image locks.
                std::mem::forget(Arc::clone(&self.0.files));
                return;
            }
            self.reap();
        }
    }
}
