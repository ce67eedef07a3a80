//! Rounds until the time is up, on images that live through all of them: a kernel's source tree, unpacked,
//! summed, built and removed again on XFS over a backing image, while the image must not grow; and fio with
//! 16 jobs that verify what they wrote, across kills of the server. guest/soak.sh is the story.

use super::{
    IN_TOOLS, KERNEL, LIB,
    reference::{self, Compile},
};
use crate::{
    apt::PrivateApt,
    place::{Job, Place},
    process::{program, run},
    test::Count,
    timing, tools,
    vm::{
        accel::Accel,
        machine::{Access, Disk},
    },
    workspace::{self, build_release},
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

const STORY: &str = include_str!("../../guest/soak.sh");
/// What a round that has begun may still take, and preparing the first one.
const GRACE: Duration = Duration::from_secs(3600);
/// A whole tree, twice unpacked, and images.
const SCRATCH_GIB: u32 = 24;
/// Parts of the tree that an emulated machine can carry about in minutes.
const PARTS: &str = "fs kernel mm lib block crypto";
/// What `make tinyconfig bzImage` calls.
const BUILDERS: [&str; 10] =
    ["bc", "bison", "ccache", "flex", "gcc", "libc6-dev", "make", "perl", "tar", "xz-utils"];

/// How much is done; options of `cargo xtask soak`.
#[derive(Debug, clap::Args)]
pub(super) struct Scope {
    /// Begin no new round after this time, as 90s, 20m or 2h (a bare number is minutes)
    #[arg(long, value_parser = timing::or_minutes, default_value = "20m")]
    pub(super) time: Duration,
    /// Directories of the source tree to use; an empty list means all of it
    #[arg(long, default_value = PARTS)]
    parts: String,
    /// What to make of the whole tree after `make tinyconfig`, nothing if empty [default: bzImage; nothing
    /// where the machine is emulated]
    #[arg(long, value_name = "TARGETS")]
    build: Option<String>,
    /// How the compiler comes to its results on the device [default: anew; reuse where the machine is
    /// emulated, which would take hours]
    #[arg(long, value_enum)]
    compile: Option<Compile>,
}

/// What a round consists of.
pub(super) struct Work {
    pub tree: bool,
    pub fio: bool,
}

/// Rounds until the time is up. Each is a test that passed.
///
/// # Errors
/// What did not hold.
pub(super) fn lane(place: Place, scope: &Scope, seed: u64, work: Work) -> Result<Count> {
    let product = build_release("ublk-qcow2", "ublk-qcow2")?;
    let time = scope.time;
    let script = format!("{LIB}{IN_TOOLS}{KERNEL}{STORY}");
    let source = source_tree()?;
    let yes = |wanted| if wanted { "1" } else { "" };
    let mut job = Job::new(&script, time + GRACE)
        .program(&product)
        .variable("SOAK_SECONDS", &time.as_secs().to_string())
        .variable("TREE", yes(work.tree))
        .variable("FIO", yes(work.fio))
        .variable("PARTS", &scope.parts)
        .variable("SEED", &seed.to_string())
        .disk(Disk { name: "source".to_owned(), path: source.clone(), access: Access::ReadOnly });
    let is_emulated = is_emulated(place)?;
    let build = if work.tree { scope.to_build(is_emulated) } else { "" };
    job = job.variable("BUILD", build).variable("COMPILE", scope.to_compile(is_emulated).name());
    if !build.is_empty() {
        let tools = tools::disk("builders", &BUILDERS)?;
        let [needed, expected] = reference::disks(build, &source, &tools)?;
        job = job.disk(tools).disk(needed).disk(expected);
    }
    job.scratch_gib = SCRATCH_GIB;
    let finished = job.run(place)?;
    ensure!(finished.status == 0, "the story ended with status {}", finished.status);
    whole_rounds(&finished.output)
}

/// The rounds that a story says it has come through.
///
/// # Errors
/// There is none.
pub(super) fn whole_rounds(output: &[u8]) -> Result<Count> {
    let output = String::from_utf8_lossy(output);
    let rounds = output.lines().filter(|line| line.starts_with("[ ok ] round ")).count() as u64;
    ensure!(rounds > 0, "not one round was whole");
    Ok(Count { passed: rounds, failed: 0 })
}

impl Scope {
    /// What was asked for, or what can be done in minutes.
    fn to_build(&self, is_emulated: bool) -> &str {
        match &self.build {
            Some(targets) => targets,
            None if is_emulated => {
                println!(
                    "NOT DONE: no kernel is built where the machine is emulated; ask for it with --build bzImage"
                );
                ""
            }
            None => "bzImage",
        }
    }

    fn to_compile(&self, is_emulated: bool) -> Compile {
        self.compile.unwrap_or(if is_emulated { Compile::Reuse } else { Compile::Anew })
    }
}

/// Whether the processor there is another program.
fn is_emulated(place: Place) -> Result<bool> {
    let Place::Machine(kernel) = place else { return Ok(false) };
    Ok(Accel::detect(&kernel.unpacked()?.context("setup left no kernel")?)? != Accel::Kvm)
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
