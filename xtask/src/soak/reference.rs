//! What the build of a kernel on a device is held against: the same build on a directory of this host, made
//! once, by its own processor, in the very tools that the story has as a disk. guest/reference.sh is how;
//! kernel.sh is what both have in common.

use super::{IN_TOOLS, KERNEL, LIB};
use crate::{
    place::{Job, Place},
    tools,
    vm::machine::{Access, Disk},
    workspace,
};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
    time::Duration,
};

const STORY: &str = include_str!("../../guest/reference.sh");
/// A slow host makes a small kernel in ten minutes.
const LIMIT: Duration = Duration::from_secs(3600);

/// How the compiler comes to its results on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Compile {
    /// It runs
    Anew,
    /// What the reference's compiler has made is taken for the same source, headers and options, by their
    /// content as read
    Reuse,
}

impl Compile {
    /// As guest/kernel.sh calls it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Anew => "anew",
            Self::Reuse => "reuse",
        }
    }
}

/// The disks `build` and `reference`, both archives: what a build needs of the `source` tree, and what must
/// come of making `targets` with `tools`. From the cache, or made now.
///
/// # Errors
/// Fails when this host cannot build, for which it needs mount namespaces.
pub(super) fn disks(targets: &str, source: &Path, tools: &Disk) -> Result<[Disk; 2]> {
    let script = format!("{LIB}{IN_TOOLS}{KERNEL}{STORY}");
    let archive = source.metadata().with_context(|| format!("cannot look at {}", source.display()))?;
    let mut hasher = DefaultHasher::new();
    (&script, targets, &tools.path.file_name(), archive.len(), archive.modified()?).hash(&mut hasher);
    let dir = workspace::cached("soak", &format!("reference-{:016x}", hasher.finish()), |dir, staging| {
        let tree = staging.join("tools");
        tools::unpack(tools, &tree)?;
        let mut job = Job::new(&script, LIMIT)
            .variable("BUILD", targets)
            .variable("COMPILE", Compile::Reuse.name())
            .disk(read_only("source", source))
            .disk(read_only("tools", &tree));
        job.results = Some(dir.to_owned());
        let finished = job.run(Place::Host)?;
        ensure!(finished.status == 0, "the build on this host ended with status {}", finished.status);
        fs::remove_dir_all(&tree).context("cannot remove the tools' tree")
    })?;
    Ok(["source", "reference"].map(|name| {
        let disk = if name == "source" { "build" } else { name };
        read_only(disk, &dir.join(format!("{name}.tar")))
    }))
}

fn read_only(name: &str, path: &Path) -> Disk {
    Disk { name: name.to_owned(), path: path.to_owned(), access: Access::ReadOnly }
}
