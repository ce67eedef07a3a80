//! Extents for the lanes, reservations for the requests.
//!
//! Each lane (a queue) allocates from an extent of its own, which was counted ahead as a whole: the
//! clusters of a write then cost neither a refcount update nor a lock that another queue holds for
//! long, and they lie in a row. What a clean close finds unused is given back; a crash leaves it
//! counted, as a leak.

use super::space::{Next, Run};
use crate::{
    error::{ErrorKind, Result},
    image::Image,
    io::{Buf, Io, SECTOR, exact},
    lane::Lane,
    meta::Meta,
};
use qcow2_format::{Clusters, HostCluster};
use std::{io::ErrorKind as IoKind, ops::Range};

/// The extent that a lane allocates from.
#[derive(Default)]
pub(crate) struct LaneSpace {
    extent: Option<Run>,
}

/// Clusters that a request has taken and nothing refers to yet. Dropping it gives them back.
pub(crate) struct Reservation<'a> {
    image: &'a Image,
    lane: usize,
    run: Run,
    stage: Stage,
}

/// What a reservation's clusters have been through.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Untouched,
    /// Writes are under way; if their owner goes away they still are.
    Writing,
    /// Writes have ended, one way or the other.
    Written,
    Committed,
}

impl LaneSpace {
    fn take(&mut self, max: u64) -> Option<Run> {
        let extent = self.extent.as_mut()?;
        let start = extent.clusters.start;
        let end = extent.clusters.end.min(start + max);
        let run = Run { clusters: start..end, fresh: extent.fresh };
        extent.clusters.start = end;
        if extent.clusters.is_empty() {
            self.extent = None;
        }
        Some(run)
    }

    /// Puts an untouched run back, if it lies right before the rest of the extent.
    fn put_back(&mut self, run: &Run) -> bool {
        match &mut self.extent {
            Some(extent) if extent.clusters.start == run.clusters.end && extent.fresh == run.fresh => {
                extent.clusters.start = run.clusters.start;
                true
            }
            Some(_) => false,
            None => {
                self.extent = Some(run.clone());
                true
            }
        }
    }

    /// Takes the whole rest out, to be given back at close.
    pub(crate) fn take_rest(&mut self) -> Option<Run> {
        self.extent.take()
    }

    /// What is left of the extent.
    pub(crate) fn clusters(&self) -> Option<Range<HostCluster>> {
        self.extent.as_ref().map(|run| run.clusters.clone())
    }
}

impl Meta {
    /// A lane has a new extent. While it was being found, another request may have put back what it had taken
    /// of the old one and not used.
    fn fill_lane(&mut self, lane: usize, run: Run) {
        self.watch.reserved(run.clusters.clone());
        if let Some(rest) = self.lanes[lane].extent.replace(run) {
            self.unmapped(rest.clusters);
        }
    }

    /// Takes of the first extent that a lane has: the file cannot grow, and while another lane has room, so
    /// has the image.
    fn take_from_any(&mut self, max: u64) -> Option<Run> {
        self.lanes.iter_mut().find_map(|lane| lane.take(max))
    }

    /// An untouched run goes back to its lane's extent, or the way of freed clusters.
    fn put_back(&mut self, lane: usize, run: &Run) {
        self.watch.reserved(run.clusters.clone());
        if !self.lanes[lane].put_back(run) {
            self.unmapped(run.clusters.clone());
        }
    }
}

impl Reservation<'_> {
    pub(crate) fn clusters(&self) -> Range<HostCluster> {
        self.run.clusters.clone()
    }

    /// Whether the clusters read as zeros without having been written.
    pub(crate) fn is_fresh(&self) -> bool {
        self.run.fresh
    }

    /// From now on the clusters' content is not known.
    pub(crate) fn begin_writing(&mut self) {
        self.stage = Stage::Writing;
    }

    /// No write to the clusters is under way any more.
    pub(crate) fn end_writing(&mut self) {
        self.stage = Stage::Written;
    }

    /// Something refers to the clusters now: they are no longer the reservation's.
    pub(crate) fn commit(mut self) {
        self.stage = Stage::Committed;
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        match self.stage {
            Stage::Committed => {}
            // The kernel may still write to them. Leaked, until the image is opened again.
            Stage::Writing => {
                tracing::warn!(clusters = ?self.run.clusters, "clusters of an abandoned write are leaked");
                self.image.meta.lock().watch.go_blind();
            }
            Stage::Written => self.image.meta.lock().unmapped(self.run.clusters.clone()),
            Stage::Untouched => self.image.meta.lock().put_back(self.lane, &self.run),
        }
    }
}

impl<I: Io> Lane<I> {
    /// Reserves up to `max` clusters in a row, one at least. The file extends over them.
    pub(crate) async fn reserve(&self, max: u64) -> Result<Reservation<'_>> {
        let image = self.image();
        let lane = self.number();
        let run = loop {
            let taken = image.meta.lock().lanes[lane].take(max);
            if let Some(run) = taken {
                break run;
            }
            let _refill = image.locks.refills.acquire(lane as u64..lane as u64 + 1).await;
            if image.meta.lock().lanes[lane].extent.is_some() {
                continue;
            }
            if let Some(run) = self.refill(max).await? {
                break run;
            }
        };
        Ok(Reservation { image, lane, run, stage: Stage::Untouched })
    }

    /// Gets the lane an extent; or, where there is none to be had, up to `max` clusters of another lane's.
    ///
    /// One lane at a time, from the claim until the file reaches over what is left of it: of a full host's room
    /// nothing is then hidden under a claim that is about to be given up.
    async fn refill(&self, max: u64) -> Result<Option<Run>> {
        self.relieve().await?;
        let image = self.image();
        let _growing = image.locks.growth.acquire().await;
        let mut has_freed = false;
        loop {
            match self.find_extent(max).await {
                Ok(run) => {
                    image.meta.lock().fill_lane(self.number(), run);
                    return Ok(None);
                }
                Err(error) if error.is_full() => {
                    if let Some(run) = image.meta.lock().take_from_any(max) {
                        return Ok(Some(run));
                    }
                    if has_freed || !self.give_back_now().await? {
                        return Err(error);
                    }
                    has_freed = true;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Reserves exactly `count` clusters in a row, for a table.
    pub(crate) async fn reserve_row(&self, count: u64) -> Result<Reservation<'_>> {
        let image = self.image();
        let _growing = image.locks.growth.acquire().await;
        let mut from = HostCluster(0);
        let run = self.take(|meta| meta.next_row(count, &mut from)).await?;
        Ok(Reservation { image, lane: self.number(), run, stage: Stage::Written })
    }

    /// Asks the allocator, and does what it needs, until it has a run.
    async fn take(&self, mut ask: impl FnMut(&mut Meta) -> Result<Next>) -> Result<Run> {
        loop {
            let next = ask(&mut self.image().meta.lock())?;
            match next {
                Next::Run(run) => return Ok(run),
                Next::Needs(page) => self.load_refcount_page(page).await?,
                Next::NeedsRoom(clusters) => self.make_room(clusters).await?,
                Next::NeedsCut => self.write_back().await?,
            }
        }
    }

    /// Finds, counts and allocates an extent, or as much of it as `max` asks for if the host has
    /// no room for a whole one.
    async fn find_extent(&self, max: u64) -> Result<Run> {
        let image = self.image();
        let mut run = self.take(|meta| meta.next_run(image.extent_clusters)).await?;
        loop {
            let Range { start, end } = run.clusters;
            let Err(error) = self.extend_file(&run.clusters).await else { return Ok(run) };
            let kept = match error.kind() {
                ErrorKind::NoSpace if start + max < end => start + max,
                _ => start,
            };
            self.give_up(Run { clusters: kept..end, ..run }).await;
            if kept == start {
                return Err(error);
            }
            run.clusters.end = kept;
        }
    }

    /// The last part of a run that the file does not reach was never anybody's: it is free at once. Had it to
    /// wait as freed clusters do, the next request would look for its place behind it, where there is even
    /// less room.
    pub(crate) async fn give_up(&self, run: Run) {
        for cluster in run.clusters.clone().each().rev() {
            {
                // While it is counted. Afterwards somebody may have been given it, and have written to it.
                let space = &mut self.image().meta.lock().space;
                if run.fresh && space.fresh_from == cluster + 1 {
                    space.fresh_from = cluster;
                }
            }
            if self.lower(cluster, 1).await.is_err() {
                self.image().meta.lock().unmapped(run.clusters.start..cluster + 1);
                return;
            }
        }
    }

    /// Makes the file reach over clusters, and have space for those of them that it came with, too. (Where the
    /// host cannot allocate ahead they stay as they are.)
    async fn make_room(&self, clusters: Range<HostCluster>) -> Result<()> {
        self.extend_file(&clusters).await?;
        let image = self.image();
        let found_end = image.meta.lock().space.found_end;
        let at = image.geometry().host_offset(clusters.start).0;
        let end = image.geometry().host_offset(clusters.end.min(found_end)).0;
        if at < end {
            let file = image.top().file;
            match self.io().allocate(file, at, end - at).await {
                Err(error) if error.kind() != IoKind::Unsupported => {
                    return Err(image.io_error("allocation", file, at, error));
                }
                _ => {}
            }
        }
        image.meta.lock().space.room = clusters;
        Ok(())
    }

    /// Makes the file reach the end of the clusters, with space allocated where the host can. The caller holds
    /// `growth`.
    async fn extend_file(&self, clusters: &Range<HostCluster>) -> Result<()> {
        let image = self.image();
        let geometry = image.geometry();
        let (at, claimed) = {
            let space = &image.meta.lock().space;
            (space.file_end, geometry.host_offset(space.fresh_from).0)
        };
        let (start, end) = (geometry.host_offset(clusters.start).0, geometry.host_offset(clusters.end).0);
        if end <= at {
            return Ok(());
        }
        // Up to here there are clusters already: the last one may be cut short by the end of the file.
        let taken = geometry.host_offset(HostCluster(geometry.clusters_for(at))).0.min(start);
        // What was claimed once and not reached, as its owner was gone or its count could not be lowered, is
        // reached now: whoever is given it later finds that the file is long enough.
        let behind_claims = start.max(claimed).max(at).min(end);
        for part in [at..claimed.min(end), behind_claims..end] {
            if !part.is_empty() {
                self.allocate_space(part, taken).await?;
            }
        }
        image.meta.lock().space.file_end = end;
        image.sieve.set_end(clusters.end);
        Ok(())
    }

    /// Allocates space for a part of the file that ends behind its present end. What is in the file may lie
    /// before `taken`.
    async fn allocate_space(&self, part: Range<u64>, taken: u64) -> Result<()> {
        let image = self.image();
        let file = image.top().file;
        let grown = match self.io().allocate(file, part.start, part.end - part.start).await {
            // Not every file system can allocate ahead; all can be extended. Not by a new length: should the
            // file be longer than we know, it would be cut. And not inside somebody's cluster.
            Err(error) if error.kind() == IoKind::Unsupported && part.end <= taken => Ok(()),
            Err(error) if error.kind() == IoKind::Unsupported => {
                exact::write_all(self.io(), file, part.end - SECTOR, &Buf::zeroed(SECTOR as usize)).await
            }
            Err(error) => {
                // Of what it was to be, the file may have become a part.
                image.meta.lock().space.may_be_longer = true;
                Err(error)
            }
            Ok(()) => Ok(()),
        };
        grown.map_err(|source| image.io_error("allocation", file, part.start, source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{OpenOptions, create, exec::run_at_once, io::mem::MemFiles};
    use qcow2_format::CreateOptions;
    use std::{path::Path, sync::Arc};

    fn new_image(files: &MemFiles) -> Arc<Image> {
        let path = Path::new("image");
        let options = CreateOptions { virtual_size: 1 << 20, cluster_bits: 12, ..CreateOptions::default() };
        files.put("image", Vec::new());
        run_at_once(create::create(files, files, path, &options, crate::Preallocation::Off)).unwrap();
        let options = OpenOptions { extent_bytes: 4 << 12, ..OpenOptions::default() };
        run_at_once(Image::open(files, files, path, &options)).unwrap()
    }

    /// What is said never to have been written is not zeroed when it is used.
    #[test]
    fn only_what_was_never_written_is_so_again_when_it_is_given_up() {
        let files = MemFiles::default();
        let image = new_image(&files);
        let lane = Lane::new(&image, files, 1);
        for fresh in [true, false] {
            let run = run_at_once(lane.take(|meta| meta.next_run(4))).unwrap();
            let Range { start, end } = run.clusters;
            assert!(run.fresh && image.meta.lock().space.fresh_from == end);
            run_at_once(lane.give_up(Run { fresh, ..run }));
            assert_eq!(image.meta.lock().space.fresh_from, if fresh { start } else { end });
            assert_eq!(run_at_once(lane.refcount(start)).unwrap(), 0, "it is free");
        }
    }

    /// A request that fails puts its clusters back while another one looks for the lane's next extent.
    #[test]
    fn what_was_put_back_is_not_lost_when_the_next_extent_comes() {
        let (files, path) = (MemFiles::default(), Path::new("image"));
        let image = new_image(&files);
        let lane = Lane::new(&image, files.clone(), 2);
        let all = run_at_once(lane.reserve(4)).unwrap();
        let next = run_at_once(lane.find_extent(1)).unwrap();
        drop(all);
        image.meta.lock().fill_lane(lane.number(), next);
        run_at_once(lane.close()).unwrap();
        let report = run_at_once(crate::check(&files, &files, path, crate::CheckOptions::default())).unwrap();
        assert_eq!(report.found.leaks, 0);
    }
}
