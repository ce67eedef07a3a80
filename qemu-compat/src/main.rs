//! `qemu-compat run`: the device suite, one line per case.

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use qemu_compat::{
    device::{Binary, existing},
    grounds::Grounds,
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
    let wanted = |binary: &Binary| {
        let setting = Setting { binary: binary.clone(), dir: dir.clone(), seed, scale, share: args.share };
        args.selection.of(cases(setting))
    };
    if args.list {
        let mut out = std::io::stdout().lock();
        wanted(&binary)?.iter().try_for_each(|case| writeln!(out, "{}", case.name()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let grounds = Grounds::new(&binary, existing)?;
    let cases = wanted(grounds.binary())?;
    let records = grounds.binary().run_dir().display();
    println!("{} cases, seed {seed}: repeat with --seed {seed}; records are in {records}", cases.len());
    let account = report::run_all(cases, || grounds.tidy(), &mut std::io::stdout());
    grounds.leave();
    // A case that hangs keeps its thread: end without waiting for it.
    std::process::exit(i32::from(account.failed > 0 || account.passed == 0));
}
