//! Sound images of every kind that the real tools make.

use super::process::{self, Ending};
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// A sound image.
#[derive(Clone, Debug)]
pub struct Sample {
    /// What it is, for messages.
    pub name: String,
    /// The file's bytes.
    pub bytes: Vec<u8>,
    /// Files that it refers to, by name.
    pub others: Vec<(String, Vec<u8>)>,
}

/// Name of the image in every directory.
pub const IMAGE: &str = "image.qcow2";

/// A recipe: options of `qemu-img create`, the disk's size in clusters, and what is done then.
struct Recipe {
    options: &'static str,
    cluster: u64,
    extras: &'static [Extra],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Extra {
    Compressed,
    Snapshots,
    Bitmap,
    RawBase,
    Qcow2Base,
    /// Layers of different cluster sizes, and smaller disks, below the image.
    Chain,
    DataFile,
    Preallocated,
}

use Extra::{Bitmap, Chain, Compressed, DataFile, Preallocated, Qcow2Base, RawBase, Snapshots};

const K: u64 = 1024;

const RECIPES: &[Recipe] = &[
    Recipe { options: "compat=1.1", cluster: 64 * K, extras: &[] },
    Recipe { options: "compat=0.10", cluster: 64 * K, extras: &[Snapshots] },
    Recipe { options: "compat=0.10,cluster_size=512", cluster: 512, extras: &[Compressed] },
    Recipe { options: "compat=1.1,cluster_size=512", cluster: 512, extras: &[Snapshots] },
    Recipe { options: "compat=1.1,cluster_size=512,refcount_bits=1", cluster: 512, extras: &[] },
    Recipe {
        options: "compat=1.1,cluster_size=512,refcount_bits=64",
        cluster: 512,
        extras: &[Compressed, Snapshots],
    },
    Recipe { options: "compat=1.1,cluster_size=4k,refcount_bits=2", cluster: 4 * K, extras: &[Snapshots] },
    Recipe { options: "compat=1.1,cluster_size=4k,refcount_bits=32", cluster: 4 * K, extras: &[Bitmap] },
    Recipe {
        options: "compat=1.1,cluster_size=4k,lazy_refcounts=on",
        cluster: 4 * K,
        extras: &[Snapshots, Bitmap],
    },
    Recipe { options: "compat=1.1,cluster_size=4k", cluster: 4 * K, extras: &[RawBase] },
    Recipe { options: "compat=0.10,cluster_size=4k", cluster: 4 * K, extras: &[Qcow2Base] },
    Recipe { options: "compat=1.1,cluster_size=512", cluster: 512, extras: &[Qcow2Base, Snapshots] },
    Recipe { options: "compat=1.1,cluster_size=4k", cluster: 4 * K, extras: &[Chain, Compressed] },
    Recipe { options: "compat=0.10,cluster_size=64k", cluster: 64 * K, extras: &[Chain] },
    Recipe { options: "compat=1.1,cluster_size=4k", cluster: 4 * K, extras: &[Compressed, Snapshots] },
    Recipe {
        options: "compat=1.1,cluster_size=4k,compression_type=zstd",
        cluster: 4 * K,
        extras: &[Compressed],
    },
    Recipe {
        options: "compat=1.1,cluster_size=64k,compression_type=zstd",
        cluster: 64 * K,
        extras: &[Compressed],
    },
    Recipe { options: "compat=1.1,cluster_size=2M", cluster: 2048 * K, extras: &[] },
    Recipe { options: "compat=1.1,cluster_size=16k,extended_l2=on", cluster: 16 * K, extras: &[Snapshots] },
    Recipe { options: "compat=1.1,cluster_size=4k", cluster: 4 * K, extras: &[DataFile] },
    Recipe {
        options: "compat=1.1,cluster_size=4k,preallocation=metadata",
        cluster: 4 * K,
        extras: &[Preallocated],
    },
    Recipe {
        options: "compat=1.1,cluster_size=512,preallocation=falloc",
        cluster: 512,
        extras: &[Preallocated, Snapshots],
    },
];

/// Clusters of a disk: several L2 tables' worth where clusters are small.
fn disk_bytes(cluster: u64) -> u64 {
    match cluster {
        512 => 256 * K,
        4096 => 5 * K * K,
        16384 => 40 * K * K,
        65536 => 24 * cluster,
        _ => 8 * cluster,
    }
}

/// Makes all samples in a directory.
///
/// # Errors
/// qemu-img or qemu-io is missing, or fails.
pub fn make(directory: &Path) -> io::Result<Vec<Sample>> {
    let made = |(index, recipe)| {
        let directory: PathBuf = directory.join(format!("sample{index}"));
        fs::create_dir(&directory)?;
        recipe_made(&directory, recipe)
    };
    (0..).zip(RECIPES).map(made).collect()
}

fn recipe_made(directory: &Path, recipe: &Recipe) -> io::Result<Sample> {
    let bench = Bench { directory, recipe, size: disk_bytes(recipe.cluster) };
    let others = bench.create()?;
    bench.fill()?;
    bench.add_extras()?;
    let others = others.into_iter().map(|name| Ok((name.to_owned(), fs::read(directory.join(name))?)));
    let extras = NAMES.iter().filter(|(extra, _)| bench.has(*extra)).map(|(_, name)| format!(", {name}"));
    Ok(Sample {
        name: recipe.options.to_owned() + &extras.collect::<String>(),
        bytes: fs::read(directory.join(IMAGE))?,
        others: others.collect::<io::Result<_>>()?,
    })
}

/// The layers of a chain, the lowest first, and the sizes of their clusters.
const LAYERS: [(&str, &str); 4] = [("base", "512"), ("second", "64k"), ("third", "4k"), ("fourth", "1k")];

const NAMES: [(Extra, &str); 8] = [
    (Compressed, "compressed"),
    (Snapshots, "snapshots"),
    (Bitmap, "bitmap"),
    (RawBase, "raw base"),
    (Qcow2Base, "qcow2 base"),
    (Chain, "chain"),
    (DataFile, "data file"),
    (Preallocated, "preallocated"),
];

/// Where one sample is made.
struct Bench<'a> {
    directory: &'a Path,
    recipe: &'a Recipe,
    /// Bytes of the disk.
    size: u64,
}

impl Bench<'_> {
    fn has(&self, extra: Extra) -> bool {
        self.recipe.extras.contains(&extra)
    }

    fn qemu_img(&self, args: &[&str]) -> io::Result<()> {
        tool(self.directory, "qemu-img", args)
    }

    /// Has qemu-io carry commands out on the image.
    fn io(&self, commands: &[String]) -> io::Result<()> {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let args: Vec<_> = ["-f", "qcow2"].into_iter().chain(commands).chain([IMAGE]).collect();
        tool(self.directory, "qemu-io", &args)
    }

    /// Makes the image, and the files that it needs, whose names it returns.
    fn create(&self) -> io::Result<Vec<&'static str>> {
        let mut options = self.recipe.options.to_owned();
        let mut others = Vec::new();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if self.has(RawBase) || self.has(Qcow2Base) {
            let format = if self.has(RawBase) { "raw" } else { "qcow2" };
            self.qemu_img(&["create", "-q", "-f", format, "base", &(self.size / 2).to_string()])?;
            let write = format!("write -P 0xbb 0 {}", self.size / 4);
            tool(self.directory, "qemu-io", &["-f", format, "-c", &write, "base"])?;
            args.extend(["-b", "base", "-F", format]);
            others.push("base");
        }
        if self.has(Chain) {
            others.extend(self.chain()?);
            args.extend(["-b", others[others.len() - 1], "-F", "qcow2"]);
        }
        if self.has(DataFile) {
            options += ",data_file=data.raw";
            others.push("data.raw");
        }
        let size = self.size.to_string();
        args.extend(["-o", &options, IMAGE, &size]);
        self.qemu_img(&args)?;
        Ok(others)
    }

    /// Makes the layers below the image, each with data of its own; their names.
    fn chain(&self) -> io::Result<impl Iterator<Item = &'static str>> {
        for (index, (name, cluster_size)) in (1..).zip(LAYERS) {
            let (options, size) = (format!("cluster_size={cluster_size}"), self.size / 8 * (index + 3) + 512);
            let size = size.to_string();
            let below = (index as usize).checked_sub(2).map(|below| ["-b", LAYERS[below].0, "-F", "qcow2"]);
            let below = below.as_ref().map_or(&[][..], |args| args);
            let args = ["create", "-q", "-f", "qcow2", "-o", &options];
            self.qemu_img(&[&args[..], below, &[name, &size]].concat())?;
            let at = self.size / 16 * index / 512 * 512;
            let write = format!("write -P {} {at} {}", 0xb0 + index, self.size / 8 / 512 * 512);
            let zero = format!("write -z {} {}", at + self.size / 16 / 512 * 512, self.size / 64 / 512 * 512);
            tool(self.directory, "qemu-io", &["-f", "qcow2", "-c", &write, "-c", &zero, name])?;
        }
        Ok(LAYERS.into_iter().map(|(name, _)| name))
    }

    /// Writes to the image, and lets go of some of it.
    fn fill(&self) -> io::Result<()> {
        let (cluster, size) = (self.recipe.cluster, self.size);
        if !self.has(Preallocated) {
            self.io(&[
                format!("write -P 1 0 {}", 3 * cluster),
                format!("write -P 2 {} 512", size - cluster),
                format!("write -P 3 {} {}", size / 2, 4 * cluster),
                format!("write -z {} {cluster}", cluster * 2),
                format!("discard {} {cluster}", size / 2 + cluster),
            ])?;
        }
        if self.has(Compressed) {
            self.io(&[format!("write -c -P 7 {} {}", 5 * cluster, 4 * cluster)])?;
            // Bytes that do not compress to almost nothing.
            let noise: Vec<u8> =
                (0..2 * cluster).map(|at| (at.wrapping_mul(at ^ 0x5bd1) >> 7) as u8 & 0x1f).collect();
            fs::write(self.directory.join("noise"), noise)?;
            self.io(&[format!("write -c -s noise {} {}", 10 * cluster, 2 * cluster)])?;
            fs::remove_file(self.directory.join("noise"))?;
        }
        Ok(())
    }

    /// Takes snapshots and adds a bitmap, with writes between them.
    fn add_extras(&self) -> io::Result<()> {
        let cluster = self.recipe.cluster;
        if self.has(Snapshots) {
            self.qemu_img(&["snapshot", "-c", "one", IMAGE])?;
            self.io(&[
                format!("write -P 4 {cluster} {cluster}"),
                format!("write -P 5 {} {cluster}", 12 * cluster),
            ])?;
            self.qemu_img(&["snapshot", "-c", "two", IMAGE])?;
            self.io(&[format!("write -P 6 {} {}", 13 * cluster, 2 * cluster)])?;
        }
        if self.has(Bitmap) {
            self.qemu_img(&["bitmap", "--add", "-g", "4096", IMAGE, "b0"])?;
            self.io(&[format!("write -P 8 {} {cluster}", 6 * cluster)])?;
        }
        Ok(())
    }
}

fn tool(directory: &Path, name: &str, args: &[&str]) -> io::Result<()> {
    let finished = process::run(Command::new(name).args(args), directory, Duration::from_secs(60))?;
    if finished.ending == Ending::Code(0) {
        return Ok(());
    }
    Err(io::Error::other(format!("{name} {args:?}: {}{}", finished.output, finished.errors)))
}
