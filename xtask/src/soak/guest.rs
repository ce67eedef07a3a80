//! A guest whose root file system is on /dev/ublkb0, and then on the same image through QEMU's own driver: it
//! must find there what it has left, and QEMU's tools nothing to complain of. guest/guest.sh is the story.
//!
//! It always runs in the machine, so the guest is a machine in a machine. Its kernel is the outer one's.

use super::LIB;
use crate::{
    kernel::Kernel,
    place::{Job, Place},
    process::program,
    test::Count,
    vm::machine::{Access, Disk},
    workspace::build_release,
};
use anyhow::{Context, Result, ensure};
use std::{path::Path, time::Duration};

const STORY: &str = include_str!("../../guest/guest.sh");
/// Emulated in an emulated machine, a boot takes some minutes.
const LIMIT: Duration = Duration::from_secs(3600);
/// What QEMU's PC starts from, and where Debian has it.
const FIRMWARE: [&str; 3] =
    ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/linuxboot_dma.bin", "/usr/share/qemu/kvmvapic.bin"];

/// Both boots.
///
/// # Errors
/// What did not hold.
pub(super) fn lane(kernel: Kernel) -> Result<Count> {
    let image = kernel.unpacked()?.context("setup left no kernel")?.image;
    let qemu = program("qemu-system-x86_64")?;
    let script = format!("{LIB}{STORY}");
    let mut job = Job::new(&script, LIMIT)
        .program(&build_release("ublk-qcow2", "ublk-qcow2")?)
        .program(Path::new(qemu.get_program()))
        .disk(Disk { name: "kernel".to_owned(), path: image, access: Access::ReadOnly });
    for file in FIRMWARE {
        ensure!(
            Path::new(file).exists(),
            "QEMU's firmware {file} is missing; Debian's qemu-system-x86 brings it"
        );
        job = job.program(Path::new(file));
    }
    let finished = job.run(Place::Machine(kernel))?;
    ensure!(finished.status == 0, "the story ended with status {}", finished.status);
    Ok(Count { passed: 2, failed: 0 })
}
