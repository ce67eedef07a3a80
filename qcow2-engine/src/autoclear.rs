//! Before the first change of an image: what vouches for its content is told that it changes.
//!
//! Bitmaps that are to record every write are marked "in use" where they are, as not saved correctly: QEMU then
//! neither trusts nor loses them, and their clusters stay accounted for. Bitmaps that record nothing stay true. All
//! other autoclear bits are cleared, as the format asks of whoever does not know what they vouch for; so is that of
//! the bitmaps where their directory is damaged.

use crate::{
    error::{Error, Result},
    io::{Buf, Io, SECTOR, exact, whole_sectors},
    lane::Lane,
    order::rules::Page,
};
use qcow2_format::{
    Header, Version,
    bitmap::{self, Bitmap},
    extension::BitmapsExtension,
    header,
};
use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// Whether it has been done.
pub(crate) struct Autoclear(AtomicBool);

impl Autoclear {
    /// There is nothing to do where no bit is set.
    pub(crate) fn of(header: &Header) -> Self {
        Self(AtomicBool::new(header.version == Version::V2 || header.stale_autoclear(0) == 0))
    }

    /// Whether there is nothing to do any more.
    pub(crate) fn is_clear(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl<I: Io> Lane<I> {
    /// Does it, durably.
    pub(crate) async fn clear_autoclear(&self) -> Result<()> {
        let image = self.image();
        if image.autoclear.is_clear() {
            return Ok(());
        }
        let _clearing = image.locks.clearing.acquire().await;
        if image.autoclear.is_clear() {
            return Ok(());
        }
        let kept = match self.mark_bitmaps().await {
            Ok(true) => header::BITMAPS,
            Ok(false) => 0,
            Err(error @ Error::Format { .. }) => {
                tracing::warn!("the bitmaps cannot be marked as stale, so all of them are given up: {error}");
                0
            }
            // What cannot be read or written at the moment is not lost.
            Err(error) => return Err(error),
        };
        {
            let mut meta = image.meta.lock();
            meta.header.set_u64(header::AUTOCLEAR_OFFSET as usize, image.header.autoclear & kept);
            meta.graph.touch(Page::Header);
        }
        // As a cut: a second barrier beside one might be told of a loss in its place.
        self.write_back().await?;
        image.autoclear.0.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether the image has bitmaps that the next change would make stale, or a new size too short.
    pub(crate) async fn has_true_bitmaps(&self) -> bool {
        let Some(extension) = self.image().header.consistent_bitmaps() else { return false };
        // Those of a damaged directory are lost already.
        self.bitmaps(&extension).await.is_ok_and(|(_, bitmaps)| bitmaps.iter().any(Bitmap::is_true))
    }

    /// Returns whether the directory says the truth of all bitmaps, as soon as what has been written is durable.
    async fn mark_bitmaps(&self) -> Result<bool> {
        let Some(extension) = self.image().header.consistent_bitmaps() else { return Ok(false) };
        let (mut directory, bitmaps) = self.bitmaps(&extension).await?;
        if let Some(changed) = bitmap::mark_in_use(&mut directory, &bitmaps) {
            self.write_part(extension.directory.0, &directory, changed).await?;
        }
        Ok(true)
    }

    /// The directory's bytes, up to whole sectors, and what they say.
    async fn bitmaps(&self, extension: &BitmapsExtension) -> Result<(Vec<u8>, Vec<Bitmap>)> {
        let layer = self.image().top();
        let (at, len) = (extension.directory.0, extension.directory_bytes);
        let buf = Buf::zeroed(whole_sectors(len) as usize);
        exact::read_zero_extended(self.io(), layer.file, at, &buf)
            .await
            .map_err(|source| self.image().io_error("bitmap directory read", layer.file, at, source))?;
        let bytes = buf.to_vec();
        let damaged = |source| Error::Format { file: Arc::clone(&layer.name), source: Arc::new(source) };
        let bitmaps = bitmap::decode_directory(&bytes[..len as usize], extension, self.image().geometry())
            .map_err(damaged)?;
        Ok((bytes, bitmaps))
    }

    /// Writes the sectors of `bytes`, which are those of the file from `at` on, that `changed` lies in.
    async fn write_part(&self, at: u64, bytes: &[u8], changed: Range<usize>) -> Result<()> {
        let layer = self.image().top();
        let sector = SECTOR as usize;
        let (start, end) = (changed.start / sector * sector, changed.end.next_multiple_of(sector));
        let (at, buf) = (at + start as u64, Buf::from_bytes(&bytes[start..end]));
        exact::write_all(self.io(), layer.file, at, &buf)
            .await
            .map_err(|source| self.image().io_error("bitmap directory write", layer.file, at, source))
    }
}
