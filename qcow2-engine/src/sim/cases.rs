//! Which cases there are: images, and what is done with them, drawn from a seed.
//!
//! Each `Plan` is aimed at something. A rule that nothing is aimed at is broken once in a million
//! crash states, which is as good as never: `--mutate` tells.

use super::{
    age::{age, count_all, count_twice, fill_table, leave_tail},
    case::{Case, Work},
    damage::Damage,
    faults::{Failing, Fault, FileSystem, HeldBack, Victim},
    request::Request,
    rng::Rng,
    sequences::{
        allocating, changing_all, churn, crossing, discard, flushed, freeing, freeing_much, growing,
        long_write, meeting, random, short, tables_after_data, touches, with_flushes, writers, zeros,
    },
    tools::Tool,
    workload::{Fixture, Initial, Maker, Past, Variant},
    wound::Wound,
};
use crate::{Paging, Preallocation, Repair, redo::MIN_RECORDS};
use std::{io, path::Path};

/// What a case is aimed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
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
    /// The image has damage, which requests meet or do not.
    Wounded,
    /// A tool works on the image.
    Tool,
}

/// Of so many cases, how many follow which plan.
const MIX: [(u64, Plan); 30] = [
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
    (28, Plan::Search),
    (12, Plan::SearchWhileAllocating),
    (8, Plan::FullTable),
    (14, Plan::FillingLog),
    (12, Plan::QueueEnds),
    (16, Plan::QueueEndsInPlace),
    (24, Plan::Wounded),
    (1, Plan::SearchFullTable),
    (20, Plan::Tool),
];
/// One in so many cases is on a file system that cannot allocate ahead, one that cannot punch holes.
const UNABLE_SHARE: u64 = 4;
/// One in so many is on an image with a tail.
const TAILED_SHARE: u64 = 4;
/// One search in so many is on an image with clusters that are counted twice.
const TWICE_SHARE: u64 = 8;
/// In one of so many cases all requests are of one lane.
const ONE_LANE_SHARE: u64 = 3;
/// One in so many cases holds the oldest operation back.
const STARVING_SHARE: u64 = 3;

/// Makes all images, each as qemu-img made it and as a crash left it.
///
/// # Errors
/// qemu-img or qemu-io is missing, or fails.
pub fn fixtures(directory: &Path) -> io::Result<Vec<Fixture>> {
    let maker = Maker::new(directory);
    let mut fixtures = Vec::new();
    for variant in Variant::ALL {
        for initial in Initial::ALL.into_iter().filter(|&initial| variant.can_be(initial)) {
            fixtures.push(maker.make(variant, initial)?);
        }
    }
    let wide = [Initial::Unallocated, Initial::Shared].map(|initial| maker.make_wide(initial));
    let wide: Vec<_> = wide.into_iter().collect::<Result<_, _>>()?;
    let aged: Result<Vec<_>, _> = fixtures.iter().chain(&wide).map(age).collect();
    let full: Result<Vec<_>, _> =
        fixtures.iter().filter(|fixture| fixture.is_fillable()).map(fill_table).collect();
    let is_owner = |fixture: &&Fixture| {
        matches!(fixture.initial, Initial::Data | Initial::Mixed) && fixture.variant.refcount_bits > 1
    };
    let twice: Result<Vec<_>, _> = fixtures.iter().filter(is_owner).map(count_twice).collect();
    let mut tailed: Vec<_> = fixtures.iter().map(|fixture| leave_tail(fixture, false)).collect();
    // What the host has no room for shows where new refcount blocks are to lie there.
    let fillable = fixtures.iter().filter(|fixture| fixture.is_fillable());
    tailed.extend(fillable.map(|fixture| leave_tail(fixture, true)));
    fixtures.extend(tailed);
    fixtures.extend(twice.map_err(io::Error::other)?);
    fixtures.extend(wide);
    fixtures.extend(aged.map_err(io::Error::other)?);
    fixtures.extend(full.map_err(io::Error::other)?);
    let counted = fixtures
        .iter()
        .filter(|fixture| fixture.is_fillable() && matches!(fixture.past, Past::Made | Past::CrashedFull));
    let counted: Result<Vec<_>, _> = counted.map(count_all).collect();
    fixtures.extend(counted.map_err(io::Error::other)?);
    fixtures.push(maker.make_full_table()?);
    Ok(fixtures)
}

/// The case with a number, and the index of its image: always the same for the same seed.
#[must_use]
pub fn case(fixtures: &[Fixture], seed: u64, number: u64) -> (usize, Case) {
    let mut rng = Rng::new(seed ^ number.wrapping_mul(0xD6E8_FEB8_6659_FD93));
    let plan = Plan::draw(&mut rng);
    let fixture = plan.fixture(&mut rng, fixtures);
    let work = match plan {
        Plan::Tool => Work::Tool(tool(&mut rng, &fixtures[fixture])),
        _ => Work::Lanes(plan.lanes(&mut rng)),
    };
    let case = Case {
        work,
        fault: plan.fault(&mut rng),
        fills_after: (plan == Plan::FullHost).then(|| rng.below(120)),
        file_system: plan.file_system(&mut rng),
        held_back: plan.held_back(&mut rng),
        paging: plan.paging(&mut rng),
        is_one_lane: rng.below(ONE_LANE_SHARE) == 0,
        logged: plan.logged(&mut rng),
        abandons_after: plan.end(&mut rng),
        wound: (plan == Plan::Wounded).then(|| Wound::ALL[rng.below(Wound::ALL.len() as u64) as usize]),
        seed: rng.draw(),
        disabled: None,
    };
    (fixture, case)
}

impl Plan {
    fn draw(rng: &mut Rng) -> Self {
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
    fn frees(self) -> bool {
        matches!(
            self,
            Self::Freeing | Self::FreeingAfterFailedCut | Self::FreeingUnread | Self::FreeingBesideCut
        )
    }

    fn searches(self) -> bool {
        matches!(self, Self::Search | Self::SearchWhileAllocating | Self::SearchFullTable)
    }

    /// The index of an image for a case of this kind.
    fn fixture(self, rng: &mut Rng, fixtures: &[Fixture]) -> usize {
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
        let is_fit = |fixture: &Fixture| {
            self.suits(fixture)
                && fixture.past == past
                && (!needs_blocks || fixture.variant == Variant::SMALL_BLOCKS)
        };
        let candidates: Vec<usize> = (0..fixtures.len()).filter(|&index| is_fit(&fixtures[index])).collect();
        candidates[rng.below(candidates.len() as u64) as usize]
    }

    /// What has happened to its image before.
    fn past(self, rng: &mut Rng) -> Past {
        match self {
            Self::SearchFullTable => Past::MadeFull,
            Self::FullTable => Past::CrashedFull,
            Self::FillingLog => [Past::Crashed, Past::CrashedFull][rng.below(2) as usize],
            Self::Wounded => Past::Made,
            Self::Search if rng.below(TWICE_SHARE) == 0 => Past::CountedTwice,
            Self::Search => Past::Crashed,
            Self::SearchWhileAllocating | Self::Tool if rng.below(2) == 0 => Past::Crashed,
            Self::Tool => Past::Made,
            // Its end is in a cluster that is free and has old content.
            Self::NoRoom if rng.below(2) == 0 => Past::Tailed,
            _ if rng.below(TAILED_SHARE) == 0 => Past::Tailed,
            _ => Past::Made,
        }
    }

    /// Whether such a case finds what it is about in an image.
    fn suits(self, fixture: &Fixture) -> bool {
        match self {
            Self::Flushed | Self::FailedCopy => fixture.initial.is_shared(),
            Self::ReuseForTables => matches!(fixture.initial, Initial::Unallocated | Initial::Backing),
            Self::QueueEndsInPlace => matches!(fixture.initial, Initial::Data | Initial::ZeroAllocated),
            // Those of a compressed cluster's host clusters had several references.
            Self::Reuse => matches!(fixture.initial, Initial::Data | Initial::Compressed),
            Self::Growing => {
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
            // What is zero already is not changed.
            Self::FullLog => fixture.initial == Initial::Data,
            _ if self.frees() => {
                !matches!(fixture.initial, Initial::Unallocated | Initial::Backing | Initial::ZeroPlain)
                    && fixture.can_discard
            }
            _ => true,
        }
    }

    /// What the host's file system can do.
    fn file_system(self, rng: &mut Rng) -> FileSystem {
        let must_allocate = matches!(self, Self::NoRoom | Self::NoRoomUnread | Self::FullHost);
        FileSystem {
            allocates: must_allocate || rng.below(UNABLE_SHARE) != 0,
            punches: self != Self::ReuseForTables && rng.below(UNABLE_SHARE) != 0,
            changes_length: true,
        }
    }

    /// What is served last of all that is under way.
    fn held_back(self, rng: &mut Rng) -> HeldBack {
        match self {
            Self::Growing | Self::SearchWhileAllocating => HeldBack::Growth,
            Self::Reuse => [HeldBack::Oldest, HeldBack::Direct][rng.below(2) as usize],
            Self::FillingLog => HeldBack::Nothing,
            Self::Freeing | Self::FreeingAfterFailedCut => HeldBack::Punch,
            Self::FreeingBesideCut => HeldBack::Metadata,
            Self::Search if rng.below(4) == 0 => HeldBack::Punch,
            _ if rng.below(STARVING_SHARE) == 0 => HeldBack::Oldest,
            _ => HeldBack::Nothing,
        }
    }

    /// How much metadata is kept in memory.
    fn paging(self, rng: &mut Rng) -> Paging {
        match self.frees() || rng.below(2) == 0 {
            false => Paging::default(),
            // The search gives clusters up that change in each of four rounds: many small batches have them
            // do so.
            true if self.searches() => Paging::SMALL,
            true => Paging::TINY,
        }
    }

    /// What fails in a case of this kind.
    fn fault(self, rng: &mut Rng) -> Option<Failing> {
        let some = |rng: &mut Rng, victim, fault, reach| {
            Some(Failing { victim, after: rng.below(reach), times: 1 + rng.below(4), fault })
        };
        let refusal = [Fault::Enospc, Fault::Enospc, Fault::Eio][rng.below(3) as usize];
        match self {
            Self::Faulty => Some(failing(rng)),
            Self::Tool if rng.below(4) == 0 => Some(failing(rng)),
            Self::NoRoom => some(rng, Victim::Growth, refusal, 4),
            Self::NoRoomUnread => {
                let (after, times) = (rng.below(12), 2 + rng.below(6));
                Some(Failing { victim: Victim::GrowthOrRead, after, times, fault: Fault::Eio })
            }
            Self::FailedCut => some(rng, Victim::Metadata, refusal, 12),
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
    fn end(self, rng: &mut Rng) -> Option<(u64, HeldBack)> {
        use HeldBack::{Direct, Metadata, Oldest, Punch};
        match self {
            Self::QueueEnds => Some((rng.below(40), [Oldest, Punch, Metadata][rng.below(3) as usize])),
            Self::QueueEndsInPlace => Some((rng.below(24), [Oldest, Direct][rng.below(2) as usize])),
            _ => None,
        }
    }

    /// How many records the redo log has already: half of what it holds must be left for what makes the table
    /// or a block.
    fn logged(self, rng: &mut Rng) -> u64 {
        if self == Self::FillingLog { MIN_RECORDS / 2 - rng.below(3) } else { 0 }
    }

    fn lanes(self, rng: &mut Rng) -> Vec<Vec<Request>> {
        match self {
            Self::Short => vec![short(rng)],
            Self::ShortAtOnce => short(rng).into_iter().map(|request| vec![request]).collect(),
            Self::Lanes => (0..1 + rng.below(3)).map(|_| random(rng, 12)).collect(),
            Self::Meeting => meeting(rng),
            Self::Long => vec![random(rng, 30)],
            Self::Faulty => match rng.below(3) {
                0 => meeting(rng),
                1 => (0..1 + rng.below(2)).map(|_| flushed(rng)).collect(),
                _ => (0..1 + rng.below(2)).map(|_| random(rng, 10)).collect(),
            },
            Self::Reuse => vec![touches(rng, 4), churn(rng)],
            Self::NoRoom | Self::TornWrite => (0..1 + rng.below(2)).map(|_| allocating(rng)).collect(),
            Self::FullHost => match rng.below(3) {
                0 => writers(rng).into_iter().map(with_flushes).collect(),
                1 => meeting(rng),
                _ => (0..1 + rng.below(3)).map(|_| random(rng, 12)).collect(),
            },
            Self::FailedCut => (0..3 + rng.below(2)).map(|_| flushed(rng)).collect(),
            Self::Freeing => (0..2 + rng.below(2)).map(|_| freeing(rng)).collect(),
            Self::FreeingUnread => vec![freeing(rng)],
            Self::FreeingAfterFailedCut => {
                let discards = (0..4 + rng.below(6)).map(|_| discard(rng)).collect();
                vec![freeing(rng), with_flushes(discards)]
            }
            Self::FreeingBesideCut => {
                let flushes = vec![Request::Flush; 3 + rng.below(6) as usize];
                let writes = (0..3 + rng.below(4)).map(|_| long_write(rng)).collect();
                vec![if rng.below(2) == 0 { freeing(rng) } else { freeing_much(rng) }, flushes, writes]
            }
            Self::NoRoomUnread => {
                let mut lanes = writers(rng);
                lanes.push(freeing(rng));
                lanes
            }
            Self::FullLog => (0..2 + rng.below(2)).map(|_| changing_all(rng)).collect(),
            Self::FailedCopy => (0..1 + rng.below(2)).map(|_| crossing(rng)).collect(),
            Self::ReuseForTables => vec![tables_after_data(rng)],
            Self::Flushed => (0..1 + rng.below(2)).map(|_| flushed(rng)).collect(),
            Self::Search => {
                let mut lanes = match rng.below(3) {
                    0 => vec![short(rng)],
                    1 => (0..1 + rng.below(3)).map(|_| random(rng, 12)).collect(),
                    _ => vec![random(rng, 20)],
                };
                let mut search = random(rng, 2);
                search.push(Request::Reclaim([16, 60, 1 << 20][rng.below(3) as usize]));
                search.extend(random(rng, 2));
                lanes.push(search);
                lanes
            }
            Self::Growing => {
                let mut lanes = writers(rng);
                lanes.push(vec![Request::Flush; 2 + rng.below(6) as usize]);
                lanes
            }
            Self::SearchWhileAllocating => {
                let mut lanes = writers(rng);
                lanes.push(vec![Request::Reclaim(1 << 20); 1 + rng.below(3) as usize]);
                lanes
            }
            Self::FullTable => (0..1 + rng.below(2)).map(|_| growing(rng)).collect(),
            Self::FillingLog => {
                let mut lanes = writers(rng);
                lanes.push((0..8 + rng.below(8)).map(|_| zeros(rng)).collect());
                lanes
            }
            Self::QueueEnds => {
                let mut lanes = if rng.below(2) == 0 { meeting(rng) } else { writers(rng) };
                lanes.push(if rng.below(2) == 0 { freeing(rng) } else { random(rng, 12) });
                lanes
            }
            // The lane that closes the image frees what the others use.
            Self::QueueEndsInPlace => vec![churn(rng), touches(rng, 12), touches(rng, 12)],
            Self::Wounded => match rng.below(4) {
                0 => meeting(rng),
                1 => vec![freeing(rng), allocating(rng)],
                2 => vec![allocating(rng), random(rng, 10)],
                _ => vec![random(rng, 16)],
            },
            Self::Tool => Vec::new(),
            Self::SearchFullTable => vec![growing(rng), vec![Request::Reclaim(1 << 20)]],
        }
    }
}

/// A tool that can be used on an image.
fn tool(rng: &mut Rng, fixture: &Fixture) -> Tool {
    let is_v2 = fixture.variant.compat == "0.10";
    match rng.below(8) {
        0 => Tool::Repair(Repair::Leaks, Damage::None),
        // Version 2 has no dirty bit, and no room for a snapshot's size.
        1..=2 if !is_v2 => Tool::OpenDirty(Damage::OF_COUNTS[rng.below(5) as usize]),
        // Those of version 2 with snapshots, and those with bitmaps that are true, are not made larger.
        3..=4 if !(is_v2 && fixture.initial.is_shared() || fixture.has_bitmaps()) => {
            // Of version 2 it would show what a backing file has there, which it cannot hide.
            let less = if rng.below(2) == 0 || !fixture.can_discard { 0 } else { rng.below(300) };
            Tool::Grow(1 + rng.below(1000) as usize, less as usize)
        }
        5 => {
            use Preallocation::{Falloc, Full, Metadata, Off};
            Tool::Create([Off, Metadata, Falloc, Full][rng.below(4) as usize], rng.below(3) == 0)
        }
        _ => {
            let damage = Damage::ALL[rng.below(Damage::ALL.len() as u64) as usize];
            // Version 2 cannot say "zero" where a backing file would show.
            let is_lasting = damage.hits_entries() && is_v2 && fixture.backing.is_some();
            Tool::Repair(Repair::All, if is_lasting { Damage::CountsAndFlags } else { damage })
        }
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
