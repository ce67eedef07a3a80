//! fio against a device: verified writes of mixed sizes with trim, and plain load.
//!
//! fio judges its own data (crc32c of every block); this module chooses the load and reads the
//! verdict. Knows nothing of images.

use crate::command::{line_of, run};
use anyhow::{Context, Result, ensure};
use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

/// Jobs that write at the same time, each in a region of its own.
pub const JOBS: u64 = 12;
/// More than a verified run takes in an emulated machine.
const LIMIT: Duration = Duration::from_secs(240);
/// Block sizes of writes with their share in percent: from a sector to many clusters.
const WRITE_SIZES: &str = "512/10:1536/5:4k/35:16k/20:64k/15:256k/10:1M/5";
/// Block sizes of trims: parts of clusters, clusters, rows of them.
const TRIM_SIZES: &str = "4k/30:64k/40:256k/30";

/// A verified load: every job writes a region of its own, and trims run beside it in others.
#[derive(Clone, Copy, Debug)]
pub struct Verified {
    /// Bytes that each job writes.
    pub bytes_per_job: u64,
    /// Seed of fio's generator.
    pub seed: u64,
}

impl Verified {
    /// Bytes of the device that are needed: each job has a region to write and one to trim.
    #[must_use]
    pub fn device_bytes(&self) -> u64 {
        2 * JOBS * self.bytes_per_job
    }

    /// Writes the even regions; then the odd ones, while the even ones are trimmed; then the even
    /// ones again, while the odd ones are trimmed. Each write is verified at the end of its round.
    ///
    /// # Errors
    /// A block that does not verify, or an I/O error.
    pub fn run(&self, device: &Path) -> Result<()> {
        self.round(device, 0, None)?;
        self.round(device, 1, Some(0))?;
        self.round(device, 0, Some(1))
    }

    fn round(&self, device: &Path, writes: u64, trims: Option<u64>) -> Result<()> {
        let region = self.bytes_per_job;
        let place = |half: u64| {
            [
                format!("--numjobs={JOBS}"),
                format!("--size={region}"),
                format!("--offset={}", half * region),
                format!("--offset_increment={}", 2 * region),
            ]
        };
        let mut command = base(device);
        command.arg(format!("--randseed={}", self.seed)).arg("--group_reporting");
        command
            .args(["--name=write", "--rw=randwrite", "--iodepth=4", "--bssplit", WRITE_SIZES])
            .args(place(writes));
        command.args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1"]);
        if let Some(half) = trims {
            command.args(["--name=trim", "--rw=randtrim", "--bssplit", TRIM_SIZES]).args(place(half));
        }
        let finished = run(&mut command, LIMIT)?.success()?;
        let text = finished.text();
        ensure!(!text.contains("verify: bad"), "fio: {text}");
        ensure!(text.contains("READ:") && text.contains("WRITE:"), "fio has not verified: {text}");
        ensure!(trims.is_none() || text.contains("TRIM:"), "fio has not trimmed: {text}");
        Ok(())
    }
}

/// Starts a load of random reads and writes that goes on for `time`, on everything from `from` on.
///
/// # Errors
/// fio cannot be started.
pub fn start_load(device: &Path, from: u64, time: Duration) -> Result<Child> {
    let mut command = base(device);
    command.args([
        "--name=load",
        "--rw=randrw",
        "--rwmixread=25",
        "--bssplit=4k/60:512/10:64k/20:512k/10",
        "--iodepth=16",
        "--numjobs=4",
        "--time_based",
        "--norandommap",
        "--randrepeat=0",
        "--fsync=200",
        "--group_reporting",
    ]);
    command.arg(format!("--offset={from}")).arg(format!("--runtime={}", time.as_secs()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().with_context(|| format!("cannot start `{}`", line_of(&command)))
}

fn base(device: &Path) -> Command {
    let mut command = Command::new("fio");
    command.args(["--direct=1", "--ioengine=libaio", "--thread"]).arg("--filename").arg(device);
    command
}
