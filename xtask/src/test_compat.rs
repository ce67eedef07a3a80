//! `cargo xtask test-compat`: the full compatibility matrix on both kernels, and machines that are killed. Or a
//! part of the matrix: some cases, or those that a run which was cut short has not come to.

use crate::{
    kernel::Kernel,
    place::Place,
    powercut,
    process::{quote, run},
    test::{Matrix, Report, device_lane},
    timing,
    vm::machine::Console,
    workspace::build_release,
};
use anyhow::Result;
use std::{
    process::{Command, ExitCode},
    time::Duration,
};

/// How often the machine of each kernel is killed.
const POWER_CUTS: u64 = 6;

/// Options of `cargo xtask test-compat`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only this kernel
    #[arg(long, value_enum)]
    kernel: Option<Kernel>,
    /// Stop each machine after this time, as 90s, 20m or 2h (a bare number is minutes)
    #[arg(long, alias = "minutes", value_name = "TIME", value_parser = timing::or_minutes, default_value = "2h")]
    time_limit: Duration,
    #[command(flatten)]
    part: Part,
    /// Only print the names of the matrix's cases
    #[arg(long)]
    list: bool,
}

/// A part of the matrix, and what repeats a run; qemu-compat's own options, which are handed on to it.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Part {
    /// Only cases of the matrix whose name contains this, and no power cuts; may be repeated, then one of these
    #[arg(long = "filter", value_name = "PART")]
    filters: Vec<String>,
    /// Pass over what comes before this case of the matrix
    #[arg(long, value_name = "CASE")]
    from: Option<String>,
    /// Seed of everything random in the matrix [default: from the clock]
    #[arg(long)]
    seed: Option<u64>,
}

impl Part {
    /// Its command line.
    fn options(&self) -> Vec<String> {
        let mut options: Vec<_> = self.filters.iter().map(|part| format!("--filter={part}")).collect();
        options.extend(self.from.iter().map(|case| format!("--from={case}")));
        options.extend(self.seed.iter().map(|seed| format!("--seed={seed}")));
        options
    }
}

/// Runs `cargo xtask test-compat`. Both kernels need the machine: a host has only its own.
///
/// # Errors
/// Fails only when setup does; what the matrix finds is in the exit code.
pub(crate) fn command(options: &Options) -> Result<ExitCode> {
    let part = options.part.options();
    if options.list {
        let kit = build_release("qemu-compat", "qemu-compat")?;
        run(Command::new(kit).args(["run", "--full", "--list"]).args(part))?;
        return Ok(ExitCode::SUCCESS);
    }
    let part: String = part.iter().map(|option| format!(" {}", quote(option))).collect();
    let limit = options.time_limit;
    let kernels = options.kernel.map_or_else(|| Kernel::ALL.to_vec(), |kernel| vec![kernel]);
    let mut report = Report::default();
    for kernel in kernels {
        let place = Place::Machine(kernel);
        place.prepare()?;
        report.lane(&format!("full matrix on {place}"), || {
            device_lane(place, Matrix::Full { limit, part: &part }, Console::Streamed)
        });
        if options.part.filters.is_empty() {
            report.lane(&format!("power cuts of {place}"), || powercut::lane(kernel, POWER_CUTS, None));
        }
    }
    Ok(report.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_selects_cases_is_handed_on_whole() {
        let part = Part {
            filters: vec!["fs/".to_owned(), "kill".to_owned()],
            from: Some("-a case".to_owned()),
            seed: Some(7),
        };
        assert_eq!(part.options(), ["--filter=fs/", "--filter=kill", "--from=-a case", "--seed=7"]);
        assert!(Part::default().options().is_empty());
    }
}
