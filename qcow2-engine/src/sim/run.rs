//! One simulated life of an image: requests on several lanes, a crash at every moment, a verdict.

use super::{
    case::{Case, Totals, Work},
    counts::Standing,
    disk::Disk,
    faults::HeldBack,
    kill::MAX_PROCESSES,
    memory::Memory,
    model::{Model, Value},
    oracle,
    play::{Player, Told, play, used_buffer},
    request::Request,
    rng::Rng,
    states,
    tasks::{Running, Task, poll},
    tools,
    verdict::Judge,
    workload::{Fixture, IMAGE},
    wound::Wounded,
};
use crate::{Image, Lane, OpenOptions, Paging, io::Buf};
use std::{
    cell::{Cell, RefCell},
    collections::HashSet,
    future::Future,
    path::Path,
    rc::Rc,
    sync::Arc,
    task::{Context, Waker},
};

/// Requests that a lane carries out at a time: fewer than some cases have.
const SLOTS: usize = 2;
/// Clusters that a lane reserves: few, so that the file stays small and extents run out.
const EXTENT_CLUSTERS: u64 = 8;
/// One operation in so many may be the one that is to be left behind: a task that only
/// waits for it, and rests meanwhile, would otherwise wait for ever.
const PATIENCE: u64 = 100;
/// Crash states of a life up to which every moment is judged, and how many moments there are to one that is
/// judged after that: a long life's moments are much alike, and many lives find more than long ones.
const THOROUGH: u64 = 60;
const SAMPLED: u64 = 24;
/// One life in this many is judged so closely up to so many states.
const CLOSE_SHARE: u64 = 10;
const CLOSE: u64 = 600;
/// Rounds of polling without progress, at the most, before a case counts as a hang.
const MAX_STEPS: u64 = 200_000;

pub(super) struct Life<'a> {
    pub(super) fixture: &'a Fixture,
    pub(super) disk: Disk,
    pub(super) model: Rc<RefCell<Model>>,
    pub(super) rng: Rng,
    pub(super) totals: &'a mut Totals,
    /// The last state that was judged: the disk's version and the model's time.
    pub(super) judged: (u64, u64),
    /// Crash states that were tried, and up to how many of them every moment is judged.
    pub(super) tried: u64,
    pub(super) thorough: u64,
    pub(super) memo: oracle::Memo,
    /// As in [`Case`].
    pub(super) held_back: HeldBack,
    pub(super) redo: Memory,
    pub(super) paging: Paging,
    /// How many processes have served the image so far, with this one.
    pub(super) processes: u32,
    /// A successor has gone on to serve.
    pub(super) has_heir: bool,
    /// As in [`Case`].
    pub(super) abandons_after: Option<(u64, HeldBack)>,
    /// How the counts of the image stood, if it has damage.
    pub(super) standing: Option<Standing>,
    pub(super) told: Rc<Told>,
    /// The image came with so many leaks, and nobody looks for them.
    pub(super) old_leaks: u64,
}

/// Simulates a case.
///
/// # Errors
/// What is wrong, in words.
pub fn simulate(fixture: &Fixture, case: &Case, totals: &mut Totals) -> Result<(), String> {
    match &case.work {
        Work::Lanes(lanes) => match case.wound {
            None => serve(Life::new(fixture, case.seed, totals), lanes, case),
            Some(wound) => {
                let wounded = Wounded::of(fixture, wound, &mut Rng::new(!case.seed))?;
                serve(Life::of_wounded(&wounded, case.seed, totals), lanes, case)
            }
        },
        &Work::Tool(tool) => {
            tools::simulate(fixture, tool, case, totals).map_err(|error| format!("{tool:?}: {error}"))
        }
    }
}

fn serve(mut life: Life<'_>, requests: &[Vec<Request>], case: &Case) -> Result<(), String> {
    let fixture = life.fixture;
    life.held_back = case.held_back;
    life.paging = case.paging;
    life.abandons_after = case.abandons_after;
    life.disk.set_file_system(case.file_system);
    if let Some(failing) = case.fault {
        life.disk.fail(failing);
    }
    if let Some(operations) = case.fills_after {
        life.disk.fill_after(operations);
    }
    life.totals.workloads += 1;
    let finds_all = case.searches_for_leaks() && !case.search_may_give_up() && !fixture.past.keeps_leaks();
    if fixture.past.leaks() && !finds_all && case.wound.is_none() {
        life.old_leaks = life.judge_file()?.0.leaks;
    }
    let image = match life.open() {
        Ok(image) => image,
        // An image that cannot be read is not opened, and nothing has happened.
        Err(_) if case.has_faults() => return Ok(()),
        Err(error) => return Err(format!("it does not open: {error}")),
    };
    let log = life.redo.create_with(case.logged, &image).map_err(|error| error.to_string())?;
    image.keep_redo_log(log);
    if let Some(rule) = case.disabled {
        image.disable_rule(rule);
    }
    let count = if case.is_one_lane { 1 } else { requests.len() };
    let lanes: Vec<_> = (0..count).map(|_| Lane::new(&image, life.disk.clone(), SLOTS)).collect();
    let mut next = 0;
    let is_alone = requests.len() == 1;
    let tasks = requests.iter().zip(lanes.iter().cycle()).map(|(requests, lane)| {
        let first = next;
        next += requests.len() as u32;
        let requests = requests.iter().copied().filter(|request| fixture.takes(request));
        let has_faults = case.has_faults();
        let player = Player {
            lane: lane.clone(),
            model: Rc::clone(&life.model),
            shape: fixture.shape(),
            must_find_all: !case.search_may_give_up() && fixture.shows_leaks(),
            must_find_nothing: fixture.has_autoclear_bits(),
            is_alone,
            told: Rc::clone(&life.told),
        };
        play(player, requests.collect(), first, has_faults)
    });
    let tasks = tasks.collect();
    // A queue that ends takes its lane with it; the first one closes the image.
    let last = lanes[0].clone();
    drop(lanes);
    life.drive(tasks, true)?;
    // What a request in flight may still touch is not given back. Of what is counted twice one count is left when
    // nobody uses it any more.
    let may_leak = case.abandons_after.is_some() || fixture.past.keeps_leaks();
    // Whoever flushes or closes needs no room: a host that is full is no excuse.
    life.end(&last, case.is_faulty(), may_leak)
}

impl<'a> Life<'a> {
    pub(super) fn new(fixture: &'a Fixture, seed: u64, totals: &'a mut Totals) -> Self {
        let mut rng = Rng::new(seed);
        Self {
            fixture,
            disk: fixture.disk(&fixture.image),
            model: Rc::new(RefCell::new(Model::new(&fixture.content))),
            thorough: if rng.below(CLOSE_SHARE) == 0 { CLOSE } else { THOROUGH },
            rng,
            totals,
            judged: (u64::MAX, 0),
            tried: 0,
            memo: oracle::Memo::default(),
            held_back: HeldBack::Nothing,
            redo: Memory::new(),
            paging: Paging::default(),
            processes: 1,
            has_heir: false,
            abandons_after: None,
            standing: None,
            told: Rc::default(),
            old_leaks: 0,
        }
    }

    /// That of a damaged image. It is no process's successor that has to find all that was acknowledged.
    fn of_wounded(wounded: &'a Wounded, seed: u64, totals: &'a mut Totals) -> Self {
        let life = Self::new(&wounded.fixture, seed, totals);
        life.model.borrow_mut().lose(wounded.lost.iter().cloned().flatten());
        let told = Rc::new(Told::of_damage());
        Self { standing: Some(wounded.standing.clone()), told, processes: MAX_PROCESSES, ..life }
    }

    pub(super) fn open(&mut self) -> Result<Arc<Image>, String> {
        self.open_with(EXTENT_CLUSTERS)
    }

    /// Opens the image; each lane reserves so many clusters at a time.
    pub(super) fn open_with(&mut self, extent_clusters: u64) -> Result<Arc<Image>, String> {
        let names = self.disk.names(&self.fixture.names());
        let opened = Rc::new(RefCell::new(None));
        let (result, disk) = (Rc::clone(&opened), self.disk.clone());
        let cluster_bits = u32::from(self.fixture.image[23]);
        let options = OpenOptions {
            extent_bytes: extent_clusters << cluster_bits,
            cache_bytes: 0,
            paging: self.paging,
            ..OpenOptions::default()
        };
        let mut open = Box::pin(async move {
            let image = Image::open(&disk, &names, Path::new(IMAGE), &options).await;
            *result.borrow_mut() = Some(image);
        });
        let mut context = Context::from_waker(Waker::noop());
        while open.as_mut().poll(&mut context).is_pending() {
            self.disk.complete(0);
        }
        drop(open);
        let image = opened.borrow_mut().take();
        image.ok_or("no result")?.map_err(|error| error.to_string())
    }

    /// Polls the tasks and completes operations, in the order that the seed chooses, until all
    /// tasks have ended. With `judge`, at every moment a crash is tried.
    pub(super) fn drive(&mut self, tasks: Vec<Task>, judge: bool) -> Result<(), String> {
        let mut tasks: Vec<_> = tasks.into_iter().map(Running::new).collect();
        let mut had_lost = self.disk.has_lost();
        for step in 0..MAX_STEPS {
            if judge {
                self.set_trap();
            }
            if let Some((after, with)) = self.abandons_after
                && self.disk.completed() >= after
            {
                self.abandon(&mut tasks, with);
            }
            if judge && std::mem::replace(&mut had_lost, self.disk.has_lost()) != self.disk.has_lost() {
                self.kill_after_loss()?;
            }
            poll(&mut tasks)?;
            if judge {
                self.kill_in_trap()?;
                self.crash_here()?;
                self.kill_here()?;
            }
            let waiting = self.disk.waiting() as u64;
            match waiting {
                0 if tasks.is_empty() => return Ok(()),
                0 => return Err(format!("{} requests hang", tasks.len())),
                _ => {}
            }
            let is_patient = waiting > 1 && step % PATIENCE != 0;
            // What a queue that has ended has left behind is late.
            let orphans = self.disk.put_orphans_first() as u64;
            if is_patient && (1..waiting).contains(&orphans) {
                self.disk.complete((orphans + self.rng.below(waiting - orphans)) as usize);
                self.totals.operations += 1;
                continue;
            }
            let held_back = is_patient.then(|| self.disk.held_back(self.held_back)).flatten();
            let choice = self.rng.below(waiting - u64::from(held_back.is_some())) as usize;
            self.disk.complete(choice + usize::from(held_back.is_some_and(|held_back| held_back <= choice)));
            self.totals.operations += 1;
        }
        Err("requests go round in circles".into())
    }

    /// A queue ends, when it waits for something of a kind. What it has on the disk lands all the same.
    fn abandon(&mut self, tasks: &mut Vec<Running>, with: HeldBack) {
        let any = self.rng.below(tasks.len().max(1) as u64) as usize;
        let Some(waker) = self.disk.who_waits(with).filter(|_| tasks.len() > 1) else { return };
        let whose = tasks.iter().position(|task| task.waker().will_wake(&waker));
        drop(tasks.swap_remove(whose.unwrap_or(any)));
        self.abandons_after = None;
    }

    /// Tries every crash state of this moment, unless it is the same as the last one.
    fn crash_here(&mut self) -> Result<(), String> {
        let model = self.model.borrow();
        let moment = (self.disk.version(), model.now());
        if std::mem::replace(&mut self.judged, moment) == moment {
            return Ok(());
        }
        if self.tried > self.thorough && self.rng.below(SAMPLED) != 0 {
            return Ok(());
        }
        let told = &self.told;
        let judge = Judge::of(self.fixture, &model, &self.memo, self.standing.as_ref(), told.is_marked());
        let (totals, tried, rng) = (&mut *self.totals, &mut self.tried, &mut self.rng);
        let mut known = HashSet::new();
        self.disk.look(0, |file, in_flight| {
            states::for_each(file, in_flight, rng, |crashed| {
                totals.states += 1;
                *tried += 1;
                totals.images.insert(crashed.hash);
                if !known.insert(crashed.hash) {
                    // Several ways lead to the same bytes, at the same moment.
                    return Ok(());
                }
                let findings = judge.judge(crashed.bytes)?;
                totals.worst_leaks = totals.worst_leaks.max(findings.leaks);
                Ok(())
            })
        })
    }

    /// Nothing crashed: what is read must be what was written, and a close that succeeds leaves no leak,
    /// whatever has failed before it. Only a count that it cannot read itself keeps its cluster.
    pub(super) fn end(&mut self, lane: &Lane<Disk>, is_faulty: bool, may_leak: bool) -> Result<(), String> {
        let buf = used_buffer(self.fixture.content.len());
        let read = {
            let (lane, buf) = (lane.clone(), buf.clone());
            async move { lane.read(0, buf).await }
        };
        if self.carry_out("the last read", read, is_faulty)? {
            self.check_live(&buf)?;
        }
        let close = {
            let lane = lane.clone();
            async move { lane.close().await }
        };
        let failed_reads = self.disk.failed_reads();
        let (had_met, punches) = (self.told.has_met_damage(), self.disk.punch_count());
        let is_closed = self.carry_out("close", close, is_faulty)?;
        let may_leak = may_leak || self.disk.failed_reads() > failed_reads;
        if had_met && self.disk.punch_count() > punches {
            return Err("close gives clusters of a damaged image back".to_owned());
        }
        if is_closed && self.disk.has_lost() {
            return Err("close succeeds, and an earlier fdatasync has failed".to_owned());
        }
        let (findings, is_durable) = self.judge_file()?;
        let leaks = if may_leak { 0 } else { findings.leaks.saturating_sub(self.old_leaks) };
        if is_closed && (leaks > 0 || !is_durable) {
            return Err(format!("a clean close left {leaks} leaks, or something that is not durable"));
        }
        if is_closed && !may_leak && self.old_leaks == 0 && self.processes == 1 {
            self.check_length()?;
        }
        // Where it cannot be given back it stays, and that is no reason to fail. What a dead process had not
        // counted yet nobody knows of.
        let knows_all = self.processes == 1 && !is_faulty && self.disk.punches();
        if is_closed && knows_all { self.check_holes() } else { Ok(()) }
    }

    /// The file is never cut shorter than it came, and what it has become longer by ends with what is in use
    /// (where it grows by writes one that failed may have made it longer, which nobody knows).
    fn check_length(&self) -> Result<(), String> {
        let cluster_bytes = self.fixture.variant.cluster_sectors * 512;
        let (came, allocates) = (self.fixture.image.len(), self.disk.allocates());
        self.disk.look(0, |file, _| {
            let (len, free) = (file.current.len(), oracle::free_clusters(&file.current)?);
            let last = len.div_ceil(cluster_bytes).saturating_sub(1);
            let has_tail = len > came.next_multiple_of(cluster_bytes) && free.contains(&last);
            if len < came || has_tail && allocates {
                return Err(format!("closed, the file has {len} bytes; it came with {came}"));
            }
            Ok(())
        })
    }

    /// The space of what has been freed is given back to the host: it reads as zeros, unless it is as it was,
    /// with zeros where the file has become longer.
    fn check_holes(&self) -> Result<(), String> {
        let before = oracle::free_clusters(&self.fixture.image)?;
        self.disk.look(0, |file, _| {
            let size = self.fixture.variant.cluster_sectors * 512;
            for cluster in oracle::free_clusters(&file.current)? {
                let bytes_of = |image: &[u8]| -> Vec<u8> {
                    image.iter().skip(cluster * size).take(size).copied().collect()
                };
                let now = bytes_of(&file.current);
                let was = if before.contains(&cluster) { bytes_of(&self.fixture.image) } else { Vec::new() };
                let rest = now.strip_prefix(&was[..]).unwrap_or(&now);
                if rest.iter().any(|&byte| byte != 0) {
                    return Err(format!("cluster {cluster} is free, and the host still keeps its content"));
                }
            }
            Ok(())
        })
    }

    /// Carries one thing out, alone, and says whether it succeeded. That it does not is a violation, unless
    /// the disk has failed; a crash at any moment of it is judged either way.
    pub(super) fn carry_out(
        &mut self,
        what: &'static str,
        step: impl Future<Output = crate::Result<()>> + 'static,
        is_faulty: bool,
    ) -> Result<bool, String> {
        let has_failed = Rc::new(Cell::new(false));
        let noted = Rc::clone(&has_failed);
        let task = async move {
            let outcome = step.await;
            noted.set(outcome.is_err());
            outcome.or_else(|error| if is_faulty { Ok(()) } else { Err(format!("{what} failed: {error}")) })
        };
        self.drive(vec![Box::pin(task)], true)?;
        Ok(!has_failed.get())
    }

    /// Judges the file as it is; also whether all of it is durable. A hole need not be: of a cluster that nobody
    /// refers to, and whose count could not be lowered, nobody misses it.
    pub(super) fn judge_file(&self) -> Result<(oracle::Findings, bool), String> {
        let model = self.model.borrow();
        let told = &self.told;
        let judge = Judge::of(self.fixture, &model, &self.memo, self.standing.as_ref(), told.is_marked());
        self.disk.look(0, |file, in_flight| {
            let completed = file.pending.iter().map(|(_, change)| change);
            let is_durable =
                completed.chain(&in_flight).all(|change| matches!(change, super::file::Change::Punch { .. }));
            Ok::<_, String>((judge.judge(&file.current)?, is_durable))
        })
    }

    pub(super) fn check_live(&self, buf: &Buf) -> Result<(), String> {
        let bytes = buf.to_vec();
        let model = self.model.borrow();
        for (sector, bytes) in bytes.chunks_exact(512).enumerate() {
            let found = Value::read(bytes);
            model
                .check_live(sector, found)
                .map_err(|allowed| format!("sector {sector} reads as {found:?}, allowed are {allowed:?}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::cases;

    /// A failing case is printed as a seed and a number. Some could not be repeated: which refcount page goes was up
    /// to the keys that a hash table had drawn.
    #[test]
    fn a_case_is_the_same_each_time() {
        let directory = tempfile::tempdir().unwrap();
        let fixtures = cases::fixtures(directory.path()).unwrap();
        for number in 0..12 {
            let states = [(); 2].map(|()| {
                let (fixture, case) = cases::case(&fixtures, 1, number);
                let mut totals = Totals::default();
                simulate(&fixtures[fixture], &case, &mut totals).unwrap();
                (totals.operations, totals.states)
            });
            assert_eq!(states[0], states[1], "case {number}");
        }
    }
}
