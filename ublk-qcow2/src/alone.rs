//! Tests that change or need what belongs to a whole process: each has the test program run once more, for itself alone.
//! And tests that cannot be made everywhere: they say so.

use crate::runfile::{self, DIRECTORY_VARIABLE};
use std::{
    env,
    io::{self, Write},
    path::Path,
    process::{Command, Output},
};

const IS_CHILD: &str = "UBLK_QCOW2_TEST_IS_CHILD";
/// Set by `cargo xtask test` where there is all that a test may need.
const NO_SKIPS: &str = "UBLK_QCOW2_NO_SKIPS";
/// The beginning of a line about a test that was not made.
const NOT_TESTED: &str = "NOT TESTED: ";

/// For a test that is not made, for want of something: as it passes all the same it tells everybody, and where nothing
/// should be missing it fails.
pub(crate) fn skip(why: &str) {
    assert!(env::var_os(NO_SKIPS).is_none(), "not tested, although {NO_SKIPS} is set: {why}");
    tell(&format!("{NOT_TESTED}{why}"));
}

/// Past the test program, which shows what `eprintln!` says of tests that fail only.
fn tell(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// The program to run for the test of this path; `None` where that is this process.
pub(crate) fn again(test: &str) -> Option<Command> {
    if env::var_os(IS_CHILD).is_some() {
        return None;
    }
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(IS_CHILD, "");
    Some(child)
}

/// Makes sure that the test was run there, and passed.
pub(crate) fn check(ended: &Output) {
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(said.contains("1 passed"), "there is no such test: {said}");
    String::from_utf8_lossy(&ended.stderr).lines().filter(|line| line.starts_with(NOT_TESTED)).for_each(tell);
}

/// Runs a test in a process of its own, with one thread for it.
pub(crate) fn run(test: &str, body: impl FnOnce()) {
    match again(test) {
        Some(mut child) => check(&child.output().unwrap()),
        None => body(),
    }
}

/// [`run`], with a run directory that is the test's own.
pub(crate) fn in_a_directory(test: &str, body: impl FnOnce(&Path)) {
    match again(test) {
        Some(mut child) => {
            let dir = tempfile::tempdir().unwrap();
            check(&child.env(DIRECTORY_VARIABLE, dir.path()).output().unwrap());
        }
        None => body(&runfile::directory()),
    }
}
