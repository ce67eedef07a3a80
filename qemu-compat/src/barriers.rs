//! What becomes of a device whose host has failed an `fdatasync`: nobody knows what is on disk, so nothing more is
//! accepted until the image is attached anew, whoever serves it, and `del` says that something may be lost.
//!
//! The image lies on a device of the device mapper that fails requests when it is told to, and is not opened for direct
//! I/O: what is written to it is acknowledged, and fails when it is to be durable.

use crate::{
    command::{TOOL_LIMIT, run},
    device::{Binary, Device, DeviceDisk},
    disk::{Disk, Op},
    power::host::{Loop, Mapped},
    qemu_img,
    recovery::{only_leaks, wait_until_replaced},
    stopping::wait_until_gone,
};
use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

/// Bytes of the disk, and of the one that its image is on.
const DISK: u64 = 16 << 20;
const HOST: u64 = 64 << 20;
/// What is written at once.
const CLUSTER: u64 = 65536;
/// Bytes that are durable, that are on no disk, and that nobody is to take.
const DURABLE: u8 = 1;
const LOST: u8 = 2;
const LATE: u8 = 3;
/// How long a flush may take to get to the host's disk, and a supervisor to see that its server has died.
const ON_ITS_WAY: Duration = Duration::from_secs(1);
/// How long a killed server may take to be gone.
const GONE: Duration = Duration::from_secs(60);

/// Kills a server when a barrier of it has failed, and while one fails: its successor accepts nothing, and where there is
/// none `del` knows it as well. The successor's flushes succeeded, and `del` wrote over what had never reached the disk.
///
/// # Errors
/// What does not hold.
pub fn failed(binary: &Binary, dir: &Path) -> Result<()> {
    let host = Host::make(dir)?;
    succeeded(binary, &host).context("with a supervisor")?;
    removed(binary, &host).context("alone")?;
    killed_meanwhile(binary, &host).context("killed meanwhile")
}

fn succeeded(binary: &Binary, host: &Host) -> Result<()> {
    let mut disk = attached(binary, &[], host)?;
    fail_a_barrier(&mut disk, host)?;
    let dead = disk.device().listed()?.pid;
    disk.device().kill_server()?;
    wait_until_replaced(disk.device(), dead)?;
    accepts_nothing(&mut disk).context("the successor")?;
    detached_with_a_word(binary, disk.into_device())?;
    is_as_after_a_loss_of_power(binary, host)
}

fn removed(binary: &Binary, host: &Host) -> Result<()> {
    let mut disk = attached(binary, &["--no-supervisor"], host)?;
    fail_a_barrier(&mut disk, host)?;
    let device = disk.into_device();
    device.kill_server()?;
    detached_with_a_word(binary, device)?;
    is_as_after_a_loss_of_power(binary, host)
}

/// The server does not hear of the failure.
fn killed_meanwhile(binary: &Binary, host: &Host) -> Result<()> {
    let mut disk = attached(binary, &[], host)?;
    let dead = disk.device().listed()?.pid;
    host.mapped.hold()?;
    put(&mut disk, CLUSTER, LOST)?;
    let user = File::open(disk.device().path())?;
    let flushing = thread::spawn(move || user.sync_all());
    thread::sleep(ON_ITS_WAY);
    kill(Pid::from_raw(dead), Signal::SIGKILL)?;
    host.fail()?;
    wait_until_gone(dead, GONE)?;
    thread::sleep(ON_ITS_WAY);
    host.mend()?;
    wait_until_replaced(disk.device(), dead)?;
    let flushed = flushing.join().ok().context("who flushes has panicked")?;
    ensure!(flushed.is_err(), "the flush that was under way has succeeded");
    accepts_nothing(&mut disk).context("the successor")?;
    detached_with_a_word(binary, disk.into_device())?;
    is_as_after_a_loss_of_power(binary, host)
}

/// The image's disk.
struct Host {
    // Removed in this order.
    mapped: Mapped,
    below: Loop,
}

impl Host {
    fn make(dir: &Path) -> Result<Self> {
        let file = dir.join("host.img");
        File::create(&file)?.set_len(HOST)?;
        let below = Loop::attach(&file)?;
        Ok(Self { mapped: Mapped::linear(below.path(), HOST)?, below })
    }

    fn image(&self) -> PathBuf {
        self.mapped.path()
    }

    /// Every request fails.
    fn fail(&self) -> Result<()> {
        self.mapped.replace(&format!("0 {} error", HOST / 512))
    }

    /// None fails any more.
    fn mend(&self) -> Result<()> {
        self.mapped.replace(&format!("0 {} linear {} 0", HOST / 512, self.below.path().display()))
    }
}

/// A new image, with something durable in it.
fn attached(binary: &Binary, options: &[&str], host: &Host) -> Result<DeviceDisk> {
    let image = host.image();
    qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
    let mut disk = DeviceDisk::open(binary.add(&[&["--io", "buffered"], options].concat(), &image)?)?;
    put(&mut disk, 0, DURABLE)?;
    disk.run(&[Op::Flush])?;
    Ok(disk)
}

fn fail_a_barrier(disk: &mut DeviceDisk, host: &Host) -> Result<()> {
    host.fail()?;
    // A barrier that the server makes by itself may have failed before.
    let _ = put(disk, CLUSTER, LOST);
    let flushed = disk.run(&[Op::Flush]);
    host.mend()?;
    ensure!(flushed.is_err(), "a flush succeeds, and its disk has failed");
    accepts_nothing(disk)
}

fn accepts_nothing(disk: &mut DeviceDisk) -> Result<()> {
    ensure!(put(disk, 2 * CLUSTER, LATE).is_err(), "a write is accepted");
    ensure!(put(disk, 0, LATE).is_err(), "a write in place is accepted");
    ensure!(disk.run(&[Op::Flush]).is_err(), "a flush succeeds");
    holds(disk, 0, DURABLE)
}

fn detached_with_a_word(binary: &Binary, device: Device) -> Result<()> {
    let id = device.id().to_string();
    let removed = binary.run(["del", "-n", &id])?;
    let text = removed.text();
    ensure!(!removed.status.success(), "something may be lost, and `del` succeeds: {text}");
    ensure!(text.contains("is detached") && text.contains("may be lost"), "`del` says {text}");
    ensure!(device.listed().is_err(), "its record is still there");
    device.has_gone()
}

/// What was durable is there, the rest is as before, and it can be worked with.
fn is_as_after_a_loss_of_power(binary: &Binary, host: &Host) -> Result<()> {
    let image = host.image();
    // The kernel shows what it could not write as if it were on disk.
    run(Command::new("blockdev").arg("--flushbufs").arg(&image), TOOL_LIMIT)?.success()?;
    only_leaks(&image)?;
    let mut disk = DeviceDisk::open(binary.add(&[], &image)?)?;
    holds(&mut disk, 0, DURABLE)?;
    holds(&mut disk, CLUSTER, 0)?;
    holds(&mut disk, 2 * CLUSTER, 0)?;
    put(&mut disk, CLUSTER, DURABLE)?;
    disk.run(&[Op::Flush])?;
    disk.detach()?;
    qemu_img::check_clean(&image)
}

fn put(disk: &mut DeviceDisk, at: u64, byte: u8) -> Result<()> {
    disk.run(&[Op::Write { at, bytes: vec![byte; CLUSTER as usize].into() }]).map(drop)
}

fn holds(disk: &mut DeviceDisk, at: u64, byte: u8) -> Result<()> {
    let found = disk.run(&[Op::Read { at, len: CLUSTER }])?;
    ensure!(found[0] == vec![byte; CLUSTER as usize], "at {at:#x} there is something else than {byte}");
    Ok(())
}
