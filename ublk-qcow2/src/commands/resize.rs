//! `resize`: a larger virtual disk.

use super::{
    CommandError,
    image::{Tool, refuse_served},
};
use crate::cli::parse_size;
use clap::Args;
use qcow2_engine::{
    grow,
    io::files::{Caching, Locking},
};
use std::{
    io::{self, Write},
    path::PathBuf,
};

#[derive(Debug, Args)]
pub(crate) struct ResizeArgs {
    /// The image.
    image: PathBuf,
    /// The new size of the disk, in bytes or with a suffix K, M, G, T; it cannot be smaller than before.
    #[arg(value_parser = parse_size)]
    size: u64,
}

pub(crate) fn run(args: &ResizeArgs) -> Result<(), CommandError> {
    refuse_served(&args.image)?;
    let tool = Tool::new(Caching::Auto, Locking::AsQemu)?;
    tool.run(grow(tool.ring.clone(), &*tool.files, &args.image, args.size))?;
    Ok(writeln!(io::stdout(), "Image resized.")?)
}
