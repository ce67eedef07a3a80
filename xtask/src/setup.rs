//! `cargo xtask setup`: finds out what this machine lacks and installs exactly that.
//!
//! One table says what the project needs, how its presence is seen and which Debian package brings it.
//! Nothing is asked of the network when nothing is missing. Does not know what the tools are used for.

use crate::{
    apt::{self, PrivateApt},
    kernel::Kernel,
    place,
    process::find_program,
    workspace,
};
use anyhow::{Context, Result, bail};
use std::{env, fs, path::Path};

/// How the presence of a requirement is seen, whoever installed it.
#[derive(Debug, Clone, Copy)]
enum Probe {
    Program(&'static str),
    Libclang,
}

/// Where Debian's package for it is taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Group {
    /// The machine's own release.
    Plain,
    /// QEMU: its packages must all come from the same suite.
    Qemu,
}

struct Requirement {
    package: &'static str,
    probe: Probe,
    group: Group,
}

const fn plain(package: &'static str, probe: Probe) -> Requirement {
    Requirement { package, probe, group: Group::Plain }
}

const fn qemu(package: &'static str, probe: Probe) -> Requirement {
    Requirement { package, probe, group: Group::Qemu }
}

/// What building and testing need everywhere.
const ALWAYS: &[Requirement] = &[
    plain("fio", Probe::Program("fio")),
    plain("xfsprogs", Probe::Program("mkfs.xfs")),
    plain("e2fsprogs", Probe::Program("mkfs.ext4")),
    plain("kmod", Probe::Program("depmod")),
    plain("dmsetup", Probe::Program("dmsetup")),
    plain("mount", Probe::Program("losetup")),
    plain("fdisk", Probe::Program("sfdisk")),
    qemu("qemu-utils", Probe::Program("qemu-img")),
];

/// What the virtual machine needs besides.
const MACHINE: &[Requirement] = &[
    plain("busybox-static", Probe::Program("busybox")),
    plain("xz-utils", Probe::Program("xz")),
    qemu("qemu-system-x86", Probe::Program("qemu-system-x86_64")),
];

/// What building rublk needs, whose bindings are made of the kernel's header.
const PEERS: &[Requirement] = &[plain("libclang-dev", Probe::Libclang)];

/// Which kernels setup fetches, when it fetches any.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kernels<'a> {
    /// None: the host's own driver serves.
    HostOnly,
    /// These, for the virtual machine.
    Fetch(&'a [Kernel]),
}

/// Options of `cargo xtask setup`.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// Prepare the virtual machine even where the host has a usable ublk driver
    #[arg(long)]
    vm: bool,
}

/// Runs `cargo xtask setup`: everything for both kernels.
///
/// # Errors
/// Fails when something is missing and cannot be installed; the error says which command would.
pub(crate) fn command(options: &Options) -> Result<()> {
    let host = place::host_driver();
    match (&host, options.vm) {
        (Ok(()), false) => ensure(Kernels::HostOnly)?,
        _ => ensure(Kernels::Fetch(&Kernel::ALL))?,
    }
    println!("setup complete: cache in {}", workspace::cache()?.display());
    Ok(())
}

/// Sees to it that everything for `kernels` is there. Quick when it is.
///
/// # Errors
/// Fails as [`command`] does.
pub(crate) fn ensure(kernels: Kernels<'_>) -> Result<()> {
    match kernels {
        Kernels::HostOnly => provide(&[ALWAYS], &[]),
        Kernels::Fetch(wanted) => provide(&[ALWAYS, MACHINE], wanted),
    }
}

/// Sees to it that the programs to compare with can be built.
///
/// # Errors
/// Fails as [`command`] does.
pub(crate) fn ensure_for_peers() -> Result<()> {
    provide(&[PEERS], &[])
}

fn provide(tables: &[&'static [Requirement]], wanted: &[Kernel]) -> Result<()> {
    if missing(tables).is_empty() && kernels_to_fetch(wanted)?.is_empty() {
        return Ok(());
    }

    let _lock = workspace::lock("setup")?;
    install(&missing(tables))?; // asked again: another xtask may have done it while we waited
    let still: Vec<_> = missing(tables).iter().map(|requirement| requirement.package).collect();
    if !still.is_empty() {
        bail!("installed, and still not found: {}", still.join(", "));
    }
    for kernel in kernels_to_fetch(wanted)? {
        println!("setup: fetching Linux {kernel}");
        let fetched = kernel.fetch().with_context(|| format!("cannot fetch Linux {kernel}"))?;
        println!("setup: Linux {}", fetched.release);
    }
    Ok(())
}

fn kernels_to_fetch(wanted: &[Kernel]) -> Result<Vec<Kernel>> {
    let mut to_fetch = Vec::new();
    for &kernel in wanted {
        if kernel.unpacked()?.is_none() {
            to_fetch.push(kernel);
        }
    }
    Ok(to_fetch)
}

fn missing(tables: &[&'static [Requirement]]) -> Vec<&'static Requirement> {
    tables.iter().copied().flatten().filter(|requirement| !is_present(requirement.probe)).collect()
}

fn install(missing: &[&Requirement]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let names = |group| missing.iter().filter(|r| r.group == group).map(|r| r.package).collect::<Vec<_>>();
    let all: Vec<_> = missing.iter().map(|requirement| requirement.package).collect();
    println!("setup: installing {}", all.join(" "));
    let by_hand = || format!("install by hand what these Debian packages bring: {}", all.join(" "));
    let apt = PrivateApt::host().with_context(by_hand)?;

    let plain = names(Group::Plain);
    if !plain.is_empty() {
        apt.install(&plain, None)?;
    }
    let qemu = names(Group::Qemu);
    if !qemu.is_empty() {
        apt.install(&qemu, qemu_suite().as_deref())?;
    }
    Ok(())
}

/// The suite that QEMU comes from: that of the QEMU packages already here, so that none of them is replaced
/// or removed; on a Debian 12 without any, backports, because its own QEMU is of 2022.
fn qemu_suite() -> Option<String> {
    let codename = apt::debian_codename()?;
    let installed = ["qemu-utils", "qemu-system-x86"].into_iter().find_map(apt::installed_version);
    let backports = installed.map_or(codename == "bookworm", |version| version.contains("~bpo"));
    backports.then(|| format!("{codename}-backports"))
}

fn is_present(probe: Probe) -> bool {
    match probe {
        Probe::Program(name) => find_program(name).is_some(),
        Probe::Libclang => env::var_os("LIBCLANG_PATH").is_some() || has_libclang(),
    }
}

/// Looks where clang-sys will look: the library directories, and those of each LLVM.
fn has_libclang() -> bool {
    let llvm = fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path().join("lib"));
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib"]
        .into_iter()
        .map(|dir| Path::new(dir).to_owned())
        .chain(llvm)
        .any(|dir| holds_libclang(&dir))
}

/// `libclang.so`, `libclang-14.so.1`, … but not `libclang-cpp.so`, which is another library.
fn holds_libclang(dir: &Path) -> bool {
    fs::read_dir(dir).into_iter().flatten().flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("libclang") && name.contains(".so") && !name.starts_with("libclang-cpp")
    })
}
