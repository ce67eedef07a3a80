//! An image's own structures, read as they are: where `info` and [`check`](fn@crate::check) start.
//!
//! An [`ImageFile`] is one file with a decodable header. It need not be one that can be served: dirty
//! and corrupt images, encrypted ones and those with subclusters or a data file are welcome. Its
//! backing file and data file are never opened. What L1, L2 and refcount tables hold is not known
//! here.

use crate::{
    check::live::Live,
    error::{Error, Result},
    io::{Access, Buf, FileId, Io, SECTOR, Storage, exact, whole_sectors},
    opened::Opened,
    order::rules::RuleName,
};
use qcow2_format::{
    Defects, FormatError, Geometry, Header, HostCluster, Snapshot, Unsupported,
    bitmap::{self, Bitmap},
    snapshot::{self, MAX_SALVAGE_BYTES, Salvage, TableExtent},
    word,
};
use std::{io, path::Path, sync::Arc};

/// How much of a snapshot table is read first; then twice as much as long as it goes on.
const SNAPSHOT_READ_BYTES: u64 = 64 << 10;

/// A QCOW2 file, open without its chain.
pub struct ImageFile<'a, I> {
    pub(crate) io: &'a I,
    pub(crate) is_hole: Box<dyn Fn(u64, u64) -> bool + 'a>,
    pub(crate) file: FileId,
    pub(crate) name: Arc<str>,
    pub(crate) header: Header,
    /// What a check can repair of the header.
    pub(crate) defects: Defects,
    /// Length of the file in bytes; a repair may extend it.
    pub(crate) file_len: u64,
    /// The image is being served: its newest tables are in memory.
    pub(crate) live: Option<Live<'a>>,
}

impl<'a, I: Io> ImageFile<'a, I> {
    /// Opens a file and decodes its header. That it has no refcount table, or too many snapshots, is for
    /// those to say who need them.
    ///
    /// # Errors
    /// The file cannot be opened or read, or its header is not that of a QCOW2 image.
    pub async fn open(
        io: &'a I,
        storage: &'a (impl Storage + ?Sized),
        path: &Path,
        access: Access,
    ) -> Result<Self> {
        let opened = Opened::open(storage, path, access)?;
        let (header, defects, _) = opened.header(io).await?;
        Ok(Self { defects, ..Self::around(io, storage, opened.file, opened.name, header, opened.len) })
    }

    /// A file that is open already, with its decoded header, which has no defects.
    pub(crate) fn around(
        io: &'a I,
        storage: &'a (impl Storage + ?Sized),
        file: FileId,
        name: Arc<str>,
        header: Header,
        file_len: u64,
    ) -> Self {
        let is_hole = Box::new(move |at, len| storage.is_hole(file, at, len));
        Self { io, is_hole, file, name, header, defects: Defects::default(), file_len, live: None }
    }

    /// Refuses an image of which nobody knows what its fields mean.
    ///
    /// # Errors
    /// It has an incompatible feature that is not known.
    pub fn check_known(&self) -> Result<()> {
        match self.header.check_supported() {
            Err(source @ Unsupported::IncompatibleFeatures(_)) => {
                Err(Error::Unsupported { file: Arc::clone(&self.name), source: Arc::new(source) })
            }
            _ => Ok(()),
        }
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Length of the file in bytes.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// Reads the snapshot table; what it should have beyond the end of the file reads as zeros, as by QEMU.
    ///
    /// # Errors
    /// A failed read; a table that is damaged.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        Ok(self.snapshot_table().await?.0)
    }

    /// The snapshots, and the length of their table in bytes.
    pub(crate) async fn snapshot_table(&self) -> Result<(Vec<Snapshot>, u64)> {
        if let Some(defect) = &self.defects.snapshot_count {
            return Err(self.damaged(defect.clone()));
        }
        let count = self.header.snapshot_count;
        let decoded = |bytes: &[u8]| match snapshot::table_extent(bytes, count)? {
            TableExtent::Complete(len) => Ok(Ok((snapshot::decode_table(bytes, count)?, len))),
            TableExtent::NeedsAtLeast(needed) => Ok(Err(needed)),
        };
        self.read_snapshots(decoded).await
    }

    /// What can be kept of the snapshot table: nothing where the header is. The last entry may lead beyond
    /// the end of the file, where zeros are read, as by QEMU. Of another one that does nobody knows where
    /// the next begins.
    pub(crate) async fn salvage_snapshots(&self) -> Result<Salvage> {
        match &self.defects.snapshot_table {
            Some(defect @ FormatError::TableInHeader { .. }) => {
                return Ok(Salvage { defects: vec![defect.clone()], ..Salvage::default() });
            }
            Some(defect @ FormatError::TablesOverlap { .. }) => return Err(self.damaged(defect.clone())),
            _ => {}
        }
        let (count, geometry) = (self.header.snapshot_count, self.geometry());
        let available = self.bytes_behind_table();
        let salvaged = |bytes: &[u8]| Ok(snapshot::salvage(bytes, count, &geometry, available));
        let salvage = self.read_snapshots(salvaged).await?;
        if salvage.snapshots.len() < count as usize {
            self.check_has_table(salvage.len)?;
        }
        Ok(salvage)
    }

    /// Makes sure that the file has so many bytes of the snapshot table.
    pub(crate) fn check_has_table(&self, needed: u64) -> Result<()> {
        let (what, available) = ("the snapshot table", self.bytes_behind_table());
        if needed > available {
            return Err(self.damaged(FormatError::Truncated { what, needed, available }));
        }
        Ok(())
    }

    /// From where the snapshot table begins to the end of the file.
    pub(crate) fn bytes_behind_table(&self) -> u64 {
        self.file_len.saturating_sub(self.header.snapshot_table.0)
    }

    /// Decodes the snapshot table, which does not say how long it is: from ever more bytes, as many as
    /// `decoded` says that it needs.
    async fn read_snapshots<T>(
        &self,
        decoded: impl Fn(&[u8]) -> std::result::Result<std::result::Result<T, u64>, FormatError>,
    ) -> Result<T> {
        let at = self.header.snapshot_table.0;
        // Without snapshots the table may be anywhere.
        let mut wanted = if self.header.snapshot_count == 0 { 0 } else { SNAPSHOT_READ_BYTES };
        loop {
            let bytes = self.read(at, wanted).await?;
            match decoded(&bytes).map_err(|source| self.damaged(source))? {
                Ok(table) => return Ok(table),
                Err(needed) => wanted = needed.max(MAX_SALVAGE_BYTES.min(2 * wanted)),
            }
        }
    }

    /// Reads the bitmap directory; there are no bitmaps where the header says that they are not
    /// consistent.
    ///
    /// # Errors
    /// A failed read; a damaged directory.
    pub async fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        let Some(extension) = self.header.consistent_bitmaps() else {
            return Ok(Vec::new());
        };
        let bytes = self.read(extension.directory.0, extension.directory_bytes).await?;
        bitmap::decode_directory(&bytes, &extension, &self.geometry()).map_err(|source| self.damaged(source))
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.header.geometry()
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Reads `len` bytes; what lies beyond the end of the file reads as zeros.
    pub(crate) async fn read(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        self.rest().await?;
        self.read_now(at, len).await
    }

    /// [`Self::read`] without a rest before it.
    pub(crate) async fn read_now(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        if len > 0 {
            read_at(self.io, self.file, &self.name, at, &mut bytes).await?;
        }
        Ok(bytes)
    }

    /// Reads a cluster of metadata; see [`Self::read_part`].
    pub(crate) async fn read_cluster(&self, cluster: HostCluster) -> Result<Option<Vec<u8>>> {
        let geometry = self.geometry();
        self.read_part(geometry.host_offset(cluster).0, geometry.cluster_size()).await
    }

    /// Reads a part of a cluster; `None` where the file has a hole, so that a sparse file costs what is
    /// in it and not its length.
    pub(crate) async fn read_part(&self, at: u64, len: u64) -> Result<Option<Vec<u8>>> {
        if (self.is_hole)(at, len) { Ok(None) } else { self.read(at, len).await.map(Some) }
    }

    /// Reads a table of `count` 8-byte entries.
    pub(crate) async fn read_entries(&self, at: u64, count: u64) -> Result<Vec<u64>> {
        let bytes = self.read(at, count * 8).await?;
        Ok(word::all(&bytes).collect())
    }

    /// Writes whole sectors.
    pub(crate) async fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        debug_assert!(at.is_multiple_of(SECTOR) && (bytes.len() as u64).is_multiple_of(SECTOR));
        exact::write_all(self.io, self.file, at, &Buf::from_bytes(bytes))
            .await
            .map_err(|source| self.failed("write", at, source))
    }

    /// Writes the sectors in which `new` differs from `old`, both being what is at `at`.
    pub(crate) async fn write_changes(&self, at: u64, old: &[u8], new: &[u8]) -> Result<()> {
        let sector = SECTOR as usize;
        let mut start = 0;
        while start < new.len() {
            let differs = |at: usize| at < new.len() && old[at..at + sector] != new[at..at + sector];
            let mut end = start;
            while differs(end) {
                end += sector;
            }
            if start < end {
                self.write(at + start as u64, &new[start..end]).await?;
            }
            start = end + sector;
        }
        Ok(())
    }

    /// Makes what was written durable.
    pub(crate) async fn sync(&self) -> Result<()> {
        self.io.sync(self.file).await.map_err(|source| self.failed("fdatasync", None, source))
    }

    /// Makes what was written durable before anything else is, as a rule asks for.
    pub(crate) async fn barrier(&self, rule: RuleName) -> Result<()> {
        self.io.barrier(self.file, rule).await.map_err(|source| self.failed("fdatasync", None, source))
    }

    pub(crate) async fn set_len(&self, len: u64) -> Result<()> {
        self.io.set_len(self.file, len).await.map_err(|source| self.failed("truncation", len, source))
    }

    fn failed(&self, operation: &'static str, at: impl Into<Option<u64>>, source: io::Error) -> Error {
        Error::Io { operation, file: Arc::clone(&self.name), at: at.into(), source: Arc::new(source) }
    }

    pub(crate) fn damaged(&self, source: FormatError) -> Error {
        Error::Format { file: Arc::clone(&self.name), source: Arc::new(source) }
    }
}

/// Fills `out` from whole sectors around it; what lies beyond the end of the file is zeros.
async fn read_at(io: &impl Io, file: FileId, name: &Arc<str>, at: u64, out: &mut [u8]) -> Result<()> {
    let start = at - at % SECTOR;
    let skip = (at - start) as usize;
    let buf = Buf::zeroed(whole_sectors((skip + out.len()) as u64) as usize);
    exact::read_zero_extended(io, file, start, &buf).await.map_err(|source| Error::Io {
        operation: "read",
        file: Arc::clone(name),
        at: Some(at),
        source: Arc::new(source),
    })?;
    buf.copy_to(skip, out);
    Ok(())
}
