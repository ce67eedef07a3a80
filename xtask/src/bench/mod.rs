//! `cargo xtask bench`: the engines side by side on the same images, as tables, JSON and pictures.
//!
//! ```text
//! matrix (rows, sessions) ── plan ──▶ lines for guest/bench.sh ──▶ a boot of the machine per session
//!                            kit ──▶ images made on the host                    │ facts, fio's accounts
//! report, plot, targets ◀── document (samples by row, engine, round) ◀──────────┘
//! ```
//!
//! Beside these, `--engine` has criterion measure the engine alone (`engine`), `--gate` holds a few rows
//! against floors (`gate`), as `cargo xtask test` does, and `--profile` tells of one row in which functions the
//! instructions are (`profile`, `owner`).
//!
//! Two modes: `count` lets guest time count instructions and repeats within a few per cent on any machine;
//! `wall` measures real time and shows wake-ups and parallelism too, and swings on a shared machine. Hence
//! medians of ratios, taken round by round. This file owns the command line and the order of events.

mod document;
mod engine;
mod gate;
mod kit;
mod matrix;
mod owner;
mod plan;
mod plot;
mod profile;
mod report;
mod stats;
mod targets;

use crate::{
    kernel::Kernel,
    peers,
    place::{Job, Place},
    process::{capture, find_program, program, quote},
    test::Count,
    vm::{
        accel::Accel,
        machine::{Console, Counter},
    },
    workspace,
};
use anyhow::{Context, Result, bail};
use clap::Parser;
use document::{Boot, Document};
use kit::Kit;
use matrix::{Engine, Extent, Row, Session};
use plan::{Length, Plan};
use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};
use tempfile::TempDir;

const SCRIPT: &str = include_str!("../../guest/bench.sh");
const US: &str = "ublk-qcow2";
/// Of every device's one queue; nbd and the loop device have the same by themselves.
const DEVICE_DEPTH: u32 = 128;
/// Booting, and making images.
const LIMIT_BASE: Duration = Duration::from_secs(1800);
/// An instruction-counting machine on a busy host takes half a minute for the slowest.
const LIMIT_PER_MEASUREMENT: Duration = Duration::from_secs(120);

/// What a second is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    /// A thousand million instructions of the whole machine
    Count,
    /// A second
    Wall,
}

impl Mode {
    const fn name(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::Wall => "wall",
        }
    }
}

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The targets' workloads only, half the requests, few rounds; nothing is written unless --out or --json
    /// asks
    #[arg(long)]
    quick: bool,
    /// The guest's kernel
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: Kernel,
    /// Count instructions, or measure time
    #[arg(long, value_enum, default_value = "count")]
    mode: Mode,
    /// Rounds, each with every engine and workload [default: 5, quick: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Only rows whose name contains this (can be repeated; --list shows the names)
    #[arg(long, value_name = "PART")]
    filter: Vec<String>,
    /// Only rows that --out has nothing of yet
    #[arg(long, conflicts_with_all = ["filter", "quick", "report"])]
    missing: bool,
    /// Show the rows that would be run
    #[arg(long)]
    list: bool,
    /// Write nothing but the report of what is in --out already
    #[arg(long)]
    report: bool,
    /// Where the results are kept: rows that are run replace those of before [default: docs/benchmarks]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Write every figure of this run to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Use this program instead of building ublk-qcow2
    #[arg(long, value_name = "FILE", conflicts_with = "peers_only")]
    binary: Option<PathBuf>,
    /// Not the devices, but the engine alone, on this host: cargo bench -p benches
    #[arg(long, conflicts_with_all = ["quick", "filter", "list", "report", "rounds", "json", "binary", "peers_only"])]
    engine: bool,
    /// Measure the peers without us
    #[arg(long)]
    peers_only: bool,
    /// Hold the targets' workloads against floors below which no change may bring them: on Linux 6.12, in count
    /// mode, against the peers that need no building; as `cargo xtask test` does
    #[arg(long, conflicts_with_all = ["filter", "missing", "list", "report", "out", "mode", "kernel", "peers_only", "engine"])]
    gate: bool,
    /// How many instructions a request of this row (one of --list) costs in each function of the kernel and of the
    /// server, as Markdown
    #[arg(long, value_name = "ROW", value_parser = profile::parse_row, conflicts_with_all = [
        "quick", "filter", "missing", "list", "report", "rounds", "mode", "out", "json", "engine", "gate", "peers_only",
    ])]
    profile: Option<Row>,
    /// Whom --profile shows beside us
    #[arg(
        long,
        value_name = "ENGINE",
        value_enum,
        value_delimiter = ',',
        default_value = "rublk-loop",
        requires = "profile"
    )]
    against: Vec<Engine>,
}

impl Options {
    const fn is_quick(&self) -> bool {
        self.quick || self.gate
    }

    const fn extent(&self) -> Extent {
        if self.is_quick() { Extent::Quick } else { Extent::Full }
    }

    fn rounds(&self) -> u32 {
        let default = match self.profile {
            Some(_) => profile::RUNS,
            None if self.is_quick() => 1,
            None => 5,
        };
        self.rounds.unwrap_or(default)
    }

    const fn length(&self) -> Length {
        match (self.mode, self.is_quick()) {
            (Mode::Count, _) if self.profile.is_some() => Length::Difference,
            (Mode::Count, _) => Length::Requests,
            (Mode::Wall, true) => Length::Seconds(2),
            (Mode::Wall, false) => Length::Seconds(5),
        }
    }

    /// Seconds after which an engine is taken not to answer. One that spins makes a counted second last ten.
    const fn patience(&self) -> u32 {
        match self.mode {
            Mode::Count => 30,
            Mode::Wall => 900,
        }
    }

    fn out(&self) -> Option<PathBuf> {
        let default = || (!self.is_quick()).then(|| workspace::root().join("docs/benchmarks"));
        self.out.clone().or_else(default)
    }

    fn engines(&self) -> Vec<Engine> {
        if self.gate {
            return gate::ENGINES.to_vec();
        }
        if self.profile.is_some() {
            return [Engine::Us].into_iter().chain(self.against.iter().copied()).collect();
        }
        Engine::ALL.into_iter().filter(|engine| !(self.peers_only && *engine == Engine::Us)).collect()
    }

    /// The command line without the paths of this machine.
    fn shown(&self) -> String {
        if self.gate {
            return format!("cargo xtask bench --gate --rounds {}", self.rounds());
        }
        if let Some(row) = &self.profile {
            let against: Vec<_> = self.against.iter().map(|engine| engine.name()).collect();
            let against = against.join(",");
            return format!("cargo xtask bench --profile {row} --kernel {} --against {against}", self.kernel);
        }
        let mut text = format!("cargo xtask bench --mode {} --kernel {}", self.mode.name(), self.kernel);
        if self.quick {
            text += " --quick";
        }
        text += &format!(" --rounds {}", self.rounds());
        if self.missing {
            text += " --missing";
        }
        for part in &self.filter {
            text += &format!(" --filter {}", quote(part));
        }
        text
    }
}

/// Runs `cargo xtask bench`.
///
/// # Errors
/// Fails when the benchmark cannot run, or when we have no figure for a row.
pub(crate) fn command(options: &Options) -> Result<ExitCode> {
    if options.gate {
        return gate_with(options).map(|count| ExitCode::from(u8::from(count.failed > 0)));
    }
    if options.engine {
        return engine::measure(options.out().as_deref(), load_average()).map(|()| ExitCode::SUCCESS);
    }
    if let Some(row) = options.profile {
        let page = profile::measure(row, options)?;
        // Whoever reads it may have seen enough.
        let _ = std::io::stdout().write_all(page.as_bytes());
        return Ok(ExitCode::SUCCESS);
    }
    let sessions = sessions(options)?;
    if options.list {
        let rows = sessions.iter().flat_map(|session| &session.rows);
        let list: String = rows.map(|row| format!("{row}\n")).collect();
        // Whoever reads it may have seen enough.
        let _ = std::io::stdout().write_all(list.as_bytes());
        return Ok(ExitCode::SUCCESS);
    }
    if options.report {
        let out = options.out().context("--report needs --out")?;
        return save(&load(&out, options)?, &out).map(|()| ExitCode::SUCCESS);
    }
    if sessions.is_empty() && options.missing {
        println!("bench: no row is missing");
        return Ok(ExitCode::SUCCESS);
    }
    if sessions.is_empty() {
        bail!("no row has {:?} in its name; --list shows them", options.filter);
    }
    let place = Place::Machine(options.kernel);
    place.prepare()?;
    let Run { document, broken } = measure(&sessions, options, place)?;
    print!("\n{}", report::summary(&document));
    if let Some(path) = &options.json {
        write(path, &(serde_json::to_string_pretty(&document)? + "\n"))?;
    }
    if !broken.is_empty() {
        bail!("sessions without a result: {}", broken.join("; "));
    }
    let planned: usize = sessions.iter().map(|session| session.rows.len()).sum();
    if document.rows.len() < planned {
        bail!("{} of {planned} rows were not reached", planned - document.rows.len());
    }
    let silent = silent(&document, options);
    if !silent.is_empty() {
        bail!("{US} has no figure for {}", silent.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}

/// What is to be measured.
fn sessions(options: &Options) -> Result<Vec<Session>> {
    if !options.missing {
        return Ok(matrix::sessions(options.extent(), &options.filter));
    }
    let kept = load(&options.out().context("--missing needs --out")?, options)?;
    Ok(matrix::chosen(options.extent(), |name| !kept.rows.contains_key(name)))
}

/// `bench --gate` as a lane of tests: how many floors are kept.
///
/// # Errors
/// Fails when the benchmark cannot run.
pub(crate) fn gate() -> Result<Count> {
    /// For the defaults of all the others.
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }
    gate_with(&Line::parse_from(["bench", "--gate"]).options)
}

fn gate_with(options: &Options) -> Result<Count> {
    let place = Place::Machine(options.kernel);
    place.prepare()?;
    let Run { document, broken } = measure(&matrix::sessions(options.extent(), &[]), options, place)?;
    if let Some(path) = &options.json {
        write(path, &(serde_json::to_string_pretty(&document)? + "\n"))?;
    }
    if !broken.is_empty() {
        bail!("sessions without a result: {}", broken.join("; "));
    }
    Ok(gate::judge(&document))
}

/// What came of all sessions.
struct Run {
    document: Document,
    /// Sessions without a result.
    broken: Vec<String>,
}

/// Runs the sessions one after the other, and keeps what comes of each at once.
fn measure(sessions: &[Session], options: &Options, place: Place) -> Result<Run> {
    let programs = programs(options)?;
    let (kernel, mode) = (options.kernel.to_string(), options.mode.name().into());
    let mut run = Run { document: Document { kernel, mode, ..Document::default() }, broken: Vec::new() };
    for (at, session) in sessions.iter().enumerate() {
        println!("bench: session {} of {}: {}", at + 1, sessions.len(), session.name);
        // One session that fails must not take the others with it.
        match run_session(session, options, place, &programs) {
            Ok((boot, rows)) => {
                if let Some(out) = options.out() {
                    let mut kept = load(&out, options)?;
                    kept.merge(boot.clone(), rows.clone());
                    save(&kept, &out)?;
                }
                run.document.merge(boot, rows);
            }
            Err(error) => {
                eprintln!("bench: session {} could not be measured: {error:#}", session.name);
                run.broken.push(session.name.clone());
            }
        }
    }
    Ok(run)
}

/// Rows of which we lack a figure.
fn silent(document: &Document, options: &Options) -> Vec<String> {
    let lacks = |name: &&String| document.figure(name, Engine::Us, |sample| sample.value).is_none();
    if options.peers_only { Vec::new() } else { document.rows.keys().filter(lacks).cloned().collect() }
}

/// What the machine brings along.
fn programs(options: &Options) -> Result<Vec<PathBuf>> {
    let losetup = find_program("losetup").context("losetup (package mount) is not installed")?;
    let mut programs = vec![losetup];
    if options.engines().iter().any(|engine| engine.is_rublk()) {
        programs.push(peers::rublk()?);
    }
    if !options.peers_only {
        programs.push(match &options.binary {
            Some(binary) if !binary.ends_with(US) => {
                bail!("{} must be called {US}: the script looks for it under that name", binary.display())
            }
            Some(binary) => std::path::absolute(binary)?,
            None => workspace::build_release(US, US)?,
        });
    }
    Ok(programs)
}

type Measured = (Boot, std::collections::BTreeMap<String, document::RowResult>);

fn run_session(session: &Session, options: &Options, place: Place, programs: &[PathBuf]) -> Result<Measured> {
    let (boot, results) = run_script(session, options, place, programs, None)?;
    let rows = document::collect(results.path(), session, &options.engines(), options.rounds())?;
    Ok((boot, rows))
}

/// A boot of the machine for a session, and what its script has left.
fn run_script(
    session: &Session,
    options: &Options,
    place: Place,
    programs: &[PathBuf],
    counter: Option<Counter>,
) -> Result<(Boot, TempDir)> {
    let commit = commit(options)?; // of what is measured, whatever is committed meanwhile
    let kit = Kit::for_session(session)?;
    let engines = options.engines();
    let plan = Plan {
        session,
        engines: &engines,
        rounds: options.rounds(),
        extent: options.extent(),
        length: options.length(),
        kit: &kit,
    };
    let script = format!("{SCRIPT}{}", plan.script());
    let measurements = u32::try_from(plan.measurements())?;
    let mut job = Job::new(&script, LIMIT_BASE + LIMIT_PER_MEASUREMENT * measurements)
        .variable("DEPTH", &DEVICE_DEPTH.to_string())
        .variable("PATIENCE", &options.patience().to_string());
    for program in programs {
        job = job.program(program);
    }
    for disk in &kit.disks {
        job = job.disk(disk.clone());
    }
    if options.gate {
        job.console = Console::Labelled("speed"); // other machines speak as well
    }
    if counter.is_some() {
        job.console = Console::Aside;
    }
    job.counter = counter;
    job.accel = (options.mode == Mode::Count).then_some(Accel::InstructionCount);
    let results = tempfile::tempdir()?;
    job.results = Some(results.path().to_owned());

    let load = load_average();
    let finished = job.run(place)?;
    if finished.status != 0 {
        eprintln!("bench: session {} ended early, with status {}", session.name, finished.status);
    }
    Ok((boot(options, commit, results.path(), &load)?, results))
}

fn boot(options: &Options, commit: String, results: &Path, load: &str) -> Result<Boot> {
    let versions = fs::read_to_string(results.join("versions")).unwrap_or_default();
    let processor = match options.mode {
        Mode::Count => "emulated, 1 ns an instruction".to_owned(),
        Mode::Wall => format!("2 processors on a machine whose load was {load}"),
    };
    Ok(Boot {
        number: 0,
        date: now()?,
        command: options.shown(),
        commit,
        rounds: options.rounds(),
        seed: plan::SEED,
        image_mib: options.extent().image_mib(),
        processor,
        versions: versions.lines().map(str::to_owned).collect(),
    })
}

/// The date and the time, of Greenwich.
fn now() -> Result<String> {
    Ok(capture(program("date")?.args(["-u", "+%Y-%m-%d %H:%M"]))?.trim().to_owned())
}

fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn commit(options: &Options) -> Result<String> {
    if options.binary.is_some() { Ok("unknown (--binary)".into()) } else { commit_of_sources() }
}

/// The last commit that changed what is measured; `+` when the files differ from it.
fn commit_of_sources() -> Result<String> {
    // Those at the root say which libraries are built in, and how.
    const MEASURED: [&str; 6] =
        ["--", "Cargo.toml", "Cargo.lock", "qcow2-format", "qcow2-engine", "ublk-qcow2"];
    let git = |arguments: &[&str]| {
        capture(program("git")?.current_dir(workspace::root()).args(arguments).args(MEASURED))
    };
    let id = git(&["log", "-1", "--format=%h"])?;
    let changed = git(&["status", "--porcelain"])?;
    Ok(format!("{}{}", id.trim(), if changed.is_empty() { "" } else { "+" }))
}

fn stem(document: &Document) -> String {
    format!("{}-{}", document.mode, document.kernel)
}

fn load(out: &Path, options: &Options) -> Result<Document> {
    let (kernel, mode) = (options.kernel.to_string(), options.mode.name());
    Document::load(&out.join(format!("{mode}-{kernel}.json")), &kernel, mode)
}

/// JSON, the page, and a picture for each group of rows.
fn save(document: &Document, out: &Path) -> Result<()> {
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let stem = stem(document);
    let mut plots = Vec::new();
    for group in report::groups(document) {
        if let Some(svg) = plot::svg(document, &group) {
            let file = format!("{stem}-{group}.svg");
            write(&out.join(&file), &svg)?;
            plots.push((group, file));
        }
    }
    write(&out.join(format!("{stem}.json")), &(serde_json::to_string_pretty(document)? + "\n"))?;
    write(&out.join(format!("{stem}.md")), &report::page(document, &plots))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
