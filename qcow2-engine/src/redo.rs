//! The redo log: changes of the metadata that are not durable yet, in memory that outlives the
//! process.
//!
//! A block device keeps what it has acknowledged for as long as the machine runs; a flush is about
//! power. So when the serving process dies, the next one must know every mapping whose write was
//! acknowledged, though the cut that writes it back has not happened. Payload needs no log: it is in
//! the file. Of the metadata, only what cannot be derived is logged, as the value that it changed *to*:
//! mapping entries, L1 entries, the places of refcount blocks and of the refcount table. Counts follow
//! from those ([`crate::replay`]).
//!
//! ```text
//! words   0      1     2     3       4         5..8   8 ...
//!         magic  head  tail  failed  barriers  –      records, two words each, a ring
//! ```
//!
//! `head` and `tail` count records since the beginning. The records between them are all that no
//! durable cut has covered. One writer (whoever holds the metadata lock) fills the next record, then
//! moves `tail`; the end of a cut moves `head`. A process that is killed between any two stores leaves
//! a log that tells the truth: its unfinished record has not been acknowledged. What a record says is
//! idempotent, and only the last one for each entry counts, so a log that is replayed twice, or whose
//! head is behind, does no harm.
//!
//! All of that goes by the file as it is read. Once a barrier has failed that need not be what is on disk, and
//! the kernel has told the process that asked, once. So `failed` says that one has, and `barriers` how many are
//! under way: of those of a process that was killed nobody has heard the end. Records of a log in which one has
//! failed are not replayed: the payload that they publish may be lost.

use qcow2_format::{GuestCluster, HostCluster};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// "QCOW2RD" and the version of the layout.
const MAGIC: u64 = u64::from_be_bytes(*b"QCOW2RD\x01");
const HEAD: usize = 1;
/// The number of the record after the last one.
pub(crate) const TAIL: usize = 2;
/// Whether a barrier has failed.
const FAILED: usize = 3;
/// Barriers that have begun and not ended.
const BARRIERS: usize = 4;
/// Words before the records.
pub(crate) const HEADER_WORDS: usize = 8;
/// Bits of a record's first word below its kind.
const INDEX_BITS: u32 = 56;
/// Records that a log has room for at least: one slice of mappings needs 512, a moved refcount table
/// with its blocks as many.
pub(crate) const MIN_RECORDS: u64 = 1024;

/// Bytes of the smallest log.
pub const MIN_REDO_BYTES: usize = (HEADER_WORDS + 2 * MIN_RECORDS as usize) * 8;
/// Bytes of the log that the daemon keeps: 65536 records, 16 bytes each, and its header.
pub const REDO_BYTES: usize = (HEADER_WORDS + 2 * 65536) * 8;

/// Memory that the log lives in.
pub type RedoMemory = Arc<dyn AsRef<[AtomicU64]> + Send + Sync>;

/// A log in its memory. See the module's description.
pub struct RedoLog {
    memory: RedoMemory,
    capacity: u64,
    is_muted: bool,
}

/// Notes in a log how the barriers of its process end.
#[derive(Clone)]
pub(crate) struct Barriers(RedoMemory);

/// One change, as the value after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// A guest cluster's L2 entry, as on disk but in host byte order.
    Mapping { cluster: GuestCluster, entry: u64 },
    /// Where an L2 table is, by its place in the L1 table.
    Table { index: u64, cluster: HostCluster },
    /// Where a refcount block is.
    Block { block: u64, cluster: HostCluster },
    /// The refcount table's length in clusters, and its first.
    RefcountTable { clusters: u64, first: HostCluster },
}

/// Why a log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RedoError {
    /// The memory is too small.
    #[error("the redo log has room for {0} records, {MIN_RECORDS} are needed")]
    TooSmall(u64),
    /// It is no log, or one of another version.
    #[error("this is no redo log of this program's version")]
    Foreign,
    /// Its counters contradict each other.
    #[error("the redo log is damaged: head {head}, tail {tail}, room for {capacity}")]
    Counters {
        /// Records retired.
        head: u64,
        /// Records written.
        tail: u64,
        /// Records that fit.
        capacity: u64,
    },
    /// A record has a kind that does not exist.
    #[error("the redo log is damaged: record {at} is of kind {kind}")]
    Kind {
        /// Number of the record.
        at: u64,
        /// Its kind.
        kind: u64,
    },
}

impl RedoLog {
    /// Makes an empty log, whatever the memory held.
    ///
    /// # Errors
    /// The memory is too small.
    pub fn create(memory: RedoMemory) -> Result<Self, RedoError> {
        let log = Self::in_memory(memory)?;
        log.word(0).store(0, Ordering::Relaxed);
        for word in [HEAD, TAIL, FAILED, BARRIERS] {
            // Not before the magic has gone: counters that are half new would be taken for damage.
            log.word(word).store(0, Ordering::Release);
        }
        log.word(0).store(MAGIC, Ordering::Release);
        Ok(log)
    }

    /// Takes over the log that another process has left. One that it had not got to making, or was making
    /// anew because all of it was durable, is empty.
    ///
    /// # Errors
    /// The memory holds no sound log.
    pub fn open(memory: RedoMemory) -> Result<Self, RedoError> {
        let log = Self::in_memory(memory)?;
        match log.word(0).load(Ordering::Acquire) {
            0 => return Self::create(log.memory),
            MAGIC => {}
            _ => return Err(RedoError::Foreign),
        }
        let (head, tail, capacity) = (log.head(), log.tail(), log.capacity);
        if head > tail || tail - head > capacity {
            return Err(RedoError::Counters { head, tail, capacity });
        }
        Ok(log)
    }

    fn in_memory(memory: RedoMemory) -> Result<Self, RedoError> {
        let words = (*memory).as_ref().len();
        let capacity = (words.saturating_sub(HEADER_WORDS) / 2) as u64;
        if capacity < MIN_RECORDS {
            return Err(RedoError::TooSmall(capacity));
        }
        Ok(Self { memory, capacity, is_muted: false })
    }

    /// Whether there is nothing to replay.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.head() == self.tail()
    }

    /// Whether a barrier has failed: what is read of the image need not be on disk.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.word(FAILED).load(Ordering::Acquire) != 0
    }

    /// Whether its process was killed, or gave up, while a barrier was under way: how that ended nobody has
    /// heard.
    #[must_use]
    pub fn is_at_barrier(&self) -> bool {
        self.word(BARRIERS).load(Ordering::Acquire) != 0
    }

    /// Notes that a barrier has failed.
    pub fn note_failure(&self) {
        self.barriers().note_failure();
    }

    /// Notes what becomes of barriers from now on.
    pub(crate) fn barriers(&self) -> Barriers {
        Barriers(Arc::clone(&self.memory))
    }

    /// The records that no durable cut has covered, oldest first.
    pub(crate) fn records(&self) -> Result<Vec<Record>, RedoError> {
        (self.head()..self.tail())
            .map(|at| {
                let [first, second] = self.slot(at);
                let (first, value) = (first.load(Ordering::Acquire), second.load(Ordering::Acquire));
                Record::of_words(first, value).ok_or(RedoError::Kind { at, kind: first >> INDEX_BITS })
            })
            .collect()
    }

    /// Records that still fit.
    pub(crate) fn room(&self) -> u64 {
        self.capacity - (self.tail() - self.head())
    }

    /// Whether a cut should make room.
    pub(crate) fn is_filling(&self) -> bool {
        self.room() < self.capacity / 2
    }

    /// Adds records: a process that is killed has left all of them or none. Their request may be acknowledged
    /// from now on.
    ///
    /// # Panics
    /// When there is no room: callers have asked under the same lock.
    pub(crate) fn append(&mut self, records: impl IntoIterator<Item = Record>) {
        if self.is_muted {
            return;
        }
        let (mut tail, end) = (self.tail(), self.tail() + self.room());
        for record in records {
            assert!(tail < end, "room in the redo log was not asked for");
            let (kind, index, value) = record.encode();
            let [first, second] = self.slot(tail);
            first.store(kind << INDEX_BITS | index, Ordering::Relaxed);
            second.store(value, Ordering::Relaxed);
            tail += 1;
        }
        self.word(TAIL).store(tail, Ordering::Release);
    }

    /// The place after the last record.
    pub(crate) fn tail(&self) -> u64 {
        self.word(TAIL).load(Ordering::Acquire)
    }

    /// The records before `end` are durable.
    pub(crate) fn retire(&mut self, end: u64) {
        self.word(HEAD).store(end, Ordering::Release);
    }

    /// Takes no more records, to see that their absence is noticed.
    #[cfg(feature = "sim")]
    pub(crate) fn mute(&mut self) {
        self.is_muted = true;
    }

    fn head(&self) -> u64 {
        self.word(HEAD).load(Ordering::Acquire)
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &(*self.memory).as_ref()[index]
    }

    fn slot(&self, at: u64) -> [&AtomicU64; 2] {
        let first = HEADER_WORDS + 2 * (at % self.capacity) as usize;
        [self.word(first), self.word(first + 1)]
    }
}

impl Barriers {
    pub(crate) fn begin(&self) {
        self.word(BARRIERS).fetch_add(1, Ordering::AcqRel);
    }

    /// One has ended, and its process has heard how.
    pub(crate) fn end(&self, is_durable: bool) {
        if !is_durable {
            self.note_failure();
        }
        self.word(BARRIERS).fetch_sub(1, Ordering::AcqRel);
    }

    fn note_failure(&self) {
        self.word(FAILED).store(1, Ordering::Release);
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &(*self.0).as_ref()[index]
    }
}

impl fmt::Debug for RedoLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedoLog").field("head", &self.head()).field("tail", &self.tail()).finish()
    }
}

impl Record {
    /// Kind, index and value. An index is below 2^56: guest clusters have at least 512 bytes each.
    fn encode(self) -> (u64, u64, u64) {
        match self {
            Self::Mapping { cluster, entry } => (1, cluster.0, entry),
            Self::Table { index, cluster } => (2, index, cluster.0),
            Self::Block { block, cluster } => (3, block, cluster.0),
            Self::RefcountTable { clusters, first } => (4, clusters, first.0),
        }
    }

    /// The record that these two words are.
    pub(crate) fn of_words(first: u64, value: u64) -> Option<Self> {
        let index = first & ((1 << INDEX_BITS) - 1);
        Some(match first >> INDEX_BITS {
            1 => Self::Mapping { cluster: GuestCluster(index), entry: value },
            2 => Self::Table { index, cluster: HostCluster(value) },
            3 => Self::Block { block: index, cluster: HostCluster(value) },
            4 => Self::RefcountTable { clusters: index, first: HostCluster(value) },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Words(Vec<AtomicU64>);

    impl AsRef<[AtomicU64]> for Words {
        fn as_ref(&self) -> &[AtomicU64] {
            &self.0
        }
    }

    fn memory(records: u64) -> RedoMemory {
        let words = HEADER_WORDS + 2 * records as usize;
        Arc::new(Words((0..words).map(|_| AtomicU64::new(u64::MAX)).collect()))
    }

    #[test]
    fn what_one_process_has_logged_the_next_one_reads() {
        let memory = memory(MIN_RECORDS);
        let all = [
            Record::Mapping { cluster: GuestCluster((1 << 55) - 1), entry: u64::MAX },
            Record::Table { index: 7, cluster: HostCluster(9) },
            Record::Block { block: 3, cluster: HostCluster(4) },
            Record::RefcountTable { clusters: 2, first: HostCluster(11) },
        ];
        let mut log = RedoLog::create(Arc::clone(&memory)).unwrap();
        all.into_iter().for_each(|record| log.append([record]));
        drop(log);
        let mut log = RedoLog::open(Arc::clone(&memory)).unwrap();
        assert_eq!(log.records().unwrap(), all);
        log.retire(3);
        assert_eq!(RedoLog::open(memory).unwrap().records().unwrap(), all[3..]);
    }

    #[test]
    fn it_goes_round_and_tells_when_it_is_full() {
        let mut log = RedoLog::create(memory(MIN_RECORDS)).unwrap();
        for round in 0..3 {
            for cluster in (0..MIN_RECORDS).map(GuestCluster) {
                log.append([Record::Mapping { cluster, entry: round }]);
            }
            assert!(log.room() == 0 && log.is_filling());
            let records = log.records().unwrap();
            assert_eq!(records[1000], Record::Mapping { cluster: GuestCluster(1000), entry: round });
            log.retire(log.tail());
            assert!(log.is_empty() && log.room() == MIN_RECORDS);
        }
    }

    #[test]
    fn a_log_whose_making_was_cut_short_is_empty() {
        let memory = memory(MIN_RECORDS);
        let mut log = RedoLog::create(Arc::clone(&memory)).unwrap();
        log.append([Record::Table { index: 0, cluster: HostCluster(0) }]);
        log.word(0).store(0, Ordering::Relaxed);
        assert!(RedoLog::open(Arc::clone(&memory)).unwrap().is_empty());
        assert!(RedoLog::open(memory).unwrap().is_empty(), "it is whole by now");
    }

    #[test]
    fn how_barriers_have_ended_outlives_the_process() {
        let memory = memory(MIN_RECORDS);
        let next = || RedoLog::open(Arc::clone(&memory)).unwrap();
        let seen = || (next().is_at_barrier(), next().has_failed());
        let barriers = RedoLog::create(Arc::clone(&memory)).unwrap().barriers();
        assert_eq!(seen(), (false, false), "whatever the memory held");
        barriers.begin();
        barriers.begin();
        barriers.end(true);
        assert_eq!(seen(), (true, false));
        barriers.end(false);
        assert_eq!(seen(), (false, true));
        barriers.begin();
        barriers.end(true);
        assert_eq!(seen(), (false, true), "another one that succeeds brings nothing back");
        RedoLog::create(Arc::clone(&memory)).unwrap();
        assert_eq!(seen(), (false, false));
    }

    #[test]
    fn a_foreign_or_damaged_log_is_refused() {
        assert!(matches!(RedoLog::create(memory(10)), Err(RedoError::TooSmall(10))));
        let memory = memory(MIN_RECORDS);
        assert!(matches!(RedoLog::open(Arc::clone(&memory)), Err(RedoError::Foreign)));
        let mut log = RedoLog::create(Arc::clone(&memory)).unwrap();
        log.append([Record::Table { index: 0, cluster: HostCluster(0) }]);
        log.slot(0)[0].store(9 << INDEX_BITS, Ordering::Relaxed);
        assert!(matches!(log.records(), Err(RedoError::Kind { at: 0, kind: 9 })));
        log.word(HEAD).store(2, Ordering::Relaxed);
        assert!(matches!(RedoLog::open(memory), Err(RedoError::Counters { .. })));
    }
}
