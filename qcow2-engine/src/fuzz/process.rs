//! Other programs, with a bound on their time.

use std::{
    fs::{self, File},
    io,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It was killed because it took too long.
    TimedOut,
}

/// What a program left behind.
#[derive(Clone, Debug)]
pub struct Finished {
    /// How it ended.
    pub ending: Ending,
    /// What it printed.
    pub output: String,
    /// What it printed as errors.
    pub errors: String,
}

const POLL: Duration = Duration::from_millis(3);

/// Runs a program in a directory to its end, or for as long as `limit`.
///
/// # Errors
/// It cannot be started.
pub fn run(command: &mut Command, directory: &Path, limit: Duration) -> io::Result<Finished> {
    let (output, errors) = (directory.join("stdout"), directory.join("stderr"));
    let mut child = command
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(File::create(&output)?)
        .stderr(File::create(&errors)?)
        .spawn()?;
    let begun = Instant::now();
    let ending = loop {
        match child.try_wait()? {
            Some(status) => {
                break match (status.code(), status.signal()) {
                    (Some(code), _) => Ending::Code(code),
                    (None, signal) => Ending::Signal(signal.unwrap_or_default()),
                };
            }
            None if begun.elapsed() > limit => {
                child.kill()?;
                child.wait()?;
                break Ending::TimedOut;
            }
            None => thread::sleep(POLL),
        }
    };
    let text = |path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ok(Finished { ending, output: text(&output)?, errors: text(&errors)? })
}
