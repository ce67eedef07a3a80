//! Changes a disk and flushes it, and says in time what is issued and what is durable.
//!
//! Who listens is a [`Witness`]: it must outlive what is going to happen to the machine.

use super::{journal::Journal, load::Plan};
use crate::{
    device::DeviceDisk,
    disk::{Disk, Op},
};
use anyhow::{Result, bail};
use std::{
    fs::File,
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

/// Between two flushes at most, in milliseconds.
const FLUSH_PAUSE: u64 = 120;

/// Is told what happens, before it could matter.
pub(super) trait Witness: Sync {
    /// The first `count` changes have been issued, or will be at once.
    ///
    /// # Errors
    /// It cannot be kept in mind.
    fn issued(&self, count: usize) -> Result<()>;

    /// The first `covered` changes are durable; this is mark `number`.
    ///
    /// # Errors
    /// It cannot be kept in mind.
    fn durable(&self, number: usize, covered: usize) -> Result<()>;
}

/// The journal, shared by those who change the disk and who flush it.
pub(super) struct History<'a> {
    recorded: Mutex<Recorded>,
    /// Marks are made one after the other.
    marking: Mutex<()>,
    witness: &'a dyn Witness,
}

struct Recorded {
    journal: Journal,
    /// Changes before this one have been acknowledged.
    acknowledged: usize,
}

impl<'a> History<'a> {
    /// Goes on with a journal in which everything is durable.
    pub(super) fn new(journal: Journal, witness: &'a dyn Witness) -> Self {
        let acknowledged = journal.issued();
        Self { recorded: Mutex::new(Recorded { journal, acknowledged }), marking: Mutex::new(()), witness }
    }

    /// One thread changes the disk, several requests at a time, until another has flushed it so often
    /// and made a mark each time.
    ///
    /// # Errors
    /// A request, a flush or the witness failed.
    pub(super) fn drive(
        &self,
        disk: &mut DeviceDisk,
        mut plan: Plan,
        flushes: usize,
        seed: u64,
    ) -> Result<()> {
        let path = disk.device().path();
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let flusher = scope.spawn(|| {
                let outcome = self.flush_over_and_over(&path, flushes, seed);
                is_over.store(true, Ordering::Relaxed);
                outcome
            });
            let mut outcome = Ok(());
            while outcome.is_ok() && !is_over.load(Ordering::Relaxed) {
                outcome = self.change(disk, &plan.batch());
            }
            outcome.and(flusher.join().unwrap_or_else(|_| bail!("the flusher panicked")))
        })
    }

    /// Marks that all that was acknowledged is durable, because the disk was closed cleanly.
    ///
    /// # Errors
    /// The witness failed.
    pub(super) fn closed(&self) -> Result<()> {
        let all = self.lock().acknowledged;
        self.mark(all)
    }

    /// What happened.
    pub(super) fn into_journal(self) -> Journal {
        self.recorded.into_inner().unwrap_or_else(PoisonError::into_inner).journal
    }

    fn change(&self, disk: &mut DeviceDisk, batch: &[Op]) -> Result<()> {
        let count = {
            let journal = &mut self.lock().journal;
            batch.iter().for_each(|op| journal.issue(op));
            journal.issued()
        };
        self.witness.issued(count)?;
        disk.run(batch)?;
        self.lock().acknowledged = count;
        Ok(())
    }

    fn flush_over_and_over(&self, device: &Path, flushes: usize, seed: u64) -> Result<()> {
        let file = File::open(device)?;
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..flushes {
            thread::sleep(Duration::from_millis(rng.u64(..FLUSH_PAUSE)));
            let covered = self.lock().acknowledged;
            file.sync_all()?;
            self.mark(covered)?;
        }
        Ok(())
    }

    fn mark(&self, covered: usize) -> Result<()> {
        let _one_at_a_time = self.marking.lock().unwrap_or_else(PoisonError::into_inner);
        let number = self.lock().journal.open_mark(covered);
        self.witness.durable(number, covered)?;
        self.lock().journal.close_mark(number);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Recorded> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
