//! apt under a private state: its own source list, package lists and cache, the machine's own left as they
//! are.
//!
//! Two states exist. `host` repeats all of the machine's sources and adds `<codename>-backports`; packages
//! are installed through it. `kernels` holds only the suites that the kernels come from; packages are
//! downloaded and unpacked from it, never installed. Signatures are always verified, with the keys of the
//! machine's Debian entry.

pub(crate) mod sources;

use crate::{
    process::{capture, find_program, output, program, run, said, show},
    workspace,
};
use anyhow::{Context, Result, bail};
use sources::Source;
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Names a Debian mirror, for machines whose own apt sources have none.
pub(crate) const MIRROR_ENV: &str = "UBLK_QCOW2_DEBIAN_MIRROR";
const ETC_APT: &str = "/etc/apt";
const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What a fetch of lists puts up with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tolerance {
    /// The machine's other sources may be out of order: that is not our business.
    ForeignSourcesMayFail,
    /// Every list is one that we need.
    None,
}

/// A private apt state in one directory of the cache.
pub(crate) struct PrivateApt {
    dir: PathBuf,
}

impl PrivateApt {
    /// The machine's own sources plus its release's backports; its lists are fetched anew.
    ///
    /// # Errors
    /// Fails when there is no apt, no Debian source, or the lists cannot be fetched.
    pub(crate) fn host() -> Result<Self> {
        let apt = Self::create("host")?;
        apt.copy_machine_sources()?;
        match debian_codename() {
            Some(codename) => {
                apt.update_with(
                    debian_source()?,
                    &[&format!("{codename}-backports")],
                    Tolerance::ForeignSourcesMayFail,
                )?;
            }
            None => apt.update(Tolerance::ForeignSourcesMayFail)?,
        }
        Ok(apt)
    }

    /// Only `suites`, from the mirror of the machine's Debian entry; the lists are fetched anew.
    ///
    /// # Errors
    /// Fails as [`PrivateApt::host`] does.
    pub(crate) fn only(name: &str, suites: &[&str]) -> Result<Self> {
        let apt = Self::create(name)?;
        apt.update_with(debian_source()?, suites, Tolerance::None)?;
        Ok(apt)
    }

    /// Names of the packages that match the extended regular expression `pattern`.
    ///
    /// # Errors
    /// Fails when apt-cache does.
    pub(crate) fn search(&self, pattern: &str) -> Result<Vec<String>> {
        let text = capture(self.command("apt-cache")?.args(["search", "--names-only", pattern]))?;
        Ok(text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
    }

    /// Downloads `packages` into `into` and checks them against the signed lists.
    ///
    /// # Errors
    /// Fails when a package is unknown or cannot be fetched.
    fn download(&self, packages: &[String], into: &Path) -> Result<()> {
        capture(self.command("apt-get")?.arg("download").args(packages).current_dir(into)).map(drop)
    }

    /// Downloads `packages` and unpacks them, without installing them, below `root`.
    ///
    /// # Errors
    /// Fails when a package is unknown, cannot be fetched or cannot be unpacked.
    pub(crate) fn unpack(&self, packages: &[String], root: &Path) -> Result<()> {
        let downloads = tempfile::tempdir_in(&self.dir)?;
        self.download(packages, downloads.path())?;
        unpack_all(downloads.path(), root)
    }

    /// Like [`PrivateApt::unpack`], with all that the packages depend on, whatever this machine has
    /// installed. What every Debian has (sh, coreutils) counts only if a package asks for it by name.
    ///
    /// # Errors
    /// As [`PrivateApt::unpack`].
    pub(crate) fn unpack_with_dependencies(&self, packages: &[&str], root: &Path) -> Result<()> {
        let downloads = tempfile::tempdir_in(&self.dir)?;
        let nothing_installed = downloads.path().join("status");
        fs::write(&nothing_installed, "")?;
        let archives = downloads.path().join("archives");
        fs::create_dir_all(archives.join("partial"))?;
        let mut install = self.command("apt-get")?;
        install
            .arg(format!("-oDir::State::status={}", nothing_installed.display()))
            .arg(format!("-oDir::Cache::archives={}/", archives.display()))
            .args(["-oDebug::NoLocking=1", "-q", "-y", "--no-install-recommends", "--download-only"]);
        capture(install.arg("install").args(packages))?;
        unpack_all(&archives, root)
    }

    /// Installs `packages` on this machine, from `suite` when one is named.
    ///
    /// # Errors
    /// Fails without root, naming the command that a person with root could run.
    pub(crate) fn install(&self, packages: &[&str], suite: Option<&str>) -> Result<()> {
        let mut install = self.command("apt-get")?;
        install.args(["-q", "-y", "--no-install-recommends", "--no-remove", "-oDPkg::Lock::Timeout=300"]);
        install.args(suite.map(|suite| format!("-t={suite}")));
        install.arg("install").args(packages);
        // apt's own account of its work is of interest only when it fails.
        capture(as_root(&install)?.env("DEBIAN_FRONTEND", "noninteractive")).map(drop)
    }

    fn create(name: &str) -> Result<Self> {
        if find_program("apt-get").is_none() {
            bail!("this machine has no apt");
        }
        let dir = workspace::cache()?.join("apt").join(name);
        let apt = Self { dir };
        match fs::remove_dir_all(apt.parts()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        for sub in ["parts", "lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(apt.dir.join(sub))
                .with_context(|| format!("cannot create {}", apt.dir.display()))?;
        }
        Ok(apt)
    }

    fn copy_machine_sources(&self) -> Result<()> {
        for file in sources::source_files(Path::new(ETC_APT))? {
            if let Some(name) = file.file_name() {
                fs::copy(&file, self.parts().join(name))
                    .with_context(|| format!("cannot copy {}", file.display()))?;
            }
        }
        Ok(())
    }

    /// Adds `suites` of `source` and fetches the lists. Where the installed keyring is older than a suite,
    /// its successor is used: the machine's own release carries it, signed by a key that the machine does
    /// have.
    fn update_with(&self, source: Source, suites: &[&str], tolerance: Tolerance) -> Result<()> {
        self.write_source(&source.with_suites(suites))?;
        match self.update(tolerance) {
            Err(error) if format!("{error:#}").contains("NO_PUBKEY") => {}
            result => return result,
        }
        let newer = Source { signed_by: Some(newer_keyring()?), ..source };
        self.write_source(&newer.with_suites(suites))?;
        self.update(tolerance)
    }

    fn parts(&self) -> PathBuf {
        self.dir.join("parts")
    }

    fn write_source(&self, deb822: &str) -> Result<()> {
        let path = self.parts().join("ublk-qcow2-xtask.sources");
        fs::write(&path, deb822).with_context(|| format!("cannot write {}", path.display()))
    }

    fn update(&self, tolerance: Tolerance) -> Result<()> {
        let mut update = self.command("apt-get")?;
        if tolerance == Tolerance::None {
            update.arg("-oAPT::Update::Error-Mode=any");
        }
        update.args(["-qq", "-oAcquire::Retries=3", "update"]);
        let finished = output(&mut update)?;
        if !finished.status.success() {
            bail!("`{}` failed:\n{}", show(&update), said(&finished));
        }
        Ok(())
    }

    /// `apt-get` or `apt-cache` with every path of its state redirected. No update hook of the machine runs.
    fn command(&self, tool: &str) -> Result<Command> {
        let mut command = program(tool)?;
        let dir = |sub: &str| self.dir.join(sub).display().to_string();
        command
            .arg("-oDir::Etc::SourceList=/dev/null")
            .arg(format!("-oDir::Etc::SourceParts={}", dir("parts")))
            .arg(format!("-oDir::State::Lists={}", dir("lists")))
            .arg(format!("-oDir::Cache={}", dir("cache")))
            .arg("-oAPT::Sandbox::User=root"); // the cache may be where apt's own user cannot look
        command.env("LC_ALL", "C");
        Ok(command)
    }
}

/// Unpacks every package of a directory below `root`.
fn unpack_all(packages: &Path, root: &Path) -> Result<()> {
    for entry in fs::read_dir(packages)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run(program("dpkg-deb")?.arg("-x").arg(path).arg(root))?;
        }
    }
    Ok(())
}

/// The code name when this is Debian itself: `bookworm`, `trixie`.
pub(crate) fn debian_codename() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"').to_owned())
    };
    if field("ID")? == "debian" { field("VERSION_CODENAME") } else { None }
}

/// The installed version of an apt package, or None.
pub(crate) fn installed_version(package: &str) -> Option<String> {
    let mut query = program("dpkg-query").ok()?;
    let text = capture(query.args(["-W", "-f=${db:Status-Status} ${Version}", package])).ok()?;
    text.strip_prefix("installed ").map(str::to_owned)
}

/// `command`, or `sudo command` when we are not root and sudo asks for no password.
fn as_root(command: &Command) -> Result<Command> {
    if is_root() {
        let mut same = Command::new(command.get_program());
        same.args(command.get_args());
        return Ok(same);
    }
    if let Some(sudo) = find_program("sudo")
        && output(Command::new(&sudo).args(["-n", "true"])).is_ok_and(|done| done.status.success())
    {
        let mut with = Command::new(sudo);
        with.args(["-n", "DEBIAN_FRONTEND=noninteractive"])
            .arg(command.get_program())
            .args(command.get_args());
        return Ok(with);
    }
    bail!("installing packages needs root; run this as root, then repeat:\n  {}", show(command))
}

/// Whether we run as root, by the owner of our own /proc entry.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// The machine's own Debian entry, or the mirror that the user named.
fn debian_source() -> Result<Source> {
    if let Ok(mirror) = env::var(MIRROR_ENV) {
        return Ok(Source {
            uris: vec![mirror],
            suites: Vec::new(),
            signed_by: Some(DEBIAN_KEYRING.to_owned()),
        });
    }
    let codename = debian_codename().with_context(|| {
        format!("this is not Debian: set {MIRROR_ENV} to a Debian mirror and install debian-archive-keyring")
    })?;
    let found = sources::read(&sources::source_files(Path::new(ETC_APT))?)?
        .into_iter()
        .find(|source| source.suites.contains(&codename))
        .with_context(|| {
            format!("no source in {ETC_APT} has the suite `{codename}`; set {MIRROR_ENV} to a Debian mirror")
        })?;
    Ok(found)
}

/// The path of the newest archive keyring of the machine's own release, unpacked in the cache.
fn newer_keyring() -> Result<String> {
    let apt = PrivateApt::create("keyring")?;
    apt.copy_machine_sources()?;
    apt.update(Tolerance::ForeignSourcesMayFail)?;
    let root = apt.dir.join("unpacked");
    apt.unpack(&["debian-archive-keyring".to_owned()], &root)?;
    let keyrings = root.join("usr/share/keyrings");
    ["debian-archive-keyring.gpg", "debian-archive-keyring.pgp"]
        .iter()
        .map(|name| keyrings.join(name))
        .find(|path| path.exists())
        .map(|path| path.display().to_string())
        .context("the debian-archive-keyring package holds no keyring")
}
