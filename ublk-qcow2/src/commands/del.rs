//! `del`: detach devices.
//!
//! A device whose server lives is detached by that server: it is asked to stop, and this command
//! waits until the image is closed and the device is gone. A device whose server has died is stopped
//! and deleted from here, and what that server had acknowledged is written to the image. Nothing else's devices
//! are touched, unless named by `-n`. A device that is mounted, or claimed in another way, is not
//! taken from under its user.

use super::CommandError;
use crate::{
    cli::DelArgs,
    control::Control,
    daemon, device,
    runfile::{self, Entry, Record},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt,
    time::{Duration, Instant},
};

/// How long a server may take to write back and close.
const STOP_WAIT: Duration = Duration::from_secs(600);
/// How often to look whether it has.
const LOOK: Duration = Duration::from_millis(10);
/// How long a device may be claimed by somebody who only has a look at it, as udev does.
const CLAIM_WAIT: Duration = Duration::from_secs(2);

/// Detaches the devices asked for.
pub(crate) fn run(args: &DelArgs) -> Result<(), CommandError> {
    match args.which.id {
        Some(id) => detach(id),
        None => detach_all(),
    }
}

/// Goes on after a failure; returns it if it is the only one.
fn detach_all() -> Result<(), CommandError> {
    let mut failures = Vec::new();
    for entry in runfile::load_all()? {
        if let Err(error) = detach(entry.record.id) {
            failures.push(error);
        }
    }
    if failures.len() <= 1 {
        return failures.pop().map_or(Ok(()), Err);
    }
    for failure in &failures {
        eprintln!("ublk-qcow2: {failure}");
    }
    Err(CommandError::Several(failures.len()))
}

fn detach(id: u32) -> Result<(), CommandError> {
    match runfile::load(id)? {
        Some(Entry { record, is_alive: true }) => stop_server(&record),
        Some(Entry { record, is_alive: false }) => clean_up(&record),
        None => delete_foreign(id),
    }
}

fn stop_server(record: &Record) -> Result<(), CommandError> {
    let &Record { id, pid, .. } = record;
    check_unclaimed(id, pid)?;
    // The lock says that the server lives, so the process id is still its own.
    kill(Pid::from_raw(pid), Signal::SIGTERM).map_err(|errno| CommandError::Signal {
        id,
        pid,
        source: errno.into(),
    })?;
    let deadline = Instant::now() + STOP_WAIT;
    while Instant::now() < deadline {
        match runfile::load(id)? {
            None => return Ok(()),
            // Another server has the number already.
            Some(entry) if entry.record.pid != pid => return Ok(()),
            Some(entry) if !entry.is_alive => return clean_up(&entry.record),
            Some(_) => std::thread::sleep(LOOK),
        }
    }
    Err(CommandError::StillRunning { id, pid, seconds: STOP_WAIT.as_secs() })
}

/// Makes sure that nobody has mounted the device or claimed it otherwise.
fn check_unclaimed(id: u32, pid: i32) -> Result<(), CommandError> {
    let deadline = Instant::now() + CLAIM_WAIT;
    loop {
        // For a block device O_EXCL means: fail if it is claimed.
        let claim = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device::block_path(id));
        match claim {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            _ => return Ok(()),
        }
        if Instant::now() >= deadline {
            return Err(CommandError::Claimed { id, pid });
        }
        std::thread::sleep(LOOK);
    }
}

/// Removes what a server has left behind that died, or failed on its way out.
fn clean_up(record: &Record) -> Result<(), CommandError> {
    device::delete_orphan(&mut Control::open()?, record.id)?;
    if record.config.recovery && record.boot == runfile::boot()? {
        daemon::settle(record)?;
    }
    runfile::remove_stale(record.id);
    match &record.error {
        Some(error) => Err(CommandError::Unclean { id: record.id, error: error.clone() }),
        None => Ok(()),
    }
}

fn delete_foreign(id: u32) -> Result<(), CommandError> {
    let mut control = Control::open()?;
    match control.info(id) {
        Err(error) if error.errno() == Some(libc::ENODEV) => return Err(CommandError::NoDevice(id)),
        info => info.map(drop)?,
    }
    Ok(device::delete_orphan(&mut control, id)?)
}
