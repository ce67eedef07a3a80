//! `cargo xtask demo`: shows the product at work on a real block device, step by step, and ends with QEMU's
//! verdict.
//!
//! The story itself is told by guest/demo.sh, and for the user's own image by guest/demo-image.sh.

use crate::{
    kernel::Kernel,
    place::{Job, Place},
    process::{capture, program},
    vm::machine::{Access, Disk},
    workspace,
};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

const LIB: &str = include_str!("../guest/lib.sh");
const STORY: &str = include_str!("../guest/demo.sh");
const STORY_OF_AN_IMAGE: &str = include_str!("../guest/demo-image.sh");
/// The story takes about two minutes in an emulated machine.
const STORY_LIMIT: Duration = Duration::from_secs(900);
/// What an emulated machine needs at worst to copy and compare one GiB.
const SECONDS_PER_GIB: u64 = 60;

/// Options of `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Read this image of yours instead of making one; it is not changed
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Use the virtual machine with this kernel, even where the host could
    #[arg(long, value_enum)]
    kernel: Option<Kernel>,
    /// Use this program instead of building ublk-qcow2
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

/// Runs `cargo xtask demo`.
///
/// # Errors
/// Fails when the demonstration cannot be run; one that ends badly gives a failure's exit code.
pub(crate) fn command(options: &Options) -> Result<ExitCode> {
    let place = Place::choose(options.kernel);
    place.prepare()?;
    let binary = match &options.binary {
        Some(binary) => std::path::absolute(binary)?,
        None => workspace::build_release("ublk-qcow2", "ublk-qcow2")?,
    };
    println!("The demonstration runs on {place}.");
    let story = if options.image.is_some() { STORY_OF_AN_IMAGE } else { STORY };
    let script = format!("{LIB}\n{story}");
    let job = Job::new(&script, STORY_LIMIT).program(&binary);
    let job = match &options.image {
        Some(image) => with_chain(job, &chain_of(image)?)?,
        None => job,
    };
    let finished = job.run(place)?;
    Ok(if finished.status == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One file of a backing chain.
struct Link {
    path: PathBuf,
    virtual_bytes: u64,
}

/// The image and its backing files, top first, by their absolute paths.
fn chain_of(image: &Path) -> Result<Vec<Link>> {
    let image = std::path::absolute(image)?;
    let text =
        capture(program("qemu-img")?.args(["info", "-U", "--backing-chain", "--output=json"]).arg(&image))?;
    let chain: serde_json::Value = serde_json::from_str(&text).context("qemu-img info wrote no JSON")?;
    let mut links = Vec::new();
    for info in chain.as_array().context("qemu-img info wrote no list")? {
        let name = info["filename"].as_str().context("qemu-img info names no file")?;
        let format = info["format"].as_str().unwrap_or_default();
        if links.is_empty() && format != "qcow2" {
            bail!("{} is a {format} image; ublk-qcow2 serves qcow2", image.display());
        }
        let virtual_bytes = info["virtual-size"].as_u64().context("qemu-img info gives no size")?;
        let path = std::path::absolute(name)?;
        if !path.is_file() {
            bail!("{} is not a regular file", path.display());
        }
        links.push(Link { path, virtual_bytes });
    }
    Ok(links)
}

/// Gives the job every file of the chain, room for a copy of each, and the time that this takes.
fn with_chain<'a>(mut job: Job<'a>, chain: &[Link]) -> Result<Job<'a>> {
    let mut list = Vec::new();
    let mut file_bytes = 0;
    for (index, link) in chain.iter().enumerate() {
        let name = format!("image{index}");
        let len = fs::metadata(&link.path)?.len();
        file_bytes += len;
        list.push(format!("{name}\t{len}\t{}", link.path.display()));
        job = job.disk(Disk { name, path: link.path.clone(), access: Access::ReadOnly });
    }
    let gib = |bytes: u64| bytes.div_ceil(1 << 30);
    job.scratch_gib = u32::try_from(gib(file_bytes) + 8).context("the image is too large for the machine")?;
    let virtual_bytes = chain.first().map_or(0, |link| link.virtual_bytes);
    job.time_limit += Duration::from_secs(SECONDS_PER_GIB * (gib(file_bytes) + gib(virtual_bytes)));
    Ok(job.variable("IMAGES", &list.join("\n")))
}
