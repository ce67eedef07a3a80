//! Where a job runs that needs a real /dev/ublkbN: on this host where its ublk driver is usable, else in the
//! virtual machine.
//!
//! A job is a shell script with the programs and disks it needs; the scripts under guest/ are written to run
//! in either place. They find programs in PATH, an empty directory in $SCRATCH, a directory to leave things
//! in $RESULTS, and each disk NAME in $DISK_NAME; in the machine, $IN_MACHINE is set. On a host they leave alone
//! what is not theirs, and nothing behind (guest/lib.sh).

use crate::{
    kernel::Kernel,
    process::{find_program, program, quote, run, start},
    setup::{self, Kernels},
    vm::{
        self,
        accel::Accel,
        machine::{Console, Counter, Disk, Finished, Machine, collect},
        tree::Tree,
    },
    workspace,
};
use anyhow::{Context, Result};
use std::{
    env,
    ffi::OsString,
    fmt,
    fs::{self, OpenOptions},
    os::unix::{fs::symlink, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

const CONTROL_DEVICE: &str = "/dev/ublk-control";
/// Memory of the machine: enough for a tmpfs image or null_blk of 2 GiB beside the system.
const MEMORY_MIB: u32 = 4096;

/// How long a script that is stopped on a host may take to undo what it has made.
const UNDOING: Duration = Duration::from_secs(180);

/// Whether this host's own ublk driver can be used by us; the error says why not.
///
/// # Errors
/// Fails when the control device is missing or may not be opened.
pub(crate) fn host_driver() -> Result<()> {
    if !Path::new(CONTROL_DEVICE).exists()
        && let Some(modprobe) = find_program("modprobe")
    {
        // A host that has the module but has not loaded it yet. Its refusal shows below.
        let _ = crate::process::output(std::process::Command::new(modprobe).args(["-q", "ublk_drv"]));
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(CONTROL_DEVICE)
        .map(drop)
        .with_context(|| format!("cannot open {CONTROL_DEVICE}"))
}

/// Where jobs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Host,
    Machine(Kernel),
}

impl Place {
    /// The machine when a kernel is asked for; else the host if it can; else the machine with the older
    /// kernel.
    pub(crate) fn choose(asked: Option<Kernel>) -> Self {
        match (asked, host_driver()) {
            (Some(kernel), _) => Self::Machine(kernel),
            (None, Ok(())) => Self::Host,
            (None, Err(_)) => Self::Machine(Kernel::V6_12),
        }
    }

    /// As [`Self::choose`], but where it comes to the machine, that with each kernel: their data paths are
    /// not the same.
    pub(crate) fn choose_all(asked: Option<Kernel>) -> Vec<Self> {
        match (asked, Self::choose(asked)) {
            (None, Self::Machine(_)) => Kernel::ALL.map(Self::Machine).to_vec(),
            (_, place) => vec![place],
        }
    }

    /// What tells its lines from those of another place.
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Machine(kernel) => kernel.series(),
        }
    }

    /// Sees to it that everything for this place is installed and fetched.
    ///
    /// # Errors
    /// Fails as setup does.
    pub(crate) fn prepare(self) -> Result<()> {
        match self {
            Self::Host => setup::ensure(Kernels::HostOnly),
            Self::Machine(kernel) => setup::ensure(Kernels::Fetch(&[kernel])),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("this host"),
            Self::Machine(kernel) => write!(f, "a virtual machine with Linux {kernel}"),
        }
    }
}

/// A script and what it needs.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    script: &'a str,
    variables: Vec<(String, String)>,
    programs: Vec<PathBuf>,
    disks: Vec<Disk>,
    pub console: Console,
    /// The machine's processor; chosen by a trial boot when None.
    pub accel: Option<Accel>,
    /// What the machine counts beside.
    pub counter: Option<Counter>,
    pub scratch_gib: u32,
    pub time_limit: Duration,
    pub results: Option<PathBuf>,
}

impl<'a> Job<'a> {
    pub(crate) const fn new(script: &'a str, time_limit: Duration) -> Self {
        Self {
            script,
            variables: Vec::new(),
            programs: Vec::new(),
            disks: Vec::new(),
            console: Console::Streamed,
            accel: None,
            counter: None,
            scratch_gib: 16,
            time_limit,
            results: None,
        }
    }

    /// Puts a program, or another file of the host, into the first directory of the script's PATH.
    pub(crate) fn program(mut self, path: &Path) -> Self {
        self.programs.push(path.to_owned());
        self
    }

    /// Sets a variable of the script.
    pub(crate) fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Shows the script a file as a disk, in `$DISK_NAME`.
    pub(crate) fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Runs the script to its end.
    ///
    /// # Errors
    /// Fails when it cannot be run. A script that fails is not an error here.
    pub(crate) fn run(&self, place: Place) -> Result<Finished> {
        match place {
            Place::Host => self.run_on_host(),
            Place::Machine(kernel) => self.run_in_machine(kernel),
        }
    }

    fn run_in_machine(&self, kernel: Kernel) -> Result<Finished> {
        let kernel =
            kernel.unpacked()?.context("the kernel has not been fetched; run `cargo xtask setup`")?;
        let mut payload = Tree::default();
        for program in &self.programs {
            vm::send(&mut payload, program, None)?;
        }
        payload.text("payload/script", self.script, 0o755);
        payload.text("payload/run", &self.machine_prologue(), 0o755);
        let machine = Machine {
            accel: match self.accel {
                Some(accel) => accel,
                None => Accel::detect(&kernel)?,
            },
            kernel: &kernel,
            memory_mib: MEMORY_MIB,
            scratch_gib: self.scratch_gib,
            disks: self.disks.clone(),
            report: None,
            counter: self.counter.clone(),
            console: self.console,
            time_limit: self.time_limit,
            results: self.results.clone(),
        };
        machine.run(&payload)
    }

    fn machine_prologue(&self) -> String {
        let mut text = String::from("#!/bin/bash\n");
        for (name, value) in &self.variables {
            text += &format!("export {name}={}\n", quote(value));
        }
        for disk in &self.disks {
            text += &format!("export DISK_{0}=/dev/disk/{0}\n", disk.name);
        }
        text + "exec bash /payload/script\n"
    }

    fn run_on_host(&self) -> Result<Finished> {
        let base = workspace::cache()?;
        let dir = tempfile::Builder::new().prefix("host-run-").tempdir_in(&base)?;
        let (bin, scratch, results) =
            (dir.path().join("bin"), dir.path().join("scratch"), dir.path().join("results"));
        for sub in [&bin, &scratch, &results] {
            fs::create_dir(sub)?;
        }
        for program in &self.programs {
            symlink(program, bin.join(program.file_name().context("a program without a name")?))?;
        }
        let script = dir.path().join("script");
        fs::write(&script, self.script)?;

        // timeout(1) stops the script together with its children.
        let mut shell = program("timeout")?;
        let [patience, limit] = [UNDOING, self.time_limit].map(|time| time.as_secs().to_string());
        shell.arg(format!("--kill-after={patience}")).args([&limit, "bash"]).arg(&script);
        shell
            .env("PATH", host_path(&bin)?)
            .env("SCRATCH", &scratch)
            .env("RESULTS", &results)
            .current_dir(&scratch);
        shell.envs(self.variables.iter().map(|(name, value)| (name, value)));
        shell.envs(self.disks.iter().map(|disk| (format!("DISK_{}", disk.name), &disk.path)));
        let mut child = start(shell.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        let output = child.stdout.take().map(|pipe| collect(pipe, self.console));
        let status = child.wait()?;
        let output = output.map_or_else(Vec::new, |thread| thread.join().unwrap_or_default());

        if let Some(wanted) = &self.results {
            fs::create_dir_all(wanted)?;
            run(program("cp")?.arg("-R").arg(results.join(".")).arg(wanted))?;
        }
        Ok(Finished { status: status.code().or(status.signal()).unwrap_or(1), output })
    }
}

/// `bin` before the caller's PATH, and the administration directories behind it.
fn host_path(bin: &Path) -> Result<OsString> {
    let ours = env::var_os("PATH").unwrap_or_default();
    let dirs = std::iter::once(bin.to_owned())
        .chain(env::split_paths(&ours))
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    env::join_paths(dirs).context("PATH has a part that cannot be repeated")
}
