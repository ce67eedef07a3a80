//! `cargo xtask crash` and `cargo xtask fuzz`: random campaigns against the engine, on this machine.
//!
//! Their programs belong to the engine, and their options are repeated here, because this package must
//! build before anything of the engine does.

use crate::{
    process::run,
    setup,
    test::{Count, Report},
    timing,
    workspace::cargo,
};
use anyhow::Result;
use std::{process::ExitCode, time::Duration};

/// Options of `cargo xtask crash`.
#[derive(Debug, clap::Args)]
pub(crate) struct CrashOptions {
    /// How long to go on, as 90s, 20m or 2h (a bare number is seconds); with --mutate, for each rule
    #[arg(long, value_name = "TIME", value_parser = timing::or_seconds, default_value = "60s")]
    budget: Duration,
    #[command(flatten)]
    seed: Seed,
    /// Take each ordering rule away in turn; every time a violation must be found
    #[arg(long)]
    mutate: bool,
    /// Take this rule away alone; a wrong name is answered with the right ones
    #[arg(long, value_name = "NAME")]
    rule: Option<String>,
}

/// Options of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct FuzzOptions {
    /// How long to go on, as 90s, 20m or 2h (a bare number is seconds)
    #[arg(long, value_name = "TIME", value_parser = timing::or_seconds, default_value = "60s")]
    time: Duration,
    #[command(flatten)]
    seed: Seed,
    /// Go on after a case that fails
    #[arg(long)]
    keep_going: bool,
}

/// Where the cases come from.
#[derive(Debug, clap::Args)]
struct Seed {
    /// The seed of the campaign
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run this case of the seed alone, and tell all of it
    #[arg(long)]
    case: Option<u64>,
}

/// A campaign's program, and the part of it that precedes every merge.
struct Campaign {
    lane: &'static str,
    binary: &'static str,
    /// Options of cargo's.
    build: &'static [&'static str],
    quick: &'static [&'static str],
}

/// The crash simulator. Quick: a million states, within ten minutes on the slowest machine.
const CRASH: Campaign = Campaign {
    lane: "crash simulation",
    binary: "qcow2-crash",
    build: &["--release"],
    quick: &["--budget", "600", "--states", "1000000", "--at-least", "1000000"],
};

/// The fuzzer of damaged images. Built without optimisation: its assertions and overflow checks are a
/// part of the test, and most of the time goes into QEMU's tools. Few images are asked for, so that a
/// slow machine is no failure.
const FUZZ: Campaign = Campaign {
    lane: "damaged images",
    binary: "qcow2-fuzz",
    build: &[],
    quick: &["--time", "60", "--at-least", "60"],
};

/// Runs `cargo xtask crash`.
///
/// # Errors
/// Fails when the simulator's needs cannot be installed.
pub(crate) fn crash(options: &CrashOptions) -> Result<ExitCode> {
    let mut args = vec!["--budget".to_owned(), options.budget.as_secs().to_string()];
    args.extend(options.seed.args());
    args.extend(options.mutate.then(|| "--mutate".to_owned()));
    args.extend(options.rule.iter().flat_map(|rule| ["--rule".to_owned(), rule.clone()]));
    CRASH.command(&args)
}

/// Runs `cargo xtask fuzz`.
///
/// # Errors
/// Fails when the fuzzer's needs cannot be installed.
pub(crate) fn fuzz(options: &FuzzOptions) -> Result<ExitCode> {
    let mut args = vec!["--time".to_owned(), options.time.as_secs().to_string()];
    args.extend(options.seed.args());
    args.extend(options.keep_going.then(|| "--keep-going".to_owned()));
    FUZZ.command(&args)
}

/// The lanes of `cargo xtask test`.
pub(crate) fn quick(report: &mut Report) {
    for campaign in [&CRASH, &FUZZ] {
        report.lane(campaign.lane, || campaign.run(campaign.quick));
    }
}

impl Seed {
    fn args(&self) -> impl Iterator<Item = String> {
        let seed = ["--seed".to_owned(), self.seed.to_string()];
        let case = self.case.map(|case| ["--case".to_owned(), case.to_string()]);
        seed.into_iter().chain(case.into_iter().flatten())
    }
}

impl Campaign {
    fn command(&self, args: &[String]) -> Result<ExitCode> {
        setup::command(&setup::Options::default())?;
        let mut report = Report::default();
        report.lane(self.lane, || self.run(args));
        Ok(report.finish())
    }

    fn run<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Result<Count> {
        let mut command = cargo();
        command.args(["run", "--quiet"]).args(self.build);
        command.args(["--package", "qcow2-engine", "--features", "sim", "--bin", self.binary, "--"]);
        run(command.args(args))?;
        Ok(Count { passed: 1, failed: 0 })
    }
}
