//! QEMU's tools, for the tests that hold this crate against them.

use std::{
    io::Write,
    path::Path,
    process::{Command, Output},
};

/// Whether qemu-img and qemu-io can be run. Where they cannot, says so on the real standard error,
/// which the test harness does not capture, so that a skipped test is seen.
pub(crate) fn qemu_is_there(test: &str) -> bool {
    let there =
        ["qemu-img", "qemu-io"].iter().all(|tool| Command::new(tool).arg("--version").output().is_ok());
    if !there {
        let _ =
            writeln!(std::io::stderr(), "\n*** SKIPPED {test}: qemu-img and qemu-io are not installed ***");
    }
    there
}

/// Runs a tool in `dir`.
pub(crate) fn try_run(dir: &Path, tool: &str, args: &[&str]) -> Output {
    Command::new(tool).current_dir(dir).args(args).output().expect("the tool starts")
}

/// Runs a tool that must succeed; returns its standard output.
pub(crate) fn run(dir: &Path, tool: &str, args: &[&str]) -> String {
    let output = try_run(dir, tool, args);
    let shown = || format!("{tool} {args:?}: {output:?}");
    assert!(output.status.success(), "{}", shown());
    String::from_utf8(output.stdout).expect("the tool prints UTF-8")
}

/// What `qemu-img info` says of an image.
pub(crate) fn info(dir: &Path, image: &str) -> serde_json::Value {
    let text = run(dir, "qemu-img", &["info", "-U", "--output=json", image]);
    serde_json::from_str(&text).expect("qemu-img prints JSON")
}
