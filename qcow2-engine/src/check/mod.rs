//! `check`: is every cluster counted as often as it is referred to, and does every entry make sense?
//!
//! [`check`] surveys an image without opening its chain (`survey.rs`), says what is wrong
//! (`findings.rs`), and repairs it if asked to (`repair.rs`, `rebuild.rs`). It takes images that cannot
//! be served, too: dirty, corrupt, encrypted, with subclusters or with a data file; of those it
//! checks the metadata. Nobody else may have the image open for writing; that is for the caller to
//! see to.

mod compare;
pub(crate) mod counts;
pub(crate) mod dirty;
mod doubts;
mod entry;
mod findings;
pub(crate) mod live;
mod on_disk;
mod rebuild;
mod repair;
mod statistics;
mod structures;
mod survey;
mod tables;
pub(crate) mod window;

pub use findings::{DEFAULT_MAX_FINDINGS, Finding, Findings, Owner, Problem, Remedy, Severity};
pub use repair::Repair;
pub use statistics::Statistics;

use crate::{
    error::Result,
    inspect::ImageFile,
    io::{Access, Io, SECTOR, Storage},
};
use qcow2_format::{Header, header};
use std::path::Path;
use survey::Survey;

/// How to check.
#[derive(Clone, Copy, Debug)]
pub struct CheckOptions {
    /// What to repair.
    pub repair: Repair,
    /// Findings to keep of each pass; all are counted.
    pub max_findings: usize,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self { repair: Repair::None, max_findings: DEFAULT_MAX_FINDINGS }
    }
}

/// The outcome of a check.
#[derive(Clone, Debug)]
pub struct CheckReport {
    /// What was found at first.
    pub found: Findings,
    /// What is there now: the same without a repair, else the findings of a second look.
    pub remaining: Findings,
    /// Why a repair did not do all that was asked for.
    pub refused: Vec<&'static str>,
    /// Numbers about the image as it is now.
    pub statistics: Statistics,
    /// The image is marked dirty: its refcounts may be behind.
    pub is_dirty: bool,
    /// The image is marked corrupt.
    pub is_corrupt: bool,
}

impl CheckReport {
    /// Leaks that the repair has removed.
    #[must_use]
    pub fn leaks_fixed(&self) -> u64 {
        self.found.leaks.saturating_sub(self.remaining.leaks)
    }

    /// Corruptions that the repair has removed.
    #[must_use]
    pub fn corruptions_fixed(&self) -> u64 {
        self.found.corruptions.saturating_sub(self.remaining.corruptions)
    }
}

/// Checks an image, and repairs it if `options` say so.
///
/// A repair that was begun may be interrupted at any moment: the image is then no worse than before,
/// and the next repair goes on. The dirty and corrupt marks go last, and only when a second look has
/// found no corruption.
///
/// # Errors
/// The file cannot be opened, its header is not one that can be decoded, it has features that are
/// not known, or a write of a repair failed. What cannot be read further on is a finding.
pub async fn check<I: Io>(
    io: &I,
    storage: &(impl Storage + ?Sized),
    path: &Path,
    options: CheckOptions,
) -> Result<CheckReport> {
    let access = if options.repair == Repair::None { Access::ReadOnly } else { Access::ReadWrite };
    let mut file = ImageFile::open(io, storage, path, access).await?;
    file.check_known()?;
    let survey = Survey::of(&file, options.max_findings).await;
    let found = survey.findings.clone();
    let statistics = survey.statistics;
    let is_marked = file.header().incompatible & MARKS != 0;
    let is_true = found.is_clean() && found.counted_beyond_end == 0 && !is_marked;
    if options.repair != Repair::None && is_true {
        // As a repair does: what an unknown bit vouches for is not checked here, and QEMU clears it then.
        clear_unknown_autoclear(&mut file).await?;
    }
    if options.repair == Repair::None || is_true {
        return Ok(report(file.header(), found.clone(), found, Vec::new(), statistics));
    }
    let refused = repair::run(&mut file, survey, options.repair).await?;
    let Survey { findings: remaining, statistics, .. } = Survey::of(&file, options.max_findings).await;
    if remaining.corruptions == 0 && remaining.check_errors == 0 && is_marked {
        clear_marks(&mut file, MARKS).await?;
    }
    Ok(report(file.header(), found, remaining, refused, statistics))
}

/// The bits that say that something may be wrong.
const MARKS: u64 = header::DIRTY | header::CORRUPT;

fn report(
    header: &Header,
    found: Findings,
    remaining: Findings,
    refused: Vec<&'static str>,
    statistics: Statistics,
) -> CheckReport {
    let is_set = |bit| header.incompatible & bit != 0;
    let (is_dirty, is_corrupt) = (is_set(header::DIRTY), is_set(header::CORRUPT));
    CheckReport { found, remaining, refused, statistics, is_dirty, is_corrupt }
}

/// Clears some of the bits that say that something may be wrong, durably.
async fn clear_marks(file: &mut ImageFile<'_, impl Io>, marks: u64) -> Result<()> {
    let features = file.header.incompatible & !marks;
    change_header(file, &[(header::INCOMPATIBLE_OFFSET, &features.to_be_bytes())]).await?;
    file.sync().await?;
    file.header.incompatible = features;
    Ok(())
}

/// Clears the autoclear bits that are not known here, durably, before the first change: what they vouch for
/// may be changed. A check counts the bitmaps, so that their bit stays; that of a data file goes where there
/// is none.
async fn clear_unknown_autoclear(file: &mut ImageFile<'_, impl Io>) -> Result<()> {
    let stray = if file.header.has_stray_raw_bit() { header::RAW_EXTERNAL } else { 0 };
    let known = file.header.autoclear & header::KNOWN_AUTOCLEAR & !stray;
    if known == file.header.autoclear {
        return Ok(());
    }
    change_header(file, &[(header::AUTOCLEAR_OFFSET, &known.to_be_bytes())]).await?;
    file.sync().await?;
    file.header.autoclear = known;
    Ok(())
}

/// Writes fields of the header, all of them at once: a disk writes a sector whole or not at all.
async fn change_header(file: &ImageFile<'_, impl Io>, fields: &[(u64, &[u8])]) -> Result<()> {
    let mut sector = file.read(0, SECTOR).await?;
    for (at, bytes) in fields {
        sector[*at as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    file.write(0, &sector).await
}
