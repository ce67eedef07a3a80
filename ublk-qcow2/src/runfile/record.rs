//! What a run file says.

use crate::{config::Config, identity::KnownFile, processes::Process};
use serde::{Deserialize, Serialize};
use std::env;

/// How far a server has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    /// It has made the device, or taken it over, and the driver does not know its queues yet.
    Preparing,
    /// It is handing its queues to the driver.
    Fetching,
    /// The driver has all of them.
    Fetched,
    /// The device serves I/O.
    Serving,
    /// `del` is taking it away; its server is dead.
    Removing,
}

/// The contents of a run file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The device's number.
    pub(crate) id: u32,
    /// The server's process.
    pub(crate) pid: i32,
    /// The device's capacity in bytes.
    pub(crate) size: u64,
    /// Queues and depth as the driver gave them.
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    /// How far the server has come, or its dead predecessor had.
    pub(crate) phase: Phase,
    /// Whether the phase is the predecessor's: who has taken the file over has not come any further.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_inherited: bool,
    /// How the image is served.
    pub(crate) config: Config,
    /// What the driver knows the device by, so that it is not taken for another with its number.
    pub(crate) cookie: u64,
    /// Who has the image's file system mounted, or keeps it busy: the server, and its supervisor. Whoever has
    /// taken the file over is among them.
    #[serde(default)]
    pub(crate) processes: Vec<Process>,
    /// The image and the files below it, as the device was made with them.
    #[serde(default)]
    pub(crate) files: Vec<KnownFile>,
    /// The boot in which the device was made: it has not outlived it.
    pub(crate) boot: String,
    /// Which start of a systemd unit has made the device, if one has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) invocation: Option<String>,
    /// Why the server could not end cleanly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    /// Whether the server has been asked to end, and is about to.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_ending: bool,
    /// Why the server goes on though it was asked to end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) refusal: Option<Refusal>,
}

/// That a server goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    /// How often it has done so by now: whoever asks again tells the new answer from the one before.
    pub(crate) number: u32,
    pub(crate) reason: String,
}

impl Record {
    /// The server's process, if that is known well enough to be told from others with its number.
    pub(crate) fn server(&self) -> Option<Process> {
        self.processes.iter().copied().find(|process| process.pid == self.pid)
    }

    /// Whether this start of a unit has made the device. To whoever belongs to none all are the same.
    pub(crate) fn is_of(&self, invocation: Option<&str>) -> bool {
        invocation.is_none() || self.invocation.as_deref() == invocation
    }
}

/// Which start of a systemd unit this process belongs to: systemd tells all that it runs for it.
pub(crate) fn invocation() -> Option<String> {
    env::var("INVOCATION_ID").ok().filter(|id| !id.is_empty())
}

/// A run file as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) record: Record,
    /// Whether its server lives.
    pub(crate) is_alive: bool,
}

impl Entry {
    /// Whether there is somebody who has its image, or is to have it.
    pub(crate) fn needs_its_image(&self) -> bool {
        let is_of_this_boot = || super::boot().is_ok_and(|boot| self.record.boot == boot);
        self.is_alive || self.record.config.recovery && is_of_this_boot()
    }

    /// Whether it has a server, or a supervisor that will start one.
    pub(crate) fn is_looked_after(&self) -> bool {
        let Record { processes, error, .. } = &self.record;
        self.is_alive || error.is_none() && processes.iter().any(|process| process.lives())
    }

    /// Whether its server serves it.
    pub(crate) fn serves(&self) -> bool {
        self.is_alive && self.record.phase == Phase::Serving && !self.record.is_inherited
    }
}

/// A record for tests.
#[cfg(test)]
pub(crate) fn example() -> Record {
    Record {
        phase: Phase::Serving,
        is_inherited: false,
        id: 7,
        pid: 1,
        size: 1 << 40,
        queues: 2,
        depth: 64,
        config: crate::config::example(),
        cookie: u64::MAX,
        processes: vec![Process::this().unwrap()],
        files: Vec::new(),
        boot: super::boot().unwrap(),
        invocation: None,
        error: None,
        is_ending: false,
        refusal: None,
    }
}
