//! One module per subcommand.

pub(crate) mod add;
pub(crate) mod check;
pub(crate) mod create;
pub(crate) mod del;
pub(crate) mod features;
mod image;
pub(crate) mod info;
pub(crate) mod io;
pub(crate) mod list;
pub(crate) mod resize;

use crate::{
    control::ControlError,
    daemon::ServeError,
    device::{DeviceError, User},
    orphans::OrphanError,
    runfile::{self, InUse, RunFileError},
};
use std::{
    fmt::Display,
    io::{Write, stderr},
};

pub(crate) use image::printable;

/// Says on standard error what failed, on one line. If nobody takes it there, the exit code has to do.
pub(crate) fn complain(error: &dyn Display) {
    let _ = writeln!(stderr(), "ublk-qcow2: {}", printable(error.to_string().as_bytes()));
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error(transparent)]
    RunFile(#[from] RunFileError),
    #[error(transparent)]
    Orphan(#[from] OrphanError),
    #[error(transparent)]
    InUse(#[from] InUse),
    /// What the server in the background said when it failed.
    #[error("{0}")]
    Server(String),
    #[error("cannot go into the background: {0}")]
    Background(std::io::Error),
    #[error("{path}: {source}")]
    Path { path: String, source: std::io::Error },
    #[error("nobody was told of the device, {what}: {source}")]
    Unheard { what: &'static str, source: std::io::Error },
    #[error("{source}; `ublk-qcow2 del -n {id}` removes what is left of device {id}")]
    LeftBehind { id: u32, source: ServeError },
    #[error(
        "device {0} is not served yet: a server died when it had taken it over. There will be another one: `ublk-qcow2 list` says how \
         it goes, and the log {log} why it does not", log = runfile::log_path(*.0).display()
    )]
    NotYet(u32),
    #[error(
        "device {0} still waits: its new server died before it served; see the kernel log (dmesg). `ublk-qcow2 recover -n {0}` tries again"
    )]
    Waits(u32),
    #[error("there is no device {0}")]
    NoDevice(u32),
    #[error(
        "/dev/ublkb{id} is {by}; {before}{} first (or `ublk-qcow2 del --force -n {id}` to detach it all the same)", .by.way_out()
    )]
    Used { id: u32, by: User, before: &'static str },
    #[error("{source}; try again, or detach it all the same: `ublk-qcow2 del --force -n {id}`")]
    Unclear { id: u32, source: DeviceError },
    #[error(
        "device {id} stays as it is: {reason}; try again, or give that up: `ublk-qcow2 del --force -n {id}`"
    )]
    NotWritten { id: u32, reason: String },
    #[error("cannot signal the server of device {id} (process {pid}): {source}")]
    Signal { id: u32, pid: i32, source: std::io::Error },
    #[error(
        "the server of device {id} (process {pid}) has not ended within {seconds} s; it may still be writing back"
    )]
    StillRunning { id: u32, pid: i32, seconds: u64 },
    #[error(
        "device {id} is detached, but process {pid}, which served it or looked after its server, has not ended within {seconds} s: until then \
         it holds the image's file system"
    )]
    Lingering { id: u32, pid: i32, seconds: u64 },
    #[error("device {id} is detached, but process {pid}, which served it, cannot be waited for: {source}")]
    Wait { id: u32, pid: i32, source: std::io::Error },
    #[error("device {id} is detached, but its server did not end cleanly: {error}; check the image")]
    Unclean { id: u32, error: String },
    #[error("device {id} is detached, but what the kernel had in memory for it may be lost: {source}")]
    Unwritten { id: u32, source: DeviceError },
    #[error(
        "device {0} is detached, and what was written to it is in the image; but its server had died, and none had taken its place"
    )]
    Died(u32),
    #[error("{0} devices could not be detached")]
    Several(usize),
    #[error(transparent)]
    Engine(#[from] qcow2_engine::Error),
    #[error("cannot use io_uring: {0}")]
    Ring(std::io::Error),
    /// Arguments that make no sense together.
    #[error("{0}")]
    Usage(String),
    #[error("cannot print: {0}")]
    Print(#[from] std::io::Error),
}
