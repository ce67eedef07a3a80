//! What the users of a device have written and not synced when it is detached.
//!
//! It lies in the memory of the host's kernel: as files of a file system, on the disk, on a partition or on
//! what is built on one, or as pages of a node that somebody has open. All of it is in the image afterwards.

use crate::{
    command::{TOOL_LIMIT, run},
    device::{Binary, Device, DeviceDisk, has_process},
    disk::{Disk, Op, Server},
    fs::{Kind, Mounted},
    patience,
    power::host::{Loop, Mapped, make_file_system},
    qemu_img,
    server::partition_table,
};
use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Bytes of the disk, of which the first 1 MiB are before the partition.
const DISK: u64 = 64 << 20;
const BEFORE: u64 = 1 << 20;
/// Bytes that are written: more than one request, and less than what the kernel writes by itself.
const DIRTY: usize = 4 << 20;
/// How long a server may take to write back, and to see that its device stays open.
const ENDED: Duration = Duration::from_secs(120);

/// Where on the device a user is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Disk,
    Partition,
    /// On a device of the device mapper that lies on the partition.
    Mapped,
    /// On a loop device that lies on the partition.
    Loop,
}

/// Ends a server with SIGTERM, as a host does that is shut down, while its device is mounted: a file that was
/// written before is in the image, whole. It was empty: only the pages of the disk's own node were written
/// back, and the file system ran into errors.
///
/// # Errors
/// What does not hold.
pub fn ended_while_mounted(binary: &Binary, dir: &Path, seed: u64) -> Result<()> {
    for (place, options) in [
        (Place::Disk, &[][..]),
        (Place::Partition, &[]),
        (Place::Mapped, &[]),
        (Place::Loop, &[]),
        // Stopping such a device has the kernel sync what is mounted, but not through the device mapper.
        (Place::Mapped, &["--no-recovery"]),
    ] {
        let name = format!("{place:?}{}", options.concat());
        let dir = dir.join(&name);
        fs::create_dir(&dir)?;
        ended_on(binary, options, &dir, place, seed).context(name)?;
    }
    Ok(())
}

fn ended_on(binary: &Binary, options: &[&str], dir: &Path, place: Place, seed: u64) -> Result<()> {
    let (image, point) = (dir.join("image.qcow2"), dir.join("mnt"));
    fs::create_dir(&point)?;
    let bytes = noise(seed);
    let device = partitioned(binary, options, &image)?;
    let used = Used::of(&device, place)?;
    make_file_system(Kind::Ext4, &used.node)?;
    let mounted = Mounted::new(Kind::Ext4, &used.node, &point, "noatime")?;
    fs::write(point.join("file"), &bytes)?;
    end(device, || {
        // It may complain: its device is gone.
        let _ = run(Command::new("umount").arg(&point), TOOL_LIMIT);
        drop(mounted);
        used.remove()
    })?;
    qemu_img::check_clean(&image)?;

    let device = binary.add(&[], &image)?;
    let used = Used::of(&device, place)?;
    let mounted = Mounted::new(Kind::Ext4, &used.node, &point, "noatime")?;
    let found = fs::read(point.join("file"))?;
    ensure!(found == bytes, "the file of {} bytes has {} and is not as it was", bytes.len(), found.len());
    mounted.unmount()?;
    used.remove()?;
    device.detach()
}

/// Asks a server to end whose device is in use, and has its users let go when the device has been stopped.
fn end(device: Device, let_go: impl FnOnce() -> Result<()>) -> Result<()> {
    let (server, path) = (device.listed()?.pid, device.path());
    kill(Pid::from_raw(server), Signal::SIGTERM)?;
    patience::until(ENDED, || "the device was not stopped".to_owned(), || Ok(!path.exists()))?;
    let_go()?;
    has_ended(device, server)
}

fn has_ended(device: Device, server: i32) -> Result<()> {
    patience::until(
        ENDED,
        || format!("the server (process {server}) has not ended"),
        || Ok(!has_process(server) && device.listed().is_err()),
    )?;
    device.has_gone()
}

/// Detaches a device of which somebody has a partition open, who has not synced what he has written: `del`
/// said that all was well, and it was lost, because a partition's pages are none of the disk's.
///
/// # Errors
/// It is lost, or `del` fails.
pub fn written_to_a_partition(binary: &Binary, dir: &Path, seed: u64) -> Result<()> {
    written_and_detached_by(binary, binary, dir, seed)
}

/// The same with `del` from an instance that has other records, to which it is somebody else's device: it was
/// stopped at once, and what lay in memory for it was lost.
///
/// # Errors
/// It is lost, or `del` fails.
pub fn written_and_detached_by_a_stranger(binary: &Binary, dir: &Path, seed: u64) -> Result<()> {
    written_and_detached_by(&binary.apart(), binary, dir, seed)
}

fn written_and_detached_by(remover: &Binary, binary: &Binary, dir: &Path, seed: u64) -> Result<()> {
    let image = dir.join("image.qcow2");
    let bytes = noise(seed);
    let device = partitioned(binary, &[], &image)?;
    let server = device.listed()?.pid;
    // Closed, it would be written back at once.
    let user = File::options().write(true).open(Used::of(&device, Place::Partition)?.node)?;
    user.write_all_at(&bytes, 0)?;
    remover.run(["del", "-n", &device.id().to_string()])?.success()?;
    drop(user);
    has_ended(device, server)?;
    qemu_img::check_clean(&image)?;

    let mut disk = DeviceDisk::open(binary.add(&[], &image)?)?;
    let found = disk.run(&[Op::Read { at: BEFORE, len: bytes.len() as u64 }])?;
    ensure!(found[0] == bytes, "what was written to the partition is lost");
    disk.detach()
}

/// An image with a partition table, attached.
fn partitioned(binary: &Binary, options: &[&str], image: &Path) -> Result<Device> {
    qemu_img::create(image, "cluster_size=64k", None, DISK)?;
    let mut disk = binary.attach(image, 1)?;
    let table = partition_table(BEFORE, DISK - BEFORE);
    disk.run(&[Op::Write { at: 0, bytes: table.into() }])?;
    disk.detach()?;
    binary.add(options, image)
}

/// What somebody uses of a device.
struct Used {
    node: PathBuf,
    mapped: Option<Mapped>,
    /// Detached when dropped.
    looped: Option<Loop>,
}

impl Used {
    fn of(device: &Device, place: Place) -> Result<Self> {
        let partition = PathBuf::from(format!("{}p1", device.path().display()));
        Ok(match place {
            Place::Disk => Self { node: device.path(), mapped: None, looped: None },
            Place::Partition => Self { node: partition, mapped: None, looped: None },
            Place::Mapped => {
                let mapped = Mapped::linear(&partition, DISK - BEFORE)?;
                Self { node: mapped.path(), mapped: Some(mapped), looped: None }
            }
            Place::Loop => {
                let looped = Loop::attach(&partition)?;
                Self { node: looped.path().to_owned(), mapped: None, looped: Some(looped) }
            }
        })
    }

    fn remove(self) -> Result<()> {
        drop(self.looped);
        self.mapped.map_or(Ok(()), Mapped::remove)
    }
}

fn noise(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; DIRTY];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}
