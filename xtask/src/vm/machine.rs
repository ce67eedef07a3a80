//! One run of the throw-away machine: from a kernel, a payload and disks to an exit status, or to its sudden
//! end.
//!
//! The guest's side is guest/init.sh. The contract between the two: disks carry serial names (`payload`,
//! `scratch`, `results`, and the caller's); the payload disk is a cpio archive that holds /payload/run; that
//! script's output comes through the virtio console, kernel messages through the first serial port, and the
//! lines `begun` and `exit N` through the second. A machine never outlives xtask: QEMU is told to die with
//! its parent.

use super::{accel::Accel, initramfs, tree::Tree};
use crate::{
    kernel::UnpackedKernel,
    process::{self, program, run},
    workspace,
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// The status by which guest/init.sh says that the machine itself is broken and nothing has run.
const STATUS_BROKEN: i32 = 125;
/// What guest/init.sh says when the script begins.
const BEGUN: &str = "begun";
/// Room for what a run brings back. The file is sparse.
const RESULTS_BYTES: u64 = 4 << 30;
/// Its memory holds the whole mapping of 8 GiB in clusters of 4 KiB, so that none of it is written for want
/// of room.
const VOLATILE: &str = "qcow2,l2-cache-size=16M";
/// Without a check of the timer: on a busy host an emulated one is late, which the kernel panics of.
const COMMAND_LINE: &str = "console=ttyS0 loglevel=4 panic=-1 oops=panic mitigations=off nowatchdog \
                            no_timer_check random.trust_cpu=on";
const POLL: Duration = Duration::from_millis(20);
/// How long a machine may take until its script begins. A boot takes seconds; now and then an emulated one,
/// on a busy host, hangs in the kernel before anything of ours has run.
const BOOT_LIMIT: Duration = Duration::from_secs(240);

/// A disk beyond the ones that every machine has.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    /// Seen in the guest as /dev/disk/NAME.
    pub name: String,
    /// A raw file, but for a volatile disk; its length counts, rounded up to 512 bytes.
    pub path: PathBuf,
    /// Whether the guest may write to it.
    pub access: Access,
}

/// What a guest may do to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    ReadOnly,
    ReadWrite,
    /// As a disk with a volatile cache: what was written for the first time and not flushed is lost when the
    /// machine is killed. The file is a QCOW2 overlay, the one kind that QEMU has of which it holds back a
    /// part.
    Volatile,
}

/// What counts the instructions that a guest executes: the plugin of `qemu-counter`.
#[derive(Debug, Clone)]
pub(crate) struct Counter {
    pub library: PathBuf,
    /// Its files are called so, with a full stop and a number behind it.
    pub out: PathBuf,
}

/// Who talks to the guest's console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Console {
    /// The user's terminal, both ways.
    Interactive,
    /// The script's output is passed on as it comes.
    Streamed,
    /// The same on standard error: standard output is for what is made of the results.
    Aside,
    /// Streamed line by line and behind a label: others speak meanwhile.
    Labelled(&'static str),
    /// The script's output is only kept.
    Silent,
}

/// Everything about a run but the payload.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub kernel: &'a UnpackedKernel,
    pub accel: Accel,
    pub memory_mib: u32,
    /// Size of the sparse scratch disk, ext4, mounted at /scratch.
    pub scratch_gib: u32,
    pub disks: Vec<Disk>,
    /// A file of this host to which the guest can append, as /dev/port/report: what it has written is here
    /// when its call returns, however the machine ends.
    pub report: Option<PathBuf>,
    /// Only for a processor that counts instructions.
    pub counter: Option<Counter>,
    pub console: Console,
    pub time_limit: Duration,
    /// The host directory that receives what the script left in /results.
    pub results: Option<PathBuf>,
}

/// How a run ended.
pub(crate) struct Finished {
    /// The script's exit status.
    pub status: i32,
    /// All that the script wrote; empty for an interactive run.
    pub output: Vec<u8>,
}

/// A machine that has been switched on.
pub(crate) struct Running<'a> {
    machine: &'a Machine<'a>,
    child: Child,
    output: Option<thread::JoinHandle<Vec<u8>>>,
    dir: RunDir,
}

impl Machine<'_> {
    /// Boots, runs /payload/run of `payload`, powers off.
    ///
    /// # Errors
    /// Fails when the machine does not start, does not get as far as the script, panics, or exceeds its time.
    /// A script that fails is not an error here.
    pub(crate) fn run(&self, payload: &Tree) -> Result<Finished> {
        self.start(payload)?.finish()
    }

    /// Switches the machine on, and returns when the script begins, or when the machine has ended.
    ///
    /// # Errors
    /// Fails when it does not start, or hangs before the script.
    pub(crate) fn start(&self, payload: &Tree) -> Result<Running<'_>> {
        let mut running = self.switch_on(payload)?;
        // Whoever gives a machine less time wants to know whether it boots at all.
        if self.time_limit <= BOOT_LIMIT || running.has_begun()? {
            return Ok(running);
        }
        let hung = running.give_up(BOOT_LIMIT);
        eprintln!("xtask: the machine has hung before its script began; booting it once more\n{hung:#}");
        let mut running = self.switch_on(payload)?;
        if running.has_begun()? {
            Ok(running)
        } else {
            Err(running.give_up(BOOT_LIMIT).context("two boots hung"))
        }
    }

    fn switch_on(&self, payload: &Tree) -> Result<Running<'_>> {
        let initramfs = initramfs::ensure(self.kernel)?;
        let dir = RunDir::create()?;
        payload
            .write_cpio(BufWriter::new(File::create(dir.file("payload"))?))
            .context("cannot write the payload")?;
        pad_to_sector(&dir.file("payload"))?;
        make_scratch(&dir.file("scratch"), self.scratch_gib)?;
        File::create(dir.file("results"))?.set_len(RESULTS_BYTES)?;

        let mut child = process::start(&mut self.qemu(&dir, &initramfs)?)?;
        let output = child.stdout.take().map(|pipe| collect(pipe, self.console));
        Ok(Running { machine: self, child, output, dir })
    }

    fn qemu(&self, dir: &RunDir, initramfs: &Path) -> Result<Command> {
        // setpriv replaces itself by QEMU, which then dies with us even when we are killed.
        let mut qemu = program("setpriv")?;
        qemu.args(["--pdeathsig", "KILL"]).arg(program("qemu-system-x86_64")?.get_program());
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35"]);
        qemu.args(self.accel.arguments());
        qemu.args(["-m", &format!("{}M", self.memory_mib)]);
        qemu.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(initramfs);
        qemu.args(["-append", COMMAND_LINE]);
        qemu.arg("-serial").arg(format!("file:{}", dir.shown("kernel.log")));
        qemu.arg("-serial").arg(format!("file:{}", dir.shown("status")));
        qemu.args(["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=script"]);

        for (name, access) in
            [("payload", Access::ReadOnly), ("scratch", Access::ReadWrite), ("results", Access::ReadWrite)]
        {
            add_disk(&mut qemu, &Disk { name: name.to_owned(), path: dir.file(name), access });
        }
        for disk in &self.disks {
            add_disk(&mut qemu, disk);
        }
        if let Some(Counter { library, out }) = &self.counter {
            ensure!(
                self.accel == Accel::InstructionCount,
                "what is executed can be counted only where the machine's time counts instructions"
            );
            let [library, out] = [library, out].map(|path| path.display().to_string().replace(',', ",,"));
            qemu.arg("-plugin").arg(format!("file={library},out={out}"));
        }
        if let Some(report) = &self.report {
            let path = report.display().to_string().replace(',', ",,");
            qemu.arg("-chardev").arg(format!("file,id=report,append=on,path={path}"));
            qemu.args(["-device", "virtserialport,chardev=report,name=report"]);
        }
        if self.console == Console::Interactive {
            qemu.args([
                "-chardev",
                "stdio,id=script,signal=off,mux=on",
                "-mon",
                "chardev=script,mode=readline",
            ]);
        } else {
            qemu.args(["-chardev", "stdio,id=script,signal=off"]).stdin(Stdio::null()).stdout(Stdio::piped());
        }
        if self.console == Console::Silent {
            qemu.stderr(Stdio::null());
        }
        Ok(qemu)
    }

    /// The script's status, or why there is none.
    fn judge(&self, ended: Ended, dir: &RunDir, output: &[u8]) -> Result<i32> {
        let log = fs::read(dir.file("kernel.log"))
            .map_or_else(|_| String::new(), |log| String::from_utf8_lossy(&log).into_owned());
        let shown = || {
            if log.trim().is_empty() {
                String::from(" (it said nothing)")
            } else {
                format!(":\n{}", tail(&log, 60))
            }
        };
        if let Ended::OutOfTime(limit) = ended {
            let so_far = String::from_utf8_lossy(output);
            bail!(
                "the machine was stopped, whose limit is {} s; last output:\n{}\nkernel messages{}",
                limit.as_secs(),
                tail(&so_far, 10),
                shown()
            );
        }
        let reported = fs::read_to_string(dir.file("status")).unwrap_or_default();
        let status = reported.lines().find_map(|line| line.trim().strip_prefix("exit ")?.parse().ok());
        match status {
            Some(STATUS_BROKEN) => bail!("the machine could not run anything; its console{}", shown()),
            Some(status) => Ok(status),
            None if log.contains("Kernel panic") => bail!("the machine's kernel panicked{}", shown()),
            None => bail!("the machine ended without a result; its console{}", shown()),
        }
    }
}

impl Running<'_> {
    /// Waits until it has powered off.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub(crate) fn finish(mut self) -> Result<Finished> {
        let ended = wait(&mut self.child, self.machine.time_limit)?;
        let output = self.output.take().map_or_else(Vec::new, |thread| thread.join().unwrap_or_default());
        let status = self.machine.judge(ended, &self.dir, &output)?;

        if let Some(results) = &self.machine.results {
            fs::create_dir_all(results)?;
            run(program("tar")?
                .arg("-xf")
                .arg(self.dir.file("results"))
                .arg("-C")
                .arg(results)
                .arg("--no-same-owner"))?;
        }
        Ok(Finished { status, output })
    }

    /// Waits for the beginning of the script, or the machine's end. False if neither comes.
    fn has_begun(&mut self) -> Result<bool> {
        let deadline = Instant::now() + BOOT_LIMIT;
        let status = self.dir.file("status");
        loop {
            let begun = fs::read_to_string(&status).is_ok_and(|said| said.contains(BEGUN));
            if begun || !self.is_on()? {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            thread::sleep(POLL);
        }
    }

    /// Whether it is still on.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn is_on(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Switches it off because it has not done within this time what it should, and says what it has done.
    pub(crate) fn give_up(mut self, limit: Duration) -> anyhow::Error {
        // If that fails it has ended by itself.
        let _ = self.child.kill().and_then(|()| self.child.wait());
        let output = self.output.take().map_or_else(Vec::new, |thread| thread.join().unwrap_or_default());
        let judged = self.machine.judge(Ended::OutOfTime(limit), &self.dir, &output);
        judged.err().unwrap_or_else(|| anyhow::anyhow!("the machine was switched off"))
    }

    /// Pulls the plug: what it had under way is gone.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn pull_the_plug(mut self) -> Result<()> {
        self.child.kill().context("cannot kill QEMU")?;
        self.child.wait()?;
        Ok(())
    }
}

fn add_disk(qemu: &mut Command, disk: &Disk) {
    let Disk { name, path, access } = disk;
    let cache = if takes_direct_io(path) { "none" } else { "writeback" };
    let read_only = if *access == Access::ReadOnly { "on" } else { "off" };
    let format = if *access == Access::Volatile { VOLATILE } else { "raw" };
    let path = path.display().to_string().replace(',', ",,");
    qemu.arg("-drive").arg(format!(
        "if=none,id={name},format={format},cache={cache},discard=unmap,read-only={read_only},file={path}"
    ));
    qemu.arg("-device").arg(format!("virtio-blk-pci,drive={name},serial={name}"));
}

/// Whether the file system of `path` takes O_DIRECT; tmpfs, for one, may not.
fn takes_direct_io(path: &Path) -> bool {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).is_ok()
}

fn pad_to_sector(path: &Path) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let len = file.metadata()?.len();
    Ok(file.set_len(len.next_multiple_of(4096))?)
}

fn make_scratch(path: &Path, gib: u32) -> Result<()> {
    File::create(path)?.set_len(u64::from(gib) << 30)?;
    process::capture(program("mkfs.ext4")?.args(["-q", "-F", "-m", "0", "-E", "nodiscard"]).arg(path))
        .map(drop)
}

enum Ended {
    ByItself,
    /// It was not done within this time.
    OutOfTime(Duration),
}

fn wait(child: &mut Child, limit: Duration) -> Result<Ended> {
    let deadline = Instant::now() + limit;
    loop {
        if child.try_wait()?.is_some() {
            return Ok(Ended::ByItself);
        }
        if Instant::now() >= deadline {
            child.kill().context("cannot stop QEMU")?;
            child.wait()?;
            return Ok(Ended::OutOfTime(limit));
        }
        thread::sleep(POLL);
    }
}

/// Keeps all of `pipe`, and passes it on if the console is for that.
pub(crate) fn collect(mut pipe: impl Read + Send + 'static, console: Console) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let (mut all, mut told) = (Vec::new(), 0);
        let mut buffer = [0; 8192];
        while let Ok(len @ 1..) = pipe.read(&mut buffer) {
            all.extend_from_slice(&buffer[..len]);
            // Nobody may be listening any more; the run goes on all the same.
            let _ = pass_on(&all[told..], console).map(|len| told += len);
        }
        all
    })
}

/// Passes on what can be, and says how much that is.
fn pass_on(new: &[u8], console: Console) -> io::Result<usize> {
    let mut stdout = io::stdout().lock();
    let passed = match console {
        Console::Aside => {
            io::stderr().write_all(new)?;
            new.len()
        }
        Console::Streamed => {
            stdout.write_all(new)?;
            new.len()
        }
        Console::Labelled(label) => {
            let whole = new.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
            for line in new[..whole].split_inclusive(|&byte| byte == b'\n') {
                stdout.write_all(format!("{label}: ").as_bytes())?;
                stdout.write_all(line)?;
            }
            whole
        }
        Console::Interactive | Console::Silent => return Ok(0),
    };
    stdout.flush()?;
    Ok(passed)
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.lines().map(str::trim_end).collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// The files of one run, removed with it. What a killed xtask left behind goes when the next run starts.
struct RunDir {
    dir: tempfile::TempDir,
    _lock: File,
}

impl RunDir {
    fn create() -> Result<Self> {
        let runs = workspace::cache()?.join("runs");
        fs::create_dir_all(&runs)?;
        let _guard = workspace::lock("runs")?;
        sweep(&runs)?;
        let dir = tempfile::Builder::new().prefix("run-").tempdir_in(&runs)?;
        let lock = File::create(dir.path().join("lock"))?;
        lock.lock()?;
        Ok(Self { dir, _lock: lock })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn shown(&self, name: &str) -> String {
        self.file(name).display().to_string().replace(',', ",,")
    }
}

/// Removes the runs whose owner is gone: nobody holds their lock.
fn sweep(runs: &Path) -> Result<()> {
    for entry in fs::read_dir(runs)? {
        let path = entry?.path();
        let abandoned = File::open(path.join("lock")).is_ok_and(|lock| lock.try_lock().is_ok());
        if abandoned {
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine that hung before its script was said to have had the time that the script may take.
    #[test]
    fn the_limit_that_was_met_is_told() {
        let nowhere = PathBuf::new;
        let kernel = UnpackedKernel { release: String::new(), image: nowhere(), modules: nowhere() };
        let machine = Machine {
            kernel: &kernel,
            accel: Accel::Emulated,
            memory_mib: 1,
            scratch_gib: 1,
            disks: Vec::new(),
            report: None,
            counter: None,
            console: Console::Silent,
            time_limit: Duration::from_secs(2400),
            results: None,
        };
        let dir = RunDir { dir: tempfile::tempdir().unwrap(), _lock: tempfile::tempfile().unwrap() };
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let running = Running { machine: &machine, child, output: None, dir };
        let said = running.give_up(BOOT_LIMIT).to_string();
        assert!(said.contains("limit is 240 s"), "{said}");
    }
}
