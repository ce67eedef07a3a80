//! Running other programs with a bound on how long they may take.
//!
//! A tool that hangs must not hang the suite: every child has a deadline, after which it is killed
//! and the failure names its command line. Knows nothing of what the programs do.

use anyhow::{Context, Result, bail};
use std::{
    io::Read,
    process::{Child, Command, ExitStatus, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Enough for any single call of a tool in an emulated machine; comparing all of an image of 4 TiB is the
/// longest.
pub const TOOL_LIMIT: Duration = Duration::from_secs(600);
/// How often a child is asked whether it has ended.
const LOOK: Duration = Duration::from_millis(5);

/// How a program ended and what it said.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The command line, for messages.
    pub line: String,
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Finished {
    /// Both outputs, trimmed: for messages.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{}\n{}", self.stdout.trim(), self.stderr.trim()).trim().to_owned()
    }

    /// Itself, if the program succeeded.
    ///
    /// # Errors
    /// The status and what the program said.
    pub fn success(self) -> Result<Self> {
        if self.status.success() {
            return Ok(self);
        }
        bail!("`{}` ended with {}: {}", self.line, self.status, self.text())
    }
}

/// Runs a program to its end and gathers what it says.
///
/// # Errors
/// It cannot be started, or it has not ended within `limit` (it is then killed).
pub fn run(command: &mut Command, limit: Duration) -> Result<Finished> {
    let line = line_of(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    let stdout = gather(child.stdout.take());
    let stderr = gather(child.stderr.take());
    let Some(status) = wait(&mut child, limit)? else {
        // What it said so far stays unread: a child of its own may hold the pipe open.
        bail!("`{line}` has not ended within {} s", limit.as_secs());
    };
    Ok(Finished { line, status, stdout: text_of(stdout), stderr: text_of(stderr) })
}

/// Waits for a child; kills it when `limit` has passed and returns nothing then.
///
/// # Errors
/// The operating system's.
pub fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            // Not waited for: a process stuck in the kernel would hang us too.
            child.kill()?;
            return Ok(None);
        }
        thread::sleep(LOOK);
    }
}

/// The command line as one would type it, near enough.
#[must_use]
pub fn line_of(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn gather(pipe: Option<impl Read + Send + 'static>) -> Option<JoinHandle<Vec<u8>>> {
    let mut pipe = pipe?;
    Some(thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is all there is to show.
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    }))
}

fn text_of(reader: Option<JoinHandle<Vec<u8>>>) -> String {
    let bytes = reader.and_then(|thread| thread.join().ok()).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_and_status_are_kept_and_a_failure_shows_them() {
        let finished =
            run(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]), TOOL_LIMIT).unwrap();
        assert_eq!((finished.stdout.as_str(), finished.status.code()), ("out\n", Some(3)));
        let error = finished.success().unwrap_err().to_string();
        assert!(error.contains("err") && error.contains("exit 3"), "{error}");
    }

    #[test]
    fn a_program_that_hangs_is_killed_and_named() {
        let start = Instant::now();
        let error = run(Command::new("sleep").arg("60"), Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("sleep 60"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
