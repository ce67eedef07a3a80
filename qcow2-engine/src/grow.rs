//! Growing the virtual disk: a longer L1 table, zeros in the new part, then the header that says its size.
//!
//! The new table is written to clusters of its own and the header changes in one sector, so a crash leaves
//! the old size or the new one (R2). What the new part has to have is written behind the end of the disk,
//! where nobody looks: for that the image is opened once more, as one that has its new size. It is done on an
//! image that nobody else uses; a served image would have to be paused first.

use crate::{
    discard::ZeroMode,
    error::{Error, Result},
    image::Image,
    io::{Access, Buf, FileId, Io, SECTOR, Storage, exact, whole_sectors},
    lane::Lane,
    layer::Layer,
    open::OpenOptions,
    order::rules::{Page, Rule},
    owner::Owner,
};
use parking_lot::Mutex;
use qcow2_format::{Geometry, Version, geometry::MAX_L1_BYTES, header};
use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Grows the virtual disk of an image to `size` bytes, rounded up to a sector. The new part reads as
/// zeros. Durable on return.
///
/// # Errors
/// As for opening and writing; a smaller size, a size beyond the format's limits, a version 2 image with
/// snapshots (which could not say how long they are), an image with bitmaps that are true (and would be given
/// up), a version 2 image whose backing file reaches beyond the present end (and would show in the new part).
/// The image then has its old size.
pub async fn grow<I: Io + Clone>(
    io: I,
    storage: &(impl Storage + ?Sized),
    path: &Path,
    options: &OpenOptions,
    size: u64,
) -> Result<()> {
    grow_to(&io, storage, path, options, |_| size, |_| ()).await
}

/// [`grow`], by so many bytes.
///
/// # Errors
/// As for [`grow`].
pub async fn grow_by<I: Io + Clone>(
    io: I,
    storage: &(impl Storage + ?Sized),
    path: &Path,
    options: &OpenOptions,
    bytes: u64,
) -> Result<()> {
    // A sum that is no number is beyond every limit.
    grow_to(&io, storage, path, options, |present| present.saturating_add(bytes), |_| ()).await
}

/// [`grow`], to a size that follows from the present one. `prepare` is shown the image whenever it has been
/// opened.
pub(crate) async fn grow_to<I: Io + Clone>(
    io: &I,
    storage: &(impl Storage + ?Sized),
    path: &Path,
    options: &OpenOptions,
    size: impl FnOnce(u64) -> u64,
    prepare: impl Fn(&Image),
) -> Result<()> {
    let storage = OpenOnce { storage, open: Mutex::default() };
    let image = Image::open(io, &storage, path, options).await?;
    prepare(&image);
    let present = image.virtual_size();
    let size = size(present).checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
    let lane = Lane::new(&image, io.clone(), 1);
    let outcome = lane.lengthen_l1(size).await;
    lane.end_with(outcome).await?;
    if size == present {
        return Ok(());
    }
    let image = Image::open_as(io, &storage, path, options, Some(size)).await?;
    prepare(&image);
    let lane = Lane::new(&image, io.clone(), 1);
    let outcome = lane.take_new_part(present).await;
    lane.end_with(outcome).await
}

/// Files that are open stay so: a second lock on one would be in the way of the first.
struct OpenOnce<'a, S: ?Sized> {
    storage: &'a S,
    open: Mutex<Vec<(PathBuf, Access, FileId)>>,
}

impl<S: Storage + ?Sized> Storage for OpenOnce<'_, S> {
    fn open(&self, path: &Path, access: Access) -> io::Result<FileId> {
        let mut open = self.open.lock();
        let known = open.iter().find(|(other, kind, _)| (&**other, *kind) == (path, access));
        if let Some((_, _, file)) = known {
            return Ok(*file);
        }
        let file = self.storage.open(path, access)?;
        open.push((path.to_owned(), access, file));
        Ok(file)
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        self.storage.len(file)
    }

    fn is_hole(&self, file: FileId, at: u64, len: u64) -> bool {
        self.storage.is_hole(file, at, len)
    }
}

impl<I: Io> Lane<I> {
    /// Ends the work on an image, which is not used any more afterwards.
    async fn end_with(&self, outcome: Result<()>) -> Result<()> {
        let outcome = self.settle(outcome).await;
        // What was reserved goes back even if it failed.
        outcome.and(self.close().await)
    }

    /// The first change makes bitmaps stale, and none is made as long as the disk. A write has to go on all the
    /// same; this can be done by who keeps them.
    async fn refuse_to_lose_bitmaps(&self, size: u64) -> Result<()> {
        let image = self.image();
        if size == image.virtual_size() || !self.has_true_bitmaps().await {
            return Ok(());
        }
        let reason = "its persistent bitmaps would become stale; `qemu-img resize` keeps them (and `qemu-img bitmap \
                      --remove` removes one)";
        Err(Error::NotSupported { file: Arc::clone(&image.top().name), reason })
    }

    /// Gives the image an L1 table that is long enough for another size, which it does not have yet.
    async fn lengthen_l1(&self, size: u64) -> Result<()> {
        let image = self.image();
        image.can_grow_to(size)?;
        self.refuse_to_lose_bitmaps(size).await?;
        let wanted = Geometry { virtual_size: size, ..*image.geometry() }.l1_entries();
        let present = image.header_u32(header::L1_SIZE_OFFSET);
        if wanted <= u64::from(present) {
            return Ok(());
        }
        self.begin_mutation().await?;
        self.move_l1(u64::from(present), wanted).await?;
        self.write_back().await
    }

    /// Makes what an image that ended at `present` has behind it read as zeros, and then has its header say
    /// the size as which it was opened.
    async fn take_new_part(&self, present: u64) -> Result<()> {
        let image = self.image();
        self.begin_mutation().await?;
        let old = image.old_content(present);
        for part in &old {
            self.write_zeroes_in_parts(part.start, part.end - part.start, ZeroMode::Unmap).await?;
        }
        if !old.is_empty() {
            self.write_back().await?;
        }
        {
            let mut meta = image.meta.lock();
            meta.header.set_u64(header::SIZE_OFFSET as usize, image.virtual_size());
            meta.graph.touch(Page::Header);
        }
        self.write_back().await
    }

    /// Writes a longer copy of the L1 table and has the header point to it. What lies behind its `present`
    /// entries, in the last page of it that is in memory, is not a part of it and may be anything.
    async fn move_l1(&self, present: u64, entries: u64) -> Result<()> {
        let image = self.image();
        let (geometry, layer) = (image.geometry(), image.top());
        let bytes = (entries * 8).next_multiple_of(geometry.cluster_size());
        let clusters = geometry.clusters_for(bytes);
        let mut reservation = self.reserve_row(clusters).await?;
        let table = Buf::zeroed(bytes as usize);
        for (index, entry) in layer.l1.used().take_while(|(index, _)| *index < present) {
            table.copy_from(index as usize * 8, &entry.to_be_bytes());
        }
        let at = geometry.host_offset(reservation.clusters().start).0;
        reservation.begin_writing();
        let written = exact::write_all(self.io(), layer.file, at, &table).await;
        reservation.end_writing();
        written.map_err(|source| image.io_error("write of the L1 table", layer.file, at, source))?;
        let old = geometry.host_cluster(layer.l1_at);
        let old_len = geometry.clusters_for(u64::from(image.header_u32(header::L1_SIZE_OFFSET)) * 8);
        let mut meta = image.meta.lock();
        meta.header.set_u32(header::L1_SIZE_OFFSET as usize, entries as u32);
        meta.header.set_u64(header::L1_TABLE_OFFSET as usize, at);
        meta.graph.require(Rule::moved_l1_before_header());
        meta.refer(reservation.clusters(), Page::Header);
        meta.territory.set_area(Owner::ActiveL1, reservation.clusters());
        meta.unmapped(old.row(old_len));
        drop(meta);
        reservation.commit();
        Ok(())
    }
}

impl Image {
    fn can_grow_to(&self, size: u64) -> Result<()> {
        let file = Arc::clone(&self.top().name);
        let refuse = |reason| Err(Error::NotSupported { file: Arc::clone(&file), reason });
        let geometry = Geometry { virtual_size: size, ..*self.geometry() };
        if size < self.virtual_size() {
            return refuse("an image cannot be made smaller");
        }
        if i64::try_from(size).is_err() || geometry.l1_entries() * 8 > MAX_L1_BYTES {
            return Err(Error::TooLarge {
                file,
                reason: "the L1 table would be too large for this cluster size",
            });
        }
        if geometry.version == Version::V2 && self.header_u32(header::SNAPSHOT_COUNT_OFFSET) > 0 {
            return refuse("a version 2 image with snapshots cannot be resized");
        }
        let last = self.virtual_size().next_multiple_of(geometry.cluster_size());
        if !self.has_zero_clusters() && self.backing_size().min(size) > last {
            return refuse(
                "its backing file is longer and would show in the new part, and version 2 has no zero clusters \
                 (`qemu-img amend -o compat=1.1` makes it a version 3 image)",
            );
        }
        Ok(())
    }

    /// What may show behind the end at which the disk was: the rest of its last cluster, which may have what
    /// was there when the disk was larger, what a backing file has there, and what L2 tables cover that are
    /// there already. Whoever made the disk smaller may have left them, and a snapshot that QEMU has gone back
    /// to has the machine's memory there.
    fn old_content(&self, end: u64) -> Vec<Range<u64>> {
        let cluster = self.geometry().cluster_size();
        let whole = |end: u64| end.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
        let next = whole_sectors(end)..whole(end).max(whole(self.backing_size())).min(self.virtual_size());
        let (covered, from) = (self.geometry().l2_coverage_bytes(), next.end);
        let tables =
            self.top().l1.used().map(|(index, _)| {
                (index * covered).max(from)..((index + 1) * covered).min(self.virtual_size())
            });
        [next].into_iter().chain(tables).filter(|part| !part.is_empty()).collect()
    }

    /// How far the backing file reaches.
    fn backing_size(&self) -> u64 {
        self.layers.get(1).map_or(0, |layer| match layer {
            Layer::Qcow2(layer) => layer.size(),
            Layer::Raw(layer) => layer.len,
        })
    }

    /// A field of the header as it is, or is about to be, on disk.
    fn header_u32(&self, offset: u64) -> u32 {
        self.meta.lock().header.u32(offset as usize)
    }
}
