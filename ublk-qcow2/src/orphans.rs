//! Devices that were made and have no record: their servers were killed in between.
//!
//! The driver tells what devices there are and with what cookies, see [`Making`] for what these say. An orphan was
//! never started, so nobody can have used it.

use crate::{
    control::{Control, ControlError},
    device,
    runfile::{self, Making, RunFileError},
};
use std::time::Duration;

/// How long others may be making devices before who knows of an orphan leaves it to those that come later.
const MAKERS_WAIT: Duration = Duration::from_secs(10);

/// Why orphans are left.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OrphanError {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    RunFile(#[from] RunFileError),
    #[error("other devices are being made: `ublk-qcow2 del --all` removes it later")]
    Busy,
}

/// Removes the device that was to have this cookie, if it was made and has no record.
pub(crate) fn remove_made(cookie: u64) -> Result<(), OrphanError> {
    let is_it = |_, found| found == cookie && runfile::load_made(cookie).is_none();
    let mut control = Control::open()?;
    if orphans(&mut control, is_it).is_empty() {
        return Ok(());
    }
    let _alone = Making::keep_out(MAKERS_WAIT)?.ok_or(OrphanError::Busy)?;
    delete_all(&mut control, is_it)
}

/// Removes all orphans of this run directory, unless somebody is making a device: then it is left to whoever
/// comes later.
pub(crate) fn remove_all() -> Result<(), OrphanError> {
    // Without a device there need not be a driver.
    if device::numbers().is_empty() {
        return Ok(());
    }
    let mut control = Control::open()?;
    if orphans(&mut control, runfile::lacks_record).is_empty() {
        return Ok(());
    }
    match Making::keep_out(Duration::ZERO)? {
        Some(_alone) => delete_all(&mut control, runfile::lacks_record),
        None => Ok(()),
    }
}

/// For who has made sure that nobody is making one.
fn delete_all(control: &mut Control, lacks_record: impl Fn(u32, u64) -> bool) -> Result<(), OrphanError> {
    for id in orphans(control, lacks_record) {
        tracing::warn!(id, "a server was killed as soon as it had made this device, which is removed");
        device::delete_orphan(control, id)?;
    }
    Ok(())
}

fn orphans(control: &mut Control, lacks_record: impl Fn(u32, u64) -> bool) -> Vec<u32> {
    let mut is_orphan = |id: u32| {
        let Ok(info) = control.info(id) else { return false };
        device::is_stopped(&info) && lacks_record(id, info.ublksrv_flags)
    };
    device::numbers().into_iter().filter(|&id| is_orphan(id)).collect()
}
