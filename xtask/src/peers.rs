//! The peer that benchmarks run beside us and that no package manager of the system has: rublk.
//!
//! Built by cargo from the package registry into the cache, at a fixed version, once.

use crate::{
    process::run,
    setup::{self, Kernels},
    workspace::{self, cargo},
};
use anyhow::{Context, Result};
use std::{fs, path::PathBuf};

/// The version that our figures are held against.
const RUBLK_VERSION: &str = "0.2.15";

/// rublk, built when it is not in the cache yet.
///
/// # Errors
/// Fails when it does not build.
pub(crate) fn rublk() -> Result<PathBuf> {
    let root = workspace::cache()?.join("peers").join(format!("rublk-{RUBLK_VERSION}"));
    let binary = root.join("bin/rublk");
    if binary.exists() {
        return Ok(binary);
    }
    setup::ensure(Kernels::HostOnly)?; // its bindings need libclang
    let _lock = workspace::lock("peers")?;
    if binary.exists() {
        return Ok(binary);
    }
    println!("building rublk {RUBLK_VERSION} for comparison");
    let build = tempfile::Builder::new().prefix("build-").tempdir_in(workspace::cache()?)?;
    let mut install = cargo();
    install.args([
        "install",
        "rublk",
        "--version",
        RUBLK_VERSION,
        "--no-default-features",
        "--quiet",
        "--root",
    ]);
    install.arg(&root).env("CARGO_TARGET_DIR", build.path());
    run(&mut install).or_else(|error| {
        // Half an installation must not pass for a whole one.
        fs::remove_dir_all(&root).context("cannot remove a failed installation")?;
        Err(error)
    })?;
    Ok(binary)
}
