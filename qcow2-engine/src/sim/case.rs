//! A life to be simulated, and what a campaign of them has covered.

use super::{
    faults::{Failing, FileSystem, HeldBack},
    request::Request,
    tools::Tool,
    wound::Wound,
};
use crate::{Paging, RuleName};
use std::collections::HashSet;

/// What is done with an image.
#[derive(Clone, Debug)]
pub enum Work {
    /// It is served. Requests, one after the other on each lane; the lanes run at the same time.
    Lanes(Vec<Vec<Request>>),
    /// A tool works on it.
    Tool(Tool),
}

/// A life to be simulated. The same case always goes the same way.
#[derive(Clone, Debug)]
pub struct Case {
    /// What is done.
    pub work: Work,
    /// Chooses the order of completions and the random crash states.
    pub seed: u64,
    /// The operation that lands late.
    pub held_back: HeldBack,
    /// Operations that fail, counted from the opening.
    pub fault: Option<Failing>,
    /// The host is full after so many operations.
    pub fills_after: Option<u64>,
    /// What the file system can do.
    pub file_system: FileSystem,
    /// How the metadata is cut into pages.
    pub paging: Paging,
    /// All requests are of one lane, as those of a queue are.
    pub is_one_lane: bool,
    /// So many records are in the redo log from the beginning.
    pub logged: u64,
    /// A queue ends after so many operations, when it has one of this kind in flight: the other lanes go on.
    pub abandons_after: Option<(u64, HeldBack)>,
    /// The damage that the image has.
    pub wound: Option<Wound>,
    /// The rule that is switched off.
    pub disabled: Option<RuleName>,
}

impl Case {
    /// Whether an operation may fail.
    pub(super) fn has_faults(&self) -> bool {
        self.is_faulty() || self.fills_after.is_some()
    }

    /// Whether anything may fail, also what needs no room.
    pub(super) fn is_faulty(&self) -> bool {
        self.fault.is_some() || self.wound.is_some() || self.abandons_after.is_some()
    }

    pub(super) fn searches_for_leaks(&self) -> bool {
        let Work::Lanes(lanes) = &self.work else { return false };
        lanes.iter().flatten().any(|request| matches!(request, Request::Reclaim(_)))
    }

    /// A request that does not end keeps what it may still use, and what is on its way to be freed
    /// cannot be told from a leak of a cluster that is in use: the search may give up on those.
    pub(super) fn search_may_give_up(&self) -> bool {
        self.held_back == HeldBack::Growth
    }
}

/// What was covered.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Cases.
    pub workloads: u64,
    /// Crash states judged.
    pub states: u64,
    /// Hashes of the images among them.
    pub images: HashSet<u64>,
    /// The most leaked clusters that a crash left.
    pub worst_leaks: u64,
    /// Completed operations of all cases.
    pub operations: u64,
    /// Processes killed.
    pub kills: u64,
}

impl Totals {
    /// Adds what another thread covered.
    pub fn add(&mut self, other: Self) {
        self.workloads += other.workloads;
        self.states += other.states;
        self.images.extend(other.images);
        self.worst_leaks = self.worst_leaks.max(other.worst_leaks);
        self.operations += other.operations;
        self.kills += other.kills;
    }
}
