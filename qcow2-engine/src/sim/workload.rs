//! The images that are simulated, in every initial state.
//!
//! The images are made by the real qemu-img and qemu-io, with clusters of 1 KiB, mostly, so that tables
//! are small, a cluster still has two sectors, and a few requests cross every kind of boundary.

use super::{
    disk::Disk,
    file::SECTOR,
    mixed::stamps,
    model::{INITIAL, Value},
    request::{Request, Shape},
};
use qcow2_format::header;
use std::{
    io,
    path::{Path, PathBuf},
    process::Command,
};

/// Sectors of the virtual disk: two L2 tables and a bit, and the last cluster is not whole.
pub const SECTORS: usize = 2 * 256 + 7;
/// Sectors of a backing file, which is shorter, and has a part of one more.
const BACKING_SECTORS: usize = SECTORS - 100;
const BACKING_REST: usize = 200;

/// The name of the image.
pub(super) const IMAGE: &str = "image";
/// The name of the file below it, or of the last of them.
pub(super) const BASE: &str = "base";

/// Where the autoclear bits are in the header, the highest first.
const AUTOCLEAR_AT: usize = 88;
/// Of the first byte.
const UNKNOWN_BIT: u8 = 0x80;

/// The state of every cluster before the first request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initial {
    /// No mapping, no backing file.
    Unallocated,
    /// No mapping, a raw backing file that is shorter than the disk.
    Backing,
    /// No mapping, a QCOW2 file below that is longer than the disk, or shorter ([`super::chain`]).
    OverFile,
    /// No mapping, two QCOW2 files below and a raw one, each shorter than what is over it.
    OverChain,
    /// Written.
    Data,
    /// A zero flag without a cluster.
    ZeroPlain,
    /// A zero flag on a cluster.
    ZeroAllocated,
    /// Compressed.
    Compressed,
    /// Shared with an internal snapshot.
    Shared,
    /// A zero flag on a cluster that is shared with an internal snapshot.
    SharedZero,
    /// Some of everything, and two internal snapshots ([`super::mixed`]).
    Mixed,
}

impl Initial {
    /// Every state.
    pub const ALL: [Self; 11] = [
        Self::Unallocated,
        Self::Backing,
        Self::OverFile,
        Self::OverChain,
        Self::Data,
        Self::ZeroPlain,
        Self::ZeroAllocated,
        Self::Compressed,
        Self::Shared,
        Self::SharedZero,
        Self::Mixed,
    ];

    /// Whether there is an internal snapshot.
    #[must_use]
    pub fn is_shared(self) -> bool {
        matches!(self, Self::Shared | Self::SharedZero | Self::Mixed)
    }

    /// Whether some of it, or all, reads as zeros.
    #[must_use]
    pub fn shows_zeros(self) -> bool {
        !matches!(self, Self::Data | Self::Compressed | Self::Shared)
    }

    /// Whether a write to a cluster needs a new one.
    #[must_use]
    pub fn makes_writes_allocate(self) -> bool {
        !matches!(self, Self::Data | Self::ZeroAllocated)
    }
}

/// A variant of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// "0.10" or "1.1".
    pub compat: &'static str,
    /// 1 to 64.
    pub refcount_bits: u32,
    /// The compatible feature bit.
    pub lazy_refcounts: bool,
    /// Sectors of a cluster.
    pub cluster_sectors: usize,
}

impl Variant {
    /// The variants that are simulated.
    pub const ALL: [Self; 7] = [
        Self::COMMON,
        Self { refcount_bits: 1, ..Self::COMMON },
        Self { refcount_bits: 64, ..Self::COMMON },
        Self { compat: "0.10", ..Self::COMMON },
        Self { lazy_refcounts: true, ..Self::COMMON },
        Self::SMALL_BLOCKS,
        Self::LARGE,
    ];
    /// A refcount block counts 64 clusters only: new ones are made all the time.
    pub const SMALL_BLOCKS: Self = Self { refcount_bits: 64, cluster_sectors: 1, ..Self::COMMON };
    /// Several lanes meet in one cluster, it has an autoclear bit that nobody knows, and an incompatible one that
    /// says how compressed clusters are packed.
    pub const LARGE: Self = Self { cluster_sectors: 8, ..Self::COMMON };
    const COMMON: Self = Self { compat: "1.1", refcount_bits: 16, lazy_refcounts: false, cluster_sectors: 2 };

    /// For messages.
    #[must_use]
    pub fn name(&self) -> String {
        format!(
            "compat={} refcount_bits={} lazy={} cluster={}",
            self.compat,
            self.refcount_bits,
            self.lazy_refcounts,
            self.cluster_sectors * SECTOR
        )
    }

    /// What `qemu-img -o` takes.
    pub(super) fn options(&self) -> String {
        let options = format!(
            "cluster_size={},compat={},refcount_bits={},lazy_refcounts={}",
            self.cluster_sectors * SECTOR,
            self.compat,
            self.refcount_bits,
            if self.lazy_refcounts { "on" } else { "off" }
        );
        if *self == Self::LARGE { options + ",compression_type=zstd" } else { options }
    }

    /// Whether QEMU can make an image of this variant in this state.
    #[must_use]
    pub fn can_be(&self, initial: Initial) -> bool {
        match initial {
            Initial::ZeroPlain | Initial::ZeroAllocated => self.compat == "1.1",
            // Compressed clusters share host clusters, snapshots share everything.
            Initial::Compressed | Initial::Shared => self.refcount_bits > 1,
            Initial::SharedZero => self.compat == "1.1" && self.refcount_bits > 1,
            Initial::Mixed => self.compat == "1.1" && self.refcount_bits > 1 && !self.lazy_refcounts,
            Initial::OverFile | Initial::OverChain => self.refcount_bits != 1 && !self.lazy_refcounts,
            Initial::Unallocated | Initial::Backing | Initial::Data => true,
        }
    }
}

/// What an image has been through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// It is as qemu-img made it.
    Made,
    /// The same, but so large that its refcount table is nearly full.
    MadeFull,
    /// A crash has left it, with leaks.
    Crashed,
    /// A loss of power has left it, and behind its end what was written to clusters that nobody had counted
    /// yet.
    Tailed,
    /// A crash has left it, with leaks nearly up to where its refcount table ends.
    CrashedFull,
    /// Somebody has begun to delete a snapshot: clusters that are in use are counted twice, and no entry says that
    /// they have one owner.
    CountedTwice,
}

impl Past {
    /// Whether the image has leaks.
    #[must_use]
    pub fn leaks(self) -> bool {
        matches!(self, Self::Crashed | Self::CrashedFull | Self::CountedTwice)
    }

    /// Whether some of them are none for the search: an entry would have to change.
    #[must_use]
    pub fn keeps_leaks(self) -> bool {
        self == Self::CountedTwice
    }

    /// Whether the image is so large that to search it takes long.
    #[must_use]
    pub fn is_large(self) -> bool {
        matches!(self, Self::MadeFull | Self::CrashedFull)
    }
}

/// A file of the chain below an image.
#[derive(Clone, Debug)]
pub struct Below {
    /// The name by which the file above it knows it.
    pub name: &'static str,
    /// The file.
    pub bytes: Vec<u8>,
}

/// An image and what its sectors hold.
#[derive(Clone, Debug)]
pub struct Fixture {
    /// For messages.
    pub name: String,
    /// The state of its clusters, but for what the past has changed.
    pub initial: Initial,
    /// Its variant of the format.
    pub variant: Variant,
    /// The image file.
    pub image: Vec<u8>,
    /// What the files below it show together.
    pub backing: Option<Vec<u8>>,
    /// Those files.
    pub below: Vec<Below>,
    /// The content of the virtual disk.
    pub content: Vec<Value>,
    /// What every sector holds in each internal snapshot.
    pub snapshots: Vec<Vec<Value>>,
    /// What it has been through.
    pub past: Past,
    /// Whether it can discard: not with version 2 and a backing file.
    pub can_discard: bool,
    /// Sectors of the disk that no request is meant for ([`super::wide`]).
    pub gap: usize,
    /// Sectors at the end of the file that have no space on the host.
    pub hole: usize,
}

impl Fixture {
    /// Whether it has autoclear bits that nobody knows, so that until the first change something may be
    /// counted that the search for leaks cannot know of.
    #[must_use]
    pub fn has_autoclear_bits(&self) -> bool {
        self.image[AUTOCLEAR_AT] & UNKNOWN_BIT != 0
    }

    /// Whether a search has to find all that has leaked.
    #[must_use]
    pub fn shows_leaks(&self) -> bool {
        !self.has_autoclear_bits() && !self.past.keeps_leaks()
    }

    /// Whether it has bitmaps that are true.
    #[must_use]
    pub fn has_bitmaps(&self) -> bool {
        u64::from(self.image[AUTOCLEAR_AT + 7]) & header::BITMAPS != 0
    }

    /// Whether its refcount blocks and its refcount table can be filled with little: they are small.
    #[must_use]
    pub fn is_fillable(&self) -> bool {
        self.variant == Variant::SMALL_BLOCKS && self.initial.makes_writes_allocate() && self.gap == 0
    }

    /// The names of the image and of the files below it.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        [IMAGE].into_iter().chain(self.below.iter().map(|file| file.name)).collect()
    }

    /// A disk with this image, durable, and the files below it.
    #[must_use]
    pub fn disk(&self, image: &[u8]) -> Disk {
        let below = self.below.iter().map(|file| &*file.bytes);
        let disk = Disk::new(&[image].into_iter().chain(below).collect::<Vec<_>>());
        disk.look(0, |file, _| file.give_up_end(self.hole));
        disk
    }

    /// Its disk.
    #[must_use]
    pub fn shape(&self) -> Shape {
        let cluster_sectors = self.variant.cluster_sectors;
        Shape { sectors: self.content.len(), cluster_sectors, gap: self.gap }
    }

    /// Whether a request can be carried out on it.
    #[must_use]
    pub fn takes(&self, request: &Request) -> bool {
        self.can_discard || !matches!(request, Request::Discard(..))
    }
}

/// Makes images in `directory`.
pub struct Maker {
    pub(super) directory: PathBuf,
}

impl Maker {
    /// A maker that works in an existing directory.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Makes an image with the real qemu-img.
    ///
    /// # Errors
    /// qemu-img or qemu-io is missing, or fails.
    pub fn make(&self, variant: Variant, initial: Initial) -> io::Result<Fixture> {
        match initial {
            Initial::Mixed => return self.make_mixed(variant),
            Initial::OverFile | Initial::OverChain => return self.make_over_chain(variant, initial),
            _ => {}
        }
        let stamps: Vec<Value> = stamps(INITIAL, 0..SECTORS).collect();
        let raw: Vec<u8> = stamps.iter().flat_map(|value| value.bytes()).collect();
        let base = raw[..BACKING_SECTORS * SECTOR + BACKING_REST].to_vec();
        let content: Vec<Value> = match initial {
            Initial::Data | Initial::Compressed | Initial::Shared => stamps,
            Initial::Backing => {
                let zeros = vec![Value::Zero; SECTORS - BACKING_SECTORS - 1];
                // A part of a stamp, which is none.
                stamps.into_iter().take(BACKING_SECTORS).chain([Value::Foreign]).chain(zeros).collect()
            }
            _ => vec![Value::Zero; SECTORS],
        };
        std::fs::write(self.directory.join("raw"), &raw)?;
        std::fs::write(self.directory.join(BASE), &base)?;
        self.make_file(variant, initial)?;
        let backing = (initial == Initial::Backing).then_some(base);
        if initial.is_shared() {
            self.qemu_img(&["snapshot", "-c", "first", IMAGE])?;
        }
        Ok(Fixture {
            name: format!("{initial:?} {}", variant.name()),
            initial,
            variant,
            image: self.made(variant)?,
            can_discard: variant.compat == "1.1" || backing.is_none(),
            below: backing.iter().map(|bytes| Below { name: BASE, bytes: bytes.clone() }).collect(),
            backing: backing.map(|mut bytes| {
                bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
                bytes
            }),
            snapshots: if initial.is_shared() { vec![content.clone()] } else { Vec::new() },
            content,
            past: Past::Made,
            gap: 0,
            hole: 0,
        })
    }

    /// The file itself, from `raw` or over `base`.
    fn make_file(&self, variant: Variant, initial: Initial) -> io::Result<()> {
        let (options, size) = (variant.options(), (SECTORS * SECTOR).to_string());
        let to_qcow2 = ["-O", "qcow2", "-o", &options, "raw", IMAGE];
        match initial {
            Initial::Unallocated => self.qemu_img(&["create", "-f", "qcow2", "-o", &options, IMAGE, &size]),
            Initial::Backing => {
                let over_base = ["-b", BASE, "-F", "raw", IMAGE, &size];
                self.qemu_img(&[&["create", "-f", "qcow2", "-o", &options], &over_base[..]].concat())
            }
            Initial::Data | Initial::Shared => {
                self.qemu_img(&[&["convert", "-f", "raw"], &to_qcow2[..]].concat())
            }
            Initial::Compressed => self.qemu_img(&[&["convert", "-c", "-f", "raw"], &to_qcow2[..]].concat()),
            Initial::ZeroPlain
            | Initial::ZeroAllocated
            | Initial::SharedZero
            | Initial::Mixed
            | Initial::OverFile
            | Initial::OverChain => {
                self.qemu_img(&["create", "-f", "qcow2", "-o", &options, IMAGE, &size])?;
                let write = if initial == Initial::ZeroPlain { "write -z -u 0 " } else { "write -z 0 " };
                if initial != Initial::ZeroPlain {
                    self.run("qemu-io", &["-f", "qcow2", "-c", &format!("write 0 {size}"), IMAGE])?;
                }
                self.run("qemu-io", &["-f", "qcow2", "-c", &format!("{write}{size}"), IMAGE])
            }
        }
    }

    /// The image that is in the directory.
    pub(super) fn made(&self, variant: Variant) -> io::Result<Vec<u8>> {
        if variant.lazy_refcounts {
            // The bits of the one are true until something is changed, and nothing else is told of that; those of
            // the other always.
            self.qemu_img(&["bitmap", "--add", IMAGE, "changes"])?;
            self.qemu_img(&["bitmap", "--add", "--disable", IMAGE, "before"])?;
        }
        let mut image = std::fs::read(self.directory.join(IMAGE))?;
        if variant == Variant::LARGE {
            // A bit that nobody knows: it says that no content has changed since it was set.
            image[AUTOCLEAR_AT] |= UNKNOWN_BIT;
        }
        Ok(image)
    }

    /// An image whose refcount table is nearly full, so that the next clusters make it grow: every
    /// write has to allocate, because a snapshot shares all there is.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub fn make_full_table(&self) -> io::Result<Fixture> {
        // 512-byte clusters and 64-bit counts: a table of one cluster reaches 4096 clusters.
        const FULL_SECTORS: usize = 3920;
        let content: Vec<Value> = (0..FULL_SECTORS)
            .map(|sector| Value::Stamp { request: INITIAL, sector: sector as u32 })
            .collect();
        let raw: Vec<u8> = content.iter().flat_map(|value| value.bytes()).collect();
        std::fs::write(self.directory.join("raw"), &raw)?;
        let options = "cluster_size=512,refcount_bits=64";
        self.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", options, "raw", IMAGE])?;
        self.qemu_img(&["snapshot", "-c", "first", IMAGE])?;
        let image = std::fs::read(self.directory.join(IMAGE))?;
        if !(4040..4096).contains(&(image.len() / SECTOR)) {
            return Err(io::Error::other(format!(
                "the image has {} clusters, not a few below 4096",
                image.len() / SECTOR
            )));
        }
        Ok(Fixture {
            name: "FullTable".into(),
            image,
            backing: None,
            below: Vec::new(),
            snapshots: vec![content.clone()],
            content,
            past: Past::MadeFull,
            initial: Initial::Shared,
            variant: Variant::SMALL_BLOCKS,
            can_discard: true,
            gap: 0,
            hole: 0,
        })
    }

    pub(super) fn qemu_img(&self, args: &[&str]) -> io::Result<()> {
        self.run("qemu-img", args)
    }

    pub(super) fn run(&self, program: &str, args: &[&str]) -> io::Result<()> {
        let output = Command::new(program).args(args).current_dir(&self.directory).output()?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(io::Error::other(format!("{program} {}: {text}", args.join(" "))))
    }
}
