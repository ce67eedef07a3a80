//! Many cases, spread over threads, until one fails; that one made as small as it can be.

use super::{
    cases::case,
    run::{Case, Totals, Work, simulate},
    workload::Fixture,
};
use crate::RuleName;
use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
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

/// Attempts with other completion orders for each smaller case.
const SHRINK_SEEDS: u64 = 24;

/// Runs cases until the budget is spent or one fails.
///
/// # Errors
/// The first failure.
pub fn run(
    fixtures: &[Fixture],
    seed: u64,
    disabled: Option<RuleName>,
    budget: Budget,
    threads: usize,
) -> Result<Totals, (Totals, Box<Failure>)> {
    let (next, states, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let shared = Mutex::new((Totals::default(), None));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
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
                    let before = totals.states;
                    let outcome = simulate(&fixtures[index], &case, &mut totals);
                    states.fetch_add(totals.states - before, Ordering::Relaxed);
                    if let Err(message) = outcome {
                        stop.store(true, Ordering::Relaxed);
                        let failure = Failure { seed, number, fixture: index, case, message };
                        shared.lock().unwrap_or_else(PoisonError::into_inner).1.get_or_insert(failure);
                    }
                }
                shared.lock().unwrap_or_else(PoisonError::into_inner).0.add(totals);
            });
        }
    });
    let (totals, failure) = shared.into_inner().unwrap_or_else(PoisonError::into_inner);
    match failure {
        None => Ok(totals),
        Some(failure) => Err((totals, Box::new(failure))),
    }
}

impl Failure {
    /// Takes requests away, one at a time, as long as the case fails in some order of completions. That may take
    /// many times as long as the case itself.
    pub fn shrink(&mut self, fixtures: &[Fixture]) {
        while self.step(&fixtures[self.fixture]) {}
    }

    /// Takes one request away. Returns whether there is one without which the case fails.
    fn step(&mut self, fixture: &Fixture) -> bool {
        for mut case in smaller(&self.case) {
            for seed in 0..SHRINK_SEEDS {
                case.seed = if seed == 0 { self.case.seed } else { seed };
                if let Err(message) = simulate(fixture, &case, &mut Totals::default()) {
                    (self.case, self.message) = (case, message);
                    return true;
                }
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
