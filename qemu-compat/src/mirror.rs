//! What a disk should hold: a sparse array of bytes in memory.
//!
//! Every change that a test makes to a disk is made here too. Knows nothing of formats; clusters
//! matter only because a discard promises zeros for whole ones.

use crate::{
    content::Told,
    disk::{Op, SECTOR},
};
use anyhow::{Result, bail};
use std::{collections::BTreeMap, fs::File, ops::Range, os::unix::fs::FileExt, path::Path};

/// Bytes of a piece of the array.
const CHUNK: u64 = 64 << 10;

/// A sparse array of bytes; what was never written is zero.
#[derive(Clone, Debug)]
pub struct Mirror {
    size: u64,
    cluster: u64,
    chunks: BTreeMap<u64, Box<[u8]>>,
}

impl Mirror {
    /// An array of `size` zeros, for an image with clusters of `cluster` bytes.
    #[must_use]
    pub fn new(size: u64, cluster: u64) -> Self {
        Self { size, cluster, chunks: BTreeMap::new() }
    }

    /// What an overlay of this size shows of this disk.
    #[must_use]
    pub fn overlay(&self, size: u64, cluster: u64) -> Self {
        let mut overlay = Self { cluster, ..self.clone() };
        if size < self.size {
            overlay.zero(size, self.size - size);
        }
        overlay.size = size;
        overlay
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// The ranges that have ever been written, in order, in units of an internal chunk.
    pub fn written(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.chunks.keys().map(|index| index * CHUNK..((index + 1) * CHUNK).min(self.size))
    }

    /// Does to the array what a request does to a disk.
    pub fn apply(&mut self, op: &Op) {
        match *op {
            Op::Write { at, ref bytes } => self.write(at, bytes),
            Op::Zero { at, len, .. } => self.zero(at, len),
            Op::Discard { at, len } => {
                let whole = self.whole_clusters(at, len);
                self.zero(whole.start, whole.end - whole.start);
            }
            Op::Read { .. } | Op::Flush => {}
        }
    }

    /// The bytes of the whole clusters inside a range; the disk's last one counts up to its end.
    #[must_use]
    pub fn whole_clusters(&self, at: u64, len: u64) -> Range<u64> {
        let end = at + len;
        let start = at.next_multiple_of(self.cluster);
        let end = if end == self.size { end } else { end / self.cluster * self.cluster };
        start.min(end)..end
    }

    /// Writes bytes.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let here = at + done as u64;
            let offset = (here % CHUNK) as usize;
            let len = (CHUNK as usize - offset).min(bytes.len() - done);
            let chunk = self.chunks.entry(here / CHUNK).or_insert_with(|| vec![0; CHUNK as usize].into());
            chunk[offset..offset + len].copy_from_slice(&bytes[done..done + len]);
            done += len;
        }
    }

    /// Zeroes a range.
    pub fn zero(&mut self, at: u64, len: u64) {
        let end = at + len;
        for (index, chunk) in self.chunks.range_mut(at / CHUNK..end.div_ceil(CHUNK)) {
            let start = at.max(index * CHUNK) - index * CHUNK;
            let stop = end.min((index + 1) * CHUNK) - index * CHUNK;
            chunk[start as usize..stop as usize].fill(0);
        }
    }

    /// The bytes of a range; zeros beyond the end.
    #[must_use]
    pub fn read(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let end = at + len;
        for (index, chunk) in self.chunks.range(at / CHUNK..end.div_ceil(CHUNK)) {
            let start = at.max(index * CHUNK);
            let stop = end.min((index + 1) * CHUNK);
            bytes[(start - at) as usize..(stop - at) as usize]
                .copy_from_slice(&chunk[(start - index * CHUNK) as usize..(stop - index * CHUNK) as usize]);
        }
        bytes
    }

    /// Holds bytes that were read at `at` against the array.
    ///
    /// # Errors
    /// The first sector that differs, and what it holds.
    pub fn compare(&self, at: u64, found: &[u8]) -> Result<()> {
        let expected = self.read(at, found.len() as u64);
        let sectors = expected.chunks(SECTOR as usize).zip(found.chunks(SECTOR as usize));
        let wrong: Vec<_> = sectors.enumerate().filter(|(_, (expected, found))| expected != found).collect();
        let Some((index, (expected, found))) = wrong.first() else { return Ok(()) };
        let address = at + *index as u64 * SECTOR;
        bail!(
            "{} sectors are wrong, the first at {address:#x} (cluster {:#x}, byte {:#x} of it): found {}, expected {}",
            wrong.len(),
            address / self.cluster,
            address % self.cluster,
            Told(found),
            Told(expected),
        )
    }

    /// The array of the first `size` bytes of a raw file or device.
    ///
    /// # Errors
    /// The operating system's.
    pub fn read_raw(path: &Path, size: u64, cluster: u64) -> Result<Self> {
        let mut mirror = Self::new(size, cluster);
        let file = File::open(path)?;
        let mut bytes = vec![0; CHUNK as usize];
        for at in (0..size).step_by(bytes.len()) {
            let part = &mut bytes[..CHUNK.min(size - at) as usize];
            file.read_exact_at(part, at)?;
            if part.iter().any(|&byte| byte != 0) {
                mirror.write(at, part);
            }
        }
        Ok(mirror)
    }

    /// Writes the array as a sparse raw file.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write_raw(&self, path: &Path) -> Result<()> {
        let file = File::create(path)?;
        file.set_len(self.size)?;
        for (index, chunk) in &self.chunks {
            let at = index * CHUNK;
            let len = CHUNK.min(self.size.saturating_sub(at)) as usize;
            if chunk[..len].iter().any(|&byte| byte != 0) {
                file.write_all_at(&chunk[..len], at)?;
            }
        }
        Ok(())
    }

    /// Holds a raw file against the array.
    ///
    /// # Errors
    /// The operating system's, another size, or the first sector that differs.
    pub fn compare_raw(&self, path: &Path) -> Result<()> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        if len != self.size {
            bail!("{} has {len} bytes, not {}", path.display(), self.size);
        }
        let mut bytes = vec![0; 1 << 20];
        for at in (0..len).step_by(bytes.len()) {
            let part = (len - at).min(bytes.len() as u64) as usize;
            file.read_exact_at(&mut bytes[..part], at)?;
            self.compare(at, &bytes[..part])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_zeroes_and_overlays() {
        let mut mirror = Mirror::new(1 << 20, 4096);
        mirror.write(CHUNK - 512, &[7; 1024]);
        assert_eq!(mirror.read(CHUNK - 1024, 2048)[511..513], [0, 7]);
        mirror.zero(CHUNK, 512);
        assert_eq!(mirror.read(CHUNK - 512, 1024)[511..513], [7, 0]);
        let short = mirror.overlay(CHUNK - 256, 512);
        assert_eq!(short.read(CHUNK - 512, 512)[255..257], [7, 0]);
        assert!(mirror.compare(CHUNK - 512, &[7; 512]).is_ok());
        assert!(mirror.compare(CHUNK, &[7; 512]).unwrap_err().to_string().contains("0x10000"));
    }

    #[test]
    fn a_raw_file_gives_the_array_back() {
        let mut mirror = Mirror::new((1 << 20) + 512, 4096);
        mirror.write(CHUNK - 512, &[7; 1024]);
        mirror.write(1 << 20, &[8; 512]);
        let file = tempfile::NamedTempFile::new().unwrap();
        mirror.write_raw(file.path()).unwrap();
        let same = Mirror::read_raw(file.path(), mirror.size(), 4096).unwrap();
        assert_eq!(same.chunks.len(), 3);
        same.compare_raw(file.path()).unwrap();
    }

    #[test]
    fn a_discard_zeroes_whole_clusters_and_the_end_of_the_disk() {
        let mirror = Mirror::new(10_240, 4096);
        assert_eq!(mirror.whole_clusters(512, 9000), 4096..8192);
        assert_eq!(mirror.whole_clusters(4096, 6144), 4096..10_240);
        assert!(mirror.whole_clusters(512, 1024).is_empty());
    }
}
