//! `check`: consistency of an image, and repair. Exit codes are `qemu-img check`'s.

use super::{CommandError, complain, image::Tool};
use crate::{cli::OutputArgs, config, runfile};
use clap::{Args, ValueEnum};
use qcow2_engine::{CheckOptions, CheckReport, Error, Repair, check, io::files::Caching};
use qcow2_format::FormatError;
use serde::Serialize;
use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Corruptions are left.
const CORRUPTIONS: u8 = 2;
/// Leaks are left, and nothing worse.
const LEAKS: u8 = 3;
/// The file is no QCOW2 image.
const NO_IMAGE: u8 = 63;
/// Bytes that tell a QCOW2 image from another file.
const MAGIC_AND_VERSION_BYTES: u64 = 8;

/// Check an image, and repair it.
///
/// Exit code: 0 clean, 1 the check could not be completed, 2 corruptions, 3 leaked clusters only,
/// 63 not a QCOW2 image.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct CheckArgs {
    /// What to repair. The image must not be in use.
    #[arg(short, long, value_enum, value_name = "WHAT")]
    repair: Option<What>,
    /// Read the image even if somebody writes to it; what is found may then not be so.
    #[arg(short = 'U', long, conflicts_with = "repair")]
    force_share: bool,
    #[command(flatten)]
    output: OutputArgs,
    /// Print findings and errors only.
    #[arg(short, long)]
    quiet: bool,
    /// The format of the image.
    #[arg(short, long, value_name = "FORMAT", default_value = "qcow2", value_parser = ["qcow2"], hide = true)]
    format: String,
    /// The image file.
    image: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Free leaked clusters.
    Leaks,
    /// Whatever can be repaired without guessing.
    All,
}

/// `qemu-img check --output=json`, field by field.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json<'a> {
    filename: String,
    format: &'a str,
    check_errors: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    total_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// Checks, prints, and says with which code to exit.
pub(crate) fn run(args: &CheckArgs) -> Result<ExitCode, CommandError> {
    if args.repair.is_some() {
        runfile::refuse_served(&args.image)?;
    }
    let tool = Tool::new(Caching::Buffered, config::locking(args.force_share))?;
    let repair = match args.repair {
        None => Repair::None,
        Some(What::Leaks) => Repair::Leaks,
        Some(What::All) => Repair::All,
    };
    let report = match tool.run(check(
        &tool.ring,
        &*tool.files,
        &args.image,
        CheckOptions { repair, ..CheckOptions::default() },
    )) {
        Ok(report) => report,
        Err(CommandError::Engine(error)) if is_no_image(&error) => {
            complain(&error);
            return Ok(NO_IMAGE.into());
        }
        Err(error) => return Err(error),
    };
    print_findings(&report)?;
    let mut out = io::stdout().lock();
    if args.output.is_json() {
        serde_json::to_writer_pretty(&mut out, &json(&args.image, &report)).map_err(io::Error::from)?;
        writeln!(out)?;
    } else if !args.quiet {
        out.write_all(text(&report, repair).as_bytes())?;
    }
    Ok(exit_code(&report).into())
}

/// Whether the file does not begin as a QCOW2 image does, with the magic and a version from 2 on (QCOW has
/// the same magic, and version 1). One that does and cannot be read on is an image whose check has failed.
fn is_no_image(error: &Error) -> bool {
    let Error::Format { source, .. } = error else { return false };
    match **source {
        FormatError::Magic { .. } => true,
        FormatError::Version { version } => version < 2,
        FormatError::Truncated { what: "the header", available, .. } => available < MAGIC_AND_VERSION_BYTES,
        _ => false,
    }
}

fn exit_code(report: &CheckReport) -> u8 {
    let left = &report.remaining;
    match (left.check_errors, left.corruptions, left.leaks) {
        (0, 0, 0) => 0,
        (0, 0, _) => LEAKS,
        (0, _, _) => CORRUPTIONS,
        _ => 1,
    }
}

/// On standard error, so that JSON stays JSON.
fn print_findings(report: &CheckReport) -> io::Result<()> {
    let mut err = io::stderr().lock();
    for finding in &report.found.list {
        let word = match finding.severity {
            qcow2_engine::check::Severity::Leak => "Leaked",
            _ => "ERROR",
        };
        writeln!(err, "{word} {finding}")?;
    }
    if report.found.omitted() > 0 {
        writeln!(err, "... and {} more", report.found.omitted())?;
    }
    report.refused.iter().try_for_each(|reason| writeln!(err, "Not repaired: {reason}"))
}

fn json<'a>(path: &Path, report: &CheckReport) -> Json<'a> {
    let (left, statistics) = (&report.remaining, &report.statistics);
    Json {
        filename: path.display().to_string(),
        format: "qcow2",
        check_errors: left.check_errors,
        corruptions: left.corruptions,
        leaks: left.leaks,
        corruptions_fixed: report.corruptions_fixed(),
        leaks_fixed: report.leaks_fixed(),
        image_end_offset: statistics.image_end_offset,
        total_clusters: statistics.total_clusters,
        allocated_clusters: statistics.allocated_clusters,
        fragmented_clusters: statistics.fragmented_clusters,
        compressed_clusters: statistics.compressed_clusters,
    }
}

fn text(report: &CheckReport, repair: Repair) -> String {
    let mut text = String::new();
    if repair != Repair::None && report.leaks_fixed() + report.corruptions_fixed() > 0 {
        text += &format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
             Double checking the fixed image now...\n",
            report.leaks_fixed(),
            report.corruptions_fixed()
        );
    }
    for line in remaining(report).into_iter().chain(marks(report)).chain(statistics(report)) {
        text += &line;
        text.push('\n');
    }
    text
}

/// What is wrong with the image still; an empty line stands before each, as qemu-img has it.
fn remaining(report: &CheckReport) -> Vec<String> {
    let left = &report.remaining;
    let mut lines = Vec::new();
    if left.is_clean() {
        lines.push("No errors were found on the image.".to_owned());
    }
    if left.corruptions > 0 {
        lines.push(format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.",
            left.corruptions
        ));
    }
    if left.leaks > 0 {
        lines.push(format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.",
            left.leaks
        ));
    }
    if left.counted_beyond_end > 0 {
        lines.push(format!(
            "\n{} clusters beyond the end of the file are counted. They take no space; a repair clears the counts.",
            left.counted_beyond_end
        ));
    }
    if left.check_errors > 0 {
        lines.push(format!("\n{} internal errors have occurred during the check.", left.check_errors));
    }
    lines
}

fn marks(report: &CheckReport) -> impl Iterator<Item = String> {
    let marks = [(report.is_dirty, "dirty"), (report.is_corrupt, "corrupt")];
    marks.into_iter().filter(|(is_marked, _)| *is_marked).map(|(_, mark)| {
        format!("The image is marked {mark}; a repair clears the mark when nothing else is wrong.")
    })
}

fn statistics(report: &CheckReport) -> Vec<String> {
    let statistics = &report.statistics;
    let mut lines = Vec::new();
    if statistics.total_clusters > 0 && statistics.allocated_clusters > 0 {
        let share = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        lines.push(format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            statistics.allocated_clusters,
            statistics.total_clusters,
            share(statistics.allocated_clusters, statistics.total_clusters),
            share(statistics.fragmented_clusters, statistics.allocated_clusters),
            share(statistics.compressed_clusters, statistics.allocated_clusters),
        ));
    }
    if statistics.image_end_offset > 0 {
        lines.push(format!("Image end offset: {}", statistics.image_end_offset));
    }
    lines
}
