//! Commands to the ublk driver through /dev/ublk-control, each bounded in time.
//!
//! The driver takes its control commands as 128-byte io_uring submissions. A command that does not
//! end in its time is cancelled; should it not even heed that, the memory it was given is leaked,
//! because the kernel may still write to it. This module knows the commands, what their errors
//! mean and how to help; the order in which a device is made and unmade is [`crate::device`]'s.

#![allow(unsafe_code, reason = "commands that name memory")]

use crate::uapi;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::unistd::geteuid;
use std::{
    fmt,
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};
use zerocopy::{FromBytes, IntoBytes};

/// Where the driver takes commands.
const CONTROL_PATH: &str = "/dev/ublk-control";
/// Where the kernel tells that there is such a device, whatever is in /dev.
const CONTROL_IN_SYSFS: &str = "/sys/class/misc/ublk-control";
/// How long a command may take that only changes the driver's own state.
const QUICK: Duration = Duration::from_secs(10);
/// START_DEV: the kernel (before Linux 6.19) reads the partition table through us before it returns.
const START: Duration = Duration::from_secs(120);
/// STOP_DEV: the kernel waits for requests in flight and writes dirty pages back through us.
const STOP: Duration = Duration::from_secs(300);
/// START_USER_RECOVERY: the kernel waits for the old server's requests under the lock that the command takes.
/// Linux before 6.15 notices only after the requests' time-out of 30 s that a queue's server has died which
/// had all of its requests.
const START_RECOVERY: Duration = Duration::from_secs(90);
/// DEL_DEV: the kernel waits until nobody has the device open.
const DELETE: Duration = Duration::from_secs(10);
/// How long a cancelled command may take to end.
const CANCEL: Duration = Duration::from_secs(5);
/// How often a wait looks whether it should be given up.
const SLICE: Duration = Duration::from_millis(100);

/// `user_data` of a cancellation; commands count up from 0.
const CANCEL_ID: u64 = u64::MAX;
/// "No particular queue", "any device id".
const NO_QUEUE: u16 = u16::MAX;
/// The id that lets the driver choose one.
pub(crate) const ANY_ID: u32 = u32::MAX;

/// A command of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    GetFeatures,
    GetInfo,
    Add,
    SetParams,
    GetParams,
    Start,
    Stop,
    Delete,
    StartRecovery,
    EndRecovery,
}

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("cannot open {CONTROL_PATH}: {}{}", .0, open_hint(.0))]
    Open(io::Error),
    #[error("cannot make the control ring: {0}")]
    Ring(io::Error),
    #[error("the driver refused {command}: {}{}", io::Error::from_raw_os_error(*.errno), refusal_hint(*.command, *.errno))]
    Refused { command: Command, errno: i32 },
    #[error("{command} did not end within {} s; see the kernel log (dmesg)", .limit.as_secs())]
    TimedOut { command: Command, limit: Duration },
    #[error("{command} was given up")]
    GivenUp { command: Command },
}

impl ControlError {
    /// The errno with which the driver refused, if it did.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// The control device and a ring for its commands.
pub(crate) struct Control {
    // Declared, and so dropped, before the file that its operations name.
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    file: File,
    next_id: u64,
}

impl Control {
    /// Opens the control device.
    pub(crate) fn open() -> Result<Self, ControlError> {
        let file = open_device()?;
        let ring = IoUring::builder().build(4).map_err(ControlError::Ring)?;
        Ok(Self { ring, file, next_id: 0 })
    }

    /// Whether there is a driver, and we may use it: for those who have more to say if not, or to undo.
    pub(crate) fn probe() -> Result<(), ControlError> {
        open_device().map(drop)
    }

    /// The driver's feature bits, `UBLK_F_*` (Linux 6.5).
    pub(crate) fn features(&mut self) -> Result<u64, ControlError> {
        self.transfer(Command::GetFeatures, 0, 0_u64, QUICK)
    }

    /// A device's state.
    pub(crate) fn info(&mut self, id: u32) -> Result<uapi::DevInfo, ControlError> {
        self.transfer(Command::GetInfo, id, uapi::DevInfo::default(), QUICK)
    }

    /// Adds a device. Returns what the driver made of `wanted`: it may have changed it.
    pub(crate) fn add(&mut self, wanted: uapi::DevInfo) -> Result<uapi::DevInfo, ControlError> {
        self.transfer(Command::Add, wanted.dev_id, wanted, QUICK)
    }

    /// Sets a device's parameters, before it is started.
    pub(crate) fn set_params(&mut self, id: u32, params: uapi::Params) -> Result<(), ControlError> {
        self.transfer(Command::SetParams, id, params, QUICK).map(drop)
    }

    /// A device's parameters, of the kinds in `types` (`UBLK_PARAM_TYPE_*`).
    pub(crate) fn params(&mut self, id: u32, types: u32) -> Result<uapi::Params, ControlError> {
        let len = size_of::<uapi::Params>() as u32;
        self.transfer(Command::GetParams, id, uapi::Params { len, types, ..Default::default() }, QUICK)
    }

    /// Starts a device for the server process `pid`. All its queues must be fetching, on other
    /// threads than this, since the kernel may read from the device before this returns. `pid` must be
    /// who has opened the character device (Linux 6.17). Given up as soon as `give_up` says so.
    pub(crate) fn start(
        &mut self,
        id: u32,
        pid: u32,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Result<(), ControlError> {
        self.run(Command::Start, id, (), u64::from(pid), START, give_up).map(drop)
    }

    /// Announces a new server for a device whose old one has died. Refused with EBUSY until the kernel
    /// has ended the old one's I/O and put its requests aside.
    pub(crate) fn start_recovery(&mut self, id: u32) -> Result<(), ControlError> {
        self.transfer(Command::StartRecovery, id, (), START_RECOVERY)
    }

    /// Hands the device over to the server process `pid`, whose queues must all be fetching. Given up
    /// as soon as `give_up` says so.
    pub(crate) fn end_recovery(
        &mut self,
        id: u32,
        pid: u32,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Result<(), ControlError> {
        self.run(Command::EndRecovery, id, (), u64::from(pid), START, give_up).map(drop)
    }

    /// Stops a device: requests in flight finish, later ones fail, the queues' fetches are aborted.
    pub(crate) fn stop(&mut self, id: u32) -> Result<(), ControlError> {
        self.transfer(Command::Stop, id, (), STOP)
    }

    /// Deletes a stopped device.
    pub(crate) fn delete(&mut self, id: u32) -> Result<(), ControlError> {
        self.transfer(Command::Delete, id, (), DELETE)
    }

    fn transfer<T: FromBytes>(
        &mut self,
        command: Command,
        id: u32,
        payload: T,
        limit: Duration,
    ) -> Result<T, ControlError> {
        self.run(command, id, payload, 0, limit, &mut || false)
    }

    /// Runs a command to its end, or cancels it. Returns the payload as the kernel left it.
    fn run<T: FromBytes>(
        &mut self,
        command: Command,
        device: u32,
        payload: T,
        data: u64,
        limit: Duration,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Result<T, ControlError> {
        let payload = Box::into_raw(Box::new(payload));
        let header = uapi::CtrlCmd {
            dev_id: device,
            queue_id: NO_QUEUE,
            len: size_of::<T>() as u16,
            addr: if size_of::<T>() == 0 { 0 } else { payload as u64 },
            data,
            ..Default::default()
        };
        let id = self.next_id;
        self.next_id += 1;
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), command.code())
            .cmd(command_bytes(&header))
            .build()
            .user_data(id);
        let ended = match self.push(&entry).and_then(|()| self.wait(id, command, limit, give_up)) {
            Ok(ended) => ended,
            // The payload stays allocated: the kernel may still use it.
            Err(Unended { error }) => return Err(error),
        };
        // SAFETY: it came from `Box::into_raw` above, and the command that could change it has ended.
        let payload = unsafe { *Box::from_raw(payload) };
        match ended {
            Ended::Done => Ok(payload),
            Ended::Refused(errno) => Err(ControlError::Refused { command, errno }),
            Ended::Cancelled(error) => Err(error),
        }
    }

    /// Waits for a command; cancels it when its time is over or `give_up` says so.
    fn wait(
        &mut self,
        id: u64,
        command: Command,
        limit: Duration,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Result<Ended, Unended> {
        let deadline = Instant::now() + limit;
        let why = loop {
            match self.wait_slice(id)? {
                Some(result) if result < 0 => return Ok(Ended::Refused(-result)),
                Some(_) => return Ok(Ended::Done),
                None if give_up() => break ControlError::GivenUp { command },
                None if Instant::now() >= deadline => break ControlError::TimedOut { command, limit },
                None => {}
            }
        };
        let cancel = opcode::AsyncCancel::new(id).build().user_data(CANCEL_ID);
        self.push(&cancel.into())?;
        let deadline = Instant::now() + CANCEL;
        while Instant::now() < deadline {
            if let Some(result) = self.wait_slice(id)? {
                return Ok(end_of_cancelled(command, result, why));
            }
        }
        Err(Unended { error: why })
    }

    /// Submits, and waits a moment for the command's result.
    fn wait_slice(&mut self, id: u64) -> Result<Option<i32>, Unended> {
        let time = types::Timespec::from(SLICE);
        match self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&time)) {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR) => {}
                // The kernel had no memory to take the command with, and has not waited.
                Some(libc::EAGAIN) => thread::sleep(SLICE),
                _ => return Err(Unended { error: ControlError::Ring(error) }),
            },
        }
        Ok(self.ring.completion().find(|entry| entry.user_data() == id).map(|entry| entry.result()))
    }

    fn push(&mut self, entry: &squeue::Entry128) -> Result<(), Unended> {
        // SAFETY: the memory that the entry names, `run`'s payload, is not freed before its end.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.map_err(|error| Unended { error: ControlError::Ring(io::Error::other(error)) })
    }
}

/// What a command has come to that ended after it was to be cancelled. One that makes a device has made it,
/// if it has: reported otherwise, it would be nobody's. The others are repeated or undone by whoever asked.
fn end_of_cancelled(command: Command, result: i32, why: ControlError) -> Ended {
    match command {
        Command::Add if result >= 0 => Ended::Done,
        _ => Ended::Cancelled(why),
    }
}

fn open_device() -> Result<File, ControlError> {
    OpenOptions::new().read(true).write(true).open(CONTROL_PATH).map_err(ControlError::Open)
}

/// How a command ended.
enum Ended {
    Done,
    Refused(i32),
    Cancelled(ControlError),
}

/// The command may still be running.
struct Unended {
    error: ControlError,
}

/// The submission's command area: the header, then zeros.
fn command_bytes(header: &uapi::CtrlCmd) -> [u8; 80] {
    let mut bytes = [0; 80];
    bytes[..size_of_val(header)].copy_from_slice(header.as_bytes());
    bytes
}

impl Command {
    /// The ioctl-encoded command number.
    fn code(self) -> u32 {
        match self {
            Self::GetFeatures => uapi::UBLK_U_CMD_GET_FEATURES,
            Self::GetInfo => uapi::UBLK_U_CMD_GET_DEV_INFO,
            Self::Add => uapi::UBLK_U_CMD_ADD_DEV,
            Self::SetParams => uapi::UBLK_U_CMD_SET_PARAMS,
            Self::GetParams => uapi::UBLK_U_CMD_GET_PARAMS,
            Self::Start => uapi::UBLK_U_CMD_START_DEV,
            Self::Stop => uapi::UBLK_U_CMD_STOP_DEV,
            Self::Delete => uapi::UBLK_U_CMD_DEL_DEV,
            Self::StartRecovery => uapi::UBLK_U_CMD_START_USER_RECOVERY,
            Self::EndRecovery => uapi::UBLK_U_CMD_END_USER_RECOVERY,
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GetFeatures => "GET_FEATURES",
            Self::GetInfo => "GET_DEV_INFO",
            Self::Add => "ADD_DEV",
            Self::SetParams => "SET_PARAMS",
            Self::GetParams => "GET_PARAMS",
            Self::Start => "START_DEV",
            Self::Stop => "STOP_DEV",
            Self::Delete => "DEL_DEV",
            Self::StartRecovery => "START_USER_RECOVERY",
            Self::EndRecovery => "END_USER_RECOVERY",
        })
    }
}

fn open_hint(error: &io::Error) -> &'static str {
    hint_of(error.kind(), Path::new(CONTROL_IN_SYSFS).exists(), geteuid().is_root())
}

fn hint_of(kind: io::ErrorKind, is_loaded: bool, is_root: bool) -> &'static str {
    match (kind, is_loaded, is_root) {
        (io::ErrorKind::NotFound, false, _) => {
            "; the ublk driver is not loaded: run `modprobe ublk_drv` (Linux 6.4 or newer with CONFIG_BLK_DEV_UBLK)"
        }
        (io::ErrorKind::NotFound, true, _) => {
            "; the ublk driver is loaded, but its nodes are not in this /dev: a container needs the host's, such as with \
             `-v /dev:/dev --privileged`"
        }
        (io::ErrorKind::PermissionDenied, _, false) => "; run as root",
        (io::ErrorKind::PermissionDenied, _, true) => {
            "; root must not here: does a container's device policy forbid it?"
        }
        _ => "",
    }
}

fn refusal_hint(command: Command, errno: i32) -> &'static str {
    match (command, errno) {
        // What Linux 6.3 to 6.14 say of too many.
        (Command::Add, libc::EACCES) => {
            "; the driver allows no more devices (parameter ublks_max of ublk_drv), or you are not root"
        }
        (_, libc::EPERM | libc::EACCES) => "; run as root (CAP_SYS_ADMIN is needed)",
        (Command::Add, libc::EEXIST) => {
            "; this device id is in use: see `ublk-qcow2 list`, delete it with `ublk-qcow2 del -n ID`, or leave -n out. An id \
             that is in no list may be that of a device that is being deleted, until nobody has it open any more"
        }
        (Command::Add, libc::ENOSPC | libc::EOVERFLOW) => {
            "; the driver allows no more devices: raise its parameter ublks_max"
        }
        (Command::Add, libc::EINVAL) => {
            "; the number of queues, the depth or the id is more than this driver allows"
        }
        // Linux 6.17 compares the server's number with that of who has opened the character device.
        (Command::Start | Command::EndRecovery, libc::EINVAL) => {
            "; does the server run in a PID namespace of its own, as in a container? It needs the host's, such as with \
             `--pid=host`"
        }
        (Command::Add, libc::ENOMEM) => "; ask for fewer queues or less depth",
        (Command::GetFeatures, libc::EOPNOTSUPP | libc::ENOTTY) => "; Linux 6.5 or newer is needed for that",
        (Command::StartRecovery, libc::EBUSY) => {
            "; the device has a server, or the kernel has not ended the old one's I/O"
        }
        (_, libc::EOPNOTSUPP | libc::ENOTTY) => {
            "; this kernel's ublk driver is too old (Linux 6.4 is needed)"
        }
        (_, libc::ENODEV) => "; there is no such device",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ADD_DEV took its time and made the device all the same: it was reported as timed out, and a device
    /// without a record was left.
    #[test]
    fn a_device_that_was_made_late_is_made() {
        let end = |command, result| end_of_cancelled(command, result, ControlError::GivenUp { command });
        assert!(matches!(end(Command::Add, 0), Ended::Done));
        assert!(matches!(end(Command::Add, -libc::ECANCELED), Ended::Cancelled(_)));
        assert!(matches!(end(Command::EndRecovery, 0), Ended::Cancelled(_)));
    }

    #[test]
    fn errors_name_the_command_the_cause_and_the_way_out() {
        let busy = ControlError::Refused { command: Command::Add, errno: libc::EEXIST }.to_string();
        assert!(
            busy.contains("ADD_DEV") && busy.contains("File exists") && busy.contains("del -n"),
            "{busy}"
        );
        // Root was told to run it as root, on kernels that refuse one device too many like this.
        let full = ControlError::Refused { command: Command::Add, errno: libc::EACCES }.to_string();
        assert!(full.contains("ublks_max") && full.contains("root"), "{full}");
        let denied = ControlError::Refused { command: Command::Stop, errno: libc::EACCES }.to_string();
        assert!(denied.contains("run as root"), "{denied}");
        let hint = |errno, is_loaded, is_root| {
            hint_of(io::Error::from_raw_os_error(errno).kind(), is_loaded, is_root)
        };
        assert!(hint(libc::ENOENT, false, true).contains("modprobe ublk_drv"));
        // In a container people were told to load a driver that was loaded, and root to be root.
        assert!(hint(libc::ENOENT, true, true).contains("/dev"));
        assert!(hint(libc::EACCES, true, false).contains("run as root"));
        assert!(hint(libc::EPERM, true, true).contains("container"));
        let start = ControlError::Refused { command: Command::Start, errno: libc::EINVAL }.to_string();
        assert!(start.contains("PID namespace"), "{start}");
    }
}
