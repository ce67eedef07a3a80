//! The memory of a redo log, which outlives processes; and what a process leaves when it is killed, also in
//! the middle of what it does between two operations of the disk: a trap springs when it touches its log.

use super::{disk::Disk, file::Change, file::SECTOR, model::Model, rng::Rng};
use crate::{MIN_REDO_BYTES, RedoError, RedoLog};
use std::{
    cell::RefCell,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// The memory of a redo log.
pub(super) struct Memory(Arc<Words>);

struct Words(Vec<AtomicU64>);

impl AsRef<[AtomicU64]> for Words {
    /// The log asks for its memory each time that it reads or writes a word.
    fn as_ref(&self) -> &[AtomicU64] {
        TRAP.with_borrow_mut(|trap| trap.iter_mut().for_each(|trap| trap.touch(self)));
        &self.0
    }
}

/// What is left of a process that is killed at some moment.
pub(super) struct Moment {
    pub(super) disk: Disk,
    /// A barrier had failed.
    pub(super) has_lost: bool,
    pub(super) model: Model,
    pub(super) redo: Memory,
}

/// Keeps the moment of a touch.
struct Trap {
    /// So many touches pass before it springs.
    left: u64,
    disk: Disk,
    model: Rc<RefCell<Model>>,
    rng: Rng,
    caught: Option<Moment>,
}

thread_local! {
    static TRAP: RefCell<Option<Trap>> = const { RefCell::new(None) };
}

impl Memory {
    pub(super) fn new() -> Self {
        Self(Arc::new(Words((0..MIN_REDO_BYTES / 8).map(|_| AtomicU64::new(0)).collect())))
    }

    pub(super) fn create(&self) -> Result<RedoLog, RedoError> {
        RedoLog::create(Arc::clone(&self.0) as _)
    }

    pub(super) fn open(&self) -> Result<RedoLog, RedoError> {
        RedoLog::open(Arc::clone(&self.0) as _)
    }
}

impl Words {
    /// As they are now, for a process that goes another way from here.
    fn copy(&self) -> Self {
        Self(self.0.iter().map(|word| AtomicU64::new(word.load(Ordering::Relaxed))).collect())
    }
}

impl Moment {
    /// The present one; of what is in flight chance decides what has landed.
    pub(super) fn now(disk: &Disk, model: &Model, redo: &Memory, rng: &mut Rng) -> Self {
        Self::of(disk, model, &redo.0, rng)
    }

    fn of(disk: &Disk, model: &Model, words: &Words, rng: &mut Rng) -> Self {
        let keeps = rng.below(4);
        Self {
            disk: disk.after_kill(|change| landed(keeps, change, rng)),
            has_lost: disk.has_lost(),
            model: model.clone(),
            redo: Memory(Arc::new(words.copy())),
        }
    }
}

/// What has landed of a change in flight: nothing, all, chance decides, or chance decides and writes are
/// torn.
fn landed(keeps: u64, change: &Change, rng: &mut Rng) -> Option<Change> {
    if keeps == 0 || keeps > 1 && rng.below(2) == 0 {
        return None;
    }
    let Change::Write { at, bytes } = change else { return Some(change.clone()) };
    let sectors = bytes.len() / SECTOR;
    if keeps < 3 || sectors < 2 {
        return Some(change.clone());
    }
    let cut = (1 + rng.below(sectors as u64 - 1) as usize) * SECTOR;
    Some(match rng.below(2) {
        0 => Change::Write { at: *at, bytes: bytes[..cut].into() },
        _ => Change::Write { at: at + cut as u64, bytes: bytes[cut..].into() },
    })
}

impl Trap {
    fn touch(&mut self, words: &Words) {
        if self.left == 0 && self.caught.is_none() {
            self.caught = Some(Moment::of(&self.disk, &self.model.borrow(), words, &mut self.rng));
        }
        self.left = self.left.saturating_sub(1);
    }
}

/// Sets a trap, in place of any that was set.
pub(super) fn set_trap(passes: u64, disk: &Disk, model: &Rc<RefCell<Model>>, rng: Rng) {
    TRAP.set(Some(Trap { left: passes, disk: disk.clone(), model: Rc::clone(model), rng, caught: None }));
}

/// Takes the trap away, with what it has caught.
pub(super) fn take_trap() -> Option<Moment> {
    TRAP.take()?.caught
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{redo::Record, sim::model::Value};
    use qcow2_format::HostCluster;

    /// A server was killed between the records of a moved refcount table, and no successor could replay the
    /// log: a process dies at its log, too, and finds all of a change there or none.
    #[test]
    fn a_process_dies_wherever_it_touches_its_log() {
        let (table, block) = (HostCluster(7), HostCluster(8));
        let records =
            [Record::Table { index: 0, cluster: table }, Record::Block { block: 0, cluster: block }];
        let model = Rc::new(RefCell::new(Model::new(&[Value::Zero])));
        let mut seen = Vec::new();
        for touches in 0.. {
            let memory = Memory::new();
            let mut log = memory.create().unwrap();
            set_trap(touches, &Disk::default(), &model, Rng::new(1));
            log.append(records);
            let Some(moment) = take_trap() else { break };
            seen.push(moment.redo.open().unwrap().records().unwrap().len());
        }
        assert!(seen.len() > 4 && seen.iter().all(|&found| found == 0), "{seen:?}");
        let memory = Memory::new();
        let mut log = memory.create().unwrap();
        log.append(records[..1].iter().copied());
        set_trap(0, &Disk::default(), &model, Rng::new(1));
        log.append(records[1..].iter().copied());
        let moment = take_trap().unwrap();
        assert_eq!(
            moment.redo.open().unwrap().records().unwrap(),
            records[..1],
            "it dies between two changes"
        );
    }
}
