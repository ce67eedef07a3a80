//! The life of one ublk device: added, described, started, stopped, deleted.
//!
//! A [`Device`] is a guard: whatever step fails, dropping it stops and deletes what has been made,
//! so no half-made device stays behind. It knows nothing of images or queues' work; it is given a
//! size and limits, and hands out the character device that the queues serve.
//!
//! A device that was added for recovery (`UBLK_F_USER_RECOVERY`) waits when its server dies, with all its
//! requests. [`Device::recover`] is then another way of getting a `Device`, beside [`Device::add`]; the
//! steps after it are the same. Should they fail, the device goes on waiting.

mod shape;

pub(crate) use shape::Shape;

use crate::{
    cli::ZeroCopy,
    control::{ANY_ID, Control, ControlError},
    deputy::{Deputy, DeputyError, Job},
    handover,
    runfile::Phase,
    wait,
};
use libublk::sys;
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// The largest request that the kernel hands over in one piece, in bytes, and how much more where it takes no
/// buffer of ours.
const MAX_IO_BYTES: u32 = 512 << 10;
const MAX_ZERO_COPY_BYTES: u32 = 1 << 20;
/// Bytes of requests that a queue may have at once: there may be a buffer for each, or two where the data is
/// copied, and what has been used of them stays locked in memory.
const MAX_QUEUE_BYTES: u32 = 256 << 20;
/// The kernel's limit on the depth of a queue.
pub(crate) const MAX_DEPTH: u16 = sys::UBLK_MAX_QUEUE_DEPTH as u16;
/// How long the kernel may take to end the I/O of a server that died. Linux before 6.15 may begin after 30 s.
const ORPHAN_WAIT: Duration = Duration::from_secs(90);
/// Between two questions whether it has.
const ORPHAN_PAUSE: Duration = Duration::from_millis(10);
/// How long the kernel may take to write the block device's dirty pages.
const WRITE_BACK: Duration = Duration::from_secs(300);
/// The device waits for another server, which is given the requests that the old one had.
const RECOVERY: u64 = (sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;
/// `UBLK_F_NO_AUTO_PART_SCAN`, which libublk's header does not have yet.
const NO_PART_SCAN: u64 = 1 << 18;
/// `UBLK_F_QUIESCE`: a driver that has it forgets a server's queues when that server has died. For an older
/// one see [`handover`].
const FORGETS_SERVERS: u64 = sys::UBLK_F_QUIESCE as u64;
/// What a device needs for [`DataPath::ZeroCopy`]: the driver registers a request's pages itself, and copies
/// them on demand.
const ZERO_COPY: u64 =
    (sys::UBLK_F_SUPPORT_ZERO_COPY | sys::UBLK_F_AUTO_BUF_REG | sys::UBLK_F_USER_COPY) as u64;
/// How long a device node may take to appear after the driver has made the device.
const NODE_WAIT: Duration = Duration::from_secs(10);
/// Between two attempts to open it.
const NODE_PAUSE: Duration = Duration::from_millis(5);

/// How the data of requests gets to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataPath {
    /// The driver copies it, into and out of a buffer of the server's.
    Copied,
    /// Not at all where the kernel can move it between the request's pages and the image's file; else it is
    /// copied on demand.
    ZeroCopy,
}

/// What to ask the driver for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    /// The device id, or the driver's choice.
    pub(crate) id: Option<u32>,
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    /// Whether the device waits for another server when its own dies.
    pub(crate) recovery: bool,
    /// Whether the kernel looks for a partition table when the device starts.
    pub(crate) part_scan: bool,
    /// Whether the server is to do without copies of the data.
    pub(crate) zero_copy: ZeroCopy,
    /// What the driver keeps for us, to know the device by.
    pub(crate) cookie: u64,
}

/// Why a device could not be made.
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
}

impl DeviceError {
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
    info: sys::ublksrv_ctrl_dev_info,
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
        // Asked for what it does not know, the driver may refuse to make a device.
        let offered = control.features().unwrap_or(0);
        let zero_copy = request.zero_copy != ZeroCopy::Off && offered & ZERO_COPY == ZERO_COPY;
        if request.zero_copy == ZeroCopy::On && !zero_copy {
            return Err(DeviceError::ZeroCopy);
        }
        let info = control.add(sys::ublksrv_ctrl_dev_info {
            nr_hw_queues: request.queues,
            queue_depth: request.depth,
            max_io_buf_bytes: largest_request(zero_copy, request.depth),
            dev_id: request.id.unwrap_or(ANY_ID),
            ublksrv_pid: -1,
            flags: flags(request, offered) | if zero_copy { ZERO_COPY } else { 0 },
            ublksrv_flags: request.cookie,
            ..Default::default()
        })?;
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
        wait_for_node(block_path(self.id()), |path| std::fs::metadata(path))?;
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

    /// Has the kernel write back what it has in memory for the block device. A device for recovery fails
    /// whatever comes after the beginning of [`Self::stop`], dirty pages included.
    pub(crate) fn write_back(&self, deputy: &mut Deputy) -> Result<(), DeviceError> {
        match deputy.have(Job::WriteBack, self.id()) {
            Err(error @ DeputyError::Gone(_)) => {
                tracing::warn!(id = self.id(), "{error}");
                write_back(self.id())
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

    /// Deletes the device, for good. The character device must be closed. While somebody still has the
    /// stopped block device open, deletion is under way when this returns, and ends with that. Somebody else
    /// may have deleted it, and its number be another device's already.
    pub(crate) fn delete(mut self) -> Result<(), DeviceError> {
        self.state = State::Deleted;
        let id = self.id();
        let found = self.control.info(id).map(|info| info.ublksrv_flags);
        let deleted = match found {
            Ok(cookie) if cookie == self.info.ublksrv_flags => delete_patiently(&mut self.control, id),
            found => found.map(drop),
        };
        Ok(unless_gone(deleted)?)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let id = self.id();
        if self.state == State::Orphaned {
            return;
        }
        if self.state == State::Started
            && let Err(error) = self.control.stop(id)
        {
            tracing::error!(id, %error, "the device is left behind; try `ublk-qcow2 del -n {id}`");
        }
        if self.state != State::Deleted
            && let Err(error) = self.control.delete(id)
        {
            tracing::error!(id, %error, "the device is left behind; try `ublk-qcow2 del -n {id}`");
        }
    }
}

/// Whether no block device is there, and none comes back.
fn is_stopped(info: &sys::ublksrv_ctrl_dev_info) -> bool {
    u32::from(info.state) == sys::UBLK_S_DEV_DEAD
}

fn open_char(id: u32) -> Result<File, DeviceError> {
    wait_for_node(char_path(id), |path| {
        // A dead server may not have let go of it yet. Without O_NONBLOCK the kernel would have a thread of
        // its own read and write it, see `queue::payload`.
        until_let_go(io::Error::raw_os_error, || {
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
        })
    })
}

/// Tries again while the kernel still has to do with a server that died, and so refuses with EBUSY.
fn until_let_go<T, E>(
    errno_of: impl Fn(&E) -> Option<i32>,
    attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let is_busy =
        |outcome: &Result<T, E>| outcome.as_ref().is_err_and(|error| errno_of(error) == Some(libc::EBUSY));
    wait::patiently(ORPHAN_WAIT, ORPHAN_PAUSE, is_busy, attempt)
}

/// Has the kernel write back what it has in memory for a block device; waits for requests to it.
pub(crate) fn write_back(id: u32) -> Result<(), DeviceError> {
    let path = block_path(id);
    let synced = path.clone();
    wait::in_time(WRITE_BACK, move || File::open(synced)?.sync_all()).map_err(|source| DeviceError::Node {
        path,
        source,
        hint: "; dirty pages may be lost",
    })
}

/// Stops and deletes what a dead server has left, unless the number belongs to another device by now.
pub(crate) fn delete_left(control: &mut Control, id: u32, cookie: u64) -> Result<(), ControlError> {
    match control.info(id) {
        Ok(info) if info.ublksrv_flags == cookie => delete_orphan(control, id),
        Err(error) if error.errno() != Some(libc::ENODEV) => Err(error),
        _ => Ok(()),
    }
}

/// Stops and deletes a device that has no server of ours any more. One that is gone is no error; one that
/// somebody still has open is gone for everybody else, as in [`Device::delete`].
pub(crate) fn delete_orphan(control: &mut Control, id: u32) -> Result<(), ControlError> {
    unless_gone(control.stop(id))?;
    unless_gone(delete_patiently(control, id))
}

/// There is nothing to be done to a device that is gone.
pub(crate) fn unless_gone(outcome: Result<(), ControlError>) -> Result<(), ControlError> {
    match outcome {
        Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
        outcome => outcome,
    }
}

/// Deletes a stopped device. While somebody has it open the deletion is under way when this returns.
fn delete_patiently(control: &mut Control, id: u32) -> Result<(), ControlError> {
    match control.delete(id) {
        Err(error) if goes_on(&error) => {
            tracing::warn!(id, %error, "the deletion is under way; somebody may still have the device open");
            Ok(())
        }
        result => result,
    }
}

/// Whether only the wait for a deletion ended, with our patience or by an interruption (a freezer, SIGSTOP).
/// It is not asked for again: the number may be another device's by then.
fn goes_on(error: &ControlError) -> bool {
    matches!(error, ControlError::TimedOut { .. }) || error.errno() == Some(libc::EINTR)
}

/// The node through which the device is used.
pub(crate) fn block_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

/// The node through which the device is served.
fn char_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkc{id}"))
}

/// Tries until the node is there, and readable for us.
fn wait_for_node<T>(
    path: PathBuf,
    mut attempt: impl FnMut(&Path) -> io::Result<T>,
) -> Result<T, DeviceError> {
    let may_come = |outcome: &io::Result<T>| {
        let kind = outcome.as_ref().err().map(io::Error::kind);
        matches!(kind, Some(io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied))
    };
    wait::patiently(NODE_WAIT, NODE_PAUSE, may_come, || attempt(&path)).map_err(|source| {
        let is_missing = source.kind() == io::ErrorKind::NotFound;
        let hint = if is_missing { "; is a devtmpfs mounted on /dev, or does udev run?" } else { "" };
        DeviceError::Node { path, source, hint }
    })
}

/// The largest request in bytes of a device with queues of this depth: a power of two, of a page at least.
fn largest_request(zero_copy: bool, depth: u16) -> u32 {
    let most = if zero_copy { MAX_ZERO_COPY_BYTES } else { MAX_IO_BYTES };
    most.min(1 << (MAX_QUEUE_BYTES / u32::from(depth.max(1))).ilog2())
}

/// The features to ask a driver for that offers `offered`.
fn flags(request: &Request, offered: u64) -> u64 {
    let recovery = if request.recovery { RECOVERY } else { 0 };
    // Left to itself such a driver scans when the start is over, at a moment that nothing tells, and would
    // hold the lock that a successor needs should the server die meanwhile.
    let part_scan = if request.part_scan { offered & NO_PART_SCAN } else { NO_PART_SCAN };
    u64::from(sys::UBLK_F_CMD_IOCTL_ENCODE) | recovery | part_scan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Command;

    /// The wait for the end of a deletion was interrupted (the server was frozen, or stopped and continued):
    /// the server said that the driver had refused it, `del` failed, and `list` showed a device that was
    /// gone.
    #[test]
    fn a_deletion_goes_on_when_the_wait_for_it_is_interrupted() {
        let command = Command::Delete;
        assert!(goes_on(&ControlError::Refused { command, errno: libc::EINTR }));
        assert!(goes_on(&ControlError::TimedOut { command, limit: WRITE_BACK }));
        assert!(!goes_on(&ControlError::Refused { command, errno: libc::EPERM }));
        assert!(!goes_on(&ControlError::GivenUp { command }));
    }

    /// Whoever had stopped the device had deleted it as well, and its server took that for a failure of its
    /// own.
    #[test]
    fn a_device_that_is_gone_needs_nothing_more() {
        let refused = |command, errno| Err(ControlError::Refused { command, errno });
        assert!(unless_gone(Ok(())).is_ok());
        for command in [Command::Stop, Command::Delete] {
            assert!(unless_gone(refused(command, libc::ENODEV)).is_ok());
            assert!(unless_gone(refused(command, libc::EBUSY)).is_err());
        }
    }

    /// With -d 4096 the buffers of one queue could come to 4 GiB, all of it locked in memory.
    #[test]
    fn deep_queues_have_smaller_requests() {
        assert_eq!(largest_request(false, 128), MAX_IO_BYTES);
        assert_eq!(largest_request(true, 256), MAX_ZERO_COPY_BYTES);
        assert_eq!(largest_request(false, MAX_DEPTH), 64 << 10);
        for depth in 1..=MAX_DEPTH {
            for zero_copy in [false, true] {
                let largest = largest_request(zero_copy, depth);
                assert!(largest.is_power_of_two() && largest >= 4096);
                assert!(u64::from(largest) * u64::from(depth) <= u64::from(MAX_QUEUE_BYTES), "{depth}");
            }
        }
    }
}
