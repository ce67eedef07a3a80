//! The counts on disk against the references that there are.

use super::{
    counts::CHUNK,
    findings::{Finding, Owner, Problem, Remedy, Severity},
    survey::Survey,
};
use crate::{inspect::ImageFile, io::Io};
use qcow2_format::{Clusters, Geometry, HostCluster, refcount};
use std::{
    collections::{BTreeSet, HashSet},
    ops::Range,
};

/// The clusters of a refcount block whose count or references are not 0, a chunk at a time: what is
/// empty on both sides costs next to nothing.
pub(super) fn chunks_in_use<'a>(
    survey: &'a Survey,
    index: u64,
    block: &'a [u8],
) -> impl Iterator<Item = Range<HostCluster>> + use<'a> {
    let geometry = *survey.geometry();
    let per_block = geometry.refcounts_per_block();
    let chunk_bytes = (CHUNK as usize) << geometry.refcount_order >> 3;
    let chunks = HostCluster(index * per_block).row(per_block).each().step_by(CHUNK as usize);
    chunks
        .zip(block.chunks(chunk_bytes))
        .filter(|(first, bytes)| survey.tally.has_chunk(*first) || bytes.iter().any(|byte| *byte != 0))
        .map(|(first, _)| first.row(CHUNK))
}

impl Survey {
    /// Indices of the refcount blocks that count clusters with references.
    pub(super) fn blocks_in_use(&self) -> BTreeSet<u64> {
        let block_of = |chunk: Range<HostCluster>| self.geometry().refcount_table_index(chunk.start);
        self.tally.chunks().into_iter().map(block_of).collect()
    }

    pub(super) async fn compare(&mut self, file: &ImageFile<'_, impl Io>) {
        let geometry = *self.geometry();
        let blocks = self.on_disk.blocks.clone();
        let mut holes = HashSet::new();
        let mut last = None;
        for (&index, &place) in &blocks {
            let block = match file.read_cluster(place).await {
                Ok(Some(block)) => block,
                Ok(None) => {
                    holes.insert(index);
                    continue;
                }
                Err(error) => {
                    self.findings.structure(Owner::RefcountBlock, geometry.host_offset(place).0, error);
                    continue;
                }
            };
            let ranges: Vec<_> = chunks_in_use(self, index, &block).collect();
            for cluster in ranges.into_iter().flat_map(Clusters::each) {
                let at = geometry.refcount_block_index(cluster) as usize;
                self.compare_one(cluster, refcount::get(&block, geometry.refcount_order, at), &mut last);
            }
        }
        for chunk in self.tally.chunks() {
            let is_hole = holes.contains(&geometry.refcount_table_index(chunk.start));
            if is_hole || !self.on_disk.has_block(chunk.start) {
                self.uncounted(chunk, &mut last);
            }
        }
        let end = last.map_or(HostCluster(0), |last| last + 1);
        self.statistics.image_end_offset = geometry.host_offset(end).0;
    }

    /// Clusters whose counts are all 0, because their block is a hole, or because they have none.
    fn uncounted(&mut self, clusters: Range<HostCluster>, last: &mut Option<HostCluster>) {
        let has_block = self.on_disk.has_block(clusters.start);
        for cluster in clusters.each() {
            if self.tally.references(cluster) > 0 {
                self.replacement.is_needed |= !has_block;
                self.compare_one(cluster, 0, last);
            }
        }
    }

    fn compare_one(&mut self, cluster: HostCluster, count: u64, last: &mut Option<HostCluster>) {
        let geometry = *self.geometry();
        let references = self.tally.references(cluster);
        if count == 0 && references == 0 {
            return;
        }
        if cluster < HostCluster(geometry.clusters_for(self.rules.file_len)) {
            *last = (*last).max(Some(cluster));
        } else if references == 0 {
            self.findings.counted_beyond_end += 1;
            return;
        }
        if count == references {
            return;
        }
        let severity = if count > references { Severity::Leak } else { Severity::Corruption };
        let remedy = self.remedy(&geometry, severity, references);
        let at = cluster.0.saturating_mul(geometry.cluster_size());
        if severity == Severity::Corruption
            && let Some(reference) = self.doubts.under_data.get(&cluster)
        {
            let problem = Problem::Overlap { host: at, owner: reference.owner, other: Owner::L2 };
            self.findings.corruption(reference.holder, reference.at, problem, remedy);
        }
        let table = Owner::RefcountBlock;
        self.findings.push(Finding {
            severity,
            table,
            at,
            problem: Problem::Refcount { count, references },
            remedy,
        });
    }

    fn remedy(&self, geometry: &Geometry, severity: Severity, references: u64) -> Remedy {
        match severity {
            Severity::Leak if self.doubts.hides_references => {
                Remedy::None("other damage may hide references to it")
            }
            Severity::Leak if self.doubts.lost_tables => Remedy::WithAll("lower the refcount"),
            Severity::Leak => Remedy::WithLeaks("lower the refcount"),
            _ if references > geometry.refcount_max() => Remedy::None("the refcounts are too narrow for it"),
            _ => Remedy::WithAll("raise the refcount"),
        }
    }
}
