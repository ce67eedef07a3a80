//! Where the suite has its records, and what becomes of devices that a case leaves behind.
//!
//! A host may have devices of its user's: the suite's have a run directory of their own, so that no command of it, not
//! even `del --all`, finds another. What a failed case has left is removed by these records alone. A device that has
//! appeared and is in none may be anybody's: it is told of, and stays.

use crate::{device::Binary, patience};
use anyhow::{Context, Result, bail};
use std::{
    cell::RefCell,
    collections::BTreeSet,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    time::Duration,
};
use tempfile::{Builder, TempDir};

/// Where all run directories are, which must not outlive a boot.
const ABOVE: &str = "/run";
/// How long nodes may outlive their devices.
const LEFTOVER_LIMIT: Duration = Duration::from_secs(10);

/// The suite's run directory.
pub struct Grounds {
    binary: Binary,
    dir: TempDir,
    /// Nodes that are no case's.
    others: RefCell<BTreeSet<String>>,
    /// Those that there are.
    existing: fn() -> BTreeSet<String>,
}

impl Grounds {
    /// For a program; `existing` tells which nodes of devices there are.
    ///
    /// # Errors
    /// The operating system's.
    pub fn new(binary: &Binary, existing: fn() -> BTreeSet<String>) -> Result<Self> {
        Self::below(Path::new(ABOVE), binary, existing)
    }

    fn below(above: &Path, binary: &Binary, existing: fn() -> BTreeSet<String>) -> Result<Self> {
        let mut dir = Builder::new();
        // As the program makes its own.
        let dir = dir.prefix("ublk-qcow2-suite-").permissions(Permissions::from_mode(0o755));
        let dir =
            dir.tempdir_in(above).with_context(|| format!("no run directory in {}", above.display()))?;
        let binary = binary.in_run_dir(dir.path());
        Ok(Self { binary, dir, others: RefCell::new(existing()), existing })
    }

    /// The program, with its records here.
    #[must_use]
    pub fn binary(&self) -> &Binary {
        &self.binary
    }

    /// For after a case: removes what it has left.
    ///
    /// # Errors
    /// There was something, or a device of somebody else's has appeared.
    pub fn tidy(&self) -> Result<()> {
        let mut others = self.others.borrow_mut();
        let new = || -> BTreeSet<_> { (self.existing)().difference(&others).cloned().collect() };
        let left = new();
        let instances = [self.binary.clone(), self.binary.apart()];
        if !left.is_empty() {
            for instance in instances.iter().filter(|it| it.run_dir().exists()) {
                // The case has failed by this; the next ones need not suffer. What stays is told below.
                let _ = instance.run(["del", "--all", "--force"]);
            }
            let _ = patience::until(LEFTOVER_LIMIT, String::new, || Ok(new().is_empty()));
        }
        let [_, apart] = &instances;
        if apart.run_dir().exists() && !has_records(apart.run_dir()) {
            fs::remove_dir_all(apart.run_dir())?;
        }
        let strange = new();
        let ours: Vec<_> = left.difference(&strange).collect();
        match (ours.is_empty(), strange.is_empty()) {
            (true, true) => return Ok(()),
            (false, true) => bail!("devices were left behind: {ours:?}"),
            // Once is enough.
            (_, false) => others.extend(strange.iter().cloned()),
        }
        bail!(
            "devices stay that somebody else has made, or that could not be removed: {strange:?}; removed: {ours:?}"
        )
    }

    /// Leaves nothing behind, or says where the records are of what cannot be removed.
    pub fn leave(self) {
        if has_records(self.dir.path()) || has_records(self.binary.apart().run_dir()) {
            let dir = self.dir.keep();
            eprintln!(
                "devices are left; with UBLK_QCOW2_RUN_DIR={} (or its `apart`) `del --all --force` removes them",
                dir.display()
            );
        }
    }
}

fn has_records(dir: &Path) -> bool {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files.into_iter().any(|file| file.path().extension().is_some_and(|it| it == "json"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        path::PathBuf,
        sync::atomic::{AtomicUsize, Ordering},
    };

    /// `tidy` removed every device that had appeared since the suite began, whoever had made it; and cases ran
    /// `del --all` in the user's own run directory.
    #[test]
    fn only_what_is_in_the_suites_records_is_removed() {
        /// How many nodes there are.
        static NODES: AtomicUsize = AtomicUsize::new(1);
        let existing = || (0..NODES.load(Ordering::Relaxed)).map(|id| format!("ublkb{id}")).collect();
        let dir = tempfile::tempdir().unwrap();
        let (program, said) = (dir.path().join("program"), dir.path().join("said"));
        let text = format!("#!/bin/sh\necho \"$UBLK_QCOW2_RUN_DIR $*\" >>{}\n", said.display());
        fs::write(&program, text).unwrap();
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        let grounds = Grounds::below(dir.path(), &Binary::new(program), existing).unwrap();
        let ours = grounds.binary().run_dir().to_owned();
        assert!(ours.starts_with(dir.path()) && ours != dir.path());

        grounds.tidy().unwrap();
        assert!(!said.exists(), "nothing was left");
        fs::create_dir(grounds.binary().apart().run_dir()).unwrap();
        NODES.store(2, Ordering::Relaxed);
        let error = grounds.tidy().unwrap_err().to_string();
        assert!(error.contains("somebody else") && error.contains("ublkb1"), "{error}");
        let expected = format!("{0} del --all --force\n{0}/apart del --all --force\n", ours.display());
        assert_eq!(fs::read_to_string(&said).unwrap(), expected);
        grounds.tidy().expect("it is told once");
        assert!(!grounds.binary().apart().run_dir().exists(), "the next case's is new");
        grounds.leave();
        assert!(!ours.exists());
    }

    #[test]
    fn records_of_what_is_left_stay() {
        let dir = tempfile::tempdir().unwrap();
        let grounds = Grounds::below(dir.path(), &Binary::new(PathBuf::from("true")), BTreeSet::new).unwrap();
        let record = grounds.binary().file(3, "json");
        fs::write(&record, "{}").unwrap();
        grounds.leave();
        assert!(record.exists());
    }
}
