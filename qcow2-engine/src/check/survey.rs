//! One pass over everything that an image's header leads to: which clusters are referred to, how
//! often, by what; and all that is wrong on the way.
//!
//! Work and memory are bounded by the file, not by its claims: tables that overlap are read once at
//! most, and an L2 table that many L1 entries name is walked once, its references counted that many
//! times. The order of the passes is: what the header names → refcount blocks → L1 tables → L2
//! tables ([`tables`](super::tables)) → comparison ([`compare`](super::compare)). So by the time that
//! a guest cluster is looked at, all metadata is known, and an overlap shows at the culprit.

use super::{
    counts::{Bytes, Counts},
    entry::Rules,
    findings::{Findings, Owner, Problem, Remedy},
    refcounts::Refcounts,
    window::Window,
};
use crate::{
    error::{Error, Result},
    inspect::ImageFile,
    io::Io,
};
use qcow2_format::{
    Geometry, HostOffset, RefcountTableEntry,
    bitmap::{Bitmap, BitmapTableEntry},
    geometry::TABLE_ENTRY_BYTES,
    header,
};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

/// Entries of a bitmap table that are read at a time: 1 MiB.
const BITMAP_ENTRIES: u64 = (1 << 20) / TABLE_ENTRY_BYTES;
/// The largest bitmap in bytes, as QEMU.
const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// The longest encryption header that is believed: LUKS takes about 2 MiB for eight keys.
const MAX_ENCRYPTION_HEADER_BYTES: u64 = 256 << 20;

/// Numbers about the guest's clusters, as `qemu-img check` gives them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Those that the image maps to data.
    pub allocated_clusters: u64,
    /// Those that do not follow the one before in the file.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// Where the last used cluster ends, in bytes.
    pub image_end_offset: u64,
}

/// An L1 table that can be walked.
#[derive(Clone, Copy, Debug)]
pub(super) struct L1Table {
    pub(super) at: u64,
    pub(super) entries: u64,
    pub(super) owner: Owner,
}

/// A reference: who holds it, and to what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    pub(super) holder: Owner,
    /// File offset of the entry that refers.
    pub(super) at: u64,
    pub(super) owner: Owner,
    pub(super) host: u64,
    pub(super) len: u64,
}

/// What a pass over the image has found.
pub(super) struct Survey {
    pub(super) rules: Rules,
    pub(super) findings: Findings,
    pub(super) statistics: Statistics,
    /// Where an image that is being served has its references counted instead.
    pub(super) window: Option<Window>,
    /// References to each cluster.
    pub(super) refs: Counts,
    /// [`Owner`] of each cluster of metadata.
    pub(super) owners: Bytes,
    /// L1 entries that name each L2 table, by cluster; what has been walked is gone.
    pub(super) tables: HashMap<u64, u64>,
    pub(super) l1_tables: Vec<L1Table>,
    pub(super) refcounts: Refcounts,
    /// Offsets of all refcount blocks that hold a reference, sound or not.
    pub(super) claimed_blocks: Vec<u64>,
    /// The refcount structure cannot hold the counts as it is.
    pub(super) needs_rebuild: bool,
    /// Damage that no repair undoes hides references: what seems unused may not be.
    pub(super) hides_references: bool,
    /// L2 tables that may be something else: entries that cannot be, or clusters of data. They are
    /// never written to.
    pub(super) doubtful: HashSet<u64>,
    /// L2 tables are beyond the end of the file; a repair of all drops them.
    pub(super) lost_tables: bool,
    /// There are entries beyond the end of the file that cannot be cleared.
    pub(super) stuck_entries: bool,
}

impl Survey {
    /// Surveys an image. What cannot be read is a finding, not an error.
    pub(super) async fn of(file: &ImageFile<'_, impl Io>, max_findings: usize) -> Self {
        let mut survey = Self::new(file, max_findings);
        survey.count_references(file).await;
        survey.compare(file).await;
        survey
    }

    pub(super) fn new(file: &ImageFile<'_, impl Io>, max_findings: usize) -> Self {
        let header = file.header();
        let geometry = file.geometry();
        Self {
            rules: Rules {
                geometry,
                has_data_file: header.incompatible & header::EXTERNAL_DATA != 0,
                has_backing: header.backing_file.is_some(),
                file_len: file.file_len(),
            },
            findings: Findings::with_max(max_findings),
            statistics: Statistics {
                total_clusters: geometry.clusters_for(geometry.virtual_size),
                ..Statistics::default()
            },
            window: None,
            refs: Counts::default(),
            owners: Bytes::default(),
            tables: HashMap::new(),
            l1_tables: Vec::new(),
            refcounts: Refcounts::new(geometry, BTreeMap::new()),
            claimed_blocks: Vec::new(),
            needs_rebuild: false,
            hides_references: false,
            doubtful: HashSet::new(),
            lost_tables: false,
            stuck_entries: false,
        }
    }

    /// Everything but the comparison with the counts.
    pub(super) async fn count_references(&mut self, file: &ImageFile<'_, impl Io>) {
        self.header_tables(file);
        self.snapshots(file).await;
        self.bitmaps(file).await;
        self.refcount_blocks(file).await;
        self.l1_entries(file).await;
        self.l2_tables(file).await;
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.rules.geometry
    }

    /// Notes a structure that cannot be used, and with it what it may refer to.
    pub(super) fn unusable(&mut self, table: Owner, at: u64, error: Error) {
        self.findings.structure(table, at, error);
        self.hides_references = true;
    }

    /// Counts references to the clusters of a range. Returns whether no cluster of it is already
    /// something that it cannot share with. A table is counted up to its first such cluster only:
    /// thousands of large tables may claim the same place, which must not cost thousands of times as
    /// much.
    pub(super) fn claim(&mut self, claim: Claim, references: u64) -> bool {
        let Claim { holder, at, owner, host, len } = claim;
        let geometry = *self.geometry();
        let clusters = host >> geometry.cluster_bits..geometry.clusters_for(host + len);
        if let Some(window) = &mut self.window {
            window.claim(&claim, clusters, references);
            return true;
        }
        let is_metadata = !matches!(owner, Owner::Data | Owner::Compressed);
        let mut is_alone = true;
        for cluster in clusters {
            match Owner::metadata(self.owners.get(cluster)) {
                None if is_metadata => self.owners.set(cluster, owner as u8),
                None => {}
                Some(Owner::L2) if owner == Owner::L2 => {}
                Some(other) => {
                    is_alone = false;
                    let host = cluster << geometry.cluster_bits;
                    if other == Owner::L2 {
                        self.doubtful.insert(host);
                    }
                    let remedy =
                        Remedy::None("the content of one of the two is lost; only the refcount is raised");
                    self.findings.corruption(holder, at, Problem::Overlap { host, owner, other }, remedy);
                }
            }
            self.refs.add(cluster, references);
            if is_metadata && !is_alone {
                self.hides_references |= len > geometry.cluster_size();
                break;
            }
        }
        is_alone
    }

    /// What the header itself points to; all of it lies inside the file, or it would not decode.
    fn header_tables(&mut self, file: &ImageFile<'_, impl Io>) {
        let header = file.header();
        let cluster_size = self.geometry().cluster_size();
        let mut claim = |field, owner, host: HostOffset, len| {
            let claim = Claim { holder: Owner::Header, at: field, owner, host: host.0, len };
            len > 0 && self.claim(claim, 1)
        };
        claim(0, Owner::Header, HostOffset(0), cluster_size);
        let entries = u64::from(header.l1_entries);
        let bytes = entries * TABLE_ENTRY_BYTES;
        let has_l1 = claim(header::L1_TABLE_OFFSET, Owner::ActiveL1, header.l1_table, bytes);
        let bytes = u64::from(header.refcount_table_clusters) * cluster_size;
        claim(header::REFCOUNT_TABLE_OFFSET, Owner::RefcountTable, header.refcount_table, bytes);
        let crypto =
            header.crypto_header.map_or((HostOffset(0), 0), |crypto| (crypto.offset, crypto.len_bytes));
        if crypto.1 <= MAX_ENCRYPTION_HEADER_BYTES {
            claim(0, Owner::EncryptionHeader, crypto.0, crypto.1);
        } else {
            let error = Error::NotSupported {
                file: Arc::clone(file.name()),
                reason: "it is larger than any that is known",
            };
            self.unusable(Owner::EncryptionHeader, crypto.0.0, error);
        }
        if has_l1 {
            self.l1_tables.push(L1Table { at: header.l1_table.0, entries, owner: Owner::ActiveL1 });
        }
    }

    async fn snapshots(&mut self, file: &ImageFile<'_, impl Io>) {
        let table = file.header().snapshot_table;
        let (snapshots, len) = match file.snapshot_table().await {
            Ok(table) => table,
            Err(error) => return self.unusable(Owner::SnapshotTable, table.0, error),
        };
        let at = header::SNAPSHOT_TABLE_OFFSET;
        let owner = Owner::SnapshotTable;
        if len > 0 {
            self.claim(Claim { holder: Owner::Header, at, owner, host: table.0, len }, 1);
        }
        for (index, snapshot) in (0..).zip(&snapshots) {
            if let Err(source) = snapshot.check(index, table, self.geometry(), file.file_len()) {
                let source = Arc::new(source);
                self.unusable(owner, table.0, Error::Format { file: Arc::clone(file.name()), source });
                continue;
            }
            let entries = u64::from(snapshot.l1_entries);
            let l1 = L1Table { at: snapshot.l1_table.0, entries, owner: Owner::SnapshotL1 };
            let len = entries * TABLE_ENTRY_BYTES;
            if len == 0 {
                continue;
            }
            if self.claim(Claim { holder: owner, at: table.0, owner: l1.owner, host: l1.at, len }, 1) {
                self.l1_tables.push(l1);
            } else {
                self.hides_references = true;
            }
        }
    }

    async fn bitmaps(&mut self, file: &ImageFile<'_, impl Io>) {
        let Some(extension) = file.header().bitmaps.filter(|_| file.header().bitmaps_consistent()) else {
            return;
        };
        let (owner, host, len) = (Owner::BitmapDirectory, extension.directory.0, extension.directory_bytes);
        if !self.claim(Claim { holder: Owner::Header, at: 0, owner, host, len }, 1) {
            self.hides_references = true;
            return;
        }
        let bitmaps = match file.bitmaps().await {
            Ok(bitmaps) => bitmaps,
            Err(error) => return self.unusable(owner, host, error),
        };
        for bitmap in &bitmaps {
            let claim = Claim {
                holder: owner,
                at: host,
                owner: Owner::BitmapTable,
                host: bitmap.table.0,
                len: bitmap.table_bytes(),
            };
            if claim.len / TABLE_ENTRY_BYTES > MAX_BITMAP_BYTES >> self.geometry().cluster_bits {
                let reason = "the bitmap is larger than any that QEMU makes";
                let error = Error::NotSupported { file: Arc::clone(file.name()), reason };
                self.unusable(claim.owner, claim.host, error);
            } else if claim.len > 0 && !self.claim(claim, 1) {
                self.hides_references = true;
            } else if let Err(error) = self.bitmap_table(file, bitmap).await {
                self.unusable(Owner::BitmapTable, bitmap.table.0, error);
            }
        }
    }

    async fn bitmap_table(&mut self, file: &ImageFile<'_, impl Io>, bitmap: &Bitmap) -> Result<()> {
        let count = u64::from(bitmap.table_entries);
        let mut first = 0;
        while first < count {
            let start = bitmap.table.0 + first * TABLE_ENTRY_BYTES;
            let entries = file.read_entries(start, BITMAP_ENTRIES.min(count - first)).await?;
            for (index, &raw) in (0..).zip(&entries) {
                self.bitmap_entry(start + index * TABLE_ENTRY_BYTES, raw);
            }
            first += BITMAP_ENTRIES;
        }
        Ok(())
    }

    fn bitmap_entry(&mut self, at: u64, raw: u64) {
        let (holder, owner, len) = (Owner::BitmapTable, Owner::BitmapData, self.geometry().cluster_size());
        let remedy = Remedy::None("remove the bitmap instead");
        match BitmapTableEntry::decode(raw, self.geometry()) {
            Ok(BitmapTableEntry::Zeros | BitmapTableEntry::Ones) => {}
            Ok(BitmapTableEntry::Data(host)) if self.rules.is_beyond_file(host.0, len) => {
                self.findings.corruption(
                    holder,
                    at,
                    Problem::BeyondFile { owner, host: host.0, len },
                    remedy,
                );
                self.stuck_entries = true;
            }
            Ok(BitmapTableEntry::Data(host)) => {
                self.claim(Claim { holder, at, owner, host: host.0, len }, 1);
            }
            Err(source) => {
                self.findings.corruption(holder, at, Problem::Entry(source), remedy);
                self.hides_references = true;
            }
        }
    }

    /// The refcount table's entries. A block that cannot be one, or that is also something else, is
    /// not read: its counts would be noise.
    async fn refcount_blocks(&mut self, file: &ImageFile<'_, impl Io>) {
        let geometry = *self.geometry();
        let (holder, owner, len) = (Owner::RefcountTable, Owner::RefcountBlock, geometry.cluster_size());
        let table = file.header().refcount_table.0;
        let count = u64::from(file.header().refcount_table_clusters) * len / TABLE_ENTRY_BYTES;
        let entries = match file.refcount_table_entries(count).await {
            Ok(entries) => entries,
            Err(error) => {
                self.needs_rebuild = true;
                return self.findings.structure(holder, table, error);
            }
        };
        let remedy = Remedy::WithAll("write a new refcount structure");
        let mut blocks = BTreeMap::new();
        for (index, &raw) in (0..).zip(&entries) {
            let at = table + index * TABLE_ENTRY_BYTES;
            let problem = match RefcountTableEntry::decode(raw, &geometry) {
                Ok(None) => continue,
                Ok(Some(HostOffset(host))) if self.rules.is_beyond_file(host, len) => {
                    Problem::BeyondFile { owner, host, len }
                }
                Ok(Some(HostOffset(host))) => {
                    if self.window.is_none() {
                        self.claimed_blocks.push(host);
                    }
                    if self.claim(Claim { holder, at, owner, host, len }, 1) {
                        blocks.insert(index, host);
                    } else {
                        self.needs_rebuild = true;
                    }
                    continue;
                }
                Err(source) => Problem::Entry(source),
            };
            self.needs_rebuild = true;
            self.findings.corruption(holder, at, problem, remedy);
        }
        self.refcounts = Refcounts::new(geometry, blocks);
    }
}
