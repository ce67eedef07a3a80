//! Durability as the host's disk sees it: whoever is told that something is durable has made that disk write
//! its cache out.
//!
//! Losing power shows the same in the end (`power/`), but only for what a flush of its own follows: a file
//! system that overwrites for `O_DSYNC` asks for a write that is durable by itself (FUA), and sends no flush.

use crate::{
    device::{Aligned, Binary},
    fs::{Kind, Mounted},
    power::host::{Plain, make_disk, make_file_system},
    qemu_img,
};
use anyhow::{Context, Result, ensure};
use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

/// Bytes of the disk.
const DISK: u64 = 64 << 20;
/// Bytes of a write.
const BLOCK: usize = 4096;
/// Writes of each kind, to as many blocks of a file.
const WRITES: u64 = 24;

/// Demands that each write that is to be durable by itself, and each flush, makes the host's disk write its
/// cache out.
///
/// # Errors
/// It was not told to, or the kernel does not send such writes.
pub fn each_is_passed_on(binary: &Binary, dir: &Path) -> Result<()> {
    let [host_disk, host_dir, guest_dir] = ["host.img", "host", "guest"].map(|name| dir.join(name));
    fs::create_dir(&host_dir)?;
    fs::create_dir(&guest_dir)?;
    make_disk(Kind::Ext4, &host_disk)?;
    let host = Plain::mount(Kind::Ext4, &host_disk, &host_dir)?;
    let image = host_dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
    let device = binary.add(&[], &image)?;
    make_file_system(Kind::Ext4, &device.path())?;
    let guest = Mounted::new(Kind::Ext4, &device.path(), &guest_dir, "noatime")?;
    let path = guest_dir.join("file");
    fs::write(&path, vec![1; WRITES as usize * BLOCK])?;
    File::open(&path)?.sync_all()?;

    let passed_on = |flags, flush: fn(&File) -> std::io::Result<()>| -> Result<[u64; 2]> {
        let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT | flags).open(&path)?;
        let count = || anyhow::Ok([flushes(&device.path())?, flushes(host.disk())?]);
        let before = count()?;
        for number in 0..WRITES {
            file.write_all_at(Aligned::new(BLOCK, 0).bytes(), number * BLOCK as u64)?;
            flush(&file)?;
        }
        let after = count()?;
        Ok([after[0] - before[0], after[1] - before[1]])
    };
    let [flushed, on_host] = passed_on(libc::O_DSYNC, |_| Ok(()))?;
    ensure!(flushed < WRITES / 2, "{flushed} flushes for {WRITES} writes: this kernel sends no durable ones");
    ensure!(on_host >= WRITES, "{WRITES} durable writes, and the host's disk was flushed {on_host} times");
    let [flushed, on_host] = passed_on(0, File::sync_data)?;
    ensure!(flushed >= WRITES, "{flushed} flushes for {WRITES} calls of fdatasync");
    ensure!(on_host >= WRITES, "{WRITES} flushes, and the host's disk was flushed {on_host} times");

    guest.unmount()?;
    device.detach()?;
    qemu_img::check_clean(&image)?;
    host.unmount()
}

/// How often a disk has been told to write its cache out.
fn flushes(disk: &Path) -> Result<u64> {
    let name = disk.file_name().context("a disk has a name")?.to_string_lossy();
    let path = format!("/sys/block/{name}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // The sixteenth, from Linux 5.5 on.
    let field = stat.split_whitespace().nth(15).and_then(|field| field.parse().ok());
    field.with_context(|| format!("{path} counts no flushes: {stat}"))
}
