//! `cargo xtask bench`: qemu-nbd, rublk and us side by side on the same image, as a table and as JSON.
//!
//! guest/bench.sh runs the jobs; this file chooses them, reads fio's accounts and compares. Two modes: `count` lets
//! guest time count instructions and repeats within a few per cent on any machine; `wall` measures real time and
//! shows wake-ups and parallelism too, and swings on a shared machine. Hence the medians of ratios.

use crate::{
    kernel::Kernel,
    peers,
    place::{Job, Place},
    vm::accel::Accel,
    workspace,
};
use anyhow::{Context, Result, bail};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

const SCRIPT: &str = include_str!("../guest/bench.sh");
const US: &str = "ublk-qcow2";
const PEERS: [&str; 3] = ["qemu-nbd", "rublk-qcow2", "rublk-loop"];
const WORKLOADS: [&str; 5] = ["randwrite-4k", "randread-4k", "randrw-4k", "rw-512k", "empty-randwrite-4k"];
const WORKLOADS_QUICK: [&str; 3] = ["randwrite-4k", "randread-4k", "empty-randwrite-4k"];
/// An instruction-counting machine takes about a quarter of an hour for a full round.
const LIMIT_PER_ROUND: Duration = Duration::from_secs(2400);

/// What a second is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    /// A thousand million instructions of the whole machine
    Count,
    /// A second
    Wall,
}

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Fewer workloads, fewer requests, one round
    #[arg(long)]
    quick: bool,
    /// The guest's kernel
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: Kernel,
    /// Count instructions, or measure time
    #[arg(long, value_enum, default_value = "count")]
    mode: Mode,
    /// Rounds, each with every engine and workload
    #[arg(long)]
    rounds: Option<u32>,
    /// Only these workloads, separated by commas
    #[arg(long, value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(WORKLOADS))]
    workloads: Vec<String>,
    /// Write every figure to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Use this program instead of building ublk-qcow2
    #[arg(long, value_name = "FILE", conflicts_with = "peers_only")]
    binary: Option<PathBuf>,
    /// Measure the peers without us
    #[arg(long)]
    peers_only: bool,
}

impl Options {
    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(match (self.quick, self.mode) {
            (true, _) => 1,
            (false, Mode::Count) => 2,
            (false, Mode::Wall) => 5,
        })
    }

    fn workloads(&self) -> Vec<&str> {
        match (self.workloads.is_empty(), self.quick) {
            (false, _) => self.workloads.iter().map(String::as_str).collect(),
            (true, true) => WORKLOADS_QUICK.to_vec(),
            (true, false) => WORKLOADS.to_vec(),
        }
    }

    /// The fio option that ends a job.
    const fn limit(&self) -> &'static str {
        match (self.mode, self.quick) {
            (Mode::Count, true) => "--number_ios=20000",
            (Mode::Count, false) => "--number_ios=40000",
            (Mode::Wall, true) => "--time_based --runtime=3",
            (Mode::Wall, false) => "--time_based --runtime=8",
        }
    }
}

/// Runs `cargo xtask bench`.
///
/// # Errors
/// Fails when the benchmark cannot run, or when we have no figure for a workload.
pub(crate) fn command(options: &Options) -> Result<ExitCode> {
    let place = Place::Machine(options.kernel);
    place.prepare()?;
    let mut engines = PEERS.to_vec();
    let script = format!("{SCRIPT}\n");
    let limit = LIMIT_PER_ROUND * options.rounds();
    let mut job = Job::new(&script, limit).program(&peers::rublk()?);
    if !options.peers_only {
        engines.push(US);
        let ours = match &options.binary {
            Some(binary) => std::path::absolute(binary)?,
            None => workspace::build_release(US, US)?,
        };
        job = job.program(&ours);
    }
    let workloads = options.workloads();
    job = job
        .variable("ENGINES", &engines.join(" "))
        .variable("WORKLOADS", &workloads.join(" "))
        .variable("ROUNDS", &options.rounds().to_string())
        .variable("LIMIT", options.limit());
    job.accel = (options.mode == Mode::Count).then_some(Accel::InstructionCount);
    let results = tempfile::tempdir()?;
    job.results = Some(results.path().to_owned());

    let finished = job.run(place)?;
    if finished.status != 0 {
        bail!("the benchmark ended with status {}", finished.status);
    }
    let figures = Figures::read(results.path())?;
    print!("\n{}", figures.table(&engines, &workloads, options));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&figures.json(options))?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    let silent: Vec<_> = workloads.iter().filter(|workload| figures.of(US, workload).is_empty()).collect();
    if !options.peers_only && !silent.is_empty() {
        bail!("{US} has no figure for {silent:?}");
    }
    Ok(ExitCode::SUCCESS)
}

/// One fio job's result, in requests per second.
#[derive(Debug, Clone, Copy)]
struct Figure {
    round: u32,
    read_iops: f64,
    write_iops: f64,
}

impl Figure {
    fn total(self) -> f64 {
        self.read_iops + self.write_iops
    }
}

/// All results, by engine and workload.
#[derive(Default)]
struct Figures {
    by_job: BTreeMap<(String, String), Vec<Figure>>,
}

impl Figures {
    /// Reads the files `ROUND.ENGINE.WORKLOAD.json`.
    fn read(dir: &Path) -> Result<Self> {
        let mut figures = Self::default();
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let parts: Vec<_> = name.split('.').collect();
            let [round, engine, workload, "json"] = parts.as_slice() else { continue };
            let text = fs::read_to_string(&path)?;
            let figure = decode(&text, round.parse()?).with_context(|| format!("bad result {name}"))?;
            figures.by_job.entry(((*engine).to_owned(), (*workload).to_owned())).or_default().push(figure);
        }
        Ok(figures)
    }

    fn of(&self, engine: &str, workload: &str) -> &[Figure] {
        self.by_job.get(&(engine.to_owned(), workload.to_owned())).map_or(&[], Vec::as_slice)
    }

    /// The median over the rounds in which both ran of `engine`'s figure divided by `base`'s.
    fn ratio(&self, engine: &str, base: &str, workload: &str) -> Option<f64> {
        let mut ratios = Vec::new();
        for ours in self.of(engine, workload) {
            let same_round = self.of(base, workload).iter().find(|theirs| theirs.round == ours.round);
            ratios.extend(same_round.map(|theirs| ours.total() / theirs.total()));
        }
        median(&mut ratios)
    }

    fn table(&self, engines: &[&str], workloads: &[&str], options: &Options) -> String {
        let second = match options.mode {
            Mode::Count => "guest time counts instructions",
            Mode::Wall => "wall-clock time",
        };
        let mut text = format!(
            "Requests per second, median of {} round(s), Linux {}, {second}; libaio, O_DIRECT, one job, fio depth 64; \
             each device with one queue of 128; 512 MiB image on ext4 on null_blk.\n\n",
            options.rounds(),
            options.kernel
        );
        text += &format!("| engine | {} |\n|---|{}\n", workloads.join(" | "), "---|".repeat(workloads.len()));
        for engine in engines {
            let cells: Vec<_> = workloads.iter().map(|workload| self.cell(engine, workload)).collect();
            text += &format!("| {engine} | {} |\n", cells.join(" | "));
        }
        for base in engines.iter().filter(|engine| **engine != US && engines.contains(&US)) {
            let ratio = |workload: &&str| {
                self.ratio(US, base, workload).map_or("–".to_owned(), |r| format!("{r:.2}x"))
            };
            let cells: Vec<_> = workloads.iter().map(ratio).collect();
            text += &format!("| us / {base} | {} |\n", cells.join(" | "));
        }
        text
    }

    /// `12.3k`, or `149 / 160` for reads and writes apart.
    fn cell(&self, engine: &str, workload: &str) -> String {
        let side = |pick: fn(&Figure) -> f64| {
            median(&mut self.of(engine, workload).iter().map(pick).collect::<Vec<_>>())
        };
        let (Some(read), Some(write)) = (side(|f| f.read_iops), side(|f| f.write_iops)) else {
            return "–".to_owned();
        };
        match (read > 0.0, write > 0.0) {
            (true, true) => format!("{} / {}", thousands(read), thousands(write)),
            (true, false) => thousands(read),
            _ => thousands(write),
        }
    }

    fn json(&self, options: &Options) -> serde_json::Value {
        let jobs: Vec<_> = self
            .by_job
            .iter()
            .flat_map(|((engine, workload), figures)| {
                figures.iter().map(move |figure| {
                    serde_json::json!({
                        "engine": engine, "workload": workload, "round": figure.round,
                        "read_iops": figure.read_iops, "write_iops": figure.write_iops,
                    })
                })
            })
            .collect();
        let mode = if options.mode == Mode::Count { "count" } else { "wall" };
        serde_json::json!({ "kernel": options.kernel.to_string(), "mode": mode, "rounds": options.rounds(), "jobs": jobs })
    }
}

fn decode(text: &str, round: u32) -> Result<Figure> {
    // fio puts its notes in front of the account.
    let json = text.find('{').map_or("", |start| &text[start..]);
    let fio: serde_json::Value = serde_json::from_str(json).context("fio wrote no JSON")?;
    let job = &fio["jobs"][0];
    let iops = |side: &str| job[side]["iops"].as_f64().with_context(|| format!("no figure for {side}"));
    Ok(Figure { round, read_iops: iops("read")?, write_iops: iops("write")? })
}

/// The middle of `values`, or the mean of the two in the middle.
fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    if values.len() % 2 == 1 { Some(upper) } else { Some(f64::midpoint(values[middle - 1], upper)) }
}

fn thousands(iops: f64) -> String {
    if iops >= 1000.0 { format!("{:.1}k", iops / 1000.0) } else { format!("{iops:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_ratios_pair_the_same_round() {
        let mut figures = Figures::default();
        let figure = |round, iops| Figure { round, read_iops: 0.0, write_iops: iops };
        let key = |engine: &str| (engine.to_owned(), "w".to_owned());
        figures.by_job.insert(key(US), vec![figure(1, 30.0), figure(2, 10.0), figure(3, 8.0)]);
        figures.by_job.insert(key("peer"), vec![figure(2, 5.0), figure(1, 10.0)]);
        assert_eq!(figures.ratio(US, "peer", "w"), Some(2.5));
        assert_eq!(figures.ratio(US, "absent", "w"), None);
    }

    #[test]
    fn an_account_of_fio_is_read_past_its_notes() {
        let text = "fio: note\n{\"jobs\":[{\"read\":{\"iops\":1500.5},\"write\":{\"iops\":0.0}}]}";
        let figure = decode(text, 1).unwrap();
        assert_eq!(thousands(figure.read_iops), "1.5k");
        assert!(decode("nothing", 1).is_err());
    }
}
