//! Giving back what a crash has leaked, while the image is being served.
//!
//! ```text
//! a window of clusters is watched → requests of before have ended → a cut
//!   → references are counted, as they are on disk → clusters that were not touched and are counted
//!   too often: hole punched, count lowered → the next window
//! ```
//!
//! A leak is a cluster whose count is above the number of references to it. A crash leaves them:
//! extents that were reserved ahead, clusters that waited to be freed. Nobody in memory knows of a
//! leak, so nobody changes it, and that is how it is told from a cluster that is on its way from one
//! state to another: whatever has to do with a cluster *touches* it ([`watch`]), and what was touched
//! is never judged.
//!
//! # Why it is safe
//!
//! Let a cluster be untouched when it is judged. The claim is that the references to it have been the
//! same since the window was taken up, that they are durable, and that all of them were counted.
//!
//! 1. **What gains its first reference is touched.** A new reference goes to a cluster that was counted
//!    a moment ago (`Meta::set_count` touches), or lay in a lane's extent (touched when the window is
//!    taken up, or when it comes into the extent later), or was reserved out of one before. Only a
//!    request holds a reservation, so those of before the window are published, or back in an extent
//!    or in `frees`, when all requests that were in flight have ended.
//! 2. **What loses a reference is touched**: `Meta::unmapped` is the only way, and what waits in `frees`
//!    is touched when the window is taken up. No batch of freed clusters is under way then.
//! 3. **A reference never moves** from one place to another without its cluster being touched, with one
//!    exception: the copy of an L2 table that a snapshot shares. It has the same entries; the table
//!    loses one reference, the copy gains one (both are touched), and the clusters in it are referred to
//!    by the active mapping once before and once after.
//! 4. **The cut** makes durable what had happened before it: so the disk has no reference to an
//!    untouched cluster but those that are in memory, and none that memory has not. Its barrier covers
//!    what a daemon that was killed had written, too.
//! 5. **All are counted.** What moves is read where it cannot be missed (`check/live.rs`):
//!    - *L1 table*: in memory. A table that it names was in the file, complete, before it was named; its
//!      entries of after the cut may be missing, but those clusters are touched.
//!    - *A table that is copied* while it is read: its place may be freed and used by others. Its L1
//!      entry is looked at again after the read, and the copy is read instead. In both, the entries of
//!      untouched clusters are the same. So every table of the active mapping is counted by itself,
//!      once; those of the snapshots, which nobody changes, are counted once for each L1 entry.
//!    - *A new table*: all that it refers to is touched.
//!    - *Refcount table and blocks*: the table in memory, at its present place. It moves with its
//!      entries, and a block never goes away; both places are touched when it moves, and a new block's
//!      cluster is.
//!    - *A cut under way* while a table is read: of entries that change, the clusters are touched; the
//!      others are the same bytes in both versions.
//! 6. **Nothing that has leaked is passed over for good**: a cluster that was touched, and may be counted too
//!    often all the same, has the window searched again, up to four times. That is one with fewer references than
//!    counts, unless it was free meanwhile. Counts that wait in `frees` are none, and references that have gone
//!    while they were counted have been seen or have not.
//! 7. **Nobody is given a leak** before its hole has been punched: it is counted until then.
//!
//! Whatever makes no sense ends the search for good: what cannot be decoded, a reference beyond the file, a
//! count below the references, header extensions that are not known. A copied flag would be wrong where a
//! count becomes 1 and the active mapping has the one reference; our own crashes do not leave that, and it is
//! left to `check --repair`. Damage that a request has met ends it as well: nothing is freed in a condemned
//! image.
//!
//! # Bounds
//!
//! Memory: [`MAX_WINDOW`]. Time: a step is one read of 16 KiB, or [`SETTLED`] clusters compared, with a rest
//! before each; the metadata lock is held for [`LOCKED`] counts at a time, and once in [`SETTLED`] for what of
//! these waits to be freed. Requests wait for none of the rests.

pub(crate) mod watch;

use crate::{
    alloc::refcounts::Count,
    check::{
        live::{self, Counted},
        window::{MANY, MAX_WINDOW, Window},
    },
    epoch::Epoch,
    error::Result,
    image::Image,
    io::Io,
    lane::Lane,
    meta::Meta,
    order::rules::RuleName,
    reclaim::in_rows,
};
use qcow2_format::{Clusters, HostCluster};
use std::{collections::HashMap, future::Future, ops::Range, pin::Pin, sync::atomic::Ordering};

/// Rounds over a window, at the most.
const MAX_ROUNDS: usize = 4;
/// Clusters that are compared in one step.
const SETTLED: u64 = 4096;
/// Of which so many under one hold of the metadata lock.
const LOCKED: u64 = 256;

/// The pace of work that nobody waits for.
pub trait Pace {
    /// Rests before the next step. Says whether to go on.
    fn rest(&self) -> Pin<Box<dyn Future<Output = bool> + '_>>;
}

/// What a search for leaks has given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reclaimed {
    /// Clusters that are free now.
    pub freed: u64,
    /// Clusters that are still in use, and were counted too often.
    pub lowered: u64,
    /// Clusters that stay counted too often: a repair would have to change copied flags as well, or
    /// they were changing all the time. Also those with more references than are counted, of which it
    /// is not known.
    pub left: u64,
    /// How it ended.
    pub verdict: Verdict,
}

/// How a search for leaks ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The whole image has been searched.
    Complete,
    /// It was told to stop.
    Stopped,
    /// Something makes no sense: nothing was given back from then on. In words.
    Doubt(String),
}

/// A step that did not come to its end.
enum Stop {
    Verdict(Verdict),
    Failed(crate::Error),
}

impl From<crate::Error> for Stop {
    fn from(error: crate::Error) -> Self {
        Self::Failed(error)
    }
}

/// What is not as it should be.
#[derive(Default)]
struct Found {
    /// Clusters that are counted too often, and the references that they have.
    excess: Vec<(HostCluster, u64)>,
    /// Clusters that are counted too often, or may be, and have to stay so.
    kept: u64,
    /// Clusters that are counted too often, but were touched: one that is in use, and has leaked
    /// references as well, may lose the others while it is being judged.
    touched: u64,
    /// Those that may be, for all that is known: they lost references while these were counted.
    unclear: u64,
}

/// Puts the window down when dropped.
struct Watching<'a>(&'a Image);

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.meta.lock().watch.end();
    }
}

impl<I: Io> Lane<I> {
    /// Searches the image for clusters that a crash has leaked, and gives them back, beside whatever
    /// else is going on. To be called once, from one lane, when the image has been opened.
    ///
    /// # Errors
    /// As [`Self::flush`], or a failed read; what was not given back stays a leak.
    pub async fn reclaim_leaks(&self, pace: &dyn Pace) -> Result<Reclaimed> {
        self.reclaim_leaks_by(MAX_WINDOW, pace).await
    }

    /// [`Self::reclaim_leaks`], with windows of so many clusters.
    pub(crate) async fn reclaim_leaks_by(&self, window: u64, pace: &dyn Pace) -> Result<Reclaimed> {
        let mut reclaimed = Reclaimed { freed: 0, lowered: 0, left: 0, verdict: Verdict::Complete };
        match self.search(window, pace, &mut reclaimed).await {
            Ok(()) => {}
            Err(Stop::Verdict(verdict)) => reclaimed.verdict = verdict,
            Err(Stop::Failed(error)) => return Err(error),
        }
        if reclaimed.verdict != Verdict::Stopped {
            self.image().is_searched.store(true, Ordering::Relaxed);
        }
        Ok(reclaimed)
    }

    async fn search(&self, size: u64, pace: &dyn Pace, reclaimed: &mut Reclaimed) -> Result<(), Stop> {
        let image = self.image();
        if image.read_only {
            return Ok(());
        }
        if let Some(reason) = image.may_hide_references() {
            return Err(doubt(reason));
        }
        image.undamaged()?;
        let _searching = image.locks.searching.acquire().await;
        for window in in_parts(&(HostCluster(0)..image.counted_end()), size) {
            if !image.has_block_in(&window) {
                continue;
            }
            rest(pace).await?;
            for round in 1.. {
                let found = self.search_window(window.clone(), pace, reclaimed).await?;
                if found.touched + found.unclear == 0 || round == MAX_ROUNDS {
                    reclaimed.left += found.kept + found.touched;
                    break;
                }
                // What waits to be freed would be touched again.
                self.maintain().await?;
            }
        }
        Ok(())
    }

    async fn search_window(
        &self,
        clusters: Range<HostCluster>,
        pace: &dyn Pace,
        reclaimed: &mut Reclaimed,
    ) -> Result<Found, Stop> {
        let image = self.image();
        let (_watching, epoch) = {
            let _no_batch = image.locks.reclaiming.acquire().await;
            image.watch(clusters.clone())
        };
        while !image.epochs.has_passed(epoch) && !image.is_disabled(RuleName::RequestsBeforeSearch) {
            rest(pace).await?;
        }
        image.meta.lock().watch.begin_counting();
        if !image.is_disabled(RuleName::CutBeforeSearch) {
            self.write_back().await?;
        }
        let window = Window::new(clusters.clone());
        let window = match live::count(self.io(), image, pace, window).await {
            Counted::All(window) => window,
            Counted::Stopped => return Err(Stop::Verdict(Verdict::Stopped)),
            Counted::Doubt(reason) => return Err(doubt(&reason)),
        };
        image.meta.lock().watch.end_counting();
        let mut found = Found::default();
        for row in in_parts(&clusters, SETTLED) {
            rest(pace).await?;
            self.settle_row(row, &window, &mut found, reclaimed).await?;
        }
        Ok(found)
    }

    /// Compares counts with references, and lowers those that are too high.
    async fn settle_row(
        &self,
        clusters: Range<HostCluster>,
        window: &Window,
        found: &mut Found,
        reclaimed: &mut Reclaimed,
    ) -> Result<(), Stop> {
        // What is in a batch of freed clusters was touched before; here it is in nobody's way.
        let _no_batch = self.image().locks.reclaiming.acquire().await;
        let going = self.image().going(&clusters);
        for some in in_parts(&clusters, LOCKED) {
            self.compare(some, window, &going, found).await?;
        }
        let excess = std::mem::take(&mut found.excess);
        let unused: Vec<_> =
            excess.iter().filter(|(_, references)| *references == 0).map(|(cluster, _)| *cluster).collect();
        for row in in_rows(&unused) {
            self.image().undamaged()?;
            self.punch(row).await;
        }
        for (cluster, references) in excess {
            self.image().undamaged()?;
            match self.lower_to(cluster, references).await? {
                false => found.touched += 1,
                true if references == 0 => reclaimed.freed += 1,
                true => reclaimed.lowered += 1,
            }
        }
        Ok(())
    }

    /// Finds the untouched clusters that are counted too often.
    async fn compare(
        &self,
        clusters: Range<HostCluster>,
        window: &Window,
        going: &Going,
        found: &mut Found,
    ) -> Result<(), Stop> {
        let Range { start: mut next, end } = clusters;
        self.with_counts(|meta| {
            while next < end {
                match meta.judge(next, window, going)? {
                    Count::Needs(page) => return Ok(Count::Needs(page)),
                    Count::Is(Judged::InOrder) => {}
                    Count::Is(Judged::Excess(references)) => found.excess.push((next, references)),
                    Count::Is(Judged::HasFlag | Judged::Uncounted) => found.kept += 1,
                    Count::Is(Judged::Touched) => found.touched += 1,
                    Count::Is(Judged::Unclear) => found.unclear += 1,
                    Count::Is(Judged::Lacking { count, references }) => {
                        let at = meta.geometry.host_offset(next).0;
                        return Err(doubt(&format!(
                            "the cluster at {at:#x} has refcount {count} and {references} references"
                        )));
                    }
                }
                next = next + 1;
            }
            Ok(Count::Is(()))
        })
        .await
    }

    /// Lowers a count, unless the cluster has been touched meanwhile. Returns whether it has.
    async fn lower_to(&self, cluster: HostCluster, references: u64) -> Result<bool> {
        self.with_counts(|meta| {
            if meta.watch.is_touched(cluster) {
                return Ok(Count::Is(false));
            }
            Ok(meta.refcounts.get(cluster)?.map(|_| {
                meta.lower_count(cluster, references);
                true
            }))
        })
        .await
    }
}

/// What is to be done about a cluster.
enum Judged {
    /// Nothing: it is counted as often as it is referred to.
    InOrder,
    /// Nothing now: it was touched. But it is counted too often, and may have been so before.
    Touched,
    /// The same, but whether it is counted too often is not known either.
    Unclear,
    /// It is counted too often; so many references are right.
    Excess(u64),
    /// It is counted too often, but the entry that refers to it would have to change as well.
    HasFlag,
    /// There are more references than are counted, so that it cannot be told.
    Uncounted,
    /// It is not counted often enough.
    Lacking { count: u64, references: u64 },
}

impl Meta {
    fn judge(&mut self, cluster: HostCluster, window: &Window, going: &Going) -> Result<Count<Judged>> {
        let count = match self.refcounts.get(cluster)? {
            Count::Needs(page) => return Ok(Count::Needs(page)),
            Count::Is(count) => count,
        };
        if self.watch.is_touched(cluster) {
            // It would be no better known in another round.
            let Some(seen) = window.references(cluster) else { return Ok(Count::Is(Judged::Uncounted)) };
            // Some of those that were seen are gone; of those that count some are known to wait. What was free
            // meanwhile had not leaked.
            let gone = self.watch.gone(cluster);
            let most = seen.saturating_sub(gone.afterwards);
            let least = most.saturating_sub(gone.meanwhile);
            let kept = count.saturating_sub(going.get(&cluster).copied().unwrap_or(0));
            return Ok(Count::Is(match self.watch.is_fresh(cluster) {
                false if most < kept => Judged::Touched,
                false if least < kept => Judged::Unclear,
                _ => Judged::InOrder,
            }));
        }
        let many = u64::from(MANY);
        Ok(Count::Is(match window.references(cluster) {
            None if count < many => Judged::Lacking { count, references: many },
            None => Judged::Uncounted,
            Some(references) if references > count => Judged::Lacking { count, references },
            Some(references) if references == count => Judged::InOrder,
            Some(1) if window.is_active(cluster) => Judged::HasFlag,
            Some(references) => {
                let is_metadata = self.territory.owner(cluster).is_some();
                if is_metadata && references == 0 { Judged::InOrder } else { Judged::Excess(references) }
            }
        }))
    }
}

/// References that are on their way back: cluster → how many.
type Going = HashMap<HostCluster, u64>;

impl Image {
    /// What waits to be freed of these clusters.
    fn going(&self, clusters: &Range<HostCluster>) -> Going {
        let mut going = Going::new();
        let meta = self.meta.lock();
        for (row, references) in meta.frees.within(clusters.clone()) {
            going.extend(row.each().map(|cluster| (cluster, references)));
        }
        going
    }

    /// Takes a window up. What is on its way is touched; nothing else has been.
    fn watch(&self, window: Range<HostCluster>) -> (Watching<'_>, Epoch) {
        let mut meta = self.meta.lock();
        let Meta { watch, frees, lanes, .. } = &mut *meta;
        watch.begin(window.clone());
        frees.within(window).for_each(|(row, _)| watch.going(row));
        lanes.iter().filter_map(|lane| lane.clusters()).for_each(|extent| watch.reserved(extent));
        (Watching(self), self.epochs.advance())
    }

    /// A request may meet damage while the search is under way.
    fn undamaged(&self) -> Result<(), Stop> {
        self.damage.check(&self.top().name).map_err(|damage| doubt(&damage.to_string()))
    }

    /// Why clusters may be in use though nothing that is known here refers to them.
    fn may_hide_references(&self) -> Option<&'static str> {
        // The search might see it otherwise: it has a longer file before it.
        if self.has_lost_snapshots {
            return Some("there are snapshots whose L1 tables cannot be found");
        }
        let unknown_bits = self.header.autoclear & !qcow2_format::header::KNOWN_AUTOCLEAR != 0;
        (unknown_bits || !self.header.unknown_extensions.is_empty()).then_some(
            "it has header extensions that are not known here, which may have clusters of their own",
        )
    }

    /// Clusters from here on have no count.
    fn counted_end(&self) -> HostCluster {
        let meta = self.meta.lock();
        meta.refcounts.first_in_block(meta.refcounts.blocks_end())
    }

    fn has_block_in(&self, clusters: &Range<HostCluster>) -> bool {
        let meta = self.meta.lock();
        meta.refcounts.table_entries(meta.refcounts.blocks_of(clusters)).iter().any(|&entry| entry != 0)
    }
}

/// Clusters in parts of so many, the last one of as many as are left.
fn in_parts(clusters: &Range<HostCluster>, size: u64) -> impl Iterator<Item = Range<HostCluster>> + use<> {
    let Range { start, end } = *clusters;
    (start.0..end.0)
        .step_by(size as usize)
        .map(move |first| HostCluster(first)..end.min(HostCluster(first) + size))
}

async fn rest(pace: &dyn Pace) -> Result<(), Stop> {
    if pace.rest().await { Ok(()) } else { Err(Stop::Verdict(Verdict::Stopped)) }
}

fn doubt(reason: &str) -> Stop {
    Stop::Verdict(Verdict::Doubt(reason.to_owned()))
}
