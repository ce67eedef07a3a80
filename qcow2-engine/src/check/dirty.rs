//! The dirty bit, at open: "if this bit is set then refcounts may be inconsistent".
//!
//! A writer with lazy refcounts sets the bit before it lets counts fall behind, and clears it when
//! they are true again. If it was killed in between, whoever opens the image for writing has to make
//! them true first, because the next allocation believes them. That is the repair of a check, in its
//! order, and then the bit:
//!
//! ```text
//! survey → counts raised, or rebuilt → copied flags → counts lowered → second survey → bit cleared
//! ```
//!
//! each durable before the next. A crash anywhere leaves the bit set, and no count lower than it was
//! while something refers to the cluster. Wrong counts and flags are all that lazy refcounts excuse:
//! an image with other damage is refused before anything has been written, and so is one whose counts
//! cannot be told because damage hides references.

use super::{clear_marks, findings::Finding, findings::Problem, findings::Remedy, repair, survey::Survey};
use crate::{
    Repair,
    error::{Error, Result},
    inspect::ImageFile,
    io::Io,
    owner::Owner,
};
use qcow2_format::header;
use std::sync::Arc;

/// Makes the refcounts of an image that is marked dirty true, and clears the mark.
///
/// # Errors
/// Damage beyond what lazy refcounts explain, of which the first is named, and nothing has been
/// written; a failed read or write, or a repair that did not help: the mark is still there, and
/// another attempt may be made.
pub(crate) async fn repair_at_open(file: &mut ImageFile<'_, impl Io>) -> Result<()> {
    let survey = Survey::of(file, 1).await;
    if let Some(damage) = survey.findings.damage.as_deref() {
        return Err(refused(file, damage.to_string()));
    }
    let doubts = &survey.doubts;
    if doubts.hides_references || !doubts.tables.is_empty() || doubts.stuck_entries || doubts.lost_tables {
        return Err(refused(file, "damaged tables may hide references".to_owned()));
    }
    let (leaks, wrong) = (survey.findings.leaks, survey.findings.corruptions);
    if !survey.findings.is_clean() {
        if let Some(reason) = repair::run(file, survey, Repair::All).await?.first() {
            return Err(refused(file, (*reason).to_owned()));
        }
        let second = Survey::of(file, 1).await.findings;
        if let Some(finding) = second.list.first() {
            return Err(refused(file, format!("it did not help: {finding}")));
        }
    }
    clear_marks(file, header::DIRTY).await?;
    tracing::info!(
        "{}: was marked dirty: {wrong} refcounts and flags repaired, {leaks} leaks given back",
        file.name()
    );
    Ok(())
}

fn refused(file: &ImageFile<'_, impl Io>, reason: String) -> Error {
    Error::Dirty { file: Arc::clone(file.name()), reason }
}

impl Finding {
    /// Whether it is nothing but a count that is behind, or a flag that follows from one, and can be
    /// put right.
    pub(super) fn is_of_counts(&self) -> bool {
        match (&self.problem, self.remedy) {
            (_, Remedy::None(_)) | (Problem::Overlap { .. }, _) => false,
            (Problem::Refcount { .. } | Problem::CopiedFlag { .. }, _) => true,
            _ => self.table == Owner::RefcountTable,
        }
    }
}
