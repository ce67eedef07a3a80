//! Programs that a lane needs and nobody should have to install: Debian's packages with all they depend on,
//! unpacked into a file system that the lane is shown as a disk.
//!
//! Nothing of them is configured: there are no users but root and nobody, no services, no alternatives. A
//! story goes in with `in_tools` of guest/tools.sh.

use crate::{
    apt::PrivateApt,
    process::{capture, program},
    vm::machine::{Access, Disk},
    workspace,
};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::symlink,
    path::Path,
};

/// What packages take for granted.
const EVERY_DEBIAN: [&str; 9] =
    ["bash", "coreutils", "dash", "diffutils", "findutils", "grep", "mawk", "sed", "util-linux"];
/// Beside what is in it, for the file system's own tables.
const ROOM_PERCENT: u64 = 125;

/// The disk `tools` with `packages`, from the cache or fetched into it. `name` is for those who look there.
///
/// # Errors
/// Fails when they cannot be fetched.
pub(crate) fn disk(name: &str, packages: &[&str]) -> Result<Disk> {
    let all: Vec<_> = EVERY_DEBIAN.iter().chain(packages).copied().collect();
    let mut hasher = DefaultHasher::new();
    all.hash(&mut hasher); // another list is another disk
    let path =
        workspace::cached("tools", &format!("{name}-{:016x}.ext4", hasher.finish()), |file, staging| {
            let root = staging.join("root");
            PrivateApt::host()?
                .unpack_with_dependencies(&all, &root)
                .with_context(|| format!("cannot fetch {}", packages.join(", ")))?;
            complete(&root)?;
            make_file_system(&root, file)
        })?;
    Ok(Disk { name: "tools".to_owned(), path, access: Access::ReadOnly })
}

/// The content of such a disk as a directory of this host, which `into` becomes: the same bytes, so that what
/// they make is the same.
///
/// # Errors
/// Fails when it cannot be read or written.
pub(crate) fn unpack(tools: &Disk, into: &Path) -> Result<()> {
    fs::create_dir(into).with_context(|| format!("cannot make {}", into.display()))?;
    // It takes its commands apart itself, so the names in them must be plain; and it fails with status 0.
    let mut read = program("debugfs")?;
    capture(read.args(["-R", "rdump / ."]).arg(&tools.path).current_dir(into))?;
    ensure!(
        into.join("usr/bin/env").exists(),
        "debugfs did not unpack {} into {}",
        tools.path.display(),
        into.display()
    );
    Ok(())
}

/// What the packages' own scripts would have made, and places to mount something.
fn complete(root: &Path) -> Result<()> {
    fs::create_dir_all(root.join("work"))?;
    fs::create_dir_all(root.join("etc"))?;
    fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    symlink("mawk", root.join("usr/bin/awk")).context("cannot link awk")
}

fn make_file_system(root: &Path, file: &Path) -> Result<()> {
    let used = capture(program("du")?.args(["-s", "-k"]).arg(root))?;
    let kib: u64 =
        used.split_whitespace().next().unwrap_or_default().parse().context("du printed no size")?;
    let mut make = program("mkfs.ext4")?;
    make.args(["-q", "-m", "0", "-O", "^has_journal", "-d"]).arg(root).arg(file);
    capture(make.arg(format!("{}k", kib * ROOM_PERCENT / 100))).map(drop)
}
