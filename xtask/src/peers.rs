//! Programs from the Rust package registry that no package manager of the system has: the peer that
//! benchmarks run beside us, rublk, and a file-system exerciser, fsx.
//!
//! Built by cargo into the cache, at fixed versions, once.

use crate::{
    process::run,
    setup,
    workspace::{self, cargo},
};
use anyhow::{Context, Result};
use std::{fs, path::PathBuf};

/// The version that our figures are held against.
const RUBLK_VERSION: &str = "0.2.15";
const FSX_VERSION: &str = "0.3.2";

/// rublk, built when it is not in the cache yet.
///
/// # Errors
/// Fails when it does not build.
pub(crate) fn rublk() -> Result<PathBuf> {
    installed("rublk", RUBLK_VERSION, &["--no-default-features"])
}

/// fsx, built when it is not in the cache yet.
///
/// # Errors
/// Fails when it does not build.
pub(crate) fn fsx() -> Result<PathBuf> {
    installed("fsx", FSX_VERSION, &["--locked"])
}

fn installed(name: &str, version: &str, options: &[&str]) -> Result<PathBuf> {
    let root = workspace::cache()?.join("peers").join(format!("{name}-{version}"));
    let binary = root.join("bin").join(name);
    if binary.exists() {
        return Ok(binary);
    }
    setup::ensure_for_peers()?;
    let _lock = workspace::lock("peers")?;
    if binary.exists() {
        return Ok(binary);
    }
    println!("building {name} {version}");
    let build = tempfile::Builder::new().prefix("build-").tempdir_in(workspace::cache()?)?;
    let mut install = cargo();
    install.args(["install", name, "--version", version, "--quiet"]).args(options).arg("--root");
    install.arg(&root).env("CARGO_TARGET_DIR", build.path());
    run(&mut install).or_else(|error| {
        // Half an installation must not pass for a whole one.
        fs::remove_dir_all(&root).context("cannot remove a failed installation")?;
        Err(error)
    })?;
    Ok(binary)
}
