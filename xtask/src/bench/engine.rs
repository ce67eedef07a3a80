//! `--engine`: the engine alone, on this host, by criterion, as a page and JSON.
//!
//! Times are this machine's. What they are for is the targets that are times: a look-up, and what a second
//! thread gains.

use super::{commit_of_sources, now, write};
use crate::{
    process::{capture, run},
    workspace,
};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

const JSON: &str = "engine.json";
const PAGE: &str = "engine.md";
const COMMAND: &str = "cargo xtask bench --engine";
/// The look-up that the targets are about.
const HIT: &str = "look-up hit";
/// The most nanoseconds that one may take.
const HIT_LIMIT: f64 = 100.0;
/// What two threads together do of it at least, of one thread's.
const HIT_GAIN: f64 = 1.9;

/// What a benchmark gave, in nanoseconds for one piece of its work.
#[derive(Debug, Clone, Copy, Serialize)]
struct Figure {
    median: f64,
    /// Of the confidence interval.
    least: f64,
    most: f64,
}

/// All benchmarks of a run, by name and number of threads.
#[derive(Debug, Serialize)]
struct Results {
    date: String,
    commit: String,
    processor: String,
    load: String,
    figures: BTreeMap<String, BTreeMap<u32, Figure>>,
    /// What two threads do of one thread's look-ups, where other work on this machine did not disturb them.
    best_gain: f64,
}

/// The part of criterion's `estimates.json` that is of interest.
#[derive(Deserialize)]
struct Estimates {
    median: Estimate,
}

#[derive(Deserialize)]
struct Estimate {
    point_estimate: f64,
    confidence_interval: Interval,
}

#[derive(Deserialize)]
struct Interval {
    lower_bound: f64,
    upper_bound: f64,
}

/// Runs the benchmarks and writes what they gave to `out`, if that is wanted.
pub(super) fn measure(out: Option<&Path>, load: String) -> Result<()> {
    // Of its own: what was measured before is not to be found among the results.
    let home = tempfile::tempdir()?;
    let benches = ["bench", "--package", "benches", "--bench", "engine"];
    run(workspace::cargo().args(benches).env("CRITERION_HOME", home.path()))?;
    let threads = ["run", "--quiet", "--release", "--package", "benches", "--example", "threads"];
    let said = capture(workspace::cargo().args(threads))?;
    let results = Results {
        date: now()?,
        commit: commit_of_sources()?,
        processor: processor(&fs::read_to_string("/proc/cpuinfo")?),
        load,
        figures: collect(home.path())?,
        best_gain: gain_of(&said).with_context(|| format!("the example `threads` says {said:?}"))?,
    };
    let page = results.page();
    print!("\n{page}");
    if let Some(out) = out {
        write(&out.join(JSON), &(serde_json::to_string_pretty(&results)? + "\n"))?;
        write(&out.join(PAGE), &page)?;
    }
    Ok(())
}

/// What criterion has left, a directory for each benchmark.
fn collect(home: &Path) -> Result<BTreeMap<String, BTreeMap<u32, Figure>>> {
    let mut figures: BTreeMap<String, BTreeMap<u32, Figure>> = BTreeMap::new();
    for entry in fs::read_dir(home).with_context(|| format!("criterion has left no {}", home.display()))? {
        let path = entry?.path().join("new");
        let Ok(about) = fs::read_to_string(path.join("benchmark.json")) else { continue };
        let about: serde_json::Value = serde_json::from_str(&about)?;
        let id = about["full_id"].as_str().context("a benchmark without a name")?;
        let (name, threads) = id.rsplit_once(", ").context("a benchmark without a number of threads")?;
        let threads = threads.split(' ').next().unwrap_or_default().parse()?;
        let text = fs::read_to_string(path.join("estimates.json"))?;
        let Estimates { median } = serde_json::from_str(&text)?;
        let figure = Figure {
            median: median.point_estimate,
            least: median.confidence_interval.lower_bound,
            most: median.confidence_interval.upper_bound,
        };
        figures.entry(name.to_owned()).or_default().insert(threads, figure);
    }
    if figures.is_empty() {
        bail!("criterion has left no results in {}", home.display());
    }
    Ok(figures)
}

/// The figure in what the example `threads` says: "… two do 1.97 of what one does".
fn gain_of(said: &str) -> Option<f64> {
    said.rsplit_once("two do ")?.1.split(' ').next()?.parse().ok()
}

/// The processor's name, as `/proc/cpuinfo` has it.
fn processor(cpuinfo: &str) -> String {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim());
    name.unwrap_or("unknown processor").to_owned()
}

impl Results {
    fn page(&self) -> String {
        let mut text = format!(
            "# The engine alone\n\nWritten by `{COMMAND}` on {}, commit {}, {}, at a load of {}; [how](README.md). On an \
             image in memory: what is measured is the engine's own work, and where it writes the copying, too, under \
             the one lock that a file in memory has, for which two threads wait. Nanoseconds for one piece of work, \
             medians with their 95 % confidence intervals; two threads share the work, and gain less where the \
             machine has other work.\n\n",
            self.date, self.commit, self.processor, self.load
        );
        text += "| work | 1 thread | 2 threads | 2 threads do, of 1 |\n|---|---:|---:|---:|\n";
        for (name, by_threads) in &self.figures {
            let cell =
                |threads: u32| by_threads.get(&threads).map_or("–".into(), |figure| figure.to_string());
            let gain = self.gain(name).map_or("–".into(), |gain| format!("{gain:.2}"));
            let _ = writeln!(text, "| {name} | {} | {} | {gain} |", cell(1), cell(2));
        }
        text + &self.targets()
    }

    /// What two threads do of what one does.
    fn gain(&self, name: &str) -> Option<f64> {
        let by_threads = self.figures.get(name)?;
        Some(by_threads.get(&1)?.median / by_threads.get(&2)?.median)
    }

    fn targets(&self) -> String {
        let verdict = |reached: bool| if reached { "reached" } else { "**not reached**" };
        let mut text = String::from("\n| target | measured | |\n|---|---:|---|\n");
        if let Some(hit) = self.figures.get(HIT).and_then(|by_threads| by_threads.get(&1)) {
            let reached = verdict(hit.median <= HIT_LIMIT);
            let _ = writeln!(text, "| {HIT} ≤ {HIT_LIMIT} ns | {:.1} | {reached} |", hit.median);
        }
        let (gain, reached) = (self.best_gain, verdict(self.best_gain >= HIT_GAIN));
        let _ = writeln!(
            text,
            "| {HIT}, 2 threads ≥ {HIT_GAIN} of 1, the best of 400 rounds | {gain:.2} | {reached} |"
        );
        text
    }
}

impl std::fmt::Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} ({:.1}–{:.1})", self.median, self.least, self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leave(home: &Path, id: &str, median: f64) {
        let new = home.join(id.replace(' ', "_")).join("new");
        fs::create_dir_all(&new).unwrap();
        fs::write(new.join("benchmark.json"), format!(r#"{{"full_id":"{id}"}}"#)).unwrap();
        let estimates = format!(
            r#"{{"median":{{"point_estimate":{median},
                "confidence_interval":{{"confidence_level":0.95,"lower_bound":1.0,"upper_bound":99.0}}}}}}"#
        );
        fs::write(new.join("estimates.json"), estimates).unwrap();
    }

    #[test]
    fn what_criterion_leaves_becomes_a_table_and_judges_the_targets() {
        let home = tempfile::tempdir().unwrap();
        assert!(collect(home.path()).is_err(), "nothing there");
        leave(home.path(), "look-up hit, 1 thread", 30.0);
        leave(home.path(), "look-up hit, 2 threads", 20.0);
        let results = Results {
            date: "today".into(),
            commit: "none".into(),
            processor: processor("model name\t: A\nmodel name\t: B\n"),
            load: "0".into(),
            figures: collect(home.path()).unwrap(),
            best_gain: gain_of(
                "one thread: 20.0 ns a look-up; two: 21.1 ns each; two do 1.89 of what one does\n",
            )
            .unwrap(),
        };
        let page = results.page();
        for part in [
            "| look-up hit | 30.0 (1.0–99.0) | 20.0 (1.0–99.0) | 1.50 |",
            "| look-up hit ≤ 100 ns | 30.0 | reached |",
            "| look-up hit, 2 threads ≥ 1.9 of 1, the best of 400 rounds | 1.89 | **not reached** |",
            ", A, at a load",
        ] {
            assert!(page.contains(part), "no {part:?} in {page}");
        }
    }
}
