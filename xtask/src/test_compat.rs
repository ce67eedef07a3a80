//! `cargo xtask test-compat`: the full compatibility matrix on both kernels, and machines that are killed.

use crate::{
    kernel::Kernel,
    place::Place,
    powercut,
    test::{Matrix, Report, device_lane},
    vm::machine::Console,
};
use anyhow::Result;
use std::{process::ExitCode, time::Duration};

/// How often the machine of each kernel is killed.
const POWER_CUTS: u64 = 6;

/// Options of `cargo xtask test-compat`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only this kernel
    #[arg(long, value_enum)]
    kernel: Option<Kernel>,
    /// Stop each machine after this many minutes
    #[arg(long, default_value_t = 120)]
    minutes: u64,
}

/// Runs `cargo xtask test-compat`. Both kernels need the machine: a host has only its own.
///
/// # Errors
/// Fails only when setup does; what the matrix finds is in the exit code.
pub(crate) fn command(options: &Options) -> Result<ExitCode> {
    let limit = Duration::from_secs(options.minutes * 60);
    let kernels = options.kernel.map_or_else(|| Kernel::ALL.to_vec(), |kernel| vec![kernel]);
    let mut report = Report::default();
    for kernel in kernels {
        let place = Place::Machine(kernel);
        place.prepare()?;
        report.lane(&format!("full matrix on {place}"), || {
            device_lane(place, Matrix::Full(limit), Console::Streamed)
        });
        report.lane(&format!("power cuts of {place}"), || powercut::lane(kernel, POWER_CUTS, None));
    }
    Ok(report.finish())
}
