//! Images that an earlier life has left, which ended with a crash: with leaks.

use super::{
    case::Totals,
    damage::Wreck,
    disk::Disk,
    file::SECTOR,
    model::Value,
    play::{Player, play},
    request::Request,
    run::Life,
    workload::{Fixture, Past},
};
use crate::{Lane, io::Buf};
use std::rc::Rc;

/// Requests after which extents are left, and what they free is not given back.
const AGEING: [Request; 11] = [
    Request::Write(3, 5),
    Request::Write(40, 20),
    Request::Zero(100, 9, true),
    Request::Flush,
    Request::Discard(4, 10),
    Request::Maintain,
    Request::Write(253, 6),
    Request::Zero(60, 9, false),
    Request::Write(42, 3),
    Request::Discard(252, 8),
    Request::Flush,
];
/// The numbers of requests of an earlier life, apart from those of the one that is judged.
const EARLIER: u32 = 1 << 20;
/// Clusters that a refcount table of one cluster reaches: 512 bytes, and counts of 64 bits.
const TABLE_REACH: u64 = 64 * 64;
/// Clusters that each of many lanes reserves of them; about as many are left.
const RESERVED: u64 = 32;
/// Of clusters that are in use one in so many is counted twice.
const TWICE_SHARE: usize = 5;

/// What a crash leaves of an image after a few requests.
///
/// # Errors
/// What went wrong, in words.
pub(super) fn age(fixture: &Fixture) -> Result<Fixture, String> {
    let mut totals = Totals::default();
    let mut life = Life::new(fixture, 1, &mut totals);
    let lane = Lane::new(&life.open()?, life.disk.clone(), 4);
    let requests = AGEING.into_iter().filter(|request| fixture.takes(request));
    life.live_on(&lane, requests.collect(), EARLIER)?;
    life.end_in_a_crash(&lane, "after a crash", Past::Crashed)
}

/// What a crash leaves of an image whose lanes have reserved nearly all that its refcount table
/// reaches, and have used little of it: the next clusters make the table grow, and yet the image has
/// little content to judge.
///
/// # Errors
/// What went wrong, in words.
pub(super) fn fill_table(fixture: &Fixture) -> Result<Fixture, String> {
    let mut totals = Totals::default();
    let mut life = Life::new(fixture, 1, &mut totals);
    let image = life.open_with(RESERVED)?;
    let mut number = EARLIER;
    loop {
        let lane = Lane::new(&image, life.disk.clone(), 1);
        let sector = (number - EARLIER) as usize;
        life.live_on(&lane, vec![Request::Write(sector, 1), Request::Flush], number)?;
        number += 2;
        let clusters = life.disk.look(0, |file, _| (file.current.len() / SECTOR) as u64);
        if clusters >= TABLE_REACH {
            return Err(format!("{}: all {clusters} clusters are taken", fixture.name));
        }
        if clusters >= TABLE_REACH - RESERVED {
            return life.end_in_a_crash(&lane, "with a full refcount table", Past::CrashedFull);
        }
    }
}

/// An image behind whose end lies what a loss of power has left of writes that it has undone: so many
/// clusters, the last of them in part,
const TAIL: usize = 15;
/// or all up to where the next refcount block is going to be, if that counts no more than this.
const SMALL_BLOCK: usize = 128;

/// Makes the file longer: the clusters are free, and have old content, or are a hole.
pub(super) fn leave_tail(fixture: &Fixture, is_hole: bool) -> Fixture {
    let mut image = fixture.image.clone();
    let cluster_bytes = fixture.variant.cluster_sectors * SECTOR;
    let per_block = cluster_bytes * 8 / fixture.variant.refcount_bits as usize;
    let used = image.len().div_ceil(cluster_bytes);
    let behind = if per_block <= SMALL_BLOCK { used.next_multiple_of(per_block) - used } else { 0 };
    let sectors = (behind + TAIL) * fixture.variant.cluster_sectors + fixture.variant.cluster_sectors / 2;
    image.resize(image.len().next_multiple_of(fixture.variant.cluster_sectors * SECTOR), 0);
    let old = |sector: usize| Value::Stamp { request: EARLIER, sector: sector as u32 };
    image.extend((0..sectors).map(|at| if is_hole { Value::Zero } else { old(at) }).flat_map(Value::bytes));
    Fixture {
        name: format!("{} with a {}", fixture.name, if is_hole { "hole behind it" } else { "tail" }),
        image,
        past: Past::Tailed,
        hole: if is_hole { sectors } else { 0 },
        ..fixture.clone()
    }
}

/// Has some clusters that are in use counted twice, as who deletes a snapshot may leave them.
///
/// # Errors
/// The image cannot be read.
pub(super) fn count_twice(fixture: &Fixture) -> Result<Fixture, String> {
    let mut image = fixture.image.clone();
    Wreck::of(&mut image)?.count_twice(TWICE_SHARE)?;
    let name = format!("{}, some counted twice", fixture.name);
    Ok(Fixture { name, image, past: Past::CountedTwice, ..fixture.clone() })
}

/// Has all clusters counted that the image's refcount blocks count: the next one needs another block, and where
/// there was room for few, a longer table.
///
/// # Errors
/// What went wrong, in words.
pub(super) fn count_all(fixture: &Fixture) -> Result<Fixture, String> {
    let mut image = fixture.image.clone();
    let cluster_bytes = fixture.variant.cluster_sectors * SECTOR;
    let per_block = cluster_bytes * 8 / fixture.variant.refcount_bits as usize;
    let clusters = image.len().div_ceil(cluster_bytes).next_multiple_of(per_block);
    image.resize(clusters * cluster_bytes, 0);
    let mut wreck = Wreck::of(&mut image)?;
    for cluster in 0..clusters {
        wreck.set_count(cluster as u64, |count| count.max(1))?;
    }
    let past = if fixture.past == Past::Made { Past::Crashed } else { fixture.past };
    Ok(Fixture { name: format!("{}, all counted", fixture.name), image, past, ..fixture.clone() })
}

impl Life<'_> {
    fn live_on(&mut self, lane: &Lane<Disk>, requests: Vec<Request>, first: u32) -> Result<(), String> {
        let player = Player {
            lane: lane.clone(),
            model: Rc::clone(&self.model),
            shape: self.fixture.shape(),
            must_find_all: true,
            must_find_nothing: false,
            is_alone: true,
            told: Rc::default(),
        };
        self.drive(vec![play(player, requests, first, false)], false)
    }

    /// The image as it is now, with whatever its content is now.
    fn end_in_a_crash(&mut self, lane: &Lane<Disk>, name: &str, past: Past) -> Result<Fixture, String> {
        let buf = Buf::zeroed(self.fixture.content.len() * SECTOR);
        let read = {
            let (lane, buf) = (lane.clone(), buf.clone());
            Box::pin(async move { lane.read(0, buf).await.map_err(|error| error.to_string()) })
        };
        self.drive(vec![read], false)?;
        Ok(Fixture {
            name: format!("{} {name}", self.fixture.name),
            image: self.disk.look(0, |file, _| file.current.clone()),
            content: buf.to_vec().chunks_exact(SECTOR).map(Value::read).collect(),
            past,
            ..self.fixture.clone()
        })
    }
}
