//! A file system on a device: made, mounted, filled, emptied in part, checked.
//!
//! The files are seeded, so that they need not be remembered: they are made again to compare. The
//! image is attached twice, so that what is compared has been through a detach.

use crate::{
    command::{TOOL_LIMIT, run},
    device::{Binary, Device},
    qemu_img,
};
use anyhow::{Context, Result, ensure};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};

/// mkfs.xfs makes nothing smaller than 300 MB.
pub(crate) const DISK: u64 = 512 << 20;
/// Files to write.
const FILES: u64 = 60;

/// Which file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// XFS.
    Xfs,
    /// ext4.
    Ext4,
}

impl Kind {
    /// Its name for mount(8).
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Xfs => "xfs",
            Self::Ext4 => "ext4",
        }
    }

    pub(crate) fn make(self) -> Command {
        let mut command = Command::new(format!("mkfs.{}", self.name()));
        match self {
            Self::Xfs => command.args(["-q", "-f"]),
            Self::Ext4 => command.args(["-q", "-F"]),
        };
        command
    }

    fn check(self) -> Command {
        let (program, option) = match self {
            Self::Xfs => ("xfs_repair", "-n"),
            Self::Ext4 => ("e2fsck", "-fn"),
        };
        let mut command = Command::new(program);
        command.arg(option);
        command
    }
}

/// Takes a file system through its life on an image with these `qemu-img create` options.
///
/// # Errors
/// A step failed, a file is not as it was written, or a check found something.
pub fn life(binary: &Binary, dir: &Path, kind: Kind, options: &str, queues: &str, seed: u64) -> Result<()> {
    let image = dir.join("image.qcow2");
    let mount_point = dir.join("mnt");
    fs::create_dir(&mount_point)?;
    qemu_img::create(&image, options, None, DISK)?;

    let device = binary.add(&["-q", queues], &image)?;
    run(kind.make().arg(device.path()), TOOL_LIMIT)?.success()?;
    let mounted = Mounted::new(kind, &device.path(), &mount_point, OPTIONS)?;
    write_files(&mount_point, seed)?;
    compare_files(&mount_point, seed, 0).context("as written")?;
    // With `discard` this frees clusters under the file system.
    (0..FILES).step_by(3).try_for_each(|number| fs::remove_file(file_path(&mount_point, number)))?;
    mounted.unmount()?;
    run(kind.check().arg(device.path()), TOOL_LIMIT)?.success()?;
    device.detach()?;
    qemu_img::check_clean(&image)?;

    let device = binary.add(&["-q", queues], &image)?;
    let mounted = Mounted::new(kind, &device.path(), &mount_point, OPTIONS)?;
    compare_files(&mount_point, seed, 1).context("after attaching again")?;
    mounted.unmount()?;
    run(kind.check().arg(device.path()), TOOL_LIMIT)?.success()?;
    device.detach()?;
    qemu_img::check_clean(&image)
}

/// Makes a file system on a device and writes, reads and removes files on it as often as `trouble` wants,
/// which brings the trouble. Then it is unmounted, checked, mounted again and read again.
///
/// # Errors
/// As [`life`].
pub(crate) fn under_trouble(
    device: &Device,
    kind: Kind,
    mount_point: &Path,
    trouble: impl FnOnce(&(dyn Fn() -> Result<()> + Sync)) -> Result<()>,
) -> Result<()> {
    run(kind.make().arg(device.path()), TOOL_LIMIT)?.success()?;
    let mounted = Mounted::new(kind, &device.path(), mount_point, OPTIONS)?;
    let rounds = AtomicU64::new(0);
    trouble(&|| {
        let seed = rounds.fetch_add(1, Ordering::Relaxed);
        write_files(mount_point, seed)?;
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        compare_files(mount_point, seed, 0)
    })?;
    mounted.unmount()?;
    run(kind.check().arg(device.path()), TOOL_LIMIT)?.success()?;
    let mounted = Mounted::new(kind, &device.path(), mount_point, OPTIONS)?;
    compare_files(mount_point, rounds.load(Ordering::Relaxed) - 1, 0).context("mounted again")?;
    mounted.unmount()
}

/// Whatever the file system frees is to be freed in the image.
const OPTIONS: &str = "discard";

/// A mount; undone when dropped.
pub(crate) struct Mounted(Option<PathBuf>);

impl Mounted {
    /// Mounts a device's file system with these options.
    ///
    /// # Errors
    /// `mount` fails.
    pub(crate) fn new(kind: Kind, device: &Path, at: &Path, options: &str) -> Result<Self> {
        let mut command = Command::new("mount");
        command.args(["-t", kind.name(), "-o", options]).arg(device).arg(at);
        run(&mut command, TOOL_LIMIT)?.success()?;
        Ok(Self(Some(at.to_owned())))
    }

    /// Unmounts it.
    ///
    /// # Errors
    /// Somebody uses it.
    pub(crate) fn unmount(mut self) -> Result<()> {
        let at = self.0.take().context("mounted once")?;
        run(Command::new("umount").arg(at), TOOL_LIMIT)?.success().map(drop)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(at) = self.0.take() {
            // After a failure, which has been told.
            let _ = run(Command::new("umount").arg(at), TOOL_LIMIT);
        }
    }
}

fn write_files(dir: &Path, seed: u64) -> Result<()> {
    for number in 0..FILES {
        let path = file_path(dir, number);
        fs::create_dir_all(path.parent().unwrap_or(dir))?;
        let mut file = File::create(&path)?;
        file.write_all(&file_bytes(number, seed))?;
        if number % 7 == 0 {
            file.sync_all()?;
        }
    }
    Ok(())
}

/// Compares the files whose number leaves a remainder of at least `from` by 3: the others are gone.
fn compare_files(dir: &Path, seed: u64, from: u64) -> Result<()> {
    for number in (0..FILES).filter(|number| number % 3 >= from) {
        let path = file_path(dir, number);
        let found = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        ensure!(found == file_bytes(number, seed), "{} is not as it was written", path.display());
    }
    Ok(())
}

fn file_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("directory-{}", number % 5)).join(format!("file-{number}"))
}

fn file_bytes(number: u64, seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed ^ number << 32);
    let most = if number.is_multiple_of(10) { 2 << 20 } else { 100 << 10 };
    let mut bytes = vec![0; rng.usize(0..most)];
    rng.fill(&mut bytes);
    bytes
}
