//! `--profile ROW`: how many instructions a request of a row, or attaching, costs in each function of the kernel and of
//! the server.
//!
//! ```text
//! qemu-counter ─▶ instructions by address, of a run of few requests and one of many ┐
//! kernel's symbols, server's mappings (guest/bench.sh), server's symbols (nm) ──────┴▶ by function ─▶ page
//! ```
//!
//! The difference of the two runs is that of their requests: how fio and the device begin and end is in both. Of
//! attaching the second time is told, whole. Every instruction of the machine is counted, none is sampled. What is not
//! kernel is the server's where its mappings say so, which guest/bench.sh sets apart for this, and else somebody
//! else's, mostly fio's; there, too, is what the server executes of the vDSO and the dynamic loader, of which the whole
//! machine has one. The kernel's part has fio's requests in it as well.

use super::{
    US,
    document::{self, Boot, Facts},
    matrix::{self, Engine, Measure, Row, Session},
    owner::{Function, Owner, Symbols, by_function, mappings},
    plan::file_part,
};
use crate::{
    place::Place,
    process::{capture, find_program, program, run},
    vm::machine::Counter,
    workspace,
};
use anyhow::{Context, Result, bail};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

/// One of few requests and one of many: the plan's rounds.
pub(super) const RUNS: u32 = 2;
/// A function has a line of its own if it makes this part of an engine's request.
const LEAST_SHARE: f64 = 0.002;

/// The row of this name, for the command line.
///
/// # Errors
/// Fails where there is none, or none of work.
pub(super) fn parse_row(name: &str) -> Result<Row, String> {
    let row = matrix::rows().into_iter().find(|row| row.name() == name);
    let row = row.ok_or("no row has this name; `cargo xtask bench --list` shows them all")?;
    match row.measure {
        Measure::Speed(_) | Measure::Attach => Ok(row),
        Measure::Memory(_) => Err("this row measures no work; those without memory/ do".into()),
    }
}

/// Runs the row in a machine that counts, and makes a page of what comes of it.
///
/// # Errors
/// Fails when the machine does not run, or an engine has no profile.
pub(super) fn measure(row: Row, options: &super::Options) -> Result<String> {
    let place = Place::Machine(options.kernel);
    place.prepare()?;
    let counts = tempfile::tempdir()?;
    let mut programs = super::programs(options)?;
    let (library, mark) = build_counter()?;
    programs
        .extend([mark, find_program("setarch").context("setarch (package util-linux) is not installed")?]);
    let server = programs.iter().find(|path| path.ends_with(US)).context("there is no server of ours")?;
    let server = Symbols::parse(&capture(program("nm")?.args(["--defined-only", "--demangle"]).arg(server))?);

    let counter = Counter { library, out: counts.path().join("executed") };
    let session = Session { name: row.name(), rows: vec![row] };
    let (boot, results) = super::run_script(&session, options, place, &programs, Some(counter))?;
    let (results, counts) = (results.path(), counts.path());
    // They are missing where no run was made, of which the run's own account says more.
    let kernel = Symbols::parse(&fs::read_to_string(results.join("kallsyms")).unwrap_or_default());

    let mut engines: Vec<Engine> = Vec::new();
    let mut profiles = Vec::new();
    for engine in options.engines() {
        if row.image.excludes(engine).is_some() || engines.contains(&engine) {
            continue;
        }
        let run = |number: u32| {
            let stem = format!("{number}.{}.{}", engine.name(), file_part(&row));
            Run::read(results, counts, &stem, &row, &kernel, &server)
                .with_context(|| format!("{} has no profile: run {number} of {RUNS}", engine.name()))
        };
        let before = if row.measure == Measure::Attach { Run::default() } else { run(1)? };
        profiles.push(Profile::of(&before, &run(2)?).with_context(|| engine.name().to_owned())?);
        engines.push(engine);
    }
    Ok(page(&row, &boot, &engines, &profiles))
}

/// The plugin, and the guest's program that has it write.
fn build_counter() -> Result<(PathBuf, PathBuf)> {
    run(workspace::cargo().args(["build", "--release", "--package", "qemu-counter"]))?;
    let release = workspace::target_dir()?.join("release");
    Ok((release.join("libqemu_counter.so"), release.join("qemu-mark")))
}

/// What was executed while fio ran, or a device was attached.
#[derive(Debug, Default)]
struct Run {
    /// Or how often it was attached.
    requests: u64,
    executed: BTreeMap<Function, u64>,
}

impl Run {
    fn read(
        results: &Path,
        counts: &Path,
        stem: &str,
        row: &Row,
        kernel: &Symbols,
        server: &Symbols,
    ) -> Result<Self> {
        let left = |suffix: &str| {
            let name = format!("{stem}.{suffix}");
            fs::read_to_string(results.join(&name)).with_context(|| format!("the machine left no {name}"))
        };
        let facts = left("facts")?;
        let facts = Facts::parse(&facts);
        if let Some(why) = facts.text("failed") {
            bail!("{why}");
        }
        let number = facts.text("counted").context("nothing was counted")?;
        let path = counts.join(format!("executed.{number}"));
        let counts =
            fs::read_to_string(&path).with_context(|| format!("QEMU's plugin left no {}", path.display()))?;
        Ok(Self {
            requests: match row.measure {
                Measure::Attach => 1,
                _ => document::requests(&left("json")?)?,
            },
            executed: by_function(&counts, kernel, &mappings(&left("maps")?), server)?,
        })
    }
}

/// What a request costs.
#[derive(Debug)]
struct Profile {
    requests: [u64; 2],
    functions: BTreeMap<Function, f64>,
}

impl Profile {
    /// By the difference of two runs.
    ///
    /// # Errors
    /// Fails when the second has no more requests than the first.
    fn of(few: &Run, many: &Run) -> Result<Self> {
        let requests = [few.requests, many.requests];
        let Some(more @ 1..) = many.requests.checked_sub(few.requests) else {
            bail!("runs of {} and {} requests have no difference to divide", few.requests, many.requests);
        };
        let names: BTreeSet<_> = few.executed.keys().chain(many.executed.keys()).collect();
        let cost = |name: &Function| {
            let of = |run: &Run| run.executed.get(name).copied().unwrap_or(0) as f64;
            (of(many) - of(few)) / more as f64
        };
        Ok(Self { requests, functions: names.into_iter().map(|name| (name.clone(), cost(name))).collect() })
    }

    fn cost(&self, function: &Function) -> f64 {
        self.functions.get(function).copied().unwrap_or(0.0)
    }

    fn sum(&self, owner: Option<Owner>) -> f64 {
        let counts = |function: &Function| owner.is_none_or(|owner| function.0 == owner);
        self.functions.iter().filter(|(function, _)| counts(function)).map(|(_, cost)| cost).sum()
    }

    /// The part that a function makes of a request.
    fn share(&self, function: &Function) -> f64 {
        self.cost(function) / self.sum(None)
    }
}

/// The page: what was run, the sums, and the functions, the largest first.
fn page(row: &Row, boot: &Boot, engines: &[Engine], profiles: &[Profile]) -> String {
    let work = if row.measure == Measure::Attach { "attaching" } else { "a request" };
    let mut text = format!("# {row}: instructions of {work}, by function\n\n");
    let _ = writeln!(
        text,
        "`{}`, {}; commit {}; {}.",
        boot.command,
        boot.date,
        boot.commit,
        boot.versions.join("; ")
    );
    text.push('\n');
    if row.measure == Measure::Attach {
        text.push_str("- The second time of two, whole, and what waits for the device.\n");
    } else {
        for (engine, Profile { requests: [few, many], .. }) in engines.iter().zip(profiles) {
            let name = engine.name();
            let _ = writeln!(text, "- {name}: {many} requests less {few}, divided by {}.", many - few);
        }
    }
    let head = |text: &mut String, first: &str| {
        let names: Vec<_> = engines.iter().map(|engine| engine.name()).collect();
        let _ = writeln!(text, "\n| {first} | {} |\n|---|{}", names.join(" | "), "---:|".repeat(names.len()));
    };
    let line = |text: &mut String, name: &str, cost: &dyn Fn(&Profile) -> f64| {
        let costs: Vec<_> = profiles.iter().map(|profile| shown(cost(profile))).collect();
        let _ = writeln!(text, "| {name} | {} |", costs.join(" | "));
    };

    head(&mut text, "");
    for owner in Owner::ALL {
        line(&mut text, owner.name(), &|profile| profile.sum(Some(owner)));
    }
    line(&mut text, "all", &|profile| profile.sum(None));

    let all: BTreeSet<_> = profiles.iter().flat_map(|profile| profile.functions.keys()).collect();
    let is_large =
        |function: &Function| profiles.iter().any(|profile| profile.share(function) >= LEAST_SHARE);
    let (mut large, small): (Vec<_>, Vec<_>) = all.into_iter().partition(|function| is_large(function));
    let most =
        |function: &Function| profiles.iter().map(|profile| profile.cost(function)).fold(0.0, f64::max);
    large.sort_by(|a, b| most(b).total_cmp(&most(a)));
    head(&mut text, "function");
    for function in large {
        let (owner, name) = function;
        let name = match owner {
            Owner::Kernel => format!("`{name}`"),
            Owner::Server => format!("server: `{}`", name.replace('|', r"\|")),
            Owner::Other => name.clone(),
        };
        line(&mut text, &name, &|profile| profile.cost(function));
    }
    let rest = format!("all others ({})", small.len());
    line(&mut text, &rest, &|profile| small.iter().map(|function| profile.cost(function)).sum());
    text
}

/// With what lies below an instruction; nothing for what is not there.
fn shown(cost: f64) -> String {
    if cost.abs() < 0.05 { "–".into() } else { format!("{cost:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(requests: u64, executed: &[(Owner, &str, u64)]) -> Run {
        let executed = executed.iter().map(|(owner, name, times)| ((*owner, (*name).to_owned()), *times));
        Run { requests, executed: executed.collect() }
    }

    #[test]
    fn what_both_runs_have_is_no_cost_of_a_request() {
        let few = run(40, &[(Owner::Kernel, "boot", 1000), (Owner::Kernel, "copy", 400)]);
        let many = run(
            140,
            &[(Owner::Kernel, "boot", 1000), (Owner::Kernel, "copy", 1400), (Owner::Server, "main", 50)],
        );
        let profile = Profile::of(&few, &many).unwrap();
        let cost = |owner, name: &str| profile.cost(&(owner, name.to_owned()));
        assert_eq!((cost(Owner::Kernel, "boot"), cost(Owner::Kernel, "copy")), (0.0, 10.0));
        assert_eq!(cost(Owner::Server, "main"), 0.5, "the few may have none");
        assert_eq!((profile.sum(Some(Owner::Kernel)), profile.sum(None)), (10.0, 10.5));
        assert!(Profile::of(&many, &few).is_err() && Profile::of(&few, &few).is_err());
    }

    #[test]
    fn the_page_has_the_large_ones_by_size_and_the_sum_of_the_others() {
        let nothing = run(0, &[]);
        let profile = |executed: &[(Owner, &str, u64)]| Profile::of(&nothing, &run(10, executed)).unwrap();
        let ours =
            profile(&[(Owner::Kernel, "copy", 9000), (Owner::Server, "a|b", 990), (Owner::Kernel, "x", 10)]);
        let theirs =
            profile(&[(Owner::Kernel, "copy", 5000), (Owner::Other, "fio", 5000), (Owner::Kernel, "x", 5)]);
        let row = parse_row("preallocated/randread-4k/qd64/1job").unwrap();
        let page = page(&row, &Boot::default(), &[Engine::Us, Engine::RublkLoop], &[ours, theirs]);
        let wanted = "| function | ublk-qcow2 | rublk-loop |\n|---|---:|---:|\n\
                      | `copy` | 900.0 | 500.0 |\n\
                      | fio | – | 500.0 |\n\
                      | server: `a\\|b` | 99.0 | – |\n\
                      | all others (1) | 1.0 | 0.5 |\n";
        assert!(page.ends_with(wanted), "{page}");
        assert!(
            page.contains("| kernel | 901.0 | 500.5 |") && page.contains("| all | 1000.0 | 1000.5 |"),
            "{page}"
        );
    }

    #[test]
    fn the_command_line_takes_a_row_and_whom_to_hold_us_against() {
        let parse = |words: &str| {
            super::super::Options::parse(words)
                .map(|options| (options.shown(), options.engines(), options.rounds()))
        };
        let row = "empty/randwrite-4k/qd64/1job";
        let (shown, engines, runs) = parse(&format!("--profile {row}")).unwrap();
        assert_eq!(shown, format!("cargo xtask bench --profile {row} --kernel 6.12 --against rublk-loop"));
        assert_eq!((engines, runs), (vec![Engine::Us, Engine::RublkLoop], RUNS));
        let (shown, engines, _) =
            parse(&shown.replace("cargo xtask bench ", "").replace("-loop", "-loop,qemu-nbd")).unwrap();
        assert!(shown.ends_with("--against rublk-loop,qemu-nbd"), "{shown}");
        assert_eq!(engines, [Engine::Us, Engine::RublkLoop, Engine::QemuNbd]);
        for wrong in ["--mode wall", "--rounds 3", "--gate", "--against us"] {
            assert!(parse(&format!("--profile {row} {wrong}")).is_err(), "{wrong}");
        }
        assert!(parse("--against qemu-nbd").is_err(), "of no row");
        assert!(parse("--profile memory/preallocated/idle").is_err());
        assert_eq!(parse("").unwrap().1, Engine::ALL, "which leaves the other ways as they are");
    }

    #[test]
    fn a_row_is_one_of_work() {
        for (name, row) in matrix::rows().into_iter().map(|row| (row.name(), row)) {
            let is_work = !matches!(row.measure, Measure::Memory(_));
            assert_eq!(parse_row(&name).ok(), is_work.then_some(row), "{name}");
        }
        assert!(parse_row("preallocated/randread-4k").unwrap_err().contains("--list"), "a part is none");
    }
}
