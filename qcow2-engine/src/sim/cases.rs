//! Which cases there are: images, and what is done with them, drawn from a seed.
//!
//! What a case is aimed at is its [`Plan`]. A rule that nothing is aimed at is broken once in a million
//! crash states, which is as good as never: `--mutate` tells.

use super::{
    age::{age, count_all, count_twice, fill_table, leave_tail},
    case::{Case, Work},
    damage::Damage,
    plan::Plan,
    rng::Rng,
    tools::Tool,
    workload::{Fixture, Initial, Maker, Past, Variant},
    wound::Wound,
};
use crate::{Preallocation, Repair};
use std::{io, path::Path};

/// In one of so many cases all requests are of one lane.
const ONE_LANE_SHARE: u64 = 3;

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
        Plan::GrowOverMore => Work::Tool(growing_over_more(&mut rng)),
        _ => Work::Lanes(plan.lanes(&mut rng)),
    };
    let case = Case {
        work,
        fault: plan.fault(&mut rng),
        fills_after: (plan == Plan::FullHost).then(|| rng.below(120)),
        file_system: plan.file_system(&mut rng),
        held_back: plan.held_back(&mut rng),
        paging: plan.paging(&mut rng),
        is_one_lane: plan == Plan::OldEndUnread || rng.below(ONE_LANE_SHARE) == 0 && plan != Plan::FullLog,
        logged: plan.logged(&mut rng),
        abandons_after: plan.end(&mut rng),
        wound: (plan == Plan::Wounded).then(|| Wound::ALL[rng.below(Wound::ALL.len() as u64) as usize]),
        seed: rng.draw(),
        disabled: None,
    };
    (fixture, case)
}

/// The disk has been cut off so far that the backing file is longer.
fn growing_over_more(rng: &mut Rng) -> Tool {
    Tool::Grow(1 + rng.below(300) as usize, 150 + rng.below(150) as usize)
}

/// A tool that can be used on an image.
fn tool(rng: &mut Rng, fixture: &Fixture) -> Tool {
    let is_v2 = fixture.variant.compat == "0.10";
    match rng.below(10) {
        0 => Tool::Repair(Repair::Leaks, Damage::any(rng, Damage::is_of_leaks)),
        // Version 2 has no dirty bit, and no room for a snapshot's size.
        1..=2 if !is_v2 => Tool::OpenDirty(Damage::any(rng, |damage| !damage.hits_entries())),
        1..=4 => {
            let less = if rng.below(3) == 0 { 0 } else { rng.below(300) };
            // So far that the L1 table is longer by a cluster.
            let more = if fixture.variant == Variant::SMALL_BLOCKS && rng.below(4) == 0 { 3700 } else { 1 };
            Tool::Grow(more + rng.below(1000) as usize, less as usize)
        }
        5 => {
            use Preallocation::{Falloc, Full, Metadata, Off};
            Tool::Create([Off, Metadata, Falloc, Full][rng.below(4) as usize], rng.below(3) == 0)
        }
        _ => {
            let damage = Damage::any(rng, |_| true);
            // Version 2 cannot say "zero" where a backing file would show.
            let is_lasting = damage.hits_entries() && is_v2 && fixture.backing.is_some();
            Tool::Repair(Repair::All, if is_lasting { Damage::CountsAndFlags } else { damage })
        }
    }
}
