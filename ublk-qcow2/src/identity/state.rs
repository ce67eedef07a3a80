//! What shows that somebody has changed a file.

use serde::{Deserialize, Serialize};
use std::{
    fmt,
    fs::{self, File, Metadata},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

/// Nanoseconds.
const SECOND: u64 = 1_000_000_000;
/// The coarsest times that file systems keep, in nanoseconds.
const COARSEST: u64 = 2 * SECOND;
/// Sectors written, and sectors discarded, among the kernel's numbers on a block device.
const CHANGED_SECTORS: [usize; 2] = [6, 13];

/// What is seen of a file without looking into it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// Of a block device that tells nothing, or of what may change.
    #[default]
    Unknown,
    /// Of a file: when its content was last modified, in nanoseconds, and its bytes. (When its inode was last
    /// changed says nothing: to rename a file or to link to it, to give it away or to label it is to change
    /// that.)
    File { modified: u64, len: u64 },
    /// Of a block device: the sectors that this host has changed since it has the device.
    Device { changed: u64 },
}

impl State {
    pub(crate) fn of(it: &Metadata) -> Self {
        if it.file_type().is_block_device() {
            // When its node was modified says nothing of what is in the device, only when udev has set its owner
            // and mode, which it does at every event.
            return changed_sectors(it.rdev()).map_or(Self::Unknown, |changed| Self::Device { changed });
        }
        // A file from before 1970 counts as old.
        let seconds = u64::try_from(it.mtime()).unwrap_or(0);
        let modified = seconds.saturating_mul(SECOND).saturating_add(it.mtime_nsec().cast_unsigned());
        Self::File { modified, len: it.len() }
    }

    /// Of the file at `path`, with what lies in memory for a block device: that was changed as well, and counts
    /// when it is written.
    pub(crate) fn written(path: &Path, it: &Metadata) -> io::Result<Self> {
        if it.file_type().is_block_device() {
            File::open(path)?.sync_all()?;
        }
        Ok(Self::of(it))
    }

    /// Whether the file is as it was left, as far as can be seen.
    pub(crate) fn is_still(self, left: Self) -> bool {
        match (left, self) {
            (Self::File { modified: left, len: left_len }, Self::File { modified, len }) => {
                // A little earlier is what a file system makes of a time that keeps whole seconds on its disk.
                len == left_len && left.checked_sub(modified).is_some_and(|back| back < COARSEST)
            }
            // Fewer are those of a device that has gone and come again.
            (Self::Device { changed: left }, Self::Device { changed }) => changed <= left,
            _ => true,
        }
    }

    /// When it was last modified, in seconds; 0 where that is not known.
    pub(crate) fn modified_seconds(self) -> u64 {
        if let Self::File { modified, .. } = self { modified / SECOND } else { 0 }
    }

    /// As it is written down: 0 first where there is nothing.
    pub(crate) fn to_words(self) -> [u64; 3] {
        match self {
            Self::Unknown => [0; 3],
            Self::File { modified, len } => [1, modified, len],
            Self::Device { changed } => [2, changed, 0],
        }
    }

    pub(crate) fn from_words(words: [u64; 3]) -> Self {
        match words {
            [1, modified, len] => Self::File { modified, len },
            [2, changed, _] => Self::Device { changed },
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => write!(f, "unknown"),
            // As `touch -d` takes it.
            Self::File { modified, len } => {
                write!(f, "{len} bytes, modified @{}.{:09}", modified / SECOND, modified % SECOND)
            }
            Self::Device { changed } => write!(f, "{changed} sectors changed by this host"),
        }
    }
}

/// What the kernel counts of a block device. Where it is told not to count that is always the same.
fn changed_sectors(device: u64) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let stat = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    let numbers: Vec<u64> = stat.split_whitespace().map_while(|number| number.parse().ok()).collect();
    let found = CHANGED_SECTORS.map(|at| numbers.get(at));
    // Kernels before 4.18 know no discards.
    found[0].map(|written| written.wrapping_add(found[1].copied().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_is_read_again() {
        let file = State::File { modified: 5, len: 0 };
        for state in [State::Unknown, file, State::Device { changed: 0 }] {
            assert_eq!(State::from_words(state.to_words()), state);
        }
    }

    #[test]
    fn a_device_to_which_nothing_was_written_is_as_it_was_left() {
        let left = State::Device { changed: 80 };
        assert!(left.is_still(left));
        assert!(!State::Device { changed: 88 }.is_still(left));
        assert!(State::Device { changed: 8 }.is_still(left), "it has come anew");
        assert!(State::Unknown.is_still(left) && left.is_still(State::Unknown));
    }
}
