//! fio against a device: verified writes of mixed sizes with trim, and plain load.
//!
//! fio judges its own data (crc32c of every block); this module chooses the load and reads the
//! verdict. Knows nothing of images.

use crate::command::{Finished, line_of, run};
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
/// Block sizes with their share in percent: from a sector to more than a cluster.
const SIZES: &str = "512/10:1536/5:4k/35:16k/20:64k/15:256k/10:1M/5";

/// A verified load.
#[derive(Clone, Copy, Debug)]
pub struct Verified {
    /// Bytes that each job writes.
    pub bytes_per_job: u64,
    /// Seed of fio's generator.
    pub seed: u64,
}

impl Verified {
    /// Bytes of the device that all jobs need together.
    #[must_use]
    pub fn device_bytes(&self) -> u64 {
        JOBS * self.bytes_per_job
    }

    /// Mixed sizes with trim: what was written and not trimmed must read back.
    ///
    /// # Errors
    /// A block that does not verify, or an I/O error.
    pub fn mixed(&self, device: &Path) -> Result<()> {
        let finished =
            self.run(device, &["--bssplit", SIZES, "--trim_percentage=10", "--trim_backlog=16"])?;
        ensure!(finished.stdout.contains("trim"), "fio has not trimmed: {}", finished.text());
        Ok(())
    }

    /// Whole clusters with trim: what was trimmed must read as zeros.
    ///
    /// # Errors
    /// A block that does not verify, or an I/O error.
    pub fn clusters(&self, device: &Path, cluster: u64) -> Result<()> {
        let size = format!("--bs={cluster}");
        self.run(device, &[&size, "--trim_percentage=30", "--trim_backlog=16", "--trim_verify_zero=1"])
            .map(drop)
    }

    fn run(&self, device: &Path, options: &[&str]) -> Result<Finished> {
        let mut command = base(device);
        command.args([
            "--name=verified",
            "--rw=randwrite",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--iodepth=4",
            "--group_reporting",
        ]);
        command.arg(format!("--numjobs={JOBS}"));
        command
            .arg(format!("--size={0}", self.bytes_per_job))
            .arg(format!("--offset_increment={}", self.bytes_per_job));
        command.arg(format!("--randseed={}", self.seed)).args(options);
        let finished = run(&mut command, LIMIT)?.success()?;
        ensure!(!finished.text().contains("verify:"), "fio: {}", finished.text());
        Ok(finished)
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
