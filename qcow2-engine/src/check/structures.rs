//! The survey's look at what the header names: snapshots, bitmaps, the refcount structure.

use super::{
    findings::{Owner, Problem, Remedy},
    on_disk::CountsOnDisk,
    survey::{REBUILD, Reference, Survey},
    tables::L1Place,
};
use crate::{
    error::{Error, Result},
    inspect::ImageFile,
    io::Io,
};
use qcow2_format::{
    Clusters, FormatError, HostOffset, RefcountTableEntry, Snapshot,
    bitmap::{Bitmap, BitmapTableEntry},
    geometry::TABLE_ENTRY_BYTES,
    header,
    snapshot::Salvage,
};
use std::{collections::BTreeMap, sync::Arc};

/// Entries of a bitmap table that are read at a time: 1 MiB.
const BITMAP_ENTRIES: u64 = (1 << 20) / TABLE_ENTRY_BYTES;
/// The largest bitmap in bytes, as QEMU.
const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// What a bitmap is not made sound by: nobody knows what it was to say.
const REMOVE_BITMAP: Remedy = Remedy::None("remove the bitmap instead");
/// The longest encryption header that is believed: LUKS takes about 2 MiB for eight keys.
const MAX_ENCRYPTION_HEADER_BYTES: u64 = 256 << 20;

impl Survey {
    /// What the header itself points to, but for the refcount table and the snapshots; all of it lies inside
    /// the file, or it would not decode, but for the L1 table.
    pub(super) fn header_tables(&mut self, file: &ImageFile<'_, impl Io>) {
        let header = file.header();
        let cluster_size = self.geometry().cluster_size();
        let mut count = |field, owner, host: HostOffset, len| {
            let reference = Reference { holder: Owner::Header, at: field, owner, host: host.0, len };
            len > 0 && self.count(reference, 1)
        };
        count(0, Owner::Header, HostOffset(0), cluster_size);
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
        self.active_l1(file);
    }

    fn active_l1(&mut self, file: &ImageFile<'_, impl Io>) {
        let (owner, table) = (Owner::ActiveL1, file.header().l1_table);
        if let Some(defect) = &file.defects.l1_table {
            return self.unusable(owner, table.0, file.damaged(defect.clone()));
        }
        let entries = u64::from(file.header().l1_entries);
        let (at, len) = (header::L1_TABLE_OFFSET, entries * TABLE_ENTRY_BYTES);
        if len > 0 && self.count(Reference { holder: Owner::Header, at, owner, host: table.0, len }, 1) {
            self.tables.l1.push(L1Place { at: table.0, entries, owner });
        }
    }

    pub(super) async fn snapshots(&mut self, file: &ImageFile<'_, impl Io>) {
        let table = file.header().snapshot_table;
        let owner = Owner::SnapshotTable;
        let Salvage { snapshots, len, defects } = match file.salvage_snapshots().await {
            Ok(salvage) => salvage,
            Err(error) => return self.unusable(owner, table.0, error),
        };
        let (at, len) = (header::SNAPSHOT_TABLE_OFFSET, len.min(file.bytes_behind_table()));
        let reference = Reference { holder: Owner::Header, at, owner, host: table.0, len };
        let is_alone = len > 0 && self.count(reference, 1);
        if !defects.is_empty() {
            self.replace_snapshots(file, &snapshots, &defects);
            if is_alone {
                self.replacement.old_clusters.extend(reference.clusters(self.geometry()).each());
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
            let reference = Reference { holder: owner, at: table.0, owner: l1.owner, host: l1.at, len };
            if self.count_structure(reference) {
                self.tables.l1.push(l1);
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
        self.doubts.lost_tables |= snapshots.len() < file.header().snapshot_count as usize;
        self.replacement.is_needed = true;
        self.replacement.snapshots = Some(snapshots.to_vec());
    }

    pub(super) async fn bitmaps(&mut self, file: &ImageFile<'_, impl Io>) {
        let Some(extension) = file.header().consistent_bitmaps() else {
            return;
        };
        let (owner, host, len) = (Owner::BitmapDirectory, extension.directory.0, extension.directory_bytes);
        if !self.count_structure(Reference { holder: Owner::Header, at: 0, owner, host, len }) {
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
            } else if reference.len > 0 && self.rules.is_beyond_file(reference.host, reference.len) {
                let Reference { holder, at, owner, host, len } = reference;
                let problem = Problem::BeyondFile { owner, host, len };
                self.findings.corruption(holder, at, problem, REMOVE_BITMAP);
                self.doubts.hides_references = true;
            } else if (reference.len == 0 || self.count_structure(reference))
                && let Err(error) = self.bitmap_table(file, bitmap).await
            {
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
        match BitmapTableEntry::decode(raw, self.geometry()) {
            Ok(BitmapTableEntry::Zeros | BitmapTableEntry::Ones) => {}
            Ok(BitmapTableEntry::Data(host)) if self.rules.is_beyond_file(host.0, len) => {
                self.findings.corruption(
                    holder,
                    at,
                    Problem::BeyondFile { owner, host: host.0, len },
                    REMOVE_BITMAP,
                );
                self.doubts.stuck_entries = true;
            }
            Ok(BitmapTableEntry::Data(host)) => {
                self.count(Reference { holder, at, owner, host: host.0, len }, 1);
            }
            Err(source) => {
                self.findings.corruption(holder, at, Problem::Entry(source), REMOVE_BITMAP);
                self.doubts.hides_references = true;
            }
        }
    }

    /// The refcount table and its entries. A table or a block that cannot be one, or that is also something
    /// else, is not read: what it holds would be noise.
    pub(super) async fn refcount_table(&mut self, file: &ImageFile<'_, impl Io>) {
        let (owner, host) = (Owner::RefcountTable, file.header().refcount_table.0);
        if let Some(defect) = &file.defects.refcount_table {
            self.replacement.is_needed = true;
            self.contested.all_tables = matches!(defect, FormatError::TablesOverlap { .. });
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
                self.replacement.has_old_table = true;
                self.refcount_blocks(host, &entries);
            }
            Err(error) => {
                self.replacement.is_needed = true;
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
                Ok(Some(block)) => {
                    let host = block.0;
                    if self.count_refcounts(Reference { holder, at, owner, host, len }) {
                        blocks.insert(index, geometry.host_cluster(block));
                    }
                    continue;
                }
                Err(source) => Problem::Entry(source),
            };
            self.replacement.is_needed = true;
            self.findings.corruption(holder, at, problem, REBUILD);
        }
        self.on_disk = CountsOnDisk::new(geometry, blocks);
    }
}
