//! Images that are more than a file that was made for the test: on a block device, grown, with bitmaps.
//!
//! Each is served, written to and detached, and holds what was written when it is attached again; `qemu-img
//! check` finds nothing.

use crate::{
    command::{TOOL_LIMIT, run},
    device::{Binary, DeviceDisk},
    disk::{Disk, Op, Server},
    power::host::Loop,
    qemu_img,
    recovery::{only_leaks, wait_until_replaced},
};
use anyhow::{Context, Result, ensure};
use std::{fs::File, path::Path, process::Command};

/// Bytes of a disk.
const DISK: u64 = 16 << 20;
/// Bytes of one that was grown.
const GROWN: u64 = 48 << 20;
/// Bytes of the block device on which an image lies.
const HOST: u64 = 64 << 20;
/// What is written at once.
const CLUSTER: u64 = 65536;

/// An image on a block device, whose server is killed as well.
///
/// # Errors
/// What does not hold.
pub fn on_a_block_device(binary: &Binary, dir: &Path) -> Result<()> {
    let file = dir.join("host.img");
    File::create(&file)?.set_len(HOST)?;
    let host = Loop::attach(&file)?;
    let image = host.path();
    qemu_img::create(image, "cluster_size=64k", None, DISK)?;
    let mut disk = binary.attach(image, 2)?;
    put(&mut disk, 0, 1)?;
    let dead = disk.device().listed()?.pid;
    disk.device().kill_server()?;
    wait_until_replaced(disk.device(), dead)?;
    holds(&mut disk, 0, 1).context("after a kill")?;
    put(&mut disk, DISK - CLUSTER, 2)?;
    disk.detach()?;
    only_leaks(image)?;
    let mut disk = binary.attach(image, 1)?;
    holds(&mut disk, 0, 1)?;
    holds(&mut disk, DISK - CLUSTER, 2)?;
    disk.detach()?;
    qemu_img::check_clean(image)?;
    on_one_that_takes_no_writes(binary, image)
}

/// It can be opened for writing, and fails each write: the image was served writable, and a file system lost
/// what it had in memory.
fn on_one_that_takes_no_writes(binary: &Binary, image: &Path) -> Result<()> {
    let _taken_back = Unwritable::make(image)?;
    let refused = binary.run(["add".as_ref(), image.as_os_str()])?;
    let text = refused.text();
    ensure!(text.contains("`add --read-only`"), "not refused, or without a way out: {text}");
    let mut disk = DeviceDisk::open(binary.add(&["--read-only"], image)?)?;
    holds(&mut disk, 0, 1)?;
    disk.detach()
}

/// A block device that takes no writes, until this is dropped: whoever has a loop device next would find it so.
struct Unwritable<'a>(&'a Path);

impl<'a> Unwritable<'a> {
    fn make(device: &'a Path) -> Result<Self> {
        let this = Self(device);
        this.set("--setro")?;
        Ok(this)
    }

    fn set(&self, how: &str) -> Result<()> {
        run(Command::new("blockdev").arg(how).arg(self.0), TOOL_LIMIT)?.success().map(drop)
    }
}

impl Drop for Unwritable<'_> {
    fn drop(&mut self) {
        let _ = self.set("--setrw");
    }
}

/// An image that `resize` has grown: there is more of it, all zeros.
///
/// # Errors
/// What does not hold.
pub fn grown(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
    let mut disk = binary.attach(&image, 1)?;
    put(&mut disk, DISK - CLUSTER, 1)?;
    disk.detach()?;
    let size = GROWN.to_string();
    binary.run(["resize".as_ref(), image.as_os_str(), size.as_ref()])?.success()?;

    let mut disk = binary.attach(&image, 2)?;
    ensure!(disk.size() == GROWN, "the device has {} bytes", disk.size());
    holds(&mut disk, DISK - CLUSTER, 1)?;
    holds(&mut disk, DISK, 0)?;
    // Across the old end.
    put(&mut disk, DISK - CLUSTER / 2, 2)?;
    put(&mut disk, GROWN - CLUSTER, 3)?;
    disk.detach()?;
    qemu_img::check_clean(&image)?;
    let mut disk = binary.attach(&image, 1)?;
    holds(&mut disk, DISK - CLUSTER / 2, 2)?;
    holds(&mut disk, GROWN - CLUSTER, 3)?;
    holds(&mut disk, DISK + CLUSTER, 0)?;
    disk.detach()
}

/// An image with a bitmap: marked stale when it is written to, not when it is read; it stays accounted for until
/// it is removed.
///
/// # Errors
/// What does not hold.
pub fn with_bitmaps(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
    run(Command::new("qemu-img").args(["bitmap", "--add"]).arg(&image).arg("bitmap"), TOOL_LIMIT)?
        .success()?;
    // When QEMU closes the image the bitmap says so.
    let mut write = Command::new("qemu-io");
    run(write.args(["-f", "qcow2", "-c", "write -P 5 0 64k"]).arg(&image), TOOL_LIMIT)?.success()?;
    ensure!(are_bitmaps_true(&image)?, "the image has no bitmap that is true, so this is no test");
    let mut disk = DeviceDisk::open(binary.add(&["--read-only"], &image)?)?;
    holds(&mut disk, 0, 5)?;
    disk.detach()?;
    ensure!(are_bitmaps_true(&image)?, "a bitmap is stale though nothing was written");

    for byte in [6, 7] {
        let mut disk = binary.attach(&image, 1)?;
        holds(&mut disk, 0, 5)?;
        put(&mut disk, CLUSTER, byte)?;
        disk.detach()?;
        ensure!(!are_bitmaps_true(&image)?, "a bitmap is said to be true though something was written");
        qemu_img::check_clean(&image)?;
    }
    run(Command::new("qemu-img").args(["bitmap", "--remove"]).arg(&image).arg("bitmap"), TOOL_LIMIT)?
        .success()?;
    qemu_img::check_clean(&image)
}

fn are_bitmaps_true(image: &Path) -> Result<bool> {
    let said = run(Command::new("qemu-img").args(["info", "--output=json"]).arg(image), TOOL_LIMIT)?;
    let text = said.success()?.text();
    ensure!(text.contains("\"bitmaps\""), "qemu-img finds no bitmaps: {text}");
    Ok(!text.contains("\"in-use\""))
}

fn put(disk: &mut DeviceDisk, at: u64, byte: u8) -> Result<()> {
    disk.run(&[Op::Write { at, bytes: vec![byte; CLUSTER as usize].into() }]).map(drop)
}

fn holds(disk: &mut DeviceDisk, at: u64, byte: u8) -> Result<()> {
    let found = disk.run(&[Op::Read { at, len: CLUSTER }])?;
    ensure!(found[0] == [byte; CLUSTER as usize], "at {at:#x} there is not {byte}");
    Ok(())
}
