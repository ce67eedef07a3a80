//! `cargo xtask dist`: the release binary and what goes with it (licences, manual pages, completions, a systemd unit,
//! udev rules), in a tarball with its SHA-256.

use crate::{
    process::{capture, program, run},
    setup::{self, Kernels},
    texts, workspace,
};
use anyhow::{Context, Result};
use std::{env::consts::ARCH, fs, path::Path};

/// Texts that go along. A missing one is an error: a package without its licences must not leave the house.
const TEXTS: [&str; 6] = [
    "README.md",
    "CHANGELOG.md",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "dist/ublk-qcow2@.service",
    "dist/60-ublk-qcow2.rules",
];
/// Where the manual pages are in the package, and where the completions.
const PAGES: &str = "man";
const COMPLETIONS: &str = "completions";

/// Runs `cargo xtask dist`.
///
/// # Errors
/// Fails when the binary does not build or a text is missing.
pub(crate) fn command() -> Result<()> {
    setup::ensure(Kernels::HostOnly)?;
    let binary = workspace::build_release("ublk-qcow2", "ublk-qcow2")?;
    let dist = workspace::target_dir()?.join("dist");
    let name = format!("ublk-qcow2-{}-{ARCH}-linux", env!("CARGO_PKG_VERSION"));
    let staging = dist.join(&name);
    if staging.exists() {
        fs::remove_dir_all(&staging)?;
    }
    fs::create_dir_all(&staging).with_context(|| format!("cannot create {}", staging.display()))?;
    fs::copy(&binary, staging.join("ublk-qcow2")).context("cannot copy the binary")?;
    for text in TEXTS.map(Path::new) {
        let name = text.file_name().context("a text without a name")?;
        fs::copy(workspace::root().join(text), staging.join(name))
            .with_context(|| format!("cannot copy {}", text.display()))?;
    }
    copy_written(&staging)?;

    // The same files give the same archive, whoever packs them and whenever.
    let archive = format!("{name}.tar.gz");
    let mut tar = program("tar")?;
    tar.args([
        "--sort=name",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "--mtime=@0",
        "--mode=u=rwX,go=rX",
    ]);
    tar.args(["--use-compress-program=gzip -9n", "-cf"]).arg(&archive).arg(&name).current_dir(&dist);
    run(&mut tar)?;
    fs::remove_dir_all(&staging)?;
    let sum = capture(program("sha256sum")?.arg(&archive).current_dir(&dist))?;
    fs::write(dist.join(format!("{archive}.sha256")), &sum)?;
    println!("{}\n{}", dist.join(&archive).display(), sum.trim_end());
    Ok(())
}

/// Manual pages and completions, each into a directory of its own.
fn copy_written(staging: &Path) -> Result<()> {
    for directory in [PAGES, COMPLETIONS] {
        fs::create_dir(staging.join(directory))?;
    }
    for entry in fs::read_dir(texts::write()?)? {
        let path = entry?.path();
        let is_page = path.extension().is_some_and(|section| section == "8");
        let directory = staging.join(if is_page { PAGES } else { COMPLETIONS });
        let name = path.file_name().context("a text without a name")?;
        fs::copy(&path, directory.join(name)).with_context(|| format!("cannot copy {}", path.display()))?;
    }
    Ok(())
}
