//! Carrying commands out: one after the other, or several in flight.
//!
//! The engine moves whole sectors; qemu-io's offsets are bytes. A request that is not made of whole
//! sectors waits for all that is in flight, then reads, changes and writes its outer sectors: so no
//! other request of the session is between the two.

use super::{
    Next,
    parse::{self, Action, Command, Done, Map, Source, Transfer, Verify},
    print,
};
use crate::commands::printable;
use qcow2_engine::{
    Error, ErrorKind, Extent, Image, Lane, ZeroMode,
    exec::Executor,
    io::{Buf, uring::Uring},
};
use std::{
    cell::{Cell, RefCell},
    fmt::Display,
    fs::File,
    future::poll_fn,
    io::{self, Read, Write},
    path::Path,
    rc::Rc,
    sync::Arc,
    task::{Poll, Waker},
    time::{Duration, Instant},
};

/// The engine's unit, in bytes.
pub(super) const SECTOR: u64 = 512;
/// Requests in flight; more wait for their turn.
const DEPTH: usize = 64;
/// Bytes that are mapped at a time.
const MAP_BYTES: u64 = 64 << 20;

/// An image and what is in flight on it. Clones share both.
#[derive(Clone)]
pub(super) struct Session(Rc<Inner>);

struct Inner {
    lane: Lane<Uring>,
    executor: Executor,
    in_flight: Cell<usize>,
    /// Who waits until nothing is in flight.
    waiting: RefCell<Option<Waker>>,
    has_failed: Cell<bool>,
    print_error: RefCell<Option<io::Error>>,
}

impl Session {
    pub(super) fn new(image: &Arc<Image>, executor: Executor) -> Self {
        let lane = Lane::new(image, executor.ring().clone(), DEPTH);
        Self(Rc::new(Inner {
            lane,
            executor,
            in_flight: Cell::new(0),
            waiting: RefCell::default(),
            has_failed: Cell::new(false),
            print_error: RefCell::default(),
        }))
    }

    /// Whether any command has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.0.has_failed.get()
    }

    /// Whether all could be printed so far; a failure is told once.
    pub(super) fn printed(&self) -> io::Result<()> {
        self.0.print_error.take().map_or(Ok(()), Err)
    }

    /// Carries a line out, or starts it.
    pub(super) async fn execute(&self, line: &str) -> Next {
        let command = match parse::command(line) {
            Ok(Some(command)) => command,
            Ok(None) => return Next::Command,
            Err(reason) => {
                self.fail(&reason);
                return Next::Command;
            }
        };
        match command {
            Command::Transfer(transfer) => self.transfer(transfer).await,
            Command::AioFlush => self.drain().await,
            Command::Flush => {
                if let Err(error) = self.0.lane.flush().await {
                    self.fail(&format!("flush failed: {error}"));
                }
            }
            Command::Length => {
                self.print(format_args!("{}\n", print::size(self.0.lane.image().virtual_size() as f64)))
            }
            Command::Info => self.info(),
            Command::Alloc { at, len } => self.alloc(at, len).await,
            Command::Map(Map::Allocated) => self.map_allocated().await,
            Command::Map(Map::Places) => self.map_places().await,
            Command::Sleep { milliseconds } => {
                if let Err(error) = self.0.executor.ring().sleep(Duration::from_millis(milliseconds)).await {
                    self.fail(&format!("sleep failed: {error}"));
                }
            }
            Command::Help => self.print(parse::HELP),
            Command::Quit => return Next::End,
        }
        Next::Command
    }

    /// Waits for what is in flight, writes everything back and closes the image.
    pub(super) async fn close(&self) -> Result<(), Error> {
        self.drain().await;
        self.0.lane.close().await
    }

    fn fail(&self, reason: &str) {
        self.print(format_args!("{}\n", printable(reason.as_bytes())));
        self.0.has_failed.set(true);
    }

    /// Prints. That nobody listens any more is no reason to leave the image open: it is noted for who closes
    /// it.
    fn print(&self, text: impl Display) {
        let mut out = io::stdout().lock();
        if let Err(error) = write!(out, "{text}").and_then(|()| out.flush()) {
            self.0.print_error.replace(Some(error));
        }
    }

    /// Waits until nothing is in flight.
    async fn drain(&self) {
        poll_fn(|context| {
            if self.0.in_flight.get() == 0 {
                return Poll::Ready(());
            }
            *self.0.waiting.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    async fn transfer(&self, transfer: Transfer) {
        let is_whole = transfer.at.is_multiple_of(SECTOR) && transfer.len.is_multiple_of(SECTOR);
        if !is_whole {
            self.drain().await;
        }
        if !transfer.is_async || !is_whole {
            return self.carry_out(&transfer).await;
        }
        let session = self.clone();
        self.0.in_flight.set(self.0.in_flight.get() + 1);
        self.0.executor.spawn(async move {
            session.carry_out(&transfer).await;
            session.0.in_flight.set(session.0.in_flight.get() - 1);
            let waiting = session.0.waiting.borrow_mut().take();
            if let Some(waker) = waiting {
                waker.wake();
            }
        });
    }

    async fn carry_out(&self, transfer: &Transfer) {
        let &Transfer { name, at, len, is_quiet, is_terse, .. } = transfer;
        let start = Instant::now();
        let (verb, result) = match &transfer.action {
            Action::Read { verify, dumps } => {
                let read = self.read(at, len).await;
                let shown = read.map(|bytes| {
                    self.verify(at, &bytes, *verify);
                    if *dumps && !is_quiet {
                        self.print(print::dump(at, &bytes));
                    }
                });
                ("read", shown)
            }
            Action::Write { source, done } => ("wrote", self.write_from(at, len, source, *done).await),
            Action::Zero { unmap, done } => {
                let mode = if *unmap { ZeroMode::Unmap } else { ZeroMode::Keep };
                ("wrote", self.zero(at, len, mode, *done).await)
            }
            Action::Discard => ("discard", self.discard(at, len).await),
        };
        match result {
            Ok(()) if is_quiet => {}
            Ok(()) => {
                self.print(format_args!("{}\n", print::outcome(verb, at, len, start.elapsed(), is_terse)));
            }
            Err(error) => self.fail(&format!("{name} failed: {error}")),
        }
    }

    /// Compares what was read.
    fn verify(&self, at: u64, bytes: &[u8], verify: Option<Verify>) {
        if let Some(Verify { pattern, skip, len }) = verify {
            let compared = &bytes[skip as usize..(skip + len) as usize];
            if compared.iter().any(|byte| *byte != pattern) {
                self.fail(&format!("Pattern verification failed at offset {}, {len} bytes", at + skip));
            }
        }
    }

    /// The bytes of a range, with whole sectors read around it.
    async fn read(&self, at: u64, len: u64) -> Result<Vec<u8>, String> {
        let (start, end) = self.sectors_around(at, len)?;
        let buf = Buf::zeroed((end - start) as usize);
        self.0.lane.read(start, buf.clone()).await.map_err(|error| error.to_string())?;
        let mut bytes = vec![0; len as usize];
        buf.copy_to((at - start) as usize, &mut bytes);
        Ok(bytes)
    }

    async fn write_from(&self, at: u64, len: u64, source: &Source, done: Done) -> Result<(), String> {
        let (start, end) = self.sectors_around(at, len)?;
        let buf = self.sectors_to_change(at, len, start, end).await?;
        let payload = buf.slice((at - start) as usize..(at - start + len) as usize);
        match source {
            Source::Pattern(pattern) => payload.fill(*pattern),
            Source::File(path) => fill_from(&payload, path)?,
        }
        self.0.lane.write(start, buf).await.map_err(|error| error.to_string())?;
        self.make(done).await
    }

    async fn zero(&self, at: u64, len: u64, mode: ZeroMode, done: Done) -> Result<(), String> {
        let (start, end) = self.sectors_around(at, len)?;
        let inner_start = at.next_multiple_of(SECTOR);
        let inner_end = at + len - (at + len) % SECTOR;
        if inner_start < inner_end {
            let zeroed = self.0.lane.write_zeroes(inner_start, inner_end - inner_start, mode).await;
            zeroed.map_err(|error| error.to_string())?;
        }
        if inner_start > inner_end {
            // All within one sector.
            self.zero_part(at, len).await?;
        } else {
            if start < inner_start {
                self.zero_part(at, inner_start - at).await?;
            }
            if inner_end < end {
                self.zero_part(inner_end, at + len - inner_end).await?;
            }
        }
        self.make(done).await
    }

    /// Writes zeros over a part of a sector, unless nothing is allocated for it.
    async fn zero_part(&self, at: u64, len: u64) -> Result<(), String> {
        let (start, end) = self.sectors_around(at, len)?;
        let extents = self.0.lane.map(start, end - start).await.map_err(|error| error.to_string())?;
        if extents.iter().all(|extent| matches!(extent, Extent::Zero { .. })) {
            return Ok(());
        }
        self.write_from(at, len, &Source::Pattern(0), Done::Written).await
    }

    /// A discard is a hint: where an image cannot follow it, it is done, as for qemu-io.
    async fn discard(&self, at: u64, len: u64) -> Result<(), String> {
        match self.0.lane.discard(at, len).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            outcome => outcome.map_err(|error| error.to_string()),
        }
    }

    /// Sees to it that what was written is done as far as that.
    async fn make(&self, done: Done) -> Result<(), String> {
        match done {
            Done::Written => Ok(()),
            Done::Durable => self.0.lane.flush().await.map_err(|error| error.to_string()),
        }
    }

    /// A buffer for whole sectors, with the content of those that are not wholly overwritten.
    async fn sectors_to_change(&self, at: u64, len: u64, start: u64, end: u64) -> Result<Buf, String> {
        let buf = Buf::zeroed((end - start) as usize);
        if start == end {
            return Ok(buf);
        }
        let last = end - SECTOR;
        let outer = [(start, start < at), (last, at + len < end && (last > start || start == at))];
        for (sector, _) in outer.into_iter().filter(|(_, is_partial)| *is_partial) {
            let offset = (sector - start) as usize;
            let part = buf.slice(offset..offset + SECTOR as usize);
            self.0.lane.read(sector, part).await.map_err(|error| error.to_string())?;
        }
        Ok(buf)
    }

    /// The sectors that a range touches, if they are on the disk.
    fn sectors_around(&self, at: u64, len: u64) -> Result<(u64, u64), String> {
        let size = self.0.lane.image().virtual_size();
        match at.checked_add(len).filter(|end| *end <= size) {
            Some(end) => Ok((at - at % SECTOR, end.next_multiple_of(SECTOR))),
            None => Err(format!("{len} bytes at offset {at} are beyond the end of the disk of {size} bytes")),
        }
    }

    fn info(&self) {
        let image = self.0.lane.image();
        let geometry = image.geometry();
        let cluster_size = print::size(geometry.cluster_size() as f64);
        let (version, bits) = (geometry.version.number(), geometry.refcount_bits());
        self.print(format_args!(
            "format name: qcow2\ncluster size: {cluster_size}\nversion: {version}\nrefcount bits: {bits}\n"
        ));
        for (index, name) in image.chain().enumerate().skip(1) {
            self.print(format_args!("backing file {index}: {name}\n"));
        }
    }

    /// How much of a range is allocated in the image; what is behind the end of the disk does not count.
    async fn alloc(&self, at: u64, len: u64) {
        let len = len.min(self.disk_bytes().saturating_sub(at));
        let (mut done, mut allocated) = (0, 0);
        while done < len {
            match self.0.lane.is_allocated(at + done, len - done).await {
                Ok((is_allocated, more)) => {
                    done += more;
                    allocated += if is_allocated { more } else { 0 };
                }
                Err(error) => return self.fail(&format!("alloc failed: {error}")),
            }
        }
        let place = print::size(at as f64);
        self.print(format_args!("{allocated}/{len} bytes allocated at offset {place}\n"));
    }

    /// What is allocated in the image.
    async fn map_allocated(&self) {
        let size = self.disk_bytes();
        let mut at = 0;
        while at < size && self.0.print_error.borrow().is_none() {
            match self.0.lane.is_allocated(at, size - at).await {
                Ok((is_allocated, len)) => {
                    let verdict = if is_allocated { "    allocated" } else { "not allocated" };
                    self.print_run(at, len, format_args!(" {verdict}"), "");
                    at += len;
                }
                Err(error) => return self.fail(&format!("map failed: {error}")),
            }
        }
    }

    /// Whole sectors, of which the last may have a part.
    fn disk_bytes(&self) -> u64 {
        self.0.lane.image().virtual_size().next_multiple_of(SECTOR)
    }

    /// Where the data of the disk is, whichever file of the chain it is in.
    async fn map_places(&self) {
        let size = self.disk_bytes();
        let mut at = 0;
        while at < size && self.0.print_error.borrow().is_none() {
            let len = MAP_BYTES.min(size - at);
            match self.0.lane.map(at, len).await {
                Ok(extents) => extents.iter().fold(at, |at, extent| {
                    self.print_extent(at, extent);
                    at + extent.len()
                }),
                Err(error) => return self.fail(&format!("map failed: {error}")),
            };
            at += len;
        }
    }

    fn print_extent(&self, at: u64, extent: &Extent) {
        let len = extent.len();
        let place = match extent {
            Extent::Zero { .. } => "zero".to_owned(),
            Extent::Data { file, at, .. } => {
                let path = self.0.executor.ring().files().path(*file).unwrap_or_default();
                format!("data in {} at {at:#x}", path.display())
            }
            Extent::Compressed { range, layer, .. } => {
                format!("compressed data in file {layer} of the chain at {:#x}", range.offset)
            }
        };
        self.print_run(at, len, "", &format!(": {place}"));
    }

    fn print_run(&self, at: u64, len: u64, verdict: impl Display, place: &str) {
        self.print(format_args!(
            "{} ({len:#x}) bytes{verdict} at offset {} ({at:#x}){place}\n",
            print::size(len as f64),
            print::size(at as f64)
        ));
    }
}

/// Fills a buffer with a file's bytes, over and over if there are fewer. The file may have no end.
fn fill_from(buf: &Buf, path: &Path) -> Result<(), String> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(buf.len() as u64).read_to_end(&mut bytes));
    read.map_err(|error| format!("{}: {error}", path.display()))?;
    if bytes.is_empty() && !buf.is_empty() {
        return Err(format!("{}: the file is empty", path.display()));
    }
    for at in (0..buf.len()).step_by(bytes.len().max(1)) {
        buf.copy_from(at, &bytes[..bytes.len().min(buf.len() - at)]);
    }
    Ok(())
}
