//! `create`: a new, empty image, with the options of `qemu-img create -f qcow2`.

use super::{CommandError, image::Tool};
use crate::{cli::parse_size, runfile};
use clap::Args;
use qcow2_engine::{
    Preallocation, create,
    io::files::{Caching, Locking},
};
use qcow2_format::{Backing, Blueprint, Compression, CreateOptions, Version};
use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Options, as key=value[,key=value...]: size, cluster_size, refcount_bits (1 to 64), compat (0.10 or
    /// 1.1), compression_type (zlib or zstd), lazy_refcounts (on or off), preallocation (off, metadata or
    /// falloc), backing_file, backing_fmt.
    #[arg(short = 'o', value_name = "OPTIONS", value_parser = parse_options)]
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
    file: PathBuf,
    /// Size of the disk, in bytes or with a suffix K, M, G, T; by default that of the backing file.
    #[arg(value_parser = parse_size)]
    size: Option<u64>,
}

/// What `-o` has set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Options {
    size: Option<u64>,
    cluster_size: Option<u64>,
    refcount_bits: Option<u32>,
    version: Option<Version>,
    compression: Option<Compression>,
    lazy_refcounts: Option<bool>,
    preallocation: Option<Mode>,
    backing_file: Option<String>,
    backing_format: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Off,
    Metadata,
    Falloc,
}

/// Makes the image.
pub(crate) fn run(args: &CreateArgs) -> Result<(), CommandError> {
    let options = Options::merged(args)?;
    let tool = Tool::new(Caching::Buffered, Locking::AsQemu)?;
    let backing = options.backing()?;
    let size = options.size(args, &tool, backing.as_ref())?;
    let (options, mode) = options.checked(size, backing)?;
    let preallocation = match mode {
        Mode::Off => Preallocation::Off,
        Mode::Metadata => Preallocation::Metadata,
        Mode::Falloc => Preallocation::Falloc,
    };
    // The rest of the options is judged before a file is made or emptied.
    let blueprint = Blueprint::new(&options).map_err(|error| CommandError::Usage(error.to_string()))?;
    refuse_own_backing_file(args, &options)?;
    runfile::refuse_served(&args.file)?;
    if !args.quiet {
        writeln!(io::stdout(), "{}", summary(&args.file, &options, blueprint.header().virtual_size))?;
    }
    let place = Place::make(&args.file)?;
    tool.run(create::create(&tool.ring, &*tool.files, &args.file, &options, preallocation))?;
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

/// Overwriting the very file that the image is to overlay would destroy both.
fn refuse_own_backing_file(args: &CreateArgs, options: &CreateOptions) -> Result<(), CommandError> {
    let Some(backing) = &options.backing else { return Ok(()) };
    let name = Path::new(std::ffi::OsStr::from_bytes(&backing.name));
    let backing = args.file.parent().unwrap_or(Path::new("")).join(name);
    match (fs::metadata(&args.file), fs::metadata(backing)) {
        (Ok(file), Ok(backing)) if (file.dev(), file.ino()) == (backing.dev(), backing.ino()) => {
            Err(CommandError::Usage("the new image cannot be its own backing file".into()))
        }
        _ => Ok(()),
    }
}

impl Options {
    /// All `-o`, later ones winning, and what has an option of its own.
    fn merged(args: &CreateArgs) -> Result<Self, CommandError> {
        let mut all = Self::default();
        for options in &args.options {
            let options = options.clone();
            all = Self {
                size: options.size.or(all.size),
                cluster_size: options.cluster_size.or(all.cluster_size),
                refcount_bits: options.refcount_bits.or(all.refcount_bits),
                version: options.version.or(all.version),
                compression: options.compression.or(all.compression),
                lazy_refcounts: options.lazy_refcounts.or(all.lazy_refcounts),
                preallocation: options.preallocation.or(all.preallocation),
                backing_file: options.backing_file.or(all.backing_file),
                backing_format: options.backing_format.or(all.backing_format),
            };
        }
        let name = args.backing_file.as_ref().map(|name| name.to_string_lossy().into_owned());
        all.backing_file = name.or(all.backing_file);
        all.backing_format = args.backing_format.clone().or(all.backing_format);
        if all.size.is_some() && args.size.is_some() {
            return Err(CommandError::Usage("the size of the image is given twice".into()));
        }
        all.size = args.size.or(all.size);
        Ok(all)
    }

    fn backing(&self) -> Result<Option<Backing>, CommandError> {
        match (&self.backing_file, &self.backing_format) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(CommandError::Usage("a backing format without a backing file".into())),
            (Some(name), Some(format)) => {
                Ok(Some(Backing { name: name.clone().into_bytes(), format: format.clone() }))
            }
            (Some(name), None) => Err(CommandError::Usage(format!(
                "the format of the backing file {name:?} is not given, and guessing it would not be safe: \
                 add -F qcow2 or -F raw"
            ))),
        }
    }

    /// The size that was asked for, or the backing file's. The backing file is looked at in any
    /// case, unless that was ruled out.
    fn size(&self, args: &CreateArgs, tool: &Tool, backing: Option<&Backing>) -> Result<u64, CommandError> {
        let shown = match backing.filter(|_| !args.unsafe_backing) {
            Some(backing) => {
                Some(tool.run(create::backing_size(&tool.ring, &*tool.files, &args.file, backing))?)
            }
            None => None,
        };
        let size = self.size.or(shown);
        size.ok_or_else(|| CommandError::Usage("the size of the image is not given".into()))
    }

    fn checked(self, size: u64, backing: Option<Backing>) -> Result<(CreateOptions, Mode), CommandError> {
        let default = CreateOptions::default();
        let cluster_size = self.cluster_size.unwrap_or(1 << default.cluster_bits);
        if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size) {
            let text = format!("cluster_size is {cluster_size}; it must be a power of two from 512 to 2M");
            return Err(CommandError::Usage(text));
        }
        let refcount_bits = self.refcount_bits.unwrap_or(1 << default.refcount_order);
        if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
            let text = format!("refcount_bits is {refcount_bits}; it must be a power of two from 1 to 64");
            return Err(CommandError::Usage(text));
        }
        let mode = self.preallocation.unwrap_or(Mode::Off);
        if backing.is_some() && mode != Mode::Off {
            let text =
                "an image with a backing file cannot be preallocated: that would hide the backing file";
            return Err(CommandError::Usage(text.into()));
        }
        let options = CreateOptions {
            virtual_size: size,
            cluster_bits: cluster_size.trailing_zeros(),
            version: self.version.unwrap_or(default.version),
            refcount_order: refcount_bits.trailing_zeros(),
            backing,
            compression: self.compression.unwrap_or(default.compression),
            lazy_refcounts: self.lazy_refcounts.unwrap_or(default.lazy_refcounts),
        };
        Ok((options, mode))
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "size" => self.size = Some(parse_size(value)?),
            "cluster_size" => self.cluster_size = Some(parse_size(value)?),
            "refcount_bits" => {
                let bits = value.parse().map_err(|_| format!("refcount_bits={value} is no number"))?;
                self.refcount_bits = Some(bits);
            }
            "compat" => self.version = Some(one_of(VERSIONS, key, value)?),
            "compression_type" => self.compression = Some(one_of(COMPRESSIONS, key, value)?),
            "lazy_refcounts" => self.lazy_refcounts = Some(one_of(SWITCHES, key, value)?),
            "preallocation" => self.preallocation = Some(one_of(MODES, key, value)?),
            "backing_file" => self.backing_file = Some(value.to_owned()),
            "backing_fmt" => self.backing_format = Some(value.to_owned()),
            "encryption" | "extended_l2" | "data_file_raw" => {
                if one_of(SWITCHES, key, value) != Ok(false) {
                    return Err(format!("{key}={value}: images with {key} are not served"));
                }
            }
            _ => return Err(format!("the option {key:?} is not known; see --help")),
        }
        Ok(())
    }
}

/// The names of values, and others that mean the same.
type Names<T> = [(&'static [&'static str], T)];
const VERSIONS: &Names<Version> = &[(&["0.10", "v2"], Version::V2), (&["1.1", "v3"], Version::V3)];
const COMPRESSIONS: &Names<Compression> = &[(&["zlib"], Compression::Zlib), (&["zstd"], Compression::Zstd)];
const SWITCHES: &Names<bool> = &[(&["on", "yes", "true"], true), (&["off", "no", "false"], false)];
const MODES: &Names<Mode> =
    &[(&["off"], Mode::Off), (&["metadata"], Mode::Metadata), (&["falloc"], Mode::Falloc)];

/// The value of an option that has names for its values.
fn one_of<T: Copy>(names: &Names<T>, key: &str, value: &str) -> Result<T, String> {
    let found = names.iter().find(|(names, _)| names.contains(&value));
    found.map(|&(_, named)| named).ok_or_else(|| {
        let known: Vec<_> = names.iter().filter_map(|(names, _)| names.first().copied()).collect();
        format!("{key}={value} is not one of {}", known.join(", "))
    })
}

/// Reads key=value,key=value; a comma inside a value is doubled.
fn parse_options(text: &str) -> Result<Options, String> {
    let mut options = Options::default();
    let marked = text.replace(",,", "\0");
    for option in marked.split(',').filter(|option| !option.is_empty()) {
        let option = option.replace('\0', ",");
        // As for QEMU, a key alone switches on.
        let (key, value) = option.split_once('=').unwrap_or((&option, "on"));
        options.set(key, value)?;
    }
    Ok(options)
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn options_are_read_as_qemu_img_reads_them() {
        let options = parse_options("cluster_size=4k,compat=0.10,lazy_refcounts,backing_file=a,,b").unwrap();
        assert_eq!(options.cluster_size, Some(4096));
        assert_eq!(options.version, Some(Version::V2));
        assert_eq!(options.lazy_refcounts, Some(true));
        assert_eq!(options.backing_file.as_deref(), Some("a,b"));
        assert_eq!(parse_options("encryption=off,extended_l2=off").unwrap(), Options::default());
        for bad in [
            "cluster_size=x",
            "compat=2",
            "nonsense=1",
            "preallocation=full",
            "refcount_bits=-1",
            "extended_l2=on",
            "encryption",
        ] {
            assert!(parse_options(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn options_of_both_kinds_come_together() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            create: CreateArgs,
        }
        let merged = |line: &[&str]| Options::merged(&Line::try_parse_from(line).unwrap().create);
        assert_eq!(merged(&["", "-o", "size=10M", "image"]).unwrap().size, Some(10 << 20));
        assert_eq!(merged(&["", "image", "20M"]).unwrap().size, Some(20 << 20));
        assert!(merged(&["", "-o", "size=10M", "image", "20M"]).is_err());
        let backing =
            merged(&["", "-o", "backing_fmt=raw", "-b", "base", "image"]).unwrap().backing().unwrap();
        assert_eq!(backing.unwrap().format, "raw");
    }
}
