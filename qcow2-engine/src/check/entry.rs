//! One entry of an L1 or L2 table, judged: what it refers to, what is wrong with it, and what it
//! should be instead. Pure functions on values; the survey reports by them and the repair writes by
//! them, so that both always agree.
//!
//! Damage does not hide references more than it must: an entry with reserved bits still refers to
//! its cluster, as it does for QEMU. But it is not repaired: a table with such an entry may be no
//! table at all, and what is written over it may be somebody's data.

use super::findings::Owner;
use qcow2_format::{
    CompressedRange, Corruption, ExtendedEntry, Geometry, HostCluster, HostOffset, L1Entry, Mapping, Version,
    error::EntryKind,
    l2::{COMPRESSED, COPIED, OFFSET, RESERVED, ZERO},
    word,
};

/// What an image's header says that matters to its entries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) geometry: Geometry,
    pub(super) has_data_file: bool,
    pub(super) has_backing: bool,
    pub(super) file_len: u64,
}

/// An L2 entry: one word, or two with subclusters (0 otherwise).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct L2Words {
    pub(super) entry: u64,
    pub(super) bitmap: u64,
}

/// What an L2 entry refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Nothing,
    Cluster {
        host: HostCluster,
        copied: bool,
    },
    Compressed(CompressedRange),
    /// A cluster of the external data file.
    External {
        host: u64,
        copied: bool,
    },
    /// It refers to something, but nobody can tell what.
    Unknown,
}

/// A judged L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Judged {
    pub(super) target: Target,
    pub(super) damage: Option<Corruption>,
    /// What a repair makes of a damaged entry; without it, it has to stay.
    pub(super) repaired: Option<L2Words>,
}

/// A judged L1 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct JudgedL1 {
    /// The L2 table and the copied flag.
    pub(super) table: Option<(HostCluster, bool)>,
    pub(super) damage: Option<Corruption>,
    pub(super) repaired: Option<u64>,
}

impl Rules {
    /// Bytes of an L2 entry.
    pub(super) fn l2_entry_bytes(&self) -> u64 {
        self.geometry.l2_entry_bytes()
    }

    /// Whether a range ends so far behind the end of the file that it cannot be the file's last,
    /// half-written cluster. QEMU draws the line at the same place.
    pub(super) fn is_beyond_file(&self, at: u64, len: u64) -> bool {
        at.saturating_add(len) >= self.file_len.saturating_add(self.geometry.cluster_size())
    }

    /// [`Self::is_beyond_file`] of a table that is one cluster.
    pub(super) fn is_table_beyond_file(&self, table: HostCluster) -> bool {
        self.is_beyond_file(self.geometry.host_offset(table).0, self.geometry.cluster_size())
    }

    /// Where what an L2 entry refers to should be, if the file does not have it. Of compressed data the file
    /// has what it has of the first sectors: the stream may end before the sectors that the entry claims.
    pub(super) fn missing(&self, target: Target) -> Option<(Owner, u64, u64)> {
        let cluster_size = self.geometry.cluster_size();
        match target {
            Target::Cluster { host, .. } => {
                let HostOffset(host) = self.geometry.host_offset(host);
                self.is_beyond_file(host, cluster_size).then_some((Owner::Data, host, cluster_size))
            }
            Target::Compressed(range) => {
                (range.offset >= self.file_len).then_some((Owner::Compressed, range.offset, range.len))
            }
            Target::Nothing | Target::External { .. } | Target::Unknown => None,
        }
    }

    pub(super) fn judge_l1(&self, raw: u64) -> JudgedL1 {
        let table = |entry| match entry {
            L1Entry::Unallocated => None,
            L1Entry::Table { offset, copied } => Some((self.geometry.host_cluster(offset), copied)),
        };
        let decode = |raw| L1Entry::decode(raw, &self.geometry);
        let damage = match decode(raw) {
            Ok(entry) => return JudgedL1 { table: table(entry), damage: None, repaired: None },
            Err(damage) => damage,
        };
        let repaired = match damage {
            Corruption::CopiedWithoutOffset { .. } => Some(0),
            _ => None,
        };
        let read_as = repaired.unwrap_or(raw & (COPIED | OFFSET));
        JudgedL1 { table: decode(read_as).ok().and_then(table), damage: Some(damage), repaired }
    }

    pub(super) fn judge(&self, words: L2Words) -> Judged {
        match self.target(words) {
            Ok(target) => Judged { target, damage: None, repaired: None },
            Err(damage) => {
                let repaired = self.repaired(words, damage);
                let read_as = repaired.unwrap_or_else(|| self.read_leniently(words, damage));
                let target = self.target(read_as).unwrap_or(Target::Unknown);
                Judged { target, damage: Some(damage), repaired }
            }
        }
    }

    /// The entry that reads as zeros, in place of one whose cluster does not exist. `None` where the
    /// format cannot say it.
    pub(super) fn without_cluster(&self, words: L2Words) -> Option<L2Words> {
        if self.geometry.extended_l2 {
            let (allocated, zero) = (words.bitmap & u64::from(u32::MAX), words.bitmap >> 32);
            let zero = if words.entry & COMPRESSED != 0 { u64::from(u32::MAX) } else { zero | allocated };
            return Some(L2Words { entry: 0, bitmap: zero << 32 });
        }
        match self.geometry.version {
            Version::V3 => Some(L2Words { entry: ZERO, bitmap: 0 }),
            Version::V2 if !self.has_backing => Some(L2Words { entry: 0, bitmap: 0 }),
            Version::V2 => None,
        }
    }

    /// Where the cluster is that an entry without damage keeps for a guest cluster of zeros.
    pub(super) fn kept_cluster(&self, words: L2Words) -> Option<HostOffset> {
        if self.geometry.extended_l2 || self.has_data_file {
            return None;
        }
        match Mapping::decode(words.entry, &self.geometry) {
            Ok(Mapping::Zero { host, .. }) => host,
            _ => None,
        }
    }

    /// What an entry without damage refers to.
    fn target(&self, words: L2Words) -> Result<Target, Corruption> {
        let L2Words { entry, bitmap } = words;
        // "The offset may only be 0 with bit 63 set (indicating a host cluster offset of 0) when an
        // external data file is used."
        if self.has_data_file && entry & !ZERO == COPIED {
            return Ok(Target::External { host: 0, copied: true });
        }
        let mapping = if self.geometry.extended_l2 {
            match ExtendedEntry::decode(entry, bitmap, &self.geometry)? {
                ExtendedEntry::Compressed(range) => Mapping::Compressed(range),
                ExtendedEntry::Standard { host: None, .. } => Mapping::Unallocated,
                ExtendedEntry::Standard { host: Some(host), copied, .. } => Mapping::Data { host, copied },
            }
        } else {
            Mapping::decode(entry, &self.geometry)?
        };
        Ok(match mapping {
            Mapping::Unallocated | Mapping::Zero { host: None, .. } => Target::Nothing,
            Mapping::Compressed(range) => Target::Compressed(range),
            Mapping::Data { host, copied } | Mapping::Zero { host: Some(host), copied }
                if self.has_data_file =>
            {
                Target::External { host: host.0, copied }
            }
            Mapping::Data { host, copied } | Mapping::Zero { host: Some(host), copied } => {
                Target::Cluster { host: self.geometry.host_cluster(host), copied }
            }
        })
    }

    /// What a repair makes of a damaged entry: only what does not change a byte of what the entry
    /// can be read as.
    fn repaired(&self, words: L2Words, damage: Corruption) -> Option<L2Words> {
        let with = |entry| Some(L2Words { entry, ..words });
        let candidate = match damage {
            Corruption::CompressedCopied { .. } => with(words.entry & !COPIED),
            // It reads as zeros, wherever its cluster is.
            Corruption::Misaligned { entry: EntryKind::L2, .. } if words.entry & ZERO != 0 => with(ZERO),
            _ => None,
        };
        candidate.filter(|&words| self.target(words).is_ok())
    }

    /// The entry without what is wrong with it, to find the cluster that it may refer to.
    fn read_leniently(&self, words: L2Words, damage: Corruption) -> L2Words {
        match damage {
            Corruption::ReservedBits { .. } if words.entry & COMPRESSED == 0 => {
                let zero = if self.geometry.extended_l2 { ZERO } else { 0 };
                L2Words { entry: words.entry & !(RESERVED | zero), ..words }
            }
            Corruption::ZeroFlagInVersion2 { .. } => L2Words { entry: words.entry & !ZERO, ..words },
            // Over the header: a reference to nothing that could be lost.
            Corruption::CompressedInHeader { .. } => L2Words { entry: 0, bitmap: 0 },
            Corruption::CompressedBitmap { .. }
            | Corruption::SubclusterAllocatedAndZero { .. }
            | Corruption::SubclusterWithoutHost { .. } => L2Words { bitmap: 0, ..words },
            _ => words,
        }
    }
}

/// The entries of an L2 table.
pub(super) fn l2_words<'a>(table: &'a [u8], rules: &Rules) -> impl Iterator<Item = L2Words> + use<'a> {
    let bytes = rules.l2_entry_bytes() as usize;
    let number = |words, at| word::get(words, at).unwrap_or(0);
    table.chunks_exact(bytes).map(move |words| L2Words { entry: number(words, 0), bitmap: number(words, 8) })
}

/// Writes an entry into the bytes of its table.
pub(super) fn put_l2_words(table: &mut [u8], rules: &Rules, index: usize, words: L2Words) {
    let at = index * rules.l2_entry_bytes() as usize;
    word::set(table, at, words.entry);
    if rules.geometry.extended_l2 {
        word::set(table, at + 8, words.bitmap);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        let geometry = Geometry {
            version: Version::V3,
            cluster_bits: 16,
            refcount_order: 4,
            extended_l2: false,
            virtual_size: 1 << 30,
        };
        Rules { geometry, has_data_file: false, has_backing: false, file_len: 10 << 16 }
    }

    fn words(entry: u64) -> L2Words {
        L2Words { entry, bitmap: 0 }
    }

    #[test]
    fn damage_that_can_be_read_past_is_repaired_without_changing_the_content() {
        let rules = rules();
        for (entry, repaired) in [
            (1 << 57 | COPIED | 0x5_0000, None),
            (0x5_0200 | ZERO, Some(ZERO)),
            (0x5_0200, None),
            (COMPRESSED | COPIED | 0x5_0000, Some(COMPRESSED | 0x5_0000)),
        ] {
            let judged = rules.judge(words(entry));
            assert!(judged.damage.is_some(), "{entry:#x}");
            assert_eq!(judged.repaired, repaired.map(words), "{entry:#x}");
        }
        assert_eq!(rules.judge(words(0x5_0200)).target, Target::Unknown);
        let reserved = rules.judge(words(1 << 57 | COPIED | 0x5_0000));
        assert_eq!(reserved.target, Target::Cluster { host: HostCluster(5), copied: true });
        assert_eq!(rules.judge_l1(COPIED).repaired, Some(0));
        assert_eq!(rules.judge_l1(0x5_0200).repaired, None);
        assert_eq!(rules.judge_l1(0x5_0001).table, Some((HostCluster(5), false)));
    }

    #[test]
    fn a_data_file_has_a_cluster_at_offset_0() {
        let rules = Rules { has_data_file: true, ..rules() };
        assert_eq!(rules.judge(words(COPIED)).target, Target::External { host: 0, copied: true });
        let there = Target::External { host: 0x5_0000, copied: false };
        assert_eq!(rules.judge(words(0x5_0000)).target, there);
        assert_eq!(rules.judge(words(ZERO)).target, Target::Nothing);
    }

    #[test]
    fn the_last_cluster_may_be_cut_off() {
        let rules = Rules { file_len: (10 << 16) - 1, ..rules() };
        assert!(!rules.is_beyond_file(9 << 16, 1 << 16));
        assert!(rules.is_beyond_file(10 << 16, 1 << 16));
        assert!(rules.is_beyond_file(u64::MAX - 5, 10));
    }
}
