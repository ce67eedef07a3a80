//! A simulated disk with a volatile cache.
//!
//! Operations wait until the simulator completes one of them; which one is its choice. A write
//! takes effect for readers when it completes. It is durable only after a barrier that was *issued*
//! after that. Until then a crash may keep it or lose it, and a write that has not completed may be
//! there as well. The file's length is an item of its own. What a failed barrier should have covered is
//! lost, though it goes on being read.

use super::{contents::Contents, model::Value};
use crate::{
    RuleName,
    io::{Access, Buf, FileId, Io, Storage},
};
use std::{
    cell::RefCell,
    future::Future,
    io,
    ops::Range,
    path::Path,
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
};

/// The unit that is written whole or not at all.
pub const SECTOR: usize = 512;

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
    /// Space for all that lies between, and at least the length that it ends with: an allocation never cuts a file
    /// off that has grown meanwhile.
    Extend {
        /// Where it begins.
        from: u64,
        /// Where it ends.
        end: u64,
    },
}

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
}

/// What the file system can do besides reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Space can be allocated ahead.
    pub allocates: bool,
    /// Holes can be punched.
    pub punches: bool,
}

impl FileSystem {
    /// One that can do everything.
    pub const ABLE: Self = Self { allocates: true, punches: true };

    /// What becomes of an operation here.
    fn admit(self, kind: Kind) -> Kind {
        match kind {
            Kind::Change(Change::Extend { .. }) if !self.allocates => Kind::Refused,
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

/// The disk. Clones share it.
#[derive(Clone, Default)]
pub struct Disk(Rc<RefCell<State>>);

/// Opens the disk's files; only used to hand them to `Image::open`.
pub struct Names {
    names: Vec<String>,
    lengths: Arc<[AtomicU64]>,
}

#[derive(Default)]
struct State {
    files: Vec<File>,
    /// The lengths of the files as they are.
    lengths: Arc<[AtomicU64]>,
    /// Issued and not completed.
    waiting: Vec<Operation>,
    results: Vec<(u64, io::Result<usize>)>,
    wakers: Vec<(u64, Waker)>,
    next_id: u64,
    /// Operations completed so far.
    completed: u64,
    failing: Option<Failing>,
    /// So many operations may complete before the host has no room for more.
    fills_after: Option<u64>,
    /// A barrier has failed.
    has_lost: bool,
    file_system: FileSystem,
    /// The rule whose barriers are left out.
    disabled: Option<RuleName>,
    /// Moves whenever what a crash may leave has changed.
    version: u64,
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
    /// The sectors that have space on the host. The file was made without holes.
    pub(super) has_space: Vec<bool>,
}

struct Operation {
    id: u64,
    file: usize,
    kind: Kind,
    is_direct: bool,
}

enum Kind {
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

impl Fault {
    fn is_error(self) -> bool {
        self != Self::Short
    }
}

impl Failing {
    /// An operation's turn: what happens to it.
    fn strike(&mut self, kind: &Kind) -> Option<Fault> {
        if !self.victim.is(kind) || self.times == 0 {
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

impl Kind {
    /// Whether it writes something that is neither a guest's data nor zeros.
    fn is_metadata(&self) -> bool {
        let Self::Change(Change::Write { bytes, .. }) = self else { return false };
        bytes.chunks_exact(SECTOR).any(|sector| Value::read(sector) == Value::Foreign)
    }
}

impl Victim {
    fn is(self, kind: &Kind) -> bool {
        match self {
            Self::Any => true,
            Self::Read => matches!(kind, Kind::Read { .. }),
            Self::Write => matches!(kind, Kind::Change(Change::Write { .. })),
            Self::Metadata => kind.is_metadata(),
            Self::Growth => matches!(kind, Kind::Change(Change::Extend { .. } | Change::Length(_))),
            Self::Sync => matches!(kind, Kind::Sync(_)),
        }
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

impl Disk {
    /// A disk with files of this content, all durable.
    #[must_use]
    pub fn new(contents: &[&[u8]]) -> Self {
        let durable = |bytes: &[u8]| File {
            current: bytes.to_vec(),
            durable: Contents::new(bytes.to_vec()),
            pending: Vec::new(),
            has_space: vec![true; bytes.len().div_ceil(SECTOR)],
        };
        let files = contents.iter().map(|bytes| durable(bytes)).collect();
        Self::around(files, FileSystem::ABLE)
    }

    fn around(files: Vec<File>, file_system: FileSystem) -> Self {
        let lengths = files.iter().map(|file| AtomicU64::new(file.current.len() as u64)).collect();
        Self(Rc::new(RefCell::new(State { files, lengths, file_system, ..State::default() })))
    }

    /// From now on operations fail in this way.
    pub fn fail(&self, failing: Failing) {
        self.0.borrow_mut().failing = Some(failing);
    }

    /// The host is full when so many operations have completed, and stays so, whatever is given back.
    pub fn fill_after(&self, operations: u64) {
        self.0.borrow_mut().fills_after = Some(operations);
    }

    /// Whether holes can be punched.
    #[must_use]
    pub fn punches(&self) -> bool {
        self.0.borrow().file_system.punches
    }

    /// Whether the host will be full one day, and can allocate ahead until then.
    #[must_use]
    pub fn is_scarce(&self) -> bool {
        let state = self.0.borrow();
        state.fills_after.is_some() && state.file_system.allocates
    }

    /// From now on the files are on a file system that can do this.
    pub fn set_file_system(&self, file_system: FileSystem) {
        self.0.borrow_mut().file_system = file_system;
    }

    /// From now on the barriers that this rule of a tool asks for are left out.
    pub fn disable_rule(&self, rule: RuleName) {
        self.0.borrow_mut().disabled = Some(rule);
    }

    /// How many operations wait for completion.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.borrow().waiting.len()
    }

    /// Which of the operations that wait is to be left behind.
    #[must_use]
    pub fn held_back(&self, held_back: HeldBack) -> Option<usize> {
        let state = self.0.borrow();
        let grows = |operation: &Operation| match &operation.kind {
            Kind::Change(change) => {
                let len = state.files[operation.file].current.len();
                change.reach(len).end > len
            }
            Kind::Read { .. } | Kind::Sync(_) | Kind::Refused => false,
        };
        match held_back {
            HeldBack::Nothing => None,
            HeldBack::Oldest => Some(0),
            HeldBack::Growth => state.waiting.iter().position(grows),
            HeldBack::Direct => state.waiting.iter().position(|operation| operation.is_direct),
            HeldBack::Punch => state
                .waiting
                .iter()
                .position(|operation| matches!(operation.kind, Kind::Change(Change::Punch { .. }))),
            HeldBack::Metadata => state.waiting.iter().position(|operation| operation.kind.is_metadata()),
        }
    }

    /// Whether a barrier has failed, so that what is read need not be what is on disk one day.
    #[must_use]
    pub fn has_lost(&self) -> bool {
        self.0.borrow().has_lost
    }

    /// How many operations have completed.
    #[must_use]
    pub fn completed(&self) -> u64 {
        self.0.borrow().completed
    }

    /// A number that moves whenever what a crash may leave has changed.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.0.borrow().version
    }

    /// Completes the `choice`-th waiting operation.
    pub fn complete(&self, choice: usize) {
        let mut state = self.0.borrow_mut();
        let state = &mut *state;
        let operation = state.waiting.remove(choice);
        let mut fault = state.failing.as_mut().and_then(|failing| failing.strike(&operation.kind));
        state.completed += 1;
        let now = state.completed;
        let file = &mut state.files[operation.file];
        if state.fills_after.is_some_and(|full| now > full) && file.lacks_space(&operation.kind) {
            fault = Some(Fault::Enospc);
        }
        state.has_lost |= matches!(operation.kind, Kind::Sync(_)) && fault.is_some_and(Fault::is_error);
        state.version += u64::from(!matches!(operation.kind, Kind::Read { .. }));
        let result = file.carry_out(operation.kind, now, fault);
        state.lengths[operation.file].store(file.current.len() as u64, Ordering::Relaxed);
        state.results.push((operation.id, result));
        if let Some(index) = state.wakers.iter().position(|(id, _)| *id == operation.id) {
            state.wakers.swap_remove(index).1.wake();
        }
    }

    /// What the next process finds when this one is killed: all that has completed, durable or not,
    /// and of what is in flight whatever `keeps`.
    #[must_use]
    pub fn after_kill(&self, mut keeps: impl FnMut() -> bool) -> Self {
        let state = self.0.borrow();
        let mut files = state.files.clone();
        for operation in &state.waiting {
            if let Kind::Change(change) = &operation.kind
                && keeps()
            {
                files[operation.file].change(0, change.clone());
            }
        }
        // The new disk's clock begins at 0: a barrier that it is asked for covers all of this.
        for (completed, _) in files.iter_mut().flat_map(|file| &mut file.pending) {
            *completed = 0;
        }
        Self::around(files, state.file_system)
    }

    /// Opens the disk's files under these names.
    #[must_use]
    pub fn names(&self, names: &[&str]) -> Names {
        let names = names.iter().map(|&name| name.to_owned()).collect();
        Names { names, lengths: Arc::clone(&self.0.borrow().lengths) }
    }

    /// Looks at a file, and at the changes to it that have been issued and not completed. Whoever
    /// changes it on that occasion leaves it as it was.
    pub fn look<T>(&self, file: usize, look: impl FnOnce(&mut File, Vec<Change>) -> T) -> T {
        let mut state = self.0.borrow_mut();
        let in_flight = state.waiting.iter().filter(|operation| operation.file == file);
        let changes = in_flight.filter_map(|operation| match &operation.kind {
            Kind::Change(change) => Some(change.clone()),
            Kind::Read { .. } | Kind::Sync(_) | Kind::Refused => None,
        });
        let changes = changes.collect();
        look(&mut state.files[file], changes)
    }

    /// A read by one who has asked the engine where the bytes are.
    pub(super) async fn read_directly(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.issue_as(true, file, |_| Kind::Read { at, buf }).await
    }

    /// As [`Self::read_directly`].
    pub(super) async fn write_directly(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        let bytes = buf.to_vec().into();
        self.issue_as(true, file, |_| Kind::Change(Change::Write { at, bytes })).await
    }

    fn issue(&self, file: FileId, kind: impl FnOnce(u64) -> Kind) -> Pending {
        self.issue_as(false, file, kind)
    }

    fn issue_as(&self, is_direct: bool, file: FileId, kind: impl FnOnce(u64) -> Kind) -> Pending {
        let mut state = self.0.borrow_mut();
        state.next_id += 1;
        let id = state.next_id;
        let kind = state.file_system.admit(kind(state.completed));
        state.version += u64::from(matches!(kind, Kind::Change(_)));
        state.waiting.push(Operation { id, file: file.0 as usize, kind, is_direct });
        Pending { disk: self.clone(), id }
    }
}

impl File {
    fn carry_out(&mut self, kind: Kind, now: u64, fault: Option<Fault>) -> io::Result<usize> {
        let error = match fault {
            Some(Fault::Eio | Fault::Torn) => Some(libc::EIO),
            Some(Fault::Enospc) => Some(libc::ENOSPC),
            Some(Fault::Short) | None => None,
        };
        if let Some(error) = error {
            match kind {
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

    /// Takes out what a barrier covers that was issued at this moment.
    fn settle(&mut self, issued: u64) -> Vec<(u64, Change)> {
        let covered = self.pending.partition_point(|(completed, _)| *completed <= issued);
        self.pending.drain(..covered).collect()
    }

    /// Whether a host that is full has to refuse this.
    fn lacks_space(&self, kind: &Kind) -> bool {
        let Kind::Change(change @ (Change::Write { .. } | Change::Extend { .. })) = kind else {
            return false;
        };
        let Range { start, end } = change.space();
        let sectors = start as usize / SECTOR..(end as usize).div_ceil(SECTOR);
        !self.has_space.get(sectors).is_some_and(|sectors| sectors.iter().all(|&has_space| has_space))
    }

    fn change(&mut self, now: u64, change: Change) {
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

impl Storage for Names {
    fn open(&self, path: &Path, _access: Access) -> io::Result<FileId> {
        let index = self.names.iter().position(|name| Path::new(name) == path);
        index.map(|index| FileId(index as u32)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        let len = self.lengths.get(file.0 as usize).map(|len| len.load(Ordering::Relaxed));
        len.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// An issued operation. Dropping it leaves the operation on the disk.
struct Pending {
    disk: Disk,
    id: u64,
}

impl Future for Pending {
    type Output = io::Result<usize>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.disk.0.borrow_mut();
        match state.results.iter().position(|(id, _)| *id == self.id) {
            Some(index) => Poll::Ready(state.results.swap_remove(index).1),
            None => {
                state.wakers.retain(|(id, _)| *id != self.id);
                state.wakers.push((self.id, context.waker().clone()));
                Poll::Pending
            }
        }
    }
}

impl Io for Disk {
    async fn read(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.issue(file, |_| Kind::Read { at, buf }).await
    }

    async fn write(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.issue(file, |_| Kind::Change(Change::Write { at, bytes: buf.to_vec().into() })).await
    }

    async fn sync(&self, file: FileId) -> io::Result<()> {
        self.issue(file, Kind::Sync).await.map(drop)
    }

    async fn barrier(&self, file: FileId, rule: RuleName) -> io::Result<()> {
        let is_left_out = self.0.borrow().disabled == Some(rule);
        if is_left_out { Ok(()) } else { self.sync(file).await }
    }

    async fn allocate(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        self.issue(file, |_| Kind::Change(Change::Extend { from: at, end: at + len })).await.map(drop)
    }

    async fn punch_hole(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        self.issue(file, |_| Kind::Change(Change::Punch { at, len })).await.map(drop)
    }

    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.issue(file, |_| Kind::Change(Change::Length(len))).await.map(drop)
    }
}
