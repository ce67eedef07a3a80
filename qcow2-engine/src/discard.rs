//! Discard and write-zeroes: the mapping changes, no payload moves.
//!
//! Discard is a hint in whole clusters: what it covers reads as zeros afterwards. Write-zeroes is a
//! promise in sectors: the parts of clusters at its ends are written.

use crate::{
    error::{Error, Result},
    image::Image,
    io::{Buf, Io},
    lane::Lane,
    old::Old,
    resolve::Extent,
};
use qcow2_format::{Clusters, GuestCluster, L1Entry, Mapping};
use std::{ops::Range, sync::Arc};

/// Whether zeroed clusters keep their space in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Their space is freed.
    Unmap,
    /// Their space stays reserved for them.
    Keep,
}

impl<I: Io> Lane<I> {
    /// Discards the whole clusters inside the range; the rest of it is left as it is. They read as
    /// zeros, and their space in the file is given back after the next flush.
    ///
    /// # Errors
    /// As for a write; `NotSupported` on a version 2 image with a backing file, whose clusters
    /// cannot say "zero".
    pub async fn discard(&self, at: u64, len: u64) -> Result<()> {
        self.check_range(at, len)?;
        if !self.image().can_discard() {
            return Err(Error::NotSupported {
                file: Arc::clone(&self.image().top().name),
                reason: "a version 2 image with a backing file cannot discard",
            });
        }
        let outcome = self.zero_clusters(self.image().whole_clusters(at, len), ZeroMode::Unmap).await;
        self.settle(outcome).await
    }

    /// Makes the range read as zeros. Offset and length are multiples of 512 bytes.
    ///
    /// # Errors
    /// As for a write.
    pub async fn write_zeroes(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check_range(at, len)?;
        let outcome = self.write_zeroes_in_parts(at, len, mode).await;
        self.settle(outcome).await
    }

    /// [`Self::write_zeroes`], from inside a request.
    pub(crate) async fn write_zeroes_in_parts(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let image = self.image();
        let geometry = image.geometry();
        let keeps_bytes = !image.has_zero_clusters() && (mode == ZeroMode::Keep || !image.can_discard());
        let clusters = if keeps_bytes { Range::default() } else { image.whole_clusters(at, len) };
        let end = at + len;
        let edges = match clusters.is_empty() {
            true => [at..end, end..end],
            false => {
                [at..geometry.guest_offset(clusters.start), end.min(geometry.guest_offset(clusters.end))..end]
            }
        };
        for edge in edges.into_iter().filter(|edge| !edge.is_empty()) {
            self.write_zero_bytes(edge).await?;
        }
        self.zero_clusters(clusters, mode).await
    }

    /// Writes zeros where the range does not read as zeros already, cluster by cluster, each in flight for
    /// itself: in an image of version 2 that is all that zeroes can be, and a request may be long.
    async fn write_zero_bytes(&self, range: Range<u64>) -> Result<()> {
        let cluster = self.image().geometry().cluster_size();
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / cluster + 1) * cluster);
            self.change(async || self.write_zeros_in_cluster(at..end).await).await?;
            at = end;
        }
        Ok(())
    }

    async fn write_zeros_in_cluster(&self, Range { start, end }: Range<u64>) -> Result<()> {
        self.begin_mutation().await?;
        let extents = self.resolve(start, end - start).await?;
        if extents.iter().all(Extent::is_zero) {
            return Ok(());
        }
        self.write_entered(start, Buf::zeroed((end - start) as usize)).await
    }

    /// Makes whole clusters read as zeros by their mapping, a slice at a time. Each slice is in flight for
    /// itself, too: were it the request as a whole, all that is freed meanwhile would wait for its end.
    async fn zero_clusters(&self, clusters: Range<GuestCluster>, mode: ZeroMode) -> Result<()> {
        self.image().check_changes()?;
        let mut first = clusters.start;
        while first < clusters.end {
            let end = clusters.end.min(self.image().top().slice_end(first));
            self.change(async || self.zero_in_slice(first..end, mode).await).await?;
            first = end;
            self.relieve().await?;
        }
        Ok(())
    }

    async fn zero_in_slice(&self, clusters: Range<GuestCluster>, mode: ZeroMode) -> Result<()> {
        self.begin_mutation().await?;
        let image = self.image();
        let at = image.geometry().guest_offset(clusters.start);
        let _mapping = image.locks.mappings.acquire(clusters.clone()).await;
        if image.layers.len() == 1 && image.top().l1_entry(at)? == L1Entry::Unallocated {
            return Ok(());
        }
        let mut old = Vec::with_capacity(clusters.cluster_count() as usize);
        for cluster in clusters.clone().each() {
            old.push(self.old(cluster).await?);
        }
        let new: Vec<_> = old.iter().map(|&old| image.zeroed(old, mode)).collect();
        if new.iter().all(Option::is_none) {
            return Ok(());
        }
        self.prepare_table(at).await?;
        // The range is locked: nobody else has changed what `old` saw.
        self.publish(clusters.clone(), None, |cluster| new[(cluster - clusters.start) as usize]).await
    }
}

impl Image {
    /// The clusters that lie wholly inside the range; the disk's last one counts up to its end.
    fn whole_clusters(&self, at: u64, len: u64) -> Range<GuestCluster> {
        let geometry = self.geometry();
        let end = at + len;
        let behind = match end >= self.virtual_size() {
            true => GuestCluster(geometry.clusters_for(end)),
            false => geometry.guest_cluster(end),
        };
        let first = GuestCluster(geometry.clusters_for(at));
        first..behind.max(first)
    }

    /// The mapping that makes a cluster read as zeros, or `None` where it does already.
    fn zeroed(&self, old: Old, mode: ZeroMode) -> Option<Mapping> {
        match (old, mode) {
            (Old::Mapping(Mapping::Unallocated), _) if self.layers.len() == 1 => None,
            (Old::Mapping(Mapping::Zero { host: None, .. }), _)
            | (Old::Mapping(Mapping::Zero { copied: true, .. }), ZeroMode::Keep) => None,
            (Old::Mapping(Mapping::Data { host, copied: true }), ZeroMode::Keep) => {
                Some(Mapping::Zero { host: Some(host), copied: true })
            }
            // Version 2 has no zero flag, and comes here only without a backing file.
            _ if !self.has_zero_clusters() => Some(Mapping::Unallocated),
            _ => Some(Mapping::Zero { host: None, copied: false }),
        }
    }
}
