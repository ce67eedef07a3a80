//! Giving freed clusters back: hole punched, refcount lowered, free for reuse (R5).
//!
//! Runs beside the requests, never on their way. A cluster that waited in `frees` long enough is
//! still counted while its hole is punched, so nobody can be given it in the meantime; the count is
//! lowered afterwards. That the unmapping is durable by then is what makes the punch safe.

use crate::{
    alloc::{frees::Due, refcounts::Count},
    epoch::Epoch,
    error::{Error, Result},
    image::Image,
    io::Io,
    lane::Lane,
    meta::Meta,
    order::rules::RuleName,
};
use qcow2_format::{Clusters, HostCluster};
use std::{
    io::ErrorKind,
    ops::Range,
    sync::{Arc, atomic::Ordering},
};

/// Pauses, a second in all, in which who finds no room waits for some that is about to be free.
const MAX_PAUSES: u32 = 100;

/// References that are being given back. What is left of them when it is dropped goes back into the queue.
struct Batch<'a> {
    image: &'a Image,
    /// Clusters, in order, and how many references to each.
    references: Vec<(HostCluster, u64)>,
    /// Holes are being punched. Whoever punches may go away; the kernel goes on.
    is_punching: bool,
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        let mut meta = self.image.meta.lock();
        let rest = meta.frees.take_rest();
        if self.is_punching {
            let clusters = rest.len();
            tracing::warn!(clusters, "clusters whose holes were being punched when a queue ended are leaked");
            meta.watch.go_blind();
            return;
        }
        for (cluster, gone) in rest {
            (0..gone).for_each(|_| meta.unmapped(cluster.row(1)));
        }
    }
}

impl<I: Io> Lane<I> {
    /// One pass of the work that nobody waits for: writes dirty metadata back and gives freed
    /// clusters back. Call it every second or so, from one lane of an image.
    ///
    /// # Errors
    /// As [`Self::flush`]; nothing is lost, the next pass tries again.
    pub async fn maintain(&self) -> Result<()> {
        let image = self.image();
        let idle = {
            let mut meta = image.meta.lock();
            meta.frees.begin_pass();
            // For what stays as it is whatever is cut, the disk is not kept awake.
            meta.graph.len() == 0 && (image.damage.is_condemned() || !image.can_free(&meta))
        };
        if idle || image.read_only {
            return Ok(());
        }
        self.write_back().await?;
        let outcome = self.reclaim().await;
        self.settle(outcome).await
    }

    /// Gives back what may be given back by now.
    pub(crate) async fn reclaim(&self) -> Result<()> {
        let image = self.image();
        let _reclaiming = image.locks.reclaiming.acquire().await;
        while !image.damage.is_condemned() {
            let mut batch = Batch {
                image,
                references: image.take_ready_frees(image.paging.free_step),
                is_punching: false,
            };
            if batch.references.is_empty() {
                return Ok(());
            }
            self.give_back(&mut batch).await?;
        }
        Ok(())
    }

    /// Has no request wait for its place where what was freed could be its place. False if that cannot be
    /// yet.
    pub(crate) async fn give_back_now(&self) -> Result<bool> {
        let image = self.image();
        let (can_free, is_giving_back) = {
            let meta = image.meta.lock();
            (image.can_free(&meta), meta.frees.is_giving_back())
        };
        if can_free {
            self.write_back().await?;
        }
        if can_free || is_giving_back {
            // After whoever is at it.
            self.reclaim().await?;
        }
        Ok(can_free || is_giving_back)
    }

    /// Whether something has been given back that requests in flight may have touched: waits for these, a
    /// second at the most. Who waits here is in flight no more and holds no lock, so that nobody who finds no
    /// room waits for another one who finds none.
    pub(crate) async fn await_frees(&self) -> Result<bool> {
        let first_cut = || self.image().meta.lock().frees.first_due().map(|due| due.cut);
        let Some(cut) = first_cut() else { return self.give_back_now().await };
        for _ in 0..MAX_PAUSES {
            self.give_back_now().await?;
            if first_cut().is_none_or(|first| first > cut) {
                return Ok(true);
            }
            self.io().pause().await;
        }
        Ok(false)
    }

    async fn give_back(&self, batch: &mut Batch<'_>) -> Result<()> {
        let (mut counted, mut unused) = (Vec::with_capacity(batch.references.len()), Vec::new());
        for &(cluster, gone) in &batch.references {
            if self.image().is_set_aside(cluster) {
                continue;
            }
            match self.refcount(cluster).await {
                Ok(count) if count < gone + self.image().held(cluster) => {
                    return Err(self.image().too_low(cluster, count));
                }
                Ok(count) => {
                    counted.push((cluster, gone));
                    unused.extend((count == gone).then_some(cluster));
                }
                Err(error) => self.image().pass_over(cluster, error)?,
            }
        }
        batch.is_punching = true;
        for run in in_rows(&unused) {
            self.punch(run).await;
        }
        batch.is_punching = false;
        for (cluster, gone) in counted {
            if self.image().is_set_aside(cluster) {
                continue;
            }
            if let Err(error) = self.lower(cluster, gone).await {
                self.image().pass_over(cluster, error)?;
            }
        }
        Ok(())
    }

    /// The refcount of a host cluster.
    pub(crate) async fn refcount(&self, cluster: HostCluster) -> Result<u64> {
        self.with_counts(|meta| meta.refcounts.get(cluster)).await
    }

    /// Lowers a cluster's count; at 0 it is free.
    pub(crate) async fn lower(&self, cluster: HostCluster, by: u64) -> Result<()> {
        self.with_counts(|meta| match meta.refcounts.get(cluster)? {
            Count::Is(count) if count < by => Err(self.image().too_low(cluster, count)),
            count => Ok(count.map(|count| {
                meta.lower_count(cluster, count - by);
                meta.frees.given_back(cluster);
            })),
        })
        .await
    }

    /// Gives space back to the host. Where that is not possible the clusters are free all the same: nobody
    /// expects them to read as zeros. (A full file system may need room for it; if discards failed then, no
    /// space could ever be freed.)
    pub(crate) async fn punch(&self, clusters: Range<HostCluster>) {
        let image = self.image();
        let geometry = image.geometry();
        let at = geometry.host_offset(clusters.start).0;
        let len = clusters.cluster_count() * geometry.cluster_size();
        let file = image.top().file;
        match self.io().punch_hole(file, at, len).await {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            Err(source) if !image.has_told_of_holes.swap(true, Ordering::Relaxed) => {
                let error = image.io_error("hole punch", file, at, source);
                tracing::warn!(
                    "{error}: freed clusters can be used again, but their space is not given back to the host"
                );
            }
            Err(_) => {}
        }
    }
}

impl Image {
    /// References to a cluster that no mapping of a guest's has: what live metadata is in it is to stay.
    fn held(&self, cluster: HostCluster) -> u64 {
        let is_metadata = || self.meta.lock().territory.owner(cluster).is_some();
        u64::from(self.sieve.suspects(cluster) && is_metadata())
    }

    /// The image came with a wrong count: what it counts may be in use elsewhere, too.
    fn too_low(&self, cluster: HostCluster, value: u64) -> Error {
        Error::Refcount {
            file: Arc::clone(&self.top().name),
            at: self.geometry().host_offset(cluster).0,
            value,
            reason: "fewer than there are references to it".into(),
        }
    }

    /// Sets a cluster aside whose count cannot be read, as another one of the same page has shown: to read
    /// the page for each of them, one after the other, would take as long as the disk takes to give up,
    /// thousands of times.
    fn is_set_aside(&self, cluster: HostCluster) -> bool {
        let mut meta = self.meta.lock();
        let page = meta.refcounts.page_of(cluster);
        let is_unreadable = meta.frees.is_unreadable(page);
        if is_unreadable {
            meta.frees.set_aside(cluster, page);
        }
        is_unreadable
    }

    /// A count that cannot be read cannot be lowered: its cluster waits for another attempt. The others are
    /// not to wait with it, and no request that has been carried out is to fail by it.
    fn pass_over(&self, cluster: HostCluster, error: Error) -> Result<()> {
        if !matches!(error, Error::Io { .. }) {
            return Err(error);
        }
        {
            let mut meta = self.meta.lock();
            let page = meta.refcounts.page_of(cluster);
            meta.frees.set_aside(cluster, page);
        }
        if !self.has_told_of_counts.swap(true, Ordering::Relaxed) {
            tracing::warn!("{error}: freed clusters that are counted there cannot be used again");
        }
        Ok(())
    }

    /// Takes out what R5 allows to be given back.
    fn take_ready_frees(&self, max: usize) -> Vec<(HostCluster, u64)> {
        let mut meta = self.meta.lock();
        let is_durable = meta.graph.is_disabled(RuleName::UnmapBeforeReuse);
        let has_passed = meta.graph.is_disabled(RuleName::RequestsBeforeReuse);
        let durable_cut = if is_durable { u64::MAX } else { self.flusher.durable_cut() };
        let oldest = if has_passed { Epoch::END } else { self.epochs.oldest() };
        meta.frees.take_ready(durable_cut, oldest, max)
    }

    /// Whether a cut, or nothing at all, is between the freed clusters and those who need some. What a
    /// request in flight may still touch no cut sets free.
    pub(crate) fn can_free(&self, meta: &Meta) -> bool {
        let is_held = |due: Due| due.cut <= self.flusher.durable_cut() && due.epoch >= self.epochs.oldest();
        meta.frees.first_due().is_some_and(|due| !is_held(due))
    }
}

/// Sorted clusters as rows.
pub(crate) fn in_rows(sorted: &[HostCluster]) -> Vec<Range<HostCluster>> {
    let mut rows: Vec<Range<HostCluster>> = Vec::new();
    for &cluster in sorted {
        match rows.last_mut() {
            Some(row) if row.end == cluster => row.end = cluster + 1,
            _ => rows.push(cluster.row(1)),
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_in_a_row_are_one_range() {
        let sorted = [3, 4, 5, 9, 11, 12].map(HostCluster);
        assert_eq!(in_rows(&sorted), [(3, 3), (9, 1), (11, 2)].map(|(at, count)| HostCluster(at).row(count)));
        assert!(in_rows(&[]).is_empty());
    }
}
