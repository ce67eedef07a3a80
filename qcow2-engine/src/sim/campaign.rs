//! Many cases, spread over threads, until one fails; that one made as small as it can be.

use super::{
    apart::{self, Ended, simulate_apart},
    case::{Case, Totals, Work},
    cases::case,
    run::simulate,
    workload::Fixture,
};
use crate::RuleName;
use std::{
    convert::Infallible,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// No more cases after this.
    pub time: Duration,
    /// Nor after this many crash states.
    pub states: u64,
}

/// A case that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The campaign's seed and the case's number: what `--seed` and `--case` take.
    pub seed: u64,
    /// The number.
    pub number: u64,
    /// The image, by its place among the fixtures.
    pub fixture: usize,
    /// The case.
    pub case: Case,
    /// What is wrong.
    pub message: String,
}

/// What is wrong with a case that takes longer than [`CASE_TIME`].
pub const NO_END: &str = "it does not end";

/// Attempts with other completion orders for each smaller case.
const SHRINK_SEEDS: u64 = 24;
/// To make a case smaller may take so long.
const SHRINK_TIME: Duration = Duration::from_secs(120);
/// One attempt may, and so long counts as no end, where that is what is wrong.
const ATTEMPT_TIME: Duration = Duration::from_secs(20);
/// A case may, on the slowest machine.
const CASE_TIME: Duration = Duration::from_secs(120);
/// How often it is looked whether one takes longer.
const GLANCE: Duration = Duration::from_millis(50);

/// The case that a thread is at, and since when.
type Present = Mutex<Option<(u64, Instant)>>;

/// Runs cases until the budget is spent or one fails. Calls `stuck` with the number of one that does not end:
/// its thread can be ended in no other way than with the process.
///
/// # Errors
/// The first failure.
pub fn run(
    fixtures: &[Fixture],
    seed: u64,
    disabled: Option<RuleName>,
    budget: Budget,
    threads: usize,
    stuck: &dyn Fn(u64) -> Infallible,
) -> Result<Totals, (Totals, Box<Failure>)> {
    let (next, states, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let shared = Mutex::new((Totals::default(), None));
    let begun = Instant::now();
    let present: Vec<Present> = (0..threads.max(1)).map(|_| Mutex::default()).collect();
    let at_work = AtomicUsize::new(present.len());
    thread::scope(|scope| {
        for mine in &present {
            let (next, states, stop, shared, at_work) = (&next, &states, &stop, &shared, &at_work);
            scope.spawn(move || {
                let mut totals = Totals::default();
                while !stop.load(Ordering::Relaxed)
                    && begun.elapsed() < budget.time
                    && states.load(Ordering::Relaxed) < budget.states
                {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let (index, mut case) = case(fixtures, seed, number);
                    case.disabled = disabled;
                    if disabled.is_some_and(|rule| rule.is_of_tools() && !matches!(case.work, Work::Tool(_)))
                    {
                        continue;
                    }
                    apart::begin_case(number);
                    *mine.lock().unwrap_or_else(PoisonError::into_inner) = Some((number, Instant::now()));
                    let before = totals.states;
                    let outcome = simulate(&fixtures[index], &case, &mut totals);
                    *mine.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    states.fetch_add(totals.states - before, Ordering::Relaxed);
                    if let Err(message) = outcome {
                        stop.store(true, Ordering::Relaxed);
                        let failure = Failure { seed, number, fixture: index, case, message };
                        shared.lock().unwrap_or_else(PoisonError::into_inner).1.get_or_insert(failure);
                    }
                }
                shared.lock().unwrap_or_else(PoisonError::into_inner).0.add(totals);
                at_work.fetch_sub(1, Ordering::Relaxed);
            });
        }
        while at_work.load(Ordering::Relaxed) > 0 {
            if let Some(number) = present.iter().find_map(overdue) {
                match stuck(number) {}
            }
            thread::sleep(GLANCE);
        }
    });
    let (totals, failure) = shared.into_inner().unwrap_or_else(PoisonError::into_inner);
    match failure {
        None => Ok(totals),
        Some(failure) => Err((totals, Box::new(failure))),
    }
}

/// The case of a thread that has been at it for too long.
fn overdue(present: &Present) -> Option<u64> {
    let present = *present.lock().unwrap_or_else(PoisonError::into_inner);
    present.filter(|(_, since)| since.elapsed() > CASE_TIME).map(|(number, _)| number)
}

impl Failure {
    /// The case of a campaign that has failed.
    #[must_use]
    pub fn new(
        fixtures: &[Fixture],
        seed: u64,
        number: u64,
        disabled: Option<RuleName>,
        message: &str,
    ) -> Self {
        let (fixture, mut case) = case(fixtures, seed, number);
        case.disabled = disabled;
        Self { seed, number, fixture, case, message: message.to_owned() }
    }

    /// Takes requests away, one at a time, as long as the case fails in some order of completions and there
    /// is time. Each attempt is a process, which may die or not end as the case did. Call it while there is
    /// one thread.
    pub fn shrink(&mut self, fixtures: &[Fixture]) {
        let begun = Instant::now();
        while begun.elapsed() < SHRINK_TIME && self.step(&fixtures[self.fixture], begun) {}
    }

    /// Takes one request away. Returns whether there is one without which the case fails.
    fn step(&mut self, fixture: &Fixture, begun: Instant) -> bool {
        for mut case in smaller(&self.case) {
            for seed in 0..SHRINK_SEEDS {
                if begun.elapsed() > SHRINK_TIME {
                    return false;
                }
                case.seed = if seed == 0 { self.case.seed } else { seed };
                let message = match simulate_apart(fixture, &case, ATTEMPT_TIME) {
                    Ok(Ended::Said(message)) => message,
                    Ok(Ended::Overran) if self.message == NO_END => NO_END.to_owned(),
                    Ok(Ended::Well | Ended::Overran) => continue,
                    Err(_) => return false,
                };
                (self.case, self.message) = (case, message);
                return true;
            }
        }
        false
    }
}

/// The cases with one request less.
fn smaller(case: &Case) -> Vec<Case> {
    let Work::Lanes(lanes) = &case.work else { return Vec::new() };
    let places = lanes
        .iter()
        .enumerate()
        .flat_map(|(lane, requests)| (0..requests.len()).map(move |request| (lane, request)));
    let without = places.map(|(lane, request)| {
        let mut lanes = lanes.clone();
        lanes[lane].remove(request);
        lanes.retain(|lane| !lane.is_empty());
        lanes
    });
    without
        .filter(|lanes| !lanes.is_empty())
        .map(|lanes| Case { work: Work::Lanes(lanes), ..case.clone() })
        .collect()
}
