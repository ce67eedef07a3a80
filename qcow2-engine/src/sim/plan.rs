//! What a case is aimed at, and which images it needs for that.
//!
//! Which requests it has is in `lanes`, and what the host does to them in `hardship`.

use super::{
    rng::Rng,
    workload::{Fixture, Initial, Past, Variant},
};

/// What a case is aimed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// Every sequence of a few requests, sooner or later.
    Short,
    /// The same requests, all at the same time.
    ShortAtOnce,
    /// Lanes that get in each other's way.
    Lanes,
    /// Lanes that meet in a few clusters.
    Meeting,
    /// A longer life.
    Long,
    /// An operation fails.
    Faulty,
    /// There is no room for a new extent, or for a whole one.
    NoRoom,
    /// Nor for the next one, and counts of the clusters that are given up for it cannot be read.
    NoRoomUnread,
    /// The host is full from some moment on: who needs no new cluster goes on.
    FullHost,
    /// Several flushes share a cut that fails.
    FailedCut,
    /// Clusters of a write that failed, and has written a part of them, are given to the next one.
    TornWrite,
    /// Tables that a snapshot shares are copied, several at a time, and some cannot be read: what was
    /// reserved for them goes back to the extent, or does not fit there any more.
    FailedCopy,
    /// Lanes give clusters back at the same time.
    Freeing,
    /// More changes of the mapping than the redo log holds.
    FullLog,
    /// A lane gives clusters back, and takes more when that is done: what another one has freed meanwhile, in
    /// a cut that has failed.
    FreeingAfterFailedCut,
    /// Counts of clusters that are to be given back cannot be read.
    FreeingUnread,
    /// Refcount pages go from memory, and come back, while a cut writes them.
    FreeingBesideCut,
    /// Reads and overwrites, in place, of clusters that another lane discards, gives back and reuses for
    /// what it writes elsewhere (R5). The first one lands when all of that has been done.
    Reuse,
    /// L2 tables in clusters that had other content.
    ReuseForTables,
    /// Small writes with a flush after each, to clusters and tables that a snapshot shares: what the next
    /// one refers to is counted and durable already, so that no other rule's barrier stands in for that
    /// of R4.
    Flushed,
    /// Lanes that take new extents, with new refcount blocks, beside cuts; an operation that makes the file
    /// longer lands late.
    Growing,
    /// They need new refcount blocks at once, and some of the metadata cannot be written.
    GrowingFails,
    /// The search for leaks, beside requests.
    Search,
    /// The search for leaks, while lanes take new extents, of which one waits for its space (R8).
    SearchWhileAllocating,
    /// The refcount table grows and moves (R2).
    FullTable,
    /// The redo log has just room for what makes the table, or a refcount block, and less when the file
    /// reaches over it.
    FillingLog,
    /// It does so under the search for leaks. The image is large, so this is slow.
    SearchFullTable,
    /// A queue ends, with what it has in flight.
    QueueEnds,
    /// A queue ends that overwrites what another one frees and uses again, or writes zeros around a payload.
    QueueEndsInPlace,
    /// A queue ends that writes into zero clusters which keep their place, zeros around the payload: others
    /// write beside it, or wait to do so.
    QueueEndsInZeros,
    /// A queue ends that punches holes; others free, search for leaks, and use what is free again.
    QueueEndsPunching,
    /// What is free at the file's end has old content. Some of it is taken, and not used: the file could not
    /// grow,
    OldEnd,
    /// or what goes around the payload could not be read.
    OldEndUnread,
    /// The image has damage, which requests meet or do not.
    Wounded,
    /// A tool works on the image.
    Tool,
    /// A disk that has been cut off is to grow over a backing file that is longer: with zeros where that would
    /// show, which version 2 cannot say.
    GrowOverMore,
}

/// Of so many cases, how many follow which plan.
const MIX: [(u64, Plan); 36] = [
    (20, Plan::Short),
    (8, Plan::ShortAtOnce),
    (14, Plan::Lanes),
    (24, Plan::Meeting),
    (8, Plan::Long),
    (30, Plan::Faulty),
    (16, Plan::NoRoom),
    (8, Plan::NoRoomUnread),
    (14, Plan::FullHost),
    (12, Plan::FailedCut),
    (8, Plan::TornWrite),
    (8, Plan::Freeing),
    (4, Plan::FullLog),
    (12, Plan::FreeingAfterFailedCut),
    (14, Plan::FreeingUnread),
    (10, Plan::FreeingBesideCut),
    (8, Plan::FailedCopy),
    (16, Plan::Reuse),
    (8, Plan::ReuseForTables),
    (12, Plan::Flushed),
    (16, Plan::Growing),
    (8, Plan::GrowingFails),
    (28, Plan::Search),
    (12, Plan::SearchWhileAllocating),
    (8, Plan::FullTable),
    (14, Plan::FillingLog),
    (12, Plan::QueueEnds),
    (16, Plan::QueueEndsInPlace),
    (12, Plan::QueueEndsInZeros),
    (12, Plan::QueueEndsPunching),
    (10, Plan::OldEnd),
    (14, Plan::OldEndUnread),
    (44, Plan::Wounded),
    (1, Plan::SearchFullTable),
    (40, Plan::Tool),
    (14, Plan::GrowOverMore),
];
/// One in so many cases is on an image with a tail.
const TAILED_SHARE: u64 = 4;
/// One search in so many is on an image with clusters that are counted twice.
const TWICE_SHARE: u64 = 8;

impl Plan {
    pub(super) fn draw(rng: &mut Rng) -> Self {
        let mut left = rng.below(MIX.iter().map(|(share, _)| share).sum());
        for (share, plan) in MIX {
            if left < share {
                return plan;
            }
            left -= share;
        }
        Self::Short
    }

    /// Whether clusters are given back, of as many refcount pages as there can be.
    pub(super) fn frees(self) -> bool {
        matches!(
            self,
            Self::Freeing | Self::FreeingAfterFailedCut | Self::FreeingUnread | Self::FreeingBesideCut
        )
    }

    pub(super) fn searches(self) -> bool {
        matches!(self, Self::Search | Self::SearchWhileAllocating | Self::SearchFullTable)
    }

    /// The index of an image for a case of this kind.
    pub(super) fn fixture(self, rng: &mut Rng, fixtures: &[Fixture]) -> usize {
        let past = self.past(rng);
        // Of many refcount pages few are kept; new blocks are made.
        let needs_blocks = match self {
            Self::FreeingUnread
            | Self::FreeingBesideCut
            | Self::NoRoomUnread
            | Self::FullLog
            | Self::FillingLog => true,
            Self::Freeing | Self::FullHost | Self::FailedCut => rng.below(2) == 0,
            _ => false,
        };
        // Several references to one of them wait together.
        let needs_sharing = self == Self::FreeingUnread && rng.below(2) == 0;
        let is_fit = |fixture: &Fixture| {
            self.suits(fixture)
                && fixture.past == past
                && (!needs_blocks || fixture.variant == Variant::SMALL_BLOCKS)
                && (!needs_sharing || fixture.initial == Initial::Mixed)
        };
        let candidates: Vec<usize> = (0..fixtures.len()).filter(|&index| is_fit(&fixtures[index])).collect();
        candidates[rng.below(candidates.len() as u64) as usize]
    }

    /// What has happened to its image before.
    pub(super) fn past(self, rng: &mut Rng) -> Past {
        match self {
            Self::SearchFullTable => Past::MadeFull,
            Self::FullTable => Past::CrashedFull,
            Self::FillingLog | Self::GrowingFails => {
                [Past::Crashed, Past::CrashedFull][rng.below(2) as usize]
            }
            Self::Wounded if rng.below(3) == 0 => Past::Crashed,
            Self::Wounded => Past::Made,
            Self::OldEnd | Self::OldEndUnread => Past::Tailed,
            Self::Search if rng.below(TWICE_SHARE) == 0 => Past::CountedTwice,
            Self::Search => Past::Crashed,
            Self::SearchWhileAllocating | Self::Tool if rng.below(2) == 0 => Past::Crashed,
            Self::Tool | Self::GrowOverMore => Past::Made,
            // Its end is in a cluster that is free and has old content.
            Self::NoRoom if rng.below(2) == 0 => Past::Tailed,
            _ if rng.below(TAILED_SHARE) == 0 => Past::Tailed,
            _ => Past::Made,
        }
    }

    /// Whether such a case finds what it is about in an image.
    pub(super) fn suits(self, fixture: &Fixture) -> bool {
        let has_edges = fixture.variant.cluster_sectors > 1;
        match self {
            Self::Flushed | Self::FailedCopy => fixture.initial.is_shared(),
            Self::ReuseForTables => matches!(fixture.initial, Initial::Unallocated | Initial::Backing),
            Self::QueueEndsInPlace => matches!(fixture.initial, Initial::Data | Initial::ZeroAllocated),
            // Those of a compressed cluster's host clusters had several references.
            Self::Reuse => matches!(fixture.initial, Initial::Data | Initial::Compressed),
            Self::QueueEndsInZeros => fixture.initial == Initial::ZeroAllocated && has_edges,
            Self::OldEnd => {
                has_edges && fixture.initial.shows_zeros() && fixture.initial.makes_writes_allocate()
            }
            Self::OldEndUnread => has_edges && fixture.backing.is_some(),
            Self::Growing | Self::GrowingFails => {
                fixture.variant == Variant::SMALL_BLOCKS && fixture.initial.makes_writes_allocate()
            }
            Self::Wounded => !matches!(fixture.initial, Initial::Unallocated | Initial::Backing),
            Self::FillingLog
            | Self::NoRoom
            | Self::NoRoomUnread
            | Self::FullHost
            | Self::FailedCut
            | Self::TornWrite => fixture.initial.makes_writes_allocate(),
            // They take too long on a large disk.
            Self::Tool => fixture.gap == 0,
            Self::GrowOverMore => fixture.gap == 0 && fixture.backing.is_some(),
            // What is zero already is not changed.
            Self::FullLog => fixture.initial == Initial::Data,
            _ if self.frees() || self == Self::QueueEndsPunching => {
                !matches!(fixture.initial, Initial::Unallocated | Initial::Backing | Initial::ZeroPlain)
                    && fixture.can_discard
            }
            _ => true,
        }
    }
}
