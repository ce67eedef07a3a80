//! `qemu-compat run`: the device suite, one line per case.

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use qemu_compat::{
    device::{Binary, existing},
    power::plug,
    report,
    selection::Selection,
    share::Share,
    suite::{Scale, Setting, cases},
};
use std::{io::Write, path::PathBuf, process::ExitCode};

/// Holds real /dev/ublkbN devices against QEMU's own tools.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Run the cases; needs root, a ublk driver and QEMU's tools.
    Run(RunArgs),
    /// One life of a machine that is killed under us; `cargo xtask powercut` runs it.
    Live(plug::Life),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Each feature once (the default).
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Every pair of features, and longer runs.
    #[arg(long)]
    full: bool,
    /// The ublk-qcow2 to test.
    #[arg(long, default_value = "ublk-qcow2")]
    binary: PathBuf,
    /// Where images go; a disk file system with a few GiB.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    #[command(flatten)]
    selection: Selection,
    /// Of the cases that differ by their images, only what is for machine NUMBER of so many.
    #[arg(long, value_name = "NUMBER/OF", default_value = "1/1")]
    share: Share,
    /// Only print the names of the cases.
    #[arg(long)]
    list: bool,
    /// Seed of everything random [default: from the clock].
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Action::Run(args) => run(args),
        Action::Live(life) => plug::live(&life).map(|()| ExitCode::SUCCESS),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("qemu-compat: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: RunArgs) -> Result<ExitCode> {
    let scale = if args.full { Scale::Full } else { Scale::Quick };
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    let dir = args.dir.canonicalize().with_context(|| format!("no directory {}", args.dir.display()))?;
    let binary = Binary::new(args.binary);
    let cases = cases(Setting { binary: binary.clone(), dir, seed, scale, share: args.share });
    let cases = args.selection.of(cases)?;
    if args.list {
        let mut out = std::io::stdout().lock();
        cases.iter().try_for_each(|case| writeln!(out, "{}", case.name()))?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("{} cases, seed {seed}: repeat with --seed {seed}", cases.len());
    let before = existing();
    let tidy = || {
        let left: Vec<_> = existing().difference(&before).cloned().collect();
        for id in left.iter().filter_map(|name| name.strip_prefix("ublkc")) {
            // The case has failed by this; the next ones need not suffer.
            let _ = binary.run(["del", "-n", id]);
        }
        ensure!(left.is_empty(), "devices were left behind: {left:?}");
        Ok(())
    };
    let account = report::run_all(cases, tidy, &mut std::io::stdout());
    // A case that hangs keeps its thread: end without waiting for it.
    std::process::exit(i32::from(account.failed > 0 || account.passed == 0));
}
