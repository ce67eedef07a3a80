//! `cargo xtask vm`: a shell, or one command, in a throw-away virtual machine whose kernel has a ublk driver.
//!
//! This file owns the command line; `machine` owns a run, `initramfs` and `tree` the guest's files, `accel`
//! the choice between KVM and emulation.

pub(crate) mod accel;
mod cpio;
mod initramfs;
pub(crate) mod machine;
pub(crate) mod tree;

use crate::{
    kernel::Kernel,
    process::quote,
    setup::{self, Kernels},
    timing, workspace,
};
use accel::Accel;
use anyhow::{Context, Result, bail};
use machine::{Access, Console, Disk, Machine};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};
use tree::Tree;

/// A shell's: a month.
const FOR_EVER: Duration = Duration::from_secs(30 * 86_400);

/// Options of `cargo xtask vm`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The guest's kernel
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: Kernel,
    /// Bring a host file or directory along, at /payload/bin/NAME or at DEST (programs bring their libraries)
    #[arg(long, value_name = "FILE[:DEST]")]
    send: Vec<String>,
    /// Attach a raw host file as a read-only disk, /dev/disk/NAME in the guest
    #[arg(long, value_name = "NAME=FILE")]
    disk: Vec<String>,
    /// Receive what the command leaves in /results
    #[arg(long, value_name = "DIR")]
    results: Option<PathBuf>,
    /// Build ublk-qcow2 in release mode and bring it along
    #[arg(long)]
    build: bool,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 4096)]
    memory: u32,
    /// Size of the sparse disk behind /scratch, in GiB
    #[arg(long, default_value_t = 16)]
    scratch: u32,
    /// Stop the machine after this time, as 90s, 20m or 2h (a bare number is seconds; a shell has no limit)
    #[arg(long, value_name = "TIME", value_parser = timing::or_seconds, default_value = "10m")]
    time_limit: Duration,
    /// Let guest time count instructions (slow, repeatable)
    #[arg(long)]
    count: bool,
    /// What to run, as a shell would read it; without it, a shell
    #[arg(last = true)]
    command: Vec<String>,
}

/// Runs `cargo xtask vm`; the guest command's exit status becomes ours.
///
/// # Errors
/// Fails when the machine cannot be prepared or does not run.
pub(crate) fn command(options: &Options) -> Result<ExitCode> {
    setup::ensure(Kernels::Fetch(&[options.kernel]))?;
    let kernel = options.kernel.unpacked()?.context("setup left no kernel")?;
    let interactive = options.command.is_empty();
    let machine = Machine {
        accel: if options.count { Accel::InstructionCount } else { Accel::detect(&kernel)? },
        kernel: &kernel,
        memory_mib: options.memory,
        scratch_gib: options.scratch,
        disks: options.disk.iter().map(|word| parse_disk(word)).collect::<Result<_>>()?,
        report: None,
        counter: None,
        console: if interactive { Console::Interactive } else { Console::Streamed },
        time_limit: if interactive { FOR_EVER } else { options.time_limit },
        results: options.results.clone(),
    };
    let finished = machine.run(&payload(options, interactive)?)?;
    Ok(ExitCode::from(u8::try_from(finished.status).unwrap_or(1)))
}

fn payload(options: &Options, interactive: bool) -> Result<Tree> {
    let mut tree = Tree::default();
    for word in &options.send {
        let (source, dest) =
            word.split_once(':').map_or((word.as_str(), None), |(source, dest)| (source, Some(dest)));
        send(&mut tree, Path::new(source), dest)?;
    }
    if options.build {
        send(&mut tree, &workspace::build_release("ublk-qcow2", "ublk-qcow2")?, None)?;
    }
    if interactive {
        tree.text("payload/interactive", "", 0o644);
        tree.text("payload/run", "#!/bin/sh\nexec bash -l\n", 0o755);
    } else {
        // As ssh does it: the words are joined and read by the guest's shell. One word may be a whole script.
        let line = if let [script] = options.command.as_slice() {
            script.clone()
        } else {
            options.command.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ")
        };
        tree.text("payload/run", &format!("#!/bin/bash\n{line}\n"), 0o755);
    }
    Ok(tree)
}

/// Adds a host file or directory to the payload, programs with their libraries.
///
/// # Errors
/// Fails when it does not exist.
pub(crate) fn send(tree: &mut Tree, source: &Path, dest: Option<&str>) -> Result<()> {
    let name =
        source.file_name().with_context(|| format!("{} has no name", source.display()))?.to_string_lossy();
    let dest = dest.map_or_else(|| format!("payload/bin/{name}"), str::to_owned);
    if source.is_dir() {
        return tree.host_directory(&dest, source);
    }
    if !source.is_file() {
        bail!("{} is not a file", source.display());
    }
    tree.file(&dest, source);
    tree.libraries_of(&[source.to_owned()])
}

fn parse_disk(word: &str) -> Result<Disk> {
    let (name, path) = word.split_once('=').with_context(|| format!("`{word}` is not NAME=FILE"))?;
    Ok(Disk { name: name.to_owned(), path: PathBuf::from(path), access: Access::ReadOnly })
}
