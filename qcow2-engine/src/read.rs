//! The life of a read: resolve, move the bytes of each extent, done.

use crate::{
    error::Result,
    io::{Buf, Io, exact},
    lane::Lane,
    resolve::{Extent, Extents},
};
use futures_util::future::join_all;

impl<I: Io> Lane<I> {
    /// Reads `buf.len()` bytes of the virtual disk from `at`. Both are multiples of 512 bytes.
    ///
    /// # Errors
    /// Beyond the end of the disk; damage to the mapping; a failed read of an image file. The
    /// buffer's content is then undefined.
    pub async fn read(&self, at: u64, buf: Buf) -> Result<()> {
        self.check_range(at, buf.len() as u64)?;
        let flight = self.begin().await;
        let result = self.read_entered(at, &buf).await;
        self.end(flight);
        result
    }

    /// [`Self::read`], from inside a request.
    async fn read_entered(&self, at: u64, buf: &Buf) -> Result<()> {
        let extents = self.resolve(at, buf.len() as u64).await?;
        self.fill(&extents, buf).await
    }

    /// Where the bytes of a range are, for a caller who moves them.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn map(&self, at: u64, len: u64) -> Result<Extents> {
        self.check_range(at, len)?;
        self.in_flight(self.resolve(at, len)).await
    }

    /// Whether the first byte of a range is the image's own, zeros too, and not of what is below it; and for how many bytes
    /// of the range that is so.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn is_allocated(&self, at: u64, len: u64) -> Result<(bool, u64)> {
        self.check_range(at, len)?;
        self.in_flight(self.top_has(at, len)).await
    }

    /// Reads all extents into the buffer that they cover together.
    pub(crate) async fn fill(&self, extents: &Extents, buf: &Buf) -> Result<()> {
        if let [extent] = extents[..] {
            return self.fill_one(extent, buf.clone()).await;
        }
        let mut done = 0;
        let parts = extents.iter().map(|&extent| {
            let part = buf.slice(done..done + extent.len() as usize);
            done += part.len();
            self.fill_one(extent, part)
        });
        join_all(parts).await.into_iter().collect()
    }

    async fn fill_one(&self, extent: Extent, buf: Buf) -> Result<()> {
        match extent {
            Extent::Zero { .. } => buf.fill(0),
            Extent::Data { file, at, .. } => exact::read_zero_extended(self.io(), file, at, &buf)
                .await
                .map_err(|source| self.image().io_error("read", file, at, source))?,
            Extent::Compressed { layer, range, skip, .. } => {
                let cluster = self.unpack(layer, range).await?;
                let skip = skip as usize;
                buf.copy_from(0, &cluster[skip..skip + buf.len()]);
            }
        }
        Ok(())
    }
}
