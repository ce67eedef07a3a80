//! The life of a queue's tags: fetch, serve, commit, which is the next fetch.
//!
//! One task, [`Context::serve_tags`], moves all tags on as their operations end; each tag is in one
//! [`Stage`]. What a few transfers answer ([`Lane::direct_read`](qcow2_engine::Lane::direct_read) and its
//! kin) is done right there: the transfers are started when the request has been fetched, and the result
//! committed when the last has ended. Zeros need no transfer. Everything else, and a request of which a transfer ended
//! otherwise than whole, is handed to the tag's own task ([`Context::serve_slowly`]), which waits for the engine.
//!
//! ```text
//!        fetched             transfers ended
//! Kernel ───────▶ Direct ──────────────────▶ Kernel (commit)
//!    │   └──────▶ Task ◀── short, or failed ───┘
//!    │              └───── engine done ────▶ Kernel (commit)
//!    └─ aborted ▶ Ended
//! ```

use super::{ABORTED, Context, Notice, QueueError, payload::Way};
use crate::{
    request::{Range, Request},
    uapi,
};
use qcow2_engine::{Error, Flight, MAX_RUNS, ZeroMode, exec::Executor};
use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    rc::Rc,
    task::{Poll, Waker},
};

/// One tag.
pub(super) struct Tag {
    stage: Cell<Stage>,
    /// Whether the tag has a task by now: many never need one, and it takes some kilobytes.
    has_task: Cell<bool>,
    /// The tag's task, while it waits for work.
    task: RefCell<Option<Waker>>,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Image(#[from] Error),
    #[error("the driver did not copy its data: {0}")]
    Copy(#[source] io::Error),
}

/// Who has the tag. Two of these are passed for each request, so they are kept small: the request stays in its
/// descriptor.
enum Stage {
    /// The kernel: it has been told to fetch, or that and a result.
    Kernel,
    /// Transfers that answer the request are under way.
    Direct { flight: Flight, account: Account },
    /// The tag's task, which is to take the request up.
    Waiting,
    /// The tag's task, which has.
    Task,
    /// Nobody: the device is being stopped, or the tag is lost.
    Ended,
}

/// How far a request's transfers have come.
#[derive(Clone, Copy)]
struct Account {
    way: Way,
    under_way: u8,
    /// Bytes of the request that none of those that have ended has moved; some are left if one has failed.
    missing: u32,
    /// Bytes of the request.
    len: u32,
}

impl Account {
    /// Notes the end of one.
    fn note(self, result: i32) -> Self {
        let moved = u32::try_from(result).unwrap_or(0);
        Self { under_way: self.under_way - 1, missing: self.missing - moved, ..self }
    }
}

impl Tag {
    pub(super) fn new() -> Self {
        Self { stage: Cell::new(Stage::Kernel), has_task: Cell::new(false), task: RefCell::default() }
    }

    fn set(&self, stage: Stage) {
        self.stage.set(stage);
    }

    /// Has the tag's task look at the stage.
    fn wake(&self) {
        if let Some(task) = self.task.borrow_mut().take() {
            task.wake();
        }
    }

    /// Waits for the next request for the tag's task; `false` when the tag has ended.
    async fn has_next(&self) -> bool {
        poll_fn(|context| match self.stage.replace(Stage::Task) {
            Stage::Waiting => Poll::Ready(true),
            Stage::Ended => {
                self.set(Stage::Ended);
                Poll::Ready(false)
            }
            other => {
                self.set(other);
                self.task.replace(Some(context.waker().clone()));
                Poll::Pending
            }
        })
        .await
    }
}

impl Context {
    /// Moves all tags on until the last has ended. Tags get their tasks from `executor`.
    pub(super) async fn serve_tags(self: Rc<Self>, executor: Executor) {
        for number in 0..self.depth() {
            self.command(uapi::UBLK_U_IO_FETCH_REQ, number, 0);
        }
        let mut reports = Vec::new();
        while self.serving.get() > 0 {
            self.ring.reports(&mut reports).await;
            for report in &reports {
                // A token is the number of a tag.
                self.advance(report.token as u16, report.result);
            }
            for number in self.without_task.borrow_mut().drain(..) {
                executor.spawn(Rc::clone(&self).serve_slowly(number));
            }
        }
        if let Some(waiting) = self.drained.take() {
            waiting.wake();
        }
    }

    /// Serves what a tag cannot answer directly, until it has ended.
    async fn serve_slowly(self: Rc<Self>, number: u16) {
        let tag = self.tag(number);
        while tag.has_next().await {
            let result = match self.request_of(&self.descriptors.get(number)) {
                Ok(request) => self.serve_whole(number, request).await,
                Err(refusal) => refusal,
            };
            self.commit(number, result);
        }
    }

    /// Has the engine do all of a request. Returns what the kernel is to be told.
    async fn serve_whole(&self, number: u16, request: Request) -> i32 {
        let result = match self.carry_out(number, request).await {
            // At most the buffer's length.
            Ok(bytes) => bytes as i32,
            Err(error) => self.failed(&request, &error),
        };
        if let Request::Write { range, .. } = request {
            self.payloads.end(number, Way::ToFile, range.len);
        }
        result
    }

    /// An operation of a tag has ended with `result`: the kernel's, or its transfer.
    #[inline(always)] // into the loop over reports, which is all that it is called from
    fn advance(&self, number: u16, result: i32) {
        match self.tag(number).stage.replace(Stage::Kernel) {
            Stage::Kernel => self.fetched(number, result),
            Stage::Direct { flight, account } => {
                let account = account.note(result);
                if account.under_way > 0 {
                    return self.tag(number).set(Stage::Direct { flight, account });
                }
                self.lane.end_direct(flight);
                self.transferred(number, account);
            }
            stage @ (Stage::Waiting | Stage::Task | Stage::Ended) => {
                debug_assert!(false, "tag {number} has nothing under way, but {result} came of it");
                self.tag(number).set(stage);
            }
        }
    }

    /// All transfers of a request have ended.
    #[inline]
    fn transferred(&self, number: u16, account: Account) {
        if account.missing == 0 {
            self.payloads.end(number, account.way, account.len.into());
            // At most the longest request.
            return self.commit(number, account.len as i32);
        }
        self.hand_over(number);
    }

    /// The kernel has answered a command: with a request, or with the end.
    fn fetched(&self, number: u16, result: i32) {
        if result >= 0 {
            let descriptor = self.descriptors.get(number);
            let request = self.request_of(&descriptor);
            // The driver may have copied something there.
            if !matches!(request, Ok(Request::Read(_))) {
                self.payloads.spoil(number);
            }
            match request {
                Ok(request) => self.begin(number, request, descriptor.op_flags),
                Err(refusal) => self.commit(number, refusal),
            }
            return;
        }
        if result != ABORTED {
            (self.notify)(Notice::Failing(QueueError::Fetch(io::Error::from_raw_os_error(-result))));
        }
        self.serving.set(self.serving.get() - 1);
        self.tag(number).set(Stage::Ended);
        self.tag(number).wake();
    }

    /// Starts the transfers that answer a request, or leaves it to the tag's task.
    fn begin(&self, number: u16, request: Request, op_flags: u32) {
        let (way, Range { at, len }) = match request {
            Request::Read(range) => (Way::FromFile, range),
            Request::Write { range, fua: false } => (Way::ToFile, range),
            _ => return self.hand_over(number),
        };
        self.payloads.begin(number, way, len);
        if !self.payloads.is_movable(op_flags) {
            return self.hand_over(number);
        }
        let direct = match way {
            Way::FromFile => self.lane.direct_read(at, len),
            Way::ToFile => self.lane.direct_write(at, len),
        };
        let Some(direct) = direct else { return self.begin_indirect(number, way, at, len) };
        self.payloads.transfer(number, way, direct.runs());
        const { assert!(MAX_RUNS <= u8::MAX as usize) };
        // At most the longest request.
        let (under_way, len) = (direct.runs().len() as u8, len as u32);
        let account = Account { way, under_way, missing: len, len };
        self.tag(number).set(Stage::Direct { flight: direct.into(), account });
    }

    /// Answers a read of zeros, or leaves the request to the tag's task.
    #[inline(never)]
    fn begin_indirect(&self, number: u16, way: Way, at: u64, len: u64) {
        if let (Way::FromFile, Some(buffers)) = (way, self.payloads.buffers())
            && self.lane.is_zero(at, len)
        {
            buffers.clear(number, len as usize);
            // At most the longest request.
            return self.commit(number, len as i32);
        }
        self.hand_over(number);
    }

    fn hand_over(&self, number: u16) {
        let tag = self.tag(number);
        tag.set(Stage::Waiting);
        if tag.has_task.replace(true) {
            tag.wake();
        } else {
            self.without_task.borrow_mut().push(number);
        }
    }

    /// Tells the kernel the result of the tag's request, and to fetch the next.
    fn commit(&self, number: u16, result: i32) {
        self.tag(number).set(Stage::Kernel);
        self.command(uapi::UBLK_U_IO_COMMIT_AND_FETCH_REQ, number, result);
    }

    /// Has the engine carry a request out. Returns the bytes moved, 0 for requests that move none.
    async fn carry_out(&self, number: u16, request: Request) -> Result<u64, Failure> {
        let lane = &self.lane;
        match request {
            Request::Read(range) => self.read(number, range).await?,
            Request::Write { range, fua } => {
                self.write(number, range).await?;
                if fua {
                    self.lane.flush().await?;
                }
            }
            Request::Flush => lane.flush().await?,
            Request::Discard(range) => lane.discard(range.at, range.len).await?,
            Request::WriteZeroes { range, unmap, fua } => {
                let mode = if unmap { ZeroMode::Unmap } else { ZeroMode::Keep };
                lane.write_zeroes(range.at, range.len, mode).await?;
                if fua {
                    self.lane.flush().await?;
                }
            }
        }
        Ok(request.data_len())
    }

    async fn read(&self, number: u16, range: Range) -> Result<(), Failure> {
        let buf = self.payloads.take(number, range.len);
        let delivered = match self.lane.read(range.at, buf.clone()).await {
            Ok(()) => self.payloads.deliver(number, &buf).await.map_err(Failure::Copy),
            Err(error) => Err(error.into()),
        };
        self.payloads.give_back(buf);
        delivered
    }

    async fn write(&self, number: u16, range: Range) -> Result<(), Failure> {
        let buf = self.payloads.take(number, range.len);
        let written = match self.payloads.collect(number, &buf).await {
            Ok(()) => self.lane.write(range.at, buf.clone()).await.map_err(Failure::Image),
            Err(error) => Err(Failure::Copy(error)),
        };
        self.payloads.give_back(buf);
        written
    }
}
