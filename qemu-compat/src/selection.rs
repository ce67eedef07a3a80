//! Which of the cases run: those of a name, and those that a run which ended early has not come to.
//!
//! Chosen last of all, so that a case is the same one whatever else is left out.

use crate::report::Case;
use anyhow::{Context, Result, ensure};

/// Which cases are wanted; all of them by default.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Selection {
    /// Only cases whose name contains this; may be repeated, then one of these.
    #[arg(long = "filter", value_name = "PART")]
    filters: Vec<String>,
    /// Pass over what comes before this case.
    #[arg(long, value_name = "CASE")]
    from: Option<String>,
}

impl Selection {
    /// The wanted ones of `cases`, in their order.
    ///
    /// # Errors
    /// Fails when none is, or there is no case to begin with: a misspelt name must not pass as a success.
    pub fn of(&self, mut cases: Vec<Case>) -> Result<Vec<Case>> {
        if let Some(first) = &self.from {
            let at = cases.iter().position(|case| case.name() == first);
            cases.drain(..at.with_context(|| format!("there is no case {first:?} to begin with"))?);
        }
        cases.retain(|case| {
            self.filters.is_empty() || self.filters.iter().any(|part| case.name().contains(part))
        });
        ensure!(!cases.is_empty(), "no case has one of {:?} in its name", self.filters);
        Ok(cases)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn chosen(filters: &[&str], from: Option<&str>) -> Result<Vec<String>> {
        let case = |name: &str| Case::new(name, Duration::ZERO, || Ok(()));
        let cases = ["fs/xfs", "fs/ext4", "kill/xfs", "fs/xfs/2q"].map(case).into();
        let filters = filters.iter().map(ToString::to_string).collect();
        let selection = Selection { filters, from: from.map(str::to_owned) };
        Ok(selection.of(cases)?.iter().map(|case| case.name().to_owned()).collect())
    }

    #[test]
    fn names_select_and_a_run_is_taken_up_where_it_ended() {
        assert_eq!(chosen(&[], None).unwrap().len(), 4);
        assert_eq!(chosen(&["kill", "ext"], None).unwrap(), ["fs/ext4", "kill/xfs"]);
        assert_eq!(chosen(&[], Some("kill/xfs")).unwrap(), ["kill/xfs", "fs/xfs/2q"]);
        assert_eq!(chosen(&["fs/"], Some("fs/ext4")).unwrap(), ["fs/ext4", "fs/xfs/2q"]);
    }

    #[test]
    fn a_name_that_no_case_has_is_an_error() {
        assert!(chosen(&["btrfs"], None).is_err());
        // A part of a name may be that of several.
        assert!(chosen(&[], Some("kill")).is_err());
        assert!(chosen(&["ext4"], Some("kill/xfs")).is_err());
    }
}
