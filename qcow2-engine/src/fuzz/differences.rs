//! Our check and repair beside `qemu-img check`'s: not what must be, but where they differ, by class.
//!
//! [`judge`](super::judge) knows what is wrong in any case. What remains is a matter of taste as often as
//! not, so it is counted and shown, for people to look at: verdicts that differ, damage that only one of the
//! two repairs, and bytes of the disk that a repair changes.

use super::{
    child::{CHUNK, READ_BYTES, REPAIRED},
    corpus::IMAGE,
    judge::{qemu, salvaged},
    process::{Ending, Finished},
};
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

/// What our process told of a check, as an exit code.
fn our_code(output: &str, label: &str) -> i32 {
    let line = output.lines().find_map(|line| line.strip_prefix(&format!("{label}: ")));
    let numbers: Vec<u64> =
        line.unwrap_or_default().split(' ').map_while(|number| number.parse().ok()).collect();
    match numbers[..] {
        [0, 0, 0] => 0,
        [0, _, 0] => 3,
        [_, _, 0] => 2,
        _ => 1,
    }
}

/// The first line with a label, without its numbers and the file's name.
fn said(output: &str, label: &str) -> String {
    let line = output.lines().find_map(|line| line.strip_prefix(label)).unwrap_or("nothing");
    let words = line.split(' ').filter(|word| !word.contains(IMAGE) && !word.contains(REPAIRED));
    let is_number = |word: &&str| !word.contains(|c: char| c.is_ascii_digit());
    words.filter(is_number).collect::<Vec<_>>().join(" ")
}

fn code(finished: &Finished) -> i32 {
    match finished.ending {
        Ending::Code(code) => code,
        _ => -1,
    }
}

/// The differences that a case shows, in the directory in which it was carried out.
///
/// # Errors
/// A file cannot be read or a tool not be started.
pub fn of(directory: &Path, finished: &Finished) -> io::Result<Vec<String>> {
    let mut classes = Vec::new();
    let output = &finished.output;
    let check = |image| qemu(directory, &["check", "-f", "qcow2", image]).map(|finished| code(&finished));
    let (ours, theirs) = (our_code(output, "check"), check(IMAGE)?);
    if ours != theirs {
        let first = said(output, if ours == 1 { "check-error: " } else { "check-finding: " });
        classes.push(format!("check: ours {ours}, QEMU's {theirs}: {first}"));
    }
    fs::copy(directory.join(IMAGE), directory.join(THEIRS))?;
    let repair = code(&qemu(directory, &["check", "-f", "qcow2", "-r", "all", THEIRS])?);
    let (by_us, by_them) = (check(REPAIRED)?, check(THEIRS)?);
    let left = our_code(output, "repair-again");
    if by_them == 0 && by_us != 0 {
        let why = said(output, "repair-refused: ");
        let first = said(output, if left == 1 { "repair-again-error: " } else { "repair-again-finding: " });
        classes.push(format!("repair: QEMU's leaves {by_them} ({repair}), ours {by_us}: {why}; {first}"));
    }
    if by_us == 0 && left != 0 {
        let first = said(output, if left == 1 { "repair-again-error: " } else { "repair-again-finding: " });
        classes.push(format!("repair: QEMU finds it sound after ours, we do not: {first}"));
    }
    if by_us == 0 && by_them != 0 {
        classes.push(format!("repair: only ours succeeds ({by_them} after QEMU's)"));
    }
    for snapshot in [None, Some("one"), Some("two")] {
        let (name, changed) = (snapshot.unwrap_or("disk"), changed(directory, snapshot)?);
        if let Some([ours, theirs]) = changed
            && ours != 0
        {
            let first = said(output, "check-finding: ");
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
