//! The images that are made on the host, because making them takes long in an emulated machine: compressed
//! ones, and the one whose mapping fills 640 MiB. Kept in the cache; the machine sees them as disks.

use super::{
    matrix::{Compression, Image, Mapped, Session},
    plan::{HUGE_DISK, HUGE_FILE},
};
use crate::{
    process::{capture, program},
    vm::machine::{Access, Disk},
    workspace,
};
use anyhow::{Context, Result};
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

/// The size of compressed images.
const COMPRESSED_MIB: u64 = 128;
/// The file system that carries the image of 4 TiB: 640 MiB of metadata, and room for the session's other
/// images.
const HUGE_FILE_SYSTEM: &str = "1600M";

/// What a session needs from the host.
#[derive(Debug, Default)]
pub(super) struct Kit {
    pub disks: Vec<Disk>,
    compressed: Vec<(Compression, u64)>,
}

impl Kit {
    /// Makes what is not in the cache yet.
    ///
    /// # Errors
    /// Fails when QEMU's or ext4's tools do.
    pub(super) fn for_session(session: &Session) -> Result<Self> {
        let uses = |image: Image| session.rows.iter().any(|row| row.image == image);
        let mut kit = Self::default();
        for how in Compression::ALL.into_iter().filter(|how| uses(Image::Compressed(*how))) {
            let path = compressed(how)?;
            kit.compressed.push((how, fs::metadata(&path)?.len()));
            kit.disks.push(disk(how.name(), path));
        }
        if session.is_huge() {
            kit.disks.push(disk(HUGE_DISK, huge()?));
        }
        Ok(kit)
    }

    /// The length of a compressed image's file.
    pub(super) fn compressed_bytes(&self, image: Image) -> u64 {
        let is = |how: &Compression| image == Image::Compressed(*how);
        self.compressed.iter().find(|(how, _)| is(how)).map_or(0, |(_, bytes)| *bytes)
    }
}

fn disk(name: &str, path: PathBuf) -> Disk {
    Disk { name: name.to_owned(), path, access: Access::ReadOnly }
}

fn compressed(how: Compression) -> Result<PathBuf> {
    workspace::cached(
        "bench",
        &format!("compressed-{}-{COMPRESSED_MIB}.qcow2", how.name()),
        |path, staging| {
            let raw = staging.join("raw");
            write_prose(&raw, COMPRESSED_MIB << 20)?;
            let options = format!("compression_type={}", how.name());
            let mut convert = program("qemu-img")?;
            convert.args(["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", &options]);
            capture(convert.arg(&raw).arg(path)).map(drop)
        },
    )
}

/// Words in an order that a seed chooses: deflate makes half of them.
fn write_prose(path: &Path, bytes: u64) -> Result<()> {
    let mut rng = fastrand::Rng::with_seed(super::plan::SEED);
    let words: Vec<Vec<u8>> = (0..1024)
        .map(|_| {
            let length = rng.usize(3..10);
            (0..length).map(|_| rng.u8(b'a'..=b'z')).chain([b' ']).collect()
        })
        .collect();
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut written = 0;
    while written < bytes {
        let word = &words[rng.usize(..words.len())];
        out.write_all(word)?;
        written += word.len() as u64;
    }
    let file = out.into_inner().context("cannot finish the data")?;
    Ok(file.set_len(bytes)?)
}

/// QEMU makes the image, holes and all; mke2fs copies its few written parts into a file system.
fn huge() -> Result<PathBuf> {
    workspace::cached("bench", "huge.ext4", |path, staging| {
        let content = staging.join("content");
        fs::create_dir(&content)?;
        let mut create = program("qemu-img")?;
        create.args(["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"]);
        capture(create.arg(content.join(HUGE_FILE)).arg(Mapped::FourTiB.size()))?;
        let mut format = program("mkfs.ext4")?;
        format.args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-d"]);
        capture(format.arg(&content).arg(path).arg(HUGE_FILE_SYSTEM)).map(drop)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_is_as_long_as_asked_and_not_all_alike() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prose");
        write_prose(&path, 100_001).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 100_001);
        assert_ne!(bytes[..4096], bytes[4096..8192]);
    }
}
