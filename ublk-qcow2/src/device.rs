//! The life of one ublk device: added, described, started, stopped, deleted.
//!
//! A [`Device`] is a guard: whatever step fails, dropping it stops and deletes what has been made,
//! so no half-made device stays behind. It knows nothing of images or queues' work; it is given a
//! size and limits, and hands out the character device that the queues serve.
//!
//! A device that was added for recovery (`UBLK_F_USER_RECOVERY`) waits when its server dies, with all its
//! requests. [`Device::recover`] is then another way of getting a `Device`, beside [`Device::add`]; the
//! steps after it are the same. Should they fail, the device goes on waiting.

mod dirty;
mod ioctl;
mod loops;
mod nodes;
mod removal;
mod request;
mod shape;
mod stack;
mod upper;

pub(crate) use dirty::{check_unused, sync_everything, write_back};
pub(crate) use ioctl::reread_partitions;
pub(crate) use nodes::{block_path, numbers};
pub(crate) use removal::{delete_left, delete_orphan, unless_gone};
pub(crate) use request::{DataPath, MAX_DEPTH, Request};
pub(crate) use shape::Shape;
pub(crate) use stack::{MAX_STACK, Machine, User};
pub(crate) use upper::await_upper;

use crate::{
    control::{Command, Control, ControlError},
    deputy::{Deputy, DeputyError, Job},
    handover,
    runfile::Phase,
    uapi,
    wait::Bound,
};
use nodes::{open_char, until_let_go};
use request::{FORGETS_SERVERS, NO_PART_SCAN, RECOVERY, ZERO_COPY};
use std::{fs::File, io, path::PathBuf, time::Duration};

/// Why a device could not be made, taken over or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Deputy(#[from] DeputyError),
    #[error("device {id} is {what}")]
    NotOurs { id: u32, what: &'static str },
    #[error("this kernel's driver cannot leave out the partition scan (--no-part-scan needs Linux 7.0)")]
    PartScan,
    #[error("this kernel's driver has no zero copy (--zero-copy=on needs Linux 6.16)")]
    ZeroCopy,
    #[error(
        "cannot complete what a dead server of device {id} had begun: {source}; `ublk-qcow2 del -n {id}` removes it"
    )]
    HandOver { id: u32, source: io::Error },
    #[error("the driver took other parameters than it was given: {0}")]
    Params(String),
    #[error("cannot open {}: {source}{hint}", .path.display())]
    Node { path: PathBuf, source: io::Error, hint: &'static str },
    #[error("{} is {by}", .path.display())]
    Used { path: PathBuf, by: User },
    #[error("whether {} is mounted or claimed otherwise cannot be found out: {source}", .path.display())]
    Unclear { path: PathBuf, source: io::Error },
    #[error("cannot write back what the kernel has in memory for {}, which may be lost: {source}", .path.display())]
    WriteBack { path: PathBuf, source: io::Error },
    #[error(
        "the kernel has not written within {} s what it has in memory for {}", .limit.as_secs(), .path.display()
    )]
    Late { path: PathBuf, limit: Duration },
    #[error("cannot begin to write back what the kernel has in memory for {}: {source}", .path.display())]
    NotBegun { path: PathBuf, source: io::Error },
    #[error(
        "{} is what the image of {} is on, whose server was to end as well, and goes on",
        .path.display(), block_path(*.upper).display()
    )]
    Upper { path: PathBuf, upper: u32 },
}

impl DeviceError {
    /// Whether nothing is lost yet: the kernel still writes, or has not begun.
    pub(crate) fn is_unfinished(&self) -> bool {
        matches!(
            self,
            Self::Late { .. }
                | Self::NotBegun { .. }
                | Self::Upper { .. }
                | Self::Deputy(DeputyError::Unfinished(_) | DeputyError::Silent)
        )
    }

    /// Whether there is no such device, or not one of ours that could be recovered.
    pub(crate) fn is_of_none_of_ours(&self) -> bool {
        matches!(self, Self::NotOurs { .. }) || self.refusal() == Some(libc::ENODEV)
    }

    /// The errno with which the driver refused a command, if it did.
    fn refusal(&self) -> Option<i32> {
        match self {
            Self::Control(error) => error.errno(),
            _ => None,
        }
    }
}

/// A device that exists; deleted when dropped.
pub(crate) struct Device {
    control: Control,
    info: uapi::DevInfo,
    state: State,
    /// Whether its partitions are looked for on our word, and not by the driver.
    scans: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The character device exists, the block device does not.
    Added,
    /// The block device may exist.
    Started,
    /// The block device exists and waits for a server.
    Orphaned,
    /// Nothing is left to undo.
    Deleted,
}

impl Device {
    /// Adds a device.
    pub(crate) fn add(mut control: Control, request: &Request) -> Result<Self, DeviceError> {
        let offered = control.features().unwrap_or(0);
        let info = control.add(request.in_words_of(offered)?)?;
        let scans = request.part_scan && info.flags & NO_PART_SCAN != 0;
        let device = Self { control, info, state: State::Added, scans };
        if !request.part_scan && info.flags & NO_PART_SCAN == 0 {
            // Dropped, it is gone again.
            return Err(DeviceError::PartScan);
        }
        if request.recovery && !device.is_recoverable() {
            tracing::warn!("this kernel's driver knows no recovery: should the server die, I/O will fail");
        }
        Ok(device)
    }

    /// Gets a device whose server has died, when the last of that server's I/O has ended. `reached` is how
    /// far it had come.
    pub(crate) fn recover(
        mut control: Control,
        id: u32,
        cookie: u64,
        reached: Phase,
    ) -> Result<Self, DeviceError> {
        let info = control.info(id)?;
        let not_ours = |what| DeviceError::NotOurs { id, what };
        if info.ublksrv_flags != cookie {
            return Err(not_ours("another one by now"));
        }
        if info.flags & RECOVERY != RECOVERY {
            return Err(not_ours("without recovery; `ublk-qcow2 del` removes it"));
        }
        let forgets =
            |control: &mut Control| control.features().is_ok_and(|bits| bits & FORGETS_SERVERS != 0);
        // Or `del` had come after such a server, and died as well.
        if matches!(reached, Phase::Fetching | Phase::Removing) && !forgets(&mut control) {
            handover::complete(open_char(id)?, info.nr_hw_queues, info.queue_depth)
                .map_err(|source| DeviceError::HandOver { id, source })?;
        }
        let start = || match control.start_recovery(id) {
            // By a server that was killed before it could delete it. Refused like one that will be ready
            // soon.
            Err(_) if control.info(id).is_ok_and(|info| is_stopped(&info)) => {
                Err(not_ours("stopped; `ublk-qcow2 del` removes it"))
            }
            started => Ok(started?),
        };
        match until_let_go(DeviceError::refusal, start) {
            // The recovery that the dead server had begun is still under way, and no queue was handed over.
            // Of a device for recovery it means nothing else; the server may have died before it could say
            // how far it had come.
            Err(error) if error.refusal() == Some(libc::EINVAL) => {}
            started => started?,
        }
        Ok(Self { control, info, state: State::Orphaned, scans: false })
    }

    /// Whether it has no server: it was to be taken over, and has not been.
    pub(crate) fn is_waiting(&self) -> bool {
        self.state == State::Orphaned
    }

    /// Whether it may have requests in the hands of this process.
    pub(crate) fn is_started(&self) -> bool {
        self.state == State::Started
    }

    /// Whether it waits for another server when its own dies.
    pub(crate) fn is_recoverable(&self) -> bool {
        self.info.flags & RECOVERY == RECOVERY
    }

    /// How the data of requests gets to the server; for good, whoever serves the device.
    pub(crate) fn data_path(&self) -> DataPath {
        if self.info.flags & ZERO_COPY == ZERO_COPY { DataPath::ZeroCopy } else { DataPath::Copied }
    }

    /// The device's number.
    pub(crate) fn id(&self) -> u32 {
        self.info.dev_id
    }

    /// The number of queues, which the driver may have lowered.
    pub(crate) fn queues(&self) -> u16 {
        self.info.nr_hw_queues
    }

    /// The depth of each queue, which the driver may have lowered.
    pub(crate) fn depth(&self) -> u16 {
        self.info.queue_depth
    }

    /// The largest request in bytes, which the driver may have lowered.
    pub(crate) fn max_io_bytes(&self) -> u32 {
        self.info.max_io_buf_bytes
    }

    /// Tells the driver what the device looks like, and makes sure that it has understood.
    pub(crate) fn describe(&mut self, shape: &Shape) -> Result<(), DeviceError> {
        let wanted = shape::params(shape, self.max_io_bytes());
        self.control.set_params(self.id(), wanted)?;
        // The driver drops what it does not know without a word.
        let taken = self.control.params(self.id(), wanted.types)?;
        shape::check_params(&wanted, &taken).map_err(DeviceError::Params)
    }

    /// Opens the character device. There can be one such descriptor at a time; the device is not
    /// deleted before it is closed.
    pub(crate) fn open_char(&self) -> Result<File, DeviceError> {
        open_char(self.id())
    }

    /// Starts the device; the block device and its partitions exist when this returns. See
    /// [`Control::start`].
    pub(crate) fn start(
        &mut self,
        deputy: &mut Deputy,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Result<(), DeviceError> {
        let pid = std::process::id();
        if self.state == State::Orphaned {
            self.control.end_recovery(self.id(), pid, give_up)?;
            self.state = State::Started;
            // What else there is has been there before, and who uses it needs nothing more.
            return Ok(());
        }
        self.state = State::Started;
        self.control.start(self.id(), pid, give_up)?;
        // udev or devtmpfs makes the node; who reads its name from us will open it at once.
        nodes::wait_for_block(self.id())?;
        if self.scans {
            self.scan(deputy);
        }
        Ok(())
    }

    /// Has partitions looked for. That it fails is worth a line in the log, as it is where the kernel looks
    /// by itself: the device serves without.
    fn scan(&self, deputy: &mut Deputy) {
        if let Err(error) = deputy.have(Job::Scan, self.id()) {
            let path = block_path(self.id());
            let path = path.display();
            tracing::warn!(
                "{path}: partitions were not looked for: {error}; `blockdev --rereadpt {path}` does it"
            );
        }
    }

    /// Waits for the servers of devices on this one that are to end as well.
    pub(crate) fn await_upper(&self, deputy: &mut Deputy) -> Result<(), DeviceError> {
        self.have(deputy, Job::AwaitUpper, |id, _| await_upper(id))
    }

    /// Has the kernel write what it has in memory for the device and what is built on it. A device for recovery
    /// fails whatever comes after the beginning of [`Self::stop`]; for another one the stop does the same, but
    /// not for what is built on it, beside a file system.
    pub(crate) fn write_back(&self, deputy: &mut Deputy) -> Result<(), DeviceError> {
        let unused = self.have(deputy, Job::CheckUnused, check_unused);
        if unused.is_ok() && !self.is_recoverable() {
            return Ok(());
        }
        let written = self.have(deputy, Job::WriteBack, write_back);
        let Err(error) = unused else { return written };
        tracing::warn!("{error}; it is taken from under its users: what they write from now on is lost");
        let synced = self.have(deputy, Job::SyncEverything, sync_everything);
        written.and(synced)
    }

    /// Has a job done by the deputy, or, where that is gone, by this process.
    fn have(
        &self,
        deputy: &mut Deputy,
        job: Job,
        work: fn(u32, Bound) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        match deputy.have(job, self.id()) {
            Err(error @ DeputyError::Gone(_)) => {
                tracing::warn!(id = self.id(), "{error}");
                work(self.id(), Bound::Here)
            }
            done => Ok(done?),
        }
    }

    /// Stops the device: the queues' fetches are aborted when their requests have finished.
    pub(crate) fn stop(&mut self, deputy: &mut Deputy) -> Result<(), DeviceError> {
        match deputy.have(Job::Stop, self.id()) {
            Err(error @ DeputyError::Gone(_)) => {
                // Should this process be killed before it is over it stays: see `deputy`.
                tracing::warn!(id = self.id(), "{error}");
                unless_gone(self.control.stop(self.id()))?;
            }
            done => done?,
        }
        self.state = State::Added;
        Ok(())
    }

    /// Deletes the stopped device, for good. The character device must be closed. While somebody still has the
    /// stopped block device open, deletion is under way when this returns, and ends with that. Somebody else
    /// may have deleted it, and its number be another device's already.
    pub(crate) fn delete(mut self) -> Result<(), DeviceError> {
        self.state = State::Deleted;
        let id = self.id();
        let found = self.control.info(id).map(|info| info.ublksrv_flags);
        let deleted = match found {
            Ok(cookie) if cookie == self.info.ublksrv_flags => {
                removal::delete_patiently(&mut self.control, id)
            }
            found => found.map(drop),
        };
        Ok(unless_gone(deleted)?)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let (id, state) = (self.id(), self.state);
        let undone = state.undo(|command| match command {
            Command::Stop => self.control.stop(id),
            _ => self.control.delete(id),
        });
        if let Err(error) = undone {
            tracing::error!(id, %error, "the device is left behind; try `ublk-qcow2 del -n {id}`");
        }
    }
}

impl State {
    /// Undoes what has been made. What cannot be stopped is not deleted either: the driver would stop it
    /// first, and wait for the same once more, with the lock that it takes for whatever device is to be added
    /// or deleted.
    fn undo(self, mut have: impl FnMut(Command) -> Result<(), ControlError>) -> Result<(), ControlError> {
        match self {
            Self::Added => have(Command::Delete),
            Self::Started => have(Command::Stop).and_then(|()| have(Command::Delete)),
            Self::Orphaned | Self::Deleted => Ok(()),
        }
    }
}

/// Whether no block device is there, and none comes back.
pub(crate) fn is_stopped(info: &uapi::DevInfo) -> bool {
    info.state == uapi::UBLK_S_DEV_DEAD
}

/// Whether it has a server, as far as the driver has noticed.
pub(crate) fn is_live(info: &uapi::DevInfo) -> bool {
    info.state == uapi::UBLK_S_DEV_LIVE
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device that could not be stopped was deleted all the same: the driver then waits with its lock for
    /// all devices, and no other one could be added or deleted on that machine.
    #[test]
    fn what_cannot_be_stopped_is_not_deleted() {
        let undone = |state: State, refused: Option<Command>| {
            let mut had = Vec::new();
            let outcome = state.undo(|command| {
                had.push(command);
                let errno = libc::EIO;
                if refused == Some(command) { Err(ControlError::Refused { command, errno }) } else { Ok(()) }
            });
            (had, outcome.is_ok())
        };
        let (stop, delete) = (Command::Stop, Command::Delete);
        assert_eq!(undone(State::Started, None), (vec![stop, delete], true));
        assert_eq!(undone(State::Started, Some(stop)), (vec![stop], false));
        assert_eq!(undone(State::Added, None), (vec![delete], true));
        for state in [State::Orphaned, State::Deleted] {
            assert_eq!(undone(state, None), (vec![], true));
        }
    }
}
