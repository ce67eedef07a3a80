//! What a state of an image is held against: the promise, or for a damaged image what is left of it.

use super::{
    counts::Standing,
    file::sector_bytes,
    model::Model,
    oracle::{self, Findings, Memo},
    workload::Fixture,
    wound,
};

/// Judges the states of one moment.
pub(super) struct Judge<'a> {
    case: oracle::Case<'a>,
    /// How the counts of an image with damage stood.
    standing: Option<&'a Standing>,
    /// Such an image says that it is corrupt.
    is_marked: bool,
}

impl<'a> Judge<'a> {
    pub(super) fn of(
        fixture: &'a Fixture,
        model: &'a Model,
        memo: &'a Memo,
        standing: Option<&'a Standing>,
        is_marked: bool,
    ) -> Self {
        let case = oracle::Case {
            model,
            sizes: [sector_bytes(model.len()); 2],
            backing: fixture.backing.as_deref(),
            snapshots: &fixture.snapshots,
            initial: &fixture.content,
            memo,
        };
        Self { case, standing, is_marked }
    }

    /// # Errors
    /// The first violation, in words.
    pub(super) fn judge(&self, bytes: &[u8]) -> Result<Findings, String> {
        match self.standing {
            None => oracle::judge(bytes, &self.case),
            Some(standing) => wound::judge(bytes, &self.case, standing, self.is_marked),
        }
    }
}
