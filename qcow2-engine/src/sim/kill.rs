//! The process dies, the machine does not: the next process replays the redo log.
//!
//! Everything that has completed is in the file, durable or not; of what was in flight some is. Then,
//! unlike after a loss of power, *everything acknowledged* must be there (R7). The replay is itself cut
//! short in both ways, by power and by another kill.

use super::{
    disk::{Disk, File, HeldBack},
    model::{Model, Value},
    oracle,
    play::{Player, play},
    rng::Rng,
    run::Life,
    workload::Request,
};
use crate::{Image, Lane, MIN_REDO_BYTES, RedoError, RedoLog, io::Buf};
use std::{
    cell::RefCell,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// One moment in this many is a process's last.
const KILL_CHANCE: u64 = 24;
/// One replay in this many is cut short at every moment.
const CUT_SHORT_CHANCE: u64 = 6;
/// Processes that die one after the other, and the last one, which lives.
const MAX_PROCESSES: u32 = 3;

/// One successor of the first process in this many goes on to serve, until one has: it is judged at every moment,
/// which takes as long as all that was before.
const SERVING_CHANCE: u64 = 16;
/// One of the others in this many closes at once.
const CLOSING_CHANCE: u64 = 4;
/// Requests that it serves, at the most, before it searches for leaks.
const MAX_REQUESTS: u64 = 3;
/// The numbers of its requests, apart from those of the first process.
const SUCCESSOR: u32 = 1 << 24;

/// The memory of a redo log, which outlives processes.
pub(super) struct Memory(Arc<Words>);

struct Words(Vec<AtomicU64>);

impl AsRef<[AtomicU64]> for Words {
    fn as_ref(&self) -> &[AtomicU64] {
        &self.0
    }
}

impl Memory {
    pub(super) fn new() -> Self {
        Self(Arc::new(Words((0..MIN_REDO_BYTES / 8).map(|_| AtomicU64::new(0)).collect())))
    }

    pub(super) fn create(&self) -> Result<RedoLog, RedoError> {
        RedoLog::create(Arc::clone(&self.0) as _)
    }

    fn open(&self) -> Result<RedoLog, RedoError> {
        RedoLog::open(Arc::clone(&self.0) as _)
    }

    /// The memory as it is now, for a process that goes another way from here.
    fn copy(&self) -> Self {
        let value = |word: &AtomicU64| AtomicU64::new(word.load(Ordering::Relaxed));
        Self(Arc::new(Words(self.0.0.iter().map(value).collect())))
    }
}

impl Life<'_> {
    /// Kills the process, now and then, and sees what the next one makes of it.
    pub(super) fn kill_here(&mut self) -> Result<(), String> {
        if self.processes == MAX_PROCESSES || self.rng.below(KILL_CHANCE) != 0 {
            return Ok(());
        }
        if self.disk.has_lost() {
            // The next one would build on what it reads, and cannot know that it is not on disk.
            return Ok(());
        }
        self.totals.kills += 1;
        let serves = !self.has_heir && self.rng.below(SERVING_CHANCE) == 0;
        self.has_heir |= serves;
        let keeps = self.rng.below(3);
        let disk = {
            let rng = &mut self.rng;
            self.disk.after_kill(|| keeps == 1 || keeps == 2 && rng.below(2) == 0)
        };
        let mut next = Life {
            fixture: self.fixture,
            disk,
            model: Rc::clone(&self.model),
            rng: Rng::new(self.rng.draw()),
            totals: &mut *self.totals,
            judged: (u64::MAX, 0),
            tried: 0,
            memo: oracle::Memo::default(),
            held_back: HeldBack::Nothing,
            redo: self.redo.copy(),
            paging: self.paging,
            processes: self.processes + 1,
            has_heir: true,
        };
        next.recover(serves).map_err(|error| format!("process {} was killed: {error}", self.processes))
    }

    /// Replays the log and compares what is read then with all that was acknowledged, and what the file
    /// holds with what it may hold.
    fn recover(&mut self, serves: bool) -> Result<(), String> {
        let image = self.open().map_err(|error| format!("it does not open: {error}"))?;
        let log = self.redo.open().map_err(|error| error.to_string())?;
        let lane = Lane::new(&image, self.disk.clone(), 1);
        let had_records = !log.is_empty();
        let replay = {
            let lane = lane.clone();
            Box::pin(async move { lane.replay(&log).await.map(drop).map_err(|error| error.to_string()) })
        };
        let is_cut_short = self.rng.below(CUT_SHORT_CHANCE) == 0;
        self.drive(vec![replay], is_cut_short)?;
        let buf = Buf::zeroed(self.fixture.content.len() * 512);
        let read = {
            let (lane, buf) = (lane.clone(), buf.clone());
            Box::pin(async move { lane.read(0, buf).await.map_err(|error| error.to_string()) })
        };
        self.drive(vec![read], false)?;
        self.check_live(&buf)?;
        // Nothing of the mapping, of the counts or of a snapshot has come to harm either.
        let (_, is_durable) = self.judge_file()?;
        if had_records {
            // It may begin a log of its own now.
            if !is_durable {
                return Err("the log was replayed, and not everything is durable".to_owned());
            }
            self.check_live_file()?;
        }
        match self.rng.below(CLOSING_CHANCE) {
            _ if serves => self.serve_on(&image, &lane, &buf),
            0 => self.close_at_once(&lane),
            _ => Ok(()),
        }
    }

    /// What the file says by itself, without the log.
    fn check_live_file(&self) -> Result<(), String> {
        let model = self.model.borrow();
        let read = |file: &mut File, _| {
            oracle::read(&file.current, self.fixture.backing.as_deref(), model.len(), &self.memo)
        };
        for (sector, value) in self.disk.look(0, read)?.into_iter().take(model.len()).enumerate() {
            let found = value.ok_or_else(|| format!("sector {sector} cannot be read"))?;
            model.check_live(sector, found).map_err(|allowed| {
                format!("the log was replayed, and sector {sector} holds {found:?}, allowed are {allowed:?}")
            })?;
        }
        Ok(())
    }

    /// The process closes: whatever it believes to be free is given back.
    fn close_at_once(&mut self, lane: &Lane<Disk>) -> Result<(), String> {
        let close = {
            let lane = lane.clone();
            Box::pin(async move { lane.close().await.map_err(|error| error.to_string()) })
        };
        self.drive(vec![close], false)?;
        self.judge_file().map_err(|error| format!("the next one closed: {error}"))?;
        self.check_live_file()
    }

    /// The process serves what it has `found`, gives back what the dead one has leaked, and closes.
    fn serve_on(&mut self, image: &Arc<Image>, lane: &Lane<Disk>, found: &Buf) -> Result<(), String> {
        let flush = {
            let lane = lane.clone();
            async move { lane.flush().await }
        };
        self.carry_out("the next one's flush", flush, false)?;
        // All of it is durable now: nothing that the dead one was about to do can come any more.
        let content: Vec<_> = found.to_vec().chunks_exact(512).map(Value::read).collect();
        self.model = Rc::new(RefCell::new(Model::new(&content)));
        self.judged = (u64::MAX, 0);
        image.keep_redo_log(self.redo.create().map_err(|error| error.to_string())?);
        let mut requests: Vec<_> =
            (0..self.rng.below(MAX_REQUESTS + 1)).map(|_| Request::random(&mut self.rng)).collect();
        requests.retain(|request| self.fixture.takes(request));
        // To search a large image has a plan of its own.
        let searches = !self.fixture.past.is_large() && !self.fixture.has_autoclear_bits();
        requests.extend(searches.then_some(Request::Reclaim(1 << 20)));
        let player = Player {
            lane: lane.clone(),
            model: Rc::clone(&self.model),
            cluster_sectors: self.fixture.variant.cluster_sectors,
            must_find_all: true,
            has_been_told: Rc::default(),
        };
        self.drive(vec![play(player, requests, SUCCESSOR, false)], true)?;
        self.end(lane, false, !searches).map_err(|error| format!("the next one went on: {error}"))
    }
}
