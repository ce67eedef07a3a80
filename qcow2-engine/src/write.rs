//! The life of a write: find out which clusters are already the image's own, overwrite those in
//! place, allocate the rest.
//!
//! An allocating write goes: lock the guest clusters → make the L2 table writable → reserve host
//! clusters → write payload and COW edges → publish the mapping. Until the publication nothing
//! refers to the new clusters, and a failure gives them back. Nothing here waits for a barrier: the
//! order graph remembers what has to precede what when the metadata is written back.

use crate::{
    alloc::reserve::Reservation,
    error::{Error, Result},
    image::Image,
    io::{Buf, Io, exact, whole_sectors},
    lane::Lane,
    layer::Lookup,
    resolve::{Extent, Stop, to_boundary},
};
use futures_util::future::join_all;
use qcow2_format::{Clusters, Geometry, GuestCluster, HostCluster, HostOffset, Mapping};
use smallvec::SmallVec;
use std::{ops::Range, sync::Arc};

/// A part of a write that is handled in one way. Offsets and lengths are bytes of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    at: u64,
    pub(crate) len: u64,
    pub(crate) kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The clusters are the image's own: contiguous in the file from here.
    InPlace { host: HostOffset },
    /// Some cluster has to be allocated; all lie in one L2 slice.
    Allocate,
}

/// Where one run of guest clusters is going to live.
enum Placement<'a> {
    New(Reservation<'a>),
    /// An allocated zero cluster keeps its place.
    Kept(Kept<'a>),
}

/// An allocated zero cluster that gets content.
struct Kept<'a> {
    image: &'a Image,
    cluster: HostCluster,
    /// Writes are under way; if their owner goes away they still are.
    is_writing: bool,
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        if self.is_writing {
            // Its zeros around the payload must not land on what the next one writes there.
            self.image.flusher.poison(Error::Interrupted { file: Arc::clone(&self.image.top().name) });
        }
    }
}

impl<I: Io> Lane<I> {
    /// Writes `buf` to the virtual disk at `at`. Both are multiples of 512 bytes. The data is
    /// durable after a later [`Self::flush`].
    ///
    /// # Errors
    /// Beyond the end of the disk, a read-only image, no space, damage to the mapping, a failed
    /// operation on an image file. Sectors of the range then hold their old or the new data.
    pub async fn write(&self, at: u64, buf: Buf) -> Result<()> {
        self.check_range(at, buf.len() as u64)?;
        let result = self.change(async || self.mutate(at, buf.clone()).await).await;
        self.settle(result).await
    }

    async fn mutate(&self, at: u64, buf: Buf) -> Result<()> {
        self.begin_mutation().await?;
        self.write_entered(at, buf).await
    }

    /// [`Self::write`], from inside a request.
    pub(crate) async fn write_entered(&self, at: u64, buf: Buf) -> Result<()> {
        let pieces = self.split(at, buf.len() as u64).await?;
        if let [piece] = pieces[..] {
            return self.write_piece(piece, buf).await;
        }
        let parts = pieces.into_iter().map(|piece| {
            let start = (piece.at - at) as usize;
            self.write_piece(piece, buf.slice(start..start + piece.len as usize))
        });
        join_all(parts).await.into_iter().collect()
    }

    async fn write_piece(&self, piece: Piece, buf: Buf) -> Result<()> {
        match piece.kind {
            Kind::InPlace { host } => self.write_in_place(host, &buf).await,
            Kind::Allocate => self.write_allocating(piece.at, buf).await,
        }
    }

    async fn write_in_place(&self, host: HostOffset, buf: &Buf) -> Result<()> {
        let file = self.image().top().file;
        exact::write_all(self.io(), file, host.0, buf)
            .await
            .map_err(|source| self.image().io_error("write", file, host.0, source))
    }

    /// Writes a range of which some clusters were not the image's own when it was looked at.
    async fn write_allocating(&self, at: u64, buf: Buf) -> Result<()> {
        let image = self.image();
        let clusters = touched(image.geometry(), at, buf.len() as u64);
        let mapping = image.locks.mappings.acquire(clusters).await;
        // Whoever held the range before may have gone away with its writes under way.
        image.flusher.check()?;
        // Whoever held the range before may have mapped a part of it.
        for piece in self.split(at, buf.len() as u64).await? {
            let start = (piece.at - at) as usize;
            let part = buf.slice(start..start + piece.len as usize);
            match piece.kind {
                Kind::InPlace { host } => self.write_in_place(host, &part).await?,
                Kind::Allocate => self.allocate(piece.at, part).await?,
            }
        }
        drop(mapping);
        self.relieve().await
    }

    /// Splits a write into pieces, loading the slices that say how.
    async fn split(&self, at: u64, len: u64) -> Result<SmallVec<[Piece; 2]>> {
        let mut pieces = SmallVec::new();
        loop {
            match split(self.image(), at, len, &mut pieces) {
                Ok(()) => return Ok(pieces),
                Err(Stop::Failed(error)) => return Err(error),
                Err(Stop::Miss(key)) => self.load_slice(key).await?,
            }
        }
    }

    /// Allocates, fills and publishes the clusters of a range. Its guest clusters are locked, lie in
    /// one L2 slice, and none of them can be written in place.
    async fn allocate(&self, mut at: u64, mut buf: Buf) -> Result<()> {
        let image = self.image();
        let geometry = *image.geometry();
        self.prepare_table(at).await?;
        while !buf.is_empty() {
            let wanted = touched(&geometry, at, buf.len() as u64);
            let placement = self.place(wanted.start, wanted.cluster_count()).await?;
            let clusters = wanted.start.row(placement.count());
            let end = geometry.guest_offset(clusters.end).min(at + buf.len() as u64);
            let payload = buf.slice(0..(end - at) as usize);
            buf = buf.slice(payload.len()..buf.len());
            self.fill_and_publish(clusters, placement, at, payload).await?;
            at = end;
        }
        Ok(())
    }

    /// Finds a place for the first of `count` guest clusters, and as many more as fit in a row.
    async fn place(&self, first: GuestCluster, count: u64) -> Result<Placement<'_>> {
        let geometry = self.image().geometry();
        let kept = |mapping| match mapping {
            Mapping::Zero { host: Some(host), copied: true } => Some(host),
            _ => None,
        };
        if let Some(host) = kept(self.mapping(first).await?) {
            self.image().check_target(host, geometry.guest_offset(first))?;
            let cluster = geometry.host_cluster(host);
            return Ok(Placement::Kept(Kept { image: self.image(), cluster, is_writing: false }));
        }
        let mut new = 1;
        while new < count && kept(self.mapping(first + new).await?).is_none() {
            new += 1;
        }
        self.reserve(new).await.map(Placement::New)
    }

    /// The mapping of a guest cluster in the top layer.
    pub(crate) async fn mapping(&self, cluster: GuestCluster) -> Result<Mapping> {
        let image = self.image();
        loop {
            match image.top().look_up(&image.cache, image.geometry().guest_offset(cluster))? {
                Lookup::NoTable => return Ok(Mapping::Unallocated),
                Lookup::Entry(mapping) => return Ok(mapping),
                Lookup::Miss(key) => self.load_slice(key).await?,
            }
        }
    }

    async fn fill_and_publish(
        &self,
        guest: Range<GuestCluster>,
        mut placement: Placement<'_>,
        at: u64,
        payload: Buf,
    ) -> Result<()> {
        let fresh = placement.is_fresh();
        let geometry = self.image().geometry();
        let host = geometry.host_offset(placement.first());
        let (start, end) = (geometry.guest_offset(guest.start), geometry.guest_offset(guest.end));
        let host_of = |at: u64| HostOffset(host.0 + (at - start));
        let edges = self.edges(start..end, at..at + payload.len() as u64, fresh).await?;
        placement.begin_writing();
        let written = if edges.is_empty() {
            self.write_in_place(host_of(at), &payload).await
        } else {
            let writes = edges
                .into_iter()
                .chain([(at, payload)])
                .map(|(at, bytes)| async move { self.write_in_place(host_of(at), &bytes).await });
            join_all(writes).await.into_iter().collect()
        };
        placement.end_writing();
        written?;
        self.publish_data(guest, placement).await
    }

    /// What has to be written around a payload so that whole clusters have their content: old data
    /// from wherever it is, zeros, or nothing where the place is known to read as zeros.
    async fn edges(&self, clusters: Range<u64>, payload: Range<u64>, fresh: bool) -> Result<Vec<(u64, Buf)>> {
        let mut edges = Vec::new();
        for edge in [clusters.start..payload.start, payload.end..clusters.end] {
            if edge.is_empty() {
                continue;
            }
            let inside = edge.end.min(whole_sectors(self.image().virtual_size())).saturating_sub(edge.start);
            let extents = self.resolve(edge.start, inside).await?;
            if fresh && extents.iter().all(Extent::is_zero) {
                continue;
            }
            let buf = Buf::zeroed((edge.end - edge.start) as usize);
            self.fill(&extents, &buf.slice(0..inside as usize)).await?;
            edges.push((edge.start, buf));
        }
        Ok(edges)
    }

    /// Maps guest clusters to their new place.
    async fn publish_data(&self, guest: Range<GuestCluster>, placement: Placement<'_>) -> Result<()> {
        let geometry = self.image().geometry();
        let first = placement.first();
        self.publish(guest.clone(), Some(first.row(placement.count())), |cluster| {
            let host = geometry.host_offset(first + (cluster - guest.start));
            Some(Mapping::Data { host, copied: true })
        })
        .await?;
        if let Placement::New(reservation) = placement {
            reservation.commit();
        }
        Ok(())
    }

    /// Refuses changes to an image that takes none, and does what the first change needs.
    pub(crate) async fn begin_mutation(&self) -> Result<()> {
        self.image().check_changes()?;
        self.clear_autoclear().await
    }
}

impl Image {
    /// Whether changes are taken: one decision for the long way and the short cut.
    pub(crate) fn check_changes(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly { file: Arc::clone(&self.top().name) });
        }
        self.flusher.check()?;
        self.damage.check(&self.top().name)
    }
}

impl Placement<'_> {
    fn first(&self) -> HostCluster {
        match self {
            Self::New(reservation) => reservation.clusters().start,
            Self::Kept(kept) => kept.cluster,
        }
    }

    fn count(&self) -> u64 {
        match self {
            Self::New(reservation) => reservation.clusters().cluster_count(),
            Self::Kept(_) => 1,
        }
    }

    fn is_fresh(&self) -> bool {
        matches!(self, Self::New(reservation) if reservation.is_fresh())
    }

    fn begin_writing(&mut self) {
        match self {
            Self::New(reservation) => reservation.begin_writing(),
            Self::Kept(kept) => kept.is_writing = true,
        }
    }

    fn end_writing(&mut self) {
        match self {
            Self::New(reservation) => reservation.end_writing(),
            Self::Kept(kept) => kept.is_writing = false,
        }
    }
}

/// The clusters of which a range of bytes, which is not empty, has some.
fn touched(geometry: &Geometry, at: u64, len: u64) -> Range<GuestCluster> {
    geometry.guest_cluster(at)..geometry.guest_cluster(at + len - 1) + 1
}

/// Splits a write by what has to be done, from where `pieces` ends. Pieces that are contiguous and
/// alike are one. What has been found before a miss stays, as in [`crate::resolve`].
pub(crate) fn split(image: &Image, at: u64, len: u64, pieces: &mut SmallVec<[Piece; 2]>) -> Result<(), Stop> {
    let layer = image.top();
    let mut done: u64 = pieces.iter().map(|piece| piece.len).sum();
    while done < len {
        let next = piece(image, at + done, len - done)?;
        let goes_on = pieces.last().is_some_and(|last| match (last.kind, next.kind) {
            (Kind::InPlace { host }, Kind::InPlace { host: next }) => host.0 + last.len == next.0,
            (Kind::Allocate, Kind::Allocate) => layer.slice_at(last.at).0 == layer.slice_at(next.at).0,
            _ => false,
        });
        match pieces.last_mut() {
            Some(last) if goes_on => last.len += next.len,
            _ => pieces.push(next),
        }
        done += next.len;
    }
    Ok(())
}

/// What has to be done with the part of a write that lies in its first cluster.
#[inline]
pub(crate) fn piece(image: &Image, at: u64, len: u64) -> Result<Piece, Stop> {
    let layer = image.top();
    let kind = match layer.look_up(&image.cache, at)? {
        Lookup::Miss(key) => return Err(Stop::Miss(key)),
        Lookup::Entry(Mapping::Data { host, copied: true }) => {
            image.check_target(host, at)?;
            Kind::InPlace { host: HostOffset(host.0 + layer.geometry.in_cluster(at)) }
        }
        Lookup::NoTable | Lookup::Entry(_) => Kind::Allocate,
    };
    Ok(Piece { at, len: len.min(to_boundary(at, layer.geometry.cluster_size())), kind })
}
