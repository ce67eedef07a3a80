//! What happens to the requests of a case: what the host cannot do, fails to do or does late, how much
//! metadata is kept, when a queue ends.

use super::{
    faults::{Failing, Fault, FileSystem, HeldBack, Victim},
    plan::Plan,
    rng::Rng,
};
use crate::{Paging, redo::MIN_RECORDS};

/// One in so many cases is on a file system that cannot allocate ahead, one that cannot punch holes.
const UNABLE_SHARE: u64 = 4;
/// One in so many cases holds the oldest operation back.
const STARVING_SHARE: u64 = 3;

impl Plan {
    /// What the host's file system can do.
    pub(super) fn file_system(self, rng: &mut Rng) -> FileSystem {
        let must_allocate = matches!(self, Self::NoRoom | Self::NoRoomUnread | Self::FullHost | Self::OldEnd);
        FileSystem {
            allocates: must_allocate || rng.below(UNABLE_SHARE) != 0,
            punches: self == Self::QueueEndsPunching
                || self != Self::ReuseForTables && rng.below(UNABLE_SHARE) != 0,
            changes_length: true,
        }
    }

    /// What is served last of all that is under way.
    pub(super) fn held_back(self, rng: &mut Rng) -> HeldBack {
        match self {
            Self::Growing | Self::SearchWhileAllocating => HeldBack::Growth,
            Self::Reuse => [HeldBack::Oldest, HeldBack::Direct][rng.below(2) as usize],
            // What goes around a payload is read while another request finds its lane's next extent, or the
            // other way round.
            Self::OldEndUnread => [HeldBack::Below, HeldBack::Growth][rng.below(2) as usize],
            // The counts of what is claimed are written, and have gone from memory, when the file cannot grow.
            Self::NoRoomUnread => HeldBack::Growth,
            Self::FillingLog => HeldBack::Nothing,
            Self::Freeing | Self::FreeingAfterFailedCut => HeldBack::Punch,
            // While a cut takes long the log goes on filling.
            Self::FreeingBesideCut | Self::GrowingFails | Self::FullLog => HeldBack::Metadata,
            Self::Search if rng.below(4) == 0 => HeldBack::Punch,
            _ if rng.below(STARVING_SHARE) == 0 => HeldBack::Oldest,
            _ => HeldBack::Nothing,
        }
    }

    /// How much metadata is kept in memory.
    pub(super) fn paging(self, rng: &mut Rng) -> Paging {
        match self.frees() || rng.below(2) == 0 {
            false => Paging::default(),
            // The search gives clusters up that change in each of four rounds: many small batches have them
            // do so.
            true if self.searches() => Paging::SMALL,
            true => Paging::TINY,
        }
    }

    /// What fails in a case of this kind.
    pub(super) fn fault(self, rng: &mut Rng) -> Option<Failing> {
        let some = |rng: &mut Rng, victim, fault, reach| {
            Some(Failing { victim, after: rng.below(reach), times: 1 + rng.below(4), fault })
        };
        let refusal = [Fault::Enospc, Fault::Enospc, Fault::Eio, Fault::Done][rng.below(4) as usize];
        match self {
            Self::Faulty => Some(failing(rng)),
            Self::Tool if rng.below(3) == 0 => Some(failing(rng)),
            Self::NoRoom => some(rng, Victim::Growth, refusal, 4),
            Self::NoRoomUnread => {
                let (after, times) = (rng.below(12), 2 + rng.below(6));
                Some(Failing { victim: Victim::GrowthOrRead, after, times, fault: Fault::Eio })
            }
            Self::FailedCut => some(rng, Victim::Metadata, refusal, 12),
            Self::GrowingFails => some(rng, Victim::Metadata, refusal, 8),
            Self::OldEndUnread => {
                let (after, times) = (rng.below(10), 1 + rng.below(8));
                Some(Failing { victim: Victim::Below, after, times, fault: Fault::Eio })
            }
            Self::OldEnd => some(rng, Victim::Growth, refusal, 3),
            Self::TornWrite => some(rng, Victim::Write, Fault::Torn, 8),
            Self::FailedCopy => some(rng, Victim::Read, Fault::Eio, 12),
            // The other lane's last cuts, and then no more.
            Self::FreeingAfterFailedCut => {
                let (after, times) = (2 + rng.below(14), 2 + rng.below(10));
                Some(Failing { victim: Victim::Metadata, after, times, fault: Fault::Eio })
            }
            Self::FreeingUnread => {
                let (after, times) = (4 + rng.below(60), 2 + rng.below(8));
                Some(Failing { victim: Victim::Read, after, times, fault: Fault::Eio })
            }
            _ => None,
        }
    }

    /// When a queue ends: after how many operations, and with what in flight.
    pub(super) fn end(self, rng: &mut Rng) -> Option<(u64, HeldBack)> {
        use HeldBack::{Direct, Metadata, Oldest, Punch};
        match self {
            Self::QueueEnds => Some((rng.below(40), [Oldest, Punch, Metadata][rng.below(3) as usize])),
            Self::QueueEndsInZeros => Some((rng.below(16), Oldest)),
            Self::QueueEndsPunching => Some((rng.below(24), Punch)),
            Self::QueueEndsInPlace => Some((rng.below(24), [Oldest, Direct][rng.below(2) as usize])),
            _ => None,
        }
    }

    /// How many records the redo log has already: half of what it holds must be left for what makes the table
    /// or a block.
    pub(super) fn logged(self, rng: &mut Rng) -> u64 {
        if self == Self::FillingLog { MIN_RECORDS / 2 - rng.below(3) } else { 0 }
    }
}

/// What fails: any operation of a life, or one of the first few of a kind; once, or for a while.
fn failing(rng: &mut Rng) -> Failing {
    let victims = [Victim::Any, Victim::Read, Victim::Write, Victim::Metadata, Victim::Growth, Victim::Sync];
    let reach = [4, 16, 120][rng.below(3) as usize];
    Failing {
        victim: victims[rng.below(6) as usize],
        after: rng.below(reach),
        times: if rng.below(3) == 0 { 2 + rng.below(8) } else { 1 },
        fault: [Fault::Eio, Fault::Enospc, Fault::Short, Fault::Torn, Fault::Done][rng.below(5) as usize],
    }
}
