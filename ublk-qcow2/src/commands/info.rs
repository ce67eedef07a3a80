//! `info`: what an image says of itself. Neither its backing file nor its data file is opened.

mod json;
mod text;

use super::{
    CommandError,
    image::{Tool, printable},
};
use crate::{cli::OutputArgs, config};
use clap::Args;
use qcow2_engine::{
    has_protocol,
    inspect::ImageFile,
    io::{Access, files::Caching},
};
use qcow2_format::{
    CryptMethod, Header, Snapshot, Version,
    bitmap::{Bitmap, FLAG_AUTO, FLAG_IN_USE},
    extension::FeatureKind,
};
use std::{
    ffi::OsStr,
    fs,
    io::{self, Write},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct InfoArgs {
    /// Read the image even if somebody writes to it; what is told may then not be so.
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    output: OutputArgs,
    /// The format of the image.
    #[arg(short, long, value_name = "FORMAT", default_value = "qcow2", value_parser = ["qcow2"], hide = true)]
    format: String,
    /// The image file.
    image: PathBuf,
}

/// What is told of an image.
struct Info<'a> {
    path: &'a Path,
    header: Header,
    file_len: u64,
    /// Bytes that the file occupies.
    disk_size: u64,
    snapshots: Vec<Snapshot>,
    bitmaps: Vec<Bitmap>,
}

/// Prints what the image says.
pub(crate) fn run(args: &InfoArgs) -> Result<(), CommandError> {
    let tool = Tool::new(Caching::Buffered, config::locking(args.force_share))?;
    let path = &args.image;
    let info = tool.run(async {
        let file = ImageFile::open(&tool.ring, &*tool.files, path, Access::ReadOnly).await?;
        file.check_known()?;
        Ok(Info {
            path,
            header: file.header().clone(),
            file_len: file.file_len(),
            disk_size: fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512),
            snapshots: file.snapshots().await?,
            bitmaps: file.bitmaps().await?,
        })
    })?;
    let text = if args.output.is_json() {
        serde_json::to_string_pretty(&info.json()).map_err(io::Error::from)? + "\n"
    } else {
        info.text()
    };
    Ok(io::stdout().lock().write_all(text.as_bytes())?)
}

impl Info<'_> {
    fn is_set(&self, bit: u64) -> bool {
        self.header.incompatible & bit != 0
    }

    fn backing_name(&self) -> Option<String> {
        self.header.backing_file.as_deref().map(printable)
    }

    /// The backing file's name as this image's directory makes it. A name with a protocol is no path.
    fn full_backing_name(&self) -> Option<String> {
        let name = self.header.backing_file.as_deref()?;
        let directory = match self.path.parent() {
            Some(directory) if !has_protocol(name) => directory,
            _ => Path::new(""),
        };
        Some(directory.join(OsStr::from_bytes(name)).to_string_lossy().into_owned())
    }

    fn compat(&self) -> &'static str {
        match self.header.version {
            Version::V2 => "0.10",
            Version::V3 => "1.1",
        }
    }

    fn encryption(&self) -> Option<&'static str> {
        match self.header.crypt {
            CryptMethod::None => None,
            CryptMethod::Aes => Some("aes"),
            CryptMethod::Luks => Some("luks"),
        }
    }

    /// The feature bits that are set and not in `told`, by kind: names from the image (whose header may have no room
    /// for any) or from the specification, or the bit's number.
    fn features_beyond(&self, told: FeatureBits) -> Vec<(&'static str, Vec<String>)> {
        let kinds = [
            ("incompatible", FeatureKind::Incompatible, self.header.incompatible & !told.incompatible),
            ("compatible", FeatureKind::Compatible, self.header.compatible & !told.compatible),
            ("autoclear", FeatureKind::Autoclear, self.header.autoclear & !told.autoclear),
        ];
        let named = |(name, kind, bits): (&'static str, FeatureKind, u64)| {
            let set = (0..64_u8).filter(|bit| bits >> bit & 1 != 0);
            let names = set.map(|bit| self.header.feature_name(kind, bit).unwrap_or(format!("bit {bit}")));
            (name, names.collect::<Vec<_>>())
        };
        kinds.map(named).into_iter().filter(|(_, names)| !names.is_empty()).collect()
    }
}

/// Some of the feature bits.
#[derive(Clone, Copy, Default)]
struct FeatureBits {
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
}

fn granularity(bitmap: &Bitmap) -> u64 {
    1 << bitmap.granularity_bits
}

fn bitmap_flags(bitmap: &Bitmap) -> Vec<&'static str> {
    let flags = [(FLAG_IN_USE, "in-use"), (FLAG_AUTO, "auto")];
    flags.into_iter().filter(|(bit, _)| bitmap.flags & bit != 0).map(|(_, name)| name).collect()
}
