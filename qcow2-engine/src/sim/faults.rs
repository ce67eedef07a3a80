//! What a host may do to an operation: let it fail, in part or all the same done; keep it until everything
//! else has moved on.

use super::file::{Change, Kind};

/// What the host does to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Input/output error.
    Eio,
    /// No space left.
    Enospc,
    /// Half of a read or write is carried out, and reported.
    Short,
    /// Input/output error, and half of a write has been carried out.
    Torn,
    /// Input/output error, and all of it has been carried out: the answer was lost on its way.
    Done,
}

/// Which operations fail, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failing {
    /// The kind of operation.
    pub victim: Victim,
    /// So many of that kind do not fail first.
    pub after: u64,
    /// So many of that kind fail then, one after the other.
    pub times: u64,
    /// What happens to them.
    pub fault: Fault,
}

/// A kind of operation that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// Each.
    Any,
    /// A read.
    Read,
    /// A write.
    Write,
    /// A write of anything but a guest's data.
    Metadata,
    /// One that makes the file longer without writing to it.
    Growth,
    /// A barrier.
    Sync,
    /// One that makes the file longer without writing to it, or a read.
    GrowthOrRead,
    /// A read of a file below the image.
    Below,
}

/// Which operation is left behind for as long as there are others, though not for ever: it lands when
/// everything else has moved on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldBack {
    /// None.
    Nothing,
    /// The oldest.
    Oldest,
    /// One that makes a file longer, if there is one.
    Growth,
    /// A transfer that the engine does not wait for (`direct.rs`), if there is one.
    Direct,
    /// A hole that is being punched, if there is one.
    Punch,
    /// A write of metadata, if there is one.
    Metadata,
    /// A read of a file below the image, if there is one.
    Below,
}

/// What the file system can do besides reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Space can be allocated ahead.
    pub allocates: bool,
    /// Holes can be punched.
    pub punches: bool,
    /// A file can become longer and shorter.
    pub changes_length: bool,
}

impl FileSystem {
    /// One that can do everything.
    pub const ABLE: Self = Self { allocates: true, punches: true, changes_length: true };
    /// None: the file is a block device.
    pub const DEVICE: Self = Self { allocates: false, punches: true, changes_length: false };

    /// What becomes of an operation here.
    pub(super) fn admit(self, kind: Kind) -> Kind {
        match kind {
            Kind::Change(Change::Extend { .. }) if !self.allocates => Kind::Refused,
            Kind::Change(Change::Length(_)) if !self.changes_length => Kind::Refused,
            Kind::Change(Change::Punch { .. }) if !self.punches => Kind::Refused,
            other => other,
        }
    }
}

impl Default for FileSystem {
    fn default() -> Self {
        Self::ABLE
    }
}

impl Fault {
    pub(super) fn is_error(self) -> bool {
        self != Self::Short
    }
}

impl Failing {
    /// An operation's turn: what happens to it.
    pub(super) fn strike(&mut self, file: usize, kind: &Kind) -> Option<Fault> {
        if !self.victim.is(file, kind) || self.times == 0 {
            return None;
        }
        if self.after > 0 {
            self.after -= 1;
            return None;
        }
        self.times -= 1;
        Some(self.fault)
    }
}

impl Victim {
    fn is(self, file: usize, kind: &Kind) -> bool {
        match self {
            Self::Any => true,
            Self::Read => matches!(kind, Kind::Read { .. }),
            Self::Write => matches!(kind, Kind::Change(Change::Write { .. })),
            Self::Metadata => kind.is_metadata(),
            Self::Growth => matches!(kind, Kind::Change(Change::Extend { .. } | Change::Length(_))),
            Self::Sync => matches!(kind, Kind::Sync(_)),
            Self::GrowthOrRead => Self::Growth.is(file, kind) || Self::Read.is(file, kind),
            Self::Below => file > 0,
        }
    }
}
