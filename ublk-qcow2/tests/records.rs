//! What the real binary makes of the records in its run directory, where it has no device.

use serde_json::json;
use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::Path,
    process::{Command, Output},
    time::UNIX_EPOCH,
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

/// Only the topmost file of a chain was known to be in use: our own commands wrote to a file below it, and a successor
/// served the result to those who had the disk half in their memory.
#[test]
fn no_file_of_a_chain_that_waits_for_a_server_is_written_to() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    let run_dir = at("run");
    fs::create_dir(&run_dir).expect("a run directory");
    let ours = |args: &[&str]| run_with(&run_dir.to_string_lossy(), dir.path(), args);
    let made = |args: &[&str]| {
        let made = ours(&[&["create", "-q"], args].concat());
        assert!(made.status.success(), "{}", told(&made));
    };
    made(&["base", "1M"]);
    made(&["-b", "base", "-F", "qcow2", "top"]);
    fs::write(run_dir.join("7.json"), dead_record(&at("top"), &[&at("top"), &at("base")])).expect("a record");
    for (file, says) in [("top", "whose server has died"), ("base", "a backing file of /dev/ublkb7")] {
        let before = fs::read(at(file)).expect("an image");
        for args in [
            &["io", "-c", "write 0 512", file][..],
            &["resize", file, "2M"],
            &["check", "--repair", "all", file],
            &["create", "-q", file, "4M"],
        ] {
            let refused = ours(args);
            assert!(!refused.status.success(), "{args:?}");
            for part in [file, says, "ublk-qcow2 del -n 7"] {
                assert!(told(&refused).contains(part), "{args:?}, {part}: {}", told(&refused));
            }
        }
        assert!(fs::read(at(file)).expect("an image") == before, "{file}");
    }
    let read = ours(&["io", "-r", "-c", "read 0 512", "base"]);
    assert!(read.status.success(), "it may be read: {}", told(&read));
    made(&["-b", "base", "-F", "qcow2", "other"]);
    let written = ours(&["io", "-c", "write 0 512", "other"]);
    assert!(written.status.success(), "another one may be built on it: {}", told(&written));
}

/// The record of device 7, whose server has died and is to be replaced.
fn dead_record(image: &Path, files: &[&Path]) -> String {
    let known = |path: &&Path| {
        let it = fs::metadata(path).expect("a file");
        let born =
            it.created().map_or(0, |time| time.duration_since(UNIX_EPOCH).map_or(0, |it| it.as_nanos()));
        json!({"name": path, "device": it.dev(), "identity": {"inode": it.ino(), "born": born as u64}})
    };
    let config = json!({
        "image": image, "queues": 1, "depth": 64, "read_only": false, "force_share": false, "cache_bytes": 1 << 25,
        "io": "auto", "zero_copy": "auto", "backing_format": null, "backing_policy": "Any", "reclaims": true,
        "recovery": true, "part_scan": true
    });
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("a boot");
    let record = json!({
        "id": 7, "pid": 1, "size": 1 << 20, "queues": 1, "depth": 64, "phase": "serving", "config": config,
        "cookie": 5, "files": files.iter().map(known).collect::<Vec<_>>(), "boot": boot.trim()
    });
    record.to_string()
}
