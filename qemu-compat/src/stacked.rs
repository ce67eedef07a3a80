//! Devices on which others are built that have them open without a claim: loop devices, and devices of ours whose
//! image is a device, or on a file system on one.
//!
//! A lower one is not taken from under an upper one, and goes after it where all go, also when the host is shut down.
//! What was written to the upper one is there afterwards.

use crate::{
    command::{TOOL_LIMIT, run},
    device::{Binary, Device, DeviceDisk, has_process},
    disk::{Disk, Op},
    fs::{Kind, Mounted},
    lifecycle::{still_written, written_unsupervised},
    patience,
    power::host::{Loop, make_file_system},
    qemu_img,
    refusals::refuse,
};
use anyhow::{Context, Result, ensure};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::{Mode, SFlag, mknod},
    },
    unistd::Pid,
};
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

/// Bytes of a disk, and of the one whose image is on it.
const DISK: u64 = 64 << 20;
const UPPER: u64 = 32 << 20;
/// What is written to the upper one: its metadata goes to the lower one when it is closed.
const WRITTEN: usize = 8 << 20;
static MARK: [u8; WRITTEN] = [0xd7; WRITTEN];
/// Between two servers that are ended.
const BETWEEN: Duration = Duration::from_secs(1);
/// How long they may take.
const ENDED: Duration = Duration::from_secs(120);

/// `del` refuses a device on which another is built, and one of which it cannot find out whether it is in use. It took
/// them away.
///
/// # Errors
/// What does not hold.
pub fn lower_devices_stay(binary: &Binary, dir: &Path) -> Result<()> {
    let lower = lower(binary, dir)?;
    below_a_loop_device(binary, dir, &lower).context("below a loop device")?;
    below_a_nameless_loop_device(binary, dir, &lower).context("below a loop device without a name")?;
    below_an_image(binary, &lower).context("below an image")?;
    below_a_file_system(binary, dir, &lower).context("below the file system of an image")?;
    out_of_sight(binary, dir, &lower).context("out of sight")?;
    lower.detach()
}

fn below_a_loop_device(binary: &Binary, dir: &Path, lower: &Device) -> Result<()> {
    let point = dir.join("mnt");
    fs::create_dir(&point)?;
    let looped = Loop::attach(&lower.path())?;
    make_file_system(Kind::Ext4, looped.path())?;
    let mounted = Mounted::new(Kind::Ext4, looped.path(), &point, "noatime")?;
    refuse_to_detach(binary, lower, "loop device")?;
    fs::write(point.join("file"), "it goes on").context("it suffered")?;
    mounted.unmount()?;
    refuse_to_detach(binary, lower, "loop device").context("not mounted")
}

/// The name that its file was opened by is gone.
fn below_a_nameless_loop_device(binary: &Binary, dir: &Path, lower: &Device) -> Result<()> {
    let node = dir.join("node");
    let number = fs::metadata(lower.path())?.rdev();
    mknod(&node, SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), number)?;
    let _looped = Loop::attach(&node)?;
    fs::remove_file(&node)?;
    refuse_to_detach(binary, lower, "loop device")
}

fn below_an_image(binary: &Binary, lower: &Device) -> Result<()> {
    qemu_img::create(&lower.path(), "cluster_size=64k", None, UPPER)?;
    let upper = written_unsupervised(binary, &lower.path())?;
    let id = upper.id().to_string();
    refuse_to_detach(binary, lower, &format!("del -n {id}"))?;
    upper.kill_server()?;
    refuse_to_detach(binary, lower, &format!("del -n {id}")).context("its server is dead")?;
    binary.run(["recover", "-n", &id])?.success()?;
    still_written(upper)
}

fn below_a_file_system(binary: &Binary, dir: &Path, lower: &Device) -> Result<()> {
    let point = dir.join("mnt");
    make_file_system(Kind::Ext4, &lower.path())?;
    let mounted = Mounted::new(Kind::Ext4, &lower.path(), &point, "noatime")?;
    let image = point.join("upper.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, UPPER)?;
    let upper = binary.add(&[], &image)?;
    refuse_to_detach(binary, lower, &format!("del -n {}", upper.id()))?;
    upper.detach()?;
    refuse_to_detach(binary, lower, "mounted")?;
    mounted.unmount()
}

/// In a /dev without the device's node.
fn out_of_sight(binary: &Binary, dir: &Path, lower: &Device) -> Result<()> {
    let (node, point) = (lower.path(), dir.join("mnt"));
    make_file_system(Kind::Ext4, &node)?;
    let mounted = Mounted::new(Kind::Ext4, &node, &point, "noatime")?;
    let aside = node.with_extension("aside");
    fs::rename(&node, &aside)?;
    let refused = refuse_to_detach(binary, lower, "cannot be found out");
    fs::rename(&aside, &node)?;
    refused?;
    fs::write(point.join("file"), "it goes on").context("it suffered")?;
    mounted.unmount()
}

fn refuse_to_detach(binary: &Binary, device: &Device, word: &str) -> Result<()> {
    let id = device.id().to_string();
    refuse(binary, &["del".as_ref(), "-n".as_ref(), id.as_ref()], &[word])?;
    ensure!(device.listed()?.state == "serving", "it is {}", device.listed()?.state);
    Ok(())
}

/// `del --all` detaches the upper ones first: the lower one went while the upper one's server still closed its image
/// there.
///
/// # Errors
/// What does not hold.
pub fn all_from_the_top(binary: &Binary, dir: &Path, rounds: u8) -> Result<()> {
    let mut lower = lower(binary, dir)?;
    qemu_img::create(&lower.path(), "cluster_size=64k", None, UPPER)?;
    for round in 1..=rounds {
        let mut upper = DeviceDisk::open(binary.add(&[], &lower.path())?)?;
        upper.run(&[Op::Write { at: 0, bytes: vec![round; WRITTEN].into() }])?;
        let upper = upper.into_device();
        binary.run(["del", "--all"])?.success().with_context(|| format!("round {round}"))?;
        upper.has_gone()?;
        lower.has_gone()?;

        lower = binary.add(&[], &dir.join("lower.qcow2"))?;
        let mut upper = DeviceDisk::open(binary.add(&[], &lower.path())?)?;
        let found = upper.run(&[Op::Read { at: 0, len: WRITTEN as u64 }])?;
        ensure!(found[0] == vec![round; WRITTEN], "what was written is lost, in round {round}");
        upper.detach()?;
        qemu_img::check_clean(&lower.path()).with_context(|| format!("round {round}"))?;
    }
    lower.detach()
}

/// Ends the servers of two devices, of which one has its image on the other, the lower one first, as may happen when a
/// host is shut down: what had been written to the upper one is there. The lower one went before the upper one had
/// heard of it, and it was lost.
///
/// # Errors
/// What does not hold.
pub fn ended_together(binary: &Binary, dir: &Path) -> Result<()> {
    let (lower, point) = (lower(binary, dir)?, dir.join("mnt"));
    fs::create_dir(&point)?;
    make_file_system(Kind::Ext4, &lower.path())?;
    let mounted = Mounted::new(Kind::Ext4, &lower.path(), &point, "noatime")?;
    let image = point.join("upper.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, UPPER)?;
    let upper = binary.add(&[], &image)?;
    // Closed, it would be written back at once.
    let user = File::options().write(true).open(upper.path())?;
    user.write_all_at(&MARK, 0)?;

    let servers = [lower.listed()?.pid, upper.listed()?.pid];
    for server in servers {
        kill(Pid::from_raw(server), Signal::SIGTERM)?;
        thread::sleep(BETWEEN);
    }
    let otherwise = || "the servers have not ended".to_owned();
    patience::until(ENDED, otherwise, || Ok(!servers.iter().copied().any(has_process)))?;
    drop(user);
    // It may complain: its device is gone.
    let _ = run(Command::new("umount").arg(&point), TOOL_LIMIT);
    drop(mounted);
    ensure!(upper.listed().is_err(), "the upper one has not ended well");
    upper.has_gone()?;
    lower.has_gone()?;

    let lower = binary.add(&[], &dir.join("lower.qcow2"))?;
    let mounted = Mounted::new(Kind::Ext4, &lower.path(), &point, "noatime")?;
    qemu_img::check_clean(&image)?;
    let mut upper = DeviceDisk::open(binary.add(&[], &image)?)?;
    let found = upper.run(&[Op::Read { at: 0, len: WRITTEN as u64 }])?;
    ensure!(found[0] == MARK, "what was written to the upper one is lost");
    upper.detach()?;
    mounted.unmount()?;
    lower.detach()
}

fn lower(binary: &Binary, dir: &Path) -> Result<Device> {
    let image = dir.join("lower.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
    binary.add(&[], &image)
}
