//! What the real binary makes of the records in its run directory, where it has no device.

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::Path,
    process::{Command, Output},
};

fn run_with(directory: &str, cwd: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ublk-qcow2"));
    command.env("UBLK_QCOW2_RUN_DIR", directory).current_dir(cwd).args(args).output().expect("starts")
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

/// A server works in `/`: with a relative run directory its record was somewhere else than where `list` and
/// `del` looked for it.
#[test]
fn the_run_directory_is_the_same_for_everybody() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::create_dir(dir.path().join("run")).expect("a run directory");
    let relative = run_with("run", dir.path(), &["list"]);
    assert!(!relative.status.success() && told(&relative).contains("absolute"), "{}", told(&relative));
    let absolute = run_with(&dir.path().join("run").to_string_lossy(), dir.path(), &["list"]);
    assert!(absolute.status.success(), "{}", told(&absolute));
    let empty = run_with("", dir.path(), &["list", "-n", "1048575"]);
    assert!(told(&empty).contains("no device"), "an empty name is none: {}", told(&empty));
}

/// Of a record that it could not read (damaged, or of another version) `del` told what JSON lacks in it, and not
/// what to do. Tools that look for servers complained of each such record twice.
#[test]
fn a_record_that_cannot_be_read_is_said_once_with_the_way_out() {
    let dir = tempfile::tempdir().expect("a directory");
    let run_dir = dir.path().join("run");
    fs::create_dir(&run_dir).expect("a run directory");
    fs::write(run_dir.join("3.json"), r#"{"id":3}"#).expect("a record");
    let ours = |args: &[&str]| run_with(&run_dir.to_string_lossy(), dir.path(), args);
    let failed = ours(&["del", "-n", "3"]);
    assert!(!failed.status.success());
    for part in ["3.json", "another version", "remove the file", "del -n"] {
        assert!(told(&failed).contains(part), "{part}: {}", told(&failed));
    }
    assert!(ours(&["create", "-q", "image", "1M"]).status.success());
    let resized = ours(&["resize", "image", "2M"]);
    assert!(resized.status.success(), "{}", told(&resized));
    assert_eq!(told(&resized).matches("3.json").count(), 1, "{}", told(&resized));
}

/// Any user could lock a record. Who may not read them is told so, and not that there is no device.
#[test]
fn records_are_root_s() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    let (run_dir, program) = (at("run"), at("ublk-qcow2"));
    fs::create_dir(&run_dir).expect("a run directory");
    fs::write(run_dir.join("3.json"), "{}").expect("a record");
    // A stranger may not find the program where it was built.
    fs::copy(env!("CARGO_BIN_EXE_ublk-qcow2"), &program).expect("a copy");
    for (path, mode) in [(dir.path(), 0o777), (&run_dir.join("3.json"), 0o000)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("permissions");
    }
    let as_stranger = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.env("UBLK_QCOW2_RUN_DIR", &run_dir).current_dir(dir.path()).args(args);
        if fs::metadata("/proc/self").expect("metadata").uid() == 0 {
            command.uid(65534).gid(65534);
        }
        command.output().expect("starts")
    };
    let listed = as_stranger(&["list"]);
    assert!(!listed.status.success() && told(&listed).contains("only root"), "{}", told(&listed));
    assert!(as_stranger(&["create", "-q", "image", "1M"]).status.success());
    let resized = as_stranger(&["resize", "image", "2M"]);
    assert!(resized.status.success(), "{}", told(&resized));
    assert_eq!(told(&resized).matches("is not known").count(), 1, "{}", told(&resized));
}
