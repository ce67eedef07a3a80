//! Which host clusters hold live metadata, so that nothing else is ever written, freed or handed out
//! there: an image is input, and its entries may name any place.
//!
//! ```text
//! cluster → Sieve (no lock, may say yes in error) → Territory (metadata lock, exact) → Conflict
//! ```
//!
//! Both are made when an image is opened for writing, from what is in memory then anyway, and kept true
//! by the few places that make or move a table, and from the snapshots' L1 tables. What the tables *below* an
//! L1 table refer to is not read for that: an entry is judged when it is first about to be the target of a change.

use crate::{
    error::{Error, Result},
    l1::L1Table,
    owner::Owner,
};
use qcow2_format::{Clusters, Geometry, Header, HostCluster, HostOffset, L1Entry, RefcountTableEntry};
use std::{
    collections::HashSet,
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use zerocopy::FromZeros;

/// Why a cluster cannot be what an entry says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// It holds live metadata.
    Holds(Owner),
    /// The file ends before it.
    BeyondFile,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Holds(owner) => write!(f, "in use as {owner}"),
            Self::BeyondFile => f.write_str("beyond the end of the file"),
        }
    }
}

/// Bits of the sieve for each table that may come to exist: about one probe in fifty is wrong.
const BITS_PER_TABLE: u64 = 16;
/// Words of a sieve, at the most: 8 MiB.
const MAX_SIEVE_WORDS: u64 = 1 << 20;
const MIN_SIEVE_WORDS: u64 = 64;

/// Asks for every cluster that is written in place, so it costs one load. A "no" is certain.
pub(crate) struct Sieve {
    /// Two bits of one word for each cluster of metadata. None is ever cleared.
    words: Box<[AtomicU64]>,
    /// The first cluster that lies wholly beyond the end of the file.
    end: AtomicU64,
}

impl Sieve {
    fn new(tables: u64, end: HostCluster) -> Self {
        let words = (tables.saturating_mul(BITS_PER_TABLE) / 64).next_power_of_two();
        let words = words.clamp(MIN_SIEVE_WORDS, MAX_SIEVE_WORDS);
        // Pages of it take memory when something is marked there.
        let words = <[AtomicU64]>::new_box_zeroed_with_elems(words as usize)
            .unwrap_or_else(|_| (0..words).map(|_| AtomicU64::new(0)).collect());
        Self { words, end: AtomicU64::new(end.0) }
    }

    /// Whether a cluster may hold metadata, or lie beyond the end of the file.
    #[inline]
    pub(crate) fn suspects(&self, cluster: HostCluster) -> bool {
        self.is_beyond(cluster) || self.may_hold(cluster)
    }

    /// Whether a cluster lies wholly beyond the end of the file.
    #[inline]
    fn is_beyond(&self, cluster: HostCluster) -> bool {
        cluster.0 >= self.end.load(Ordering::Relaxed)
    }

    /// Whether a cluster may hold metadata.
    #[inline]
    fn may_hold(&self, cluster: HostCluster) -> bool {
        let (word, bits) = self.place(cluster);
        self.words[word].load(Ordering::Relaxed) & bits == bits
    }

    /// The file ends with cluster `end` now, exclusive.
    pub(crate) fn set_end(&self, end: HostCluster) {
        self.end.store(end.0, Ordering::Relaxed);
    }

    fn mark(&self, cluster: HostCluster) {
        let (word, bits) = self.place(cluster);
        self.words[word].fetch_or(bits, Ordering::Relaxed);
    }

    #[inline]
    fn place(&self, cluster: HostCluster) -> (usize, u64) {
        let mixed = cluster.0.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let word = (mixed >> 44) as usize & (self.words.len() - 1);
        (word, 1 << (mixed >> 38 & 63) | 1 << (mixed >> 32 & 63))
    }
}

/// A structure of one or more clusters in a row, of which there is one.
struct Area {
    clusters: Range<HostCluster>,
    owner: Owner,
}

/// The exact answer. Its memory is bounded by the tables that the image has: nine to eighteen bytes
/// for an L2 table or a refcount block, so 5 MiB for 64 TiB in clusters of 64 KiB; and 4 MiB for those of
/// snapshots (`MAX_SNAPSHOT_L1_BYTES`).
pub(crate) struct Territory {
    sieve: Arc<Sieve>,
    areas: Vec<Area>,
    /// Snapshots' L1 tables, sorted and joined.
    snapshot_l1s: Vec<Range<HostCluster>>,
    l2_tables: HashSet<HostCluster>,
    /// Those of snapshots, which nobody changes: sorted. One may be in the other set as well, as long as the
    /// active mapping has no copy of it.
    snapshot_l2s: Arc<[HostCluster]>,
    refcount_blocks: HashSet<HostCluster>,
}

/// What a territory is made from.
pub(crate) struct Sources<'a> {
    pub(crate) file: &'a Arc<str>,
    pub(crate) file_len: u64,
    pub(crate) header: &'a Header,
    /// The active L1 table.
    pub(crate) l1: &'a L1Table,
    /// Raw entries of the refcount table.
    pub(crate) refcount_table: &'a [u64],
    pub(crate) snapshots: &'a SnapshotPlaces,
}

/// Where an image's snapshots have their tables.
#[derive(Debug, Default)]
pub(crate) struct SnapshotPlaces {
    pub(crate) table: Range<HostOffset>,
    pub(crate) l1_tables: Vec<Range<HostOffset>>,
    /// Their L2 tables, sorted, as far as they have been looked for.
    pub(crate) l2_tables: Arc<[HostCluster]>,
    /// There are snapshots whose tables cannot be found.
    pub(crate) are_some_lost: bool,
}

impl Territory {
    /// An image's territory, and the first table that lies where it cannot: then the image is damaged,
    /// and what is known of it is not to be relied on.
    pub(crate) fn of(sources: &Sources<'_>) -> (Self, Option<Error>) {
        let geometry = sources.header.geometry();
        let tables = sources.header.l1_entries as usize;
        let tables =
            tables + sources.refcount_table.len().min(2 * tables) + sources.snapshots.l2_tables.len();
        let sieve = Sieve::new(tables as u64, HostCluster(geometry.clusters_for(sources.file_len)));
        let mut territory = Self {
            sieve: Arc::new(sieve),
            areas: Vec::new(),
            snapshot_l1s: joined(
                sources.snapshots.l1_tables.iter().map(|range| geometry.host_clusters(range)),
            ),
            l2_tables: HashSet::new(),
            snapshot_l2s: Arc::default(),
            refcount_blocks: HashSet::new(),
        };
        let damage = territory.add_areas(sources, &geometry);
        let damage = damage.and(territory.add_blocks(sources, &geometry));
        let damage = damage.and(territory.add_l2_tables(sources, &geometry));
        // The last: the active mapping may share them.
        territory.add_snapshot_l2s(&sources.snapshots.l2_tables);
        (territory, damage.err())
    }

    /// Of an image that is not written to: empty.
    pub(crate) fn none() -> Self {
        Self {
            sieve: Arc::new(Sieve::new(0, HostCluster(u64::MAX))),
            areas: Vec::new(),
            snapshot_l1s: Vec::new(),
            l2_tables: HashSet::new(),
            snapshot_l2s: Arc::default(),
            refcount_blocks: HashSet::new(),
        }
    }

    pub(crate) fn sieve(&self) -> &Arc<Sieve> {
        &self.sieve
    }

    /// What live metadata a cluster holds.
    pub(crate) fn owner(&self, cluster: HostCluster) -> Option<Owner> {
        if !self.sieve.may_hold(cluster) {
            return None;
        }
        let area = self.areas.iter().find(|area| area.clusters.contains(&cluster)).map(|area| area.owner);
        let in_set = |set: &HashSet<HostCluster>, owner| set.contains(&cluster).then_some(owner);
        area.or_else(|| in_set(&self.l2_tables, Owner::L2))
            .or_else(|| self.is_snapshots_l2(cluster).then_some(Owner::L2))
            .or_else(|| in_set(&self.refcount_blocks, Owner::RefcountBlock))
            .or_else(|| overlaps(&self.snapshot_l1s, &cluster.row(1)).then_some(Owner::SnapshotL1))
    }

    /// Whether a cluster is an L2 table, and not of the active mapping.
    pub(crate) fn is_snapshots_l2(&self, cluster: HostCluster) -> bool {
        self.snapshot_l2s.binary_search(&cluster).is_ok() && !self.l2_tables.contains(&cluster)
    }

    /// Why a guest's cluster cannot be at `cluster`.
    pub(crate) fn conflict(&self, cluster: HostCluster) -> Option<Conflict> {
        let holds = self.owner(cluster).map(Conflict::Holds);
        holds.or_else(|| self.sieve.is_beyond(cluster).then_some(Conflict::BeyondFile))
    }

    /// A table has come into being.
    pub(crate) fn add_l2_table(&mut self, cluster: HostCluster) {
        self.sieve.mark(cluster);
        self.l2_tables.insert(cluster);
    }

    /// The active mapping has a copy of this table now.
    pub(crate) fn remove_l2_table(&mut self, cluster: HostCluster) {
        self.l2_tables.remove(&cluster);
    }

    pub(crate) fn add_refcount_block(&mut self, cluster: HostCluster) {
        self.sieve.mark(cluster);
        self.refcount_blocks.insert(cluster);
    }

    /// A structure of which there is one is at `clusters` from now on.
    pub(crate) fn set_area(&mut self, owner: Owner, clusters: Range<HostCluster>) {
        clusters.clone().each().for_each(|cluster| self.sieve.mark(cluster));
        self.areas.retain(|area| area.owner != owner);
        self.areas.push(Area { clusters, owner });
    }

    /// What the header names. That the tables lie inside the file, and those of its fixed part apart
    /// from each other, was checked when it was decoded.
    fn add_areas(&mut self, sources: &Sources<'_>, geometry: &Geometry) -> Result<()> {
        let header = sources.header;
        let l1 = header.l1_table.bytes(u64::from(header.l1_entries) * 8);
        let table_bytes = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
        let table = header.refcount_table.bytes(table_bytes);
        let bitmaps = header
            .consistent_bitmaps()
            .map_or_else(Range::default, |bitmaps| bitmaps.directory.bytes(bitmaps.directory_bytes));
        for range in self.snapshot_l1s.clone() {
            range.each().for_each(|cluster| self.sieve.mark(cluster));
        }
        let mut outcome = Ok(());
        for (owner, place) in [
            (Owner::Header, HostOffset(0).bytes(1)),
            (Owner::ActiveL1, l1),
            (Owner::RefcountTable, table),
            (Owner::SnapshotTable, sources.snapshots.table.clone()),
            (Owner::BitmapDirectory, bitmaps),
        ] {
            let range = geometry.host_clusters(&place);
            if range.is_empty() {
                continue;
            }
            let other = self.areas.iter().find(|area| intersects(&area.clusters, &range));
            let other = other
                .map(|area| area.owner)
                .or_else(|| overlaps(&self.snapshot_l1s, &range).then_some(Owner::SnapshotL1));
            if let Some(other) = other {
                outcome = outcome.and(Err(self.misplaced(
                    sources,
                    "header",
                    0,
                    place.start,
                    Conflict::Holds(other),
                )));
            }
            self.set_area(owner, range);
        }
        outcome
    }

    fn add_blocks(&mut self, sources: &Sources<'_>, geometry: &Geometry) -> Result<()> {
        let mut outcome = Ok(());
        for (index, &raw) in (0..).zip(sources.refcount_table) {
            let at = (index * geometry.refcounts_per_block()).saturating_mul(geometry.cluster_size());
            match RefcountTableEntry::decode(raw, geometry) {
                Ok(None) => {}
                Ok(Some(host)) => {
                    let cluster = geometry.host_cluster(host);
                    if let Some(conflict) = self.conflict(cluster) {
                        let error = self.misplaced(sources, "refcount table", at, host, conflict);
                        outcome = outcome.and(Err(error));
                    }
                    self.add_refcount_block(cluster);
                }
                Err(source) => {
                    let table = "refcount table";
                    outcome = outcome.and(Err(Error::Corrupt {
                        file: Arc::clone(sources.file),
                        table,
                        at,
                        source,
                    }));
                }
            }
        }
        outcome
    }

    fn add_l2_tables(&mut self, sources: &Sources<'_>, geometry: &Geometry) -> Result<()> {
        let mut outcome = Ok(());
        let entries = u64::from(sources.header.l1_entries);
        for (index, raw) in sources.l1.used().take_while(|(index, _)| *index < entries) {
            let at = index * geometry.l2_coverage_bytes();
            match L1Entry::decode(raw, geometry) {
                Ok(L1Entry::Unallocated) => {}
                Ok(L1Entry::Table { offset, .. }) => {
                    let cluster = geometry.host_cluster(offset);
                    if let Some(conflict) = self.conflict(cluster) {
                        outcome = outcome.and(Err(self.misplaced(sources, "L1", at, offset, conflict)));
                    }
                    self.add_l2_table(cluster);
                }
                Err(source) => {
                    let error = Error::Corrupt { file: Arc::clone(sources.file), table: "L1", at, source };
                    outcome = outcome.and(Err(error));
                }
            }
        }
        outcome
    }

    fn add_snapshot_l2s(&mut self, tables: &Arc<[HostCluster]>) {
        tables.iter().for_each(|&table| self.sieve.mark(table));
        self.snapshot_l2s = Arc::clone(tables);
    }

    fn misplaced(
        &self,
        sources: &Sources<'_>,
        table: &'static str,
        at: u64,
        host: HostOffset,
        conflict: Conflict,
    ) -> Error {
        Error::Conflict { file: Arc::clone(sources.file), table, at, host: host.0, conflict }
    }
}

fn intersects(one: &Range<HostCluster>, other: &Range<HostCluster>) -> bool {
    one.start < other.end && other.start < one.end
}

/// Whether any of `sorted`, which are apart from each other, touches `range`.
fn overlaps(sorted: &[Range<HostCluster>], range: &Range<HostCluster>) -> bool {
    let next = sorted.partition_point(|one| one.end <= range.start);
    sorted.get(next).is_some_and(|one| intersects(one, range))
}

/// Ranges in order, those that touch made one.
fn joined(ranges: impl Iterator<Item = Range<HostCluster>>) -> Vec<Range<HostCluster>> {
    let mut sorted: Vec<_> = ranges.filter(|range| !range.is_empty()).collect();
    sorted.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<HostCluster>> = Vec::new();
    for range in sorted {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sieve_never_says_no_in_error_and_seldom_yes() {
        let end = HostCluster(1 << 40);
        let sieve = Sieve::new(10_000, end);
        (0..10_000).for_each(|index| sieve.mark(HostCluster(index * 8193)));
        assert!((0..10_000).all(|index| sieve.suspects(HostCluster(index * 8193))));
        let wrong = (0..100_000).filter(|index| sieve.suspects(HostCluster(index * 8193 + 5))).count();
        assert!(wrong < 5_000, "{wrong} of 100000");
        assert!(sieve.suspects(end), "beyond the end");
        sieve.set_end(end + 1);
        assert!(!sieve.suspects(end) && sieve.suspects(end + 1));
    }

    #[test]
    fn ranges_are_joined_and_found() {
        let row = |start, end| HostCluster(start)..HostCluster(end);
        let ranges = joined([row(9, 12), row(1, 3), row(2, 5), row(5, 6), row(4, 4)].into_iter());
        assert_eq!(ranges, [row(1, 6), row(9, 12)]);
        let overlaps = |start, end| overlaps(&ranges, &row(start, end));
        assert!(overlaps(5, 7) && overlaps(11, 99) && overlaps(0, 2));
        assert!(!overlaps(6, 9) && !overlaps(12, 13) && !overlaps(0, 1));
    }
}
