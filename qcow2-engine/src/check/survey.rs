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
    counts::Tally,
    doubts::{Contested, Doubts},
    entry::Rules,
    findings::{Findings, Owner, Problem, Remedy},
    on_disk::CountsOnDisk,
    rebuild::Replacement,
    statistics::Statistics,
    tables::Tables,
    window::Window,
};
use crate::{error::Error, inspect::ImageFile, io::Io};
use qcow2_format::{Clusters, FormatError, Geometry, HostCluster, HostOffset, header};
use std::{collections::BTreeMap, ops::Range};

/// What a repair does about a refcount structure that cannot be one.
pub(super) const REBUILD: Remedy = Remedy::WithAll("write a new refcount structure");

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

impl Reference {
    /// The clusters that it is to, the last of them perhaps in part.
    pub(super) fn clusters(&self, geometry: &Geometry) -> Range<HostCluster> {
        geometry.host_clusters(&HostOffset(self.host).bytes(self.len))
    }
}

/// What a pass over the image has found. Each part has one job; what concerns several of them, as that a
/// cluster is two things, is decided here.
pub(super) struct Survey {
    pub(super) rules: Rules,
    pub(super) findings: Findings,
    pub(super) statistics: Statistics,
    /// Where an image that is being served has its references counted instead.
    pub(super) window: Option<Window>,
    /// The references that there are.
    pub(super) tally: Tally,
    /// The tables that lead to them.
    pub(super) tables: Tables,
    /// The counts that there should be as many as references.
    pub(super) on_disk: CountsOnDisk,
    pub(super) replacement: Replacement,
    pub(super) contested: Contested,
    pub(super) doubts: Doubts,
}

impl Survey {
    /// Surveys an image. What cannot be read is a finding, not an error.
    pub(super) async fn of(file: &ImageFile<'_, impl Io>, max_findings: usize) -> Self {
        let mut survey = Self::new(file, max_findings);
        survey.features(file);
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
            statistics: Statistics::new(&geometry),
            window: None,
            tally: Tally::default(),
            tables: Tables::default(),
            on_disk: CountsOnDisk::new(geometry, BTreeMap::new()),
            replacement: Replacement::default(),
            contested: Contested::default(),
            doubts: Doubts::default(),
        }
    }

    /// Feature bits that contradict each other, for which QEMU does not open an image; and snapshots where there
    /// are none. Of what these hold nothing would be counted but their tables.
    fn features(&mut self, file: &ImageFile<'_, impl Io>) {
        if file.header().has_stray_raw_bit() {
            let problem = Problem::Structure(file.damaged(FormatError::RawWithoutDataFile));
            let remedy = Remedy::WithLeaks("clear the bit");
            self.findings.corruption(Owner::Header, header::AUTOCLEAR_OFFSET, problem, remedy);
        }
        let count = file.header().snapshot_count;
        if self.rules.has_data_file && count > 0 {
            let problem = Problem::Structure(file.damaged(FormatError::SnapshotsWithDataFile { count }));
            let remedy = Remedy::None("what they refer to is in the one file or the other");
            self.findings.corruption(Owner::Header, header::SNAPSHOT_COUNT_OFFSET, problem, remedy);
            self.doubts.hides_references = true;
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
        self.contested.disown(&mut self.on_disk.blocks);
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.rules.geometry
    }

    /// Notes a structure that cannot be used, and with it what it may refer to.
    pub(super) fn unusable(&mut self, table: Owner, at: u64, error: Error) {
        self.findings.structure(table, at, error);
        self.doubts.hides_references = true;
    }

    /// Counts references to the clusters of a range. Returns whether no cluster of it is already
    /// something that it cannot share with. A table is counted up to its first such cluster only:
    /// thousands of large tables may claim the same place, which must not cost thousands of times as
    /// much.
    pub(super) fn count(&mut self, reference: Reference, times: u64) -> bool {
        let Reference { owner, len, .. } = reference;
        let geometry = *self.geometry();
        let clusters = reference.clusters(&geometry);
        if let Some(window) = &mut self.window {
            window.count(&reference, clusters, times);
            return true;
        }
        let is_metadata = !matches!(owner, Owner::Data | Owner::Compressed);
        let mut is_alone = true;
        for cluster in clusters.each() {
            match self.tally.metadata(cluster) {
                None if is_metadata => self.tally.set_metadata(cluster, owner),
                None => {}
                Some(Owner::L2) if owner == Owner::L2 => {}
                Some(other) => {
                    is_alone = false;
                    self.overlap(&reference, cluster, other);
                }
            }
            self.tally.add(cluster, times);
            if is_metadata && !is_alone {
                self.doubts.hides_references |= len > geometry.cluster_size();
                break;
            }
        }
        is_alone
    }

    /// Counts the reference to a table or a block of the refcount structure, or none of it where a cluster is
    /// something else already. Returns whether it can be used.
    pub(super) fn count_refcounts(&mut self, reference: Reference) -> bool {
        if self.window.is_some() {
            return self.count(reference, 1);
        }
        let clusters = reference.clusters(self.geometry());
        for cluster in clusters.clone().each() {
            if let Some(other) = self.tally.metadata(cluster) {
                self.overlap(&reference, cluster, other);
                return false;
            }
        }
        self.replacement.old_clusters.extend(clusters.each());
        self.count(reference, 1)
    }

    /// Counts the reference to all of a structure, once. Where a part of it is something else, what the
    /// rest refers to is hidden. Returns whether it can be read.
    pub(super) fn count_structure(&mut self, reference: Reference) -> bool {
        let is_alone = self.count(reference, 1);
        self.doubts.hides_references |= !is_alone;
        is_alone
    }

    /// Notes that a cluster is two things.
    fn overlap(&mut self, reference: &Reference, cluster: HostCluster, other: Owner) {
        let Reference { holder, at, owner, .. } = *reference;
        if (owner, other) == (Owner::Data, Owner::L2) && !self.tables.is_active(cluster) {
            self.doubts.under_data.entry(cluster).or_insert(*reference);
            return;
        }
        let remedy = if owner.is_of_refcounts() || other.is_of_refcounts() {
            self.replacement.is_needed = true;
            self.replacement.has_old_table &= other != Owner::RefcountTable;
            self.contested.note(cluster, other);
            REBUILD
        } else {
            self.doubts.note(cluster, other);
            Remedy::None("the content of one of the two is lost; only the refcount is raised")
        };
        let HostOffset(host) = self.geometry().host_offset(cluster);
        self.findings.corruption(holder, at, Problem::Overlap { host, owner, other }, remedy);
    }
}
