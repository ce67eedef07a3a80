//! Chooses how the guest's processor is provided: KVM where a trial boot proves it, emulation elsewhere.
//!
//! A usable-looking /dev/kvm proves nothing: on some machines it opens and does not boot ordinary kernels. So
//! it is tried once per boot of this machine and the verdict is kept in the cache.

use super::{
    initramfs,
    machine::{Console, Machine},
    tree::Tree,
};
use crate::{kernel::UnpackedKernel, workspace};
use anyhow::{Context, Result};
use std::{fs, fs::OpenOptions, time::Duration};

/// A KVM guest is up within two seconds; one that is not after this never will be.
const TRIAL_LIMIT: Duration = Duration::from_secs(15);

/// How guest instructions are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accel {
    Kvm,
    /// Emulation, one host thread per guest processor.
    Emulated,
    /// Emulation in which guest time counts instructions, 1 ns each, over all processors together.
    InstructionCount,
}

impl Accel {
    /// The better of KVM and emulation on this machine. The trial boots `kernel`.
    ///
    /// # Errors
    /// Fails when no machine can be tried, or the verdict cannot be kept.
    pub(crate) fn detect(kernel: &UnpackedKernel) -> Result<Self> {
        if OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(Self::Emulated);
        }
        let boot =
            fs::read_to_string("/proc/sys/kernel/random/boot_id").context("this machine has no boot id")?;
        let _lock = workspace::lock("accel")?;
        let path = workspace::cache()?.join("accel");
        let known = fs::read_to_string(&path).unwrap_or_default();
        match known.strip_prefix(boot.trim()).map(str::trim) {
            Some("kvm") => return Ok(Self::Kvm),
            Some("emulated") => return Ok(Self::Emulated),
            _ => {}
        }
        initramfs::ensure(kernel)?; // what fails here says nothing about KVM
        let verdict = trial(kernel)?;
        let word = if verdict == Self::Kvm { "kvm" } else { "emulated" };
        fs::write(&path, format!("{} {word}\n", boot.trim()))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(verdict)
    }

    pub(super) fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host", "-smp", "2"],
            Self::Emulated => &["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"],
            Self::InstructionCount => {
                &["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-cpu", "max", "-smp", "2"]
            }
        }
    }
}

/// What becomes of a machine with KVM. That none could be switched on, for want of room or of QEMU, says nothing about
/// that, and must not be kept as a verdict.
fn trial(kernel: &UnpackedKernel) -> Result<Accel> {
    let machine = Machine {
        kernel,
        accel: Accel::Kvm,
        memory_mib: 1024,
        scratch_gib: 1,
        disks: Vec::new(),
        report: None,
        counter: None,
        console: Console::Silent,
        time_limit: TRIAL_LIMIT,
        results: None,
    };
    let mut payload = Tree::default();
    payload.text("payload/run", "#!/bin/sh\nexit 0\n", 0o755);
    let running = machine.start(&payload).context("cannot try whether /dev/kvm boots a kernel")?;
    Ok(match running.finish() {
        Ok(finished) if finished.status == 0 => Accel::Kvm,
        _ => {
            eprintln!("note: /dev/kvm is there but boots no kernel; the machine is emulated");
            Accel::Emulated
        }
    })
}
