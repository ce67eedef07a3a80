//! What `-o` and the options beside it ask for: from text to what the engine takes.

use super::{CommandError, CreateArgs, Tool};
use crate::cli::parse_size;
use qcow2_engine::{
    Preallocation, create,
    io::files::{Caching, Locking},
};
use qcow2_format::{Backing, Compression, CreateOptions, Version};
use std::{
    ffi::OsString,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// What `-o help` prints.
pub(super) const LIST: &str = "\
Options of qcow2:
  size=<size>              size of the disk
  cluster_size=<size>      bytes of a cluster, a power of two from 512 to 2M [64K]
  refcount_bits=<number>   bits of a reference count, a power of two from 1 to 64 [16]
  compat=<version>         0.10 (or v2), 1.1 (or v3) [1.1]
  compression_type=<type>  how QEMU compresses clusters of it: zlib, zstd [zlib]
  lazy_refcounts=<switch>  whether QEMU postpones reference counts: on, off [off]
  preallocation=<mode>     what exists from the start: off, metadata, falloc (space as well), full (written
                           zeros) [off]
  backing_file=<name>      the image that the new one overlays
  backing_fmt=<format>     its format: qcow2, raw
";

/// What `-o` has set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// They are to be listed, and nothing is made.
    pub(super) lists: bool,
    size: Option<u64>,
    cluster_size: Option<u64>,
    refcount_bits: Option<u32>,
    version: Option<Version>,
    compression: Option<Compression>,
    lazy_refcounts: Option<bool>,
    preallocation: Option<Preallocation>,
    backing_file: Option<OsString>,
    backing_format: Option<String>,
}

impl Options {
    /// All `-o`, later ones winning, and what has an option of its own.
    pub(super) fn merged(args: &CreateArgs) -> Result<Self, CommandError> {
        let mut all = Self::default();
        for options in &args.options {
            let options = options.clone();
            all = Self {
                lists: options.lists || all.lists,
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
        all.backing_file = args.backing_file.clone().map(PathBuf::into_os_string).or(all.backing_file);
        all.backing_format = args.backing_format.clone().or(all.backing_format);
        if all.size.is_some() && args.size.is_some() {
            return Err(CommandError::Usage("the size of the image is given twice".into()));
        }
        all.size = args.size.or(all.size);
        Ok(all)
    }

    pub(super) fn backing(&self) -> Result<Option<Backing>, CommandError> {
        match (&self.backing_file, &self.backing_format) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(CommandError::Usage("a backing format without a backing file".into())),
            (Some(name), Some(format)) => {
                Ok(Some(Backing { name: name.as_bytes().to_vec(), format: format.clone() }))
            }
            (Some(name), None) => Err(CommandError::Usage(format!(
                "the format of the backing file {name:?} is not given, and guessing it would not be safe: \
                 add -F qcow2 or -F raw"
            ))),
        }
    }

    /// The size that was asked for, or the backing file's. The backing file is looked at in any
    /// case, unless that was ruled out.
    pub(super) fn size(
        &self,
        args: &CreateArgs,
        overlay: &Path,
        backing: Option<&Backing>,
    ) -> Result<u64, CommandError> {
        let shown = match backing.filter(|_| !args.unsafe_backing) {
            Some(backing) => Some(shown_size(overlay, backing)?),
            None => None,
        };
        let size = self.size.or(shown);
        size.ok_or_else(|| CommandError::Usage("the size of the image is not given".into()))
    }

    pub(super) fn checked(
        self,
        size: u64,
        backing: Option<Backing>,
    ) -> Result<(CreateOptions, Preallocation), CommandError> {
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
        let preallocation = self.preallocation.unwrap_or_default();
        if backing.is_some() && preallocation != Preallocation::Off {
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
        Ok((options, preallocation))
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
            "preallocation" => self.preallocation = Some(one_of(PREALLOCATIONS, key, value)?),
            "backing_file" => self.backing_file = Some(value.into()),
            "backing_fmt" => self.backing_format = Some(value.to_owned()),
            "encryption" | "extended_l2" | "data_file_raw" => {
                if one_of(SWITCHES, key, value) != Ok(false) {
                    return Err(format!("{key}={value}: images with {key} are not served"));
                }
            }
            _ => return Err(format!("the option {key:?} is not known; see -o help")),
        }
        Ok(())
    }
}

/// The names of values, and others that mean the same.
type Names<T> = [(&'static [&'static str], T)];
const VERSIONS: &Names<Version> = &[(&["0.10", "v2"], Version::V2), (&["1.1", "v3"], Version::V3)];
const COMPRESSIONS: &Names<Compression> = &[(&["zlib"], Compression::Zlib), (&["zstd"], Compression::Zstd)];
const SWITCHES: &Names<bool> = &[(&["on", "yes", "true"], true), (&["off", "no", "false"], false)];
const PREALLOCATIONS: &Names<Preallocation> = &[
    (&["off"], Preallocation::Off),
    (&["metadata"], Preallocation::Metadata),
    (&["falloc"], Preallocation::Falloc),
    (&["full"], Preallocation::Full),
];

/// The value of an option that has names for its values.
fn one_of<T: Copy>(names: &Names<T>, key: &str, value: &str) -> Result<T, String> {
    let found = names.iter().find(|(names, _)| names.contains(&value));
    found.map(|&(_, named)| named).ok_or_else(|| {
        let known: Vec<_> = names.iter().filter_map(|(names, _)| names.first().copied()).collect();
        format!("{key}={value} is not one of {}", known.join(", "))
    })
}

/// Size of the disk that a backing file shows. Whoever writes to it meanwhile, as a server of it or a guest, is
/// no reason to refuse: its size stays.
fn shown_size(overlay: &Path, backing: &Backing) -> Result<u64, CommandError> {
    let tool = Tool::new(Caching::Buffered, Locking::ForceShare)?;
    tool.run(create::backing_size(&tool.ring, &*tool.files, overlay, backing))
}

/// Reads key=value,key=value; a comma inside a value is doubled. Who asks for help is not told of mistakes.
pub(super) fn parse(text: &str) -> Result<Options, String> {
    let marked = text.replace(",,", "\0");
    let all: Vec<_> = marked.split(',').map(|option| option.replace('\0', ",")).collect();
    if all.iter().any(String::is_empty) {
        return Err("there is an empty option: a comma stands between two, and doubled inside one".into());
    }
    if all.iter().any(|option| ["help", "?"].contains(&option.as_str())) {
        return Ok(Options { lists: true, ..Options::default() });
    }
    let mut options = Options::default();
    for option in &all {
        // As for QEMU, a key alone switches on.
        let (key, value) = option.split_once('=').unwrap_or((option, "on"));
        options.set(key, value)?;
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::ffi::OsStr;

    #[test]
    fn options_are_read_as_qemu_img_reads_them() {
        let options = parse("cluster_size=4k,compat=0.10,lazy_refcounts,backing_file=a,,b").unwrap();
        assert_eq!(options.cluster_size, Some(4096));
        assert_eq!(options.version, Some(Version::V2));
        assert_eq!(options.lazy_refcounts, Some(true));
        assert_eq!(options.backing_file.as_deref(), Some(OsStr::new("a,b")));
        assert_eq!(parse("encryption=off,extended_l2=off").unwrap(), Options::default());
        for bad in [
            "cluster_size=x",
            "compat=2",
            "nonsense=1",
            "preallocation=some",
            "",
            ",",
            "compat=v3,",
            ",compat=v3",
            "refcount_bits=-1",
            "extended_l2=on",
            "encryption",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
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
        let twice = merged(&["", "-o", "size=10M,compat=v2", "-o", "size=20M", "image"]).unwrap();
        assert_eq!((twice.size, twice.version), (Some(20 << 20), Some(Version::V2)));
        let backing =
            merged(&["", "-o", "backing_fmt=raw", "-b", "base", "image"]).unwrap().backing().unwrap();
        assert_eq!(backing.unwrap().format, "raw");
        let line = ["", "-F", "raw", "-b"].map(OsStr::new).into_iter();
        let line = line.chain([OsStr::from_bytes(b"b\xff"), OsStr::new("image")]);
        let options = Options::merged(&Line::try_parse_from(line).unwrap().create).unwrap();
        assert_eq!(options.backing().unwrap().unwrap().name, b"b\xff", "names are bytes");
    }
}
