//! `cargo xtask crash`: the simulator's campaign, from the command line.

use clap::Parser;
use qcow2_engine::{
    RuleName,
    sim::{
        campaign::{self, Budget, Failure},
        cases,
        run::{Totals, Work, simulate},
        workload::Fixture,
    },
};
use std::{
    process::ExitCode,
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

fn search(fixtures: &[Fixture], args: &Args) -> bool {
    let begun = Instant::now();
    let (totals, failure) = match campaign::run(fixtures, args.seed, None, budget(args), args.threads) {
        Ok(totals) => (totals, None),
        Err((totals, failure)) => (totals, Some(failure)),
    };
    report(&totals, args.seed, begun.elapsed());
    if let Some(mut failure) = failure {
        println!("VIOLATION on {}: {}", fixtures[failure.fixture].name, failure.message);
        println!("replay with --seed {} --case {}; it is being shrunk", failure.seed, failure.number);
        failure.shrink(fixtures);
        describe(&failure);
        return false;
    }
    if totals.states < args.at_least {
        println!("too few crash states: {} of {}", totals.states, args.at_least);
        return false;
    }
    true
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
    match campaign::run(fixtures, args.seed, Some(rule), budget(args), args.threads) {
        Ok(totals) => {
            println!(
                "{rule:?}: NOT noticed in {} crash states of {} workloads",
                totals.states, totals.workloads
            );
            false
        }
        Err((totals, failure)) => {
            println!(
                "{rule:?}: noticed after {} crash states of {} workloads, {:.1} s: {}",
                totals.states,
                totals.workloads,
                begun.elapsed().as_secs_f64(),
                failure.message
            );
            let with_the_rule = is_sound_with_all_rules(fixtures, failure.seed, failure.number);
            if !with_the_rule {
                println!("{rule:?}: but case {} fails with the rule, too", failure.number);
            }
            with_the_rule
        }
    }
}

/// Whether a case of the campaign holds with no rule taken away.
fn is_sound_with_all_rules(fixtures: &[Fixture], seed: u64, number: u64) -> bool {
    let (index, case) = cases::case(fixtures, seed, number);
    simulate(&fixtures[index], &case, &mut Totals::default()).is_ok()
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
        "  fault {:?}, {:?}, order {}, held back {:?}",
        case.fault, case.file_system, case.seed, case.held_back
    );
}
