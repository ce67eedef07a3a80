//! `cargo xtask soak`: what people do with disks, for as long as one likes.
//!
//! Lanes, each a story under guest/: source trees and fio, round after round (`rounds`); a database on a
//! machine that is killed (`postgres`); a guest that lives on the device (`guest`); file systems on devices
//! on the device (`stack`).

mod guest;
mod postgres;
mod reference;
mod rounds;
mod stack;

use crate::{kernel::Kernel, place::Place, test::Report};
use anyhow::Result;
use clap::ValueEnum;
use std::process::ExitCode;

/// The steps that every story tells with.
const LIB: &str = include_str!("../../guest/lib.sh");
/// How a story uses a disk of `tools`; behind [`LIB`].
const IN_TOOLS: &str = include_str!("../../guest/tools.sh");
/// The build of a kernel; behind [`IN_TOOLS`].
const KERNEL: &str = include_str!("../../guest/kernel.sh");

/// What is done with the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Lane {
    /// A kernel's source tree on XFS over a backing image: unpacked, built, removed
    Tree,
    /// Verified load while the server is killed
    Fio,
    /// PostgreSQL on a virtual machine that is killed
    Postgres,
    /// A guest that boots from the device, and then from the image with QEMU's own driver
    Guest,
    /// fsx on file systems on other block devices on the device, while servers are killed
    Stack,
}

/// Options of `cargo xtask soak`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run in the virtual machine with this kernel, even where the host could
    #[arg(long, value_enum)]
    kernel: Option<Kernel>,
    /// Only these lanes
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Lane::value_variants().to_vec())]
    only: Vec<Lane>,
    /// Seed of fio's and fsx' generators, and of the moments at which PostgreSQL's machine is killed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How often PostgreSQL's machine is killed
    #[arg(long, default_value_t = 20)]
    kills: u64,
    #[command(flatten)]
    stacks: stack::Stacks,
    #[command(flatten)]
    rounds: rounds::Scope,
}

/// Runs `cargo xtask soak`.
///
/// # Errors
/// Fails only when setup does; what is found is in the exit code.
pub(crate) fn command(options: &Options) -> Result<ExitCode> {
    let wanted = |lane| options.only.contains(&lane);
    let mut report = Report::default();
    // Some need the machine even where the host could serve.
    let kernel = options.kernel.unwrap_or(Kernel::V6_12);
    let machine = Place::Machine(kernel);
    if wanted(Lane::Guest) {
        machine.prepare()?;
        report.lane(&format!("a guest in {machine}"), || guest::lane(kernel));
    }
    if wanted(Lane::Postgres) {
        machine.prepare()?;
        report.lane(&format!("PostgreSQL on {machine}, killed {} times", options.kills), || {
            postgres::lane(kernel, options.kills, options.seed)
        });
    }
    if wanted(Lane::Stack) {
        let place = Place::choose(options.kernel);
        place.prepare()?;
        report.lane(&format!("stacks of devices on {place}"), || {
            stack::lane(place, &options.stacks, options.rounds.time, options.seed)
        });
    }
    let (tree, fio) = (wanted(Lane::Tree), wanted(Lane::Fio));
    if tree || fio {
        let place = Place::choose(options.kernel);
        place.prepare()?;
        report.lane(&format!("rounds on {place}"), || {
            rounds::lane(place, &options.rounds, options.seed, rounds::Work { tree, fio })
        });
    }
    Ok(report.finish())
}
