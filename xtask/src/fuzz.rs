//! `cargo xtask fuzz`: damaged images given to the engine, on this machine.
//!
//! Built without optimisation: its assertions and overflow checks are a part of the test, and most of the
//! time goes into QEMU's tools.

use crate::{
    process::run,
    setup,
    test::{Count, Report},
    workspace::cargo,
};
use anyhow::Result;
use std::process::{Command, ExitCode};

/// Options of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Seconds to go on for
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    time: u64,
    /// The seed of the campaign
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run this case of the seed alone, tell all of it, and keep its files
    #[arg(long)]
    case: Option<u64>,
    /// Go on after a case that fails
    #[arg(long)]
    keep_going: bool,
}

/// Seconds of the lane of `cargo xtask test`.
const QUICK_SECONDS: &str = "60";
/// The images that it must have judged by then: few, so that a slow machine is no failure.
const QUICK_IMAGES: &str = "60";

/// Runs `cargo xtask fuzz`.
///
/// # Errors
/// Fails when the fuzzer cannot be built or run.
pub(crate) fn command(options: &Options) -> Result<ExitCode> {
    setup::command(&setup::Options::default())?;
    let mut fuzzer = fuzzer();
    fuzzer.args(["--time", &options.time.to_string(), "--seed", &options.seed.to_string()]);
    if let Some(case) = options.case {
        fuzzer.args(["--case", &case.to_string()]);
    }
    if options.keep_going {
        fuzzer.arg("--keep-going");
    }
    let mut report = Report::default();
    report.lane("damaged images", || counted(&mut fuzzer));
    Ok(report.finish())
}

/// The lane of `cargo xtask test`.
///
/// # Errors
/// A violation, or too few images.
pub(crate) fn quick() -> Result<Count> {
    counted(fuzzer().args(["--time", QUICK_SECONDS, "--at-least", QUICK_IMAGES]))
}

fn counted(fuzzer: &mut Command) -> Result<Count> {
    run(fuzzer)?;
    Ok(Count { passed: 1, failed: 0 })
}

fn fuzzer() -> Command {
    let mut command = cargo();
    command.args(["run", "--quiet", "--package", "qcow2-engine", "--features", "sim"]);
    command.args(["--bin", "qcow2-fuzz", "--"]);
    command
}
