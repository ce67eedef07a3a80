//! The process that waits for the driver in a server's stead.
//!
//! Stopping a device, writing back what the kernel has in memory for it, and looking for partitions on it
//! wait for requests that the server has in hand. Who waits in the kernel lets go of nothing before that is
//! over, not even when it is killed; and the driver (Linux 6.15) fails a dead server's requests only when
//! nobody has the character device any more. So a server that waited itself, and was killed meanwhile, would
//! stay until the machine is restarted, and its device's users with it. A thread for it would not do: the
//! mapped descriptors keep the device, and threads share those. Hence another process:
//!
//! ```text
//! server ── fork, before it has opened anything ── deputy      waits in the driver
//!    └──────────── a socket: jobs, answers ──────────┘
//! ```
//!
//! Starting a device waits for requests too, where the kernel looks for partitions meanwhile (see
//! [`partitions`]); but there it is no use that somebody else waits. START_DEV has the driver's lock of the
//! device then, the reads of a server that dies are put aside for its successor, and who wants to succeed it,
//! or to stop the device, needs that lock first: whoever has begun the start waits until the machine is
//! restarted, and who comes after him too. It would only help devices that are not for recovery. So the
//! server starts its device itself, and tells nobody of it before it has.
//!
//! The deputy has nothing but the socket and the driver's control device. It ends when the server closes its
//! end of the socket or dies: if it waits then, as soon as the requests have been failed. Should the deputy
//! be killed, the server does without.

#![allow(unsafe_code, reason = "fork")]

use crate::{
    control::Control,
    detach,
    device::{self, DeviceError},
    partitions, safety,
    wait::{self, Bound},
};
use nix::{
    sys::signal::SigSet,
    unistd::{ForkResult, Pid, dup2_stderr, dup2_stdin, dup2_stdout, fork},
};
use std::{
    env, fmt,
    fs::OpenOptions,
    io::{self, Read, Write},
    net::Shutdown,
    os::{fd::AsFd, unix::net::UnixStream},
    process,
    time::Duration,
};

/// How long a job may take: the deputy bounds its own waits, by 300 s and what it takes to cancel them.
const ANSWER: Duration = Duration::from_secs(340);
/// How long the deputy may take to end when it has nothing to do.
const END: Duration = Duration::from_secs(2);
/// How often to look whether it has.
const LOOK: Duration = Duration::from_millis(1);
/// The longest answer in bytes.
const MAX_TEXT: usize = 1024;
/// First bytes of answers.
const DONE: u8 = b'+';
const FAILED: u8 = b'-';
const UNFINISHED: u8 = b'~';

/// What waits for requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// See [`partitions::scan`].
    Scan,
    /// See [`device::await_upper`].
    AwaitUpper,
    /// See [`device::check_unused`].
    CheckUnused,
    /// See [`device::write_back`].
    WriteBack,
    /// See [`device::sync_everything`].
    SyncEverything,
    /// See [`Control::stop`].
    Stop,
}

/// Why a job is not done, as far as is known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeputyError {
    /// What it said.
    #[error("{0}")]
    Failed(String),
    /// What it said; the job goes on, or could not be begun.
    #[error("{0}")]
    Unfinished(String),
    #[error("the process that waits for the driver did not answer within {} s", ANSWER.as_secs())]
    Silent,
    #[error("the process that waits for the driver is gone: {0}")]
    Gone(io::Error),
}

/// What a deputy says of a job that is not done.
#[derive(Debug)]
struct Undone {
    /// Whether only its time is up, or it could not be begun.
    is_unfinished: bool,
    text: String,
}

impl Undone {
    fn failed(error: impl fmt::Display) -> Self {
        Self { is_unfinished: false, text: error.to_string() }
    }
}

impl From<DeviceError> for Undone {
    fn from(error: DeviceError) -> Self {
        Self { is_unfinished: error.is_unfinished(), text: error.to_string() }
    }
}

/// A server's deputy; ended when dropped.
pub(crate) struct Deputy {
    process: Pid,
    socket: UnixStream,
}

impl Deputy {
    /// Forks one. This process has one thread, and no device, image or ring that the deputy would keep.
    pub(crate) fn fork() -> io::Result<Self> {
        Self::fork_for(|socket| {
            let mut control = Control::open();
            // Its ring has had nothing to do yet, so there are no threads of the kernel's that keep more.
            safety::keep_control();
            serve(socket, |job, id| match (job, &mut control) {
                (Job::Scan, _) => partitions::scan(device::block_path(id)).map_err(Undone::failed),
                (Job::AwaitUpper, _) => device::await_upper(id).map_err(Undone::from),
                // The server bounds these, should there be no thread.
                (Job::CheckUnused, _) => device::check_unused(id, Bound::Elsewhere).map_err(Undone::from),
                (Job::WriteBack, _) => device::write_back(id, Bound::Elsewhere).map_err(Undone::from),
                (Job::SyncEverything, _) => {
                    device::sync_everything(id, Bound::Elsewhere).map_err(Undone::from)
                }
                (Job::Stop, Ok(control)) => device::unless_gone(control.stop(id)).map_err(Undone::failed),
                (Job::Stop, Err(error)) => Err(Undone::failed(error)),
            });
        })
    }

    fn fork_for(work: impl FnOnce(UnixStream)) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        // SAFETY: the process has one thread only: see above.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self { process: child, socket: ours }),
            ForkResult::Child => {
                drop(ours);
                if let Err(error) = stand_alone(&theirs) {
                    // The server, and so whoever has started it, will hear that its deputy is gone.
                    tracing::error!("cannot wait for the driver: {error}");
                    process::exit(1);
                }
                work(theirs);
                process::exit(0)
            }
        }
    }

    /// Has a job done for device `id`.
    pub(crate) fn have(&mut self, job: Job, id: u32) -> Result<(), DeputyError> {
        let answer = self.socket.set_read_timeout(Some(ANSWER)).and_then(|()| {
            self.socket.write_all(&encode(job, id))?;
            receive(&mut self.socket)
        });
        match answer {
            Ok(Ok(())) => Ok(()),
            Ok(Err(Undone { is_unfinished: true, text })) => Err(DeputyError::Unfinished(text)),
            Ok(Err(Undone { is_unfinished: false, text })) => Err(DeputyError::Failed(text)),
            Err(error) => {
                // Whatever it says later is not the answer to the next job.
                let _ = self.socket.shutdown(Shutdown::Both);
                match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Err(DeputyError::Silent),
                    _ => Err(DeputyError::Gone(error)),
                }
            }
        }
    }
}

impl Drop for Deputy {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        // It sees our mounts. One that cannot end ends after us.
        wait::ends_within(self.process, END, LOOK);
    }
}

/// Lets go of what was inherited, and of the signals that end a server: who ends all processes of a service
/// means it to stop its device first.
fn stand_alone(socket: &UnixStream) -> io::Result<()> {
    SigSet::all().thread_block()?;
    env::set_current_dir("/")?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    drop(null);
    detach::let_go_of_inherited_but(socket.as_fd());
    // Locks on memory are not inherited.
    safety::prepare();
    Ok(())
}

/// Does jobs until the server ends.
fn serve(mut socket: UnixStream, mut work: impl FnMut(Job, u32) -> Result<(), Undone>) {
    let mut order = [0; 5];
    while socket.read_exact(&mut order).is_ok() {
        let Some((job, id)) = decode(order) else { return };
        if send(&mut socket, &work(job, id)).is_err() {
            return;
        }
    }
}

fn encode(job: Job, id: u32) -> [u8; 5] {
    let [a, b, c, d] = id.to_ne_bytes();
    let job = match job {
        Job::Scan => b'p',
        Job::AwaitUpper => b'u',
        Job::CheckUnused => b'c',
        Job::WriteBack => b'w',
        Job::SyncEverything => b'a',
        Job::Stop => b's',
    };
    [job, a, b, c, d]
}

fn decode([job, a, b, c, d]: [u8; 5]) -> Option<(Job, u32)> {
    let job = match job {
        b'p' => Job::Scan,
        b'u' => Job::AwaitUpper,
        b'c' => Job::CheckUnused,
        b'w' => Job::WriteBack,
        b'a' => Job::SyncEverything,
        b's' => Job::Stop,
        _ => return None,
    };
    Some((job, u32::from_ne_bytes([a, b, c, d])))
}

/// An answer: how it went, the length of what is to be said of it, and that.
fn send(socket: &mut UnixStream, outcome: &Result<(), Undone>) -> io::Result<()> {
    let (kind, text) = match outcome {
        Ok(()) => (DONE, ""),
        Err(Undone { is_unfinished: true, text }) => (UNFINISHED, &**text),
        Err(Undone { is_unfinished: false, text }) => (FAILED, &**text),
    };
    let text = &text.as_bytes()[..text.len().min(MAX_TEXT)];
    let mut message = vec![kind];
    message.extend_from_slice(&(text.len() as u16).to_ne_bytes());
    message.extend_from_slice(text);
    socket.write_all(&message)
}

fn receive(socket: &mut UnixStream) -> io::Result<Result<(), Undone>> {
    let mut head = [0; 3];
    socket.read_exact(&mut head)?;
    let [kind, a, b] = head;
    let mut text = vec![0; usize::from(u16::from_ne_bytes([a, b]))];
    socket.read_exact(&mut text)?;
    let text = String::from_utf8_lossy(&text).into_owned();
    Ok(if kind == DONE { Ok(()) } else { Err(Undone { is_unfinished: kind == UNFINISHED, text }) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone;
    use nix::{
        sys::signal::{Signal, kill},
        unistd::pipe,
    };
    use std::{
        fs::{self, File},
        path::PathBuf,
    };

    /// Forks belong to a process with one thread, so one of its own takes such a test.
    fn in_a_process(test: &str, body: impl FnOnce()) {
        alone::run(&format!("deputy::tests::{test}"), body);
    }

    fn answering() -> Deputy {
        Deputy::fork_for(|socket| {
            serve(socket, |job, id| match job {
                Job::WriteBack => Err(Undone { is_unfinished: true, text: format!("not {id}") }),
                Job::Scan => Err(Undone::failed(id)),
                _ => Ok(()),
            });
        })
        .unwrap()
    }

    /// The working directory and the open files of this process, but for those that lead nowhere, and the
    /// directory that is looked through.
    fn all_that_is_open() -> Vec<String> {
        let descriptors = fs::read_dir("/proc/self/fd").unwrap().map(|it| it.unwrap().path());
        let files = [PathBuf::from("/proc/self/cwd")].into_iter().chain(descriptors);
        let mut files: Vec<_> =
            files.filter_map(|it| fs::read_link(it).ok()?.into_os_string().into_string().ok()).collect();
        files.retain(|file| file != "/dev/null" && !file.starts_with("/proc/"));
        files
    }

    /// A server that was killed while it waited for the driver stayed, because it had the device until then.
    /// Who waits in its stead must not have what was open before the fork, be it the device, or the pipe on
    /// which `add` waits for news.
    #[test]
    fn a_deputy_keeps_nothing_of_the_server_s() {
        in_a_process("a_deputy_keeps_nothing_of_the_server_s", || {
            let (reader, writer) = pipe().unwrap();
            // Nobody else but root may see what it has.
            let mut deputy = Deputy::fork_for(|socket| {
                serve(socket, |_, _| Err(Undone::failed(all_that_is_open().join(" "))))
            })
            .unwrap();
            let said = deputy.have(Job::Stop, 3).unwrap_err().to_string();
            let (cwd, open) = said.split_once(' ').unwrap();
            assert_eq!(cwd, "/");
            assert!(open.starts_with("socket:") && !open.contains(' '), "{open}");
            drop(writer);
            assert_eq!(File::from(reader).read(&mut [0]).unwrap(), 0);
        });
    }

    #[test]
    fn jobs_are_answered_whatever_signals_come_and_a_death_is_noticed() {
        in_a_process("jobs_are_answered_whatever_signals_come_and_a_death_is_noticed", || {
            let mut deputy = answering();
            assert!(deputy.have(Job::Stop, 3).is_ok());
            for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
                kill(deputy.process, signal).unwrap();
            }
            let said = deputy.have(Job::WriteBack, 70_000).unwrap_err();
            assert!(matches!(&said, DeputyError::Unfinished(text) if text == "not 70000"), "{said:?}");
            let said = deputy.have(Job::Scan, 70_000).unwrap_err();
            assert!(matches!(&said, DeputyError::Failed(text) if text == "70000"), "{said:?}");
            assert!(deputy.have(Job::Stop, 3).is_ok(), "after a failure");
            kill(deputy.process, Signal::SIGKILL).unwrap();
            assert!(matches!(deputy.have(Job::Stop, 3), Err(DeputyError::Gone(_))));
            assert!(matches!(deputy.have(Job::Stop, 3), Err(DeputyError::Gone(_))));
        });
    }

    #[test]
    fn a_deputy_ends_with_its_server() {
        in_a_process("a_deputy_ends_with_its_server", || {
            let deputy = answering();
            let process = deputy.process;
            drop(deputy);
            assert_eq!(kill(process, None), Err(nix::errno::Errno::ESRCH));
        });
    }
}
