//! What a loss of power may leave of a device: states, chosen from its log, and made as files.
//!
//! A state is a moment in the log: everything before the last flush of that moment, what was written
//! durably since, and of the other writes since then any. All states of a log are made in order, so
//! that one file, the base, is only ever moved forward; each state is a copy of it.

use super::log::{Entry, Kind, Log};
use anyhow::{Context, Result};
use nix::unistd::{Whence, lseek};
use std::{
    fmt,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// Bytes copied at a time.
const PIECE: u64 = 1 << 20;

/// A moment at which the power may have gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    /// Entries before this one are all there.
    settled: usize,
    /// Entries beyond it that are there, in order.
    loose: Vec<usize>,
    /// The moment: the entry that has not happened yet.
    end: usize,
    /// The last mark before it.
    pub(super) mark: usize,
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (settled, loose, between) = (self.settled, self.loose.len(), self.end - self.settled);
        write!(f, "the first {settled} entries of the log and {loose} of the {between} after them")
    }
}

/// Chooses up to `wanted` moments after the first mark: half of them where something became durable,
/// half after any write, with some of the writes before it lost that were not durable then.
#[must_use]
pub(super) fn choose(entries: &[Entry], wanted: usize, rng: &mut fastrand::Rng) -> Vec<Moment> {
    let Some(first) = entries.iter().position(|entry| mark_of(entry).is_some()) else {
        return Vec::new();
    };
    let (mut milestones, mut writes) = (Vec::new(), Vec::new());
    for (index, entry) in entries.iter().enumerate().skip(first) {
        match entry.kind {
            Kind::Flush | Kind::Mark(_) | Kind::Write { fua: true, .. } => milestones.push(index),
            Kind::Write { fua: false, .. } => writes.push(index),
            Kind::Discard => {}
        }
    }
    let mut moments: Vec<_> = rng
        .choose_multiple(milestones, wanted.div_ceil(2))
        .into_iter()
        .map(|last| moment(entries, last + 1, |_| true))
        .collect();
    for last in rng.choose_multiple(writes, wanted / 2) {
        // A write that overtakes those before it shows best whether one of them should have waited.
        let odds = [0, 4, 7][rng.usize(0..3)];
        moments.push(moment(entries, last + 1, |index| index == last || rng.u32(0..8) < odds));
    }
    moments.sort_by_key(|moment| (moment.settled, moment.end));
    moments.dedup();
    moments
}

/// The moment before entry `end`; `survives` is asked for each write that was not durable then.
fn moment(entries: &[Entry], end: usize, mut survives: impl FnMut(usize) -> bool) -> Moment {
    let past = &entries[..end];
    let settled = past.iter().rposition(|entry| entry.kind == Kind::Flush).map_or(0, |index| index + 1);
    let loose = (settled..end).filter(|&index| match entries[index].kind {
        Kind::Write { fua, .. } => fua || survives(index),
        Kind::Discard => survives(index),
        Kind::Flush | Kind::Mark(_) => false,
    });
    let loose = loose.collect();
    let mark = past.iter().rev().find_map(mark_of).unwrap_or(0);
    Moment { settled, loose, end, mark }
}

/// The text by which a mark is found again.
#[must_use]
pub(super) fn mark_text(number: usize) -> String {
    format!("mark-{number}")
}

fn mark_of(entry: &Entry) -> Option<usize> {
    let Kind::Mark(text) = &entry.kind else { return None };
    text.strip_prefix("mark-")?.parse().ok()
}

/// The device as it was at one moment after the other.
pub(super) struct Replay<'a> {
    log: &'a Log,
    base: PathBuf,
    done: usize,
}

impl<'a> Replay<'a> {
    /// Begins with the device as it was before the log, a file that is ours to change.
    #[must_use]
    pub(super) fn new(log: &'a Log, base: PathBuf) -> Self {
        Self { log, base, done: 0 }
    }

    /// Makes `target` what the device was at a moment that is not before the last one.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn make(&mut self, moment: &Moment, target: &Path) -> Result<()> {
        let base = File::options().write(true).open(&self.base)?;
        for index in self.done..moment.settled {
            self.apply(index, &base)?;
        }
        self.done = self.done.max(moment.settled);
        copy_sparse(&self.base, target)?;
        let target = File::options().write(true).open(target)?;
        moment.loose.iter().try_for_each(|&index| self.apply(index, &target))
    }

    fn apply(&self, index: usize, to: &File) -> Result<()> {
        let entry = &self.log.entries[index];
        // What was discarded may read as anything; that it stays is the state that tests most.
        let Kind::Write { data, .. } = entry.kind else { return Ok(()) };
        let bytes = self.log.data(data, entry.len)?;
        to.write_all_at(&bytes, entry.at).with_context(|| format!("replaying entry {index}"))
    }
}

/// Copies a file, holes as holes.
///
/// # Errors
/// The operating system's.
pub(super) fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let source = File::open(from).with_context(|| format!("cannot open {}", from.display()))?;
    let target = File::create(to).with_context(|| format!("cannot make {}", to.display()))?;
    let len = source.metadata()?.len();
    target.set_len(len)?;
    let mut piece = vec![0; PIECE as usize];
    let mut at = 0;
    while let Ok(start) = lseek(&source, i64::try_from(at)?, Whence::SeekData) {
        let end = u64::try_from(lseek(&source, start, Whence::SeekHole)?)?;
        at = u64::try_from(start)?;
        while at < end {
            let bytes = &mut piece[..PIECE.min(end - at) as usize];
            source.read_exact_at(bytes, at)?;
            target.write_all_at(bytes, at)?;
            at += bytes.len() as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(kinds: &str) -> Vec<Entry> {
        let mut marks = 0;
        let entry = |kind: char| {
            let kind = match kind {
                'w' => Kind::Write { data: 0, fua: false },
                'u' => Kind::Write { data: 0, fua: true },
                'd' => Kind::Discard,
                'f' => Kind::Flush,
                _ => {
                    marks += 1;
                    Kind::Mark(mark_text(marks - 1))
                }
            };
            Entry { at: 0, len: 512, kind }
        };
        kinds.chars().map(entry).collect()
    }

    #[test]
    fn a_moment_has_what_was_durable_and_of_the_rest_what_survives() {
        let log = entries("wfmwwfmwuwd");
        let none = moment(&log, 11, |_| false);
        assert_eq!(none, Moment { settled: 6, loose: vec![8], end: 11, mark: 1 });
        assert_eq!(moment(&log, 11, |_| true).loose, [7, 8, 9, 10]);
        // Between a flush and its mark the promise is the one before.
        assert_eq!(moment(&log, 6, |_| true), Moment { settled: 6, loose: vec![], end: 6, mark: 0 });
        assert_eq!(moment(&log, 5, |index| index == 4).loose, [4]);
    }

    #[test]
    fn moments_come_in_order_and_after_the_first_mark() {
        let log = entries("wwwfwwfmwwwfmwufwwmwwwwfm");
        let mut rng = fastrand::Rng::with_seed(3);
        let moments = choose(&log, 12, &mut rng);
        assert!(moments.len() > 6 && moments.len() <= 12, "{moments:?}");
        assert!(moments.is_sorted_by_key(|moment| moment.settled));
        assert!(moments.iter().all(|moment| moment.end > 7 && moment.settled >= 7));
        assert!(choose(&entries("wwfw"), 4, &mut rng).is_empty());
    }

    #[test]
    fn holes_and_data_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
        let file = File::create(&from).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[7; 3000], (3 << 20) - 1000).unwrap();
        copy_sparse(&from, &to).unwrap();
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
    }
}
