//! `cargo xtask test`: everything that must hold before a change is merged, and one plain line that counts
//! it.
//!
//! Lanes run one after the other, but for those of the machines: one leaves much of two processors idle. None
//! is skipped: a lane that cannot run counts as failed and says why. The device lane is shared with
//! `test_compat`.

use crate::{
    bench, campaign,
    kernel::Kernel,
    place::{Job, Place},
    process::{capture, find_program, program, run, start},
    vm::machine::{Console, collect},
    workspace::{build_release, cargo},
};
use anyhow::{Context, Result, bail};
use std::{
    env, fmt,
    iter::Sum,
    panic::resume_unwind,
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Where proptest, and the matrix of `qemu-compat`, read their seeds from.
const SEEDS: [&str; 2] = ["PROPTEST_RNG_SEED", "QEMU_COMPAT_SEED"];
/// The seed of the random tests where the caller gives none: what is judged before a merge must not
/// depend on luck. The long lanes, and plain `cargo test`, draw new ones.
const MERGE_SEED: &str = "1";
/// Has tests fail that lack something of what [`has_all`] looks for, instead of saying so.
const NO_SKIPS: &str = "UBLK_QCOW2_NO_SKIPS";
/// The quick matrix takes ten minutes in an emulated machine, and more beside another one.
const QUICK_LIMIT: Duration = Duration::from_secs(2400);

/// Options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run the device tests in the virtual machine with this kernel alone, even where the host could
    #[arg(long, value_enum)]
    kernel: Option<Kernel>,
}

/// Runs `cargo xtask test`.
///
/// # Errors
/// Fails only when setup does; what the lanes find is in the exit code.
pub(crate) fn command(options: &Options) -> Result<ExitCode> {
    let places = Place::choose_all(options.kernel);
    places.iter().try_for_each(|place| place.prepare())?;
    component("fmt", "rustfmt")?;
    component("clippy", "clippy")?;

    let mut report = Report::default();
    report.lane("rustfmt", || check(cargo().args(["fmt", "--all", "--check"])));
    report.lane("clippy", || {
        check(cargo().args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--all-features",
            "--",
            "-D",
            "warnings",
        ]))
    });
    report.lane("rustdoc", || {
        check(cargo().args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))
    });
    report.lane("cargo test", || cargo_test(&["--workspace", "--no-fail-fast"]));
    report.lane("the simulator's own tests", || {
        cargo_test(&["--package", "qcow2-engine", "--features", "sim", "--lib", "--", "sim::"])
    });
    campaign::quick(&mut report);
    let of = places.len();
    let quick = |(number, place): (usize, Place)| {
        let console = Console::Labelled(place.label());
        let lane = move || device_lane(place, Matrix::Quick { number, of }, console);
        (format!("device tests on {place}"), Box::new(lane) as Lane)
    };
    let mut lanes: Vec<_> = (1..).zip(places).map(quick).collect();
    lanes.push(("speed in instructions, against its floors".into(), Box::new(bench::gate)));
    report.lanes_at_once(lanes);
    Ok(report.finish())
}

/// Runs `cargo test`, with fixed seeds where none are given. Where nothing is missing no test may pass without being made.
fn cargo_test(args: &[&str]) -> Result<Count> {
    let mut tests = cargo();
    tests.arg("test").args(args);
    for name in SEEDS.into_iter().filter(|name| env::var_os(name).is_none()) {
        tests.env(name, MERGE_SEED);
    }
    if has_all() {
        tests.env(NO_SKIPS, "1");
    }
    let (succeeded, output) = streamed(&mut tests)?;
    count_of_cargo_test(&output).confirmed_by(succeeded)
}

/// Whether tests can have mounts of their own and loop devices: not so for users, and for root in most containers.
fn has_all() -> bool {
    let mounts = || capture(program("unshare")?.args(["--mount", "true"]));
    let loops = || {
        let file = tempfile::NamedTempFile::new()?;
        file.as_file().set_len(1 << 20)?;
        let device = capture(program("losetup")?.args(["--find", "--show"]).arg(file.path()))?;
        capture(program("losetup")?.args(["--detach", device.trim()]))
    };
    mounts().and_then(|_| loops()).is_ok()
}

/// How much of the compatibility matrix runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Matrix<'a> {
    /// What is for one of so many machines.
    Quick { number: usize, of: usize },
    /// May take `limit`; `part` is what qemu-compat is told of the cases that are wanted.
    Full { limit: Duration, part: &'a str },
}

/// Runs qemu-compat against the real device.
///
/// # Errors
/// Fails when it cannot run or its account is not whole: no summary, no case, or a status that contradicts
/// it.
pub(crate) fn device_lane(place: Place, matrix: Matrix<'_>, console: Console) -> Result<Count> {
    let product = build_release("ublk-qcow2", "ublk-qcow2")?;
    let kit = build_release("qemu-compat", "qemu-compat")?;
    let (scale, limit) = match matrix {
        Matrix::Quick { number, of } => (format!("--quick --share {number}/{of}"), QUICK_LIMIT),
        Matrix::Full { limit, part } => (format!("--full{part}"), limit),
    };
    let script = format!("exec qemu-compat run {scale} --binary \"$(command -v ublk-qcow2)\" 2>&1\n");
    let mut job = Job::new(&script, limit).program(&product).program(&kit);
    job.console = console;
    let finished = job.run(place)?;
    let output = String::from_utf8_lossy(&finished.output);
    let count = summary_of_kit(&output)
        .with_context(|| format!("qemu-compat ended with status {} and no summary", finished.status))?;
    count.confirmed_by(finished.status == 0)
}

/// Tests that passed and failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub passed: u64,
    pub failed: u64,
}

impl Count {
    /// Holds the count against the exit status that came with it.
    fn confirmed_by(self, succeeded: bool) -> Result<Self> {
        match (succeeded, self.failed) {
            (true, 0) if self.passed == 0 => bail!("not one test ran"),
            (true, 0) | (false, 1..) => Ok(self),
            (true, failed) => bail!("{failed} tests failed and yet the command succeeded"),
            (false, 0) => bail!("the command failed though no test did: it was cut short, or did not build"),
        }
    }
}

impl Sum for Count {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::default(), |a, b| Self { passed: a.passed + b.passed, failed: a.failed + b.failed })
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

/// What finds tests that pass or fail.
type Lane = Box<dyn FnOnce() -> Result<Count> + Send>;

/// Name, result and time of a lane.
type Account = (String, Count, Duration);

/// What the lanes found.
#[derive(Default)]
pub(crate) struct Report {
    lanes: Vec<Account>,
}

fn account(name: &str, lane: impl FnOnce() -> Result<Count>) -> Account {
    println!("=== {name}");
    let start = Instant::now();
    let count = lane().unwrap_or_else(|error| {
        println!("FAILED: {name}: {error:#}");
        Count { passed: 0, failed: 1 }
    });
    (name.to_owned(), count, start.elapsed())
}

impl Report {
    /// Runs one lane. An error is one failure, told at once.
    pub(crate) fn lane(&mut self, name: &str, lane: impl FnOnce() -> Result<Count>) {
        self.lanes.push(account(name, lane));
    }

    /// Runs lanes side by side, as [`Self::lane`] would each.
    fn lanes_at_once(&mut self, lanes: Vec<(String, Lane)>) {
        thread::scope(|scope| {
            let running: Vec<_> =
                lanes.into_iter().map(|(name, lane)| scope.spawn(move || account(&name, lane))).collect();
            for lane in running {
                self.lanes.push(lane.join().unwrap_or_else(|panic| resume_unwind(panic)));
            }
        });
    }

    /// Prints the account, its last line being the total alone.
    pub(crate) fn finish(self) -> ExitCode {
        println!("===");
        for (name, count, time) in &self.lanes {
            println!("{:>5} s  {name}: {count}", time.as_secs());
        }
        let total: Count = self.lanes.iter().map(|(_, count, _)| *count).sum();
        println!("{total}");
        if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// A command that passes or fails as a whole.
fn check(command: &mut Command) -> Result<Count> {
    run(command)?;
    Ok(Count { passed: 1, failed: 0 })
}

/// Runs `command`, shows its output as it comes, and keeps it. Says whether it succeeded.
fn streamed(command: &mut Command) -> Result<(bool, String)> {
    let mut child = start(command.stdout(Stdio::piped()))?;
    let output = child.stdout.take().map(|pipe| collect(pipe, Console::Streamed));
    let status = child.wait()?;
    let output = output.map_or_else(Vec::new, |thread| thread.join().unwrap_or_default());
    Ok((status.success(), String::from_utf8_lossy(&output).into_owned()))
}

/// Adds up the lines `test result: ok. 3 passed; 0 failed; …`.
fn count_of_cargo_test(output: &str) -> Count {
    output
        .lines()
        .filter_map(|line| {
            let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
            let number =
                |what: &str| counts.split("; ").find_map(|part| part.strip_suffix(what)?.trim().parse().ok());
            Some(Count { passed: number("passed")?, failed: number("failed")? })
        })
        .sum()
}

/// The last line `N passed, N failed`.
fn summary_of_kit(output: &str) -> Option<Count> {
    output.lines().rev().find_map(|line| {
        let (passed, failed) = line.trim().split_once(" passed, ")?;
        Some(Count { passed: passed.parse().ok()?, failed: failed.strip_suffix(" failed")?.parse().ok()? })
    })
}

/// Sees to it that cargo has a subcommand that a minimal toolchain lacks.
fn component(subcommand: &str, name: &str) -> Result<()> {
    if capture(cargo().args([subcommand, "--version"])).is_ok() {
        return Ok(());
    }
    if let Some(rustup) = find_program("rustup") {
        run(Command::new(rustup).args(["component", "add", name]))?;
        return Ok(());
    }
    bail!("the toolchain lacks {name}; install it, for instance with `rustup component add {name}`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_test_results_are_added_up() {
        let output = "running 3 tests\ntest result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n\
                      test result: FAILED. 2 passed; 4 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(count_of_cargo_test(output), Count { passed: 5, failed: 4 });
    }

    #[test]
    fn the_last_summary_of_the_kit_counts_and_carriage_returns_do_not() {
        let output = "case 1 passed, 2 failed ok\n1 passed, 0 failed\r\n7 passed, 2 failed\r\nbye\r\n";
        assert_eq!(summary_of_kit(output), Some(Count { passed: 7, failed: 2 }));
        assert_eq!(summary_of_kit("nothing"), None);
    }

    #[test]
    fn a_count_that_contradicts_its_status_is_an_error() {
        let count = |passed, failed| Count { passed, failed };
        assert!(count(3, 0).confirmed_by(true).is_ok());
        assert!(count(3, 1).confirmed_by(false).is_ok());
        assert!(count(0, 0).confirmed_by(true).is_err());
        assert!(count(3, 0).confirmed_by(false).is_err());
        assert!(count(3, 1).confirmed_by(true).is_err());
    }
}
