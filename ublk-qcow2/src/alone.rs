//! Tests that change or need what belongs to a whole process: each has the test program run once more, for itself alone.

use crate::runfile::{self, DIRECTORY_VARIABLE};
use std::{
    env,
    path::Path,
    process::{Command, Output},
};

const IS_CHILD: &str = "UBLK_QCOW2_TEST_IS_CHILD";

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
