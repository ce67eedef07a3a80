//! Running cases one after the other, one line each, and an account at the end.
//!
//! A case that hangs must not hang the suite: each has a limit. When one overruns it, its device is
//! in an unknown state, so the rest is counted as failed, not skipped. Knows nothing of what cases
//! do; the caller says what must be as before after each.

use anyhow::{Result, anyhow};
use std::{
    fmt::Write as _,
    fs,
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

/// Something that holds or does not.
pub struct Case {
    name: String,
    limit: Duration,
    body: Box<dyn FnOnce() -> Result<()> + Send>,
}

impl Case {
    /// A case that may take so long.
    pub fn new(
        name: impl Into<String>,
        limit: Duration,
        body: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Self {
        Self { name: name.into(), limit, body: Box::new(body) }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// How many cases passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Held.
    pub passed: usize,
    /// Did not.
    pub failed: usize,
}

/// Runs the cases; `tidy` runs after each and fails it when something is left over. `out` gets a line
/// for each and the account as the last one.
pub fn run_all(cases: Vec<Case>, tidy: impl Fn() -> Result<()>, out: &mut impl Write) -> Account {
    let mut account = Account::default();
    let mut is_stuck = false;
    for case in cases {
        if is_stuck {
            say(out, &format!("FAILED {}: not run, because an earlier case hangs", case.name));
            account.failed += 1;
            continue;
        }
        let start = Instant::now();
        let name = case.name.clone();
        let outcome = match run_one(case) {
            Outcome::Ended(Ok(())) => tidy(),
            Outcome::Ended(Err(error)) => {
                // What the tidying finds then is a consequence.
                let _ = tidy();
                Err(error)
            }
            Outcome::Overran(limit) => {
                is_stuck = true;
                Err(anyhow!("has not ended within {} s; {}", limit.as_secs(), blocked()))
            }
        };
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => {
                account.passed += 1;
                say(out, &format!("ok     {name} ({seconds:.1} s)"));
            }
            Err(error) => {
                account.failed += 1;
                say(out, &format!("FAILED {name} ({seconds:.1} s): {error:#}"));
            }
        }
    }
    say(out, &format!("{} passed, {} failed", account.passed, account.failed));
    account
}

enum Outcome {
    Ended(Result<()>),
    Overran(Duration),
}

fn run_one(case: Case) -> Outcome {
    let (sender, ended) = channel();
    let body = case.body;
    let thread = thread::spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| Err(anyhow!("panicked")));
        // Nobody listens any more when the case has overrun its limit.
        let _ = sender.send(result);
    });
    match ended.recv_timeout(case.limit) {
        Ok(result) => {
            let _ = thread.join();
            Outcome::Ended(result)
        }
        Err(RecvTimeoutError::Disconnected) => Outcome::Ended(Err(anyhow!("its thread is gone"))),
        Err(RecvTimeoutError::Timeout) => Outcome::Overran(case.limit),
    }
}

/// A whole line at once, shown at once.
fn say(out: &mut impl Write, line: &str) {
    // There is nobody to tell when this fails; the exit status still tells.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// The processes that wait in the kernel without being interruptible, and where.
fn blocked() -> String {
    let mut text = String::from("blocked processes:");
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        for task in fs::read_dir(process.path().join("task")).into_iter().flatten().flatten() {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            if let Some((name, rest)) = stat.rsplit_once(") ")
                && rest.starts_with('D')
            {
                let at = fs::read_to_string(task.path().join("wchan")).unwrap_or_default();
                let _ = write!(text, " {name}) in {at};");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::resume_unwind;

    /// The account of the cases, and the lines without the times.
    fn run(cases: Vec<Case>, tidy: impl Fn() -> Result<()>) -> (Account, Vec<String>) {
        let mut out = Vec::new();
        let account = run_all(cases, tidy, &mut out);
        let untimed = |line: &str| line.split(" (").next().unwrap_or_default().to_owned();
        (account, String::from_utf8(out).unwrap().lines().map(untimed).collect())
    }

    #[test]
    fn a_case_that_hangs_fails_and_so_does_what_comes_after_it() {
        let limit = Duration::from_secs(60);
        let cases = vec![
            Case::new("good", limit, || Ok(())),
            Case::new("bad", limit, || Err(anyhow!("no"))),
            // As `panic!` does, without the message.
            Case::new("panics", limit, || resume_unwind(Box::new(()))),
            Case::new("hangs", Duration::from_millis(50), || {
                thread::sleep(Duration::from_secs(3600));
                Ok(())
            }),
            Case::new("after", limit, || Ok(())),
        ];
        let (account, lines) = run(cases, || Ok(()));
        assert_eq!(account, Account { passed: 1, failed: 4 });
        let expected = [
            "ok     good",
            "FAILED bad",
            "FAILED panics",
            "FAILED hangs",
            "FAILED after: not run, because an earlier case hangs",
            "1 passed, 4 failed",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn leftovers_fail_a_case() {
        let cases = vec![Case::new("untidy", Duration::from_secs(60), || Ok(()))];
        let (account, lines) = run(cases, || Err(anyhow!("left over")));
        assert_eq!(account, Account { passed: 0, failed: 1 });
        assert_eq!(lines, ["FAILED untidy", "0 passed, 1 failed"]);
    }
}
