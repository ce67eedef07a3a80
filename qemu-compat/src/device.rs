//! A real /dev/ublkbN, served by the real binary.
//!
//! [`Binary`] runs the commands, each with a bound on its time. [`Device`] is a guard: dropped, it
//! detaches what was attached. [`DeviceDisk`] carries requests out through the block layer with
//! O_DIRECT, one thread per request in flight, so that all queues get some. Knows nothing of the
//! image's content.

#![allow(unsafe_code, reason = "ioctls of block devices")]

use crate::{
    command::{Finished, run},
    disk::{Disk, Op, SECTOR, Server},
};
use anyhow::{Context, Result, bail, ensure};
use nix::{
    fcntl::{FallocateFlags, fallocate},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{Seek, SeekFrom},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// Where the program keeps its records by itself.
const RUN_DIR: &str = "/run/ublk-qcow2";
/// How far above all devices a number is that is free: who asks for none gets the lowest.
const NUMBERS_BETWEEN: u32 = 20;
/// How long any command of the binary may take, in an emulated machine.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// How long a node may outlive its device, and a server its last words.
const LEFTOVER_LIMIT: Duration = Duration::from_secs(10);
/// Lines of a server's log that a failure shows.
const LAST_WORDS: usize = 8;
/// Alignment of memory for O_DIRECT.
const PAGE: usize = 4096;

/// The program under test.
#[derive(Clone, Debug)]
pub struct Binary {
    path: PathBuf,
    /// Where it keeps its records, if not where it does by itself.
    run_dir: Option<PathBuf>,
    /// The start of the systemd unit that runs it, if one does.
    start: Option<String>,
}

/// An attached image.
#[derive(Debug)]
pub struct Device {
    binary: Binary,
    id: u32,
    is_attached: bool,
}

/// What `list --json` says of a device.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The process that serves it.
    pub pid: i32,
    /// `starting`, `serving`, `waiting` or `dead`.
    pub state: String,
}

impl Binary {
    /// The program at `path`.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, run_dir: None, start: None }
    }

    /// The same program with its records in another directory: the devices of one are not the other's.
    #[must_use]
    pub fn in_run_dir(&self, dir: &Path) -> Self {
        Self { run_dir: Some(dir.to_owned()), ..self.clone() }
    }

    /// The same program as an instance to which the devices of this one are somebody else's. Its records lie below
    /// this one's, so that whoever tidies up after this one finds them.
    #[must_use]
    pub fn apart(&self) -> Self {
        self.in_run_dir(&self.run_dir().join("apart"))
    }

    /// Where it keeps its records.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        self.run_dir.as_deref().unwrap_or(Path::new(RUN_DIR))
    }

    /// What it keeps of a device: its record (`json`), its redo log (`redo`) or its servers' log (`log`).
    #[must_use]
    pub fn file(&self, id: u32, what: &str) -> PathBuf {
        self.run_dir().join(format!("{id}.{what}"))
    }

    /// The same program as this start of a systemd unit runs it.
    #[must_use]
    pub fn in_unit(&self, start: &str) -> Self {
        Self { start: Some(start.to_owned()), ..self.clone() }
    }

    /// Runs it with these arguments.
    ///
    /// # Errors
    /// It cannot be started or does not end in time; how it ends is for the caller to judge.
    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Finished> {
        run(self.command().args(args), COMMAND_LIMIT)
    }

    /// It, without arguments yet.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command.envs(self.variables());
        command
    }

    /// A shell's script in which it is called `$BINARY`.
    #[must_use]
    pub fn script(&self, text: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", text]).env("BINARY", &self.path).envs(self.variables());
        command
    }

    /// What its environment says of where its records are, and of who runs it.
    fn variables(&self) -> impl Iterator<Item = (&str, &OsStr)> {
        let run_dir = self.run_dir.iter().map(|dir| ("UBLK_QCOW2_RUN_DIR", dir.as_os_str()));
        run_dir.chain(self.start.iter().map(|start| ("INVOCATION_ID", OsStr::new(start))))
    }

    /// Attaches an image; `options` go between `add` and the image.
    ///
    /// # Errors
    /// The program refuses, says no device, or the device is no block device.
    pub fn add(&self, options: &[&str], image: &Path) -> Result<Device> {
        let args = ["add"].iter().chain(options).map(AsRef::as_ref).chain([image.as_os_str()]);
        let finished = self.run(args)?.success()?;
        let line = finished.stdout.trim();
        let id = line.strip_prefix("/dev/ublkb").and_then(|id| id.parse().ok());
        let id = id.with_context(|| format!("`{}` printed {line:?}, not a device", finished.line))?;
        let device = Device { binary: self.clone(), id, is_attached: true };
        let kind = fs::metadata(device.path()).with_context(|| format!("no {}", device.path().display()))?;
        ensure!(kind.file_type().is_block_device(), "{} is not a block device", device.path().display());
        Ok(device)
    }
}

impl Device {
    /// Its number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Its node.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.id))
    }

    /// A file of its directory in sysfs, trimmed.
    ///
    /// # Errors
    /// There is no such file.
    pub fn sysfs(&self, file: &str) -> Result<String> {
        let path = format!("/sys/block/ublkb{}/{file}", self.id);
        Ok(fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?.trim().to_owned())
    }

    /// What `list --json` says of it.
    ///
    /// # Errors
    /// It is not listed.
    pub fn listed(&self) -> Result<Listed> {
        let finished = self.binary.run(["list", "--json"])?.success()?;
        let list: serde_json::Value = serde_json::from_str(&finished.stdout).context("list --json")?;
        let entries = list.as_array().context("list --json is not an array")?;
        let entry = entries.iter().find(|entry| entry["id"] == self.id);
        let entry =
            entry.with_context(|| format!("device {} is not listed: {}", self.id, finished.stdout))?;
        let pid =
            entry["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).context("no pid in the list")?;
        Ok(Listed { pid, state: entry["state"].as_str().unwrap_or_default().to_owned() })
    }

    /// What its servers have written into their log.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn log(&self) -> Result<String> {
        let path = self.file("log");
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// What is kept of it, see [`Binary::file`].
    #[must_use]
    pub fn file(&self, what: &str) -> PathBuf {
        self.binary.file(self.id, what)
    }

    /// The last of what its server has written into its log.
    #[must_use]
    pub fn last_words(&self) -> String {
        let log = self.log().unwrap_or_default();
        let lines: Vec<_> = log.lines().rev().take(LAST_WORDS).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    }

    /// Kills its server with SIGKILL. The device is then dead, not gone.
    ///
    /// # Errors
    /// It is not listed or cannot be killed.
    pub fn kill_server(&self) -> Result<()> {
        let pid = self.listed()?.pid;
        ensure!(pid > 1, "the listed process is {pid}");
        kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("cannot kill process {pid}"))
    }

    /// Detaches it; nothing of it is left.
    ///
    /// # Errors
    /// `del` fails, or leaves the node or the server behind.
    pub fn detach(mut self) -> Result<()> {
        let server = self.listed()?;
        self.is_attached = false;
        self.binary.run(["del", "-n", &self.id.to_string()])?.success()?;
        let deadline = Instant::now() + LEFTOVER_LIMIT;
        while self.path().exists() || has_process(server.pid) {
            ensure!(
                Instant::now() < deadline,
                "after del, {} is there: {}; the server (process {}): {}",
                self.path().display(),
                self.path().exists(),
                server.pid,
                has_process(server.pid)
            );
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Device {
    /// It has been detached in another way than by [`Self::detach`].
    ///
    /// # Errors
    /// It is still there.
    pub(crate) fn has_gone(self) -> Result<()> {
        let path = self.path();
        self.forget();
        ensure!(!path.exists(), "{} is still there", path.display());
        Ok(())
    }

    /// Nothing of it is to be tidied up: its number may be another device's.
    pub(crate) fn forget(mut self) {
        self.is_attached = false;
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Without a record the number may be that of somebody else's device by now.
        if self.is_attached && self.file("json").exists() {
            // After a failure: the failure has been told, this only tidies up.
            let _ = self.binary.run(["del", "-n", &self.id.to_string()]);
        }
    }
}

/// Whether a process is there. A zombie counts as ended: who reaps it is not the server's business.
pub(crate) fn has_process(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// The nodes of the ublk driver's devices.
#[must_use]
pub fn existing() -> BTreeSet<String> {
    let nodes = fs::read_dir("/dev").into_iter().flatten().flatten();
    nodes
        .filter_map(|node| node.file_name().into_string().ok())
        .filter(|name| {
            name.strip_prefix("ublkb")
                .or(name.strip_prefix("ublkc"))
                .is_some_and(|id| id.parse::<u32>().is_ok())
        })
        .collect()
}

/// A number that no device has, and none gets that asks for no number.
#[must_use]
pub fn free_number() -> u32 {
    let numbers = existing().into_iter().filter_map(|name| name.get("ublkb".len()..)?.parse().ok());
    numbers.max().unwrap_or(0) + NUMBERS_BETWEEN
}

impl Server for Binary {
    type Disk = DeviceDisk;

    fn attach(&self, image: &Path, queues: u16) -> Result<DeviceDisk> {
        DeviceDisk::open(self.add(&["-q", &queues.to_string()], image)?)
    }
}

/// A device that is open for direct I/O.
#[derive(Debug)]
pub struct DeviceDisk {
    // Closed before the device is detached.
    file: File,
    device: Device,
    size: u64,
    skew: usize,
}

impl DeviceDisk {
    /// Opens a device.
    ///
    /// # Errors
    /// The operating system's.
    pub fn open(device: Device) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        let mut file = options
            .open(device.path())
            .with_context(|| format!("cannot open {}", device.path().display()))?;
        let size = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, device, size, skew: 0 })
    }

    /// From now on the memory of requests begins at this byte of a page.
    #[must_use]
    pub fn with_skew(self, skew: usize) -> Self {
        Self { skew, ..self }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The device alone: closes this descriptor.
    #[must_use]
    pub fn into_device(self) -> Device {
        self.device
    }
}

impl Disk for DeviceDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn run(&mut self, batch: &[Op]) -> Result<Vec<Vec<u8>>> {
        let (file, skew) = (&self.file, self.skew);
        if let [op] = batch {
            return Ok(vec![carry_out_at(skew, file, op).with_context(|| format!("{op:?}"))?]);
        }
        thread::scope(|scope| {
            let running: Vec<_> =
                batch.iter().map(|op| scope.spawn(move || carry_out_at(skew, file, op))).collect();
            running
                .into_iter()
                .zip(batch)
                .map(|(thread, op)| match thread.join() {
                    Ok(answer) => answer.with_context(|| format!("{op:?}")),
                    Err(_) => bail!("{op:?} panicked"),
                })
                .collect()
        })
    }

    fn detach(self) -> Result<()> {
        drop(self.file);
        self.device.detach()
    }
}

/// One request as a system call.
///
/// # Errors
/// The operating system's, or a transfer that ends early.
pub fn carry_out(file: &File, op: &Op) -> Result<Vec<u8>> {
    carry_out_at(0, file, op)
}

/// The same, with memory that begins at this byte of a page.
fn carry_out_at(skew: usize, file: &File, op: &Op) -> Result<Vec<u8>> {
    match *op {
        Op::Write { at, ref bytes } => {
            let mut memory = Aligned::new(bytes.len(), skew);
            memory.bytes().copy_from_slice(bytes);
            file.write_all_at(memory.bytes(), at)?;
        }
        Op::Read { at, len } => {
            let mut memory = Aligned::new(len as usize, skew);
            file.read_exact_at(memory.bytes(), at)?;
            return Ok(memory.bytes().to_vec());
        }
        // A hole in a block device is write-zeroes that may give the space back.
        Op::Zero { at, len, unmap: true } => {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(file, flags, i64::try_from(at)?, i64::try_from(len)?)?;
        }
        Op::Zero { at, len, unmap: false } => {
            let range = [at, len];
            // SAFETY: the descriptor is open for the call, and the kernel reads two numbers from the
            // array, which outlives it.
            unsafe { ioctl::blkzeroout(file.as_raw_fd(), &raw const range) }?;
        }
        Op::Discard { at, len } => {
            let range = [at, len];
            // SAFETY: as above.
            unsafe { ioctl::blkdiscard(file.as_raw_fd(), &raw const range) }?;
        }
        Op::Flush => file.sync_all()?,
    }
    Ok(Vec::new())
}

/// Requests of linux/fs.h that take two 64-bit numbers: first byte and length.
mod ioctl {
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blkzeroout, nix::request_code_none!(0x12, 127), [u64; 2]);
}

/// Memory that begins at a certain byte of a page.
pub(crate) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub(crate) fn new(len: usize, skew: usize) -> Self {
        debug_assert!((len as u64).is_multiple_of(SECTOR));
        let memory = vec![0; len + skew + PAGE];
        let start = memory.as_ptr().align_offset(PAGE) + skew;
        Self { memory, start, len }
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}
