//! A file with a volatile cache: what readers see, what no crash can take away, and the changes between the
//! two.

use super::{contents::Contents, faults::Fault, model::Value};
use crate::io::Buf;
use std::{io, ops::Range, sync::Arc};

/// The unit that is written whole or not at all.
pub const SECTOR: usize = 512;

/// So many sectors, in bytes.
pub(super) const fn sector_bytes(sectors: usize) -> u64 {
    (sectors * SECTOR) as u64
}

/// A change of a file that a crash may keep or lose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes at an offset.
    Write {
        /// Where.
        at: u64,
        /// What.
        bytes: Arc<[u8]>,
    },
    /// Zeros, by deallocation.
    Punch {
        /// Where.
        at: u64,
        /// How many bytes.
        len: u64,
    },
    /// A new length.
    Length(u64),
    /// Space for all that lies between, and at least the length that it ends with: an allocation never cuts a
    /// file off that has grown meanwhile.
    Extend {
        /// Where it begins.
        from: u64,
        /// Where it ends.
        end: u64,
    },
}

/// A file, as it is and as it may be after a crash.
#[derive(Clone, Debug, Default)]
pub struct File {
    /// What readers see.
    pub current: Vec<u8>,
    /// What no crash can take away.
    pub durable: Contents,
    /// Completed and not durable, oldest first, with the moment of completion.
    pub pending: Vec<(u64, Change)>,
    /// The sectors that have space on the host. But for some at its end the file was made without holes.
    pub(super) has_space: Vec<bool>,
}

/// What an operation does.
pub(super) enum Kind {
    Read {
        at: u64,
        buf: Buf,
    },
    Change(Change),
    /// With the moment of its issue.
    Sync(u64),
    /// The file system cannot do this.
    Refused,
}

impl Kind {
    /// Whether it writes something that is neither a guest's data nor zeros.
    pub(super) fn is_metadata(&self) -> bool {
        let Self::Change(Change::Write { bytes, .. }) = self else { return false };
        bytes.chunks_exact(SECTOR).any(|sector| Value::read(sector) == Value::Foreign)
    }
}

impl Change {
    /// Carries the change out on the bytes of a file.
    pub fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write { at, bytes: new } => {
                let (start, end) = (*at as usize, *at as usize + new.len());
                bytes.resize(bytes.len().max(end), 0);
                bytes[start..end].copy_from_slice(new);
            }
            Self::Punch { at, len } => {
                let end = bytes.len().min((at + len) as usize);
                let start = (*at as usize).min(end);
                bytes[start..end].fill(0);
            }
            Self::Length(len) => bytes.resize(*len as usize, 0),
            Self::Extend { end, .. } => bytes.resize(bytes.len().max(*end as usize), 0),
        }
    }

    /// The bytes that it may change in a file of this length.
    pub(super) fn reach(&self, file_len: usize) -> Range<usize> {
        match *self {
            Self::Write { at, ref bytes } => (at as usize).min(file_len)..at as usize + bytes.len(),
            Self::Punch { at, len } => (at as usize).min(file_len)..file_len.min((at + len) as usize),
            Self::Length(len) => file_len.min(len as usize)..file_len.max(len as usize),
            Self::Extend { end, .. } => file_len.min(end as usize)..file_len.max(end as usize),
        }
    }

    /// The bytes that it needs space for, or gives the space of back.
    fn space(&self) -> Range<u64> {
        match *self {
            Self::Write { at, ref bytes } => at..at + bytes.len() as u64,
            Self::Punch { at, len } => at..at + len,
            Self::Extend { from, end } => from..end,
            Self::Length(len) => len..u64::MAX,
        }
    }
}

impl File {
    pub(super) fn carry_out(&mut self, kind: Kind, now: u64, fault: Option<Fault>) -> io::Result<usize> {
        let error = match fault {
            Some(Fault::Eio | Fault::Torn | Fault::Done) => Some(libc::EIO),
            Some(Fault::Enospc) => Some(libc::ENOSPC),
            Some(Fault::Short) | None => None,
        };
        if let Some(error) = error {
            match kind {
                Kind::Change(change) if fault == Some(Fault::Done) => self.change(now, change),
                // As a kernel does: what could not be written counts as written, and is read as such.
                Kind::Sync(issued) => drop(self.settle(issued)),
                Kind::Change(Change::Write { at, bytes }) if fault == Some(Fault::Torn) => {
                    let half = bytes.len().div_ceil(2).next_multiple_of(SECTOR).min(bytes.len());
                    self.change(now, Change::Write { at, bytes: bytes[..half].into() });
                }
                _ => {}
            }
            return Err(io::Error::from_raw_os_error(error));
        }
        let is_short = fault == Some(Fault::Short);
        match kind {
            Kind::Refused => Err(io::ErrorKind::Unsupported.into()),
            Kind::Read { at, buf } => {
                let start = self.current.len().min(at as usize);
                let mut len = buf.len().min(self.current.len() - start);
                if is_short && len > SECTOR {
                    len = len / 2 / SECTOR * SECTOR;
                }
                buf.copy_from(0, &self.current[start..start + len]);
                Ok(len)
            }
            Kind::Change(Change::Write { at, bytes }) if is_short && bytes.len() > SECTOR => {
                let half: Arc<[u8]> = bytes[..bytes.len() / 2 / SECTOR * SECTOR].into();
                let len = half.len();
                self.change(now, Change::Write { at, bytes: half });
                Ok(len)
            }
            Kind::Change(change) => {
                let len = if let Change::Write { bytes, .. } = &change { bytes.len() } else { 0 };
                self.change(now, change);
                Ok(len)
            }
            Kind::Sync(issued) => {
                for (_, change) in self.settle(issued) {
                    self.durable.apply(&change);
                }
                Ok(0)
            }
        }
    }

    /// So many sectors at the end have no space on the host.
    pub(super) fn give_up_end(&mut self, sectors: usize) {
        let end = self.has_space.len();
        self.has_space[end - sectors..].fill(false);
    }

    /// Takes out what a barrier covers that was issued at this moment.
    fn settle(&mut self, issued: u64) -> Vec<(u64, Change)> {
        let covered = self.pending.partition_point(|(completed, _)| *completed <= issued);
        self.pending.drain(..covered).collect()
    }

    /// Whether a host that is full has to refuse this.
    pub(super) fn lacks_space(&self, kind: &Kind) -> bool {
        let Kind::Change(change @ (Change::Write { .. } | Change::Extend { .. })) = kind else {
            return false;
        };
        let Range { start, end } = change.space();
        let sectors = start as usize / SECTOR..(end as usize).div_ceil(SECTOR);
        !self.has_space.get(sectors).is_some_and(|sectors| sectors.iter().all(|&has_space| has_space))
    }

    /// What is read is what is on disk, and what is still to be written there.
    pub(super) fn drop_cached(&mut self) {
        self.current = self.durable.bytes().to_vec();
        for (_, change) in &self.pending {
            change.apply(&mut self.current);
        }
        self.has_space.resize(self.current.len().div_ceil(SECTOR), false);
    }

    /// Whether the file may become longer by this.
    pub(super) fn is_lengthened_by(&self, kind: &Kind) -> bool {
        let len = self.current.len();
        matches!(kind, Kind::Change(change) if change.reach(len).end > len)
    }

    pub(super) fn change(&mut self, now: u64, change: Change) {
        change.apply(&mut self.current);
        self.has_space.resize(self.current.len().div_ceil(SECTOR), false);
        let Range { start, end } = change.space();
        let sectors = start as usize / SECTOR..self.has_space.len().min((end as usize).div_ceil(SECTOR));
        if let Some(sectors) = self.has_space.get_mut(sectors) {
            sectors.fill(matches!(change, Change::Write { .. } | Change::Extend { .. }));
        }
        self.pending.push((now, change));
    }
}
