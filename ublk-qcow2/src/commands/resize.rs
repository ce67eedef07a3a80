//! `resize`: a larger virtual disk.

use super::{CommandError, image::Tool};
use crate::{
    cli::{BackingArgs, parse_size},
    runfile,
};
use clap::Args;
use qcow2_engine::{
    grow, grow_by,
    io::files::{Caching, Locking},
};
use std::{
    io::{self, Write},
    path::PathBuf,
};

#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct ResizeArgs {
    #[command(flatten)]
    backing: BackingArgs,
    /// The format of the image.
    #[arg(short, long, value_name = "FORMAT", default_value = "qcow2", value_parser = ["qcow2"], hide = true)]
    format: String,
    /// The image.
    image: PathBuf,
    /// The new size of the disk, in bytes or with a suffix K, M, G, T; with a + in front, by how much it
    /// grows. It is a multiple of 512, and cannot be smaller than before.
    #[arg(value_name = "[+]SIZE", value_parser = parse_new_size)]
    size: NewSize,
}

/// What is to become of a disk's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NewSize {
    Is(u64),
    GrowsBy(u64),
}

fn parse_new_size(text: &str) -> Result<NewSize, String> {
    let (kind, size): (fn(u64) -> NewSize, _) = match text.strip_prefix('+') {
        Some(more) => (NewSize::GrowsBy, parse_size(more)?),
        None => (NewSize::Is, parse_size(text)?),
    };
    if size % 512 != 0 {
        return Err("it must be a multiple of 512".to_owned());
    }
    Ok(kind(size))
}

pub(crate) fn run(args: &ResizeArgs) -> Result<(), CommandError> {
    runfile::refuse_served(&args.image)?;
    let tool = Tool::new(Caching::Auto, Locking::AsQemu)?;
    let (ring, files, image) = (tool.ring.clone(), &*tool.files, &args.image);
    let options = args.backing.open_options();
    match args.size {
        NewSize::Is(size) => tool.run(grow(ring, files, image, &options, size)),
        NewSize::GrowsBy(bytes) => tool.run(grow_by(ring, files, image, &options, bytes)),
    }?;
    Ok(writeln!(io::stdout(), "Image resized.")?)
}
