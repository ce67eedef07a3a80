//! The real `qemu-io`: writes into images behind our back, and reads them.
//!
//! A [`Script`] gathers commands and does the same to a [`Mirror`]; one process carries them out.

use crate::{
    command::{TOOL_LIMIT, run},
    content::tagged,
    disk::{Op, SECTOR},
    mirror::Mirror,
    qemu_img::Format,
};
use anyhow::{Result, bail};
use std::{fs, path::Path, process::Command};

/// Commands for one run of `qemu-io`.
#[derive(Default)]
pub struct Script {
    commands: Vec<String>,
    contents: Vec<tempfile::NamedTempFile>,
}

impl Script {
    /// Adds a command as `qemu-io` takes it.
    pub fn command(&mut self, command: impl Into<String>) -> &mut Self {
        self.commands.push(command.into());
        self
    }

    /// Writes the bytes of a mirror's range.
    ///
    /// # Errors
    /// No space for the file with the bytes.
    pub fn write(&mut self, at: u64, bytes: &[u8], dir: &Path) -> Result<&mut Self> {
        let file = tempfile::NamedTempFile::new_in(dir)?;
        fs::write(file.path(), bytes)?;
        let command = format!("write -s {} {at} {}", file.path().display(), bytes.len());
        self.contents.push(file);
        Ok(self.command(command))
    }

    /// Carries the commands out.
    ///
    /// # Errors
    /// One of them failed; `qemu-io` goes on after failures, so what it says is searched for them.
    pub fn run(&self, image: &Path, format: Format) -> Result<String> {
        if self.commands.is_empty() {
            return Ok(String::new());
        }
        let mut command = Command::new("qemu-io");
        command.args(["-f", format.name(), "-d", "unmap"]);
        for one in &self.commands {
            command.args(["-c", one]);
        }
        let finished = run(command.arg(image), TOOL_LIMIT)?.success()?;
        let text = finished.text();
        let bad = |line: &&str| ["failed", "rror", "invalid"].iter().any(|word| line.contains(word));
        match text.lines().find(bad) {
            Some(line) => bail!("qemu-io on {}: {line}", image.display()),
            None => Ok(text),
        }
    }
}

/// Writes, zeroes and discards at random places, in the image and in its mirror. `first_number`
/// numbers the writes; `discards` says whether a discard makes whole clusters read as zeros.
///
/// # Errors
/// `qemu-io` fails.
pub fn scribble(
    image: &Path,
    mirror: &mut Mirror,
    rng: &mut fastrand::Rng,
    first_number: u64,
    discards: bool,
) -> Result<()> {
    let dir = image.parent().unwrap_or(Path::new("."));
    let mut script = Script::default();
    for number in first_number..first_number + 14 {
        let op = random_op(mirror, rng, number, discards);
        let (at, len) = op.range();
        match &op {
            Op::Write { bytes, .. } => {
                script.write(at, bytes, dir)?;
            }
            Op::Zero { unmap, .. } => {
                script.command(format!("write -z {} {at} {len}", if *unmap { "-u" } else { "" }));
            }
            _ => {
                script.command(format!("discard {at} {len}"));
            }
        }
        mirror.apply(&op);
    }
    script.run(image, Format::Qcow2).map(drop)
}

fn random_op(mirror: &Mirror, rng: &mut fastrand::Rng, number: u64, discards: bool) -> Op {
    let sectors = mirror.size() / SECTOR;
    // The last write of a round reaches the end of the disk; most places stay untouched.
    let at = if number % 14 == 13 { sectors - 1 } else { rng.u64(0..sectors) };
    let most = [8, mirror.cluster() / SECTOR * 2, 1024][rng.usize(0..3)];
    let len = rng.u64(1..=most).min(sectors - at);
    let (at, len) = (at * SECTOR, len * SECTOR);
    match rng.u32(0..10) {
        0 => Op::Zero { at, len, unmap: false },
        1 => Op::Zero { at, len, unmap: true },
        // QEMU takes a discard in whole clusters, as we do.
        2 if discards => Op::Discard { at, len },
        _ => Op::Write { at, bytes: tagged(at, len, number).into() },
    }
}
