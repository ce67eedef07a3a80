//! Leaks of a crash, found and given back by the next server while it serves.
//!
//! A server without recovery is killed while it holds clusters in reserve: they stay counted and
//! unreferenced. `--no-reclaim` must leave them; without it they must be gone while the device is still
//! in use, with every byte where it was.

use crate::{
    device::{Binary, DeviceDisk},
    disk::{Disk, Op},
    mirror::Mirror,
    qemu_img::{self, Verdict},
    recovery::wait_until_replaced,
    sequence::{Discards, Player},
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    path::Path,
    time::{Duration, Instant},
};

/// Bytes of the disk.
const DISK: u64 = 32 << 20;
/// How long the search may take on a small image, in an emulated machine.
pub(crate) const SEARCH_LIMIT: Duration = Duration::from_secs(60);
/// What the server says when it has given clusters back.
pub(crate) const GIVEN_BACK: &str = "gave back clusters";

/// Makes leaks, and sees them left, and given back.
///
/// # Errors
/// What did not hold.
pub fn given_back(binary: &Binary, dir: &Path, queues: u16, seed: u64) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
    let mut mirror = Mirror::new(DISK, 65536);
    let mut player = Player::new(&mirror, Discards::Zero, seed);
    let queues = queues.to_string();
    let attach = |option: &str| DeviceDisk::open(binary.add(&[option, "-q", &queues], &image)?);

    let mut disk = attach("--no-recovery")?;
    player.play(&mut disk, &mut mirror, 4)?;
    disk.run(&[Op::Flush])?;
    let device = disk.into_device();
    device.kill_server()?;
    let said = binary.run(["del", "-n", &device.id().to_string()])?.success()?.text();
    ensure!(said.contains("had no recovery"), "nobody is told what may be lost: {said}");
    device.forget();
    leaks_in(&image).context("after the kill")?;

    let mut disk = attach("--no-reclaim")?;
    player.verify(&mut disk, &mut mirror)?;
    disk.detach()?;
    leaks_in(&image).context("with --no-reclaim")?;

    let mut disk = attach("--no-recovery")?;
    let deadline = Instant::now() + SEARCH_LIMIT;
    while !disk.device().log()?.contains(GIVEN_BACK) {
        ensure!(Instant::now() < deadline, "after {SEARCH_LIMIT:?} the log does not say {GIVEN_BACK:?}");
        player.play(&mut disk, &mut mirror, 1)?;
    }
    player.verify(&mut disk, &mut mirror)?;
    disk.detach()?;
    qemu_img::check_clean(&image)
}

/// Detaches a device whose server was killed a moment ago, replaced or not: nothing is left of what that one had in
/// reserve. A search that had not begun never was.
///
/// # Errors
/// What did not hold.
pub fn none_after_a_kill(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    for option in ["--no-supervisor", "--no-reclaim", "--cache-size=1M"] {
        qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
        let mut mirror = Mirror::new(DISK, 65536);
        let mut disk = DeviceDisk::open(binary.add(&[option], &image)?)?;
        Player::new(&mirror, Discards::Zero, 1).play(&mut disk, &mut mirror, 1)?;
        let device = disk.into_device();
        let dead = device.listed()?.pid;
        device.kill_server()?;
        if option != "--no-supervisor" {
            wait_until_replaced(&device, dead)?;
        }
        device.detach()?;
        if option == "--no-reclaim" {
            leaks_in(&image).context("with --no-reclaim")?;
        } else {
            qemu_img::check_clean(&image).context(option)?;
        }
        std::fs::remove_file(&image)?;
    }
    Ok(())
}

pub(crate) fn leaks_in(image: &Path) -> Result<()> {
    match qemu_img::check(image)? {
        Verdict::Leaks(_) => Ok(()),
        Verdict::Clean => bail!("there are no leaks, so that nothing is tested"),
        Verdict::Damaged(text) => bail!("qemu-img check finds damage: {text}"),
    }
}
