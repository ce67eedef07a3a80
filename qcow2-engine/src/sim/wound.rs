//! Damage that a server meets: entries that name what is not theirs, counts that deny what is in use.
//!
//! Whatever is done to such an image, nothing else is lost: sectors that the damage does not hit hold what
//! they may hold, in the image and in its snapshots, and no count falls further below the number of
//! references. Once a request has been refused for it, the image takes no change, and after the next flush
//! it says that it is corrupt.

use super::{
    counts::Standing,
    damage::Wreck,
    model::Value,
    oracle::{self, Reader},
    rng::Rng,
    workload::Fixture,
};
use qcow2_format::{L1Entry, Version, header, l2};
use std::ops::Range;

/// What is damaged: some of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wound {
    /// L2 entries name clusters of metadata.
    NamesMetadata,
    /// L2 entries have bits that mean nothing.
    Meaningless,
    /// The same, and what they seem to name is named by others.
    MeaninglessAndShared,
    /// L2 entries name what is far beyond the end of the file.
    NamesBeyond,
    /// L2 tables have two references by their counts, and one by their L1 entries' flags.
    TableCountedTwice,
    /// L1 entries say of tables that a snapshot shares that they have one owner.
    TableFlagged,
    /// Tables and blocks of metadata are counted by nobody.
    MetadataUncounted,
}

impl Wound {
    /// All kinds.
    pub const ALL: [Self; 7] = [
        Self::NamesMetadata,
        Self::Meaningless,
        Self::MeaninglessAndShared,
        Self::NamesBeyond,
        Self::TableCountedTwice,
        Self::TableFlagged,
        Self::MetadataUncounted,
    ];
}

/// Damaged tables, at the most.
const MAX_TABLES: u64 = 4;
/// Of the entries, one in so many is damaged, at the most: enough to be met, and what is left is enough to be
/// lost.
const ENTRIES_SHARE: u64 = 6;

/// A damaged image.
pub(super) struct Wounded {
    pub(super) fixture: Fixture,
    /// Sectors that are lost.
    pub(super) lost: Vec<Range<usize>>,
    /// How its counts stand.
    pub(super) standing: Standing,
}

impl Wounded {
    /// # Errors
    /// The image cannot be read.
    pub(super) fn of(fixture: &Fixture, wound: Wound, rng: &mut Rng) -> Result<Self, String> {
        let mut fixture = fixture.clone();
        let others = of_snapshots_and_bitmaps(&fixture.image)?;
        let mut wreck = Wreck::of(&mut fixture.image)?;
        let most = 1 + wreck.named_count() / ENTRIES_SHARE;
        let lost = match wound {
            Wound::NamesMetadata => {
                let all = metadata(&wreck, others.clone());
                let metadata = if rng.below(2) == 0 && !others.is_empty() { others } else { all };
                let any = |rng: &mut Rng| metadata[rng.below(metadata.len() as u64) as usize];
                wreck.spoil(rng, most, |rng, _| any(rng) | l2::COPIED)
            }
            Wound::Meaningless => wreck.spoil(rng, most, |_, entry| entry | 1 << 57),
            Wound::MeaninglessAndShared => {
                let entries = wreck.named_entries();
                let any = |rng: &mut Rng| entries[rng.below(entries.len() as u64) as usize];
                // Of several in a part of a table none can be thrown away.
                wreck.spoil(rng, 2, |rng, _| any(rng) | 1 << 57)
            }
            Wound::NamesBeyond => wreck.spoil(rng, most, |_, entry| entry | 1 << 50),
            Wound::TableCountedTwice => {
                let tables = wreck.tables().into_iter().map(|(_, at)| at).collect();
                miscount(&mut wreck, rng, tables, 2)?
            }
            Wound::TableFlagged => {
                wreck.flag_tables();
                Vec::new()
            }
            Wound::MetadataUncounted => {
                let metadata = metadata(&wreck, others);
                miscount(&mut wreck, rng, metadata, 0)?
            }
        };
        let size = fixture.variant.cluster_sectors;
        let sectors = |guest: u64| guest as usize * size..(guest as usize + 1) * size;
        let standing = Standing::of(&fixture.image)?;
        Ok(Self { lost: lost.into_iter().map(sectors).collect(), standing, fixture })
    }
}

/// What entries may name, and nobody may write to: the header, tables, and those `others`.
fn metadata(wreck: &Wreck<'_>, others: Vec<u64>) -> Vec<u64> {
    let mut places = vec![0, wreck.header.l1_table.0, wreck.header.refcount_table.0];
    places.extend(others);
    places.extend(wreck.tables().into_iter().chain(wreck.blocks()).map(|(_, at)| at));
    places
}

/// The tables of snapshots, and the directories of these and of bitmaps.
fn of_snapshots_and_bitmaps(image: &[u8]) -> Result<Vec<u64>, String> {
    let mut reader = Reader::of(image)?;
    let snapshots = reader.snapshots()?;
    let mut places: Vec<u64> =
        reader.header.consistent_bitmaps().iter().map(|bitmaps| bitmaps.directory.0).collect();
    places.extend((!snapshots.is_empty()).then_some(reader.header.snapshot_table.0));
    for snapshot in snapshots {
        places.push(snapshot.l1_table.0);
        for raw in reader.table(snapshot.l1_table.0, snapshot.l1_entries as usize)? {
            if let Ok(L1Entry::Table { offset, .. }) = L1Entry::decode(raw, &reader.geometry) {
                places.push(offset.0);
            }
        }
    }
    Ok(places)
}

/// Gives some of these clusters another count. No content is lost by it.
fn miscount(wreck: &mut Wreck<'_>, rng: &mut Rng, places: Vec<u64>, count: u64) -> Result<Vec<u64>, String> {
    for _ in 0..1 + rng.below(MAX_TABLES) {
        if let Some(at) = places.get(rng.below(places.len().max(1) as u64) as usize) {
            wreck.set_count(at >> wreck.geometry.cluster_bits, |_| count)?;
        }
    }
    Ok(Vec::new())
}

/// Judges what a crash has left of a damaged image.
///
/// # Errors
/// The first violation, in words.
pub(super) fn judge(
    bytes: &[u8],
    case: &oracle::Case<'_>,
    before: &Standing,
    is_marked: bool,
) -> Result<oracle::Findings, String> {
    let model = case.model;
    let header = Reader::of(bytes)?.header;
    if is_marked && header.version != Version::V2 && header.incompatible & header::CORRUPT == 0 {
        return Err("a request was refused for damage, and the corrupt bit is not set".to_owned());
    }
    let found = oracle::read(bytes, case.backing, model.len(), case.memo)?;
    let (active, snapshots) = found.split_at(model.len());
    let sound = |(sector, found): (usize, &Option<Value>)| {
        if model.is_lost(sector) { None } else { Some((sector, *found)) }
    };
    for (sector, found) in active.iter().enumerate().filter_map(sound) {
        let found = found.ok_or_else(|| format!("sector {sector} cannot be read"))?;
        model
            .check(sector, found)
            .map_err(|allowed| format!("sector {sector} holds {found:?}, allowed are {allowed:?}"))?;
    }
    for (content, found) in case.snapshots.iter().zip(snapshots.chunks(model.len())) {
        for (sector, found) in found.iter().enumerate().filter_map(sound) {
            if found != Some(content[sector]) {
                return Err(format!("sector {sector} of a snapshot holds {found:?}"));
            }
        }
    }
    Standing::of(bytes)?.check_no_worse(before)?;
    Ok(oracle::Findings::default())
}
