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
//! [`plug`] does without the log: there the whole machine is killed from outside, over and over.
//!
//! A second history begins with one of those states: the power goes again while the file system
//! recovers, leaks are given back, and requests are served.
//!
//! This proves what the simulator cannot: that the real daemon asks the real kernel for the right
//! thing at the right time, through the file system, its journal and the block layer.

mod aftermath;
mod drive;
pub(crate) mod host;
mod journal;
mod load;
mod log;
pub mod plug;
mod replay;

use crate::{
    device::Binary,
    disk::{Disk, Server},
    fixture::{Fixture, Recipe},
    fs::Kind,
    mirror::Mirror,
};
use aftermath::Leaks;
use anyhow::{Context, Result, ensure};
use drive::{History, Witness};
use host::{Logged, Plain};
use journal::Journal;
use load::Plan;
use log::Log;
use replay::{Moment, Replay};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Writes of different histories have different numbers, above those of the tools that made the image.
const NUMBERS_OF_A_HISTORY: u64 = 1_000_000_000;

/// A host, an image on it, and how much is done.
#[derive(Clone, Copy, Debug)]
pub struct Outage {
    /// The host's file system.
    pub host: Kind,
    /// The image.
    pub recipe: Recipe,
    /// Histories: each after the first begins with a state that a cut in the one before has left.
    pub histories: u32,
    /// Acknowledged flushes of each.
    pub flushes: usize,
    /// States to judge of each.
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

/// Cuts the power at many moments.
///
/// # Errors
/// What did not hold, in which state of which history.
pub fn cut(binary: &Binary, dir: &Path, outage: &Outage, seed: u64) -> Result<()> {
    let site = Site::new(dir, outage)?;
    let fixture = site.make_image(seed)?;
    let mut initial = fixture.mirror.clone();
    for history in 0..outage.histories {
        let chapter = Chapter { initial, seed: seed ^ u64::from(history), number: history };
        initial =
            site.one_history(binary, &fixture, chapter).with_context(|| format!("history {history}"))?;
    }
    Ok(())
}

/// What a history begins with.
struct Chapter {
    /// What the image holds.
    initial: Mirror,
    seed: u64,
    number: u32,
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
    /// The state that the next history begins with.
    next: PathBuf,
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
            next: path("next.img"),
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

    /// Serves the image, and judges what cuts would leave. The host's disk and the
    /// content that is returned are those of one of them.
    fn one_history(&self, binary: &Binary, fixture: &Fixture, chapter: Chapter) -> Result<Mirror> {
        replay::copy_sparse(&self.disk, &self.base)?;
        let mut rng = fastrand::Rng::with_seed(chapter.seed);
        let journal = self.record(binary, fixture, chapter)?;
        let log = Log::read(&self.log)?;
        let moments = replay::choose(&log.entries, self.outage.states, &mut rng);
        ensure!(moments.len() * 2 > self.outage.states, "only {} moments in the log", moments.len());
        let mut replay = Replay::new(&log, self.base.clone());
        let (mut leaks, mut content) = (0, None);
        for (index, moment) in moments.iter().enumerate() {
            replay.make(moment, &self.disk)?;
            let goes_on = index == moments.len() / 2;
            if goes_on {
                replay::copy_sparse(&self.disk, &self.next)?;
            }
            let again = index.is_multiple_of(self.outage.served_again).then_some(binary);
            let held = self.judge(fixture, &journal, moment, again);
            leaks += u32::from(held.with_context(|| format!("state {index}: {moment}"))? == Leaks::Some);
            if goes_on {
                let cluster = self.outage.recipe.cluster();
                content = Some(Mirror::read_raw(&self.raw, fixture.mirror.size(), cluster)?);
            }
        }
        println!(
            "       {}: {} changes, {} entries in the log, {} states held, {leaks} of them with leaks",
            self.outage.name(),
            journal.issued(),
            log.entries.len(),
            moments.len()
        );
        fs::rename(&self.next, &self.disk)?;
        content.context("no state was judged")
    }

    /// Serves the image while the log is kept, and lets it be changed.
    fn record(
        &self,
        binary: &Binary,
        fixture: &Fixture,
        Chapter { initial, seed, number }: Chapter,
    ) -> Result<Journal> {
        let recipe = &self.outage.recipe;
        let host = Logged::mount(self.outage.host, &self.disk, &self.log, &self.mount_point)?;
        host.mark(&replay::mark_text(0))?;
        let mut disk = binary.attach(&fixture.image, recipe.queues)?;
        let first = NUMBERS_OF_A_HISTORY * (u64::from(number) + 1);
        let plan = Plan::new(disk.size(), recipe.cluster(), recipe.discards(), seed, first);
        let history = History::new(Journal::new(initial), &host);
        let driven = history.drive(&mut disk, plan, self.outage.flushes, seed);
        driven.with_context(|| format!("the server's log ends: {}", disk.device().last_words()))?;
        disk.detach()?;
        history.closed()?;
        let journal = history.into_journal();
        host.unmount()?;
        Ok(journal)
    }

    /// One state.
    fn judge(
        &self,
        fixture: &Fixture,
        journal: &Journal,
        moment: &Moment,
        again: Option<&Binary>,
    ) -> Result<Leaks> {
        let mounted = Plain::mount(self.outage.host, &self.disk, &self.mount_point)?;
        let leaks = aftermath::judge(&fixture.image, &self.raw, journal, moment.mark)?;
        if let Some(binary) = again {
            fixture.hold_unchanged(&self.raw.with_extension("snapshot"))?;
            aftermath::serve_again(binary, &fixture.image, self.outage.recipe.queues, &self.raw)?;
        }
        mounted.unmount()?;
        Ok(leaks)
    }
}

impl Witness for Logged {
    /// The log tells by itself: what is in it before a mark was issued before it.
    fn issued(&self, _count: usize) -> Result<()> {
        Ok(())
    }

    fn durable(&self, number: usize, _covered: usize) -> Result<()> {
        self.mark(&replay::mark_text(number))
    }
}
