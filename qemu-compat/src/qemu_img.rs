//! The real `qemu-img`: makes images and judges them.
//!
//! One function per subcommand that the suite needs, each with a bound on its time. Where QEMU's
//! exit status means something, it becomes an enum here.

use crate::command::{Finished, TOOL_LIMIT, run};
use anyhow::{Result, bail};
use std::{ffi::OsStr, path::Path, process::Command};

/// An image format, as `qemu-img` calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Plain bytes.
    Raw,
    /// QCOW2.
    Qcow2,
}

impl Format {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What `qemu-img check` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No error and no leak.
    Clean,
    /// No error, but clusters that nobody refers to.
    Leaks(String),
    /// Damage.
    Damaged(String),
}

/// Makes an empty image; `options` as after `-o`.
///
/// # Errors
/// `qemu-img` refuses.
pub fn create(image: &Path, options: &str, backing: Option<(&Path, Format)>, size: u64) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-o", options]);
    if let Some((path, format)) = backing {
        command.arg("-b").arg(relative_to(image, path)).args(["-F", format.name()]);
    }
    run(command.arg(image).arg(size.to_string()), TOOL_LIMIT)?.success().map(drop)
}

/// Makes a compressed image of a raw file.
///
/// # Errors
/// `qemu-img` refuses.
pub fn convert_compressed(
    raw: &Path,
    image: &Path,
    options: &str,
    backing: Option<(&Path, Format)>,
) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", options]);
    if let Some((path, format)) = backing {
        // Convert opens the name from the working directory and stores it as it is.
        command.arg("-B").arg(path).args(["-F", format.name()]);
    }
    run(command.arg(raw).arg(image), TOOL_LIMIT)?.success().map(drop)
}

/// What an image shows, as a raw file.
///
/// # Errors
/// `qemu-img` refuses.
pub fn extract(image: &Path, raw: &Path) -> Result<()> {
    let mut command = Command::new("qemu-img");
    run(command.args(["convert", "-q", "-f", "qcow2", "-O", "raw"]).arg(image).arg(raw), TOOL_LIMIT)?
        .success()
        .map(drop)
}

/// What an internal snapshot shows, as a raw file.
///
/// # Errors
/// `qemu-img` refuses.
pub fn extract_snapshot(image: &Path, name: &str, raw: &Path) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-q", "-f", "qcow2", "-O", "raw", "-l", name]).arg(image).arg(raw);
    run(&mut command, TOOL_LIMIT)?.success().map(drop)
}

/// Takes an internal snapshot.
///
/// # Errors
/// `qemu-img` refuses.
pub fn snapshot(image: &Path, name: &str) -> Result<()> {
    let mut command = Command::new("qemu-img");
    run(command.args(["snapshot", "-q", "-c", name]).arg(image), TOOL_LIMIT)?.success().map(drop)
}

/// Checks an image, changing nothing.
///
/// # Errors
/// The check itself could not be made.
pub fn check(image: &Path) -> Result<Verdict> {
    let finished = run(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(image), TOOL_LIMIT)?;
    match finished.status.code() {
        Some(0) => Ok(Verdict::Clean),
        Some(3) => Ok(Verdict::Leaks(shortened(&finished))),
        Some(2) => Ok(Verdict::Damaged(shortened(&finished))),
        _ => finished.success().map(|_| Verdict::Clean),
    }
}

/// Demands that an image is clean, without one leak.
///
/// # Errors
/// What the check found.
pub fn check_clean(image: &Path) -> Result<()> {
    match check(image)? {
        Verdict::Clean => Ok(()),
        Verdict::Leaks(text) => bail!("qemu-img check finds leaks: {text}"),
        Verdict::Damaged(text) => bail!("qemu-img check finds damage: {text}"),
    }
}

/// Gives leaked clusters back.
///
/// # Errors
/// `qemu-img` refuses.
pub fn repair_leaks(image: &Path) -> Result<()> {
    let mut command = Command::new("qemu-img");
    run(command.args(["check", "-f", "qcow2", "-r", "leaks"]).arg(image), TOOL_LIMIT)?.success().map(drop)
}

/// Demands that two images hold the same bytes.
///
/// # Errors
/// Where they differ.
pub fn compare(image: &Path, other: &Path, format: Format) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["compare", "-f", "qcow2", "-F", format.name()]).arg(image).arg(other);
    run(&mut command, TOOL_LIMIT)?.success().map(drop)
}

/// The name to store for a backing file in the image's own directory.
fn relative_to<'a>(image: &Path, backing: &'a Path) -> &'a OsStr {
    match backing.file_name() {
        Some(name) if backing.parent() == image.parent() => name,
        _ => backing.as_os_str(),
    }
}

/// A check of a broken image can say thousands of lines.
fn shortened(finished: &Finished) -> String {
    let text = finished.text();
    let lines: Vec<_> = text.lines().filter(|line| !line.is_empty()).collect();
    let (first, rest) = lines.split_at(lines.len().min(8));
    let more = if rest.is_empty() { String::new() } else { format!(" … and {} lines more", rest.len()) };
    format!("{}{more}", first.join(" | "))
}
