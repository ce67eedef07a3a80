//! What to serve, and how: the options of `add`, in a form that a run file keeps for the server that
//! may have to take over.

use crate::cli::{AddArgs, IoMode, ZeroCopy};
use qcow2_engine::{
    BackingPolicy, Format, OpenOptions,
    io::{
        Files,
        files::{Caching, Locking},
    },
};
use serde::{Deserialize, Serialize};
use std::{
    io,
    path::{Path, PathBuf},
};

/// How an image is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Config {
    /// The image, as an absolute path.
    pub(crate) image: PathBuf,
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    pub(crate) read_only: bool,
    pub(crate) force_share: bool,
    pub(crate) cache_bytes: u64,
    pub(crate) io: IoMode,
    pub(crate) zero_copy: ZeroCopy,
    #[serde(with = "format_name")]
    pub(crate) backing_format: Option<Format>,
    #[serde(with = "PolicyForm")]
    pub(crate) backing_policy: BackingPolicy,
    /// Whether to give back what a crash has leaked.
    pub(crate) reclaims: bool,
    /// Whether the device waits for another server when this one dies.
    pub(crate) recovery: bool,
    /// Whether the kernel looks for a partition table in the image.
    pub(crate) part_scan: bool,
}

impl Config {
    /// What the command line asks for.
    pub(crate) fn from_args(args: &AddArgs) -> io::Result<Self> {
        let backing_policy = args.backing.policy();
        let image = std::path::absolute(&args.image)?;
        if let BackingPolicy::Under(directories) = &backing_policy {
            directories.iter().try_for_each(|directory| check_name(directory))?;
        }
        check_name(&image)?;
        check_cache(args.cache_size, memory())?;
        Ok(Self {
            image,
            queues: args.queues,
            depth: args.depth,
            read_only: args.read_only,
            force_share: args.force_share,
            cache_bytes: args.cache_size,
            io: args.io,
            zero_copy: args.zero_copy,
            backing_format: args.backing.backing_format,
            backing_policy,
            reclaims: !args.no_reclaim,
            recovery: !args.no_recovery,
            part_scan: !args.no_part_scan,
        })
    }

    /// The files of the chain, none of them open yet.
    pub(crate) fn files(&self) -> Files {
        let caching = match self.io {
            IoMode::Auto => Caching::Auto,
            IoMode::Direct => Caching::Direct,
            IoMode::Buffered => Caching::Buffered,
        };
        Files::with_locking(caching, locking(self.force_share))
    }

    /// How the engine opens the image.
    pub(crate) fn open_options(&self) -> OpenOptions {
        OpenOptions {
            read_only: self.read_only,
            cache_bytes: self.cache_bytes,
            backing_format: self.backing_format,
            backing_policy: self.backing_policy.clone(),
            ..OpenOptions::default()
        }
    }
}

/// Refuses a name that a record cannot hold: it is JSON, which is Unicode.
fn check_name(path: &Path) -> io::Result<()> {
    match path.to_str() {
        Some(_) => Ok(()),
        None => Err(io::Error::other(format!("{} is not a name in UTF-8, which is needed", path.display()))),
    }
}

/// Refuses a cache that may come to take more than half of the machine's memory: a server's memory is locked,
/// and the OOM killer passes it by.
fn check_cache(bytes: u64, memory: u64) -> io::Result<()> {
    if bytes <= memory / 2 {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "--cache-size {bytes} is more than half of this machine's memory of {memory} bytes, and a server's \
         memory is locked"
    )))
}

/// Bytes of this machine's memory.
fn memory() -> u64 {
    let machine = rustix::system::sysinfo();
    machine.totalram.saturating_mul(u64::from(machine.mem_unit))
}

/// What `--force-share` asks for.
pub(crate) fn locking(force_share: bool) -> Locking {
    if force_share { Locking::ForceShare } else { Locking::AsQemu }
}

/// How a policy is written down.
#[derive(Serialize, Deserialize)]
#[serde(remote = "BackingPolicy")]
enum PolicyForm {
    Any,
    None,
    Under(Vec<PathBuf>),
}

/// A format by its name on the command line.
mod format_name {
    use qcow2_engine::Format;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(format: &Option<Format>, to: S) -> Result<S::Ok, S::Error> {
        let name = format.map(|format| match format {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        });
        name.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Format>, D::Error> {
        let name = Option::<String>::deserialize(from)?;
        name.map(|name| name.parse().map_err(D::Error::custom)).transpose()
    }
}

#[cfg(test)]
pub(crate) fn example() -> Config {
    Config {
        image: "/images/a b.qcow2".into(),
        queues: 2,
        depth: 64,
        read_only: false,
        force_share: false,
        cache_bytes: 1 << 20,
        io: IoMode::Direct,
        zero_copy: ZeroCopy::Auto,
        backing_format: Some(Format::Raw),
        backing_policy: BackingPolicy::Under(vec!["/images".into()]),
        reclaims: true,
        recovery: true,
        part_scan: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

    #[test]
    fn a_name_that_cannot_be_written_down_is_refused() {
        assert!(check_name(Path::new("/images/ä b")).is_ok());
        assert!(check_name(Path::new(OsStr::from_bytes(b"/images/\xff"))).is_err());
    }

    #[test]
    fn a_cache_that_may_take_the_machine_s_memory_is_refused_by_name() {
        assert!(check_cache(4 << 30, 8 << 30).is_ok());
        let refused = check_cache((4 << 30) + 1, 8 << 30).unwrap_err().to_string();
        assert!(refused.contains("--cache-size 4294967297"), "{refused}");
        assert!(check_cache(1 << 20, memory()).is_ok());
    }
}
