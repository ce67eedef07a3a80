//! Attempts to have a device served that came to nothing, one after the other.
//!
//! What is in the way may pass: an image's file system that is gone for a minute, a host without memory. So
//! nobody gives up; but after some quick attempts they come at a pace that costs nothing.

use crate::wait;
use std::{io, time::Duration};

/// The pause after the first setback; each later one is twice as long, until it is [`SLOW_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest one.
const SLOW_PAUSE: Duration = Duration::from_secs(15);
/// Setbacks in a row with a shorter pause: 12.8 s after the last of them, 25.5 s in all.
const QUICK: u32 = 8;
/// How often to look, during a pause, whether there is any need of another attempt.
const LOOK: Duration = Duration::from_millis(100);

/// How many there were in a row.
#[derive(Default)]
pub(super) struct Setbacks {
    count: u32,
    /// What was said of the last one.
    told: String,
}

impl Setbacks {
    /// Counts one more, and says why, if that was not said of the one before.
    pub(super) fn note(&mut self, id: u32, reason: String) {
        if reason != self.told {
            tracing::error!(id, "{reason}");
            self.told = reason;
        }
        self.count += 1;
        if self.count == QUICK + 1 {
            let seconds = SLOW_PAUSE.as_secs();
            tracing::error!(
                id,
                "from now on another server is tried every {seconds} s; `ublk-qcow2 recover -n {id}` tries at once, \
                 `ublk-qcow2 del -n {id}` removes the device"
            );
        }
    }

    /// Waits before the next attempt. Whether there is to be one.
    pub(super) fn sit_out(&self, is_over: impl Fn() -> bool) -> bool {
        !wait::patiently(self.pause(), LOOK, |is_over| !is_over, is_over)
    }

    fn pause(&self) -> Duration {
        match self.count {
            0 => Duration::ZERO,
            count @ ..=QUICK => FIRST_PAUSE * (1 << (count - 1)),
            _ => SLOW_PAUSE,
        }
    }
}

/// Starts a server, though there may be no process or no memory for it at the moment. None when there is no
/// need of it any more.
pub(super) fn start_patiently<T>(
    id: u32,
    setbacks: &mut Setbacks,
    is_over: impl Fn() -> bool,
    mut start: impl FnMut() -> io::Result<T>,
) -> Option<T> {
    loop {
        if !setbacks.sit_out(&is_over) {
            return None;
        }
        match start() {
            Ok(started) => return Some(started),
            Err(error) => setbacks.note(id, format!("cannot start a server: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;

    /// There was no process left for a moment, or no memory for one: the supervisor gave up, and the device's
    /// users waited until somebody came.
    #[test]
    fn a_server_that_cannot_be_started_is_tried_again() {
        let failing = |times: u32| {
            let mut made = 0;
            move || {
                made += 1;
                if made <= times { Err(io::Error::from(Errno::EAGAIN)) } else { Ok(made) }
            }
        };
        let mut setbacks = Setbacks::default();
        assert_eq!(start_patiently(7, &mut setbacks, || false, failing(2)), Some(3));
        assert_eq!(setbacks.count, 2, "one that dies early then is the third");
        assert_eq!(start_patiently(7, &mut setbacks, || true, failing(0)), None, "nobody needs it any more");
    }

    /// After half a minute the supervisor gave up for good, though what was in the way may pass.
    #[test]
    fn attempts_become_rare_and_do_not_end() {
        let pauses = [0, 1, 2, QUICK, QUICK + 1, u32::MAX].map(|count| {
            let setbacks = Setbacks { count, told: String::new() };
            setbacks.pause().as_millis()
        });
        assert_eq!(pauses, [0, 100, 200, 12_800, 15_000, 15_000]);
    }
}
