//! Whose hands a device is in: its server's, a successor's, `del`'s, somebody else's.
//!
//! Servers are killed and devices removed at once; records are looked at while they change hands; numbers are
//! taken again as soon as they are free; file systems are mounted below and beside. What is demanded is
//! always the same: every command ends well or says why not, nobody else's device is touched, and nothing is
//! left behind.

use crate::{
    command::{TOOL_LIMIT, wait},
    device::{Binary, Device, DeviceDisk},
    disk::{Disk, Op},
    fio::start_load,
    fixture::sum,
    fs::{Kind, Mounted},
    patience,
    power::host::make_file_system,
    qemu_img,
    recovery::{only_leaks, wait_until_preparing, wait_until_replaced},
    refusals::refuse,
};
use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

/// Bytes of a disk for a file system, ext4 everywhere: mkfs.xfs makes nothing as small.
const DISK: u64 = 64 << 20;
/// What is written to a device to be found there later: a cluster.
pub(crate) static MARK: [u8; 65536] = [7; 65536];
/// The byte that QEMU locks who shares an image with nobody who writes.
const QEMU_UNSHARED_WRITE: i64 = 201;
/// How long a supervisor may take to see that its device is gone.
const LEFTOVER_LIMIT: Duration = Duration::from_secs(20);

/// Removes devices right after their servers were killed, under load: `del` and the supervisor, which has
/// another server at hand, must not both have the device. They did: the successor put its record back when
/// the device was gone.
///
/// # Errors
/// What does not hold.
pub fn removed_after_a_kill(binary: &Binary, dir: &Path, rounds: u32) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
    for round in 0..rounds {
        let device = binary.add(&["-q", "2"], &image)?;
        let (id, path) = (device.id(), device.path());
        let supervisor = parent_of(device.listed()?.pid)?;
        let mut load = start_load(&path, 0, Duration::from_secs(60))?;
        thread::sleep(Duration::from_millis(300));
        device.kill_server()?;
        // Mostly before there is a successor, now and then when it is about to come or has come.
        thread::sleep(Duration::from_millis(u64::from(round % 5) * 40));
        let removed = device.detach();
        let ended = wait(&mut load, TOOL_LIMIT)?;
        removed.with_context(|| format!("round {round}"))?;
        ensure!(ended.is_some(), "fio hangs on a device that is gone, in round {round}");
        nothing_left(binary, id, supervisor).with_context(|| format!("round {round}"))?;
        only_leaks(&image)?;
    }
    Ok(())
}

/// Kills servers while somebody looks at their records all the time, as `list` does. The successor took the
/// one who looked for a living server, and gave up.
///
/// # Errors
/// A server was not replaced.
pub fn watched(binary: &Binary, dir: &Path, kills: u32) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, 64 << 20)?;
    let device = binary.add(&[], &image)?;
    let record = device.file("json");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let look =
                        File::open(&record).ok().map(|it| Flock::lock(it, FlockArg::LockSharedNonblock));
                    thread::sleep(Duration::from_millis(3));
                    drop(look);
                    thread::sleep(Duration::from_millis(2));
                }
            });
        }
        let outcome = (0..kills).try_for_each(|kill| {
            let dead = device.listed()?.pid;
            device.kill_server()?;
            wait_until_replaced(&device, dead).with_context(|| format!("kill {kill}"))
        });
        is_over.store(true, Ordering::Relaxed);
        outcome
    })?;
    device.detach()
}

/// Adds and removes devices from several threads at once: numbers are given out again as soon as they are
/// free, and who had one before must leave the records of who has it now alone.
///
/// # Errors
/// A command failed, or a device is not listed.
pub fn numbers(binary: &Binary, dir: &Path, threads: u32, rounds: u32) -> Result<()> {
    thread::scope(|scope| {
        let all: Vec<_> = (0..threads)
            .map(|number| {
                scope.spawn(move || -> Result<()> {
                    let image = dir.join(format!("image-{number}.qcow2"));
                    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
                    for round in 0..rounds {
                        let device = binary.add(&[], &image).with_context(|| format!("round {round}"))?;
                        let mut disk = DeviceDisk::open(device)?;
                        disk.run(&[Op::Write { at: 0, bytes: vec![round as u8; 65536].into() }])?;
                        let state = disk.device().listed()?.state;
                        ensure!(state == "serving", "the device is {state}, in round {round}");
                        disk.detach().with_context(|| format!("round {round}"))?;
                    }
                    qemu_img::check_clean(&image)
                })
            })
            .collect();
        all.into_iter().try_for_each(|one| one.join().unwrap_or_else(|_| bail!("a thread panicked")))
    })
}

/// A file system that was mounted when a server started is unmounted: it is let go of. A server's
/// own view of the mounts kept it mounted until the server ended, so that its device could not be detached.
/// What leads to the image must stay in that view, by way of a symbolic link on a third file system too.
///
/// # Errors
/// What does not hold.
pub fn mounts_let_go(binary: &Binary, dir: &Path) -> Result<()> {
    let beside = Below::make(binary, dir, "beside")?;
    let holding = Below::make(binary, dir, "holding")?;
    let linking = Below::make(binary, dir, "linking")?;
    let image = holding.point.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, 64 << 20)?;
    let link = linking.point.join("link.qcow2");
    symlink(&image, &link)?;

    let device = binary.add(&[], &link)?;
    beside.undo().context("a file system that a server has nothing to do with")?;
    for kill in 0..2 {
        let dead = device.listed()?.pid;
        device.kill_server()?;
        wait_until_replaced(&device, dead).with_context(|| format!("its image is elsewhere, kill {kill}"))?;
    }
    let refused = binary.run(["del", "-n", &holding.device.id().to_string()])?;
    ensure!(!refused.status.success(), "the device below was detached while its file system was mounted");
    device.detach()?;
    linking.undo()?;
    holding.undo()
}

/// A file system on a device of its own.
struct Below {
    mounted: Mounted,
    device: Device,
    point: PathBuf,
}

impl Below {
    fn make(binary: &Binary, dir: &Path, name: &str) -> Result<Self> {
        let (image, point) = (dir.join(format!("{name}.qcow2")), dir.join(name));
        fs::create_dir(&point)?;
        qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
        let device = binary.add(&[], &image)?;
        make_file_system(Kind::Ext4, &device.path())?;
        let mounted = Mounted::new(Kind::Ext4, &device.path(), &point, "noatime")?;
        Ok(Self { mounted, device, point })
    }

    fn undo(self) -> Result<()> {
        self.mounted.unmount()?;
        self.device.detach()
    }
}

/// A mounted device is not taken from under its user by any way of `del` but `--force`: not while it is
/// served, not when its server is dead, not when it is somebody else's.
///
/// # Errors
/// What does not hold.
pub fn mounted_devices_stay(binary: &Binary, dir: &Path) -> Result<()> {
    let stranger = binary.apart();
    for (name, owner, options) in
        [("served", binary, &[][..]), ("waiting", binary, &["--no-supervisor"]), ("foreign", &stranger, &[])]
    {
        let (image, point) = (dir.join(format!("{name}.qcow2")), dir.join(name));
        fs::create_dir(&point)?;
        qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
        let device = owner.add(options, &image)?;
        make_file_system(Kind::Ext4, &device.path())?;
        let mounted = Mounted::new(Kind::Ext4, &device.path(), &point, "noatime")?;
        if name == "waiting" {
            device.kill_server()?;
        }
        let id = device.id().to_string();
        refuse(binary, &["del".as_ref(), "-n".as_ref(), id.as_ref()], &["mounted"]).context(name)?;
        if name == "waiting" {
            ensure!(device.listed()?.state == "waiting", "it is {}", device.listed()?.state);
            binary.run(["recover", "-n", &id])?.success()?;
        }
        fs::write(point.join("file"), "it goes on").with_context(|| format!("{name}: it suffered"))?;
        if name == "foreign" {
            mounted.unmount()?;
            device.detach()?;
        } else {
            binary.run(["del", "--force", "-n", &id])?.success().with_context(|| name.to_owned())?;
            device.has_gone()?;
            mounted.unmount()?;
        }
    }
    Ok(())
}

/// The record of a dead server whose device is gone names a number that somebody else has by now: `del`
/// removes the record and not that device. It did remove it.
///
/// # Errors
/// What does not hold.
pub fn records_outlive_devices(binary: &Binary, dir: &Path) -> Result<()> {
    let stranger = binary.apart();
    let (image, other) = (dir.join("image.qcow2"), dir.join("other.qcow2"));
    for image in [&image, &other] {
        qemu_img::create(image, "cluster_size=64k", None, 16 << 20)?;
    }
    for options in [&["--no-recovery"][..], &["--no-supervisor"]] {
        let device = binary.add(options, &image)?;
        let id = device.id().to_string();
        device.kill_server()?;
        // To the stranger this is somebody else's device, which it may remove by number.
        stranger.run(["del", "-n", &id])?.success()?;
        let theirs = stranger.add(&["-n", &id], &other)?;
        binary.run(["del", "--all"])?.success()?;
        ensure!(theirs.listed()?.state == "serving", "the stranger's device has suffered");
        fs::read(theirs.path()).context("the stranger's device cannot be read any more")?;
        ensure!(device.listed().is_err(), "the record is still there");
        device.forget();
        theirs.detach()?;
    }
    Ok(())
}

/// An image is replaced by another file while it is served, and the server killed: its successor must not go
/// on with that file, nor any command write to an image that a successor is to write to. With the file back
/// in its place the device is recovered.
///
/// # Errors
/// What does not hold.
pub fn images_stay(binary: &Binary, dir: &Path) -> Result<()> {
    let (image, aside) = (dir.join("image.qcow2"), dir.join("aside.qcow2"));
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let device = written_unsupervised(binary, &image)?;
    let id = device.id().to_string();
    fs::rename(&image, &aside)?;
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let before = sum(&image)?;
    device.kill_server()?;
    refuse(binary, &["recover".as_ref(), "-n".as_ref(), id.as_ref()], &["is not the file"])?;
    ensure!(sum(&image)? == before, "the other file was changed");
    ensure!(device.listed()?.state == "waiting", "it is {}", device.listed()?.state);

    fs::rename(&aside, &image)?;
    let image = image.as_os_str();
    for args in [
        &["add".as_ref(), image][..],
        &["check".as_ref(), "--repair".as_ref(), "leaks".as_ref(), image],
        &["resize".as_ref(), image, "32M".as_ref()],
    ] {
        refuse(binary, args, &["recover"])?;
    }
    binary.run(["recover", "-n", &id])?.success()?;
    still_written(device)
}

/// A device whose recovery has failed is removed, and nothing was lost: that is a success. Where `del` could
/// not write to the image the number is free, and not given to another image: the next `add` had it, and
/// emptied the log of what was acknowledged.
///
/// # Errors
/// What does not hold.
pub fn removed_after_a_failed_recovery(binary: &Binary, dir: &Path) -> Result<()> {
    let (image, aside) = (dir.join("image.qcow2"), dir.join("aside.qcow2"));
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let device = written_unsupervised(binary, &image)?;
    let id = device.id().to_string();
    device.kill_server()?;
    fs::rename(&image, &aside)?;
    refuse(binary, &["recover".as_ref(), "-n".as_ref(), id.as_ref()], &["no such file"])?;
    let failed = binary.run(["del", "-n", &id])?;
    ensure!(!failed.status.success(), "what was acknowledged is lost, and `del` says nothing");

    let other = dir.join("other.qcow2");
    qemu_img::create(&other, "cluster_size=64k", None, 16 << 20)?;
    let named = ["add".as_ref(), "-n".as_ref(), id.as_ref(), other.as_os_str()];
    refuse(binary, &named, &[&format!("del -n {id}")])?;
    let beside = binary.add(&[], &other)?;
    ensure!(beside.id() != device.id(), "another image has the number");
    beside.detach()?;

    fs::rename(&aside, &image)?;
    device.detach()?;
    only_leaks(&image)?;
    still_written(binary.add(&[], &image)?)
}

/// A successor is killed when it has begun the recovery, and what the record says of how far it had come is
/// older than that, or newer, as if it had been killed a moment earlier or `del` had come and died: the next
/// one can do with all of it. Before Linux 6.16 the driver refuses to begin a recovery twice, and crashes
/// when it has some of the queues.
///
/// # Errors
/// What does not hold.
pub fn recovered_from_any_phase(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let device = written_unsupervised(binary, &image)?;
    let id = device.id().to_string();
    let record = device.file("json");
    for phase in ["serving", "fetched", "preparing", "fetching", "removing"] {
        let dead = device.listed()?.pid;
        device.kill_server()?;
        // The successor waits for the image when it has begun.
        let reader = without_writers(&image)?;
        let mut command = binary.command();
        let mut recovering =
            command.args(["recover", "--foreground", "-n", &id]).stdout(Stdio::null()).spawn()?;
        wait_until_preparing(&device, dead).with_context(|| format!("before {phase}"))?;
        recovering.kill()?;
        recovering.wait()?;
        drop(reader);
        let text = fs::read_to_string(&record)?;
        fs::write(&record, text.replace(r#""phase":"preparing""#, &format!(r#""phase":"{phase}""#)))?;
        binary.run(["recover", "--no-supervisor", "-n", &id])?.success().with_context(|| phase.to_owned())?;
    }
    still_written(device)
}

/// A successor is killed before it has said that it serves: its supervisor took the device for one that was
/// half made, and deleted it with the redo log. The next one serves it.
///
/// # Errors
/// What does not hold.
pub fn recovered_although_the_successor_dies(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let device = written_unsupervised(binary, &image)?;
    let id = device.id().to_string();
    let dead = device.listed()?.pid;
    device.kill_server()?;
    let reader = without_writers(&image)?;
    let mut recovering =
        binary.command().args(["recover", "-n", &id]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    wait_until_preparing(&device, dead)?;
    let killed = device.listed()?.pid;
    device.kill_server()?;
    ensure!(!recovering.wait()?.success(), "the one that was killed is said to serve");
    ensure!(device.path().exists(), "the device is gone");
    ensure!(device.file("redo").exists(), "its redo log is gone");
    drop(reader);
    wait_until_replaced(&device, killed)?;
    ensure!(is_supervised(device.listed()?.pid)?, "it has no supervisor");
    still_written(device)
}

/// Has an image locked, for as long as the file is open, like a program that reads it and lets nobody write
/// meanwhile.
pub(crate) fn without_writers(image: &Path) -> Result<File> {
    let file = File::open(image)?;
    let lock = libc::flock {
        l_type: libc::F_RDLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: QEMU_UNSHARED_WRITE,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&lock))?;
    Ok(file)
}

/// Whether a server's parent is a process of its own kind, and not whoever looks after orphans.
pub(crate) fn is_supervised(server: i32) -> Result<bool> {
    let name = |pid: i32| fs::read_to_string(format!("/proc/{pid}/comm"));
    Ok(name(parent_of(server)?)? == name(server)?)
}

/// A device that no supervisor looks after, with [`MARK`] at its beginning: acknowledged, not flushed.
pub(crate) fn written_unsupervised(binary: &Binary, image: &Path) -> Result<Device> {
    let mut disk = DeviceDisk::open(binary.add(&["--no-supervisor"], image)?)?;
    disk.run(&[Op::Write { at: 0, bytes: MARK.to_vec().into() }])?;
    Ok(disk.into_device())
}

/// [`MARK`] is where [`written_unsupervised`] has put it; detaches the device.
pub(crate) fn still_written(device: Device) -> Result<()> {
    let mut disk = DeviceDisk::open(device)?;
    let found = disk.run(&[Op::Read { at: 0, len: MARK.len() as u64 }])?;
    ensure!(found[0] == MARK, "what was written before is not there");
    disk.detach()
}

pub(crate) fn parent_of(pid: i32) -> Result<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    line.and_then(|line| line.trim().parse().ok()).context("no PPid")
}

/// Nothing in the run directory, and no supervisor.
fn nothing_left(binary: &Binary, id: u32, supervisor: i32) -> Result<()> {
    patience::until(
        LEFTOVER_LIMIT,
        || format!("the supervisor (process {supervisor}) is still there"),
        || Ok(!Path::new(&format!("/proc/{supervisor}")).exists()),
    )?;
    let left: Vec<_> = fs::read_dir(binary.run_dir())?
        .filter_map(|file| file.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(&format!("{id}.")))
        .collect();
    ensure!(left.is_empty(), "left in the run directory: {left:?}");
    Ok(())
}
