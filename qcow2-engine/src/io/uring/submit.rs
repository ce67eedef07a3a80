//! How entries reach the kernel, and how many at a time.
//!
//! Normally all that has gathered goes in one call. But of a call with more than two entries the kernel
//! holds the block requests back to its end. A direct write then never ends inside its
//! submission, even where the storage could do that (memory, and whatever else completes in the
//! submitter), and from Linux 6.7 on its end is worked off by a kernel thread, with a switch there and
//! back for each. So where writes are seen to complete in the call that submits them they are
//! submitted by twos ([`Pace`]); storage that interrupts gets them all at once, with a trial now and then.

use super::{Inner, MAX_RETRIES, Uring, Wait};
use io_uring::{squeue, types};
use std::{
    cell::{Cell, RefCell},
    io,
    time::Duration,
};

/// The most entries of a call whose block requests the kernel starts one by one.
const UNPLUGGED: usize = 2;
/// Writes by twos after which is decided whether they go on so. One write now and then waits for the file
/// system; that says nothing of the storage.
const TRIAL: u32 = 64;
/// They go on so where one in so many is complete: a call costs far less than a switch to the thread and
/// back.
const WORTH_IT: u32 = 8;
/// Writes from a trial that failed to the next.
const TRIAL_PAUSE: u32 = 4096;

/// An operation on its way to the kernel.
#[derive(Clone)]
pub(super) enum Prepared {
    /// A write to a file that is open for direct I/O.
    DirectWrite(squeue::Entry),
    Other(squeue::Entry),
}

/// How writes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    /// All at once, for so many more.
    Batches(u32),
    /// By twos. Of so many `writes`, so many were `complete` when their submission returned.
    Pairs { writes: u32, complete: u32 },
}

/// Direct writes that wait for the end of the turn.
pub(super) struct Writes {
    pace: Cell<Pace>,
    held: RefCell<Vec<squeue::Entry>>,
}

impl Default for Writes {
    fn default() -> Self {
        Self { pace: Cell::new(Pace::TRIAL), held: RefCell::default() }
    }
}

impl Writes {
    /// Decides for the next write.
    fn go_by_twos(&self) -> bool {
        self.pace.set(self.pace.get().next());
        matches!(self.pace.get(), Pace::Pairs { .. })
    }

    /// Notes how writes by twos went.
    fn note(&self, writes: usize, complete: usize) {
        self.pace.set(self.pace.get().after(writes as u32, complete as u32));
    }
}

impl Pace {
    const TRIAL: Self = Self::Pairs { writes: 0, complete: 0 };

    /// The pace for one more write.
    fn next(self) -> Self {
        match self {
            Self::Batches(0) => Self::TRIAL,
            Self::Batches(left) => Self::Batches(left - 1),
            pairs @ Self::Pairs { .. } => pairs,
        }
    }

    /// The pace after some more writes by twos.
    fn after(self, more: u32, more_complete: u32) -> Self {
        match self {
            Self::Pairs { writes, complete } => {
                let (writes, complete) = (writes + more, complete + more_complete);
                match writes {
                    0..TRIAL => Self::Pairs { writes, complete },
                    _ if complete * WORTH_IT >= writes => Self::TRIAL,
                    _ => Self::Batches(TRIAL_PAUSE),
                }
            }
            batches @ Self::Batches(_) => batches,
        }
    }
}

impl Uring {
    /// Takes an operation over for the kernel.
    ///
    /// # Safety
    /// The memory that the operation names belongs to the slot that `user_data` names, or is kept by the
    /// ring.
    #[inline]
    pub(super) unsafe fn hand_over(&self, prepared: Prepared, user_data: u64) -> io::Result<()> {
        match prepared {
            Prepared::DirectWrite(entry) if self.0.writes.go_by_twos() => {
                self.0.writes.held.borrow_mut().push(entry.user_data(user_data));
                Ok(())
            }
            Prepared::DirectWrite(entry) | Prepared::Other(entry) => {
                // SAFETY: the caller's word.
                unsafe { self.push(&entry.user_data(user_data)) }
            }
        }
    }

    /// Puts an entry on the submission queue, submitting what is there when it is full.
    ///
    /// # Safety
    /// The memory that the entry names is in a slot, or kept by the ring, until the completion.
    #[inline]
    pub(super) unsafe fn push(&self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the caller's word.
            if unsafe { self.0.ring.borrow_mut().submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.make_room()?;
        }
    }

    /// Has the kernel take entries from the queue, which is full.
    #[cold]
    fn make_room(&self) -> io::Result<()> {
        self.enter(Wait::No)
    }

    /// Submits the held writes by twos, and what was on the queue before them.
    pub(super) fn submit_writes(&self) -> io::Result<()> {
        let writes = &self.0.writes;
        if writes.held.borrow().is_empty() {
            return Ok(());
        }
        let mut held = writes.held.take();
        if self.0.queued() > 0 {
            self.call(Inner::submit)?;
        }
        let before = self.0.arrived();
        for pair in held.chunks(UNPLUGGED) {
            // SAFETY: `hand_over` was given the word for each.
            pair.iter().try_for_each(|entry| unsafe { self.push(entry) })?;
            self.call(Inner::submit)?;
        }
        let complete = self.0.arrived().saturating_sub(before);
        writes.note(held.len(), complete);
        held.clear();
        // Its capacity is of use, and nothing has been held meanwhile.
        writes.held.replace(held);
        Ok(())
    }

    /// Submits all that has gathered and waits as told. On return the kernel has taken at least one
    /// entry if there was any.
    pub(super) fn enter(&self, wait: Wait) -> io::Result<()> {
        self.submit_writes()?;
        self.call(|inner| inner.turn(wait))
    }

    /// One io_uring_enter. When it has failed for good the ring is of no use: whoever turns it is told, too.
    pub(super) fn call(&self, call: impl Fn(&Inner) -> io::Result<usize>) -> io::Result<()> {
        let outcome = self.call_patiently(call);
        if let Err(error) = &outcome {
            self.0.failure.set(error.raw_os_error());
        }
        outcome
    }

    fn call_patiently(&self, call: impl Fn(&Inner) -> io::Result<usize>) -> io::Result<()> {
        for _ in 0..MAX_RETRIES {
            let Err(error) = call(&self.0) else { return Ok(()) };
            match error.raw_os_error() {
                // The time is up, or a signal came: the caller looks at the clock and for work.
                Some(libc::ETIME | libc::EINTR) => return Ok(()),
                // The completion queue has overflowed: make room.
                Some(libc::EBUSY) => self.reap(),
                // The kernel has no memory for requests: completions give some back.
                Some(libc::EAGAIN) => {
                    self.reap();
                    std::thread::sleep(Duration::from_millis(1));
                }
                _ => return Err(error),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }
}

impl Inner {
    /// Entries that the kernel has not taken yet.
    pub(super) fn queued(&self) -> usize {
        self.ring.borrow_mut().submission().len()
    }

    /// Completions that nobody has taken yet.
    pub(super) fn arrived(&self) -> usize {
        self.ring.borrow_mut().completion().len()
    }

    /// Whether the kernel has work for this thread that would give completions.
    pub(super) fn has_deferred(&self) -> bool {
        let mut ring = self.ring.borrow_mut();
        let queue = ring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    /// Submits, and does nothing else: deferred work stays.
    fn submit(&self) -> io::Result<usize> {
        let queued = self.queued();
        let ring = self.ring.borrow();
        // SAFETY: no flag and no argument; the entries' memory has been seen to when they were pushed.
        unsafe { ring.submitter().enter::<libc::sigset_t>(queued as u32, 0, 0, None) }
    }

    /// Submits, has deferred work done, and waits.
    fn turn(&self, wait: Wait) -> io::Result<usize> {
        let ring = self.ring.borrow();
        match wait {
            Wait::No => ring.submit(),
            Wait::Forever => ring.submit_and_wait(1),
            Wait::For(duration) => {
                let time = types::Timespec::from(duration);
                ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&time))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_follows_the_storage() {
        let memory = (0..100).fold(Pace::TRIAL, |pace, _| pace.after(2, 2));
        assert!(matches!(memory, Pace::Pairs { .. }));
        let disk = (0..TRIAL / 2).fold(Pace::TRIAL, |pace, _| pace.after(2, 0));
        assert_eq!(disk, Pace::Batches(TRIAL_PAUSE));
        assert_eq!(Pace::Batches(1).next(), Pace::Batches(0));
        assert_eq!(Pace::Batches(0).next(), Pace::TRIAL);
    }
}
