//! Damage that a repair has to undo, done to a sound image.
//!
//! Not the fuzzer's: here it is known what the image held, and all of it can be repaired.

use super::rng::Rng;
use qcow2_format::{Geometry, Header, L1Entry, Mapping, RefcountTableEntry, header, l1, l2, refcount, word};

/// What is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Nothing; but the image may have leaks.
    None,
    /// Counts are too high, too low, or 0.
    Counts,
    /// Copied flags are wrong.
    Flags,
    /// Counts and flags.
    CountsAndFlags,
    /// Both of the same clusters.
    FlagsOfMiscounted,
    /// Clusters in use are counted twice, and no entry says that they have one owner.
    CountedTwice,
    /// A refcount block is lost: the structure has to be rebuilt.
    LostBlock,
    /// L2 entries name what is far beyond the end of the file.
    Entries,
    /// L2 entries name what is right behind the end of the file, where it is going to grow; it is counted,
    /// or a refcount block is lost.
    JustBeyond,
}

impl Damage {
    /// All of it.
    const ALL: [Self; 9] = [
        Self::None,
        Self::Counts,
        Self::Flags,
        Self::CountsAndFlags,
        Self::FlagsOfMiscounted,
        Self::CountedTwice,
        Self::LostBlock,
        Self::Entries,
        Self::JustBeyond,
    ];

    /// Any that fits.
    pub(super) fn any(rng: &mut Rng, fits: impl Fn(Self) -> bool) -> Self {
        let fit: Vec<_> = Self::ALL.into_iter().filter(|damage| fits(*damage)).collect();
        fit[rng.below(fit.len() as u64) as usize]
    }

    /// Whether a repair of leaks undoes it.
    pub(super) fn is_of_leaks(self) -> bool {
        matches!(self, Self::None | Self::Flags | Self::CountedTwice)
    }

    /// Whether content is lost with it. A writer with lazy refcounts leaves no such damage behind.
    #[must_use]
    pub fn hits_entries(self) -> bool {
        matches!(self, Self::Entries | Self::JustBeyond)
    }
}

/// Damages an image.
pub(super) fn inflict(image: &mut [u8], damage: Damage, rng: &mut Rng) -> Result<(), String> {
    let mut wreck = Wreck::of(image)?;
    match damage {
        Damage::None => {}
        Damage::Counts => wreck.spoil_counts(rng)?,
        Damage::Flags => wreck.spoil_entries(rng, |entry| entry ^ l2::COPIED),
        Damage::CountsAndFlags => {
            wreck.spoil_counts(rng)?;
            wreck.spoil_entries(rng, |entry| entry ^ l2::COPIED);
        }
        Damage::FlagsOfMiscounted => {
            for Named { at, .. } in wreck.some_named(rng, MAX) {
                let (entry, count) = (wreck.entry(at), rng.below(4));
                wreck.set_entry(at, if rng.below(2) == 0 { entry | l2::COPIED } else { entry & !l2::COPIED });
                wreck.set_count((entry & l2::OFFSET) >> wreck.geometry.cluster_bits, |_| count)?;
            }
        }
        Damage::CountedTwice => wreck.count_twice(1 + rng.below(8) as usize)?,
        Damage::LostBlock => wreck.lose_block(rng),
        Damage::Entries => wreck.spoil_entries(rng, |entry| entry | 1 << 50),
        Damage::JustBeyond => wreck.name_what_is_behind(rng)?,
    }
    Ok(())
}

/// Sets a bit that says that something may be wrong.
pub(super) fn mark(image: &mut [u8], mark: u64) {
    let at = header::INCOMPATIBLE_OFFSET as usize;
    let features = word::get(image, at).unwrap_or(0) | mark;
    word::set(image, at, features);
}

/// Whether an image of version 3 has one.
pub(super) fn is_marked(image: &[u8]) -> bool {
    let features = word::get(image, header::INCOMPATIBLE_OFFSET as usize).unwrap_or(0);
    features & (header::DIRTY | header::CORRUPT) != 0
}

/// Damaged things of one kind, at the most.
const MAX: u64 = 12;

pub(super) struct Wreck<'a> {
    pub(super) header: Header,
    pub(super) geometry: Geometry,
    image: &'a mut [u8],
}

/// An entry of the active mapping that names a cluster.
#[derive(Clone, Copy)]
struct Named {
    /// Where it is.
    at: u64,
    /// The guest cluster.
    guest: u64,
}

impl<'a> Wreck<'a> {
    /// An image that is sound so far.
    pub(super) fn of(image: &'a mut [u8]) -> Result<Self, String> {
        let header = Header::decode(image, image.len() as u64).map_err(|error| error.to_string())?;
        Ok(Self { geometry: header.geometry(), header, image })
    }

    fn entry(&self, at: u64) -> u64 {
        word::get(self.image, at as usize).unwrap_or(0)
    }

    fn set_entry(&mut self, at: u64, entry: u64) {
        word::set(self.image, at as usize, entry);
    }

    /// The entries of the refcount table that name a block, with their places.
    pub(super) fn blocks(&self) -> Vec<(u64, u64)> {
        let len = u64::from(self.header.refcount_table_clusters) << self.geometry.cluster_bits;
        let places = (0..len / 8).map(|index| self.header.refcount_table.0 + index * 8);
        let decoded = places.map(|at| (at, RefcountTableEntry::decode(self.entry(at), &self.geometry)));
        decoded.filter_map(|(at, block)| Some((at, block.ok()??.0))).collect()
    }

    fn spoil_counts(&mut self, rng: &mut Rng) -> Result<(), String> {
        let clusters = self.geometry.clusters_for(self.image.len() as u64);
        for _ in 0..1 + rng.below(MAX) {
            let (cluster, kind) = (rng.below(clusters), rng.below(5) as usize);
            self.set_count(cluster, |count| [0, count.saturating_sub(1), count + 1, 2, 7][kind])?;
        }
        Ok(())
    }

    /// Changes the count of a cluster, if a block holds it.
    pub(super) fn set_count(&mut self, cluster: u64, change: impl Fn(u64) -> u64) -> Result<(), String> {
        let (order, size) = (self.geometry.refcount_order, self.geometry.cluster_size() as usize);
        let per_block = self.geometry.refcounts_per_block();
        let at = self.header.refcount_table.0 + cluster / per_block * 8;
        let block = RefcountTableEntry::decode(self.entry(at), &self.geometry);
        if let Some(block) = block.map_err(|error| error.to_string())? {
            let bytes = &mut self.image[block.0 as usize..block.0 as usize + size];
            let index = (cluster % per_block) as usize;
            let wrong = change(refcount::get(bytes, order, index)).min(self.geometry.refcount_max());
            refcount::set(bytes, order, index, wrong);
        }
        Ok(())
    }

    /// Counts one in so many of the active mapping's own clusters once more, and has nobody own it.
    pub(super) fn count_twice(&mut self, share: usize) -> Result<(), String> {
        for Named { at, .. } in self.named().into_iter().step_by(share) {
            let entry = self.entry(at);
            if entry & l2::COPIED != 0 {
                self.set_entry(at, entry & !l2::COPIED);
                self.set_count((entry & l2::OFFSET) >> self.geometry.cluster_bits, |count| count + 1)?;
            }
        }
        Ok(())
    }

    fn lose_block(&mut self, rng: &mut Rng) {
        let blocks = self.blocks();
        let behind = self.geometry.clusters_for(self.image.len() as u64);
        if let Some(&(at, _)) = blocks.get(rng.below(blocks.len().max(1) as u64) as usize) {
            // It is nowhere, or where the file is going to grow.
            let place = if rng.below(3) == 0 { behind + rng.below(4) } else { 0 };
            self.set_entry(at, place << self.geometry.cluster_bits);
        }
    }

    fn name_what_is_behind(&mut self, rng: &mut Rng) -> Result<(), String> {
        let behind = self.geometry.clusters_for(self.image.len() as u64);
        let loses_block = rng.below(2) == 0;
        // There a rebuilt refcount structure begins, if it does not fit into the file.
        let cluster = behind + rng.below(4);
        let entry = cluster << self.geometry.cluster_bits | l2::COPIED;
        self.spoil_entries(rng, |_| entry);
        if loses_block {
            self.lose_block(rng);
            return Ok(());
        }
        self.set_count(cluster, |_| 1)
    }

    /// The L2 tables of the active mapping, by their place in the L1 table.
    pub(super) fn tables(&self) -> Vec<(u64, u64)> {
        let entry = |index: u64| (index, self.entry(self.header.l1_table.0 + index * 8));
        let entries = (0..u64::from(self.header.l1_entries)).map(entry);
        let tables = entries.filter_map(|(index, raw)| match L1Entry::decode(raw, &self.geometry) {
            Ok(L1Entry::Table { offset, .. }) => Some((index, offset.0)),
            _ => None,
        });
        tables.collect()
    }

    /// Has all L1 entries say that their tables have one owner.
    pub(super) fn flag_tables(&mut self) {
        for (index, _) in self.tables() {
            let at = self.header.l1_table.0 + index * 8;
            self.set_entry(at, self.entry(at) | l1::COPIED);
        }
    }

    /// How many entries of the active mapping name a cluster.
    pub(super) fn named_count(&self) -> u64 {
        self.named().len() as u64
    }

    /// They themselves.
    pub(super) fn named_entries(&self) -> Vec<u64> {
        self.named().into_iter().map(|named| self.entry(named.at)).collect()
    }

    /// Has entries behind the end of the L1 table, where there is room for more of them, name what is in use.
    pub(super) fn fill_rest_of_l1(&mut self) {
        let (at, entries) = (self.header.l1_table.0, u64::from(self.header.l1_entries));
        let end = (entries * 8).next_multiple_of(self.geometry.cluster_size()) / 8;
        if let Some(&(used, _)) = self.tables().first() {
            let entry = self.entry(at + used * 8);
            (entries..end).for_each(|index| self.set_entry(at + index * 8, entry));
        }
    }

    /// The entries of the active mapping that name a cluster.
    fn named(&self) -> Vec<Named> {
        let per_table = self.geometry.l2_entries();
        let all = self.tables().into_iter().flat_map(|(index, table)| {
            (0..per_table).map(move |entry| Named { at: table + entry * 8, guest: index * per_table + entry })
        });
        let names = |named: &Named| {
            matches!(
                Mapping::decode(self.entry(named.at), &self.geometry),
                Ok(Mapping::Data { .. } | Mapping::Zero { host: Some(_), .. })
            )
        };
        all.filter(names).collect()
    }

    /// Changes some of the active mapping's entries that name a cluster.
    fn spoil_entries(&mut self, rng: &mut Rng, change: impl Fn(u64) -> u64) {
        self.spoil(rng, MAX, |_, entry| change(entry));
    }

    /// Changes so many of the active mapping's entries that name a cluster, at the most. Returns the guest
    /// clusters.
    pub(super) fn spoil(
        &mut self,
        rng: &mut Rng,
        most: u64,
        change: impl Fn(&mut Rng, u64) -> u64,
    ) -> Vec<u64> {
        let mut spoilt = Vec::new();
        for Named { at, guest } in self.some_named(rng, most) {
            let entry = change(rng, self.entry(at));
            self.set_entry(at, entry);
            spoilt.push(guest);
        }
        spoilt
    }

    /// So many of the entries that name a cluster, at the most.
    fn some_named(&self, rng: &mut Rng, most: u64) -> Vec<Named> {
        let named = self.named();
        let any = |rng: &mut Rng| named.get(rng.below(named.len().max(1) as u64) as usize).copied();
        (0..1 + rng.below(most)).filter_map(|_| any(rng)).collect()
    }
}
