//! The log of the kernel's dm-log-writes target: what passed a block device, in order.
//!
//! ```text
//! sector 0   magic · version · number of entries · bytes of a sector
//! then, over and over:
//!   a sector with an entry:  sector · sectors · flags · bytes of text · text of a mark
//!   the data of a write; a discard, a flush and a mark have none
//! ```
//!
//! All numbers are little-endian. The target puts a write into the log when a flush covers it that
//! had not yet been issued when the write ended: so what stands before a flush is what the flush made
//! durable. A write with FUA and a mark stand where they ended. Decodes, and knows nothing of what
//! the bytes mean.

use anyhow::{Context, Result, ensure};
use std::{fs::File, os::unix::fs::FileExt, path::Path};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
/// Bytes of the fixed part of an entry.
const ENTRY: usize = 32;
const FLUSH: u64 = 1;
const FUA: u64 = 1 << 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;
/// Entries of a log at most: a mark a millisecond for an hour.
const MAX_ENTRIES: u64 = 4_000_000;

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Bytes were written; they lie at this offset of the log.
    Write {
        /// Where the bytes are.
        data: u64,
        /// Whether the write was durable when it ended.
        fua: bool,
    },
    /// A range was discarded.
    Discard,
    /// A flush ended.
    Flush,
    /// A mark of the log's user.
    Mark(String),
}

/// Something that happened to the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// First byte of the device.
    pub(super) at: u64,
    /// Bytes of the device.
    pub(super) len: u64,
    /// What happened.
    pub(super) kind: Kind,
}

/// A log, decoded.
pub(super) struct Log {
    file: File,
    /// In the order in which they became durable.
    pub(super) entries: Vec<Entry>,
}

impl Log {
    /// Reads a log that is complete.
    ///
    /// # Errors
    /// It cannot be read, or is no such log.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let entries = decode(&file).with_context(|| format!("the log {}", path.display()))?;
        Ok(Self { file, entries })
    }

    /// The bytes of a write.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn data(&self, data: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, data).context("the data of a write in the log")?;
        Ok(bytes)
    }
}

fn decode(file: &File) -> Result<Vec<Entry>> {
    let mut head = [0; ENTRY];
    file.read_exact_at(&mut head, 0).context("its head")?;
    ensure!(word(&head, 0) == MAGIC, "no log of dm-log-writes: it begins with {:#x}", word(&head, 0));
    ensure!(word(&head, 1) == VERSION, "version {} of the format is not known", word(&head, 1));
    let (count, sector) = (word(&head, 2), word(&head, 3) & u64::from(u32::MAX));
    ensure!(count <= MAX_ENTRIES, "{count} entries are too many");
    ensure!(sector.is_power_of_two() && (512..=65536).contains(&sector), "sectors of {sector} bytes");
    let mut entries = Vec::with_capacity(count as usize);
    let mut next = sector;
    for index in 0..count {
        let mut bytes = vec![0; sector as usize];
        file.read_exact_at(&mut bytes, next).with_context(|| format!("entry {index} at {next:#x}"))?;
        next += sector;
        let entry = decode_entry(&bytes, sector, next).with_context(|| format!("entry {index}"))?;
        if let Kind::Write { .. } = entry.kind {
            next += entry.len;
        }
        entries.push(entry);
    }
    Ok(entries)
}

/// `bytes` is the entry's sector, `data` the offset behind it.
fn decode_entry(bytes: &[u8], sector: u64, data: u64) -> Result<Entry> {
    let [first, count, flags, text_len] = [0, 1, 2, 3].map(|index| word(bytes, index));
    let scaled = |sectors: u64| sectors.checked_mul(sector).context("a range beyond all devices");
    let (at, len) = (scaled(first)?, scaled(count)?);
    let kind = if flags & MARK != 0 {
        let text = usize::try_from(text_len).ok().and_then(|len| bytes[ENTRY..].get(..len));
        Kind::Mark(String::from_utf8_lossy(text.context("a mark longer than its sector")?).into_owned())
    } else if flags & DISCARD != 0 {
        Kind::Discard
    } else if len > 0 {
        // A flush that comes with data is two entries; should it be one, its data is durable as well.
        Kind::Write { data, fua: flags & (FUA | FLUSH) != 0 }
    } else {
        ensure!(flags & FLUSH != 0, "neither data nor a flush nor a mark: flags {flags:#x}");
        Kind::Flush
    };
    Ok(Entry { at, len, kind })
}

fn word(bytes: &[u8], index: usize) -> u64 {
    let field = bytes.get(index * 8..index * 8 + 8).and_then(|field| field.try_into().ok());
    u64::from_le_bytes(field.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn sector_of(words: &[u64], text: &str) -> Vec<u8> {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend_from_slice(text.as_bytes());
        bytes.resize(512, 0);
        bytes
    }

    fn log_of(sectors: &[Vec<u8>]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        sectors.iter().for_each(|sector| file.write_all(sector).unwrap());
        file
    }

    #[test]
    fn writes_discards_flushes_and_marks_are_told_apart() {
        let file = log_of(&[
            sector_of(&[MAGIC, VERSION, 5, 512], ""),
            sector_of(&[8, 2, 0, 0], ""),
            vec![0xaa; 1024],
            sector_of(&[0, 0, FLUSH, 0], ""),
            sector_of(&[16, 4, DISCARD, 0], ""),
            sector_of(&[9, 1, FUA, 0], ""),
            vec![0xbb; 512],
            sector_of(&[0, 0, MARK, 6], "mark-7"),
        ]);
        let log = Log::read(file.path()).unwrap();
        let entry = |at, len, kind| Entry { at, len, kind };
        assert_eq!(
            log.entries,
            [
                entry(4096, 1024, Kind::Write { data: 1024, fua: false }),
                entry(0, 0, Kind::Flush),
                entry(8192, 2048, Kind::Discard),
                entry(4608, 512, Kind::Write { data: 3584, fua: true }),
                entry(0, 0, Kind::Mark("mark-7".to_owned())),
            ]
        );
        assert_eq!(log.data(3584, 512).unwrap(), [0xbb; 512]);
    }

    #[test]
    fn what_is_no_log_is_refused() {
        for sectors in [
            vec![sector_of(&[MAGIC + 1, VERSION, 0, 512], "")],
            vec![sector_of(&[MAGIC, 2, 0, 512], "")],
            vec![sector_of(&[MAGIC, VERSION, 0, 100], "")],
            vec![sector_of(&[MAGIC, VERSION, u64::MAX, 512], "")],
            vec![sector_of(&[MAGIC, VERSION, 1, 512], "")],
            vec![sector_of(&[MAGIC, VERSION, 1, 512], ""), sector_of(&[0, 0, MARK, 4000], "")],
            vec![sector_of(&[MAGIC, VERSION, 1, 512], ""), sector_of(&[0, 0, 0, 0], "")],
        ] {
            assert!(Log::read(log_of(&sectors).path()).is_err());
        }
    }
}
