//! What a survey leaves in doubt, and a repair therefore keeps its hands off.

use super::{findings::Owner, survey::Reference};
use qcow2_format::HostCluster;
use std::collections::{BTreeMap, HashMap, HashSet};

/// What damaged entries may stand for. A doubt is never taken back: it only grows, in a repair too.
#[derive(Default)]
pub(super) struct Doubts {
    /// Damage that no repair undoes hides references: what seems unused may not be.
    pub(super) hides_references: bool,
    /// L2 tables that may be something else: entries that cannot be, or clusters of data. They are
    /// never written to.
    pub(super) tables: HashSet<HostCluster>,
    /// Clusters of L1 tables that are something else, too: what looks like an entry there may be that.
    pub(super) shared_l1: HashSet<HostCluster>,
    /// L1 tables, by file offset, with an entry that cannot be: they may be something else. Nothing in them is
    /// cleared.
    pub(super) senseless_l1: HashSet<u64>,
    /// Clusters of L2 tables outside the active mapping that are data, too, and the first entry that says
    /// so. Shared and counted as often as they are referred to, they are copied before they change, so that
    /// nothing is lost.
    pub(super) under_data: HashMap<HostCluster, Reference>,
    /// L2 tables are beyond the end of the file, or snapshots beyond their limits; a repair of all drops
    /// them.
    pub(super) lost_tables: bool,
    /// There are entries beyond the end of the file that cannot be cleared.
    pub(super) stuck_entries: bool,
}

impl Doubts {
    /// A cluster that is `other` is also something else, and neither is of the refcount structure.
    pub(super) fn note(&mut self, cluster: HostCluster, other: Owner) {
        match other {
            Owner::L2 => drop(self.tables.insert(cluster)),
            Owner::ActiveL1 | Owner::SnapshotL1 => drop(self.shared_l1.insert(cluster)),
            _ => {}
        }
    }

    /// Whether an L2 table may be something else, too.
    pub(super) fn concern(&self, table: HostCluster) -> bool {
        self.tables.contains(&table) || self.under_data.contains_key(&table)
    }
}

/// Clusters that are called a part of the refcount structure and something else. The structure gives way,
/// because it can be made anew; but it may be what the cluster is in truth.
#[derive(Default)]
pub(super) struct Contested {
    /// Refcount blocks that are also something else.
    blocks: HashSet<HostCluster>,
    /// L2 tables that something also calls a part of the structure.
    tables: HashSet<HostCluster>,
    /// Any L2 table may be, because the header calls one table by two names.
    pub(super) all_tables: bool,
}

impl Contested {
    /// A cluster that is `other` is also something else, and one of the two is of the refcount structure.
    pub(super) fn note(&mut self, cluster: HostCluster, other: Owner) {
        match other {
            Owner::RefcountBlock => drop(self.blocks.insert(cluster)),
            Owner::L2 => drop(self.tables.insert(cluster)),
            _ => {}
        }
    }

    /// Whether an L2 table may be a part of the refcount structure in truth.
    pub(super) fn has_table(&self, table: HostCluster) -> bool {
        self.all_tables || self.tables.contains(&table)
    }

    /// Whether any table may be.
    pub(super) fn has_tables(&self) -> bool {
        self.all_tables || !self.tables.is_empty()
    }

    /// Takes those out of the `blocks` that are also something else: they are neither believed nor written
    /// to.
    pub(super) fn disown(&self, blocks: &mut BTreeMap<u64, HostCluster>) {
        if !self.blocks.is_empty() {
            blocks.retain(|_, block| !self.blocks.contains(block));
        }
    }
}
