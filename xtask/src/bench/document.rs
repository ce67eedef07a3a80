//! The results as they are kept: every sample of every round, by row and engine, with what they were made on.
//!
//! One document holds one kernel and one mode. A boot of the machine replaces the rows that it measured; each
//! row says which boot it comes from, and ratios are taken within a boot and a round only.

use super::{
    matrix::{self, Engine, Measure, Row, Session},
    plan::file_part,
    stats::Spread,
};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Document {
    pub kernel: String,
    pub mode: String,
    pub boots: Vec<Boot>,
    pub rows: BTreeMap<String, RowResult>,
}

/// One run of the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Boot {
    pub number: u32,
    pub date: String,
    /// What was typed.
    pub command: String,
    /// Of this repository; with `+` when files differed from it.
    pub commit: String,
    pub rounds: u32,
    pub seed: u64,
    /// The size of the images whose name does not say it.
    #[serde(default)]
    pub image_mib: u32,
    /// How the machine's processor was made, and what else went on.
    pub processor: String,
    /// fio, qemu-nbd, rublk, the guest's kernel: as they call themselves.
    pub versions: Vec<String>,
}

/// What a figure means, and which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Unit {
    RequestsPerSecond,
    Milliseconds,
    MiB,
}

impl Unit {
    pub(super) const fn of(measure: Measure) -> Self {
        match measure {
            Measure::Speed(_) => Self::RequestsPerSecond,
            Measure::Attach => Self::Milliseconds,
            Measure::Memory(_) => Self::MiB,
        }
    }

    /// How many times better `ours` is than `theirs`.
    pub(super) fn advantage(self, ours: f64, theirs: f64) -> f64 {
        match self {
            Self::RequestsPerSecond => ours / theirs,
            Self::Milliseconds | Self::MiB => theirs / ours,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct RowResult {
    pub boot: u32,
    pub unit: Unit,
    pub engines: BTreeMap<String, EngineResult>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct EngineResult {
    pub samples: Vec<Sample>,
    /// Why rounds have no sample; the same reason once.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub failures: BTreeSet<String>,
    /// What `qemu-img check` found fault with in the image that was left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    pub round: u32,
    pub value: f64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub read: f64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub write: f64,
    /// Of the serving processes after the work.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub resident_mib: f64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for this signature")]
fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

impl Document {
    /// The document at `path`, or a new one.
    ///
    /// # Errors
    /// Fails when there is a file that is no document of this kernel and mode.
    pub(super) fn load(path: &Path, kernel: &str, mode: &str) -> Result<Self> {
        let fresh = Self { kernel: kernel.into(), mode: mode.into(), ..Self::default() };
        if !path.exists() {
            return Ok(fresh);
        }
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let document: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a document of this benchmark", path.display()))?;
        anyhow::ensure!(
            document.kernel == kernel && document.mode == mode,
            "{} is of Linux {} in {} mode; choose another directory with --out",
            path.display(),
            document.kernel,
            document.mode
        );
        Ok(document)
    }

    /// Takes over the rows of a boot; boots of which no row is left go.
    pub(super) fn merge(&mut self, mut boot: Boot, rows: BTreeMap<String, RowResult>) {
        boot.number = self.boots.iter().map(|boot| boot.number).max().unwrap_or(0) + 1;
        for (name, mut row) in rows {
            row.boot = boot.number;
            self.rows.insert(name, row);
        }
        self.boots.push(boot);
        let used: BTreeSet<u32> = self.rows.values().map(|row| row.boot).collect();
        self.boots.retain(|boot| used.contains(&boot.number));
    }

    /// The rows in the order of the table; what an older table had comes last.
    pub(super) fn names(&self) -> Vec<&str> {
        let table: Vec<_> = matrix::rows().iter().map(Row::name).collect();
        let mut names: Vec<_> = self.rows.keys().map(String::as_str).collect();
        names.sort_by_cached_key(|name| table.iter().position(|row| row == name).unwrap_or(table.len()));
        names
    }

    pub(super) fn engine(&self, row: &str, engine: Engine) -> Option<&EngineResult> {
        self.rows.get(row)?.engines.get(engine.name())
    }

    /// The figures of an engine over the rounds.
    pub(super) fn figure(&self, row: &str, engine: Engine, pick: fn(&Sample) -> f64) -> Option<Spread> {
        Spread::of(self.engine(row, engine)?.samples.iter().map(pick))
    }

    /// How many times better the first is than the second, round by round.
    pub(super) fn advantage(&self, ours: (&str, Engine), theirs: (&str, Engine)) -> Option<Spread> {
        let (row, base) = (self.rows.get(ours.0)?, self.rows.get(theirs.0)?);
        if row.boot != base.boot || row.unit != base.unit {
            return None;
        }
        let base = &self.engine(theirs.0, theirs.1)?.samples;
        let pairs = self.engine(ours.0, ours.1)?.samples.iter().filter_map(|sample| {
            let same_round = base.iter().find(|other| other.round == sample.round)?;
            Some(row.unit.advantage(sample.value, same_round.value))
        });
        Spread::of(pairs)
    }
}

/// What guest/bench.sh left in `dir`, as rows.
///
/// # Errors
/// Fails when a file is not what the script writes.
pub(super) fn collect(
    dir: &Path,
    session: &Session,
    engines: &[Engine],
    rounds: u32,
) -> Result<BTreeMap<String, RowResult>> {
    let mut rows = BTreeMap::new();
    for row in &session.rows {
        if !was_reached(dir, row)? {
            continue; // the machine ended before: what is known of the row stays
        }
        let mut result = RowResult { boot: 0, unit: Unit::of(row.measure), engines: BTreeMap::new() };
        for engine in engines.iter().filter(|engine| row.image.excludes(**engine).is_none()) {
            let mut of_engine = EngineResult::default();
            for round in 1..=rounds {
                let stem = format!("{round}.{}.{}", engine.name(), file_part(row));
                measurement(dir, &stem, round, row, &mut of_engine)
                    .with_context(|| format!("bad result {stem}"))?;
            }
            result.engines.insert(engine.name().to_owned(), of_engine);
        }
        rows.insert(row.name(), result);
    }
    Ok(rows)
}

/// Whether the script began with `row`.
fn was_reached(dir: &Path, row: &Row) -> Result<bool> {
    let end = format!(".{}.facts", file_part(row));
    for entry in fs::read_dir(dir)? {
        if entry?.file_name().to_string_lossy().ends_with(&end) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn measurement(dir: &Path, stem: &str, round: u32, row: &Row, result: &mut EngineResult) -> Result<()> {
    let Ok(text) = fs::read_to_string(dir.join(format!("{stem}.facts"))) else {
        result.failures.insert("the run ended before it".into());
        return Ok(());
    };
    let facts = Facts::parse(&text);
    match facts.text("check") {
        None | Some("0") => {}
        Some("3") => result.check = Some("leaks".into()),
        Some(status) => result.check = Some(format!("errors (status {status})")),
    }
    if let Some(why) = facts.text("failed") {
        result.failures.insert(why.to_owned());
        return Ok(());
    }
    let mib = |key| facts.number(key).map(|kib| kib / 1024.0);
    let plain = |value| Sample { round, value, read: 0.0, write: 0.0, resident_mib: 0.0 };
    let sample = match row.measure {
        Measure::Attach => plain(facts.number("attach_us").context("no time")? / 1000.0),
        Measure::Memory(None) => plain(mib("rss_kib").context("no memory")?),
        Measure::Memory(Some(_)) => plain(mib("peak_kib").context("no memory")?),
        Measure::Speed(_) => {
            let json = fs::read_to_string(dir.join(format!("{stem}.json"))).context("no account of fio")?;
            let (read, write) = requests_per_second(&json)?;
            let resident_mib = mib("rss_kib").unwrap_or(0.0);
            Sample { round, value: read + write, read, write, resident_mib }
        }
    };
    match row.measure {
        _ if sample.value > 0.0 => result.samples.push(sample),
        // The kernel's loop device has no process, and so no memory to compare.
        Measure::Memory(_) => drop(result.failures.insert("no process serves it".into())),
        Measure::Attach | Measure::Speed(_) => drop(result.failures.insert("it came to nothing".into())),
    }
    Ok(())
}

/// Lines of key=value.
pub(super) struct Facts<'a>(BTreeMap<&'a str, &'a str>);

impl<'a> Facts<'a> {
    pub(super) fn parse(text: &'a str) -> Self {
        Self(text.lines().filter_map(|line| line.split_once('=')).collect())
    }

    pub(super) fn text(&self, key: &str) -> Option<&'a str> {
        self.0.get(key).copied()
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.text(key)?.parse().ok()
    }
}

/// Reads and writes per second in fio's account.
fn requests_per_second(text: &str) -> Result<(f64, f64)> {
    let jobs = jobs(text)?;
    let iops = |side: &str| jobs[side]["iops"].as_f64().with_context(|| format!("no figure for {side}"));
    Ok((iops("read")?, iops("write")?))
}

/// How many reads and writes are in fio's account.
///
/// # Errors
/// Fails when it is none.
pub(super) fn requests(text: &str) -> Result<u64> {
    let jobs = jobs(text)?;
    let total =
        |side: &str| jobs[side]["total_ios"].as_u64().with_context(|| format!("no number for {side}"));
    Ok(total("read")? + total("write")?)
}

/// All jobs together, as fio gives them with --group_reporting.
fn jobs(text: &str) -> Result<serde_json::Value> {
    // fio puts its notes in front of the account.
    let json = text.find('{').map_or("", |start| &text[start..]);
    let fio: serde_json::Value = serde_json::from_str(json).context("fio wrote no JSON")?;
    Ok(fio["jobs"][0].clone())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A row of one boot: an engine's values, by round.
    pub(in crate::bench) fn row(unit: Unit, engines: &[(Engine, &[f64])]) -> RowResult {
        let samples = |values: &[f64]| {
            let sample = |(at, value): (usize, &f64)| Sample { round: at as u32 + 1, value: *value, ..EMPTY };
            EngineResult {
                samples: values.iter().enumerate().map(sample).collect(),
                ..EngineResult::default()
            }
        };
        let engines =
            engines.iter().map(|(engine, values)| (engine.name().to_owned(), samples(values))).collect();
        RowResult { boot: 0, unit, engines }
    }

    const EMPTY: Sample = Sample { round: 0, value: 0.0, read: 0.0, write: 0.0, resident_mib: 0.0 };

    pub(in crate::bench) fn document(rows: Vec<(&str, RowResult)>) -> Document {
        let mut document = Document { kernel: "6.12".into(), mode: "count".into(), ..Document::default() };
        let rows = rows.into_iter().map(|(name, row)| (name.to_owned(), row)).collect();
        document.merge(Boot::default(), rows);
        document
    }

    #[test]
    fn ratios_pair_the_same_round() {
        let mut measured = row(
            Unit::RequestsPerSecond,
            &[(Engine::Us, &[30.0, 10.0, 8.0]), (Engine::QemuNbd, &[10.0, 5.0])],
        );
        // Whatever the order in which they are kept.
        measured.engines.get_mut("qemu-nbd").unwrap().samples.reverse();
        let document = document(vec![("w", measured)]);
        let spread = document.advantage(("w", Engine::Us), ("w", Engine::QemuNbd)).unwrap();
        assert_eq!((spread.median, spread.least, spread.most), (2.5, 2.0, 3.0));
        assert_eq!(document.advantage(("w", Engine::Us), ("w", Engine::RublkLoop)), None);
    }

    #[test]
    fn less_time_is_better() {
        let document = document(vec![(
            "a",
            row(Unit::Milliseconds, &[(Engine::Us, &[10.0]), (Engine::QemuNbd, &[40.0])]),
        )]);
        let spread = document.advantage(("a", Engine::Us), ("a", Engine::QemuNbd)).unwrap();
        assert_eq!(spread.median, 4.0);
    }

    #[test]
    fn rows_of_two_boots_are_not_compared_and_empty_boots_go() {
        let one = || row(Unit::RequestsPerSecond, &[(Engine::Us, &[1.0])]);
        let mut document = document(vec![("a", one()), ("b", one())]);
        let rows = |name: &str| [(name.to_owned(), one())].into_iter().collect();
        document.merge(Boot::default(), rows("a"));
        assert_eq!(document.advantage(("a", Engine::Us), ("b", Engine::Us)), None);
        assert_eq!(document.boots.len(), 2);
        document.merge(Boot::default(), rows("b"));
        assert_eq!(document.boots.iter().map(|boot| boot.number).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn what_the_script_leaves_is_read() {
        use super::super::matrix::{Extent, sessions};
        let dir = tempfile::tempdir().unwrap();
        let session = &sessions(Extent::Full, &["preallocated/randread-4k/qd64/1job".into()])[0];
        let stem = "preallocated+randread-4k+qd64+1job";
        let write = |name: String, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write(format!("1.ublk-qcow2.{stem}.facts"), "rss_kib=2048\npeak_kib=4096\ncheck=3\n");
        write(
            format!("1.ublk-qcow2.{stem}.json"),
            "fio: note\n{\"jobs\":[{\"read\":{\"iops\":1500.5},\"write\":{\"iops\":0.5}}]}",
        );
        write(format!("1.qemu-nbd.{stem}.facts"), "failed=does not attach: a=b\n");
        write(format!("1.rublk-loop.{stem}.facts"), "rss_kib=2048\ncheck=0\n");
        write(
            format!("1.rublk-loop.{stem}.json"),
            r#"{"jobs":[{"read":{"iops":0.0},"write":{"iops":0.0}}]}"#,
        );
        let engines = [Engine::QemuNbd, Engine::RublkLoop, Engine::KernelLoop, Engine::Us];
        let other = &sessions(Extent::Full, &["attach/64TiB".into()])[0];
        assert!(collect(dir.path(), other, &engines, 1).unwrap().is_empty(), "a row that was not begun");
        let rows = collect(dir.path(), session, &engines, 1).unwrap();
        let row = &rows["preallocated/randread-4k/qd64/1job"];
        let ours = &row.engines["ublk-qcow2"];
        assert_eq!((ours.samples[0].value, ours.samples[0].resident_mib), (1501.0, 2.0));
        assert_eq!(ours.check.as_deref(), Some("leaks"));
        assert!(row.engines["qemu-nbd"].failures.contains("does not attach: a=b"));
        assert!(row.engines["kernel-loop"].failures.contains("the run ended before it"));
        // "no process serves it" was said of any result of 0.
        let nothing = &row.engines["rublk-loop"];
        assert!(nothing.samples.is_empty() && nothing.failures.contains("it came to nothing"));
    }
}
