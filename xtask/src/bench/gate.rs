//! `--gate`, a lane of `cargo xtask test`: what no change may make slower than by the noise of a count.
//!
//! The targets' workloads twice, in count mode on Linux 6.12, against those peers that every machine has after
//! `setup`: qemu-nbd, and the kernel's loop device on the raw file. A floor lies some 7 % below what is measured, and
//! where the figures swing, below what they swing to; docs/benchmarks has the figures themselves.

use super::{
    document::Document,
    matrix::Engine::{self, KernelLoop, QemuNbd, Us},
};
use crate::test::Count;

/// What is held against whom.
pub(super) const ENGINES: [Engine; 3] = [QemuNbd, KernelLoop, Us];

/// The middle of which is judged: large requests swing, by the memory that they happen to touch first.
pub(super) const ROUNDS: u32 = 2;

/// The least that a row may be of what a peer makes of it.
struct Floor {
    row: &'static str,
    peer: Engine,
    least: f64,
}

const fn floor(row: &'static str, peer: Engine, least: f64) -> Floor {
    Floor { row, peer, least }
}

const FLOORS: [Floor; 10] = [
    floor("preallocated/randread-4k/qd64/1job", QemuNbd, 2.45),
    floor("preallocated/randread-4k/qd64/1job", KernelLoop, 0.94),
    floor("preallocated/randwrite-4k/qd64/1job", QemuNbd, 2.60),
    floor("preallocated/randwrite-4k/qd64/1job", KernelLoop, 0.93),
    floor("preallocated/randrw-4k/qd64/1job", QemuNbd, 2.45),
    floor("preallocated/randrw-4k/qd64/1job", KernelLoop, 0.94),
    floor("preallocated/rw-512k/qd64/1job", QemuNbd, 3.30),
    floor("preallocated/rw-512k/qd64/1job", KernelLoop, 0.74),
    floor("empty/randwrite-4k/qd64/1job", QemuNbd, 2.15),
    floor("empty/randwrite-4k/qd64/1job", KernelLoop, 0.82),
];

/// Holds a document against the floors, and prints each.
pub(super) fn judge(document: &Document) -> Count {
    let mut count = Count::default();
    for Floor { row, peer, least } in FLOORS {
        let measured = document.advantage((row, Us), (row, peer)).map(|spread| spread.median);
        let is_kept = measured.is_some_and(|ratio| ratio >= least);
        let shown = measured.map_or_else(|| "no figure".to_owned(), |ratio| format!("{ratio:.2}"));
        let verdict = if is_kept { "kept" } else { "NOT KEPT" };
        println!("gate: {row}: {shown} of {}, floor {least:.2}: {verdict}", peer.name());
        *if is_kept { &mut count.passed } else { &mut count.failed } += 1;
    }
    count
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

    /// A document in which we make so much of what the peers make.
    fn measured(ratio: f64) -> Document {
        let engines = [(Us, &[ratio][..]), (QemuNbd, &[1.0]), (KernelLoop, &[1.0])];
        document(FLOORS.iter().map(|floor| (floor.row, row(Unit::RequestsPerSecond, &engines))).collect())
    }

    #[test]
    fn every_floor_is_asked_for_and_none_is_passed_unmeasured() {
        assert_eq!(judge(&measured(10.0)), Count { passed: 10, failed: 0 });
        assert_eq!(judge(&measured(1.0)), Count { passed: 5, failed: 5 }, "of the loop, but not of qemu-nbd");
        assert_eq!(judge(&document(vec![])), Count { passed: 0, failed: 10 });
    }

    #[test]
    fn each_row_is_one_of_the_quick_table() {
        let rows: Vec<_> =
            sessions(Extent::Quick, &[]).into_iter().flat_map(|session| session.rows).collect();
        for floor in FLOORS {
            assert!(rows.iter().any(|row| row.name() == floor.row), "{}", floor.row);
        }
    }
}
