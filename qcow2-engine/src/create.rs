//! Making an image: the bytes of a [`Blueprint`] in an order that leaves no half-made image.
//!
//! Whatever the file held before is made unreadable first, durably; the header comes last, when all
//! that it leads to is durable. So a crash leaves no image or the whole, empty one. Preallocation
//! then goes through the engine like any other change.

use crate::{
    backing::{self, Format},
    error::{Error, Result},
    image::Image,
    inspect::ImageFile,
    io::{Access, Buf, FileId, Io, SECTOR, Storage, exact},
    lane::Lane,
    layer::size_below,
    open::OpenOptions,
    order::rules::RuleName,
};
use qcow2_format::{Blueprint, Clusters, CreateOptions, GuestCluster, Mapping};
use std::{io, ops::Range, path::Path, sync::Arc};

/// Zeros are written in parts of so many bytes.
const ZERO_CHUNK: u64 = 1 << 20;

/// How much of a new image exists from the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing but the tables that every image has.
    #[default]
    Off,
    /// Every cluster is mapped; the file is sparse.
    Metadata,
    /// Every cluster is mapped, and its space is allocated.
    Falloc,
    /// Every cluster is mapped, its space is allocated, and zeros are written to it: what a later write then
    /// changes of the host's file system is nothing but data.
    Full,
}

/// Makes an image of a file that exists, and whose content is lost.
///
/// # Errors
/// Options outside the format's limits, preallocation of an overlay (the file is as it was); failed
/// I/O (the file is empty, or holds nothing that could be taken for an image).
pub async fn create<I: Io>(
    io: &I,
    storage: &(impl Storage + ?Sized),
    path: &Path,
    options: &CreateOptions,
    preallocation: Preallocation,
) -> Result<()> {
    let name: Arc<str> = Arc::from(path.to_string_lossy());
    if options.backing.is_some() && preallocation != Preallocation::Off {
        let reason = "an image with a backing file cannot be preallocated: that would hide the backing file";
        return Err(Error::NotSupported { file: name, reason });
    }
    let damaged = |source| Error::Format { file: Arc::clone(&name), source: Arc::new(source) };
    let blueprint = Blueprint::new(options).map_err(damaged)?;
    let open_failed = |source| Error::Open { path: path.to_owned(), source: Arc::new(source) };
    let file = storage.open(path, Access::ReadWrite).map_err(open_failed)?;
    let capacity = storage.len(file).map_err(open_failed)?;
    let failed = |source| Error::Io {
        operation: "creation",
        file: Arc::clone(&name),
        at: None,
        source: Arc::new(source),
    };
    let new = NewFile { io, file };
    new.wipe(capacity).await.map_err(failed)?;
    let made = async {
        new.write(&blueprint, capacity).await.map_err(failed)?;
        match preallocation {
            Preallocation::Off => Ok(()),
            mode => preallocate(io, storage, path, mode).await,
        }
    };
    let made = made.await;
    if made.is_err() {
        // Nothing that could be taken for an image stays; if that fails too, the first error counts.
        if io.set_len(file, 0).await.is_err() {
            let _ = new.wipe(capacity).await;
        }
    }
    made
}

async fn preallocate<I: Io>(
    io: &I,
    storage: &(impl Storage + ?Sized),
    path: &Path,
    mode: Preallocation,
) -> Result<()> {
    let io = Sparse { io, may_allocate: mode != Preallocation::Metadata };
    let image = Image::open(&io, storage, path, &OpenOptions::default()).await?;
    let lane = Lane::new(&image, io, 1);
    lane.preallocate(mode == Preallocation::Full).await?;
    lane.close().await
}

/// Size of the virtual disk that an overlay's backing file shows, in bytes. The overlay need not
/// exist; the backing file's name is relative to it.
///
/// # Errors
/// The name or the format is not one that is served; the file cannot be opened or is not what the
/// format says.
pub async fn backing_size(
    io: &impl Io,
    storage: &(impl Storage + ?Sized),
    overlay: &Path,
    backing: &qcow2_format::Backing,
) -> Result<u64> {
    let (path, format) = backing::resolve(overlay, &backing.name, &backing.format)?;
    if format == Format::Qcow2 {
        let file = ImageFile::open(io, storage, &path, Access::ReadOnly).await?;
        return Ok(size_below(file.header().virtual_size));
    }
    let failed = |source| Error::Open { path: path.clone(), source: Arc::new(source) };
    let file = storage.open(&path, Access::ReadOnly).map_err(failed)?;
    storage.len(file).map_err(failed)
}

/// A file that is about to become an image.
struct NewFile<'a, I> {
    io: &'a I,
    file: FileId,
}

impl<I: Io> NewFile<'_, I> {
    /// Makes what the file holds unreadable as an image.
    async fn wipe(&self, capacity: u64) -> io::Result<()> {
        if capacity == 0 {
            return Ok(());
        }
        exact::write_all(self.io, self.file, 0, &Buf::zeroed(SECTOR as usize)).await?;
        self.io.barrier(self.file, RuleName::WipeBeforeContent).await
    }

    async fn write(&self, blueprint: &Blueprint, capacity: u64) -> io::Result<()> {
        self.make_room(blueprint, capacity).await?;
        let mut writes = blueprint.writes();
        let header = writes.next();
        for (at, bytes) in writes {
            exact::write_all(self.io, self.file, at, &Buf::from_bytes(&bytes)).await?;
        }
        self.io.barrier(self.file, RuleName::ContentBeforeHeader).await?;
        if let Some((at, bytes)) = header {
            exact::write_all(self.io, self.file, at, &Buf::from_bytes(&bytes)).await?;
        }
        self.io.sync(self.file).await
    }

    /// Makes the file as long as the image, all zeros where nothing will be written.
    async fn make_room(&self, blueprint: &Blueprint, capacity: u64) -> io::Result<()> {
        match self.io.set_len(self.file, 0).await {
            Ok(()) => return self.io.set_len(self.file, blueprint.file_len()).await,
            // A block device keeps its length.
            Err(_) if capacity >= blueprint.file_len() => {}
            Err(error) => return Err(error),
        }
        let (start, len) = blueprint.zero_range();
        let mut done = 0;
        while done < len {
            let part = ZERO_CHUNK.min(len - done);
            exact::write_all(self.io, self.file, start + done, &Buf::zeroed(part as usize)).await?;
            done += part;
        }
        Ok(())
    }
}

impl<I: Io> Lane<I> {
    /// Maps every cluster of an empty image to one of its own, which reads as zeros: as space that was never
    /// written to does, or because they are written.
    async fn preallocate(&self, writes_zeros: bool) -> Result<()> {
        let geometry = *self.image().geometry();
        let count = geometry.clusters_for(geometry.virtual_size);
        let Range { mut start, end } = GuestCluster(0).row(count);
        while start < end {
            let next = end.min(self.image().top().slice_end(start));
            self.in_flight(self.preallocate_slice(start..next, writes_zeros)).await?;
            start = next;
        }
        Ok(())
    }

    async fn preallocate_slice(&self, mut clusters: Range<GuestCluster>, writes_zeros: bool) -> Result<()> {
        let geometry = *self.image().geometry();
        self.begin_mutation().await?;
        self.prepare_table(geometry.guest_offset(clusters.start)).await?;
        while !clusters.is_empty() {
            let mut reservation = self.reserve(clusters.cluster_count()).await?;
            let host = reservation.clusters();
            // What could not be truncated, as a block device, has old content.
            if writes_zeros || !reservation.is_fresh() {
                reservation.begin_writing();
                let len = host.cluster_count() * geometry.cluster_size();
                let zeroed = self.zero(geometry.host_offset(host.start).0, len).await;
                reservation.end_writing();
                zeroed?;
            }
            let guest = clusters.start.row(host.cluster_count());
            self.publish(guest.clone(), Some(host.clone()), |cluster| {
                let host = geometry.host_offset(host.start + (cluster - guest.start));
                Some(Mapping::Data { host, copied: true })
            })
            .await?;
            reservation.commit();
            clusters.start = guest.end;
        }
        self.relieve().await
    }

    async fn zero(&self, at: u64, len: u64) -> Result<()> {
        let (image, file) = (self.image(), self.image().top().file);
        for done in (0..len).step_by(ZERO_CHUNK as usize) {
            let part = ZERO_CHUNK.min(len - done);
            exact::write_all(self.io(), file, at + done, &Buf::zeroed(part as usize))
                .await
                .map_err(|source| image.io_error("zeroing", file, at + done, source))?;
        }
        Ok(())
    }
}

/// The same I/O, where the file may have to grow without space being allocated for it.
struct Sparse<'a, I> {
    io: &'a I,
    may_allocate: bool,
}

impl<I: Io> Io for Sparse<'_, I> {
    async fn read(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.io.read(file, at, buf).await
    }

    async fn write(&self, file: FileId, at: u64, buf: Buf) -> io::Result<usize> {
        self.io.write(file, at, buf).await
    }

    async fn sync(&self, file: FileId) -> io::Result<()> {
        self.io.sync(file).await
    }

    async fn allocate(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        if self.may_allocate {
            self.io.allocate(file, at, len).await
        } else {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    async fn punch_hole(&self, file: FileId, at: u64, len: u64) -> io::Result<()> {
        self.io.punch_hole(file, at, len).await
    }

    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.io.set_len(file, len).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        check::{CheckOptions, check},
        exec::run_at_once as run,
        io::mem::MemFiles,
    };

    const PATH: &str = "new.qcow2";

    #[test]
    fn new_images_are_clean_whatever_was_there_before() {
        use Preallocation::{Falloc, Full, Metadata, Off};
        for preallocation in [Off, Metadata, Falloc, Full] {
            for cluster_bits in [9, 16, 21] {
                let files = MemFiles::default();
                files.put(PATH, vec![0xff; 3 << 20]);
                let options =
                    CreateOptions { virtual_size: (5 << 20) + 7, cluster_bits, ..CreateOptions::default() };
                run(create(&files, &files, Path::new(PATH), &options, preallocation)).unwrap();
                let report = run(check(&files, &files, Path::new(PATH), CheckOptions::default())).unwrap();
                assert!(report.found.is_clean(), "{preallocation:?} {:?}", report.found.list);
                let expected = if preallocation == Off { 0 } else { report.statistics.total_clusters };
                assert_eq!(report.statistics.allocated_clusters, expected);
            }
        }
    }

    #[test]
    fn options_are_refused_before_the_file_is_touched() {
        let files = MemFiles::default();
        files.put(PATH, vec![7; 1000]);
        let overlay = CreateOptions {
            backing: Some(qcow2_format::Backing { name: b"base".to_vec(), format: "raw".into() }),
            ..CreateOptions::default()
        };
        let path = Path::new(PATH);
        let too_small = CreateOptions { cluster_bits: 8, ..CreateOptions::default() };
        assert!(run(create(&files, &files, path, &overlay, Preallocation::Metadata)).is_err());
        assert!(run(create(&files, &files, path, &too_small, Preallocation::Off)).is_err());
        assert_eq!(files.get(PATH), Some(vec![7; 1000]));
    }
}
