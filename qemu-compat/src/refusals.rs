//! What a user does wrong, and what the program must say then.
//!
//! Each refusal is an image or a command line, with words that the message must contain. The
//! program must fail, name the cause, print no device and leave none behind.

use crate::{
    command::{Finished, TOOL_LIMIT, run},
    device::{Binary, existing, free_number},
    qemu_img,
};
use anyhow::{Context, Result, ensure};
use std::{
    fs::{self, File},
    os::unix::{fs::FileExt, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

/// Offset of the last byte of `incompatible_features` in a version 3 header (big-endian).
const INCOMPATIBLE_LOW_BYTE: u64 = 79;
/// Offset of `incompatible_features`' first byte, whose bits are all unknown.
const INCOMPATIBLE_HIGH_BYTE: u64 = 72;

/// A user without privileges.
const NOBODY: u32 = 65534;

/// An image that must be refused.
pub struct Refusal {
    /// What is wrong with it.
    pub name: &'static str,
    /// One of these must be in the message, in any case of letters.
    pub words: &'static [&'static str],
    make: fn(&Path) -> Result<PathBuf>,
}

/// The images that are refused at `add`.
pub const REFUSALS: &[Refusal] = &[
    Refusal { name: "missing", words: &["no such file"], make: |dir| Ok(dir.join("missing.qcow2")) },
    Refusal { name: "directory", words: &["a directory"], make: |dir| Ok(dir.to_owned()) },
    Refusal {
        name: "not-qcow2",
        words: &["not a qcow2 image"],
        make: |dir| {
            fs::write(dir.join("image"), vec![0x5a; 1 << 20])?;
            Ok(dir.join("image"))
        },
    },
    Refusal {
        name: "empty",
        words: &["cut off"],
        make: |dir| {
            File::create(dir.join("image"))?;
            Ok(dir.join("image"))
        },
    },
    Refusal { name: "corrupt-bit", words: &["corrupt"], make: |dir| patched(dir, INCOMPATIBLE_LOW_BYTE, 2) },
    Refusal {
        name: "unknown-feature",
        words: &["incompatible", "unknown"],
        make: |dir| patched(dir, INCOMPATIBLE_HIGH_BYTE, 0x40),
    },
    Refusal {
        name: "extended-l2",
        words: &["extended l2", "subcluster"],
        make: |dir| created(dir, "extended_l2=on,cluster_size=64k"),
    },
    Refusal {
        name: "data-file",
        words: &["data file"],
        make: |dir| created(dir, &format!("data_file={}", dir.join("data.raw").display())),
    },
    Refusal { name: "luks", words: &["encrypt", "luks"], make: encrypted },
    Refusal {
        name: "backing-missing",
        words: &["base.raw"],
        make: |dir| {
            let base = dir.join("base.raw");
            fs::write(&base, vec![1; 65536])?;
            let image = dir.join("image.qcow2");
            qemu_img::create(&image, "cluster_size=64k", Some((&base, qemu_img::Format::Raw)), 1 << 20)?;
            fs::remove_file(base)?;
            Ok(image)
        },
    },
];

impl Refusal {
    /// Tries to attach the image.
    ///
    /// # Errors
    /// It was attached, the message does not name the cause, or something is left behind.
    pub fn hold(&self, binary: &Binary, dir: &Path) -> Result<()> {
        let image = (self.make)(dir).context("making the image")?;
        refuse(binary, &["add".as_ref(), image.as_os_str()], self.words)
    }
}

/// Runs a command that must fail and say one of `words`, and leave the devices as they are.
///
/// # Errors
/// It does not.
pub fn refuse(binary: &Binary, args: &[&std::ffi::OsStr], words: &[&str]) -> Result<()> {
    must_refuse(binary.command().args(args), words).map(drop)
}

/// The same for a command that was prepared in another way. Returns what it said.
///
/// # Errors
/// As for [`refuse`].
pub fn must_refuse(command: &mut Command, words: &[&str]) -> Result<String> {
    let before = existing();
    let finished = run(command, TOOL_LIMIT)?;
    let message = without_name(&finished.stderr.to_lowercase());
    ensure!(!finished.status.success(), "`{}` succeeded: {}", finished.line, finished.text());
    ensure!(
        finished.status.code().is_some(),
        "`{}` was ended by a signal: {}",
        finished.line,
        finished.text()
    );
    ensure!(!message.contains("panicked"), "`{}` panicked: {message}", finished.line);
    ensure!(finished.stdout.is_empty(), "`{}` printed {}", finished.line, finished.stdout);
    ensure!(
        words.iter().any(|word| message.contains(word)),
        "`{}` says {message:?}, which names none of {words:?}",
        finished.line
    );
    let after = existing();
    ensure!(after == before, "devices before: {before:?}, after: {after:?}");
    Ok(finished.stderr)
}

/// What was said without who says it: that alone would be one of the words now and then.
fn without_name(said: &str) -> String {
    said.lines().map(|line| line.strip_prefix("ublk-qcow2: ").unwrap_or(line)).collect::<Vec<_>>().join("\n")
}

/// What a caller brings along: a standard output that takes nothing, so that nobody learns of the device; no
/// privileges, of which one line is to tell; a limit on the size of files, which killed the server; a pipe,
/// which the server kept open.
///
/// # Errors
/// What does not hold.
pub fn surroundings(binary: &Binary, dir: &Path) -> Result<()> {
    let image = created(dir, "cluster_size=64k")?;
    let mut command = binary.script("exec \"$BINARY\" add \"$IMAGE\" >/dev/full");
    must_refuse(command.env("IMAGE", &image), &["nobody was told"])?;

    let said = must_refuse(binary.command().arg("add").arg(&image).uid(NOBODY).gid(NOBODY), &["root"])?;
    ensure!(said.lines().count() == 1, "more than one line: {said}");

    // The pipe's reader ends when nobody has it open for writing any more.
    let mut command =
        binary.script("ulimit -f 8; (exec \"$BINARY\" add \"$IMAGE\" 9>&1 >\"$IMAGE.out\") | cat");
    let added = run(command.env("IMAGE", &image), TOOL_LIMIT);
    let said = fs::read_to_string(image.with_extension("qcow2.out"))?;
    let id = said.trim().strip_prefix("/dev/ublkb").context("no device")?.to_owned();
    if let Err(error) = added.and_then(Finished::success) {
        binary.run(["del", "-n", &id])?.success()?;
        return Err(error).context("it does not let go of a pipe");
    }
    let written = fs::write(format!("/dev/ublkb{id}"), vec![1; 1 << 20]);
    binary.run(["del", "-n", &id])?.success()?;
    written.context("beyond the caller's limit")?;
    qemu_img::check_clean(&image)
}

/// Command lines that are wrong in themselves.
///
/// # Errors
/// One of them is accepted, or its message does not help.
pub fn command_lines(binary: &Binary, dir: &Path) -> Result<()> {
    let image = created(dir, "cluster_size=64k")?;
    let image = image.as_os_str();
    let add = |option: &'static str, value: &'static str, words: &[&str]| {
        refuse(binary, &["add".as_ref(), option.as_ref(), value.as_ref(), image], words)
    };
    add("-q", "0", &["0"])?;
    add("-d", "100000", &["100000"])?;
    add("--io", "fast", &["fast"])?;
    add("--cache-size", "many", &["many"])?;
    add("--no-such-option", "1", &["no-such-option"])?;
    refuse(binary, &["add".as_ref()], &["image"])?;
    refuse(binary, &["del".as_ref()], &["--all", "-n"])?;
    let number = free_number().to_string();
    for command in ["del", "list"] {
        let named = [command.as_ref(), "-n".as_ref(), number.as_ref()];
        refuse(binary, &named, &[&format!("no device {number}")])?;
    }
    refuse(binary, &["fly".as_ref()], &["fly"])
}

/// A number that is taken cannot be taken again, and the device that has it goes on.
///
/// # Errors
/// The second is accepted, or harms the first.
pub fn number_in_use(binary: &Binary, dir: &Path) -> Result<()> {
    let image = created(dir, "cluster_size=64k")?;
    let other = dir.join("other.qcow2");
    qemu_img::create(&other, "cluster_size=64k", None, 1 << 20)?;
    let number = free_number();
    let named = number.to_string();
    let device = binary.add(&["-n", &named], &image)?;
    ensure!(device.id() == number, "asked for number {number}, got {}", device.id());
    refuse(
        binary,
        &["add".as_ref(), "-n".as_ref(), named.as_ref(), other.as_os_str()],
        &["exists", "in use", "taken"],
    )?;
    ensure!(device.listed()?.state == "serving", "the first device has suffered");
    fs::read(device.path()).context("the first device cannot be read any more")?;
    device.detach()
}

fn created(dir: &Path, options: &str) -> Result<PathBuf> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, options, None, 1 << 20)?;
    Ok(image)
}

fn patched(dir: &Path, at: u64, byte: u8) -> Result<PathBuf> {
    let image = created(dir, "cluster_size=64k")?;
    File::options().write(true).open(&image)?.write_all_at(&[byte], at)?;
    Ok(image)
}

fn encrypted(dir: &Path) -> Result<PathBuf> {
    let image = dir.join("image.qcow2");
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "--object", "secret,id=key,data=secret", "-o"]);
    // The least that QEMU takes for deriving the key: it is slow in an emulated machine.
    command.arg("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10").arg(&image).arg("1M");
    run(&mut command, TOOL_LIMIT)?.success()?;
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "qcow2" was one of the words that were looked for, and every message begins with it.
    #[test]
    fn a_message_that_says_nothing_names_no_cause() {
        for words in REFUSALS.iter().map(|refusal| refusal.words) {
            let said = without_name("ublk-qcow2: it failed\n");
            assert!(!words.iter().any(|word| said.contains(word)), "{words:?}");
        }
        let mut silent = Command::new("sh");
        silent.args(["-c", "echo 'ublk-qcow2: it failed' >&2; exit 1"]);
        assert!(must_refuse(&mut silent, &["qcow2"]).is_err());
    }
}
