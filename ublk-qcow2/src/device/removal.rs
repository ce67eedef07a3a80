//! Taking devices away, whoever has left them, and however far somebody else has come with it.

use crate::control::{Control, ControlError};

/// Stops and deletes what a dead server has left, unless the number belongs to another device by now.
pub(crate) fn delete_left(control: &mut Control, id: u32, cookie: u64) -> Result<(), ControlError> {
    match control.info(id) {
        Ok(info) if info.ublksrv_flags == cookie => delete_orphan(control, id),
        Err(error) if error.errno() != Some(libc::ENODEV) => Err(error),
        _ => Ok(()),
    }
}

/// Stops and deletes a device that has no server of ours any more. One that is gone is no error; one that
/// somebody still has open is gone for everybody else, as in [`super::Device::delete`].
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
pub(super) fn delete_patiently(control: &mut Control, id: u32) -> Result<(), ControlError> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Command;
    use std::time::Duration;

    /// The wait for the end of a deletion was interrupted (the server was frozen, or stopped and continued):
    /// the server said that the driver had refused it, `del` failed, and `list` showed a device that was
    /// gone.
    #[test]
    fn a_deletion_goes_on_when_the_wait_for_it_is_interrupted() {
        let command = Command::Delete;
        assert!(goes_on(&ControlError::Refused { command, errno: libc::EINTR }));
        assert!(goes_on(&ControlError::TimedOut { command, limit: Duration::from_secs(10) }));
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
}
