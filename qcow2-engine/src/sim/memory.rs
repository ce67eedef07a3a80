//! The memory of a redo log, which outlives processes; and what a process leaves when it is killed, also in
//! the middle of what it does between two operations of the disk: a trap springs when it touches its log.

use super::{disk::Disk, file::Change, file::SECTOR, model::Model, rng::Rng};
use crate::{
    Image, MIN_REDO_BYTES, RedoError, RedoLog,
    redo::{HEADER_WORDS, Record, TAIL},
};
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
    /// So many touches pass before it springs; none is enough, and it springs where the refcount table has
    /// just moved.
    left: Option<u64>,
    /// The end of the log's records when it was touched last.
    tail: u64,
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

    /// A new log that has so many records already, each of which says what is so.
    pub(super) fn create_with(&self, records: u64, image: &Image) -> Result<RedoLog, RedoError> {
        let mut log = self.create()?;
        let block = image.meta.lock().refcounts.block_at(0).ok().flatten();
        if let Some(at) = block {
            let known = Record::Block { block: 0, cluster: image.geometry().host_cluster(at) };
            log.append((0..records).map(|_| known));
        }
        Ok(log)
    }

    pub(super) fn open(&self) -> Result<RedoLog, RedoError> {
        RedoLog::open(Arc::clone(&self.0) as _)
    }
}

impl Words {
    fn word(&self, index: usize) -> u64 {
        self.0[index].load(Ordering::Relaxed)
    }

    /// The number of the record after the last one.
    fn tail(&self) -> u64 {
        self.word(TAIL)
    }

    /// Whether a record says that the refcount table has another place.
    fn moves_table(&self, at: u64) -> bool {
        let capacity = (self.0.len() - HEADER_WORDS) / 2;
        let first = HEADER_WORDS + 2 * (at as usize % capacity);
        let record = Record::of_words(self.word(first), self.word(first + 1));
        matches!(record, Some(Record::RefcountTable { .. }))
    }

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
        let tail = std::mem::replace(&mut self.tail, words.tail());
        let springs = match &mut self.left {
            Some(0) => true,
            Some(left) => {
                *left -= 1;
                false
            }
            None => (tail..self.tail).any(|at| words.moves_table(at)),
        };
        if springs && self.caught.is_none() {
            self.caught = Some(Moment::of(&self.disk, &self.model.borrow(), words, &mut self.rng));
        }
    }
}

/// Sets a trap, in place of any that was set.
pub(super) fn set_trap(
    passes: Option<u64>,
    redo: &Memory,
    disk: &Disk,
    model: &Rc<RefCell<Model>>,
    rng: Rng,
) {
    let (disk, model, tail) = (disk.clone(), Rc::clone(model), redo.0.tail());
    TRAP.set(Some(Trap { left: passes, tail, disk, model, rng, caught: None }));
}

/// Takes the trap away, with what it has caught.
pub(super) fn take_trap() -> Option<Moment> {
    TRAP.take()?.caught
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::model::Value;
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
            set_trap(Some(touches), &memory, &Disk::default(), &model, Rng::new(1));
            log.append(records);
            let Some(moment) = take_trap() else { break };
            seen.push(moment.redo.open().unwrap().records().unwrap().len());
        }
        assert!(seen.len() > 4 && seen.iter().all(|&found| found == 0), "{seen:?}");
        let memory = Memory::new();
        let mut log = memory.create().unwrap();
        log.append(records[..1].iter().copied());
        set_trap(Some(0), &memory, &Disk::default(), &model, Rng::new(1));
        log.append(records[1..].iter().copied());
        let moment = take_trap().unwrap();
        assert_eq!(
            moment.redo.open().unwrap().records().unwrap(),
            records[..1],
            "it dies between two changes"
        );
    }
}
