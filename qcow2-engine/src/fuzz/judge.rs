//! The account of the engine's process held against what QEMU says of the same image.

use super::{
    child::{CHUNK, READ_AFTER, READ_BEFORE, READ_BYTES, REPAIRED, WRITTEN},
    corpus::IMAGE,
    process::{self, Ending, Finished},
};
use crate::io::{SECTOR, whole_sectors};
use qcow2_format::{Clusters, Geometry, Header, L1Entry, Mapping, snapshot, word};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs, io,
    ops::Range,
    path::Path,
    process::Command,
    time::Duration,
};

/// How long QEMU's tools may take; what takes longer is not compared.
const QEMU_TIME: Duration = Duration::from_secs(20);

/// What the engine's process told.
#[derive(Debug, Default)]
struct Account {
    size: Option<u64>,
    after_size: Option<u64>,
    bad_before: BTreeSet<u64>,
    bad_after: BTreeSet<u64>,
    touched: Vec<Range<u64>>,
    /// Corruptions and leaks that our check found at first, and after a repair.
    check: Option<[u64; 3]>,
    repaired: Option<[u64; 3]>,
    /// The first message that condemned the image.
    corrupt: Option<String>,
    /// A write succeeded after the image had been condemned.
    taken_after_damage: bool,
    closed: bool,
}

impl Account {
    fn of(output: &str) -> Self {
        let mut account = Self::default();
        for line in output.lines() {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            let numbers: Vec<u64> = rest.split(' ').map_while(|number| number.parse().ok()).collect();
            match (word, &numbers[..]) {
                ("before-size", &[size]) => account.size = Some(size),
                ("after-size", &[size]) => account.after_size = Some(size),
                ("before-bad", &[at]) => drop(account.bad_before.insert(at)),
                ("after-bad", &[at]) => drop(account.bad_after.insert(at)),
                ("touched", &[at, len]) => account.touched.push(at..at + len),
                ("check:", &[corruptions, leaks, errors]) => {
                    account.check = Some([corruptions, leaks, errors])
                }
                ("repair-again:", &[corruptions, leaks, errors]) => {
                    account.repaired = Some([corruptions, leaks, errors]);
                }
                ("corrupt:", _) => drop(account.corrupt.get_or_insert_with(|| rest.to_owned())),
                ("taken", _) => account.taken_after_damage = true,
                ("closed", _) => account.closed = true,
                _ => {}
            }
        }
        account
    }

    fn is_touched(&self, range: &Range<u64>) -> bool {
        self.touched.iter().any(|touched| touched.start < range.end && range.start < touched.end)
    }
}

/// What `qemu-img check` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Sound,
    Leaks,
    Corrupt,
    Unknown,
}

/// Judges what the engine's process has done in a directory.
///
/// # Errors
/// A file cannot be read, or a tool not be started.
pub fn violation(directory: &Path, finished: &Finished) -> io::Result<Option<String>> {
    match finished.ending {
        Ending::Code(0) if finished.output.ends_with("done\n") => {}
        ending => {
            let last: Vec<&str> = finished.errors.lines().rev().take(12).collect();
            let last: Vec<&str> = last.into_iter().rev().collect();
            let seen = finished.output.lines().last().unwrap_or("nothing");
            return Ok(Some(format!(
                "the engine's process ended with {ending:?} after \"{seen}\":\n{}",
                last.join("\n")
            )));
        }
    }
    let account = Account::of(&finished.output);
    if account.taken_after_damage {
        return Ok(Some("a write was taken after another request had condemned the image".into()));
    }
    let before = fs::read(directory.join(IMAGE))?;
    let sound = qemu_check(directory, IMAGE)?;
    if let Some(found) = wrong_bytes(directory, &account)? {
        return Ok(Some(found));
    }
    if sound == Verdict::Corrupt
        && account.check.is_some_and(|[corruptions, _, errors]| corruptions + errors == 0)
    {
        return Ok(Some("qemu-img check finds corruptions, ours finds none".into()));
    }
    if account.closed {
        let after = fs::read(directory.join(WRITTEN))?;
        if let Some(found) = lost_metadata(&account, &before, &after) {
            return Ok(Some(found));
        }
        // QEMU's check does not see everything: two tables at one place, for instance, with a count of two.
        if matches!(sound, Verdict::Sound | Verdict::Leaks)
            && account.check.is_some_and(|[corruptions, _, errors]| corruptions + errors == 0)
            && let Some(found) = harmed(directory, &account, shares_clusters(&before))?
        {
            return Ok(Some(found));
        }
    }
    if account.repaired == Some([0, 0, 0]) && qemu_check(directory, REPAIRED)? == Verdict::Corrupt {
        return Ok(Some("after a repair our check finds nothing, and qemu-img check corruptions".into()));
    }
    Ok(None)
}

pub(super) fn qemu(directory: &Path, args: &[&str]) -> io::Result<Finished> {
    process::run(Command::new("qemu-img").args(args), directory, QEMU_TIME)
}

fn qemu_check(directory: &Path, image: &str) -> io::Result<Verdict> {
    let finished = qemu(directory, &["check", "-f", "qcow2", image])?;
    Ok(match finished.ending {
        Ending::Code(0) => Verdict::Sound,
        Ending::Code(2) => Verdict::Corrupt,
        Ending::Code(3) => Verdict::Leaks,
        _ => Verdict::Unknown,
    })
}

/// What QEMU reads we read alike, or not at all.
fn wrong_bytes(directory: &Path, account: &Account) -> io::Result<Option<String>> {
    let Some(size) = account.size.filter(|&size| size <= READ_BYTES) else { return Ok(None) };
    let theirs = directory.join("qemu.raw");
    let _ = fs::remove_file(&theirs);
    let args = ["convert", "--salvage", "-f", "qcow2", "-O", "raw", IMAGE, "qemu.raw"];
    let finished = qemu(directory, &args)?;
    if finished.ending != Ending::Code(0) {
        return Ok(None);
    }
    let (ours, theirs) = (fs::read(directory.join(READ_BEFORE))?, fs::read(theirs)?);
    let failed = salvaged(&finished.errors);
    // A part of a sector at the end is left out by QEMU and served by us.
    if !(size - size % SECTOR..=whole_sectors(size)).contains(&(theirs.len() as u64)) {
        return Ok(Some(format!("QEMU's disk has {} bytes, ours {size}", theirs.len())));
    }
    for (index, (our, their)) in ours.chunks(CHUNK as usize).zip(theirs.chunks(CHUNK as usize)).enumerate() {
        let at = index as u64 * CHUNK;
        let is_compared = !account.bad_before.contains(&at)
            && !failed.iter().any(|bad| at < bad.end && bad.start < at + CHUNK);
        let our = &our[..our.len().min(their.len())];
        if is_compared && our != their {
            let wrong = our.iter().zip(their).position(|(our, their)| our != their).unwrap_or_default();
            return Ok(Some(format!(
                "byte {} of the disk is {:#x} for us and {:#x} for QEMU",
                at + wrong as u64,
                our[wrong],
                their[wrong]
            )));
        }
    }
    Ok(None)
}

/// Where `qemu-img convert --salvage` read nothing: it goes from large reads down to sectors, and tells
/// each sector that fails.
pub(super) fn salvaged(errors: &str) -> Vec<Range<u64>> {
    let offset = |line: &str| {
        let (_, rest) = line.split_once("while reading offset ")?;
        rest.split(':').next()?.trim().parse::<u64>().ok()
    };
    errors.lines().filter_map(offset).map(|at| at..at + SECTOR).collect()
}

/// Entries of tables, as they are, by what they stand for.
#[derive(Debug, Default)]
struct Tables {
    /// Guest offset → raw L2 entry. Those beyond the end of the disk refer to clusters, too.
    l2: BTreeMap<u64, u64>,
    /// Bytes of the snapshot table and of the snapshots' L1 tables, by place.
    snapshots: BTreeMap<u64, Vec<u8>>,
}

fn tables(image: &[u8]) -> Option<(Geometry, Tables)> {
    let header = Header::decode(image, image.len() as u64).ok()?;
    let geometry = header.geometry();
    let mut tables = Tables::default();
    let word = |at: u64| word::get(image, at as usize);
    for index in 0..u64::from(header.l1_entries).min(4096) {
        let raw = word(header.l1_table.0 + index * 8)?;
        let Ok(L1Entry::Table { offset, .. }) = L1Entry::decode(raw, &geometry) else { continue };
        for entry in 0..geometry.l2_entries() {
            let guest = index * geometry.l2_coverage_bytes() + entry * geometry.cluster_size();
            if let Some(raw) = word(offset.0 + entry * 8) {
                tables.l2.insert(guest, raw);
            }
        }
    }
    let place = header.snapshot_table.0;
    let rest = image.get(place as usize..).filter(|_| header.snapshot_count > 0);
    if let Some(Ok(snapshots)) = rest.map(|rest| snapshot::decode_table(rest, header.snapshot_count)) {
        for one in snapshots {
            let (start, len) = (one.l1_table.0 as usize, one.l1_entries as usize * 8);
            if let Some(bytes) = image.get(start..start.saturating_add(len)) {
                tables.snapshots.insert(one.l1_table.0, bytes.to_vec());
            }
        }
        tables
            .snapshots
            .insert(place, rest.map_or_else(Vec::new, |rest| rest[..rest.len().min(64)].to_vec()));
    }
    Some((geometry, tables))
}

/// Whether two entries of the active mapping name one cluster, which only damage brings about where it is not
/// compressed data for both. Such an image is sound for both checks where the counts say two. When one of the
/// entries is replaced the other is its only owner, and lacks the flag that says so: it cannot be found in
/// passing, and QEMU leaves it as it is as well.
fn shares_clusters(image: &[u8]) -> bool {
    let Some((geometry, tables)) = tables(image) else { return false };
    let (mut named, mut packed, mut is_shared) = (HashSet::new(), HashSet::new(), false);
    for &raw in tables.l2.values() {
        match Mapping::decode(raw, &geometry) {
            Ok(Mapping::Data { host, .. } | Mapping::Zero { host: Some(host), .. }) => {
                is_shared |= !named.insert(geometry.host_cluster(host));
            }
            Ok(Mapping::Compressed(range)) => packed.extend(range.host_clusters(&geometry).each()),
            _ => {}
        }
    }
    is_shared || !named.is_disjoint(&packed)
}

/// However damaged the image was: entries that nobody asked to change are what they were.
fn lost_metadata(account: &Account, before: &[u8], after: &[u8]) -> Option<String> {
    let (geometry, old) = tables(before)?;
    let Some((_, new)) = tables(after) else { return Some("the header was destroyed".into()) };
    for (guest, entry) in &old.l2 {
        let cluster = *guest..guest + geometry.cluster_size();
        if new.l2.get(guest) != Some(entry) && !account.is_touched(&cluster) {
            let found = new.l2.get(guest);
            return Some(format!(
                "the L2 entry for {guest:#x} was {entry:#x}, is {found:x?}, and was not touched"
            ));
        }
    }
    for (place, bytes) in &old.snapshots {
        let found = after.get(*place as usize..).and_then(|rest| rest.get(..bytes.len()));
        if found != Some(bytes) {
            return Some(format!("the snapshots' table at {place:#x} was changed"));
        }
    }
    None
}

/// An image that both checks find sound stays so, and what was not touched keeps its bytes.
fn harmed(directory: &Path, account: &Account, shares_clusters: bool) -> io::Result<Option<String>> {
    if let Some(message) = &account.corrupt {
        return Ok(Some(format!("both checks find the image sound, and a request does not: {message}")));
    }
    if !shares_clusters && qemu_check(directory, WRITTEN)? == Verdict::Corrupt {
        return Ok(Some("the image was sound, and is corrupt after our requests".into()));
    }
    let Some(size) = account.size else { return Ok(None) };
    if account.after_size != Some(size) {
        return Ok(Some(format!("its size was {size}, and is {:?} after our requests", account.after_size)));
    }
    let (before, after) = (fs::read(directory.join(READ_BEFORE))?, fs::read(directory.join(READ_AFTER))?);
    for (index, (old, new)) in before.chunks(CHUNK as usize).zip(after.chunks(CHUNK as usize)).enumerate() {
        let at = index as u64 * CHUNK;
        let is_bad = account.bad_before.contains(&at) || account.bad_after.contains(&at);
        if old != new && !is_bad && !account.is_touched(&(at..at + CHUNK)) {
            return Ok(Some(format!("the bytes at {at} were not touched, and have changed")));
        }
    }
    Ok(None)
}
