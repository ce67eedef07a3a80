//! A simulated disk with a volatile cache.
//!
//! Operations wait until the simulator completes one of them; which one is its choice. A write
//! takes effect for readers when it completes. It is durable only after a barrier that was *issued*
//! after that. Until then a crash may keep it or lose it, and a write that has not completed may be
//! there as well. The file's length is an item of its own. What a failed barrier should have covered is
//! lost, though it goes on being read.

use super::{
    contents::Contents,
    faults::{Failing, Fault, FileSystem, HeldBack},
    file::{Change, File, Kind, SECTOR},
};
use crate::{
    RuleName,
    io::{Access, Buf, FileId, Io, Storage},
};
use std::{
    cell::RefCell,
    future::Future,
    io,
    path::Path,
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
};

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
    /// Somebody has gone away who waited for an operation.
    has_abandoned: bool,
    /// So many reads have.
    failed_reads: u64,
    /// So many holes were to be punched.
    punches: u64,
    file_system: FileSystem,
    /// The rule whose barriers are left out.
    disabled: Option<RuleName>,
    /// Moves whenever what a crash may leave has changed.
    version: u64,
}

struct Operation {
    id: u64,
    file: usize,
    kind: Kind,
    is_direct: bool,
    /// Nobody waits for it any more.
    is_orphan: bool,
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

    /// Whether space can be allocated ahead.
    #[must_use]
    pub fn allocates(&self) -> bool {
        self.0.borrow().file_system.allocates
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

    /// Who waits for an operation of the kind that may be left behind.
    #[must_use]
    pub fn who_waits(&self, held_back: HeldBack) -> Option<Waker> {
        let index = self.held_back(held_back)?;
        let state = self.0.borrow();
        let operation = state.waiting.get(index)?;
        let (_, waker) = state.wakers.iter().find(|(id, _)| *id == operation.id)?;
        Some(waker.clone())
    }

    /// How many of the operations that wait nobody waits for any more. They come first then.
    pub fn put_orphans_first(&self) -> usize {
        let waiting = &mut self.0.borrow_mut().waiting;
        waiting.sort_by_key(|operation| !operation.is_orphan);
        waiting.partition_point(|operation| operation.is_orphan)
    }

    /// Which of the operations that wait is to be left behind.
    #[must_use]
    pub fn held_back(&self, held_back: HeldBack) -> Option<usize> {
        let state = self.0.borrow();
        let grows = |operation: &Operation| state.files[operation.file].is_lengthened_by(&operation.kind);
        match held_back {
            HeldBack::Nothing => None,
            HeldBack::Oldest => Some(0),
            HeldBack::Growth => state.waiting.iter().position(grows),
            HeldBack::Direct => state.waiting.iter().position(|operation| operation.is_direct),
            HeldBack::Punch => state
                .waiting
                .iter()
                .position(|operation| matches!(operation.kind, Kind::Change(Change::Punch { .. }))),
            HeldBack::Below => state.waiting.iter().position(|operation| operation.file > 0),
            HeldBack::Metadata => state.waiting.iter().position(|operation| operation.kind.is_metadata()),
        }
    }

    /// How many holes were to be punched so far.
    pub(super) fn punch_count(&self) -> u64 {
        self.0.borrow().punches
    }

    /// How many reads have failed so far.
    pub(super) fn failed_reads(&self) -> u64 {
        self.0.borrow().failed_reads
    }

    /// Whether a barrier has failed, so that what is read need not be what is on disk one day.
    #[must_use]
    pub fn has_lost(&self) -> bool {
        self.0.borrow().has_lost
    }

    /// Whether somebody has gone away who waited for an operation.
    pub(super) fn has_abandoned(&self) -> bool {
        self.0.borrow().has_abandoned
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
        let mut fault =
            state.failing.as_mut().and_then(|failing| failing.strike(operation.file, &operation.kind));
        state.completed += 1;
        let now = state.completed;
        let file = &mut state.files[operation.file];
        let is_full = state.fills_after.is_some_and(|full| now > full) && file.lacks_space(&operation.kind);
        if is_full || !state.file_system.changes_length && file.is_lengthened_by(&operation.kind) {
            fault = Some(Fault::Enospc);
        }
        let has_failed = fault.is_some_and(Fault::is_error);
        state.has_lost |= matches!(operation.kind, Kind::Sync(_)) && has_failed;
        state.failed_reads += u64::from(matches!(operation.kind, Kind::Read { .. }) && has_failed);
        state.version += u64::from(!matches!(operation.kind, Kind::Read { .. }));
        let result = file.carry_out(operation.kind, now, fault);
        state.lengths[operation.file].store(file.current.len() as u64, Ordering::Relaxed);
        state.results.push((operation.id, result));
        if let Some(index) = state.wakers.iter().position(|(id, _)| *id == operation.id) {
            state.wakers.swap_remove(index).1.wake();
        }
    }

    /// What the next process finds when this one is killed: all that has completed, durable or not,
    /// and what has `landed` of each change that is in flight.
    #[must_use]
    pub fn after_kill(&self, mut landed: impl FnMut(&Change) -> Option<Change>) -> Self {
        let state = self.0.borrow();
        let mut files = state.files.clone();
        for operation in &state.waiting {
            if let Kind::Change(change) = &operation.kind
                && let Some(change) = landed(change)
            {
                files[operation.file].change(0, change);
            }
        }
        // The new disk's clock begins at 0: a barrier that it is asked for covers all of this.
        for (completed, _) in files.iter_mut().flat_map(|file| &mut file.pending) {
            *completed = 0;
        }
        Self::around(files, state.file_system)
    }

    /// The host forgets what it kept in memory and took to be on disk: what a failed barrier should have covered
    /// is not read any more.
    pub fn drop_cached(&self) {
        let mut state = self.0.borrow_mut();
        let State { files, lengths, .. } = &mut *state;
        for (file, len) in files.iter_mut().zip(lengths.iter()) {
            file.drop_cached();
            len.store(file.current.len() as u64, Ordering::Relaxed);
        }
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
        let kind = kind(state.completed);
        state.punches += u64::from(matches!(kind, Kind::Change(Change::Punch { .. })));
        let kind = state.file_system.admit(kind);
        assert!(file.0 == 0 || !matches!(kind, Kind::Change(_)), "what is below the image never changes");
        state.version += u64::from(matches!(kind, Kind::Change(_)));
        state.waiting.push(Operation { id, file: file.0 as usize, kind, is_direct, is_orphan: false });
        Pending { disk: self.clone(), id }
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

impl Drop for Pending {
    fn drop(&mut self) {
        let state = &mut *self.disk.0.borrow_mut();
        if let Some(operation) = state.waiting.iter_mut().find(|operation| operation.id == self.id) {
            operation.is_orphan = true;
            state.has_abandoned = true;
        }
    }
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

    /// It ends when the disk happens to get to it.
    async fn pause(&self) {
        // A fault may hit it; it is over all the same.
        let _ = self.read(FileId(0), 0, Buf::zeroed(SECTOR)).await;
    }
}
