//! `cargo xtask powercut`: the whole virtual machine is killed, over and over, under a writer that has told
//! us what was acknowledged.
//!
//! Each life of the machine is one boot. It judges what the life before has left, against that life's report,
//! and then writes until it is killed; see `qemu-compat/src/power/plug.rs` for the guest's side, `lives` for
//! the kills. Two disks outlive it: the host's, with the image's file system, and one that says what the
//! image held when it was last at rest.

use crate::{
    kernel::Kernel,
    lives::Lives,
    setup::{self, Kernels},
    test::{Count, Report},
    vm::{self, tree::Tree},
};
use anyhow::Result;
use std::{process::ExitCode, time::Duration};

/// Size of the disk with the image's file system; sparse.
const HOST_BYTES: u64 = 1 << 30;
/// Size of the disk with the image's content: more than the largest image.
const KNOWN_BYTES: u64 = 64 << 20;
/// What a machine may take until it serves: boot, judge, give leaks back.
const LIMIT: Duration = Duration::from_secs(300);
/// How long a writer lives, in milliseconds. Short lives end among the first allocations.
const LIFETIME: std::ops::Range<u64> = 200..8000;

/// Options of `cargo xtask powercut`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The guest's kernel
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: Kernel,
    /// How often the machine is killed
    #[arg(long, default_value_t = 4)]
    rounds: u64,
    /// Chooses file system, image, changes and moments [default: a new one]
    #[arg(long)]
    seed: Option<u64>,
}

/// Runs `cargo xtask powercut`.
///
/// # Errors
/// Fails only when setup does; what is found is in the exit code.
pub(crate) fn command(options: &Options) -> Result<ExitCode> {
    setup::ensure(Kernels::Fetch(&[options.kernel]))?;
    let mut report = Report::default();
    report.lane(&format!("power cuts of a machine with Linux {}", options.kernel), || {
        lane(options.kernel, options.rounds, options.seed)
    });
    Ok(report.finish())
}

/// Kills the machine `rounds` times. Each life that held what it had to is a test that passed.
///
/// # Errors
/// What did not hold, with the seed that repeats the changes.
pub(crate) fn lane(kernel: Kernel, rounds: u64, seed: Option<u64>) -> Result<Count> {
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("powercut: {rounds} kills, seed {seed}: repeat with --seed {seed}");
    let mut lives = Lives::new("powercut", kernel, HOST_BYTES, LIMIT)?;
    lives.add_empty("known", KNOWN_BYTES)?;
    let programs = [lives.program("ublk-qcow2")?, lives.program("qemu-compat")?];
    lives.run(rounds, seed, LIFETIME, |lives, life, last| {
        let mut tree = Tree::default();
        for program in &programs {
            vm::send(&mut tree, program, None)?;
        }
        let mut line = format!(
            "exec qemu-compat live --binary \"$(command -v ublk-qcow2)\" --disk /dev/disk/host --known /dev/disk/known \
             --report /dev/port/report --number {life} --seed {seed}"
        );
        if last {
            line += " --last";
        }
        if let Some(before) = life.checked_sub(1) {
            tree.file("payload/before", &lives.report(before));
            line += " --before /payload/before";
        }
        tree.text("payload/run", &format!("#!/bin/bash\n{line} 2>&1\n"), 0o755);
        Ok(tree)
    })
}
