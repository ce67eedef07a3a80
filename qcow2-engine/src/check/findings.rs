//! What a check finds, in words and numbers.

pub use crate::owner::Owner;

use crate::error::Error;
use qcow2_format::Corruption;
use std::{fmt, ops::Range};

/// Findings that a report holds where the caller does not say it; more are only counted.
pub const DEFAULT_MAX_FINDINGS: usize = 1_000;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Space that nothing uses: no harm to data.
    Leak,
    /// Data may be wrong, or become so with the next write.
    Corruption,
    /// Something could not be looked at.
    CheckError,
}

/// What is wrong.
#[derive(Clone, Debug)]
pub enum Problem {
    /// A refcount is not the number of references.
    Refcount {
        /// The count in the refcount block.
        count: u64,
        /// The references that there are.
        references: u64,
    },
    /// A table entry that is illegal in itself.
    Entry(Corruption),
    /// Something lies beyond the end of the file.
    BeyondFile {
        /// What it is.
        owner: Owner,
        /// Where it should start, in bytes.
        host: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A cluster is used for two things that cannot share.
    Overlap {
        /// Host offset of the cluster.
        host: u64,
        /// What refers to it now.
        owner: Owner,
        /// What it was found to be before.
        other: Owner,
    },
    /// The copied flag of an entry does not agree with the refcount.
    CopiedFlag {
        /// Host offset of what the entry names.
        host: u64,
        /// Its refcount.
        count: u64,
        /// Whether the flag is set.
        is_set: bool,
    },
    /// A compressed cluster in an image with an external data file.
    CompressedInDataFile,
    /// A cluster of an external data file that is not where the guest has it.
    MisplacedInDataFile {
        /// Where the entry says that it is.
        host: u64,
        /// Where the guest has it.
        guest: u64,
    },
    /// A whole structure is damaged or cannot be read.
    Structure(Error),
}

/// What a repair does about a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// [`Repair::Leaks`](super::Repair::Leaks) and [`Repair::All`](super::Repair::All) do this.
    WithLeaks(&'static str),
    /// [`Repair::All`](super::Repair::All) does this.
    WithAll(&'static str),
    /// No repair is possible; why.
    None(&'static str),
}

/// One finding.
#[derive(Clone, Debug)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What holds the problem.
    pub table: Owner,
    /// File offset in bytes: of the table entry, or for a refcount of the cluster that it counts.
    pub at: u64,
    /// What is wrong.
    pub problem: Problem,
    /// What can be done about it.
    pub remedy: Remedy,
}

/// The findings of one pass over an image.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// Clusters whose refcount is larger than the number of references.
    pub leaks: u64,
    /// Everything that endangers data.
    pub corruptions: u64,
    /// Of the corruptions, the copied flags that do not agree with their count.
    pub(super) wrong_flags: u64,
    /// What could not be looked at.
    pub check_errors: u64,
    /// Clusters beyond the end of the file that are counted, and to which nothing refers. They are no
    /// findings, as for QEMU: no space is lost where the file has nothing, and a writer passes them by.
    pub counted_beyond_end: u64,
    /// The first of the findings, as many as were asked for.
    pub list: Vec<Finding>,
    max: usize,
    /// The first one that is more than a count that is behind.
    pub(super) damage: Option<Box<Finding>>,
}

impl Findings {
    pub(super) fn with_max(max: usize) -> Self {
        Self { max, ..Self::default() }
    }

    /// Whether nothing was found.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.total() == 0
    }

    /// Findings that are not in the list.
    #[must_use]
    pub fn omitted(&self) -> u64 {
        self.total() - self.list.len() as u64
    }

    fn total(&self) -> u64 {
        self.leaks + self.corruptions + self.check_errors
    }

    pub(super) fn push(&mut self, finding: Finding) {
        match finding.severity {
            Severity::Leak => self.leaks += 1,
            Severity::Corruption => self.corruptions += 1,
            Severity::CheckError => self.check_errors += 1,
        }
        if self.damage.is_none() && !finding.is_of_counts() {
            self.damage = Some(Box::new(finding.clone()));
        }
        if self.list.len() < self.max {
            self.list.push(finding);
        }
    }

    pub(super) fn corruption(&mut self, table: Owner, at: u64, problem: Problem, remedy: Remedy) {
        self.wrong_flags += u64::from(matches!(problem, Problem::CopiedFlag { .. }));
        self.push(Finding { severity: Severity::Corruption, table, at, problem, remedy });
    }

    /// Takes back what a repair of all would do about entries of `table` in these bytes of the file.
    pub(super) fn take_back(&mut self, table: Owner, bytes: Range<u64>, why: &'static str) {
        let theirs = |finding: &&mut Finding| finding.table == table && bytes.contains(&finding.at);
        for finding in self.list.iter_mut().filter(theirs) {
            if let Remedy::WithAll(_) = finding.remedy {
                finding.remedy = Remedy::None(why);
            }
        }
    }

    /// A structure that cannot be used: damage where its content is to blame, else a check error.
    pub(super) fn structure(&mut self, table: Owner, at: u64, error: Error) {
        let severity = match error.kind() {
            crate::ErrorKind::Corrupt => Severity::Corruption,
            _ => Severity::CheckError,
        };
        let remedy = Remedy::None("what it holds is not known");
        self.push(Finding { severity, table, at, problem: Problem::Structure(error), remedy });
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, at, .. } = self;
        match &self.problem {
            Problem::Refcount { count, references } => {
                write!(f, "cluster at offset {at:#x}: refcount={count} references={references}")?;
            }
            Problem::Entry(source) => write!(f, "{table}, byte {at:#x}: {source}")?,
            Problem::BeyondFile { owner, host, len } => {
                write!(
                    f,
                    "{table}, byte {at:#x}: {owner} at {host:#x}, {len} bytes, is beyond the end of the file"
                )?;
            }
            Problem::Overlap { host, owner, other } => {
                write!(f, "{table}, byte {at:#x}: {owner} at {host:#x} is also the {other}")?;
            }
            Problem::CopiedFlag { host, count, is_set } => {
                let state = if *is_set { "set" } else { "missing" };
                write!(f, "{table}, byte {at:#x}: copied flag {state} for {host:#x}, refcount={count}")?;
            }
            Problem::CompressedInDataFile => {
                write!(f, "{table}, byte {at:#x}: compressed cluster in an image with a data file")?;
            }
            Problem::MisplacedInDataFile { host, guest } => {
                write!(
                    f,
                    "{table}, byte {at:#x}: data cluster at {host:#x} of the data file, not at {guest:#x}"
                )?;
            }
            Problem::Structure(error) => write!(f, "{table} at {at:#x}: {error}")?,
        }
        match self.remedy {
            Remedy::WithLeaks(action) => write!(f, " [repair: {action}]"),
            Remedy::WithAll(action) => write!(f, " [repair all: {action}]"),
            Remedy::None(why) => write!(f, " [no repair: {why}]"),
        }
    }
}
