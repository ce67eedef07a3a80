//! Where things are: the workspace, cargo's target directory, and the cache of kernels and machines.
//!
//! The cache is independent of the target directory, so that several clones or target directories can share
//! one; `UBLK_QCOW2_CACHE` moves it. Everything in it can be deleted at any time.

use crate::process::{capture, run};
use anyhow::{Context, Result};
use std::{
    env,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    process::Command,
};

/// Names another cache directory, to be shared between clones.
pub(crate) const CACHE_ENV: &str = "UBLK_QCOW2_CACHE";

/// The directory that holds the workspace's Cargo.toml.
pub(crate) fn root() -> &'static Path {
    let manifest_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest_dir.parent().unwrap_or(manifest_dir)
}

/// The cache directory, created when missing.
///
/// # Errors
/// Fails when it cannot be created.
pub(crate) fn cache() -> Result<PathBuf> {
    let dir = env::var_os(CACHE_ENV).map_or_else(|| root().join(".cache/vm"), PathBuf::from);
    let dir = std::path::absolute(&dir).with_context(|| format!("bad cache directory {}", dir.display()))?;
    fs::create_dir_all(&dir).with_context(|| {
        format!("cannot create the cache {}; set {CACHE_ENV} to a writable directory", dir.display())
    })?;
    Ok(dir)
}

/// A file of the cache, in the directory `area`, which `make` makes if it is not there: at the first path
/// that it is given, with the directory beside it for whatever else it needs. It gets its name when it is
/// whole.
///
/// # Errors
/// Fails when `make` does, or the cache cannot be written.
pub(crate) fn cached(
    area: &str,
    name: &str,
    make: impl FnOnce(&Path, &Path) -> Result<()>,
) -> Result<PathBuf> {
    let dir = cache()?.join(area);
    fs::create_dir_all(&dir)?;
    let path = dir.join(name);
    let _lock = lock(area)?;
    if !path.exists() {
        eprintln!("making {name}, to be kept in {}", dir.display());
        let staging = tempfile::Builder::new().prefix("making-").tempdir_in(&dir)?;
        let unfinished = staging.path().join(name);
        make(&unfinished, staging.path())?;
        fs::rename(&unfinished, &path).with_context(|| format!("cannot keep {}", path.display()))?;
    }
    Ok(path)
}

/// A command that runs the same cargo that runs us, in the workspace root.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Builds `binary` of `package` in release mode and returns its path.
///
/// # Errors
/// Fails when it does not build.
pub(crate) fn build_release(package: &str, binary: &str) -> Result<PathBuf> {
    run(cargo().args(["build", "--release", "--package", package, "--bin", binary]))?;
    Ok(target_dir()?.join("release").join(binary))
}

/// Cargo's target directory, as cargo itself sees it.
///
/// # Errors
/// Fails when `cargo metadata` does.
pub(crate) fn target_dir() -> Result<PathBuf> {
    let text = capture(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text).context("cargo metadata is not JSON")?;
    let dir = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    Ok(PathBuf::from(dir))
}

/// An exclusive lock on a file of the cache, released on drop.
pub(crate) struct Lock {
    _file: File,
}

/// Takes the lock `name` of the cache, and says so when it has to wait for another xtask.
///
/// # Errors
/// Fails when the lock file cannot be made or locked.
pub(crate) fn lock(name: &str) -> Result<Lock> {
    let path = cache()?.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            eprintln!("waiting for another xtask that holds {}", path.display());
            file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        }
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
    }
    Ok(Lock { _file: file })
}
