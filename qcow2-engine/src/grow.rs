//! Growing the virtual disk: zeros in the rest of its last cluster, a longer L1 table, then the header that names it.
//!
//! The new table is written to clusters of its own and the header changes in one sector, so a crash
//! leaves the old size or the new one (R2). It is done on an image that nobody else uses; a served
//! image would have to be paused first.

use crate::{
    check::Owner,
    error::{Error, Result},
    image::Image,
    inspect::SECTOR,
    io::{Buf, Io, Storage, exact},
    lane::Lane,
    layer::Layer,
    open::OpenOptions,
    order::rules::{Page, Rule},
};
use qcow2_format::{Geometry, Mapping, Version, geometry::MAX_L1_BYTES, header};
use std::{path::Path, sync::Arc};

/// Grows the virtual disk of an image to `size` bytes, rounded up to a sector. The new part reads as
/// zeros. Durable on return.
///
/// # Errors
/// As for opening and writing; a smaller size, a size beyond the format's limits, a version 2 image
/// with snapshots (which could not say how long they are), an image with bitmaps that are true (and would be
/// given up), a backing file that reaches beyond the present end (and would show in the new part). The image then
/// has its old size.
pub async fn grow<I: Io>(
    io: I,
    storage: &(impl Storage + ?Sized),
    path: &Path,
    options: &OpenOptions,
    size: u64,
) -> Result<()> {
    let image = Image::open(&io, storage, path, options).await?;
    Lane::new(&image, io, 1).grow_and_close(size).await
}

/// [`grow`], by so many bytes.
///
/// # Errors
/// As for [`grow`].
pub async fn grow_by<I: Io>(
    io: I,
    storage: &(impl Storage + ?Sized),
    path: &Path,
    options: &OpenOptions,
    bytes: u64,
) -> Result<()> {
    let image = Image::open(&io, storage, path, options).await?;
    // A sum that is no number is beyond every limit.
    let size = image.virtual_size().saturating_add(bytes);
    Lane::new(&image, io, 1).grow_and_close(size).await
}

impl<I: Io> Lane<I> {
    /// [`grow`], of an image that is open. It is not used any more afterwards.
    pub(crate) async fn grow_and_close(&self, size: u64) -> Result<()> {
        let outcome = self.grow(size.checked_next_multiple_of(512).unwrap_or(u64::MAX)).await;
        let outcome = self.settle(outcome).await;
        // What was reserved goes back even if it failed.
        outcome.and(self.close().await)
    }

    async fn grow(&self, size: u64) -> Result<()> {
        let image = self.image();
        image.can_grow_to(size)?;
        if size == image.virtual_size() {
            return Ok(());
        }
        self.begin_mutation().await?;
        self.zero_tail().await?;
        let wanted = Geometry { virtual_size: size, ..*image.geometry() }.l1_entries();
        let present = image.header_u32(header::L1_SIZE_OFFSET);
        if wanted > u64::from(present) {
            self.move_l1(u64::from(present), wanted).await?;
        }
        {
            let mut meta = image.meta.lock();
            meta.header.set_u64(header::SIZE_OFFSET as usize, size);
            meta.graph.require(Rule::moved_l1_before_header());
        }
        self.write_back().await
    }

    /// Makes what the last cluster has behind the end of the disk read as zeros, durably: it may be what was there when
    /// the disk was larger.
    async fn zero_tail(&self) -> Result<()> {
        let (size, bits) = (self.image().virtual_size(), self.image().geometry().cluster_bits);
        let (at, end) = (size.next_multiple_of(SECTOR), size.next_multiple_of(1 << bits));
        if at >= end {
            return Ok(());
        }
        match self.mapping(size >> bits).await? {
            Mapping::Unallocated | Mapping::Zero { .. } => Ok(()),
            Mapping::Data { .. } | Mapping::Compressed(_) => {
                self.write_entered(at, Buf::zeroed((end - at) as usize)).await?;
                self.write_back().await
            }
        }
    }

    /// Writes a longer copy of the L1 table and has the header point to it. What lies behind its `present` entries, in the
    /// last page of it that is in memory, is not a part of it and may be anything.
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
        let at = reservation.clusters().start << geometry.cluster_bits;
        reservation.begin_writing();
        let written = exact::write_all(self.io(), layer.file, at, &table).await;
        reservation.end_writing();
        written.map_err(|source| image.io_error("write of the L1 table", layer.file, at, source))?;
        let old = layer.l1_at >> geometry.cluster_bits;
        let old_len = geometry.clusters_for(u64::from(image.header_u32(header::L1_SIZE_OFFSET)) * 8);
        let mut meta = image.meta.lock();
        meta.header.set_u32(header::L1_SIZE_OFFSET as usize, entries as u32);
        meta.header.set_u64(header::L1_TABLE_OFFSET as usize, at);
        meta.graph.require(Rule::moved_l1_before_header());
        meta.refer(reservation.clusters(), Page::Header);
        meta.territory.set_area(Owner::ActiveL1, reservation.clusters());
        meta.unmapped(old..old + old_len);
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
        // The first change makes them stale. A write has to go on all the same; this can be done by who keeps them.
        if size > self.virtual_size() && self.header.bitmaps_consistent() {
            return refuse(
                "its persistent bitmaps would become stale; `qemu-img resize` keeps them \
                 (and `qemu-img bitmap --remove` removes one)",
            );
        }
        let backing_size = self.layers.get(1).map_or(0, |layer| match layer {
            Layer::Qcow2(layer) => layer.size(),
            Layer::Raw(layer) => layer.len,
        });
        if size > self.virtual_size() && backing_size > self.virtual_size() {
            return refuse("its backing file is longer and would show in the new part");
        }
        Ok(())
    }

    /// A field of the header as it is, or is about to be, on disk.
    fn header_u32(&self, offset: u64) -> u32 {
        let meta = self.meta.lock();
        let at = offset as usize;
        u32::from_be_bytes(meta.header.0[at..at + 4].try_into().unwrap_or_default())
    }
}
