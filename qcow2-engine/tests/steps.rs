//! Rules R9 and R10: the steps of a repair, and of making an image, are barriers apart.
//!
//! Each test takes the operations of one real run apart at the barrier of its rule, and demands which places
//! were written before it and which after.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;
#[allow(dead_code, reason = "shared by several test programs")]
#[path = "common/damaged.rs"]
mod damaged;

use common::{
    IMAGE, create,
    hooked::{Hook, Hooked, Operation},
    run,
};
use damaged::{COPIED, Parts};
use qcow2_engine::{
    CheckOptions, Image, Lane, OpenOptions, Preallocation, Repair, RuleName, check,
    create::create as make,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::{CreateOptions, header};
use std::{cell::RefCell, io, ops::Range, path::Path, rc::Rc};

const CLUSTER: u64 = 4096;

/// What was done to the file.
enum Step {
    Write(Range<u64>),
    Barrier(RuleName),
}

/// Remembers the steps.
#[derive(Default)]
struct Recorder {
    steps: RefCell<Vec<Step>>,
}

impl Hook for Recorder {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::Write { at, buf } => {
                self.steps.borrow_mut().push(Step::Write(at..at + buf.len() as u64));
            }
            Operation::Sync(Some(rule)) => self.steps.borrow_mut().push(Step::Barrier(rule)),
            _ => {}
        }
        Ok(())
    }
}

impl Recorder {
    /// Demands a barrier with this name between the last write to `earlier` and the first one to `later`,
    /// both of which are written.
    fn hold_apart(&self, rule: RuleName, earlier: &Range<u64>, later: &Range<u64>) {
        let steps = self.steps.borrow();
        let touches = |step: &Step, place: &Range<u64>| matches!(step, Step::Write(at) if at.start < place.end && place.start < at.end);
        let last =
            steps.iter().rposition(|step| touches(step, earlier)).expect("the earlier place is written");
        let first = steps.iter().position(|step| touches(step, later)).expect("the later place is written");
        assert!(last < first, "{rule:?}: {later:?} is written before {earlier:?}");
        let is_barrier = |step: &Step| matches!(step, Step::Barrier(name) if *name == rule);
        assert!(steps[last..first].iter().any(is_barrier), "{rule:?} does not come between");
    }
}

/// An image with two clusters of data, to be damaged.
fn patient() -> Parts {
    let files = MemFiles::default();
    let options = CreateOptions { virtual_size: 1 << 20, cluster_bits: 12, ..CreateOptions::default() };
    create(&files, IMAGE, &options);
    let options = OpenOptions::default();
    let image = run(Image::open(&files, &files, Path::new(IMAGE), &options)).expect("opens");
    let lane = Lane::new(&image, files.clone(), 1);
    run(lane.write(0, Buf::from_bytes(&[1; 2 * CLUSTER as usize]))).expect("writes");
    run(lane.close()).expect("closes");
    Parts::of(files.get(IMAGE).expect("kept"))
}

/// The entry for one of its clusters.
fn entry(patient: &Parts, cluster: u64) -> Range<u64> {
    let at = patient.l2_entry(cluster * CLUSTER);
    at..at + 8
}

/// The block that counts its clusters.
fn block(patient: &Parts) -> Range<u64> {
    patient.refcount_block()..patient.refcount_block() + CLUSTER
}

/// What is behind its end.
fn end(patient: &Parts) -> Range<u64> {
    patient.bytes.len() as u64..u64::MAX
}

/// Repairs it, and demands that nothing is left.
fn repaired(patient: Parts) -> Rc<Recorder> {
    let host = Hooked::new(&MemFiles::default(), Recorder::default());
    host.files.put(IMAGE, patient.bytes);
    let options = CheckOptions { repair: Repair::All, ..CheckOptions::default() };
    let report = run(check(&host, &host.files, Path::new(IMAGE), options)).expect("checks");
    assert!(!report.found.is_clean() && report.remaining.is_clean(), "{:?}", report.remaining.list);
    host.hook
}

/// The refcounts have to be rebuilt, and an entry names the place where they will be.
fn without_refcounts() -> Parts {
    let mut patient = patient();
    let behind = end(&patient).start;
    patient.set(patient.l2_entry(0), behind | COPIED);
    patient.set(patient.header.refcount_table.0, behind + 8 * CLUSTER);
    patient
}

#[test]
fn r9_entries_are_cleared_before_the_file_grows_over_what_they_name() {
    let patient = without_refcounts();
    let (cleared, end) = (entry(&patient, 0), end(&patient));
    repaired(patient).hold_apart(RuleName::EntriesBeforeGrowth, &cleared, &end);
}

#[test]
fn r9_a_rebuilt_structure_is_written_before_the_header_names_it() {
    let patient = without_refcounts();
    let end = end(&patient);
    repaired(patient).hold_apart(RuleName::RebuiltBeforeHeader, &end, &(0..512));
}

#[test]
fn r9_entries_are_cleared_before_counts_are_lowered() {
    let mut patient = patient();
    let (cleared, block) = (entry(&patient, 0), block(&patient));
    patient.set(cleared.start, patient.word(cleared.start) | 1 << 50);
    repaired(patient).hold_apart(RuleName::EntriesBeforeCounts, &cleared, &block);
}

/// A cluster whose count is too high, and which is not said to have one owner.
fn counted_twice() -> Parts {
    let mut patient = patient();
    let at = patient.l2_entry(CLUSTER);
    patient.set(at, patient.word(at) & !COPIED);
    patient.set_count(patient.data(CLUSTER), 2);
    patient.set(header::INCOMPATIBLE_OFFSET, patient.header.incompatible | header::CORRUPT);
    patient
}

#[test]
fn r9_counts_are_lowered_before_clusters_are_flagged() {
    let patient = counted_twice();
    let (flagged, block) = (entry(&patient, 1), block(&patient));
    repaired(patient).hold_apart(RuleName::CountsBeforeFlags, &block, &flagged);
}

#[test]
fn r9_all_is_repaired_before_the_mark_goes() {
    let patient = counted_twice();
    let flagged = entry(&patient, 1);
    repaired(patient).hold_apart(RuleName::RepairBeforeMark, &flagged, &(0..512));
}

/// What making an image over another one does.
fn made_anew() -> Rc<Recorder> {
    let host = Hooked::new(&MemFiles::default(), Recorder::default());
    host.files.put(IMAGE, patient().bytes);
    let options = CreateOptions { virtual_size: 1 << 20, cluster_bits: 12, ..CreateOptions::default() };
    run(make(&host, &host.files, Path::new(IMAGE), &options, Preallocation::Off)).expect("creates");
    host.hook
}

#[test]
fn r10_the_old_image_is_none_before_there_is_new_content() {
    // The header itself is written twice: it goes first and comes last.
    let host = made_anew();
    let first = host
        .steps
        .borrow()
        .iter()
        .take(2)
        .map(|step| match step {
            Step::Write(place) => format!("{place:?}"),
            Step::Barrier(rule) => format!("{rule:?}"),
        })
        .collect::<Vec<_>>();
    assert_eq!(first, ["0..512", "WipeBeforeContent"]);
}

#[test]
fn r10_tables_are_written_before_the_header_names_them() {
    let host = made_anew();
    let wiped = host.steps.borrow_mut().remove(0);
    assert!(matches!(wiped, Step::Write(place) if place.start == 0), "the old header goes first");
    host.hold_apart(RuleName::ContentBeforeHeader, &(CLUSTER..u64::MAX), &(0..512));
}
