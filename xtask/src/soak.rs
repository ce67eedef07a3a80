//! `cargo xtask soak`: what people do with disks, for as long as one likes.
//!
//! Rounds of two kinds of work until the time is up, on images that live through all rounds: a kernel's source tree,
//! unpacked, summed and removed again on XFS over a backing image, while the image must not grow; and fio with 16 jobs
//! that verify what they wrote, across kills of the server. guest/soak.sh is the story.

use crate::{
    apt::PrivateApt,
    kernel::Kernel,
    place::{Job, Place},
    process::{program, run},
    test::{Count, Report},
    vm::machine::{Access, Disk},
    workspace::{self, build_release},
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

const LIB: &str = include_str!("../guest/lib.sh");
const STORY: &str = include_str!("../guest/soak.sh");
/// What a round that has begun may still take, and preparing the first one.
const GRACE: Duration = Duration::from_secs(3600);
/// A whole tree, twice unpacked, and images.
const SCRATCH_GIB: u32 = 24;
/// Parts of the tree that an emulated machine can carry about in minutes.
const PARTS: &str = "fs kernel mm lib block crypto";

/// Options of `cargo xtask soak`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run in the virtual machine with this kernel, even where the host could
    #[arg(long, value_enum)]
    kernel: Option<Kernel>,
    /// Begin no new round after so many minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 20)]
    time: u64,
    /// Directories of the source tree to use; an empty list means all of it
    #[arg(long, default_value = PARTS)]
    parts: String,
    /// Seed of fio's generator
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Runs `cargo xtask soak`.
///
/// # Errors
/// Fails only when setup does; what is found is in the exit code.
pub(crate) fn command(options: &Options) -> Result<ExitCode> {
    let place = Place::choose(options.kernel);
    place.prepare()?;
    let mut report = Report::default();
    report.lane(&format!("soak on {place}"), || soak(place, options));
    Ok(report.finish())
}

fn soak(place: Place, options: &Options) -> Result<Count> {
    let product = build_release("ublk-qcow2", "ublk-qcow2")?;
    let time = Duration::from_secs(options.time * 60);
    let script = format!("{LIB}{STORY}");
    let mut job = Job::new(&script, time + GRACE)
        .program(&product)
        .variable("SOAK_SECONDS", &time.as_secs().to_string())
        .variable("PARTS", &options.parts)
        .variable("SEED", &options.seed.to_string())
        .disk(Disk { name: "source".to_owned(), path: source_tree()?, access: Access::ReadOnly });
    job.scratch_gib = SCRATCH_GIB;
    let finished = job.run(place)?;
    ensure!(finished.status == 0, "the story ended with status {}", finished.status);
    let output = String::from_utf8_lossy(&finished.output);
    let rounds = output.lines().filter(|line| line.starts_with("[ ok ] round ")).count() as u64;
    ensure!(rounds > 0, "not one round was whole");
    Ok(Count { passed: rounds, failed: 0 })
}

/// The newest `linux-source-*` of this Debian, as an uncompressed archive in the cache.
fn source_tree() -> Result<PathBuf> {
    workspace::cached("soak", "linux-source.tar", |tar, staging| {
        let apt = PrivateApt::host()?;
        let mut found = apt.search("^linux-source-[0-9.]+$")?;
        found.sort_by_key(|name| crate::kernel::digits(name));
        let package = found.pop().context("this Debian has no package linux-source-*")?;
        apt.unpack(&[package], staging)?;
        let packed = only(&staging.join("usr/src"), "xz")?;
        run(program("xz")?.arg("-d").arg(&packed))?;
        fs::rename(packed.with_extension(""), tar).context("cannot move the source tree")
    })
}

/// The one file of a directory with this extension.
fn only(dir: &Path, extension: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|ext| ext == extension) && path.is_file() {
            found.push(path);
        }
    }
    match found.as_slice() {
        [path] => Ok(path.clone()),
        _ => bail!("{} has {} files that end in .{extension}, not one", dir.display(), found.len()),
    }
}
