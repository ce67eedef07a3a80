//! `cargo xtask texts`: manual pages and shell completions. The program itself writes them, from the description of
//! its command line, when it is built with the feature that has it do so.

use crate::{
    process::run,
    setup::{self, Kernels},
    workspace,
};
use anyhow::{Context, Result};
use std::{fs, path::PathBuf};

/// Names the directory to the program.
const DIRECTORY: &str = "UBLK_QCOW2_TEXTS";

/// Runs `cargo xtask texts`.
///
/// # Errors
/// Fails when the program does not build, or cannot write them.
pub(crate) fn command() -> Result<()> {
    setup::ensure(Kernels::HostOnly)?;
    println!("{}", write()?.display());
    Ok(())
}

/// Writes them anew, and says into which directory.
///
/// # Errors
/// As [`command`].
pub(crate) fn write() -> Result<PathBuf> {
    let directory = workspace::target_dir()?.join("texts");
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let program = ["run", "--quiet", "--package", "ublk-qcow2", "--bin", "ublk-qcow2", "--features", "texts"];
    run(workspace::cargo().args(program).env(DIRECTORY, &directory))?;
    Ok(directory)
}
