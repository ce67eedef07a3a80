//! What becomes of a device that is stopped while its server is in trouble, or by somebody else.
//!
//! The image lies on a file system that can be frozen: a write to the device is then in the server's hands
//! for as long as the test wants, and stopping the device waits for it.

#![allow(unsafe_code, reason = "ioctls that freeze a file system")]

use crate::{
    command::{TOOL_LIMIT, wait},
    device::{Aligned, Binary, Device, DeviceDisk, has_process},
    disk::{Disk, Op},
    fs::Kind,
    patience,
    power::host::{Plain, make_disk},
    qemu_img,
    recovery::only_leaks,
    refusals::must_refuse,
};
use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// Where it is mounted, in a case's directory.
const MOUNT_POINT: &str = "mnt";
/// Bytes of the disk.
const DISK: u64 = 64 << 20;
/// What is written: a cluster.
const CLUSTER: usize = 65536;
/// What lies in memory for a device: more than one request.
const DIRTY: usize = 8 << 20;
/// Its bytes.
const MARK: u8 = 0xd7;
/// How long a server may take to be where the test wants it.
const ON_ITS_WAY: Duration = Duration::from_secs(2);
/// How long a dead server's users may wait for what becomes of their requests, where the kernel notices only
/// when they time out.
const SETTLED: Duration = Duration::from_secs(120);

/// Kills a server that is stopping its device, with a request in its hands, or has the kernel write back
/// before. It stayed for ever on Linux 6.15 and later, because it waited for the driver, and the driver for
/// it; and so did whoever had written.
///
/// # Errors
/// What does not hold.
pub fn killed(binary: &Binary, dir: &Path) -> Result<()> {
    let (host, mount_point) = (dir.join("host.img"), dir.join("mnt"));
    make_disk(Kind::Xfs, &host)?;
    fs::create_dir(&mount_point)?;
    // The first stops at once, the others have the kernel write back before; the last is served again.
    for (name, options) in
        [("no-recovery", &["--no-recovery"][..]), ("alone", &["--no-supervisor"]), ("supervised", &[])]
    {
        let mounted = Plain::mount(Kind::Xfs, &host, &mount_point)?;
        let image = mount_point.join(format!("{name}.qcow2"));
        qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
        let device = binary.add(options, &image)?;
        killed_while_it_stops(device, &mount_point, options.is_empty()).with_context(|| name.to_owned())?;
        only_leaks(&image)?;
        mounted.unmount()?;
    }
    Ok(())
}

/// Has a served device removed by an instance with other records, to which it is somebody else's: what had
/// been written to it is in the image, flushed or not, and nothing else is left: its owner's `list` showed a
/// device that waited, for ever.
///
/// # Errors
/// What does not hold.
pub fn by_a_stranger(binary: &Binary, dir: &Path) -> Result<()> {
    let stranger = binary.apart();
    for (name, options) in
        [("supervised", &[][..]), ("alone", &["--no-supervisor"]), ("no-recovery", &["--no-recovery"])]
    {
        let image = dir.join(format!("{name}.qcow2"));
        qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
        let mut disk = DeviceDisk::open(binary.add(&[options, &["-q", "2"]].concat(), &image)?)?;
        disk.run(&[Op::Write { at: 0, bytes: vec![7; CLUSTER].into() }])?;
        removed_by(&stranger, disk.into_device()).with_context(|| name.to_owned())?;
        qemu_img::check_clean(&image).with_context(|| name.to_owned())?;
        let mut disk = DeviceDisk::open(binary.add(&[], &image)?)?;
        let found = disk.run(&[Op::Read { at: 0, len: CLUSTER as u64 }])?;
        ensure!(found[0] == [7; CLUSTER], "{name}: what was written is lost");
        disk.detach()?;
    }
    Ok(())
}

fn removed_by(stranger: &Binary, device: Device) -> Result<()> {
    let (server, id, path) = (device.listed()?.pid, device.id().to_string(), device.path());
    stranger.run(["del", "-n", &id])?.success()?;
    patience::until(
        TOOL_LIMIT,
        || format!("the server (process {server}) or the device is still there"),
        || Ok(!has_process(server) && !path.exists()),
    )?;
    ensure!(device.listed().is_err(), "the record is still there");
    device.forget();
    Ok(())
}

fn killed_while_it_stops(device: Device, mount_point: &Path, is_supervised: bool) -> Result<()> {
    let server = device.listed()?.pid;
    let frozen = Frozen::freeze(mount_point)?;
    let path = device.path();
    let (done, written) = mpsc::channel();
    thread::spawn(move || done.send(write(&path)));
    wait_until_in_flight(&device)?;
    kill(Pid::from_raw(server), Signal::SIGTERM)?;
    thread::sleep(ON_ITS_WAY);
    kill(Pid::from_raw(server), Signal::SIGKILL)?;
    thread::sleep(ON_ITS_WAY);
    drop(frozen);
    wait_until_gone(server, SETTLED)?;
    if is_supervised {
        wait_until_replaced_or_stopped(&device, server)?;
    }
    device.detach()?;
    let outcome = written.recv_timeout(SETTLED);
    // It may have succeeded or failed, but not be waited for.
    ensure!(outcome.is_ok(), "who had written to the device still waits");
    Ok(())
}

/// Kills a server while the kernel writes back, at the demand of `del`, what lay in memory for its device. A
/// thread of the server waited for that: the server stayed, nobody could recover the device, and what had
/// been written to it was lost.
///
/// # Errors
/// What does not hold.
pub fn killed_while_it_writes_back(binary: &Binary, dir: &Path) -> Result<()> {
    let (mounted, image, device) = on_a_disk_of_its_own(binary, dir)?;
    let server = device.listed()?.pid;

    let frozen = Frozen::freeze(&dir.join(MOUNT_POINT))?;
    let user = make_dirty(&device)?;
    let mut command = binary.command();
    let mut detaching = command.args(["del", "-n", &device.id().to_string()]).spawn()?;
    wait_until_in_flight(&device)?;
    thread::sleep(ON_ITS_WAY);
    kill(Pid::from_raw(server), Signal::SIGKILL)?;
    thread::sleep(ON_ITS_WAY);
    drop(frozen);
    wait_until_gone(server, SETTLED)?;
    drop(user);
    let status = wait(&mut detaching, SETTLED)?.context("`del` does not end")?;
    ensure!(status.success(), "`del` ends with {status}");
    device.has_gone()?;
    all_is_in(binary, &image)?;
    mounted.unmount()
}

/// Detaches a device whose kernel does not get done with what it has in memory for it: the device stays, and `del`
/// says so, until the image's disk takes writes again. It was stopped after five minutes, and all was lost.
///
/// # Errors
/// What does not hold.
pub fn kept_until_it_is_written_back(binary: &Binary, dir: &Path) -> Result<()> {
    let (mounted, image, device) = on_a_disk_of_its_own(binary, dir)?;

    let frozen = Frozen::freeze(&dir.join(MOUNT_POINT))?;
    let user = make_dirty(&device)?;
    let said = must_refuse(
        binary.command().args(["del", "-n", &device.id().to_string()]),
        &["stays as it is", "del --force"],
    );
    drop(frozen);
    said?;
    ensure!(device.listed()?.state == "serving", "it is {}", device.listed()?.state);
    device.detach()?;
    drop(user);
    all_is_in(binary, &image)?;
    mounted.unmount()
}

/// A device whose image's file system can be frozen.
fn on_a_disk_of_its_own(binary: &Binary, dir: &Path) -> Result<(Plain, PathBuf, Device)> {
    let (host, mount_point) = (dir.join("host.img"), dir.join(MOUNT_POINT));
    make_disk(Kind::Xfs, &host)?;
    fs::create_dir(&mount_point)?;
    let mounted = Plain::mount(Kind::Xfs, &host, &mount_point)?;
    let image = mount_point.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
    let device = binary.add(&[], &image)?;
    Ok((mounted, image, device))
}

/// Leaves [`DIRTY`] bytes in memory for a device. Closed, the file would be written back at once.
fn make_dirty(device: &Device) -> Result<File> {
    let user = File::options().write(true).open(device.path())?;
    user.write_all_at(&vec![MARK; DIRTY], 0)?;
    Ok(user)
}

/// What [`make_dirty`] has written has got into the image.
fn all_is_in(binary: &Binary, image: &Path) -> Result<()> {
    let mut disk = DeviceDisk::open(binary.add(&[], image)?)?;
    let found = disk.run(&[Op::Read { at: 0, len: DIRTY as u64 }])?;
    ensure!(found[0] == vec![MARK; DIRTY], "what was written before is not in the image");
    disk.detach()?;
    only_leaks(image)
}

/// The server may have been killed before it came to stopping its device: its successor knows nothing of
/// that. Or it had: the driver goes on stopping, and there is nothing to serve any more.
fn wait_until_replaced_or_stopped(device: &Device, server: i32) -> Result<()> {
    let deadline = Instant::now() + SETTLED;
    loop {
        let listed = device.listed()?;
        if !device.path().exists() || listed.pid != server && listed.state == "serving" {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the server was not replaced: {}", listed.state);
        thread::sleep(Duration::from_millis(10));
    }
}

/// Waits so long at the most until a server that was killed is gone.
///
/// # Errors
/// It stays.
pub(crate) fn wait_until_gone(server: i32, limit: Duration) -> Result<()> {
    let otherwise = || format!("the server (process {server}) was killed and stays");
    patience::until(limit, otherwise, || Ok(!has_process(server)))
}

fn write(device: &Path) -> io::Result<()> {
    let file = File::options().write(true).custom_flags(libc::O_DIRECT).open(device)?;
    file.write_all_at(Aligned::new(CLUSTER, 0).bytes(), 0)
}

fn wait_until_in_flight(device: &Device) -> Result<()> {
    let is_there = || Ok(device.sysfs("inflight")?.split_whitespace().any(|count| count != "0"));
    patience::until(TOOL_LIMIT, || "no request has come to the device".to_owned(), is_there)
}

/// A file system to which nothing is written; thawed when dropped.
struct Frozen(File);

impl Frozen {
    fn freeze(mount_point: &Path) -> Result<Self> {
        let root = File::open(mount_point)?;
        let mut unused = 0;
        // SAFETY: the descriptor is open for the call; the kernel ignores the argument.
        unsafe { ioctl::freeze(root.as_raw_fd(), &raw mut unused) }
            .context("cannot freeze the file system")?;
        Ok(Self(root))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let mut unused = 0;
        // SAFETY: as above. That it fails will show.
        let _ = unsafe { ioctl::thaw(self.0.as_raw_fd(), &raw mut unused) };
    }
}

/// `FIFREEZE` and `FITHAW` of linux/fs.h.
mod ioctl {
    nix::ioctl_readwrite!(freeze, b'X', 119, libc::c_int);
    nix::ioctl_readwrite!(thaw, b'X', 120, libc::c_int);
}
