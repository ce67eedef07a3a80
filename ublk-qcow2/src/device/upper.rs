//! Waiting for the devices of ours that are built on a device which is to go.
//!
//! A host that is shut down ends all servers at once. What the upper ones have in memory, and what their close still
//! writes to the image, goes to the lower ones, which are to be there until then. So a server that is asked to end waits
//! for those on its device that have been asked, too, which their records say. One that nobody asks it does not wait for:
//! its device is taken from under it.

use super::{DeviceError, nodes::block_path, stack::Machine};
use crate::runfile::{self, Entry, Record};
use std::{
    thread,
    time::{Duration, Instant},
};

/// How long an upper server may take to hear that it is to end.
const HEARD: Duration = Duration::from_secs(5);
/// How long it may then take to write back and close.
const ENDED: Duration = Duration::from_secs(300);
/// Between two looks at its record.
const LOOK: Duration = Duration::from_millis(20);

/// How far an upper server has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Serving,
    Ending,
    /// Or dead: whoever comes in its place has not been asked.
    Gone,
}

impl State {
    /// Of the server of the device with this number and cookie.
    fn of(id: u32, cookie: u64) -> Self {
        match runfile::load(id) {
            Ok(Some(Entry { is_alive: true, record })) if record.cookie == cookie => match record.is_ending {
                true => Self::Ending,
                false => Self::Serving,
            },
            // One that cannot be read says nothing.
            Err(_) => Self::Serving,
            Ok(_) => Self::Gone,
        }
    }
}

/// Waits until those on device `id` have ended that are about to. It stays if one of them does.
pub(crate) fn await_upper(id: u32) -> Result<(), DeviceError> {
    let machine = Machine::look(|entry| entry.is_alive);
    let begun = Instant::now();
    for upper in machine.servers_on(id) {
        let Ok(Some(Entry { record: Record { cookie, .. }, .. })) = runfile::load(upper) else { continue };
        let state = || (State::of(upper, cookie), begun.elapsed());
        if !goes(state, || thread::sleep(LOOK)) {
            return Err(DeviceError::Upper { path: block_path(id), upper });
        }
    }
    Ok(())
}

/// Waits until an upper server has gone, or it is clear that it does not go by itself; whether it keeps the lower one no
/// longer.
fn goes(mut state: impl FnMut() -> (State, Duration), mut pause: impl FnMut()) -> bool {
    let mut was_ending = false;
    loop {
        match state() {
            (State::Gone, _) => return true,
            // It could not be written back, and goes on.
            (State::Serving, _) if was_ending => return false,
            (State::Serving, waited) if waited >= HEARD => return true,
            (State::Ending, waited) if waited >= ENDED => return false,
            (state, _) => was_ending = state == State::Ending,
        }
        pause();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone;
    use nix::fcntl::{Flock, FlockArg};
    use std::fs::{self, File};

    /// All servers were ended at once: the lower one went while the upper one still wrote back, and what that had in
    /// memory was lost.
    #[test]
    fn an_upper_server_that_ends_is_waited_for() {
        let (soon, late) = (Duration::ZERO, HEARD);
        let told = |states: &[(State, Duration)]| {
            let mut states = states.iter().copied();
            (goes(|| states.next().expect("it waits on"), || ()), states.len())
        };
        assert_eq!(told(&[(State::Gone, soon)]), (true, 0));
        let ends =
            [(State::Serving, soon), (State::Ending, late), (State::Ending, late), (State::Gone, late)];
        assert_eq!(told(&ends), (true, 0));
        assert_eq!(told(&[(State::Serving, soon), (State::Serving, late)]), (true, 0), "nobody asks it");
        assert_eq!(told(&[(State::Ending, soon), (State::Serving, soon)]), (false, 0), "it goes on");
        assert_eq!(told(&[(State::Ending, soon), (State::Ending, ENDED)]), (false, 0), "it hangs");
    }

    #[test]
    fn a_record_says_whether_its_server_ends() {
        let test = "device::upper::tests::a_record_says_whether_its_server_ends";
        alone::in_a_directory(test, |_| {
            let mut record = runfile::example();
            let (id, cookie) = (record.id, record.cookie);
            assert_eq!(State::of(id, cookie), State::Gone);
            let write = |record: &Record| {
                let path = runfile::path_of(id);
                fs::write(&path, serde_json::to_string(record).unwrap()).unwrap();
                Flock::lock(File::open(path).unwrap(), FlockArg::LockExclusiveNonblock).unwrap()
            };
            let held = write(&record);
            assert_eq!(State::of(id, cookie), State::Serving);
            assert_eq!(State::of(id, cookie - 1), State::Gone, "it is another's");
            drop(held);
            assert_eq!(State::of(id, cookie), State::Gone, "it is dead");
            record.is_ending = true;
            let _held = write(&record);
            assert_eq!(State::of(id, cookie), State::Ending);
        });
    }
}
