//! Which file lies below an image: names, formats and the policy about both.
//!
//! A backing file name comes from the image, so it is not trusted: it is a plain path, relative to
//! the directory of the image that names it, or `file:` before an absolute path, or it is refused. The
//! format comes from the image or from the caller and is never guessed from the content, because a
//! guest chooses the content of a raw file.

use crate::error::{Error, Result};
use qcow2_format::Header;
use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The deepest chain that is opened: as deep as snapshot tools make them, far from what a stack or
/// a file table could not take.
pub const MAX_CHAIN: usize = 256;

/// Bytes of L1 tables that a chain may have in all: they are all in memory. 256 files of 64 TiB in
/// clusters of 64 KiB have as many.
pub(crate) const MAX_CHAIN_L1_BYTES: u64 = 256 << 20;

/// Which backing files are opened. Their names come from the images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BackingPolicy {
    /// Any plain local path, as QEMU does it.
    #[default]
    Any,
    /// None: an image that names one is refused.
    None,
    /// Files below these directories, links followed first.
    Under(Vec<PathBuf>),
}

impl BackingPolicy {
    /// The path to open for a backing file that `overlay` names.
    pub(crate) fn admit(&self, overlay: &Path, path: PathBuf) -> Result<PathBuf> {
        let refuse = |why: String| Error::Backing { file: Arc::from(overlay.to_string_lossy()), reason: why };
        let shown = path.display().to_string();
        let directories = match self {
            Self::Any => return Ok(path),
            Self::None => {
                return Err(refuse(format!("it names the backing file '{shown}', and none is to be opened")));
            }
            Self::Under(directories) => directories,
        };
        let real = |path: &Path| {
            fs::canonicalize(path)
                .map_err(|source| Error::Open { path: path.to_owned(), source: Arc::new(source) })
        };
        // What is opened is what was judged: the path without links.
        let path = real(&path)?;
        for directory in directories {
            if path.starts_with(real(directory)?) {
                return Ok(path);
            }
        }
        Err(refuse(format!("its backing file '{shown}' is not below a directory that --backing-dir allows")))
    }
}

/// How a backing file is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A QCOW2 image.
    Qcow2,
    /// The bytes as they are.
    Raw,
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "qcow2" => Ok(Self::Qcow2),
            // Names of protocols that QEMU writes for raw files.
            "raw" | "file" | "host_device" => Ok(Self::Raw),
            other => Err(format!("backing file format '{other}' is not served: qcow2 and raw are")),
        }
    }
}

/// A reference to a backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Backing {
    pub(crate) path: PathBuf,
    pub(crate) format: Format,
}

/// The backing file that `header`, read from `overlay`, asks for; in the format `default` where the image says
/// none, or one that nobody here knows.
pub(crate) fn of(header: &Header, overlay: &Path, default: Option<Format>) -> Result<Option<Backing>> {
    let Some(name) = &header.backing_file else { return Ok(None) };
    let refuse = |reason| Error::Backing { file: Arc::from(overlay.to_string_lossy()), reason };
    let path = literal_path(name).map_err(refuse)?;
    let stored: Option<std::result::Result<Format, _>> =
        header.backing_format.as_ref().map(|name| name.parse());
    let format = match (stored, default) {
        (Some(Ok(format)), _) | (_, Some(format)) => format,
        (Some(Err(reason)), None) => {
            return Err(refuse(format!("{reason}; if it is one of these, say so with --backing-format")));
        }
        (None, None) => {
            let name = path.display();
            return Err(refuse(format!(
                "the image does not say the format of its backing file '{name}', and guessing it would not be \
                 safe: give it with --backing-format, or store it with qemu-img rebase -u -F"
            )));
        }
    };
    Ok(Some(Backing { path: beside(overlay, path), format }))
}

/// The path and format of a backing file that `overlay` is going to have.
pub(crate) fn resolve(overlay: &Path, name: &[u8], format: &str) -> Result<(PathBuf, Format)> {
    let refuse = |reason| Error::Backing { file: Arc::from(overlay.to_string_lossy()), reason };
    let path = literal_path(name).map_err(refuse)?;
    Ok((beside(overlay, path), format.parse().map_err(refuse)?))
}

fn beside(overlay: &Path, path: &Path) -> PathBuf {
    overlay.parent().unwrap_or(Path::new("")).join(path)
}

/// Whether QEMU takes a stored name for a protocol and what that makes of the rest, not for a path: a name
/// that has a colon before any slash. It then has nothing to do with the directory of the image.
#[must_use]
pub fn has_protocol(name: &[u8]) -> bool {
    name.iter().find(|byte| b":/".contains(byte)) == Some(&b':')
}

/// A stored name as a path, unless QEMU would read something else into it.
fn literal_path(name: &[u8]) -> std::result::Result<&Path, String> {
    if !has_protocol(name) {
        return Ok(Path::new(OsStr::from_bytes(name)));
    }
    let shown = String::from_utf8_lossy(name);
    match name.strip_prefix(b"file:").map(|path| Path::new(OsStr::from_bytes(path))) {
        Some(path) if path.is_absolute() => Ok(path),
        // Which file that is depends on where QEMU is started: there is none that could be opened in its
        // place.
        Some(_) => Err(format!(
            "backing file '{shown}' is relative to the working directory, not to the image: \
             store a plain path with qemu-img rebase -u -b"
        )),
        None => {
            Err(format!("backing file '{shown}' is not a plain path; protocols and json: are not served"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_are_refused_and_paths_are_literal() {
        for name in ["json:{\"driver\":\"raw\"}", "nbd:localhost:10809", "ssh:x", "fat:rw:dir"] {
            assert!(literal_path(name.as_bytes()).is_err(), "{name}");
        }
        assert_eq!(literal_path(b"../base.img"), Ok(Path::new("../base.img")));
        assert_eq!(literal_path(b"./a:b"), Ok(Path::new("./a:b")));
        assert_eq!(literal_path(b"/a:b"), Ok(Path::new("/a:b")));
    }

    /// QEMU looks for `file:` before a relative path where it was started, which is another file than the one
    /// beside the image.
    #[test]
    fn a_file_protocol_is_served_before_an_absolute_path_only() {
        assert_eq!(literal_path(b"file:/dir/base.img"), Ok(Path::new("/dir/base.img")));
        for name in ["file:base.img", "file:./base.img", "file:../base.img", "file:nbd:/x", "file:"] {
            let refused = literal_path(name.as_bytes()).unwrap_err();
            assert!(refused.contains(name) && refused.contains("rebase"), "{refused}");
        }
    }

    #[test]
    fn only_the_two_formats_are_known() {
        assert_eq!("raw".parse(), Ok(Format::Raw));
        assert_eq!("qcow2".parse(), Ok(Format::Qcow2));
        assert!("vmdk".parse::<Format>().is_err());
    }
}
