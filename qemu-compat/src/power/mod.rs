//! The power fails: whatever a host's disk holds then, the image on it is whole.
//!
//! ```text
//! fixture   an image on a file system, made by QEMU's tools
//! load      changes through /dev/ublkbN, flushes beside them     journal  what was durable when
//! host      the file system lies on dm-log-writes; a mark after each acknowledged flush
//! log       everything that passed the host's disk, in order
//! replay    states: the host's disk at a moment, with any part lost of what was not durable then
//! here      each state: the file system recovers, `qemu-img check` finds leaks at most, every sector
//!           holds what the journal allows, the image can be served again, and its leaks are given back
//! ```
//!
//! This proves what the simulator cannot: that the real daemon asks the real kernel for the right
//! thing at the right time, through the file system, its journal and the block layer.

mod host;
mod journal;
mod load;
mod log;
mod replay;

use crate::{
    device::{Binary, DeviceDisk},
    disk::{Disk, Op, Server},
    fixture::{Fixture, Recipe},
    fs::Kind,
    qemu_img::{self, Verdict},
};
use anyhow::{Context, Result, bail, ensure};
use host::{Logged, Plain};
use journal::Journal;
use load::Plan;
use log::Log;
use replay::{Moment, Replay};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

/// Between two flushes at most, in milliseconds.
const FLUSH_PAUSE: u64 = 120;
/// What the search for leaks is given at first; it begins a second after the device serves.
const FIRST_PATIENCE: Duration = Duration::from_secs(3);
/// Each attempt is given twice as long as the one before.
const ATTEMPTS: u32 = 4;

/// A host, an image on it, and how much is done.
#[derive(Clone, Copy, Debug)]
pub struct Outage {
    /// The host's file system.
    pub host: Kind,
    /// The image.
    pub recipe: Recipe,
    /// Acknowledged flushes.
    pub flushes: usize,
    /// States to judge.
    pub states: usize,
    /// Every so many states the image is served again.
    pub served_again: usize,
}

impl Outage {
    /// What tells it from others.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.host.name(), self.recipe.name())
    }
}

/// Cuts the power at many moments of one history.
///
/// # Errors
/// What did not hold, in which state.
pub fn cut(binary: &Binary, dir: &Path, outage: &Outage, seed: u64) -> Result<()> {
    let site = Site::new(dir, outage)?;
    let fixture = site.make_image(seed)?;
    replay::copy_sparse(&site.disk, &site.base)?;
    let journal = site.record(binary, &fixture, seed)?;
    let log = Log::read(&site.log)?;
    let mut rng = fastrand::Rng::with_seed(seed);
    let moments = replay::choose(&log.entries, outage.states, &mut rng);
    ensure!(moments.len() * 2 > outage.states, "only {} moments in the log", moments.len());
    let mut replay = Replay::new(&log, site.base.clone());
    let mut leaks = 0;
    for (index, moment) in moments.iter().enumerate() {
        replay.make(moment, &site.disk)?;
        let again = index.is_multiple_of(outage.served_again).then_some(binary);
        let has_leaks = site.judge(&fixture, &journal, moment, again);
        leaks += u32::from(has_leaks.with_context(|| format!("state {index}: {moment}"))?);
    }
    println!(
        "       {}: {} changes, {} entries in the log, {} states held, {leaks} of them with leaks",
        outage.name(),
        journal.issued(),
        log.entries.len(),
        moments.len()
    );
    Ok(())
}

/// Files and places of one case.
struct Site<'a> {
    outage: &'a Outage,
    /// The host's disk; later, each of its states.
    disk: PathBuf,
    base: PathBuf,
    log: PathBuf,
    mount_point: PathBuf,
    /// What QEMU reads in the image.
    raw: PathBuf,
}

impl<'a> Site<'a> {
    fn new(dir: &Path, outage: &'a Outage) -> Result<Self> {
        let path = |name: &str| dir.join(name);
        let site = Self {
            outage,
            disk: path("host.img"),
            base: path("base.img"),
            log: path("host.log"),
            mount_point: path("mnt"),
            raw: path("found.raw"),
        };
        fs::create_dir(&site.mount_point)?;
        Ok(site)
    }

    /// The host as it is before anything is served.
    fn make_image(&self, seed: u64) -> Result<Fixture> {
        host::make_disk(self.outage.host, &self.disk)?;
        let mounted = Plain::mount(self.outage.host, &self.disk, &self.mount_point)?;
        let fixture = Fixture::make(&self.mount_point, &self.outage.recipe, seed)?;
        mounted.unmount()?;
        Ok(fixture)
    }

    /// Serves the image while the log is kept, and lets it be changed.
    fn record(&self, binary: &Binary, fixture: &Fixture, seed: u64) -> Result<Journal> {
        let recipe = &self.outage.recipe;
        let host = Logged::mount(self.outage.host, &self.disk, &self.log, &self.mount_point)?;
        host.mark(&replay::mark_text(0))?;
        let mut disk = binary.attach(&fixture.image, recipe.queues)?;
        let plan = Plan::new(disk.size(), recipe.cluster(), recipe.discards(), seed);
        let history = History::new(Journal::new(fixture.mirror.clone()));
        load_and_flush(&mut disk, &history, plan, &host, self.outage.flushes, seed)?;
        disk.detach()?;
        // A clean end makes everything durable.
        let all = history.lock().acknowledged;
        history.mark(&host, all)?;
        host.unmount()?;
        Ok(history.into_journal())
    }

    /// One state. Says whether it has leaks.
    fn judge(
        &self,
        fixture: &Fixture,
        journal: &Journal,
        moment: &Moment,
        again: Option<&Binary>,
    ) -> Result<bool> {
        let mounted = Plain::mount(self.outage.host, &self.disk, &self.mount_point)?;
        let verdict = qemu_img::check(&fixture.image)?;
        if let Verdict::Damaged(text) = &verdict {
            bail!("qemu-img check finds more than leaks: {text}");
        }
        qemu_img::extract(&fixture.image, &self.raw)?;
        journal.hold(&self.raw, moment.mark)?;
        if let Some(binary) = again {
            fixture.hold_unchanged(&self.raw.with_extension("snapshot"))?;
            self.serve_again(binary, fixture)?;
        }
        mounted.unmount()?;
        Ok(verdict != Verdict::Clean)
    }

    /// Serves what the cut has left until its leaks are gone; it shows what QEMU has read in it.
    fn serve_again(&self, binary: &Binary, fixture: &Fixture) -> Result<()> {
        let mut patience = FIRST_PATIENCE;
        for _ in 0..ATTEMPTS {
            let mut disk = binary.attach(&fixture.image, self.outage.recipe.queues)?;
            compare_with(&mut disk, &self.raw).context("served again, it shows something else")?;
            thread::sleep(patience);
            disk.detach()?;
            match qemu_img::check(&fixture.image)? {
                Verdict::Clean => return Ok(()),
                Verdict::Leaks(_) => patience *= 2,
                Verdict::Damaged(text) => bail!("served again, qemu-img check finds damage: {text}"),
            }
        }
        qemu_img::check_clean(&fixture.image).context("the leaks of the cut were not given back")
    }
}

/// The journal, shared by those who change the disk and who flush it.
struct History {
    state: Mutex<Recorded>,
    /// Marks are made one after the other.
    marking: Mutex<()>,
}

struct Recorded {
    journal: Journal,
    /// Changes before this one have been acknowledged.
    acknowledged: usize,
}

impl History {
    fn new(journal: Journal) -> Self {
        Self { state: Mutex::new(Recorded { journal, acknowledged: 0 }), marking: Mutex::new(()) }
    }

    fn lock(&self) -> MutexGuard<'_, Recorded> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks the log: the first `covered` changes are durable.
    fn mark(&self, host: &Logged, covered: usize) -> Result<()> {
        let _one_at_a_time = self.marking.lock().unwrap_or_else(PoisonError::into_inner);
        let number = self.lock().journal.open_mark(covered);
        host.mark(&replay::mark_text(number))?;
        self.lock().journal.close_mark(number);
        Ok(())
    }

    fn into_journal(self) -> Journal {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).journal
    }
}

/// One thread changes the disk, several requests at a time; another flushes it and makes marks.
fn load_and_flush(
    disk: &mut DeviceDisk,
    history: &History,
    mut plan: Plan,
    host: &Logged,
    flushes: usize,
    seed: u64,
) -> Result<()> {
    let path = disk.device().path();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let flusher = scope.spawn(|| {
            let outcome = flush_over_and_over(&path, history, host, flushes, seed);
            is_over.store(true, Ordering::Relaxed);
            outcome
        });
        let mut outcome = Ok(());
        while outcome.is_ok() && !is_over.load(Ordering::Relaxed) {
            outcome = change(disk, history, &plan.batch());
        }
        outcome.and(flusher.join().unwrap_or_else(|_| bail!("the flusher panicked")))
    })
}

fn change(disk: &mut DeviceDisk, history: &History, batch: &[Op]) -> Result<()> {
    {
        let mut recorded = history.lock();
        batch.iter().for_each(|op| recorded.journal.issue(op));
    }
    disk.run(batch)?;
    let mut recorded = history.lock();
    recorded.acknowledged = recorded.journal.issued();
    Ok(())
}

fn flush_over_and_over(
    device: &Path,
    history: &History,
    host: &Logged,
    flushes: usize,
    seed: u64,
) -> Result<()> {
    let file = File::open(device)?;
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..flushes {
        thread::sleep(Duration::from_millis(rng.u64(..FLUSH_PAUSE)));
        let covered = history.lock().acknowledged;
        file.sync_all()?;
        history.mark(host, covered)?;
    }
    Ok(())
}

/// Holds what a disk shows against a raw file.
fn compare_with(disk: &mut DeviceDisk, raw: &Path) -> Result<()> {
    const PIECE: u64 = 1 << 20;
    let expected = fs::read(raw)?;
    for (index, expected) in expected.chunks(PIECE as usize).enumerate() {
        let at = index as u64 * PIECE;
        let found = disk.run(&[Op::Read { at, len: expected.len() as u64 }])?.pop().unwrap_or_default();
        ensure!(found == expected, "the MiB at {at:#x} differs");
    }
    Ok(())
}
