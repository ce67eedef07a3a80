//! Work in a process of its own: it may panic, die, or never end, and is told of all the same.
//!
//! The process is a fork, so what was prepared before is there. It has one way to speak, a pipe; what
//! it says last is why it has failed. The kernel ends it when its time is up.

#![allow(unsafe_code, reason = "a fork")]

use super::{
    case::{Case, Totals},
    run::simulate,
    workload::Fixture,
};
use nix::{
    sys::wait::{WaitStatus, waitpid},
    unistd::{self, ForkResult, alarm},
};
use std::{
    cell::Cell,
    fs::File,
    io::{self, Read, Write},
    panic, process,
    sync::Arc,
    time::Duration,
};

/// How such a process has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It had nothing to say.
    Well,
    /// What it said, or how it died.
    Said(String),
    /// Its time was up.
    Overran,
}

/// The process's end of the pipe.
#[derive(Debug)]
pub struct Wire(File);

thread_local! {
    static CASE: Cell<Option<u64>> = const { Cell::new(None) };
}

/// What this thread is at from now on, in case that it panics.
pub(super) fn begin_case(number: u64) {
    CASE.set(Some(number));
}

impl Wire {
    /// Says something, once.
    pub fn say(&self, text: &str) {
        // Nobody listens any more: then nobody needs to know.
        let _ = (&self.0).write_all(text.as_bytes());
    }

    /// Says what is wrong with a case of a campaign, which [`numbered`] understands.
    pub fn say_of(&self, number: u64, text: &str) {
        self.say(&format!("{number} {text}"));
    }
}

/// The number of a case, and what is wrong with it.
#[must_use]
pub fn numbered(said: &str) -> Option<(u64, &str)> {
    let (number, message) = said.split_once(' ')?;
    Some((number.parse().ok()?, message))
}

/// Carries `work` out in a process of its own, which must be the only one of its threads' making: call it
/// while there is one thread. The process has so much time, counted in whole seconds.
///
/// # Errors
/// There can be no pipe or no process.
pub fn apart(limit: Duration, work: impl FnOnce(&Arc<Wire>)) -> io::Result<Ended> {
    let (said, wire) = unistd::pipe()?;
    // SAFETY: this process has one thread, so that no lock is held in the child by one that is not there.
    let child = match unsafe { unistd::fork() }? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            drop(said);
            alarm::set(limit.as_secs().clamp(1, u64::from(u32::MAX)) as u32);
            let wire = Arc::new(Wire(File::from(wire)));
            let last_words = Arc::clone(&wire);
            panic::set_hook(Box::new(move |info| {
                let what = format!("it panics: {info}").replace('\n', " ");
                match CASE.get() {
                    Some(number) => last_words.say_of(number, &what),
                    None => last_words.say(&what),
                }
                process::exit(1);
            }));
            work(&wire);
            process::exit(0);
        }
    };
    drop(wire);
    let mut text = String::new();
    File::from(said).read_to_string(&mut text)?;
    Ok(match waitpid(child, None)? {
        WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGALRM, _) => Ended::Overran,
        WaitStatus::Signaled(_, signal, _) => Ended::Said(format!("it died of {signal}: {text}")),
        _ if text.is_empty() => Ended::Well,
        _ => Ended::Said(text),
    })
}

/// Simulates a case in a process of its own.
///
/// # Errors
/// There can be no process.
pub(super) fn simulate_apart(fixture: &Fixture, case: &Case, limit: Duration) -> io::Result<Ended> {
    apart(limit, |wire| {
        if let Err(message) = simulate(fixture, case, &mut Totals::default()) {
            wire.say(&message);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_becomes_of_it_is_told() {
        let limit = Duration::from_secs(60);
        assert_eq!(apart(limit, |_| ()).unwrap(), Ended::Well);
        assert_eq!(apart(limit, |wire| wire.say("7 no")).unwrap(), Ended::Said("7 no".into()));
        assert_eq!(numbered("7 no"), Some((7, "no")));
        let Ended::Said(text) = apart(limit, |_| panic!("on purpose")).unwrap() else { panic!() };
        assert!(text.contains("it panics") && text.contains("on purpose"), "{text}");
        let spins = apart(Duration::from_secs(1), |_| {
            loop {
                std::hint::spin_loop();
            }
        });
        assert_eq!(spins.unwrap(), Ended::Overran);
    }
}
