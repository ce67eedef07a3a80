//! A machine that is killed over and over: each boot has to make do with what the one before has left.
//!
//! The disk `host` outlives the machine, as a real one would: what the guest has written and not flushed is
//! lost when the plug is pulled. A killed QEMU alone would lose nothing of that, it is in the file already.
//! So each life gets a QCOW2 overlay on the disk: QEMU keeps in its memory where new clusters lie until the
//! guest flushes. What reached the overlay becomes part of the disk before the next life. Knows nothing of
//! what runs in the guest, but for its report: it begins with the line `serving LIFE` when the machine may be
//! killed.

use crate::{
    kernel::{Kernel, UnpackedKernel},
    process::{capture, program},
    test::Count,
    vm::{
        accel::Accel,
        machine::{Access, Console, Disk, Machine},
        tree::Tree,
    },
    workspace::{self, build_release},
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::{self, File},
    ops::Range,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

/// The disk with the host's file system, in the guest /dev/disk/host.
const HOST: &str = "host";
const MEMORY_MIB: u32 = 2048;
const SCRATCH_GIB: u32 = 2;
/// Small clusters: more of what is written is new to the overlay, and so can be lost.
const OVERLAY: &str = "cluster_size=4k";
const LOOK: Duration = Duration::from_millis(20);

/// What all lives share.
pub(crate) struct Lives {
    kernel: UnpackedKernel,
    accel: Accel,
    dir: tempfile::TempDir,
    /// Beside the host's.
    disks: Vec<Disk>,
    /// What a machine may take until it serves, and the last one in all.
    limit: Duration,
}

impl Lives {
    /// A machine that never ran, with an empty disk. `name` is only for those who look into the cache.
    ///
    /// # Errors
    /// Fails when the kernel is missing or the cache cannot be written.
    pub(crate) fn new(name: &str, kernel: Kernel, host_bytes: u64, limit: Duration) -> Result<Self> {
        let kernel = kernel.unpacked()?.context("setup left no kernel")?;
        let dir = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(workspace::cache()?)?;
        let lives = Self { accel: Accel::detect(&kernel)?, kernel, dir, disks: Vec::new(), limit };
        File::create(lives.file(HOST))?.set_len(host_bytes)?;
        Ok(lives)
    }

    /// An empty disk that outlives the machine with all that was ever written to it.
    ///
    /// # Errors
    /// Fails when it cannot be made.
    pub(crate) fn add_empty(&mut self, name: &str, bytes: u64) -> Result<()> {
        let path = self.file(name);
        File::create(&path)?.set_len(bytes)?;
        self.add(Disk { name: name.to_owned(), path, access: Access::ReadWrite });
        Ok(())
    }

    /// Shows every life a disk.
    pub(crate) fn add(&mut self, disk: Disk) {
        self.disks.push(disk);
    }

    /// Builds a program and copies it: what is built meanwhile is not to change what is tested.
    ///
    /// # Errors
    /// Fails when it does not build.
    pub(crate) fn program(&self, name: &str) -> Result<PathBuf> {
        let copy = self.file(name);
        fs::copy(build_release(name, name)?, &copy).with_context(|| format!("cannot copy {name}"))?;
        Ok(copy)
    }

    /// What a life has reported.
    pub(crate) fn report(&self, life: u64) -> PathBuf {
        self.file(&format!("report-{life}"))
    }

    /// Kills the machine `kills` times, each time so many milliseconds after it began to serve, and lets it
    /// live once more, to judge. `payload` is told which life it is for, and whether that is the last. Each
    /// life that held what it had to is a test that passed.
    ///
    /// # Errors
    /// What did not hold, and where the disks and reports are kept.
    pub(crate) fn run(
        self,
        kills: u64,
        seed: u64,
        lifetimes: Range<u64>,
        payload: impl Fn(&Self, u64, bool) -> Result<Tree>,
    ) -> Result<Count> {
        ensure!(kills > 0, "without a kill nothing is tested");
        let mut rng = fastrand::Rng::with_seed(seed);
        let all = (0..=kills).try_for_each(|life| {
            let last = life == kills;
            let payload = payload(&self, life, last)?;
            let lived = if last {
                self.judge(life, &payload)
            } else {
                self.cut_short(life, &payload, Duration::from_millis(rng.u64(lifetimes.clone())))
            };
            lived.with_context(|| format!("life {life} of seed {seed}"))
        });
        match all {
            Ok(()) => Ok(Count { passed: kills, failed: 0 }),
            Err(error) => {
                Err(error.context(format!("disks and reports are in {}", self.dir.keep().display())))
            }
        }
    }

    /// A life that ends when its plug is pulled.
    fn cut_short(&self, life: u64, payload: &Tree, lifetime: Duration) -> Result<()> {
        let machine = self.machine(life)?;
        let start = Instant::now();
        let mut running = machine.start(payload)?;
        while !self.serves(life)? {
            if !running.is_on()? {
                let status = running.finish()?.status;
                bail!("its script ended with status {status}");
            }
            if start.elapsed() >= self.limit {
                return Err(running.give_up(self.limit).context("it does not get as far as to serve"));
            }
            thread::sleep(LOOK);
        }
        let ready = start.elapsed();
        thread::sleep(lifetime);
        ensure!(running.is_on()?, "it ended before its plug was pulled");
        running.pull_the_plug()?;
        let (ready, served) = (ready.as_secs(), lifetime.as_secs_f64());
        println!("life {life}: ready after {ready} s, killed after {served:.1} s of writing");
        self.settle(life)
    }

    /// A life that ends by itself.
    fn judge(&self, life: u64, payload: &Tree) -> Result<()> {
        let status = self.machine(life)?.run(payload)?.status;
        ensure!(status == 0, "its script ended with status {status}");
        self.settle(life)
    }

    fn machine(&self, life: u64) -> Result<Machine<'_>> {
        let (overlay, report) = (self.overlay(life), self.report(life));
        let mut create = program("qemu-img")?;
        create.args(["create", "-q", "-f", "qcow2", "-o", OVERLAY, "-F", "raw", "-b"]);
        capture(create.arg(self.file(HOST)).arg(&overlay))?;
        File::create(&report)?;
        let host = Disk { name: HOST.to_owned(), path: overlay, access: Access::Volatile };
        Ok(Machine {
            kernel: &self.kernel,
            accel: self.accel,
            memory_mib: MEMORY_MIB,
            scratch_gib: SCRATCH_GIB,
            disks: [host].into_iter().chain(self.disks.iter().cloned()).collect(),
            report: Some(report),
            counter: None,
            console: Console::Streamed,
            time_limit: self.limit,
            results: None,
        })
    }

    /// What reached the overlay becomes part of the disk.
    fn settle(&self, life: u64) -> Result<()> {
        let overlay = self.overlay(life);
        capture(program("qemu-img")?.args(["commit", "-q", "-d", "-f", "qcow2"]).arg(&overlay))?;
        Ok(fs::remove_file(overlay)?)
    }

    fn serves(&self, life: u64) -> Result<bool> {
        let report = self.report(life);
        let text = fs::read(&report).with_context(|| format!("cannot read {}", report.display()))?;
        Ok(text.starts_with(b"serving "))
    }

    fn overlay(&self, life: u64) -> PathBuf {
        self.file(&format!("host-{life}.qcow2"))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}
