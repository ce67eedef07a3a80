//! `cargo xtask crash`: the simulator's campaign, from the command line.

use clap::Parser;
use qcow2_engine::{
    RuleName,
    sim::{
        apart::{Ended, Wire, apart, numbered},
        campaign::{self, Budget, Failure, NO_END},
        case::{Totals, Work},
        cases,
        run::simulate,
        workload::Fixture,
    },
};
use std::{
    process::{self, ExitCode},
    sync::Arc,
    time::{Duration, Instant},
};

/// Tries crashes at every moment of simulated workloads, and judges what is left of the image.
#[derive(Parser)]
struct Args {
    /// Seconds to go on for.
    #[arg(long, default_value_t = 60)]
    budget: u64,
    /// Stop after this many crash states.
    #[arg(long, default_value_t = u64::MAX)]
    states: u64,
    /// Fail if fewer crash states than this were tried.
    #[arg(long, default_value_t = 0)]
    at_least: u64,
    /// The seed of the campaign.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run this case of the seed alone.
    #[arg(long)]
    case: Option<u64>,
    /// Take each ordering rule away in turn; each time a violation must be found.
    #[arg(long)]
    mutate: bool,
    /// Take this rule away alone, in the whole campaign or, with --case, in one case.
    #[arg(long, value_parser = rule)]
    rule: Option<RuleName>,
    /// Threads.
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
    threads: usize,
}

/// What a campaign's process has beyond its budget: for the cases that are under way at its end, and for
/// judging the one that failed once more.
const MARGIN: Duration = Duration::from_secs(180);

fn main() -> ExitCode {
    let args = Args::parse();
    let prepared = tempfile::tempdir().and_then(|directory| cases::fixtures(directory.path()));
    let fixtures = match prepared {
        Ok(fixtures) => fixtures,
        Err(error) => {
            eprintln!(
                "cannot make the images (are qemu-img and qemu-io installed? cargo xtask setup): {error}"
            );
            return ExitCode::FAILURE;
        }
    };
    let passed = match args.case {
        Some(number) => replay(&fixtures, &args, number),
        None if args.rule.is_some() => args.rule.iter().all(|&rule| is_noticed(&fixtures, &args, rule)),
        None if args.mutate => {
            // All of them, even when one was not noticed.
            RuleName::ALL.into_iter().filter(|&rule| !is_noticed(&fixtures, &args, rule)).count() == 0
        }
        None => search(&fixtures, &args),
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn budget(args: &Args) -> Budget {
    Budget { time: Duration::from_secs(args.budget), states: args.states }
}

/// In a process of its own, as all campaigns: a case may panic or never end.
fn search(fixtures: &[Fixture], args: &Args) -> bool {
    let ended = in_time(args, |wire| {
        let begun = Instant::now();
        match run(fixtures, args, None, wire) {
            Ok(totals) => {
                report(&totals, args.seed, begun.elapsed());
                if totals.states < args.at_least {
                    wire.say(&format!("too few crash states: {} of {}", totals.states, args.at_least));
                }
            }
            Err((totals, failure)) => {
                report(&totals, args.seed, begun.elapsed());
                wire.say_of(failure.number, &failure.message);
            }
        }
    });
    match ended {
        Ended::Well => return true,
        Ended::Overran => println!("the campaign does not end"),
        Ended::Said(said) => match numbered(&said) {
            Some((number, message)) => shrink(fixtures, args, number, message),
            None => println!("{said}"),
        },
    }
    false
}

fn shrink(fixtures: &[Fixture], args: &Args, number: u64, message: &str) {
    let mut failure = Failure::new(fixtures, args.seed, number, None, message);
    println!("VIOLATION on {}: {}", fixtures[failure.fixture].name, failure.message);
    println!("replay with --seed {} --case {}; it is being shrunk", failure.seed, failure.number);
    failure.shrink(fixtures);
    describe(&failure);
}

/// Runs a campaign in a process that is ended when its time is up.
fn in_time(args: &Args, campaign: impl FnOnce(&Arc<Wire>)) -> Ended {
    let limit = Duration::from_secs(args.budget).saturating_add(MARGIN);
    apart(limit, campaign).unwrap_or_else(|error| Ended::Said(format!("there can be no process: {error}")))
}

fn run(
    fixtures: &[Fixture],
    args: &Args,
    disabled: Option<RuleName>,
    wire: &Arc<Wire>,
) -> Result<Totals, (Totals, Box<Failure>)> {
    let stuck = |number| {
        wire.say_of(number, NO_END);
        process::exit(1)
    };
    campaign::run(fixtures, args.seed, disabled, budget(args), args.threads, &stuck)
}

fn rule(name: &str) -> Result<RuleName, String> {
    let names = || RuleName::ALL.map(|rule| format!("{rule:?}")).join(", ");
    RuleName::ALL
        .into_iter()
        .find(|rule| format!("{rule:?}").eq_ignore_ascii_case(name))
        .ok_or_else(|| format!("not one of {}", names()))
}

/// Takes a rule away; a violation must turn up, in a case that is sound with the rule.
fn is_noticed(fixtures: &[Fixture], args: &Args, rule: RuleName) -> bool {
    let begun = Instant::now();
    let ended = in_time(args, |wire| match run(fixtures, args, Some(rule), wire) {
        Ok(totals) => {
            wire.say(&format!("in {} crash states of {} workloads", totals.states, totals.workloads));
        }
        Err((totals, failure)) => {
            let (states, workloads) = (totals.states, totals.workloads);
            let seconds = begun.elapsed().as_secs_f64();
            let message = failure.message;
            wire.say_of(
                failure.number,
                &format!("after {states} crash states of {workloads} workloads, {seconds:.1} s: {message}"),
            );
        }
    });
    let why_not = match ended {
        Ended::Well => "the campaign said nothing".to_owned(),
        Ended::Overran => {
            format!("the campaign did not end, and was killed after {:.0} s", begun.elapsed().as_secs_f64())
        }
        Ended::Said(said) => match numbered(&said) {
            Some((number, NO_END)) => format!("case {number} does not end"),
            Some((number, message)) => {
                println!("{rule:?}: noticed {message}");
                match sound_with_all_rules(fixtures, args, number) {
                    Ended::Well => return true,
                    Ended::Overran => format!("but case {number} does not end with the rule either"),
                    Ended::Said(message) => format!("but case {number} fails with the rule, too: {message}"),
                }
            }
            None => said,
        },
    };
    println!("{rule:?}: NOT noticed: {why_not}");
    false
}

/// Whether a case of the campaign holds with no rule taken away.
fn sound_with_all_rules(fixtures: &[Fixture], args: &Args, number: u64) -> Ended {
    in_time(args, |wire| {
        let (index, case) = cases::case(fixtures, args.seed, number);
        if let Err(message) = simulate(&fixtures[index], &case, &mut Totals::default()) {
            wire.say(&message);
        }
    })
}

fn replay(fixtures: &[Fixture], args: &Args, number: u64) -> bool {
    let (index, mut case) = cases::case(fixtures, args.seed, number);
    case.disabled = args.rule;
    let mut totals = Totals::default();
    println!("{}: {case:#?}", fixtures[index].name);
    match simulate(&fixtures[index], &case, &mut totals) {
        Ok(()) => {
            println!("no violation in {} crash states", totals.states);
            true
        }
        Err(message) => {
            println!("violation: {message}");
            false
        }
    }
}

fn report(totals: &Totals, seed: u64, time: Duration) {
    println!(
        "{} workloads, {} operations, {} crash states, {} distinct images, {} killed processes, at most {} leaked clusters, seed {seed}, {:.0} states/s",
        totals.workloads,
        totals.operations,
        totals.states,
        totals.images.len(),
        totals.kills,
        totals.worst_leaks,
        totals.states as f64 / time.as_secs_f64().max(0.001),
    );
}

fn describe(failure: &Failure) {
    println!("shrunk, with {}:", failure.message);
    match &failure.case.work {
        Work::Tool(tool) => println!("  {tool:?}"),
        Work::Lanes(lanes) => {
            for (lane, requests) in lanes.iter().enumerate() {
                println!("  lane {lane}: {requests:?}");
            }
        }
    }
    let case = &failure.case;
    println!(
        "  fault {:?}, full after {:?}, {:?}, order {}, held back {:?}, {:?}, {}",
        case.fault,
        case.fills_after,
        case.file_system,
        case.seed,
        case.held_back,
        case.paging,
        if case.is_one_lane { "all on one lane" } else { "lanes of their own" }
    );
}
