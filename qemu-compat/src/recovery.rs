//! SIGKILL of the server, over and over, under users who must not notice.
//!
//! The supervisor replaces each server that is killed. Meanwhile fio verifies what it writes on the bare
//! device, or files are written and read back on a mounted file system: a pause, no error, no lost or
//! doubled data, no remount. Afterwards `qemu-img check` finds nothing worse than leaks.

use crate::{
    device::{Binary, Device},
    fio::Verified,
    fs::{self, Kind},
    patience,
    qemu_img::{self, Verdict},
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// How long the next server may take, in an emulated machine, and where the kernel notices the last one's
/// death only when its requests time out.
const RECOVERY_LIMIT: Duration = Duration::from_secs(120);
/// Between two looks for it.
const LOOK: Duration = Duration::from_millis(50);
/// One of so many successors is killed while it takes over.
const SUCCESSORS_SPARED: u32 = 4;
/// What a server is given to live, in milliseconds.
const LIFETIME: std::ops::Range<u64> = 400..1500;

/// Kills servers under fio's verified writes and trims, as often as it takes until fio has finished
/// and `kills` have been made.
///
/// # Errors
/// fio found an error or wrong data; a server was not replaced; the image is damaged.
pub fn under_fio(
    binary: &Binary,
    dir: &Path,
    cluster: u64,
    queues: u16,
    kills: u32,
    load: Verified,
) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, &format!("cluster_size={cluster}"), None, load.device_bytes())?;
    let device = binary.add(&["-q", &queues.to_string()], &image)?;
    let path = device.path();
    kill_while(&device, kills, load.seed, || load.run(&path))?;
    device.detach()?;
    only_leaks(&image)
}

/// Kills servers under a mounted file system.
///
/// # Errors
/// As [`under_fio`], for files.
pub fn under_files(binary: &Binary, dir: &Path, kind: Kind, kills: u32, seed: u64) -> Result<()> {
    let image = dir.join("image.qcow2");
    let mount_point = dir.join("mnt");
    std::fs::create_dir(&mount_point)?;
    qemu_img::create(&image, "cluster_size=64k", None, fs::DISK)?;
    let device = binary.add(&["-q", "2"], &image)?;
    fs::under_trouble(&device, kind, &mount_point, |round| kill_while(&device, kills, seed, round))?;
    device.detach()?;
    only_leaks(&image)
}

/// Repeats `work`, until it has been done at least once and the server was killed `kills` times meanwhile.
fn kill_while(device: &Device, kills: u32, seed: u64, work: impl Fn() -> Result<()> + Sync) -> Result<()> {
    let killed = std::sync::atomic::AtomicU32::new(0);
    let count = || killed.load(std::sync::atomic::Ordering::Relaxed);
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            while {
                work().with_context(|| format!("after {} kills", count()))?;
                count() < kills
            } {}
            Ok(())
        });
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut outcome = Ok(());
        while outcome.is_ok() && !worker.is_finished() && count() < kills {
            thread::sleep(Duration::from_millis(rng.u64(LIFETIME)));
            outcome = kill_once(device, rng.u32(..SUCCESSORS_SPARED) == 0);
            killed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        if outcome.is_err() {
            killed.store(kills, std::sync::atomic::Ordering::Relaxed);
        }
        let worked = worker.join().unwrap_or_else(|_| bail!("the load panicked"));
        outcome.and(worked)?;
        ensure!(count() >= kills, "only {} kills", count());
        Ok(())
    })
}

/// Kills the server, and perhaps the first successor before it serves, and waits for one that does.
fn kill_once(device: &Device, successor_too: bool) -> Result<()> {
    let dead = device.listed()?.pid;
    device.kill_server()?;
    wait_for_successor(device, dead, successor_too)
}

/// Waits until another process serves a device whose server has died.
///
/// # Errors
/// There is none in time.
pub(crate) fn wait_until_replaced(device: &Device, dead: i32) -> Result<()> {
    wait_for_successor(device, dead, false)
}

/// Waits until a process that takes over a device whose server has died has begun. It stays there while it waits for
/// the image.
///
/// # Errors
/// There is none in time.
pub(crate) fn wait_until_preparing(device: &Device, dead: i32) -> Result<()> {
    let record = device.file("json");
    let has_begun = || {
        let is_preparing = std::fs::read_to_string(&record)?.contains(r#""phase":"preparing""#);
        Ok(is_preparing && device.listed()?.pid != dead)
    };
    patience::until(RECOVERY_LIMIT, || "the successor has not come that far".to_owned(), has_begun)
}

fn wait_for_successor(device: &Device, mut dead: i32, mut successor_too: bool) -> Result<()> {
    let deadline = Instant::now() + RECOVERY_LIMIT;
    loop {
        let listed = device.listed()?;
        if listed.pid != dead {
            match &*listed.state {
                "serving" => return Ok(()),
                "starting" if successor_too => {
                    dead = listed.pid;
                    successor_too = false;
                    device.kill_server()?;
                }
                _ => {}
            }
        }
        ensure!(Instant::now() < deadline, "the server (process {dead}) was not replaced: {}", listed.state);
        thread::sleep(LOOK);
    }
}

/// Demands that `qemu-img check` finds nothing worse than leaks in an image, and nothing when these are
/// repaired.
///
/// # Errors
/// What it finds.
pub(crate) fn only_leaks(image: &Path) -> Result<()> {
    if let Verdict::Damaged(text) = qemu_img::check(image)? {
        bail!("qemu-img check finds more than leaks: {text}");
    }
    qemu_img::repair_leaks(image)?;
    qemu_img::check_clean(image).context("after the repair of leaks")
}
