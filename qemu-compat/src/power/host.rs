//! The disk of a host whose power will be cut: a file as a loop device, and what passes it in a log.
//!
//! ```text
//! mount point  ─ file system ─ dm-log-writes ┬ loop ─ host.img
//!                                            └ loop ─ host.log
//! ```
//!
//! All are guards, undone when dropped, in the order of their fields.

use crate::{
    command::{TOOL_LIMIT, run},
    fs::{Kind, Mounted},
};
use anyhow::{Context, Result, ensure};
use std::{
    fs::{self, File},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};

/// Size of the host's disk: mkfs.xfs makes nothing smaller than 300 MB.
const DISK: u64 = 320 << 20;
/// Room for the log. The file is sparse.
const LOG: u64 = 8 << 30;

/// Makes a file with an empty file system.
///
/// # Errors
/// mkfs fails.
pub(crate) fn make_disk(kind: Kind, path: &Path) -> Result<()> {
    File::create(path)?.set_len(DISK)?;
    make_file_system(kind, path)
}

/// Makes an empty file system in a file or on a device.
///
/// # Errors
/// mkfs fails.
pub(crate) fn make_file_system(kind: Kind, path: &Path) -> Result<()> {
    let mut make = kind.make();
    if kind == Kind::Ext4 {
        // Nothing is to be written behind our back, and the journal need not be large.
        make.args(["-E", "lazy_itable_init=0,lazy_journal_init=0", "-J", "size=4"]);
    }
    run(make.arg(path), TOOL_LIMIT)?.success().map(drop)
}

/// A file as a block device.
pub(crate) struct Loop(PathBuf);

impl Loop {
    /// Attaches a file.
    ///
    /// # Errors
    /// `losetup` fails.
    pub(crate) fn attach(file: &Path) -> Result<Self> {
        // Built in, or loaded already: what is missing shows below.
        let _ = run(Command::new("modprobe").args(["-q", "loop"]), TOOL_LIMIT);
        let finished =
            run(Command::new("losetup").args(["--find", "--show"]).arg(file), TOOL_LIMIT)?.success()?;
        let node = PathBuf::from(finished.stdout.trim());
        ensure!(node.starts_with("/dev"), "losetup printed {}, not a device", node.display());
        Ok(Self(node))
    }

    /// Its node.
    #[must_use]
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // Nothing depends on it any more.
        let _ = run(Command::new("losetup").arg("--detach").arg(&self.0), TOOL_LIMIT);
    }
}

/// A file system on a loop device.
pub(crate) struct Plain {
    mounted: Mounted,
    disk: Loop,
}

impl Plain {
    /// Mounts the file system in a file; this is where its journal recovers.
    ///
    /// # Errors
    /// It cannot be mounted.
    pub(crate) fn mount(kind: Kind, file: &Path, at: &Path) -> Result<Self> {
        let disk = Loop::attach(file)?;
        let mounted = Mounted::new(kind, disk.path(), at, OPTIONS)?;
        Ok(Self { mounted, disk })
    }

    /// The disk that it is on.
    pub(crate) fn disk(&self) -> &Path {
        self.disk.path()
    }

    /// Unmounts it; its disk is then nobody's.
    ///
    /// # Errors
    /// Somebody uses it, or has it mounted elsewhere.
    pub(crate) fn unmount(self) -> Result<()> {
        self.mounted.unmount()?;
        let claim = File::options().read(true).custom_flags(libc::O_EXCL).open(self.disk.path());
        claim.context("unmounted, but the disk is in use").map(drop)
    }
}

/// Nothing needs them, and they would be one more writer.
const OPTIONS: &str = "noatime";

/// A mounted file system whose writes are logged.
pub(super) struct Logged {
    mounted: Mounted,
    mapped: Mapped,
    _disk: Loop,
    _log: Loop,
}

/// A device of the device mapper.
pub(crate) struct Mapped {
    name: String,
}

impl Logged {
    /// Mounts the file system in `file`; what is written to it goes to `log`, too.
    ///
    /// # Errors
    /// The kernel lacks dm-log-writes, or something cannot be set up.
    pub(super) fn mount(kind: Kind, file: &Path, log: &Path, at: &Path) -> Result<Self> {
        File::create(log)?.set_len(LOG)?;
        let (disk, log) = (Loop::attach(file)?, Loop::attach(log)?);
        let mapped = Mapped::logging(disk.path(), log.path())?;
        let mounted = Mounted::new(kind, &mapped.path(), at, OPTIONS)?;
        Ok(Self { mounted, mapped, _disk: disk, _log: log })
    }

    /// Puts a mark into the log. What was durable before stands before it.
    ///
    /// # Errors
    /// `dmsetup` fails.
    pub(super) fn mark(&self, text: &str) -> Result<()> {
        dmsetup(&["message", &self.mapped.name, "0", "mark", text])
    }

    /// Unmounts; the log is then complete.
    ///
    /// # Errors
    /// Somebody uses it.
    pub(super) fn unmount(self) -> Result<()> {
        self.mounted.unmount()?;
        self.mapped.remove()
    }
}

impl Mapped {
    fn logging(disk: &Path, log: &Path) -> Result<Self> {
        let _ = run(Command::new("modprobe").args(["-q", "dm-log-writes"]), TOOL_LIMIT);
        let table = format!("0 {} log-writes {} {}", DISK / 512, disk.display(), log.display());
        Self::with(&table).context("does this kernel have dm-log-writes?")
    }

    /// So many bytes of a device, as they are.
    ///
    /// # Errors
    /// `dmsetup` fails.
    pub(crate) fn linear(device: &Path, bytes: u64) -> Result<Self> {
        let _ = run(Command::new("modprobe").args(["-q", "dm-mod"]), TOOL_LIMIT);
        Self::with(&format!("0 {} linear {} 0", bytes / 512, device.display()))
    }

    fn with(table: &str) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("compat-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        dmsetup(&["create", &name, "--table", table])?;
        Ok(Self { name })
    }

    /// Has it carry out requests in another way, those too that it holds.
    ///
    /// # Errors
    /// `dmsetup` fails.
    pub(crate) fn replace(&self, table: &str) -> Result<()> {
        dmsetup(&["load", &self.name, "--table", table])?;
        dmsetup(&["resume", &self.name])
    }

    /// Has it hold requests.
    ///
    /// # Errors
    /// `dmsetup` fails.
    pub(crate) fn hold(&self) -> Result<()> {
        dmsetup(&["suspend", "--noflush", "--nolockfs", &self.name])
    }

    /// Its node.
    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/dev/mapper").join(&self.name)
    }

    /// Removes it.
    ///
    /// # Errors
    /// Somebody uses it.
    pub(crate) fn remove(mut self) -> Result<()> {
        remove(&std::mem::take(&mut self.name))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if !self.name.is_empty() {
            // After a failure, which has been told.
            let _ = remove(&self.name);
        }
    }
}

fn remove(name: &str) -> Result<()> {
    dmsetup(&["remove", name])
}

fn dmsetup(args: &[&str]) -> Result<()> {
    let mut command = Command::new("dmsetup");
    // There may be no udev to make the node, and dmsetup would wait for it.
    if !fs::exists("/run/udev").unwrap_or(false) {
        command.env("DM_DISABLE_UDEV", "1");
    }
    run(command.args(args), TOOL_LIMIT)?.success().map(drop)
}
