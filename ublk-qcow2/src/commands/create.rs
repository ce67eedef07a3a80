//! `create`: a new, empty image, with the options of `qemu-img create -f qcow2`.

mod options;

use super::{CommandError, image::Tool};
use crate::{cli::parse_size, runfile};
use clap::Args;
use options::Options;
use qcow2_engine::{
    create, has_protocol,
    io::files::{Caching, Locking},
};
use qcow2_format::{Blueprint, CreateOptions};
use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct CreateArgs {
    /// Options, as key=value[,key=value...]; `-o help` lists them.
    #[arg(short = 'o', value_name = "OPTIONS", value_parser = options::parse)]
    options: Vec<Options>,
    /// The image that the new one overlays; a relative name is relative to the new image.
    #[arg(short = 'b', long, value_name = "BACKING")]
    backing_file: Option<PathBuf>,
    /// Format of the backing file: it is never guessed.
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = ["qcow2", "raw"])]
    backing_format: Option<String>,
    /// Do not look at the backing file; the size must then be given.
    #[arg(short = 'u', long)]
    unsafe_backing: bool,
    /// Print nothing.
    #[arg(short, long)]
    quiet: bool,
    /// The format of the new image.
    #[arg(short, long, value_name = "FORMAT", default_value = "qcow2", value_parser = ["qcow2"], hide = true)]
    format: String,
    /// The new image. An existing file is overwritten.
    #[arg(required_unless_present = "options")]
    file: Option<PathBuf>,
    /// Size of the disk, in bytes or with a suffix K, M, G, T; by default that of the backing file.
    #[arg(value_parser = parse_size)]
    size: Option<u64>,
}

/// Makes the image, or lists the options.
pub(crate) fn run(args: &CreateArgs) -> Result<(), CommandError> {
    let options = Options::merged(args)?;
    if options.lists {
        return Ok(io::stdout().lock().write_all(options::LIST.as_bytes())?);
    }
    let file = args.file.as_deref().ok_or_else(|| CommandError::Usage("no file is named".into()))?;
    refuse_protocol(file)?;
    let backing = options.backing()?;
    let size = options.size(args, file, backing.as_ref())?;
    let (options, preallocation) = options.checked(size, backing)?;
    // The rest of the options is judged before a file is made or emptied.
    let blueprint = Blueprint::new(&options).map_err(|error| CommandError::Usage(error.to_string()))?;
    refuse_own_backing_file(file, &options)?;
    runfile::refuse_served(file)?;
    if !args.quiet {
        writeln!(io::stdout(), "{}", summary(file, &options, blueprint.header().virtual_size))?;
    }
    let place = Place::make(file)?;
    let tool = Tool::new(Caching::Buffered, Locking::AsQemu)?;
    tool.run(create::create(&tool.ring, &*tool.files, file, &options, preallocation))?;
    place.keep();
    Ok(())
}

/// The file of the new image; one that was made for it goes again unless it is kept.
struct Place<'a> {
    path: &'a Path,
    is_temporary: bool,
}

impl<'a> Place<'a> {
    fn make(path: &'a Path) -> Result<Self, CommandError> {
        match OpenOptions::new().write(true).create_new(true).open(path) {
            Ok(_) => Ok(Self { path, is_temporary: true }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Ok(Self { path, is_temporary: false })
            }
            Err(source) => Err(CommandError::Path { path: path.display().to_string(), source }),
        }
    }

    fn keep(mut self) {
        self.is_temporary = false;
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.is_temporary {
            // The command has failed and says why; that this fails too would only hide it.
            let _ = fs::remove_file(self.path);
        }
    }
}

/// What QEMU takes for a protocol would become a file of that name here.
fn refuse_protocol(file: &Path) -> Result<(), CommandError> {
    if has_protocol(file.as_os_str().as_bytes()) {
        let name = file.display();
        return Err(CommandError::Usage(format!(
            "'{name}' begins with the name of a protocol, and none is served: './{name}' is a file"
        )));
    }
    Ok(())
}

/// Overwriting the very file that the image is to overlay would destroy both.
fn refuse_own_backing_file(file: &Path, options: &CreateOptions) -> Result<(), CommandError> {
    let Some(backing) = &options.backing else { return Ok(()) };
    let name = Path::new(std::ffi::OsStr::from_bytes(&backing.name));
    let backing = file.parent().unwrap_or(Path::new("")).join(name);
    match (fs::metadata(file), fs::metadata(backing)) {
        (Ok(file), Ok(backing)) if (file.dev(), file.ino()) == (backing.dev(), backing.ino()) => {
            Err(CommandError::Usage("the new image cannot be its own backing file".into()))
        }
        _ => Ok(()),
    }
}

fn summary(path: &Path, options: &CreateOptions, size: u64) -> String {
    let backing = options.backing.as_ref().map_or(String::new(), |backing| {
        format!(" backing_file={} backing_fmt={}", super::image::printable(&backing.name), backing.format)
    });
    format!(
        "Formatting '{}', fmt=qcow2 cluster_size={} compression_type={} size={size}{backing} lazy_refcounts={} refcount_bits={}",
        path.display(),
        1_u64 << options.cluster_bits,
        options.compression,
        if options.lazy_refcounts { "on" } else { "off" },
        1_u64 << options.refcount_order,
    )
}
