//! What the serving processes do for their own safety and the host's, as the kernel tells it.
//!
//! [`guarded`] looks at every thread of the server and of its supervisor in /proc; [`partitions`] at what the
//! kernel makes of a partition table that somebody else may have written; [`file_system_let_go`] at what a
//! server that has ended still holds.

use crate::{
    command::{TOOL_LIMIT, run},
    device::{Binary, Device, DeviceDisk},
    disk::{Disk, Op, SECTOR, Server},
    fs::Kind,
    power::host::{Plain, make_disk},
    qemu_img,
    recovery::wait_until_replaced,
    refusals::refuse,
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::{self, File, Permissions},
    os::unix::fs::{FileExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

/// Bytes of the disk.
const DISK: u64 = 64 << 20;
/// `PF_MEMALLOC_NOIO` and `PF_LOCAL_THROTTLE` of the kernel: what `PR_SET_IO_FLUSHER` sets.
const IO_FLUSHER: u64 = 0x0008_0000 | 0x0010_0000;
/// `CAP_SYS_ADMIN` and `CAP_DAC_READ_SEARCH`, as bits.
const CONTROL: u64 = 1 << 21 | 1 << 2;
/// A user without privileges.
const NOBODY: u32 = 65534;
/// How late the kernel may be with a scan of its own.
const LATE_SCAN: Duration = Duration::from_secs(1);
/// The driver's feature that a start without a partition scan takes.
const NO_PART_SCAN: &str = "no-part-scan";

/// The one process that another one has started.
///
/// # Errors
/// It has started none, or several.
pub(crate) fn only_child_of(pid: i32) -> Result<i32> {
    Ok(Process(pid).only_child()?.0)
}

/// Demands of a server, of the supervisor behind it and of the process that waits for the driver in its
/// stead, that no thread waits for the device when it allocates memory, that memory stays, that the OOM
/// killer passes by, that mounts are its own; and of the server that it keeps no privileges but those that
/// commanding the driver takes, in its first thread; and of who waits in its stead that it has no more
/// either, and nothing open that a dead server must let go of.
///
/// # Errors
/// What does not hold, and for which thread.
pub fn guarded(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
    let mut disk = DeviceDisk::open(binary.add(&["-q", "2"], &image)?)?;
    // Threads of the ring's own are there when there was I/O.
    disk.run(&[Op::Write { at: 0, bytes: vec![1; 1 << 20].into() }, Op::Flush])?;
    let server = Process(disk.device().listed()?.pid);
    let supervisor = Process(server.status_number("PPid", 10)? as i32);
    let deputy = server.only_child()?;
    for process in [&server, &supervisor, &deputy] {
        process.hold_common().with_context(|| format!("process {}", process.0))?;
    }
    ensure!(deputy.status_number("CapPrm", 16)? & !CONTROL == 0, "who waits for the driver keeps privileges");
    for open in fs::read_dir(deputy.path("fd"))? {
        let file = fs::read_link(open?.path())?;
        let is_needed = ["/dev/null", "/dev/ublk-control"].iter().any(|needed| file == Path::new(needed));
        let is_needed = is_needed
            || ["socket:", "anon_inode:"].iter().any(|kind| file.to_string_lossy().starts_with(kind));
        ensure!(is_needed, "who waits for the driver has {} open", file.display());
    }
    for thread in server.threads()? {
        let kept = number_in(&thread, "CapPrm", 16)?;
        let name = fs::read_to_string(thread.join("comm"))?;
        // The first thread commands the driver, and the kernel's own threads may do that for it.
        let commands =
            thread.ends_with(server.0.to_string()) || name.trim() == format!("iou-wrk-{}", server.0);
        let allowed = if commands { CONTROL } else { 0 };
        ensure!(kept & !allowed == 0, "thread {:?} keeps the capabilities {kept:#x}", name.trim());
        ensure!(number_in(&thread, "NoNewPrivs", 10)? == 1, "{}: NoNewPrivs is not set", thread.display());
    }
    disk.detach()?;
    qemu_img::check_clean(&image)
}

/// Demands that the kernel finds a partition, and that `--no-part-scan` keeps it from looking or says
/// that this kernel cannot.
///
/// # Errors
/// What does not hold.
pub fn partitions(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
    let mut disk = binary.attach(&image, 1)?;
    disk.run(&[Op::Write { at: 0, bytes: partition_table(1 << 20, 1 << 20).into() }])?;
    disk.detach()?;
    let has_partition = |device: &Device| device.sysfs(&format!("ublkb{}p1/size", device.id())).is_ok();

    // More than once: Linux 6.19 and later look when the start has returned, and were mostly in time.
    for round in 0..8 {
        let device = binary.add(&[], &image)?;
        ensure!(has_partition(&device), "the kernel finds no partition in the image, in round {round}");
        device.detach()?;
    }

    let features = binary.run(["features"])?.success()?.stdout;
    let line = features.lines().find(|line| line.contains(NO_PART_SCAN)).context("no such feature")?;
    if line.split_whitespace().nth(1) == Some("no") {
        return refuse(binary, &["add".as_ref(), "--no-part-scan".as_ref(), image.as_os_str()], &["7.0"]);
    }
    let device = binary.add(&["--no-part-scan"], &image)?;
    thread::sleep(LATE_SCAN);
    ensure!(!has_partition(&device), "the kernel has looked for partitions");
    device.detach()?;
    qemu_img::check_clean(&image)
}

/// Gives the device's node to another user, as udev and libvirt do, and detaches while somebody has the
/// device open who has not flushed what he has written: the server could not open it to have it written back.
///
/// # Errors
/// It is lost, or `del` fails.
pub fn given_away(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
    let device = binary.add(&[], &image)?;
    chown(device.path(), Some(NOBODY), Some(NOBODY))?;
    fs::set_permissions(device.path(), Permissions::from_mode(0o600))?;
    let user = File::options().write(true).open(device.path())?;
    user.write_all_at(&[9; 65536], 0)?;
    binary.run(["del", "-n", &device.id().to_string()])?.success()?;
    device.forget();
    drop(user);
    let mut disk = binary.attach(&image, 1)?;
    let found = disk.run(&[Op::Read { at: 0, len: 65536 }])?;
    ensure!(found[0] == [9; 65536], "what was written to the device is lost");
    disk.detach()
}

/// Detaches and unmounts the image's file system at once, many times: the kernel takes rings apart late, and
/// what they still had open kept it busy now and then; so did server and supervisor on their way out, which
/// had it mounted. While the image is served it cannot be unmounted, whoever serves it: it could be, and the
/// server wrote on where nobody saw it.
///
/// # Errors
/// It is busy, or not busy.
pub fn file_system_let_go(binary: &Binary, dir: &Path) -> Result<()> {
    let (host, mount_point) = (dir.join("host.img"), dir.join("mnt"));
    make_disk(Kind::Xfs, &host)?;
    fs::create_dir(&mount_point)?;
    let image = mount_point.join("image.qcow2");
    for round in 0..12 {
        let mounted = Plain::mount(Kind::Xfs, &host, &mount_point)?;
        if round == 0 {
            qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
        }
        let mut disk = binary.attach(&image, 2)?;
        disk.run(&[Op::Write { at: 0, bytes: vec![round; 1 << 20].into() }, Op::Flush])?;
        if round % 4 == 3 {
            let dead = disk.device().listed()?.pid;
            disk.device().kill_server()?;
            wait_until_replaced(disk.device(), dead)?;
        }
        let refused = run(Command::new("umount").arg(&mount_point), TOOL_LIMIT)?;
        ensure!(!refused.status.success(), "it could be unmounted under the image, in round {round}");
        ensure!(refused.stderr.contains("busy"), "`umount` says {}", refused.stderr);
        disk.detach()?;
        mounted.unmount().with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

/// The first sector of a disk with one partition, which begins at that byte and has so many.
pub(crate) fn partition_table(start: u64, len: u64) -> Vec<u8> {
    let sectors = |bytes: u64| ((bytes / SECTOR) as u32).to_le_bytes();
    let mut sector = vec![0; 512];
    let entry = &mut sector[446..462];
    entry[4] = 0x83;
    entry[8..12].copy_from_slice(&sectors(start));
    entry[12..16].copy_from_slice(&sectors(len));
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// A process, by its number.
struct Process(i32);

impl Process {
    fn path(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.0))
    }

    fn threads(&self) -> Result<Vec<PathBuf>> {
        let tasks = fs::read_dir(self.path("task"))?;
        Ok(tasks.map(|task| task.map(|task| task.path())).collect::<Result<_, _>>()?)
    }

    fn only_child(&self) -> Result<Self> {
        let names = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let all = names.filter_map(|name| name.parse().ok()).map(Self);
        let is_ours = |it: &Self| it.status_number("PPid", 10).is_ok_and(|parent| parent == self.0 as u64);
        match &mut all.filter(is_ours).collect::<Vec<_>>()[..] {
            [child] => Ok(Self(child.0)),
            children => bail!("process {} has {} children", self.0, children.len()),
        }
    }

    fn status_number(&self, field: &str, radix: u32) -> Result<u64> {
        number_in(&self.path(""), field, radix)
    }

    /// What holds for server and supervisor alike.
    fn hold_common(&self) -> Result<()> {
        for thread in self.threads()? {
            let flags = flags_of(&thread)?;
            ensure!(flags & IO_FLUSHER == IO_FLUSHER, "{} is no I/O flusher: {flags:#x}", thread.display());
        }
        ensure!(self.status_number("VmLck", 10)? > 0, "no memory is locked");
        let score = fs::read_to_string(self.path("oom_score_adj"))?;
        ensure!(score.trim() == "-1000", "the OOM killer's adjustment is {}", score.trim());
        let mounts = |path: &Path| fs::read_link(path).with_context(|| path.display().to_string());
        ensure!(
            mounts(&self.path("ns/mnt"))? != mounts(Path::new("/proc/self/ns/mnt"))?,
            "mounts are shared"
        );
        Ok(())
    }
}

/// A number in the status file of a process or thread, whose unit is left out.
fn number_in(task: &Path, field: &str, radix: u32) -> Result<u64> {
    let status = fs::read_to_string(task.join("status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = line.and_then(|line| u64::from_str_radix(line.split_whitespace().next()?, radix).ok());
    number.with_context(|| format!("{}: no {field}", task.display()))
}

/// The kernel's flags of a thread.
fn flags_of(task: &Path) -> Result<u64> {
    let stat = fs::read_to_string(task.join("stat"))?;
    // The name, in brackets, may hold anything; the flags are the seventh field after it.
    let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let flags = rest.split_whitespace().nth(6).and_then(|flags| flags.parse().ok());
    flags.with_context(|| format!("{}: no flags in {stat:?}", task.display()))
}
