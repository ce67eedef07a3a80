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
    DataFile,
    Preallocated,
}

use Extra::{Bitmap, Compressed, DataFile, Preallocated, Qcow2Base, RawBase, Snapshots};

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
    let has = |extra| recipe.extras.contains(&extra);
    let (cluster, size) = (recipe.cluster, disk_bytes(recipe.cluster));
    let tool = |name: &str, args: &[&str]| tool(directory, name, args);
    let mut options = recipe.options.to_owned();
    let mut others = Vec::new();
    let mut create = vec!["create", "-q", "-f", "qcow2"];
    if has(RawBase) || has(Qcow2Base) {
        let format = if has(RawBase) { "raw" } else { "qcow2" };
        tool("qemu-img", &["create", "-q", "-f", format, "base", &(size / 2).to_string()])?;
        tool("qemu-io", &["-f", format, "-c", &format!("write -P 0xbb 0 {}", size / 4), "base"])?;
        create.extend(["-b", "base", "-F", format]);
        others.push("base");
    }
    if has(DataFile) {
        options += ",data_file=data.raw";
        others.push("data.raw");
    }
    let size_text = size.to_string();
    create.extend(["-o", &options, IMAGE, &size_text]);
    tool("qemu-img", &create)?;
    let io = |commands: &[String]| {
        let mut args = vec!["-f", "qcow2"];
        commands.iter().for_each(|command| args.extend(["-c", command]));
        args.push(IMAGE);
        tool("qemu-io", &args)
    };
    if !has(Preallocated) {
        io(&[
            format!("write -P 1 0 {}", 3 * cluster),
            format!("write -P 2 {} 512", size - cluster),
            format!("write -P 3 {} {}", size / 2, 4 * cluster),
            format!("write -z {} {cluster}", cluster * 2),
            format!("discard {} {cluster}", size / 2 + cluster),
        ])?;
    }
    if has(Compressed) {
        io(&[format!("write -c -P 7 {} {}", 5 * cluster, 4 * cluster)])?;
        // Bytes that do not compress to almost nothing.
        let noise: Vec<u8> =
            (0..2 * cluster).map(|at| (at.wrapping_mul(at ^ 0x5bd1) >> 7) as u8 & 0x1f).collect();
        fs::write(directory.join("noise"), noise)?;
        io(&[format!("write -c -s noise {} {}", 10 * cluster, 2 * cluster)])?;
        fs::remove_file(directory.join("noise"))?;
    }
    if has(Snapshots) {
        tool("qemu-img", &["snapshot", "-c", "one", IMAGE])?;
        io(&[format!("write -P 4 {cluster} {cluster}"), format!("write -P 5 {} {cluster}", 12 * cluster)])?;
        tool("qemu-img", &["snapshot", "-c", "two", IMAGE])?;
        io(&[format!("write -P 6 {} {}", 13 * cluster, 2 * cluster)])?;
    }
    if has(Bitmap) {
        tool("qemu-img", &["bitmap", "--add", "-g", "4096", IMAGE, "b0"])?;
        io(&[format!("write -P 8 {} {cluster}", 6 * cluster)])?;
    }
    let others = others.into_iter().map(|name| Ok((name.to_owned(), fs::read(directory.join(name))?)));
    let extras = [
        (Compressed, "compressed"),
        (Snapshots, "snapshots"),
        (Bitmap, "bitmap"),
        (RawBase, "raw base"),
        (Qcow2Base, "qcow2 base"),
        (DataFile, "data file"),
        (Preallocated, "preallocated"),
    ];
    let extras = extras.iter().filter(|(extra, _)| has(*extra)).map(|(_, name)| format!(", {name}"));
    Ok(Sample {
        name: recipe.options.to_owned() + &extras.collect::<String>(),
        bytes: fs::read(directory.join(IMAGE))?,
        others: others.collect::<io::Result<_>>()?,
    })
}

fn tool(directory: &Path, name: &str, args: &[&str]) -> io::Result<()> {
    let finished = process::run(Command::new(name).args(args), directory, Duration::from_secs(60))?;
    if finished.ending == Ending::Code(0) {
        return Ok(());
    }
    Err(io::Error::other(format!("{name} {args:?}: {}{}", finished.output, finished.errors)))
}
