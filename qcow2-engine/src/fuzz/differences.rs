//! Our check and repair beside `qemu-img check`'s: not what must be, but where they differ, by class.
//!
//! [`judge`](super::judge) knows what is wrong in any case. What remains is a matter of taste as often as
//! not, so it is counted and shown, for people to look at: verdicts that differ, damage that only one of the
//! two repairs, and bytes of the disk that a repair changes.

use super::{
    child::{CHUNK, READ_BYTES, REPAIRED},
    corpus::IMAGE,
    host_files::HostFiles,
    judge::{qemu, salvaged},
    process::{Ending, Finished},
};
use crate::{CheckOptions, Repair, check, exec::run_at_once as run};
use qcow2_format::Header;
use std::{collections::BTreeMap, fs, io, path::Path};

/// The copy that QEMU repairs.
const THEIRS: &str = "theirs.qcow2";

/// Differences by class: how many, and the number of the first case.
#[derive(Debug, Default)]
pub struct Tally(BTreeMap<String, (u64, u64)>);

impl Tally {
    /// Adds what a case has shown.
    pub fn add(&mut self, number: u64, classes: Vec<String>) {
        for class in classes {
            self.0.entry(class).or_insert((0, number)).0 += 1;
        }
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut all: Vec<_> = self.0.iter().collect();
        all.sort_by_key(|(_, (count, _))| std::cmp::Reverse(*count));
        all.iter().try_for_each(|(class, (count, case))| writeln!(f, "{count:>6}  {class}  (case {case})"))
    }
}

/// What our check makes of an image, as an exit code, and the first of what it says.
fn ours(directory: &Path, image: &str, repair: Repair) -> (i32, String) {
    let files = HostFiles::default();
    let options = CheckOptions { repair, ..CheckOptions::default() };
    match run(check(&files, &files, &directory.join(image), options)) {
        Ok(report) => {
            let left = &report.remaining;
            let code = match (left.corruptions, left.leaks, left.check_errors) {
                (0, 0, 0) => 0,
                (0, _, 0) => 3,
                (_, _, 0) => 2,
                _ => 1,
            };
            let finding = left.list.first().map(ToString::to_string).unwrap_or_default();
            (code, in_words(&format!("{} {finding}", report.refused.first().unwrap_or(&""))))
        }
        Err(error) => (1, in_words(&error.to_string())),
    }
}

/// A message without its numbers and the file's name, so that those of a kind are alike.
fn in_words(message: &str) -> String {
    let is_word = |word: &&str| !word.contains(|c: char| c.is_ascii_digit() || c == '/');
    message.split(' ').filter(is_word).collect::<Vec<_>>().join(" ")
}

fn code(finished: &Finished) -> i32 {
    match finished.ending {
        Ending::Code(code) => code,
        _ => -1,
    }
}

/// The differences that an image in a directory shows.
///
/// # Errors
/// A file cannot be read or a tool not be started.
pub fn of(directory: &Path) -> io::Result<Vec<String>> {
    let mut classes = Vec::new();
    let theirs = |image, more: &[&str]| -> io::Result<i32> {
        Ok(code(&qemu(directory, &[&["check", "-f", "qcow2"], more, &[image]].concat())?))
    };
    let ((our_code, first), their_code) = (ours(directory, IMAGE, Repair::None), theirs(IMAGE, &[])?);
    if our_code != their_code {
        classes.push(format!("check: ours {our_code}, QEMU's {their_code}: {first}"));
    }
    fs::copy(directory.join(IMAGE), directory.join(THEIRS))?;
    fs::copy(directory.join(IMAGE), directory.join(REPAIRED))?;
    let (left, why) = ours(directory, REPAIRED, Repair::All);
    let ending = theirs(THEIRS, &["-r", "all"])?;
    let (by_us, by_them) = (theirs(REPAIRED, &[])?, theirs(THEIRS, &[])?);
    match (by_us, by_them) {
        (0, 0) if left != 0 => classes.push(format!("repair: sound for QEMU, not for us: {why}")),
        (0, 0) => {}
        (_, 0) => classes.push(format!("repair: QEMU's leaves 0 ({ending}), ours {by_us}: {why}")),
        (0, _) => classes.push(format!("repair: only ours succeeds ({by_them} after QEMU's)")),
        _ => {}
    }
    for snapshot in [None, Some("one"), Some("two")] {
        let (name, changed) = (snapshot.unwrap_or("disk"), changed(directory, snapshot)?);
        if let Some([ours, theirs]) = changed
            && ours != 0
        {
            let theirs = if theirs == 0 { "none" } else { "some" };
            classes.push(format!("bytes of {name} changed by our repair, {theirs} by QEMU's: {first}"));
        }
    }
    Ok(classes)
}

/// Chunks of the disk that QEMU read before and that are different, or cannot be read, after our repair and
/// after QEMU's.
fn changed(directory: &Path, snapshot: Option<&str>) -> io::Result<Option<[usize; 2]>> {
    let image = fs::read(directory.join(IMAGE))?;
    let size =
        Header::decode_repairable(&image, image.len() as u64).map_or(u64::MAX, |(h, _)| h.virtual_size);
    if size > READ_BYTES {
        return Ok(None);
    }
    let Some(before) = disk(directory, IMAGE, snapshot)? else { return Ok(None) };
    let mut counts = [0; 2];
    for (count, image) in counts.iter_mut().zip([REPAIRED, THEIRS]) {
        let after = disk(directory, image, snapshot)?.unwrap_or_default();
        *count = before
            .iter()
            .enumerate()
            .filter(|(index, chunk)| chunk.is_some() && after.get(*index) != Some(*chunk))
            .count();
    }
    Ok(Some(counts))
}

/// The disk as QEMU reads it; nothing where a part of a chunk cannot be read.
fn disk(directory: &Path, image: &str, snapshot: Option<&str>) -> io::Result<Option<Vec<Option<Vec<u8>>>>> {
    let raw = directory.join("disk.raw");
    let _ = fs::remove_file(&raw);
    let mut args = vec!["convert", "--salvage", "-f", "qcow2", "-O", "raw"];
    args.extend(snapshot.iter().flat_map(|name| ["-l", *name]));
    args.extend([image, "disk.raw"]);
    let finished = qemu(directory, &args)?;
    if finished.ending != Ending::Code(0) {
        return Ok(None);
    }
    let bad = salvaged(&finished.errors);
    let chunk = |(index, bytes): (u64, &[u8])| {
        let at = index * CHUNK;
        let is_bad = bad.iter().any(|bad| at < bad.end && bad.start < at + CHUNK);
        (!is_bad).then(|| bytes.to_vec())
    };
    Ok(Some((0..).zip(fs::read(raw)?.chunks(CHUNK as usize)).map(chunk).collect()))
}
