//! Which requests the lanes of a case carry out.

use super::{
    plan::Plan,
    request::Request,
    rng::Rng,
    sequences::{
        allocating, changing_all, churn, crossing, discard, filling, flushed, freeing, freeing_much, growing,
        long_write, meeting, random, recycling, sharing, short, tables_after_data, touches, using_up,
        with_flushes, writers, zeros,
    },
};

impl Plan {
    pub(super) fn lanes(self, rng: &mut Rng) -> Vec<Vec<Request>> {
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
            Self::Reuse => {
                let mut lanes = vec![touches(rng, 4), churn(rng)];
                lanes.rotate_left(rng.below(2) as usize);
                lanes
            }
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
            Self::FullLog if rng.below(2) == 0 => filling(),
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
            Self::GrowingFails => vec![allocating(rng), allocating(rng), vec![Request::Flush; 4]],
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
            Self::QueueEndsInZeros => sharing(rng),
            Self::QueueEndsPunching => (0..2 + rng.below(2)).map(|_| recycling(rng)).collect(),
            Self::OldEnd => (0..1 + rng.below(2)).map(|_| using_up(rng)).collect(),
            Self::OldEndUnread => {
                let mut lanes: Vec<_> = (0..2 + rng.below(2)).map(|_| using_up(rng)).collect();
                // What is put back is no leak.
                lanes.extend((rng.below(3) == 0).then(|| vec![Request::Reclaim(1 << 20); 2]));
                lanes
            }
            Self::Wounded => {
                let mut lanes = match rng.below(5) {
                    0 => meeting(rng),
                    1 => vec![freeing(rng), allocating(rng)],
                    2 => vec![freeing_much(rng), allocating(rng)],
                    3 => vec![allocating(rng), random(rng, 10)],
                    _ => vec![random(rng, 16)],
                };
                if rng.below(3) == 0 {
                    lanes[0].push(Request::Reclaim(1 << 20));
                }
                lanes
            }
            Self::Tool | Self::GrowOverMore => Vec::new(),
            Self::SearchFullTable => vec![growing(rng), vec![Request::Reclaim(1 << 20)]],
        }
    }
}
