//! What may be on a disk after a loss of power: the changes that were issued, and at each mark how
//! many of them had been made durable.
//!
//! Changes are numbered in the order in which they were issued; two that are in flight together
//! share no sector. So a sector's history is a line, and after a mark it holds the last change that
//! the mark covers, or one that was issued later, and nothing else. Knows nothing of devices.

use crate::{
    content::{Told, number_of, tagged},
    disk::{Op, SECTOR},
    mirror::Mirror,
};
use anyhow::{Context, Result, bail, ensure};
use std::{collections::BTreeMap, fs::File, ops::Range, os::unix::fs::FileExt, path::Path};

/// Bytes read at a time.
const PIECE: u64 = 1 << 20;

/// What a change leaves in its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// The bytes of the write of this number.
    Write(u64),
    Zeros,
}

#[derive(Clone, Debug)]
struct Change {
    range: Range<u64>,
    content: Content,
}

/// A moment that can be told in what came after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    /// Changes before this one were durable when the mark was made.
    covered: usize,
    /// Changes from this one on were issued after it.
    issued: usize,
}

/// The changes of a disk.
#[derive(Clone)]
pub(super) struct Journal {
    initial: Mirror,
    changes: Vec<Change>,
    marks: Vec<Mark>,
}

impl Journal {
    /// A disk that durably holds these bytes. That is mark 0.
    #[must_use]
    pub(super) fn new(initial: Mirror) -> Self {
        Self { initial, changes: Vec::new(), marks: vec![Mark { covered: 0, issued: 0 }] }
    }

    /// Notes a request that is about to be issued.
    pub(super) fn issue(&mut self, op: &Op) {
        let (at, len) = op.range();
        let (range, content) = match op {
            Op::Write { bytes, .. } => (at..at + len, Content::Write(number_of(bytes).unwrap_or(0))),
            Op::Zero { .. } => (at..at + len, Content::Zeros),
            Op::Discard { .. } => (self.initial.whole_clusters(at, len), Content::Zeros),
            Op::Read { .. } | Op::Flush => return,
        };
        if !range.is_empty() {
            self.changes.push(Change { range, content });
        }
    }

    /// Changes that have been issued.
    #[must_use]
    pub(super) fn issued(&self) -> usize {
        self.changes.len()
    }

    /// Notes that the first `covered` changes are durable. Returns the mark's number; it is closed with
    /// [`Journal::close_mark`] when it has been made.
    pub(super) fn open_mark(&mut self, covered: usize) -> usize {
        self.marks.push(Mark { covered, issued: usize::MAX });
        self.marks.len() - 1
    }

    /// Notes that a mark has been made: what is issued from now on comes after it.
    pub(super) fn close_mark(&mut self, number: usize) {
        if let Some(mark) = self.marks.get_mut(number) {
            mark.issued = self.changes.len();
        }
    }

    /// Holds the bytes of a raw file against what the disk may show between mark number `mark` and
    /// the next one.
    ///
    /// # Errors
    /// The operating system's, or the first sector that is wrong, what it holds and what it may hold.
    pub(super) fn hold(&self, raw: &Path, mark: usize) -> Result<()> {
        let view = self.view(mark).with_context(|| format!("there is no mark {mark}"))?;
        let file = File::open(raw).with_context(|| format!("cannot open {}", raw.display()))?;
        let len = file.metadata()?.len();
        ensure!(len == self.initial.size(), "the disk has {len} bytes, not {}", self.initial.size());
        let mut bytes = vec![0; PIECE as usize];
        let mut wrong = Vec::new();
        for at in (0..len).step_by(bytes.len()) {
            let part = &mut bytes[..PIECE.min(len - at) as usize];
            file.read_exact_at(part, at)?;
            let before = self.initial.read(at, part.len() as u64);
            for (index, found) in part.chunks(SECTOR as usize).enumerate() {
                let offset = index * SECTOR as usize;
                let address = at + offset as u64;
                if !view.allows(address, found, &before[offset..offset + found.len()]) {
                    wrong.push((address, Told(found).to_string()));
                }
            }
        }
        let Some((address, found)) = wrong.first() else { return Ok(()) };
        bail!(
            "{} sectors are wrong after mark {mark}, the first at {address:#x} (cluster {:#x}): found {found}, {}",
            wrong.len(),
            address / self.initial.cluster(),
            view.told(*address)
        )
    }

    fn view(&self, mark: usize) -> Option<View<'_>> {
        let covered = self.marks.get(mark)?.covered;
        let end = self.marks.get(mark + 1).map_or(usize::MAX, |next| next.issued);
        let mut view = View { journal: self, durable: BTreeMap::new(), later: BTreeMap::new() };
        for (index, change) in self.changes.iter().enumerate().take(end) {
            for address in change.range.clone().step_by(SECTOR as usize) {
                if index < covered {
                    view.durable.insert(address, index);
                } else {
                    view.later.entry(address).or_default().push(index);
                }
            }
        }
        Some(view)
    }
}

/// What each sector may hold at a mark; sectors without a change hold what they held at first.
struct View<'a> {
    journal: &'a Journal,
    durable: BTreeMap<u64, usize>,
    later: BTreeMap<u64, Vec<usize>>,
}

impl View<'_> {
    fn allows(&self, address: u64, found: &[u8], before: &[u8]) -> bool {
        let is_durable = match self.durable.get(&address) {
            Some(&index) => self.shows(index, address, found),
            None => found == before,
        };
        let mut later = self.later.get(&address).into_iter().flatten();
        is_durable || later.any(|&index| self.shows(index, address, found))
    }

    fn shows(&self, index: usize, address: u64, found: &[u8]) -> bool {
        match self.journal.changes[index].content {
            Content::Zeros => found.iter().all(|&byte| byte == 0),
            Content::Write(number) => {
                number_of(found) == Some(number) && tagged(address, found.len() as u64, number) == found
            }
        }
    }

    fn told(&self, address: u64) -> String {
        let content = |index: &usize| match self.journal.changes[*index].content {
            Content::Zeros => "zeros".to_owned(),
            Content::Write(number) => format!("write {number}"),
        };
        let durable = self.durable.get(&address).map_or("what was there at first".to_owned(), content);
        let later: Vec<_> = self.later.get(&address).into_iter().flatten().map(content).collect();
        format!("durable was {durable}, issued since: [{}]", later.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 64 << 10;

    fn write(at: u64, number: u64) -> Op {
        Op::Write { at, bytes: tagged(at, 4096, number).into() }
    }

    /// Initial content, two writes that mark 1 covers, one issued before it and one after it.
    fn journal() -> Journal {
        let mut initial = Mirror::new(SIZE, 4096);
        initial.write(0, &tagged(0, SIZE, 1));
        let mut journal = Journal::new(initial);
        journal.issue(&write(4096, 2));
        journal.issue(&write(8192, 3));
        journal.issue(&Op::Discard { at: 8192, len: 4096 + 512 });
        let mark = journal.open_mark(2);
        assert_eq!(mark, 1);
        journal.close_mark(mark);
        journal.issue(&write(4096, 4));
        let mark = journal.open_mark(3);
        journal.close_mark(mark);
        journal.issue(&write(12_288, 5));
        journal
    }

    fn verdict(journal: &Journal, mark: usize, ops: &[Op]) -> Result<()> {
        let mut disk = journal.initial.clone();
        ops.iter().for_each(|op| disk.apply(op));
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("raw");
        disk.write_raw(&raw).unwrap();
        journal.hold(&raw, mark)
    }

    #[test]
    fn durable_content_and_later_content_is_allowed() {
        let journal = journal();
        let (a, b, zero, c) =
            (write(4096, 2), write(8192, 3), Op::Discard { at: 8192, len: 4096 }, write(4096, 4));
        for ops in [vec![], vec![a.clone()], vec![b.clone()], vec![zero.clone()]] {
            verdict(&journal, 0, &ops).unwrap();
        }
        for ops in [vec![&a, &b], vec![&a, &zero], vec![&c, &zero]] {
            verdict(&journal, 1, &ops.into_iter().cloned().collect::<Vec<_>>()).unwrap();
        }
        verdict(&journal, 2, &[a, zero, write(12_288, 5)]).unwrap();
    }

    #[test]
    fn lost_foreign_and_future_content_is_not() {
        let journal = journal();
        let (a, b) = (write(4096, 2), write(8192, 3));
        // Lost: the old content, and zeros that nobody wrote.
        assert!(
            verdict(&journal, 1, std::slice::from_ref(&b)).unwrap_err().to_string().contains("write 1 of")
        );
        assert!(verdict(&journal, 1, &[Op::Zero { at: 4096, len: 512, unmap: false }, b.clone()]).is_err());
        // Another address's bytes.
        let foreign = Op::Write { at: 4096, bytes: tagged(8192, 4096, 3).into() };
        assert!(verdict(&journal, 1, &[foreign, b.clone()]).is_err());
        // Not issued before the next mark.
        assert!(verdict(&journal, 0, &[write(4096, 4)]).is_err());
        assert!(verdict(&journal, 1, &[a, b, write(12_288, 5)]).is_err());
        // The mark that covers the discard.
        assert!(verdict(&journal, 2, &[write(4096, 2), write(8192, 3)]).is_err());
    }
}
