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
//! medians of ratios, taken round by round. `options` has the command line, this file the order of
//! events.

mod document;
mod engine;
mod gate;
mod kit;
mod matrix;
mod options;
mod owner;
mod plan;
mod plot;
mod profile;
mod report;
mod stats;
mod targets;

use crate::{
    peers,
    place::{Job, Place},
    process::{capture, find_program, program},
    test::Count,
    vm::{accel::Accel, machine::Counter},
    workspace,
};
use anyhow::{Context, Result, bail};
use document::{Boot, Document};
use kit::Kit;
use matrix::{Engine, Session};
use options::Mode;
pub(crate) use options::Options;
use plan::Plan;
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
    let run = measure(&sessions, options, place)?;
    print!("\n{}", report::summary(&run.document));
    let document = run.kept(options)?;
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
    gate_with(&Options::parse("--gate")?)
}

fn gate_with(options: &Options) -> Result<Count> {
    let place = Place::Machine(options.kernel);
    place.prepare()?;
    let run = measure(&matrix::sessions(options.extent(), &[]), options, place)?;
    Ok(gate::judge(&run.kept(options)?))
}

/// What came of all sessions.
struct Run {
    document: Document,
    /// Sessions without a result.
    broken: Vec<String>,
}

impl Run {
    /// Writes every figure where `--json` says.
    ///
    /// # Errors
    /// Fails, too, when a session has no result.
    fn kept(self, options: &Options) -> Result<Document> {
        let Self { document, broken } = self;
        if let Some(path) = &options.json {
            write(path, &(serde_json::to_string_pretty(&document)? + "\n"))?;
        }
        if !broken.is_empty() {
            bail!("sessions without a result: {}", broken.join("; "));
        }
        Ok(document)
    }
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
    job.console = options.console();
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
