//! One pass over everything that an image's header leads to: which clusters are referred to, how
//! often, by what; and all that is wrong on the way.
//!
//! Work and memory are bounded by the file, not by its claims: tables that overlap are read once at
//! most, and an L2 table that many L1 entries name is walked once, its references counted that many
//! times. The order of the passes is: what the header names → L1 tables → refcount table and blocks → L2
//! tables ([`tables`](super::tables)) → comparison ([`compare`](super::compare)). So by the time that
//! a guest cluster is looked at, all metadata is known, and an overlap shows at the culprit. The refcount
//! structure comes behind the tables that nothing else can tell: where they lie at one place it gives way,
//! because it can be made anew.

use super::{
    counts::{Bytes, Counts},
    entry::Rules,
    findings::{Findings, Owner, Problem, Remedy},
    on_disk::CountsOnDisk,
    window::Window,
};
use crate::{
    error::{Error, Result},
    inspect::ImageFile,
    io::Io,
};
use qcow2_format::{
    FormatError, Geometry, HostOffset, RefcountTableEntry, Snapshot,
    bitmap::{Bitmap, BitmapTableEntry},
    geometry::TABLE_ENTRY_BYTES,
    header,
    snapshot::Salvage,
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
/// What a repair does about a refcount structure that cannot be one.
const REBUILD: Remedy = Remedy::WithAll("write a new refcount structure");

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
pub(super) struct L1Place {
    pub(super) at: u64,
    pub(super) entries: u64,
    pub(super) owner: Owner,
}

/// A reference: who holds it, and to what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reference {
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
    pub(super) l1_tables: Vec<L1Place>,
    pub(super) on_disk: CountsOnDisk,
    /// Clusters whose only known use is one that a rebuild takes away: of the refcount structure, and of a
    /// snapshot table that is replaced.
    pub(super) replaceable: Vec<u64>,
    /// The refcount table can be read, and is nothing else.
    pub(super) has_refcount_table: bool,
    /// Refcount blocks that are also a guest's data.
    over_data: HashSet<u64>,
    /// L2 tables that something also calls a part of the refcount structure: it may be right.
    contested: HashSet<u64>,
    /// All of them may be, because the header calls one table by two names.
    all_contested: bool,
    /// The refcount structure cannot hold the counts as it is.
    pub(super) needs_rebuild: bool,
    /// What the snapshot table should be, where it is something else.
    pub(super) new_snapshots: Option<Vec<Snapshot>>,
    /// Damage that no repair undoes hides references: what seems unused may not be.
    pub(super) hides_references: bool,
    /// L2 tables that may be something else: entries that cannot be, or clusters of data. They are
    /// never written to.
    pub(super) doubtful: HashSet<u64>,
    /// Clusters of the active mapping's L2 tables.
    pub(super) active_tables: HashSet<u64>,
    /// Clusters of other L2 tables that are data, too, and the first entry that says so. Shared and counted
    /// as often as they are referred to, they are copied before they change, so that nothing is lost.
    pub(super) under_data: HashMap<u64, Reference>,
    /// L2 tables are beyond the end of the file, or snapshots beyond their limits; a repair of all drops
    /// them.
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
            on_disk: CountsOnDisk::new(geometry, BTreeMap::new()),
            replaceable: Vec::new(),
            has_refcount_table: false,
            over_data: HashSet::new(),
            contested: HashSet::new(),
            all_contested: false,
            needs_rebuild: false,
            new_snapshots: None,
            hides_references: false,
            doubtful: HashSet::new(),
            active_tables: HashSet::new(),
            under_data: HashMap::new(),
            lost_tables: false,
            stuck_entries: false,
        }
    }

    /// Everything but the comparison with the counts.
    pub(super) async fn count_references(&mut self, file: &ImageFile<'_, impl Io>) {
        self.header_tables(file);
        self.snapshots(file).await;
        self.bitmaps(file).await;
        self.l1_entries(file).await;
        self.refcount_table(file).await;
        self.l2_tables(file).await;
        self.disown_blocks();
    }

    /// Refcount blocks that turned out to be something else are neither believed nor written to.
    fn disown_blocks(&mut self) {
        if !self.over_data.is_empty() {
            let over_data = &self.over_data;
            self.on_disk.blocks.retain(|_, block| !over_data.contains(block));
        }
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
    pub(super) fn count(&mut self, reference: Reference, times: u64) -> bool {
        let Reference { owner, host, len, .. } = reference;
        let geometry = *self.geometry();
        let clusters = host >> geometry.cluster_bits..geometry.clusters_for(host + len);
        if let Some(window) = &mut self.window {
            window.count(&reference, clusters, times);
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
                    self.overlap(&reference, cluster << geometry.cluster_bits, other);
                }
            }
            self.refs.add(cluster, times);
            if is_metadata && !is_alone {
                self.hides_references |= len > geometry.cluster_size();
                break;
            }
        }
        is_alone
    }

    /// Notes that a cluster is two things.
    fn overlap(&mut self, reference: &Reference, host: u64, other: Owner) {
        let Reference { holder, at, owner, .. } = *reference;
        let cluster = host >> self.geometry().cluster_bits;
        if (owner, other) == (Owner::Data, Owner::L2) && !self.active_tables.contains(&cluster) {
            self.under_data.entry(cluster).or_insert(*reference);
            return;
        }
        let remedy = if owner.is_of_refcounts() || other.is_of_refcounts() {
            self.needs_rebuild = true;
            self.has_refcount_table &= other != Owner::RefcountTable;
            match other {
                Owner::RefcountBlock => drop(self.over_data.insert(host)),
                Owner::L2 => drop(self.contested.insert(host)),
                _ => {}
            }
            REBUILD
        } else {
            if other == Owner::L2 {
                self.doubtful.insert(host);
            }
            Remedy::None("the content of one of the two is lost; only the refcount is raised")
        };
        self.findings.corruption(holder, at, Problem::Overlap { host, owner, other }, remedy);
    }

    /// Whether an L2 table may be a part of the refcount structure in truth.
    pub(super) fn is_contested(&self, table: u64) -> bool {
        self.all_contested || self.contested.contains(&table)
    }

    /// Whether any table is.
    pub(super) fn has_contested(&self) -> bool {
        self.all_contested || !self.contested.is_empty()
    }

    /// Counts the reference to a table or a block of the refcount structure, or none of it where a cluster is
    /// something else already. Returns whether it can be used.
    fn count_refcounts(&mut self, reference: Reference) -> bool {
        if self.window.is_some() {
            return self.count(reference, 1);
        }
        let geometry = *self.geometry();
        let clusters =
            reference.host >> geometry.cluster_bits..geometry.clusters_for(reference.host + reference.len);
        for cluster in clusters.clone() {
            if let Some(other) = Owner::metadata(self.owners.get(cluster)) {
                self.overlap(&reference, cluster << geometry.cluster_bits, other);
                return false;
            }
        }
        self.replaceable.extend(clusters);
        self.count(reference, 1)
    }

    /// What the header itself points to, but for the refcount table; all of it lies inside the file, or it
    /// would not decode.
    fn header_tables(&mut self, file: &ImageFile<'_, impl Io>) {
        let header = file.header();
        let cluster_size = self.geometry().cluster_size();
        let mut count = |field, owner, host: HostOffset, len| {
            let reference = Reference { holder: Owner::Header, at: field, owner, host: host.0, len };
            len > 0 && self.count(reference, 1)
        };
        count(0, Owner::Header, HostOffset(0), cluster_size);
        let entries = u64::from(header.l1_entries);
        let bytes = entries * TABLE_ENTRY_BYTES;
        let has_l1 = count(header::L1_TABLE_OFFSET, Owner::ActiveL1, header.l1_table, bytes);
        let crypto =
            header.crypto_header.map_or((HostOffset(0), 0), |crypto| (crypto.offset, crypto.len_bytes));
        if crypto.1 <= MAX_ENCRYPTION_HEADER_BYTES {
            count(0, Owner::EncryptionHeader, crypto.0, crypto.1);
        } else {
            let error = Error::NotSupported {
                file: Arc::clone(file.name()),
                reason: "it is larger than any that is known",
            };
            self.unusable(Owner::EncryptionHeader, crypto.0.0, error);
        }
        if has_l1 {
            self.l1_tables.push(L1Place { at: header.l1_table.0, entries, owner: Owner::ActiveL1 });
        }
    }

    async fn snapshots(&mut self, file: &ImageFile<'_, impl Io>) {
        let table = file.header().snapshot_table;
        let owner = Owner::SnapshotTable;
        let Salvage { snapshots, len, defects } = match file.salvage_snapshots().await {
            Ok(salvage) => salvage,
            Err(error) => return self.unusable(owner, table.0, error),
        };
        let reference =
            Reference { holder: Owner::Header, at: header::SNAPSHOT_TABLE_OFFSET, owner, host: table.0, len };
        let is_alone = len > 0 && self.count(reference, 1);
        if !defects.is_empty() {
            self.replace_snapshots(file, &snapshots, &defects);
            if is_alone {
                let geometry = *self.geometry();
                let end = geometry.clusters_for(table.0 + len);
                self.replaceable.extend(table.0 >> geometry.cluster_bits..end);
            }
        }
        for (index, snapshot) in (0..).zip(&snapshots) {
            if let Err(source) = snapshot.check(index, table, self.geometry(), file.file_len()) {
                self.unusable(owner, table.0, file.damaged(source));
                continue;
            }
            let entries = u64::from(snapshot.l1_entries);
            let l1 = L1Place { at: snapshot.l1_table.0, entries, owner: Owner::SnapshotL1 };
            let len = entries * TABLE_ENTRY_BYTES;
            if len == 0 {
                continue;
            }
            if self.count(Reference { holder: owner, at: table.0, owner: l1.owner, host: l1.at, len }, 1) {
                self.l1_tables.push(l1);
            } else {
                self.hides_references = true;
            }
        }
    }

    /// The snapshot table is not what can be made of it.
    fn replace_snapshots(
        &mut self,
        file: &ImageFile<'_, impl Io>,
        snapshots: &[Snapshot],
        defects: &[FormatError],
    ) {
        let at = file.header().snapshot_table.0;
        for defect in defects {
            let problem = Problem::Structure(file.damaged(defect.clone()));
            let remedy = Remedy::WithAll("write a new snapshot table without it");
            self.findings.corruption(Owner::SnapshotTable, at, problem, remedy);
        }
        self.lost_tables |= snapshots.len() < file.header().snapshot_count as usize;
        self.needs_rebuild = true;
        self.new_snapshots = Some(snapshots.to_vec());
    }

    async fn bitmaps(&mut self, file: &ImageFile<'_, impl Io>) {
        let Some(extension) = file.header().bitmaps.filter(|_| file.header().bitmaps_consistent()) else {
            return;
        };
        let (owner, host, len) = (Owner::BitmapDirectory, extension.directory.0, extension.directory_bytes);
        if !self.count(Reference { holder: Owner::Header, at: 0, owner, host, len }, 1) {
            self.hides_references = true;
            return;
        }
        let bitmaps = match file.bitmaps().await {
            Ok(bitmaps) => bitmaps,
            Err(error) => return self.unusable(owner, host, error),
        };
        for bitmap in &bitmaps {
            let reference = Reference {
                holder: owner,
                at: host,
                owner: Owner::BitmapTable,
                host: bitmap.table.0,
                len: bitmap.table_bytes(),
            };
            if reference.len / TABLE_ENTRY_BYTES > MAX_BITMAP_BYTES >> self.geometry().cluster_bits {
                let reason = "the bitmap is larger than any that QEMU makes";
                let error = Error::NotSupported { file: Arc::clone(file.name()), reason };
                self.unusable(reference.owner, reference.host, error);
            } else if reference.len > 0 && !self.count(reference, 1) {
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
                self.count(Reference { holder, at, owner, host: host.0, len }, 1);
            }
            Err(source) => {
                self.findings.corruption(holder, at, Problem::Entry(source), remedy);
                self.hides_references = true;
            }
        }
    }

    /// The refcount table and its entries. A table or a block that cannot be one, or that is also something
    /// else, is not read: what it holds would be noise.
    async fn refcount_table(&mut self, file: &ImageFile<'_, impl Io>) {
        let (owner, host) = (Owner::RefcountTable, file.header().refcount_table.0);
        if let Some(defect) = &file.defects.refcount_table {
            self.needs_rebuild = true;
            self.all_contested = matches!(defect, FormatError::TablesOverlap { .. });
            let problem = Problem::Structure(file.damaged(defect.clone()));
            return self.findings.corruption(owner, header::REFCOUNT_TABLE_OFFSET, problem, REBUILD);
        }
        let len = u64::from(file.header().refcount_table_clusters) * self.geometry().cluster_size();
        let at = header::REFCOUNT_TABLE_OFFSET;
        if !self.count_refcounts(Reference { holder: Owner::Header, at, owner, host, len }) {
            return;
        }
        match file.refcount_table_entries(len / TABLE_ENTRY_BYTES).await {
            Ok(entries) => {
                self.has_refcount_table = true;
                self.refcount_blocks(host, &entries);
            }
            Err(error) => {
                self.needs_rebuild = true;
                self.findings.structure(owner, host, error);
            }
        }
    }

    fn refcount_blocks(&mut self, table: u64, entries: &[u64]) {
        let geometry = *self.geometry();
        let (holder, owner, len) = (Owner::RefcountTable, Owner::RefcountBlock, geometry.cluster_size());
        let mut blocks = BTreeMap::new();
        for (index, &raw) in (0..).zip(entries) {
            let at = table + index * TABLE_ENTRY_BYTES;
            let problem = match RefcountTableEntry::decode(raw, &geometry) {
                Ok(None) => continue,
                Ok(Some(HostOffset(host))) if self.rules.is_beyond_file(host, len) => {
                    Problem::BeyondFile { owner, host, len }
                }
                Ok(Some(HostOffset(host))) => {
                    if self.count_refcounts(Reference { holder, at, owner, host, len }) {
                        blocks.insert(index, host);
                    }
                    continue;
                }
                Err(source) => Problem::Entry(source),
            };
            self.needs_rebuild = true;
            self.findings.corruption(holder, at, problem, REBUILD);
        }
        self.on_disk = CountsOnDisk::new(geometry, blocks);
    }
}
