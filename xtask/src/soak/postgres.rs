//! PostgreSQL on a file system of the device, on a machine that is killed: what it has acknowledged is there.
//!
//! Its clients tell the outside, through the machine's report, of every commit that has returned. Each life
//! holds what it finds against the reports of all lives before it; guest/postgres.sh is the story of one.

use super::{IN_TOOLS, LIB};
use crate::{kernel::Kernel, lives::Lives, test::Count, tools, vm, vm::tree::Tree};
use anyhow::{Context, Result};
use std::{fmt::Write, fs, ops::Range, time::Duration};

const STORY: &str = include_str!("../../guest/postgres.sh");
/// The host's disk; sparse. The database takes some 100 MiB.
const HOST_BYTES: u64 = 4 << 30;
/// An emulated machine makes a database in two minutes, and recovers and checks it in one.
const LIMIT: Duration = Duration::from_secs(900);
/// How long the clients work, in milliseconds.
const LIFETIME: Range<u64> = 2_000..20_000;

/// Kills the machine so often. Each life that held what it had to is a test that passed.
///
/// # Errors
/// What did not hold, with the seed that repeats the moments of the kills.
pub(super) fn lane(kernel: Kernel, kills: u64, seed: u64) -> Result<Count> {
    let mut lives = Lives::new("postgres", kernel, HOST_BYTES, LIMIT)?;
    lives.add(tools::disk("postgres", &["postgresql"])?);
    let product = lives.program("ublk-qcow2")?;
    // All four pairs of the host's file system and the database's come up, as seeds follow each other.
    let file_systems = ["xfs", "ext4"];
    let (host, data) = (file_systems[seed as usize % 2], file_systems[seed as usize / 2 % 2]);
    println!("postgres: {kills} kills, {data} on an image on {host}; repeat with --seed {seed}");
    let script = format!("{LIB}{IN_TOOLS}{STORY}");
    lives.run(kills, seed, LIFETIME, |lives, life, last| {
        let mut tree = Tree::default();
        vm::send(&mut tree, &product, None)?;
        tree.text("payload/acknowledged", &acknowledged(lives, life)?, 0o644);
        tree.text("payload/script", &script, 0o644);
        let run = format!(
            "#!/bin/bash\nexport LIFE={life} LAST={} HOST_FS={host} DATA_FS={data} DISK_host=/dev/disk/host DISK_tools=/dev/disk/tools\n\
             exec bash /payload/script\n",
            u8::from(last)
        );
        tree.text("payload/run", &run, 0o755);
        Ok(tree)
    })
}

/// What the lives before this one have reported: a line `LIFE CLIENT NUMBER` per commit.
fn acknowledged(lives: &Lives, life: u64) -> Result<String> {
    let mut all = String::new();
    for before in 0..life {
        let report = lives.report(before);
        let text =
            fs::read_to_string(&report).with_context(|| format!("cannot read {}", report.display()))?;
        for commit in commits(&text) {
            writeln!(all, "{commit}")?;
        }
    }
    Ok(all)
}

/// The commits in a report. A line that was cut off counts for nothing.
fn commits(report: &str) -> impl Iterator<Item = &str> {
    report.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')?.strip_prefix("committed "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_cut_off_is_no_commit() {
        let report = "serving 3\ncommitted 3 0 1\ncommitted 3 1 1\ncommitted 3 0 1";
        assert_eq!(commits(report).collect::<Vec<_>>(), ["3 0 1", "3 1 1"]);
        assert_eq!(commits("serving 3\n").count(), 0);
    }
}
