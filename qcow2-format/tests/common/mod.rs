//! QEMU's tools, for the tests that hold this crate against them.

use std::{
    path::Path,
    process::{Command, Output},
};

/// Runs a tool in `dir`.
pub(crate) fn try_run(dir: &Path, tool: &str, args: &[&str]) -> Output {
    Command::new(tool)
        .current_dir(dir)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{tool} does not start: {error}; `cargo xtask setup` installs it"))
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
