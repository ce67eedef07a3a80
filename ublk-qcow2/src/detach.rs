//! Going into the background, and telling the parent how it went.
//!
//! [`into_background`] forks before any thread or ring exists. The parent waits until the child
//! either serves its device or has failed, and reports that as its own result.

#![allow(unsafe_code, reason = "fork, and what was inherited")]

use crate::runfile;
use nix::{
    sys::signal::{SigHandler, Signal, signal},
    unistd::{ForkResult, Pid, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid},
};
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    mem,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    ptr,
};

/// First byte of the child's message: what follows is the device's number.
const SERVING: u8 = b'+';
/// First byte of the child's message: what follows is an error.
const FAILED: u8 = b'-';

/// Which side of the fork this is.
pub(crate) enum Side {
    /// The caller's process, with the child's result: the device's number or the error.
    Parent { child: Pid, outcome: Result<u32, Unserved> },
    /// The server to be.
    Child(Reporter),
}

/// Why a child is not known to serve its device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unserved {
    /// What it said.
    #[error("{0}")]
    Failed(String),
    /// It has died, or serves and could not say so.
    #[error(
        "the server has not said that it serves the device, most likely because it has died; see the kernel log (dmesg)"
    )]
    Silent,
}

/// The child's way of telling its parent, used once.
pub(crate) struct Reporter(File);

/// Forks. The parent returns when the child has reported or ended.
///
/// # Errors
/// The operating system's, in the parent.
pub(crate) fn into_background() -> io::Result<Side> {
    notice_children()?;
    let (from_child, to_parent) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // SAFETY: the process has one thread: `add` has started none by now, nor does a supervisor, ever.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            drop(to_parent);
            Ok(Side::Parent { child, outcome: receive(from_child) })
        }
        ForkResult::Child => {
            drop(from_child);
            // It cannot fail: a fresh child leads no process group.
            let _ = setsid();
            Ok(Side::Child(Reporter(to_parent.into())))
        }
    }
}

/// Has the kernel keep how a child has ended until it is asked. Who ignores SIGCHLD hands that down to what
/// it starts, and the kernel then keeps nothing: a server that was killed would seem never to have been
/// there.
fn notice_children() -> io::Result<()> {
    // SAFETY: no handler of ours is installed, and whoever had one before has not started this program.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
    Ok(())
}

/// Whether this process was started with a signal ignored, as nohup does it, and a shell for what it starts in
/// the background.
pub(crate) fn was_told_to_ignore(it: Signal) -> bool {
    // SAFETY: an action is plain numbers and an optional address.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: it installs nothing; the kernel writes to the action, which outlives the call.
    let asked = unsafe { libc::sigaction(it as libc::c_int, ptr::null(), &raw mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Closes whatever this process was started with beside the standard descriptors: a server that had them
/// would keep a pipe of the caller's open, or a lock, for as long as it serves. To be called before anything
/// is opened that is to stay open.
pub(crate) fn let_go_of_inherited() {
    // SAFETY: it names no memory, and nobody in this process owns one of these descriptors.
    unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0_u32) };
}

/// Closes every descriptor but the standard ones and `kept`: for a child that never returns to what its
/// parent has open.
pub(crate) fn let_go_of_inherited_but(kept: BorrowedFd<'_>) {
    // A descriptor that is open is not negative.
    let kept = kept.as_raw_fd().cast_unsigned();
    for (first, last) in [(3, kept.saturating_sub(1)), (kept.max(2) + 1, u32::MAX)] {
        // SAFETY: it names no memory, and whoever owns one of these descriptors does not run in this process
        // any more.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0_u32) };
    }
}

fn receive(from_child: OwnedFd) -> Result<u32, Unserved> {
    let failed = |text: &str| Unserved::Failed(text.to_owned());
    let mut message = Vec::new();
    File::from(from_child).read_to_end(&mut message).map_err(|error| failed(&error.to_string()))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match message.split_first() {
        Some((&SERVING, id)) => text(id).parse().map_err(|_| failed("the server's answer makes no sense")),
        Some((_, error)) => Err(failed(&text(error))),
        None => Err(Unserved::Silent),
    }
}

impl Reporter {
    /// The device is served. From here on the server is on its own: it gives up the terminal and the
    /// working directory, and writes what it has to say to `log`.
    ///
    /// # Errors
    /// When the parent is gone, so that nobody learns of the device.
    pub(crate) fn serving(mut self, id: u32, log: &Path) -> io::Result<()> {
        give_up_terminal(log)?;
        // Last: the server may go on though there is nobody who hears this.
        let mut message = vec![SERVING];
        message.extend_from_slice(id.to_string().as_bytes());
        self.0.write_all(&message)
    }

    /// Device `id` is not served yet, as far as is known. Who says this goes on in the background.
    pub(crate) fn failed_for_now(self, id: u32, error: &Unserved) {
        match error {
            Unserved::Failed(error) => self.failed(error),
            // What becomes of the device its record will say.
            Unserved::Silent => drop(self),
        }
        // A device that nobody knows has no log.
        if runfile::path_of(id).exists()
            && let Err(error) = give_up_terminal(&runfile::log_path(id))
        {
            tracing::warn!(id, "the terminal is kept: {error}");
        }
    }

    /// There will be no device.
    pub(crate) fn failed(mut self, error: &str) {
        let mut message = vec![FAILED];
        message.extend_from_slice(error.as_bytes());
        // If the parent is gone nobody is there to be told.
        let _ = self.0.write_all(&message);
    }
}

fn give_up_terminal(log: &Path) -> io::Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let log = runfile::open_log(log)?;
    std::env::set_current_dir("/")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    Ok(dup2_stderr(&log)?)
}
