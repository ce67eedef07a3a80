//! Carries requests out, as a queue does, and tells the model of each.

use super::{
    disk::Disk,
    file::{SECTOR, sector_bytes},
    model::{LEFTOVER, Model, Value},
    request::{Request, Shape},
    tasks::Task,
};
use crate::{
    Direct, Error, Lane, Pace, Run, Verdict, ZeroMode,
    io::{Buf, Io},
};
use futures_util::future::join_all;
use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    ops::Range,
    pin::Pin,
    rc::Rc,
};

/// What carries requests out and tells the model.
pub(super) struct Player {
    pub(super) lane: Lane<Disk>,
    pub(super) model: Rc<RefCell<Model>>,
    pub(super) shape: Shape,
    /// Whether the search for leaks has to find all.
    pub(super) must_find_all: bool,
    /// Whether it has to leave all as it is: nobody knows what may be counted.
    pub(super) must_find_nothing: bool,
    /// Nobody else carries requests out meanwhile.
    pub(super) is_alone: bool,
    pub(super) told: Rc<Told>,
}

/// What lanes have been told of the image.
#[derive(Default)]
pub(super) struct Told {
    /// It has damage: a change that fails has met it.
    is_wounded: bool,
    /// A flush has failed because a barrier has, or a change because of damage: no change may succeed any
    /// more.
    is_closed: Cell<bool>,
    /// The damage has been met, and a flush has succeeded since: the image says that it is corrupt.
    is_marked: Cell<bool>,
}

impl Told {
    /// For a damaged image.
    pub(super) fn of_damage() -> Self {
        Self { is_wounded: true, ..Self::default() }
    }

    /// Whether a request has met the damage of the image.
    pub(super) fn has_met_damage(&self) -> bool {
        self.is_wounded && self.is_closed.get()
    }

    /// Whether the image has to say that it is corrupt.
    pub(super) fn is_marked(&self) -> bool {
        self.is_marked.get()
    }
}

/// Moves the runs of a request, all at once, and counts the bytes of those that did not fail.
async fn transfer<F: Future<Output = io::Result<usize>>>(
    direct: &Direct,
    buf: &Buf,
    start: impl Fn(&Run, Buf) -> F,
) -> usize {
    let mut placed = 0;
    let moved = direct.runs().iter().map(|run| {
        let part = buf.slice(placed..placed + run.len as usize);
        placed += part.len();
        start(run, part)
    });
    join_all(moved).await.into_iter().flatten().sum()
}

/// Why a request did not end as it should have.
enum Trouble {
    /// It failed, which a fault of the disk may explain.
    Failed(Error),
    /// Nothing explains it.
    Wrong(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Carries requests out, one after the other.
pub(super) fn play(player: Player, requests: Vec<Request>, first: u32, has_faults: bool) -> Task {
    Box::pin(async move {
        for (number, request) in (first..).zip(requests) {
            let request = request.on(player.shape);
            match player.carry_out(number, request).await {
                Err(Trouble::Failed(error)) if !has_faults => {
                    return Err(format!("{request:?} failed: {error}"));
                }
                Err(Trouble::Wrong(what)) => return Err(format!("{request:?}: {what}")),
                Ok(()) | Err(Trouble::Failed(_)) => {}
            }
        }
        Ok(())
    })
}

impl Player {
    async fn carry_out(&self, number: u32, request: Request) -> Result<(), Trouble> {
        let sectors = request.sectors(self.shape);
        let is_write = matches!(request, Request::Write(..));
        let value = |sector: usize| {
            if is_write { Value::Stamp { request: number, sector: sector as u32 } } else { Value::Zero }
        };
        self.model.borrow_mut().issue(number, sectors.clone(), value);
        let had_been_told = self.told.is_closed.get();
        let outcome = match request {
            Request::Write(..) => self.write(sectors.clone(), value).await,
            Request::Read(at, count) => self.read(number, at..at + count).await,
            Request::Flush => self.flush().await,
            Request::Reclaim(window) => self.reclaim(window).await,
            Request::Maintain => self.maintain().await,
            _ => self.change(request).await.map_err(Trouble::Failed),
        };
        let is_change = !sectors.is_empty();
        self.model.borrow_mut().end(number, sectors, outcome.is_ok());
        if had_been_told && is_change && outcome.is_ok() {
            return Err(Trouble::Wrong("it succeeds, and changes had been refused for good".into()));
        }
        if self.told.is_wounded && is_change && outcome.is_err() {
            self.told.is_closed.set(true);
            // Beside others the first to meet it may not have come to its end.
            self.told.is_marked.set(self.told.is_marked.get() || self.is_alone);
        }
        outcome
    }

    /// None succeeds after a barrier has failed: what was lost is what it covers.
    async fn flush(&self) -> Result<(), Trouble> {
        let had_lost = self.lane.io().has_lost();
        let had_met = self.told.has_met_damage();
        let issued = self.model.borrow_mut().flush_issued();
        let flushed = self.lane.flush().await;
        if flushed.is_err() && self.lane.io().has_lost() {
            self.told.is_closed.set(true);
        }
        if let Err(error) = &flushed
            && self.lane.io().is_scarce()
        {
            return Err(Trouble::Wrong(format!("a flush needs no room on the host, and fails: {error}")));
        }
        flushed?;
        if had_lost {
            return Err(Trouble::Wrong("it succeeds, and an earlier fdatasync has failed".into()));
        }
        self.model.borrow_mut().flushed(issued);
        self.told.is_marked.set(self.told.is_marked.get() || had_met);
        Ok(())
    }

    /// Requests without payload.
    async fn change(&self, request: Request) -> Result<(), Error> {
        let lane = &self.lane;
        match request {
            Request::Write(..)
            | Request::Read(..)
            | Request::Flush
            | Request::Reclaim(_)
            | Request::Maintain => Ok(()),
            Request::Zero(at, count, keep) => {
                let mode = if keep { ZeroMode::Keep } else { ZeroMode::Unmap };
                lane.write_zeroes(sector_bytes(at), sector_bytes(count), mode).await
            }
            Request::Discard(at, count) => lane.discard(sector_bytes(at), sector_bytes(count)).await,
        }
    }

    /// The short cut where there is one, and the long way if that does not end whole.
    async fn write(&self, sectors: Range<usize>, value: impl Fn(usize) -> Value) -> Result<(), Trouble> {
        let (lane, at) = (&self.lane, sector_bytes(sectors.start));
        let data: Vec<u8> = sectors.flat_map(|sector| value(sector).bytes()).collect();
        let buf = Buf::from_bytes(&data);
        if let Some(direct) = lane.direct_write(at, buf.len() as u64) {
            let written =
                transfer(&direct, &buf, |run, part| lane.io().write_directly(run.file, run.at, part)).await;
            lane.end_direct(direct);
            if written == buf.len() {
                return Ok(());
            }
        }
        Ok(lane.write(at, buf).await?)
    }

    /// As [`Self::write`]; what is read must be what was there at some moment of the read.
    async fn read(&self, number: u32, sectors: Range<usize>) -> Result<(), Trouble> {
        let buf = used_buffer(sectors.len());
        self.model.borrow_mut().read_issued(number, sectors.clone());
        let outcome = self.read_into(sector_bytes(sectors.start), &buf).await;
        let allowed = self.model.borrow_mut().read_ended(number);
        outcome?;
        for ((sector, allowed), found) in sectors.zip(allowed).zip(buf.to_vec().chunks_exact(SECTOR)) {
            let found = Value::read(found);
            if !allowed.contains(&found) && !self.model.borrow().is_lost(sector) {
                return Err(Trouble::Wrong(format!(
                    "sector {sector} reads as {found:?}, allowed are {allowed:?}"
                )));
            }
        }
        Ok(())
    }

    async fn read_into(&self, at: u64, buf: &Buf) -> Result<(), Error> {
        let lane = &self.lane;
        if let Some(direct) = lane.direct_read(at, buf.len() as u64) {
            let read =
                transfer(&direct, buf, |run, part| lane.io().read_directly(run.file, run.at, part)).await;
            lane.end_direct(direct);
            if read == buf.len() {
                return Ok(());
            }
        }
        lane.read(at, buf.clone()).await
    }

    /// Of an image whose damage has been met nothing is given back.
    async fn maintain(&self) -> Result<(), Trouble> {
        let had_met = self.is_alone && self.told.has_met_damage();
        let punches = self.lane.io().punch_count();
        self.lane.maintain().await?;
        if had_met && self.lane.io().punch_count() > punches {
            return Err(Trouble::Wrong("it gives clusters of a damaged image back".into()));
        }
        Ok(())
    }

    /// Of an image whose damage has been met nothing is given back.
    async fn reclaim(&self, window: u64) -> Result<(), Trouble> {
        let lane = &self.lane;
        let had_met = self.told.has_met_damage();
        let leisure = Leisure { disk: lane.io().clone(), rests: Cell::new(0) };
        let reclaimed = lane.reclaim_leaks_by(window, &leisure).await?;
        if had_met && reclaimed.freed + reclaimed.lowered > 0 {
            return Err(Trouble::Wrong("it gives clusters of a damaged image back".into()));
        }
        if self.must_find_nothing && reclaimed.freed + reclaimed.lowered > 0 {
            return Err(Trouble::Wrong("it gives back what may be in use as nobody knows what".into()));
        }
        match reclaimed.verdict {
            Verdict::Complete if reclaimed.left == 0 => Ok(()),
            Verdict::Complete | Verdict::Doubt(_) if !self.must_find_all => Ok(()),
            verdict => Err(Trouble::Failed(Error::Backing {
                file: "image".into(),
                reason: format!("the search for leaks left {}: {verdict:?}", reclaimed.left),
            })),
        }
    }
}

/// Each rest ends when the disk happens to get to it.
struct Leisure {
    disk: Disk,
    /// How many there have been since a queue has ended.
    rests: Cell<u32>,
}

/// A request that a queue has left behind never ends: who waits for it is told to stop after so many rests.
const MAX_RESTS: u32 = 400;

impl Pace for Leisure {
    fn rest(&self) -> Pin<Box<dyn Future<Output = bool> + '_>> {
        Box::pin(async {
            self.disk.pause().await;
            self.rests.set(self.rests.get() + u32::from(self.disk.has_abandoned()));
            self.rests.get() < MAX_RESTS
        })
    }
}

/// A buffer as a queue has it: something else was in it before.
pub(super) fn used_buffer(sectors: usize) -> Buf {
    Buf::from_bytes(&vec![LEFTOVER; sectors * SECTOR])
}
