//! What a successor needs to read, kept in memory.
//!
//! The run directory is on a tmpfs, whose pages may be swapped out, and the swap space may be the very device
//! whose server is dead: to read the record back the successor would wait for the device that waits for the
//! successor. To write to the log the supervisor would. A server's locks on its memory end with it, so the
//! supervisor has its own.

use crate::runfile;
use memmap2::{MmapOptions, MmapRaw};
use std::{fs::File, io, path::Path};

/// The files of a device in the run directory, as long as they are at this moment, locked in memory by this
/// process.
pub(crate) struct Kept {
    id: u32,
    _maps: Vec<MmapRaw>,
}

impl Kept {
    /// Those of device `id`.
    pub(crate) fn of(id: u32) -> Self {
        let record = [runfile::path_of(id), runfile::spare_path(id)];
        let files = [&record[..], &[runfile::redo_path(id), runfile::log_path(id)]].concat();
        let keep = |path: &Path| match keep(path) {
            Ok(map) => map,
            Err(error) => {
                tracing::warn!(
                    "{} is not locked in memory: {error}; with swap space on the device it may deadlock",
                    path.display()
                );
                None
            }
        };
        Self { id, _maps: files.iter().filter_map(|path| keep(path)).collect() }
    }

    /// Servers replace the record, by its spare, and append to the log.
    pub(crate) fn renew(&mut self) {
        *self = Self::of(self.id); // what is there twice stays locked
    }
}

/// The file's pages, read and locked; none if there are none.
fn keep(path: &Path) -> io::Result<Option<MmapRaw>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    if file.metadata()?.len() == 0 {
        return Ok(None);
    }
    let map = MmapOptions::new().map_raw_read_only(&file)?;
    map.lock()?;
    Ok(Some(map))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_is_there_is_kept_and_what_is_not_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.json");
        assert!(keep(&path).unwrap().is_none());
        fs::write(&path, "").unwrap();
        assert!(keep(&path).unwrap().is_none());
        fs::write(&path, "{}").unwrap();
        assert_eq!(keep(&path).unwrap().unwrap().len(), 2);
    }
}
