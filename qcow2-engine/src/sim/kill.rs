//! The process dies, the machine does not: the next process replays the redo log.
//!
//! Everything that has completed is in the file, durable or not; of what was in flight some is, in whole or
//! in part. Then, unlike after a loss of power, *everything acknowledged* must be there (R7). The replay is
//! itself cut short in both ways, by power and by another kill, or operations fail under it, and it is done
//! again by yet another process. A process dies between two operations of the disk, or while it is at its
//! log.
//!
//! After a barrier that has failed it is the other way round: what is acknowledged may be lost, nothing is
//! replayed, and nobody may be told any more that something succeeds, until the image is attached anew, as after
//! a loss of power.

use super::{
    disk::Disk,
    faults::{Failing, Fault, HeldBack, Victim},
    file::{File, SECTOR},
    memory::{self, Moment},
    model::{Model, Value},
    oracle,
    play::{Player, play, used_buffer},
    request::Request,
    rng::Rng,
    run::Life,
    tasks::Task,
};
use crate::{Image, Lane, RedoLog, io::Buf};
use std::{cell::RefCell, rc::Rc, sync::Arc};

/// One moment in this many is a process's last.
const KILL_CHANCE: u64 = 28;
/// One replay in this many is cut short at every moment.
const CUT_SHORT_CHANCE: u64 = 6;
/// Between two operations, one process in this many may die while it is at its log,
const TRAP_CHANCE: u64 = 20;
/// which it has touched fewer times than this since the first of them. All others may where they have just
/// noted that the refcount table has moved: that is as rare as it is delicate.
const MAX_TOUCHES: u64 = 48;
/// To note that a barrier has failed touches the log so many times,
const NOTING_TOUCHES: u64 = 3;
/// and to make one so many times.
const MAKING_TOUCHES: u64 = 8;
/// Operations fail under one replay in this many.
const FAILING_CHANCE: u64 = 8;
/// Processes that die one after the other, and the last one, which lives.
pub(super) const MAX_PROCESSES: u32 = 3;

/// One successor of the first process in this many goes on to serve, until one has: it is judged at every
/// moment, which takes as long as all that was before.
const SERVING_CHANCE: u64 = 16;
/// After a loss one in this many is attached anew and serves.
const SERVING_AFTER_LOSS_CHANCE: u64 = 4;
/// One of the others in this many closes at once.
const CLOSING_CHANCE: u64 = 4;
/// Requests that it serves, at the most, before it searches for leaks.
const MAX_REQUESTS: u64 = 3;
/// The numbers of its requests, apart from those of the first process.
const SUCCESSOR: u32 = 1 << 24;

impl Life<'_> {
    /// Kills the process, now and then, and sees what the next one makes of it.
    pub(super) fn kill_here(&mut self) -> Result<(), String> {
        if self.processes == MAX_PROCESSES || self.rng.below(KILL_CHANCE) != 0 {
            return Ok(());
        }
        let moment = self.present();
        self.kill(moment)
    }

    /// Kills it where a barrier has just failed, of which it has not heard; and one that goes another way from here
    /// while it notes that.
    pub(super) fn kill_after_loss(&mut self) -> Result<(), String> {
        if self.processes == MAX_PROCESSES {
            return Ok(());
        }
        let moment = self.present();
        self.kill(moment).map_err(|error| format!("before it has heard of a barrier's failure: {error}"))?;
        self.trap(|rng| Some(rng.below(NOTING_TOUCHES)));
        Ok(())
    }

    /// Sees to it that the process may die before the next operation of the disk completes.
    pub(super) fn set_trap(&mut self) {
        memory::take_trap();
        if self.processes < MAX_PROCESSES {
            self.trap(|rng| (rng.below(TRAP_CHANCE) == 0).then(|| rng.below(MAX_TOUCHES)));
        }
    }

    /// Has the process die at its log, when it has touched that so many times.
    fn trap(&mut self, passes: impl FnOnce(&mut Rng) -> Option<u64>) {
        let rng = Rng::new(self.rng.draw());
        memory::set_trap(passes(&mut self.rng), &self.redo, &self.disk, &self.model, rng);
    }

    /// Kills it then, if it has been at its log.
    pub(super) fn kill_in_trap(&mut self) -> Result<(), String> {
        let caught = memory::take_trap().map(|moment| self.kill(moment));
        caught.unwrap_or(Ok(())).map_err(|error| format!("at its log: {error}"))
    }

    fn present(&mut self) -> Moment {
        Moment::now(&self.disk, &self.model.borrow(), &self.redo, &mut self.rng)
    }

    fn kill(&mut self, moment: Moment) -> Result<(), String> {
        self.totals.kills += 1;
        if moment.has_lost {
            let processes = self.processes;
            let mut next = self.successor(moment);
            let outcome = next.inherit_a_loss();
            return outcome.map_err(|error| format!("process {processes} was killed after a loss: {error}"));
        }
        let serves = !self.has_heir && self.rng.below(SERVING_CHANCE) == 0;
        self.has_heir |= serves;
        let fails = !serves && self.processes + 1 < MAX_PROCESSES && self.rng.below(FAILING_CHANCE) == 0;
        let processes = self.processes;
        let mut next = self.successor(moment);
        let outcome = if fails { next.fail_to_recover() } else { next.recover(serves) };
        outcome.map_err(|error| format!("process {processes} was killed: {error}"))
    }

    fn successor(&mut self, moment: Moment) -> Life<'_> {
        Life {
            fixture: self.fixture,
            disk: moment.disk,
            model: Rc::new(RefCell::new(moment.model)),
            rng: Rng::new(self.rng.draw()),
            totals: &mut *self.totals,
            judged: (u64::MAX, 0),
            tried: 0,
            thorough: self.thorough,
            memo: oracle::Memo::default(),
            held_back: HeldBack::Nothing,
            redo: moment.redo,
            paging: self.paging,
            processes: self.processes + 1,
            has_heir: true,
            abandons_after: None,
            standing: None,
            told: Rc::default(),
            old_leaks: 0,
        }
    }

    /// Operations fail while the log is replayed, and the process ends. Yet another one replays all of it.
    fn fail_to_recover(&mut self) -> Result<(), String> {
        let image = self.open().map_err(|error| format!("it does not open: {error}"))?;
        let log = self.redo.open().map_err(|error| error.to_string())?;
        let lane = Lane::new(&image, self.disk.clone(), 1);
        let faults = [Fault::Eio, Fault::Enospc, Fault::Torn, Fault::Done];
        self.disk.fail(Failing {
            victim: [Victim::Any, Victim::Metadata][self.rng.below(2) as usize],
            after: self.rng.below(6),
            times: 1 + self.rng.below(3),
            fault: faults[self.rng.below(4) as usize],
        });
        let replay = Box::pin(async move {
            // If it has not failed it may be done again all the same.
            let _ = lane.replay(&log).await;
            Ok(())
        });
        let is_cut_short = self.rng.below(CUT_SHORT_CHANCE) == 0;
        self.drive(vec![replay], is_cut_short)?;
        let moment = self.present();
        let has_lost = moment.has_lost;
        let mut next = self.successor(moment);
        let recovered = if has_lost { next.inherit_a_loss() } else { next.recover(false) };
        recovered.map_err(|error| format!("operations failed under its replay: {error}"))
    }

    /// A barrier has failed in the process before, or in one before that, which has told the log. Or it had just
    /// failed, and the supervisor has heard of it too. What it should have covered is lost, acknowledged or not.
    fn inherit_a_loss(&mut self) -> Result<(), String> {
        let log = self.redo.open().map_err(|error| error.to_string())?;
        if log.is_at_barrier() {
            log.note_failure();
        }
        if !log.has_failed() {
            return Err("nobody knows that an fdatasync has failed".to_owned());
        }
        self.disk.drop_cached();
        self.refuse_everything(log)?;
        self.judge_file().map_err(|error| format!("after a process that accepts nothing: {error}"))?;
        if self.rng.below(SERVING_AFTER_LOSS_CHANCE) == 0 {
            self.attach_anew()?;
        }
        Ok(())
    }

    /// The next process has users to whom the one before has said that their flush failed: nothing of theirs
    /// may succeed now.
    fn refuse_everything(&mut self, log: RedoLog) -> Result<(), String> {
        let image = self.open().map_err(|error| format!("it does not open: {error}"))?;
        let lane = Lane::new(&image, self.disk.clone(), 1);
        let task: Task = Box::pin(async move {
            if lane.replay(&log).await.is_ok() {
                return Err("the log is replayed, over payload that may be lost".to_owned());
            }
            lane.image().keep_redo_log(log);
            if lane.flush().await.is_ok() || lane.close().await.is_ok() {
                return Err("a flush or close succeeds, and an earlier fdatasync has failed".to_owned());
            }
            match lane.write(0, Buf::zeroed(SECTOR)).await {
                Ok(()) => Err("a change succeeds, and an earlier fdatasync has failed".to_owned()),
                Err(_) => Ok(()),
            }
        });
        self.drive(vec![task], false)
    }

    /// Whoever attaches it anew finds an image as after a loss of power, and begins a log of its own.
    fn attach_anew(&mut self) -> Result<(), String> {
        let image = self.open().map_err(|error| format!("it does not open anew: {error}"))?;
        image.keep_redo_log(self.redo.create().map_err(|error| error.to_string())?);
        let lane = Lane::new(&image, self.disk.clone(), 1);
        let found = self.read_all(&lane)?;
        // Whoever followed it before all of this is durable would be asked for what the model takes to be there.
        let processes = std::mem::replace(&mut self.processes, MAX_PROCESSES);
        self.make_durable(&lane, &found)?;
        self.processes = processes;
        self.serve_on(&image, &lane).map_err(|error| format!("attached anew: {error}"))
    }

    fn read_all(&mut self, lane: &Lane<Disk>) -> Result<Buf, String> {
        let buf = used_buffer(self.fixture.content.len());
        let (lane, into) = (lane.clone(), buf.clone());
        let read = Box::pin(async move { lane.read(0, into).await.map_err(|error| error.to_string()) });
        self.drive(vec![read], false)?;
        Ok(buf)
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
        let buf = self.read_all(&lane)?;
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
            _ if serves => {
                self.make_durable(&lane, &buf)?;
                self.serve_on(&image, &lane)
            }
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

    /// Begins a log of its own, and may be killed meanwhile: another one finds all that is durable.
    fn new_log(&mut self) -> Result<RedoLog, String> {
        self.trap(|rng| Some(rng.below(MAKING_TOUCHES)));
        let log = self.redo.create();
        if let Some(moment) = memory::take_trap().filter(|_| self.processes < MAX_PROCESSES) {
            self.kill(moment).map_err(|error| format!("while it made its log: {error}"))?;
        }
        log.map_err(|error| error.to_string())
    }

    /// The process makes what it has `found` durable, which is what counts from then on.
    fn make_durable(&mut self, lane: &Lane<Disk>, found: &Buf) -> Result<(), String> {
        let flush = {
            let lane = lane.clone();
            async move { lane.flush().await }
        };
        self.carry_out("the next one's flush", flush, false)?;
        // All of it is durable now: nothing that the dead one was about to do can come any more.
        let content: Vec<_> = found.to_vec().chunks_exact(SECTOR).map(Value::read).collect();
        self.model = Rc::new(RefCell::new(Model::new(&content)));
        self.judged = (u64::MAX, 0);
        Ok(())
    }

    /// It serves, gives back what the dead one has leaked, and closes.
    fn serve_on(&mut self, image: &Arc<Image>, lane: &Lane<Disk>) -> Result<(), String> {
        image.keep_redo_log(self.new_log()?);
        let mut requests: Vec<_> =
            (0..self.rng.below(MAX_REQUESTS + 1)).map(|_| Request::random(&mut self.rng)).collect();
        requests.retain(|request| self.fixture.takes(request));
        // To search a large image has a plan of its own.
        let searches = !self.fixture.past.is_large() && !self.fixture.has_autoclear_bits();
        requests.extend(searches.then_some(Request::Reclaim(1 << 20)));
        let player = Player {
            lane: lane.clone(),
            model: Rc::clone(&self.model),
            shape: self.fixture.shape(),
            must_find_all: self.fixture.shows_leaks(),
            must_find_nothing: false,
            is_alone: true,
            told: Rc::default(),
        };
        self.drive(vec![play(player, requests, SUCCESSOR, false)], true)?;
        let may_leak = !searches || self.fixture.past.keeps_leaks();
        self.end(lane, false, may_leak).map_err(|error| format!("the next one went on: {error}"))
    }
}
