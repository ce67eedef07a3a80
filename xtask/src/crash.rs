//! `cargo xtask crash`: the engine's crash simulator, built with optimisation, on this machine.

use crate::{
    process::run,
    setup,
    test::{Count, Report},
    workspace::cargo,
};
use anyhow::Result;
use std::process::{Command, ExitCode};

/// Options of `cargo xtask crash`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Seconds to go on for; with --mutate, for each rule
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    budget: u64,
    /// The seed of the campaign
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run this case of the seed alone
    #[arg(long)]
    case: Option<u64>,
    /// Take each ordering rule away in turn; every time a violation must be found
    #[arg(long)]
    mutate: bool,
}

/// The crash states that must have been judged before a change is merged.
const QUICK_STATES: u64 = 1_000_000;
/// How long that may take.
const QUICK_SECONDS: u64 = 600;

/// Runs `cargo xtask crash`.
///
/// # Errors
/// Fails when the simulator cannot be built or run.
pub(crate) fn command(options: &Options) -> Result<ExitCode> {
    setup::command(&setup::Options::default())?;
    let mut simulator = simulator();
    simulator.args(["--budget", &options.budget.to_string(), "--seed", &options.seed.to_string()]);
    if let Some(case) = options.case {
        simulator.args(["--case", &case.to_string()]);
    }
    if options.mutate {
        simulator.arg("--mutate");
    }
    let mut report = Report::default();
    report.lane("crash simulation", || {
        run(&mut simulator)?;
        Ok(Count { passed: 1, failed: 0 })
    });
    Ok(report.finish())
}

/// The lane of `cargo xtask test`.
///
/// # Errors
/// A violation, or too few crash states.
pub(crate) fn quick() -> Result<Count> {
    let states = QUICK_STATES.to_string();
    run(simulator().args([
        "--budget",
        &QUICK_SECONDS.to_string(),
        "--states",
        &states,
        "--at-least",
        &states,
    ]))?;
    Ok(Count { passed: 1, failed: 0 })
}

fn simulator() -> Command {
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "--package", "qcow2-engine", "--features", "sim"]);
    command.args(["--bin", "qcow2-crash", "--"]);
    command
}
