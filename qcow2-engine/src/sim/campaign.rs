//! Many cases: generated from a seed, spread over threads, and shrunk when one fails.

use super::{
    disk::Fault,
    rng::Rng,
    run::{Case, Totals, age, simulate},
    workload::{Fixture, Initial, Maker, Request, Variant},
};
use crate::RuleName;
use std::{
    io,
    path::Path,
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

/// A case that failed, as small as it could be made.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The campaign's seed and the case's number: what `--seed` and `--case` take.
    pub seed: u64,
    /// The number.
    pub number: u64,
    /// The image.
    pub fixture: String,
    /// The shrunk case.
    pub case: Case,
    /// What is wrong.
    pub message: String,
}

/// Attempts with other completion orders for each smaller case.
const SHRINK_SEEDS: u64 = 24;
/// One in this many cases is on an image whose refcount table grows: it is large, so slow.
const FULL_TABLE_SHARE: u64 = 64;
/// Images whose refcount table grows, at the end of the list.
const FULL_TABLES: u64 = 2;
/// One in so many cases is on an image with leaks, with a search for them.
const LEAKY_SHARE: u64 = 3;

/// Makes all images, each as qemu-img made it and as a crash left it, the large ones last.
///
/// # Errors
/// qemu-img or qemu-io is missing, or fails.
pub fn fixtures(directory: &Path) -> io::Result<Vec<Fixture>> {
    let maker = Maker::new(directory);
    let mut fixtures = Vec::new();
    for variant in Variant::ALL {
        for initial in Initial::ALL.into_iter().filter(|&initial| variant.can_be(initial)) {
            fixtures.push(maker.make(variant, initial)?);
        }
    }
    let leaky: Result<Vec<_>, _> = fixtures.iter().map(age).collect();
    fixtures.extend(leaky.map_err(io::Error::other)?);
    let full = maker.make_full_table()?;
    fixtures.push(age(&full).map_err(io::Error::other)?);
    fixtures.push(full);
    Ok(fixtures)
}

/// The case with a number: always the same for the same seed.
#[must_use]
pub fn case(fixtures: &[Fixture], seed: u64, number: u64) -> (usize, Case) {
    let mut rng = Rng::new(seed ^ number.wrapping_mul(0xD6E8_FEB8_6659_FD93));
    // First the sound ones, then as many leaky ones.
    let half = (fixtures.len() as u64 - FULL_TABLES) / 2;
    let is_leaky = rng.below(LEAKY_SHARE) == 0;
    let fixture = match (number % FULL_TABLE_SHARE == FULL_TABLE_SHARE - 1, is_leaky) {
        (false, false) => rng.below(half),
        (false, true) => half + rng.below(half),
        (true, true) => 2 * half,
        (true, false) => 2 * half + 1,
    };
    let short = |rng: &mut Rng| {
        let len = 1 + rng.below(3);
        (0..len)
            .map(|_| Request::ALPHABET[rng.below(Request::ALPHABET.len() as u64) as usize])
            .collect::<Vec<_>>()
    };
    let mut fault = None;
    let mut lanes = match rng.below(9) {
        // Overwrites of clusters that another lane discards, gives back and reuses.
        8 => {
            let overwrite = (0..4).map(|_| Request::Write(6 + rng.below(4) as usize, 2)).collect();
            let mut churn = vec![Request::Discard(4, 10), Request::Flush, Request::Maintain];
            churn.extend((0..4).map(|_| Request::Write(20 + 40 * rng.below(8) as usize, 20)));
            churn.push(Request::Flush);
            vec![overwrite, churn]
        }
        0..=2 => vec![short(&mut rng)],
        // The same requests, all at the same time.
        3 => short(&mut rng).into_iter().map(|request| vec![request]).collect(),
        4..=5 => (0..1 + rng.below(3)).map(|_| random_requests(&mut rng, 12)).collect(),
        6 => vec![random_requests(&mut rng, 30)],
        _ => {
            let kind = [Fault::Eio, Fault::Enospc, Fault::Short][rng.below(3) as usize];
            fault = Some((rng.below(120), kind));
            (0..1 + rng.below(2)).map(|_| random_requests(&mut rng, 10)).collect()
        }
    };
    if is_leaky {
        let window = [16, 60, 1 << 20][rng.below(3) as usize];
        let mut search = random_requests(&mut rng, 2);
        search.push(Request::Reclaim(window));
        search.extend(random_requests(&mut rng, 2));
        lanes.push(search);
    }
    (fixture as usize, Case { lanes, seed: rng.draw(), fault, disabled: None })
}

fn random_requests(rng: &mut Rng, max: u64) -> Vec<Request> {
    (0..1 + rng.below(max)).map(|_| Request::random(rng)).collect()
}

/// Runs cases until the budget is spent or one fails.
///
/// # Errors
/// The first failure, shrunk.
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
                    let before = totals.states;
                    let outcome = simulate(&fixtures[index], &case, &mut totals);
                    states.fetch_add(totals.states - before, Ordering::Relaxed);
                    if let Err(message) = outcome {
                        stop.store(true, Ordering::Relaxed);
                        let fixture = fixtures[index].name.clone();
                        let failure = Failure { seed, number, fixture, case, message };
                        shared
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .1
                            .get_or_insert((index, failure));
                    }
                }
                shared.lock().unwrap_or_else(PoisonError::into_inner).0.add(totals);
            });
        }
    });
    let (totals, failure) = shared.into_inner().unwrap_or_else(PoisonError::into_inner);
    match failure {
        None => Ok(totals),
        // Any failure will do for a mutation check.
        Some((_, failure)) if disabled.is_some() => Err((totals, Box::new(failure))),
        Some((index, failure)) => Err((totals, Box::new(shrink(&fixtures[index], failure)))),
    }
}

/// Takes requests away, one at a time, as long as the case fails in some order of completions.
fn shrink(fixture: &Fixture, mut failure: Failure) -> Failure {
    'smaller: loop {
        for lane in 0..failure.case.lanes.len() {
            for request in 0..failure.case.lanes[lane].len() {
                let mut case = failure.case.clone();
                case.lanes[lane].remove(request);
                case.lanes.retain(|lane| !lane.is_empty());
                if case.lanes.is_empty() {
                    continue;
                }
                for seed in 0..SHRINK_SEEDS {
                    case.seed = if seed == 0 { failure.case.seed } else { seed };
                    if let Err(message) = simulate(fixture, &case, &mut Totals::default()) {
                        failure.case = case;
                        failure.message = message;
                        continue 'smaller;
                    }
                }
            }
        }
        return failure;
    }
}
