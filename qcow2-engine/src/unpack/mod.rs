//! Compressed clusters: from their place in a file to their bytes.
//!
//! ```text
//! Lane::unpack ── unpacked ── there already, or on its way for another request: wait for that
//!                    └─ read the sectors ── workers ── decompress, on another thread
//! ```
//!
//! Decompressing a cluster takes a hundred times as long as serving a request out of the page cache, so it
//! is done once for the requests that want parts of it ([`unpacked`]), and by threads that serve nothing
//! ([`workers`]) where the image has any. [`decompress`] is the pure part.

pub(crate) mod decompress;
mod unpacked;
mod workers;

pub(crate) use unpacked::Unpacked;
pub use workers::Workers;

use crate::{
    error::{Error, Result},
    image::Image,
    io::{Buf, Io, exact, whole_sectors},
    lane::Lane,
    layer::Qcow2Layer,
};
use qcow2_format::CompressedRange;
use std::{io, sync::Arc};
use unpacked::{Claim, Key};

/// Clusters smaller than this are decompressed at once: handing them over would cost as much.
const MIN_HANDED_OVER: usize = 16 << 10;

/// A cluster's bytes.
pub(crate) type Bytes = Arc<Vec<u8>>;

impl<I: Io> Lane<I> {
    /// The bytes of a compressed cluster.
    pub(crate) async fn unpack(&self, layer: u16, range: CompressedRange) -> Result<Bytes> {
        let image = self.image();
        match image.unpacked.claim(Key { layer, at: range.offset }).await {
            Claim::Here(bytes) => Ok(bytes),
            // If it fails, whoever else waits for it tries for itself and learns why.
            Claim::Ours(task) => {
                let packed = self.read_packed(image.qcow2_layer(layer), range).await?;
                Ok(task.done(self.decompress(image.qcow2_layer(layer), range, packed).await?))
            }
        }
    }

    /// The compressed bytes, and perhaps some after them.
    async fn read_packed(&self, layer: &Qcow2Layer, range: CompressedRange) -> Result<Vec<u8>> {
        // Whole sectors around them, for direct I/O.
        let start = range.offset & !511;
        let end = whole_sectors(range.offset + range.len);
        let buf = Buf::zeroed(end.saturating_sub(start) as usize);
        exact::read_zero_extended(self.io(), layer.file, start, &buf).await.map_err(|source| {
            self.image().io_error("read of a compressed cluster", layer.file, start, source)
        })?;
        let skip = (range.offset - start) as usize;
        Ok(buf.slice(skip..skip + range.len as usize).to_vec())
    }

    async fn decompress(
        &self,
        layer: &Qcow2Layer,
        range: CompressedRange,
        packed: Vec<u8>,
    ) -> Result<Vec<u8>> {
        let (kind, len) = (layer.compression, layer.geometry.cluster_size() as usize);
        let work = move || decompress::cluster(kind, &packed, len);
        let result = match self.image().workers.get().filter(|_| len >= MIN_HANDED_OVER) {
            Some(workers) => workers
                .run(work)
                .await
                .unwrap_or_else(|| Err(io::Error::other("the thread that decompresses has died"))),
            None => work(),
        };
        result.map_err(|reason| Error::Decompress {
            file: Arc::clone(&layer.name),
            at: range.offset,
            reason: reason.to_string(),
        })
    }
}

impl Image {
    /// From now on compressed clusters are decompressed by these threads, and not by those that serve.
    /// Without effect the second time.
    pub fn decompress_with(&self, workers: Workers) {
        let _ = self.workers.set(workers);
    }
}
