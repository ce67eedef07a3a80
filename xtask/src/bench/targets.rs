//! The project's targets, as data, and what a document says of each: reached, not reached, or why not
//! measured.

use super::{document::Document, matrix::Engine, stats::Spread};

/// A document that a target may be judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum In {
    /// Instruction counts, any kernel.
    Count,
    /// Instruction counts of one kernel.
    CountOf(&'static str),
    Wall,
    /// Either mode; each says its own.
    Any,
    /// Not by this command at all.
    Elsewhere(&'static str),
}

/// What our figure is held against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Against {
    Peer(Engine),
    /// Our own figure in another row of the same boot.
    OurRow(&'static str),
    /// Our resident memory after the row, in MiB, at most.
    ResidentMib,
    /// Our own time, at most. In count mode a processor that does one instruction in a nanosecond.
    Milliseconds,
    /// What this command does not measure.
    Unmeasured,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    row: &'static str,
    against: Against,
    /// The ratio that is to be reached, or the bound that is not to be passed.
    bound: f64,
    judged: In,
}

const fn target(row: &'static str, against: Against, bound: f64, judged: In) -> Target {
    Target { row, against, bound, judged }
}

const LOOP: Against = Against::Peer(Engine::RublkLoop);
const NBD: Against = Against::Peer(Engine::QemuNbd);
const RAND_READ: &str = "preallocated/randread-4k/qd64/1job";
const RAND_WRITE: &str = "preallocated/randwrite-4k/qd64/1job";
const RAND_RW: &str = "preallocated/randrw-4k/qd64/1job";
const RW_512K: &str = "preallocated/rw-512k/qd64/1job";
const CHAIN_32: &str = "chain-32/randread-4k/qd64/1job";
const FOUR_TIB: &str = "mapped-4TiB/randread-4k/qd64/1job";
const FOUR_TIB_SETTLED: &str = "mapped-4TiB/randread-4k-settled/qd64/1job";
const CRITERION: In = In::Elsewhere("`--engine`, see [engine.md](engine.md)");

/// The table of the plan, a line for each figure.
pub(super) const TARGETS: &[Target] = &[
    target(RAND_READ, LOOP, 1.05, In::CountOf("6.12")),
    target(RAND_WRITE, LOOP, 1.05, In::CountOf("6.12")),
    target(RAND_RW, LOOP, 1.05, In::CountOf("6.12")),
    target(RW_512K, LOOP, 1.05, In::CountOf("6.12")),
    target(RAND_READ, NBD, 2.6, In::CountOf("6.12")),
    target(RAND_WRITE, NBD, 2.6, In::CountOf("6.12")),
    target(RAND_RW, NBD, 2.6, In::CountOf("6.12")),
    target(RW_512K, NBD, 3.0, In::CountOf("6.12")),
    target(RAND_WRITE, NBD, 4.5, In::Wall),
    target(RAND_READ, NBD, 6.0, In::Wall),
    target(RAND_RW, NBD, 4.5, In::Wall),
    target(RW_512K, NBD, 2.8, In::Wall),
    target("preallocated/randread-4k/qd1/1job", LOOP, 1.0 / 1.05, In::Wall),
    target("empty/randwrite-4k/qd64/1job", NBD, 4.0, In::Count),
    target(RW_512K, LOOP, 1.5, In::CountOf("7.3")),
    target("preallocated/rw-1m/qd64/1job", LOOP, 1.5, In::CountOf("7.3")),
    target("preallocated/randwrite-4k-fsync16/qd64/1job", NBD, 2.0, In::Any),
    target(CHAIN_32, Against::OurRow("chain-1/randread-4k/qd64/1job"), 0.9, In::Any),
    target(CHAIN_32, NBD, 5.5, In::Any),
    target(FOUR_TIB, Against::OurRow("mapped-1GiB/randread-4k/qd64/1job"), 0.85, In::Any),
    target(FOUR_TIB_SETTLED, Against::OurRow("mapped-1GiB/randread-4k-settled/qd64/1job"), 0.85, In::Count),
    target(FOUR_TIB, Against::ResidentMib, 64.0, In::Any),
    target(FOUR_TIB_SETTLED, Against::ResidentMib, 64.0, In::Count),
    // On several threads, which instructions do not show.
    target("compressed-zlib/read-512k/qd64/1job", NBD, 2.0, In::Wall),
    target("compressed-zstd/read-512k/qd64/1job", NBD, 2.0, In::Wall),
    target("attach/64TiB", NBD, 1.0, In::Any),
    target("attach/chain-32", NBD, 1.0, In::Any),
    target("attach/64TiB", Against::Milliseconds, 100.0, In::Count),
    target("attach/chain-32", Against::Milliseconds, 100.0, In::Count),
    target("look-up hits, 2 threads against 1: 1.9", Against::Unmeasured, 0.0, CRITERION),
    target("look-up hit: 100 ns", Against::Unmeasured, 0.0, CRITERION),
];

/// What a document says of a target.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Verdict {
    Reached(Spread),
    NotReached(Spread),
    /// Why there is no figure.
    NotMeasured(String),
}

impl Target {
    pub(super) const fn work(&self) -> &'static str {
        self.row
    }

    /// The target in words.
    pub(super) fn wanted(&self) -> String {
        match self.against {
            Against::Peer(engine) => format!("≥ {:.2} × {}", self.bound, engine.name()),
            Against::OurRow(row) => format!("≥ {:.2} × our own {row}", self.bound),
            Against::ResidentMib => format!("≤ {} MiB resident", self.bound),
            Against::Milliseconds => format!("≤ {} ms", self.bound),
            Against::Unmeasured => "–".into(),
        }
    }

    pub(super) fn judge(&self, document: &Document) -> Verdict {
        let elsewhere = match self.judged {
            In::Elsewhere(place) => Some(format!("by {place}")),
            In::Wall if document.mode != "wall" => Some("in wall mode".into()),
            In::Count | In::CountOf(_) if document.mode != "count" => Some("in count mode".into()),
            In::CountOf(kernel) if document.kernel != kernel => Some(format!("on Linux {kernel}")),
            _ => None,
        };
        if let Some(place) = elsewhere {
            return Verdict::NotMeasured(format!("judged {place}"));
        }
        let measured = match self.against {
            Against::Peer(peer) => document.advantage((self.row, Engine::Us), (self.row, peer)),
            Against::OurRow(row) => document.advantage((self.row, Engine::Us), (row, Engine::Us)),
            Against::ResidentMib => document.figure(self.row, Engine::Us, |sample| sample.resident_mib),
            Against::Milliseconds => document.figure(self.row, Engine::Us, |sample| sample.value),
            Against::Unmeasured => None,
        };
        let reached = |spread: &Spread| match self.against {
            Against::ResidentMib | Against::Milliseconds => spread.median <= self.bound,
            Against::Peer(_) | Against::OurRow(_) | Against::Unmeasured => spread.median >= self.bound,
        };
        match measured {
            Some(spread) if reached(&spread) => Verdict::Reached(spread),
            Some(spread) => Verdict::NotReached(spread),
            None => Verdict::NotMeasured(self.why_silent(document)),
        }
    }

    /// Why the row has no ratio.
    fn why_silent(&self, document: &Document) -> String {
        let Some(row) = document.rows.get(self.row) else { return "the row was not run".into() };
        let failures = row
            .engines
            .iter()
            .flat_map(|(engine, result)| result.failures.iter().map(move |why| format!("{engine}: {why}")));
        let said: Vec<_> = failures.collect();
        if said.is_empty() {
            "what it is held against was not in the same boot".into()
        } else {
            said.join("; ")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            document::{
                Unit,
                tests::{document, row},
            },
            matrix::{Extent, sessions},
        },
        *,
    };

    #[test]
    fn every_target_that_is_judged_here_has_its_rows_in_the_table() {
        let names: Vec<_> =
            sessions(Extent::Full, &[]).iter().flat_map(|s| &s.rows).map(|row| row.name()).collect();
        for target in TARGETS.iter().filter(|target| !matches!(target.judged, In::Elsewhere(_))) {
            assert!(names.iter().any(|name| name == target.row), "{}", target.row);
            if let Against::OurRow(row) = target.against {
                assert!(names.iter().any(|name| name == row), "{row}");
            }
        }
    }

    #[test]
    fn the_median_decides() {
        let judge = |ours: &[f64]| {
            let measured = row(
                Unit::RequestsPerSecond,
                &[(Engine::Us, ours), (Engine::RublkLoop, &[100.0, 100.0, 100.0])],
            );
            TARGETS[0].judge(&document(vec![(RAND_READ, measured)]))
        };
        assert!(matches!(judge(&[104.0, 106.0, 107.0]), Verdict::Reached(spread) if spread.median == 1.06));
        assert!(matches!(judge(&[104.0, 104.0, 107.0]), Verdict::NotReached(_)));
    }

    #[test]
    fn what_was_not_measured_says_why() {
        let empty = document(vec![]);
        assert_eq!(TARGETS[0].judge(&empty), Verdict::NotMeasured("the row was not run".into()));
        let wall = TARGETS.iter().find(|target| target.judged == In::Wall).unwrap();
        assert_eq!(wall.judge(&empty), Verdict::NotMeasured("judged in wall mode".into()));
        let mut measured = row(Unit::RequestsPerSecond, &[(Engine::Us, &[1.0]), (Engine::RublkLoop, &[])]);
        measured.engines.get_mut("rublk-loop").unwrap().failures.insert("does not attach".into());
        let silent = TARGETS[0].judge(&document(vec![(RAND_READ, measured)]));
        assert_eq!(silent, Verdict::NotMeasured("rublk-loop: does not attach".into()));
    }

    #[test]
    fn memory_is_bounded_from_above() {
        let target = TARGETS.iter().find(|target| target.against == Against::ResidentMib).unwrap();
        let judge = |mib: f64| {
            let mut measured = row(Unit::RequestsPerSecond, &[(Engine::Us, &[1.0])]);
            measured.engines.get_mut("ublk-qcow2").unwrap().samples[0].resident_mib = mib;
            target.judge(&document(vec![(FOUR_TIB, measured)]))
        };
        assert!(matches!(judge(60.0), Verdict::Reached(_)));
        assert!(matches!(judge(65.0), Verdict::NotReached(_)));
    }
}
