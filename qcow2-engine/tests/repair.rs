//! What a repair must not do.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;
#[allow(dead_code, reason = "shared by several test programs")]
#[path = "common/damaged.rs"]
mod damaged;

use common::{IMAGE, run};
use damaged::{COPIED, Parts};
use qcow2_engine::{CheckOptions, Repair, check, io::mem::MemFiles};
use std::path::Path;

/// A snapshot's L1 entry is damaged, and with it the references are out of sight that it holds to the L2
/// table and its clusters; their counts are one too low besides. A repair that then believed the counts
/// would flag them as the active mapping's own, and the next write would go over the snapshot's data.
#[test]
fn what_damage_may_still_refer_to_is_not_said_to_have_one_owner() {
    let mut parts = Parts::shared("cluster_size=4096", 1 << 20);
    for (entry, host) in [(parts.l1_entry(0), parts.l2_table(0)), (parts.l2_entry(0), parts.data(0))] {
        assert_eq!(parts.word(entry) & COPIED, 0, "the snapshot shares it");
        parts.set_count(host, 1);
    }
    // Not aligned to a cluster: it names nothing, and what it should name cannot be told.
    let at = parts.snapshot_l1();
    parts.set(at, parts.word(at) | 0x200);

    let files = MemFiles::default();
    files.put(IMAGE, parts.bytes);
    let options = CheckOptions { repair: Repair::All, ..CheckOptions::default() };
    let report = run(check(&files, &files, Path::new(IMAGE), options)).expect("checks");
    assert!(report.remaining.corruptions > 0, "the entry cannot be repaired");
    let parts = Parts::of(files.get(IMAGE).expect("kept"));
    let (table, data) = (parts.word(parts.l1_entry(0)), parts.word(parts.l2_entry(0)));
    assert_eq!((table & COPIED, data & COPIED), (0, 0), "flagged, and the snapshot has them, too");
}
