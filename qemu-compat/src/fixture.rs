//! Images made by QEMU's own tools, with a mirror of what they hold.
//!
//! A [`Recipe`] says which features; [`Fixture::make`] has `qemu-img` and `qemu-io` make the image,
//! its backing chain and its snapshots, all with seeded content. A fixture remembers what must not
//! change: backing files and snapshots. It knows nothing of who serves the image.

use crate::{
    content::tagged,
    disk::SECTOR,
    mirror::Mirror,
    qemu_img::{self, Format},
    qemu_io::{Script, scribble},
    sequence::Discards,
};
use anyhow::{Context, Result, ensure};
use std::{
    fs::{self, File},
    hash::{DefaultHasher, Hasher},
    io::Read,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// Above this size the reference is a QCOW2 file: file systems end before raw ones of that size.
const LARGEST_RAW: u64 = 1 << 40;

/// Header version and what depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compat {
    /// Version 2: 16-bit refcounts.
    V2,
    /// Version 3 with refcounts of so many bits.
    V3(u32),
}

/// `preallocation=`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preallocation {
    /// `off`
    Off,
    /// `metadata`
    Metadata,
    /// `falloc`
    Falloc,
    /// `full`
    Full,
}

/// What is under the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Nothing.
    None,
    /// A raw file of the same size.
    Raw,
    /// A QCOW2 file of the same size.
    Qcow2,
    /// Three files: QCOW2 on a shorter QCOW2 on a raw one of odd length.
    Chain,
    /// A raw file of less than half the size, not even a whole number of sectors.
    Shorter,
    /// A QCOW2 file that is half as large again.
    Longer,
}

/// How the first content gets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Written by `qemu-io`.
    None,
    /// `qemu-img convert -c` with zlib.
    Zlib,
    /// `qemu-img convert -c` with zstd.
    Zstd,
}

/// The features of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Version and refcount width.
    pub compat: Compat,
    /// How much is allocated at first.
    pub preallocation: Preallocation,
    /// The chain under it.
    pub backing: Backing,
    /// How its first content is stored.
    pub compression: Compression,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Virtual size in bytes, a multiple of a sector.
    pub size: u64,
    /// `lazy_refcounts=on`
    pub lazy_refcounts: bool,
    /// Queues, or lanes, to serve it with.
    pub queues: u16,
}

/// An image, what it holds, and what must stay as it is.
pub struct Fixture {
    /// The image.
    pub image: PathBuf,
    /// What it holds.
    pub mirror: Mirror,
    recipe: Recipe,
    backing: Vec<(PathBuf, u64)>,
    snapshots: Vec<(String, Mirror)>,
    next_number: u64,
}

impl Recipe {
    /// `qemu-img`'s defaults, at this cluster size, with a small disk.
    #[must_use]
    pub const fn plain(cluster_bits: u32) -> Self {
        Self {
            cluster_bits,
            compat: Compat::V3(16),
            preallocation: Preallocation::Off,
            backing: Backing::None,
            compression: Compression::None,
            snapshots: 0,
            size: small_size(cluster_bits),
            lazy_refcounts: false,
            queues: 1,
        }
    }

    /// Whether QEMU makes such an image.
    #[must_use]
    pub fn is_possible(&self) -> bool {
        let v2_can = self.compression != Compression::Zstd && !self.lazy_refcounts;
        let is_preallocated = self.preallocation != Preallocation::Off;
        (self.compat != Compat::V2 || v2_can)
            && !(is_preallocated && (self.backing != Backing::None || self.compression != Compression::None))
            // A snapshot's clusters are counted twice.
            && !(self.compat == Compat::V3(1) && self.snapshots > 0)
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// What a discard does to it.
    #[must_use]
    pub fn discards(&self) -> Discards {
        match (self.compat, self.backing) {
            (Compat::V3(_), _) | (Compat::V2, Backing::None) => Discards::Zero,
            (Compat::V2, _) => Discards::Unsupported,
        }
    }

    /// A name that tells all features that are not the default.
    #[must_use]
    pub fn name(&self) -> String {
        let cluster = match self.cluster_bits {
            bits @ 0..10 => (1 << bits).to_string(),
            bits @ 10..20 => format!("{}K", 1 << (bits - 10)),
            bits => format!("{}M", 1 << (bits - 20)),
        };
        let mut parts = vec![cluster];
        parts.push(match self.compat {
            Compat::V2 => "v2".to_owned(),
            Compat::V3(bits) => format!("rc{bits}"),
        });
        let mut add = |default: bool, text: String| {
            if !default {
                parts.push(text.to_lowercase());
            }
        };
        add(self.preallocation == Preallocation::Off, format!("{:?}", self.preallocation));
        add(self.backing == Backing::None, format!("on-{:?}", self.backing));
        add(self.compression == Compression::None, format!("{:?}", self.compression));
        add(self.snapshots == 0, "snapshots".to_owned());
        add(!self.lazy_refcounts, "lazy".to_owned());
        add(self.size.is_multiple_of(self.cluster()), "odd".to_owned());
        add(self.size <= 1 << 30, format!("{}G", self.size >> 30));
        add(self.queues == 1, format!("{}q", self.queues));
        parts.join("-")
    }

    fn options(&self) -> String {
        let mut options = format!("cluster_size={}", self.cluster());
        match self.compat {
            Compat::V2 => options += ",compat=0.10",
            Compat::V3(bits) => options += &format!(",compat=1.1,refcount_bits={bits}"),
        }
        if self.preallocation != Preallocation::Off {
            options += &format!(",preallocation={:?}", self.preallocation).to_lowercase();
        }
        if self.compression == Compression::Zstd {
            options += ",compression_type=zstd";
        }
        if self.lazy_refcounts {
            options += ",lazy_refcounts=on";
        }
        options
    }
}

/// A disk of several L2 tables where that is still small.
#[must_use]
pub const fn small_size(cluster_bits: u32) -> u64 {
    match cluster_bits {
        0..=11 => 3 << 20,
        12..=15 => 8 << 20,
        16..=19 => 24 << 20,
        _ => 48 << 20,
    }
}

impl Fixture {
    /// Makes the image in a directory that is its own.
    ///
    /// # Errors
    /// QEMU's tools fail.
    pub fn make(dir: &Path, recipe: &Recipe, seed: u64) -> Result<Self> {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut chain = Chain { dir, rng: &mut rng, number: 0, files: Vec::new() };
        let base = chain.build(recipe).context("making the backing chain")?;
        let backing = chain.files.iter().map(|path| Ok((path.clone(), sum(path)?))).collect::<Result<_>>()?;
        let mut fixture = Self {
            image: dir.join("image.qcow2"),
            mirror: match &base {
                Some(base) => base.mirror.overlay(recipe.size, recipe.cluster()),
                None => Mirror::new(recipe.size, recipe.cluster()),
            },
            recipe: *recipe,
            backing,
            snapshots: Vec::new(),
            next_number: 1000,
        };
        let base = base.as_ref().map(|base| (base.path.as_path(), base.format));
        fixture.fill(base, &mut rng).context("making the image")?;
        for index in 0..recipe.snapshots {
            let name = format!("snapshot-{index}");
            qemu_img::snapshot(&fixture.image, &name)?;
            fixture.snapshots.push((name, fixture.mirror.clone()));
            fixture.scribble(&mut rng)?;
        }
        qemu_img::check_clean(&fixture.image).context("the image as QEMU made it")?;
        Ok(fixture)
    }

    fn fill(&mut self, base: Option<(&Path, Format)>, rng: &mut fastrand::Rng) -> Result<()> {
        let recipe = self.recipe;
        if recipe.compression == Compression::None {
            qemu_img::create(&self.image, &recipe.options(), base, recipe.size)?;
            return self.scribble(rng);
        }
        let raw = self.image.with_extension("source");
        random_writes(&mut self.mirror, rng, 100);
        self.mirror.write_raw(&raw)?;
        qemu_img::convert_compressed(&raw, &self.image, &recipe.options(), base)?;
        fs::remove_file(&raw)?;
        // Some clusters that are not compressed, among them.
        let mut script = Script::default();
        let at = recipe.size / 3 / SECTOR * SECTOR;
        let bytes = tagged(at, recipe.cluster().min(recipe.size - at), 99);
        self.mirror.write(at, &bytes);
        script.write(at, &bytes, self.dir())?.run(&self.image, Format::Qcow2).map(drop)
    }

    /// Lets `qemu-io` change the image, at random places.
    ///
    /// # Errors
    /// `qemu-io` fails.
    pub fn scribble(&mut self, rng: &mut fastrand::Rng) -> Result<()> {
        self.next_number += 1000;
        let discards = self.recipe.discards() == Discards::Zero;
        scribble(&self.image, &mut self.mirror, rng, self.next_number, discards)
    }

    /// Holds the image against everything that is known about it: clean without a leak, the
    /// mirror's bytes, snapshots and backing files as they were.
    ///
    /// # Errors
    /// What does not hold.
    pub fn judge(&self) -> Result<()> {
        qemu_img::check_clean(&self.image)?;
        self.compare().context("qemu-img compare with the mirror")?;
        self.hold_unchanged(&self.dir().join("snapshot.raw"))
    }

    /// Holds snapshots and backing files against what they were; `scratch` is a file to be made and removed.
    ///
    /// # Errors
    /// What has changed.
    pub fn hold_unchanged(&self, scratch: &Path) -> Result<()> {
        for (name, mirror) in &self.snapshots {
            qemu_img::extract_snapshot(&self.image, name, scratch)?;
            mirror.compare_raw(scratch).with_context(|| format!("{name} has changed"))?;
            fs::remove_file(scratch)?;
        }
        for (path, before) in &self.backing {
            ensure!(sum(path)? == *before, "the backing file {} has changed", path.display());
        }
        Ok(())
    }

    fn compare(&self) -> Result<()> {
        if self.mirror.size() <= LARGEST_RAW {
            let raw = self.dir().join("mirror.raw");
            self.mirror.write_raw(&raw)?;
            qemu_img::compare(&self.image, &raw, Format::Raw)?;
            return Ok(fs::remove_file(raw)?);
        }
        let reference = self.dir().join("mirror.qcow2");
        qemu_img::create(&reference, "cluster_size=2M", None, self.mirror.size())?;
        let ranges: Vec<_> = self.mirror.written().collect();
        // One process per part, or its command line gets too long.
        for part in ranges.chunks(256) {
            let mut script = Script::default();
            for range in part {
                script.write(
                    range.start,
                    &self.mirror.read(range.start, range.end - range.start),
                    self.dir(),
                )?;
            }
            script.run(&reference, Format::Qcow2)?;
        }
        qemu_img::compare(&self.image, &reference, Format::Qcow2)?;
        Ok(fs::remove_file(reference)?)
    }

    fn dir(&self) -> &Path {
        self.image.parent().unwrap_or(Path::new("."))
    }
}

/// The files under an image, being made.
struct Chain<'a> {
    dir: &'a Path,
    rng: &'a mut fastrand::Rng,
    number: u64,
    files: Vec<PathBuf>,
}

struct Base {
    path: PathBuf,
    format: Format,
    mirror: Mirror,
}

impl Chain<'_> {
    fn build(&mut self, recipe: &Recipe) -> Result<Option<Base>> {
        let size = recipe.size;
        // Another cluster size than the overlay's.
        let bits = if recipe.cluster_bits == 16 { 12 } else { 16 };
        Ok(Some(match recipe.backing {
            Backing::None => return Ok(None),
            Backing::Raw => self.raw(size)?,
            Backing::Qcow2 => self.qcow2(None, size, bits)?,
            Backing::Chain => {
                let bottom = self.raw(size / 2 + 777)?;
                let middle = self.qcow2(Some(&bottom), size / 4 * 3 + SECTOR, 12)?;
                self.qcow2(Some(&middle), size, bits)?
            }
            Backing::Shorter => self.raw(size / 5 * 2 + 1234)?,
            Backing::Longer => self.qcow2(None, size / 2 * 3 + SECTOR, bits)?,
        }))
    }

    fn raw(&mut self, len: u64) -> Result<Base> {
        let path = self.next("raw");
        let mut mirror = Mirror::new(len, 65536);
        random_writes(&mut mirror, self.rng, self.number * 1000);
        mirror.write_raw(&path)?;
        // The last bytes count, even where they are no whole sector.
        let tail = vec![0xa5; (len % SECTOR) as usize];
        File::options().write(true).open(&path)?.write_all_at(&tail, len - tail.len() as u64)?;
        mirror.write(len - tail.len() as u64, &tail);
        Ok(Base { path, format: Format::Raw, mirror })
    }

    fn qcow2(&mut self, base: Option<&Base>, size: u64, cluster_bits: u32) -> Result<Base> {
        let path = self.next("qcow2");
        let size = size.next_multiple_of(SECTOR);
        let options = format!("cluster_size={}", 1_u64 << cluster_bits);
        qemu_img::create(&path, &options, base.map(|base| (base.path.as_path(), base.format)), size)?;
        let mut mirror = match base {
            Some(base) => base.mirror.overlay(size, 1 << cluster_bits),
            None => Mirror::new(size, 1 << cluster_bits),
        };
        scribble(&path, &mut mirror, self.rng, self.number * 1000, true)?;
        scribble(&path, &mut mirror, self.rng, self.number * 1000 + 14, true)?;
        Ok(Base { path, format: Format::Qcow2, mirror })
    }

    fn next(&mut self, extension: &str) -> PathBuf {
        self.number += 1;
        let path = self.dir.join(format!("base-{}.{extension}", self.number));
        self.files.push(path.clone());
        path
    }
}

/// Tagged content at random places of about half the disk.
fn random_writes(mirror: &mut Mirror, rng: &mut fastrand::Rng, first_number: u64) {
    let sectors = mirror.size() / SECTOR;
    for number in first_number..first_number + 24 {
        let at = rng.u64(0..sectors);
        let len = rng.u64(1..=(sectors / 20).max(2)).min(sectors - at);
        mirror.write(at * SECTOR, &tagged(at * SECTOR, len * SECTOR, number));
    }
}

/// A sum over a file's bytes, to tell whether it has changed.
///
/// # Errors
/// It cannot be read.
pub fn sum(path: &Path) -> Result<u64> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hasher = DefaultHasher::new();
    let mut bytes = vec![0; 1 << 20];
    loop {
        match file.read(&mut bytes)? {
            0 => return Ok(hasher.finish()),
            count => hasher.write(&bytes[..count]),
        }
    }
}
