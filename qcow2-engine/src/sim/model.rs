//! Which contents each sector of the virtual disk may have.
//!
//! Every sector keeps the values that were written to it and could still be seen: with the moments of
//! issue and acknowledgement. A completed flush that was issued at F takes those away that were
//! overwritten by a write acknowledged before F. What is left is what a crash may show.

use super::file::SECTOR;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// What a sector holds: zeros, or a stamp that says which request wrote which sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Value {
    /// Nothing but zeros.
    Zero,
    /// Sector `sector` as written by request `request`.
    Stamp {
        /// The request's number; 0 and up.
        request: u32,
        /// The sector of the virtual disk.
        sector: u32,
    },
    /// Bytes that no request ever wrote.
    Foreign,
    /// Bytes, some of them at least, that were in the buffer before ([`LEFTOVER`]).
    Leftover,
}

/// What is in a buffer before something is read into it.
pub(super) const LEFTOVER: u8 = 0xA5;

const MAGIC: &[u8; 8] = b"sim-data";

impl Value {
    /// The bytes that stand for the value.
    #[must_use]
    pub fn bytes(self) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        if let Self::Stamp { request, sector } = self {
            for part in bytes.chunks_exact_mut(16) {
                part[..8].copy_from_slice(MAGIC);
                part[8..12].copy_from_slice(&request.to_le_bytes());
                part[12..].copy_from_slice(&sector.to_le_bytes());
            }
        }
        bytes
    }

    /// The value that a sector stands for.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Self {
        let first = &bytes[..16];
        // Whole sectors only: a mixture is foreign.
        if !bytes.chunks_exact(16).all(|part| part == first) {
            let is_left = bytes.chunks_exact(16).any(|part| part == [LEFTOVER; 16]);
            return if is_left { Self::Leftover } else { Self::Foreign };
        }
        let number = |at: usize| u32::from_le_bytes([first[at], first[at + 1], first[at + 2], first[at + 3]]);
        if first[..8] == *MAGIC {
            Self::Stamp { request: number(8), sector: number(12) }
        } else if first == [0; 16] {
            Self::Zero
        } else if first == [LEFTOVER; 16] {
            Self::Leftover
        } else {
            Self::Foreign
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    value: Value,
    issued: u64,
    /// When the request ended, if it has.
    acknowledged: Option<u64>,
    /// It ended well, so that what it overwrote is gone.
    is_certain: bool,
    request: u32,
}

/// A read that is under way.
#[derive(Clone, Debug)]
struct Reading {
    sectors: Range<usize>,
    /// What each of them has held at some moment since it began.
    allowed: Vec<Vec<Value>>,
}

/// The histories of all sectors.
#[derive(Clone, Debug)]
pub struct Model {
    sectors: Vec<Vec<Version>>,
    /// Reads under way, by the number of the request.
    readings: BTreeMap<u32, Reading>,
    /// What is damaged: these may hold anything.
    lost: BTreeSet<usize>,
    now: u64,
}

/// The number under which the initial content is known.
pub const INITIAL: u32 = u32::MAX;

impl Model {
    /// A disk whose initial content is durable.
    #[must_use]
    pub fn new(initial: &[Value]) -> Self {
        let version = |&value: &Value| {
            vec![Version { value, issued: 0, acknowledged: Some(0), is_certain: true, request: INITIAL }]
        };
        let sectors = initial.iter().map(version).collect();
        Self { sectors, readings: BTreeMap::new(), lost: BTreeSet::new(), now: 0 }
    }

    /// These sectors may hold anything, or be unreadable.
    pub fn lose(&mut self, sectors: impl IntoIterator<Item = usize>) {
        self.lost.extend(sectors);
    }

    /// Whether a sector may hold anything.
    #[must_use]
    pub fn is_lost(&self, sector: usize) -> bool {
        self.lost.contains(&sector)
    }

    /// Number of sectors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sectors.len()
    }

    /// Whether the disk has no sectors.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// The model's clock: it moves with every issue and every end.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.now
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A request is about to give sectors this value each.
    pub fn issue(
        &mut self,
        request: u32,
        sectors: impl Iterator<Item = usize>,
        value: impl Fn(usize) -> Value,
    ) {
        let issued = self.tick();
        for sector in sectors {
            let value = value(sector);
            for reading in self.readings.values_mut().filter(|reading| reading.sectors.contains(&sector)) {
                reading.allowed[sector - reading.sectors.start].push(value);
            }
            self.sectors[sector].push(Version {
                value,
                issued,
                acknowledged: None,
                is_certain: false,
                request,
            });
        }
    }

    /// A request has ended. One that failed may have written some of its sectors, or none.
    pub fn end(&mut self, request: u32, sectors: impl Iterator<Item = usize>, is_ok: bool) {
        let now = self.tick();
        for sector in sectors {
            for version in self.sectors[sector].iter_mut().filter(|version| version.request == request) {
                version.acknowledged = Some(now);
                version.is_certain = is_ok;
            }
        }
    }

    /// A read is about to begin.
    pub fn read_issued(&mut self, request: u32, sectors: Range<usize>) {
        let allowed = sectors.clone().map(|sector| self.live(sector)).collect();
        self.readings.insert(request, Reading { sectors, allowed });
    }

    /// A read has ended: what each of its sectors may have been read as.
    pub fn read_ended(&mut self, request: u32) -> Vec<Vec<Value>> {
        self.readings.remove(&request).map(|reading| reading.allowed).unwrap_or_default()
    }

    /// A flush is issued; the answer goes to [`Self::flushed`].
    pub fn flush_issued(&mut self) -> u64 {
        self.tick()
    }

    /// The flush that was issued at `issued` has succeeded.
    pub fn flushed(&mut self, issued: u64) {
        for versions in &mut self.sectors {
            drop_overwritten(versions, issued);
        }
    }

    /// What the sector may hold now, if the machine stopped here. `Ok` when `found` is one of them.
    ///
    /// # Errors
    /// The values that were allowed.
    pub fn check(&self, sector: usize, found: Value) -> Result<(), Vec<Value>> {
        let versions = &self.sectors[sector];
        if self.is_lost(sector) || versions.iter().any(|version| version.value == found) {
            return Ok(());
        }
        Err(versions.iter().map(|version| version.value).collect())
    }

    /// What a reader of the running system may see: nothing that was overwritten by a later,
    /// acknowledged write.
    ///
    /// # Errors
    /// The values that were allowed.
    pub fn check_live(&self, sector: usize, found: Value) -> Result<(), Vec<Value>> {
        let allowed = self.live(sector);
        if self.is_lost(sector) || allowed.contains(&found) { Ok(()) } else { Err(allowed) }
    }

    /// What the sector holds on the running system: several values, while writes are under way.
    fn live(&self, sector: usize) -> Vec<Value> {
        let mut versions = self.sectors[sector].clone();
        drop_overwritten(&mut versions, u64::MAX);
        versions.iter().map(|version| version.value).collect()
    }
}

/// Drops what was overwritten by a write that ended well before `moment`.
fn drop_overwritten(versions: &mut Vec<Version>, moment: u64) {
    let certain = versions.iter().filter(|v| v.is_certain && v.acknowledged.is_some_and(|at| at < moment));
    let last_issue = certain.map(|version| version.issued).max().unwrap_or(0);
    versions.retain(|version| version.acknowledged.is_none_or(|at| at >= last_issue));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(request: u32) -> Value {
        Value::Stamp { request, sector: 0 }
    }

    fn write(model: &mut Model, request: u32) {
        model.issue(request, 0..1, |_| stamp(request));
    }

    #[test]
    fn values_survive_their_bytes() {
        for value in [Value::Zero, stamp(7)] {
            assert_eq!(Value::read(&value.bytes()), value);
        }
        let mut torn = stamp(7).bytes();
        torn[511] ^= 1;
        assert_eq!(Value::read(&torn), Value::Foreign);
    }

    #[test]
    fn a_flush_takes_overwritten_values_away_and_no_others() {
        let mut model = Model::new(&[Value::Zero]);
        write(&mut model, 1);
        model.end(1, 0..1, true);
        assert!(model.check(0, Value::Zero).is_ok(), "not flushed yet");
        let flush = model.flush_issued();
        write(&mut model, 2);
        model.flushed(flush);
        assert!(model.check(0, Value::Zero).is_err());
        assert!(model.check(0, stamp(1)).is_ok());
        assert!(model.check(0, stamp(2)).is_ok(), "in flight");
        assert!(model.check(0, stamp(3)).is_err());
    }

    #[test]
    fn concurrent_writes_may_both_win() {
        let mut model = Model::new(&[Value::Zero]);
        write(&mut model, 1);
        write(&mut model, 2);
        model.end(2, 0..1, true);
        model.end(1, 0..1, true);
        let flush = model.flush_issued();
        model.flushed(flush);
        assert!(model.check(0, stamp(1)).is_ok() && model.check(0, stamp(2)).is_ok());
        assert!(model.check(0, Value::Zero).is_err());
    }

    #[test]
    fn a_read_may_see_what_was_there_at_any_moment_of_it() {
        let mut model = Model::new(&[Value::Zero]);
        write(&mut model, 1);
        model.end(1, 0..1, true);
        model.read_issued(9, 0..1);
        for request in 2..4 {
            write(&mut model, request);
            model.end(request, 0..1, true);
        }
        let flush = model.flush_issued();
        model.flushed(flush);
        assert_eq!(model.read_ended(9), [[stamp(1), stamp(2), stamp(3)]]);
    }
}
