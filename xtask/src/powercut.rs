//! `cargo xtask powercut`: the whole virtual machine is killed, over and over, under a writer that has told us
//! what was acknowledged.
//!
//! Each life of the machine is one boot. It judges what the life before has left, against that life's report, and
//! then writes until it is killed; see `qemu-compat/src/power/plug.rs` for the guest's side. Two disks outlive it:
//! the one with the image's file system, and the one that says what the image held when it was last at rest.

use crate::{
    kernel::{Kernel, UnpackedKernel},
    setup::{self, Kernels},
    test::{Count, Report},
    vm::{
        self,
        accel::Accel,
        machine::{Access, Console, Disk, Machine},
        tree::Tree,
    },
    workspace::{self, build_release},
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

/// Size of the disk with the image's file system; sparse.
const HOST_BYTES: u64 = 1 << 30;
/// Size of the disk with the image's content: more than the largest image.
const KNOWN_BYTES: u64 = 64 << 20;
/// What a machine may take until it serves: boot, judge, give leaks back.
const START_LIMIT: Duration = Duration::from_secs(300);
/// How long a writer lives, in milliseconds. Short lives end among the first allocations.
const LIFETIME: std::ops::Range<u64> = 200..8000;
const LOOK: Duration = Duration::from_millis(20);

/// Options of `cargo xtask powercut`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The guest's kernel
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: Kernel,
    /// How often the machine is killed
    #[arg(long, default_value_t = 4)]
    rounds: u64,
    /// Chooses file system, image, changes and moments [default: from the clock]
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
    ensure!(rounds > 0, "without a kill nothing is tested");
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("powercut: {rounds} kills, seed {seed}: repeat with --seed {seed}");
    let bench = Bench::new(kernel, seed)?;
    let mut rng = fastrand::Rng::with_seed(seed);
    for life in 0..rounds {
        let lifetime = Duration::from_millis(rng.u64(LIFETIME));
        bench.cut_short(life, lifetime).with_context(|| format!("life {life} of seed {seed}"))?;
    }
    bench.last_life(rounds).with_context(|| format!("after the last kill of seed {seed}"))?;
    Ok(Count { passed: rounds, failed: 0 })
}

/// What all lives share.
struct Bench {
    kernel: UnpackedKernel,
    accel: Accel,
    /// Copies: what is built meanwhile is not to change what is tested.
    programs: Vec<PathBuf>,
    dir: tempfile::TempDir,
    seed: u64,
}

impl Bench {
    fn new(kernel: Kernel, seed: u64) -> Result<Self> {
        let kernel = kernel.unpacked()?.context("setup left no kernel")?;
        let dir = tempfile::Builder::new().prefix("powercut-").tempdir_in(workspace::cache()?)?;
        let mut programs = Vec::new();
        for name in ["ublk-qcow2", "qemu-compat"] {
            let copy = dir.path().join(name);
            fs::copy(build_release(name, name)?, &copy).with_context(|| format!("cannot copy {name}"))?;
            programs.push(copy);
        }
        let bench = Self { accel: Accel::detect(&kernel)?, kernel, programs, dir, seed };
        File::create(bench.file("host"))?.set_len(HOST_BYTES)?;
        File::create(bench.file("known"))?.set_len(KNOWN_BYTES)?;
        Ok(bench)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn report(&self, life: u64) -> PathBuf {
        self.file(&format!("report-{life}"))
    }

    /// A life that ends when its plug is pulled, so long after it began to serve.
    fn cut_short(&self, life: u64, lifetime: Duration) -> Result<()> {
        let report = self.report(life);
        File::create(&report)?;
        let machine = self.machine(&report);
        let mut running = machine.start(&self.payload(life, "")?)?;
        let deadline = Instant::now() + START_LIMIT;
        while !serves(&report)? {
            if !running.is_on()? {
                let status = running.finish()?.status;
                bail!("its script ended with status {status}");
            }
            ensure!(Instant::now() < deadline, "it has not served within {} s", START_LIMIT.as_secs());
            thread::sleep(LOOK);
        }
        thread::sleep(lifetime);
        ensure!(running.is_on()?, "it ended before its plug was pulled");
        running.pull_the_plug()?;
        println!("life {life}: killed after {:.1} s of writing", lifetime.as_secs_f64());
        Ok(())
    }

    /// A life that only judges.
    fn last_life(&self, life: u64) -> Result<()> {
        let report = self.report(life);
        File::create(&report)?;
        let status = self.machine(&report).run(&self.payload(life, "--last")?)?.status;
        ensure!(status == 0, "its script ended with status {status}");
        Ok(())
    }

    fn machine(&self, report: &Path) -> Machine<'_> {
        let disk =
            |name: &str| Disk { name: name.to_owned(), path: self.file(name), access: Access::ReadWrite };
        Machine {
            kernel: &self.kernel,
            accel: self.accel,
            memory_mib: 2048,
            scratch_gib: 2,
            disks: vec![disk("host"), disk("known")],
            report: Some(report.to_owned()),
            console: Console::Streamed,
            time_limit: START_LIMIT,
            results: None,
        }
    }

    fn payload(&self, life: u64, option: &str) -> Result<Tree> {
        let mut tree = Tree::default();
        for program in &self.programs {
            vm::send(&mut tree, program, None)?;
        }
        let mut line = format!(
            "exec qemu-compat live --binary \"$(command -v ublk-qcow2)\" --disk /dev/disk/host --known /dev/disk/known \
             --report /dev/port/report --number {life} --seed {} {option}",
            self.seed
        );
        if let Some(before) = life.checked_sub(1) {
            tree.file("payload/before", &self.report(before));
            line += " --before /payload/before";
        }
        tree.text("payload/run", &format!("#!/bin/bash\n{line} 2>&1\n"), 0o755);
        Ok(tree)
    }
}

fn serves(report: &Path) -> Result<bool> {
    let text = fs::read(report).with_context(|| format!("cannot read {}", report.display()))?;
    Ok(text.starts_with(b"serving "))
}
