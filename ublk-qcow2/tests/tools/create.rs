//! `create` as scripts for qemu-img call it.

use super::*;
use std::{
    io::{BufRead, BufReader},
    os::unix::fs::MetadataExt,
    process::Child,
};

/// qemu-io that has an image open for writing until it is killed.
struct Writer(Child);

impl Writer {
    fn of(directory: &Path, image: &str) -> Self {
        let mut command = Command::new("qemu-io");
        let command = command.args(["-f", "qcow2", image]).current_dir(directory);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("starts");
        child.stdin.as_mut().expect("a pipe").write_all(b"write 0 64k\n").expect("takes commands");
        let mut said = String::new();
        let mut lines = BufReader::new(child.stdout.as_mut().expect("a pipe"));
        while !said.contains("wrote") {
            assert_ne!(lines.read_line(&mut said).expect("text"), 0, "{said}");
        }
        Self(child)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An overlay of an image that a guest is writing to could not be made: its size was asked for as one who
/// wants to read it alone. (QEMU's iotest 153.)
#[test]
fn the_backing_file_of_a_new_image_may_be_in_use() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    succeeds(ours(path, &["create", "-q", "base", "3M"]));
    let _writer = Writer::of(path, "base");
    let size = |name| json(&run("qemu-img", path, &["info", "--output=json", name]))["virtual-size"].as_u64();
    let overlay = ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2"];
    succeeds(run("qemu-img", path, &[&overlay[..], &["theirs"]].concat()));
    succeeds(ours(path, &[&overlay[..], &["ours"]].concat()));
    assert_eq!((size("ours"), size("theirs")), (Some(3 << 20), Some(3 << 20)));
    // What would be overwritten is another matter.
    for program in ["qemu-img", OURS] {
        assert_eq!(code(&run(program, path, &["create", "-q", "-f", "qcow2", "base", "1M"])), 1, "{program}");
    }
}

/// Scripts put options of their own behind those that they were given: the last one counts. (Iotests 082 and
/// 161.)
#[test]
fn of_repeated_options_the_last_counts_as_for_qemu_img() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    fs::write(path.join("base"), vec![1; 1 << 20]).expect("base");
    for options in [
        &["-o", "cluster_size=4k,lazy_refcounts=on", "-o", "cluster_size=8k", "image", "1M"][..],
        &["-f", "qcow2", "-f", "qcow2", "-q", "-q", "-q", "image", "2M"],
        &["-b", "none", "-b", "base", "-F", "qcow2", "-F", "raw", "image"],
        &["-u", "-u", "-b", "base", "-F", "raw", "-o", "size=1M", "-o", "size=3M", "image"],
    ] {
        let mut infos = Vec::new();
        for program in [OURS, "qemu-img"] {
            succeeds(run(program, path, &[&["create", "-f", "qcow2"], options].concat()));
            infos.push(json(&run("qemu-img", path, &["info", "--output=json", "image"])));
        }
        for field in ["virtual-size", "cluster-size", "format-specific", "backing-filename-format"] {
            assert_eq!(infos[0][field], infos[1][field], "{options:?}");
        }
    }
    for args in [
        &["info", "-f", "raw", "-f", "qcow2", "-U", "-U", "--output=json", "--output=human", "image"][..],
        &["check", "-q", "-q", "-f", "qcow2", "-f", "qcow2", "-r", "leaks", "-r", "all", "image"],
        &["resize", "-f", "qcow2", "-f", "qcow2", "image", "+1M"],
    ] {
        succeeds(run("qemu-img", path, args));
        let ours_too: Vec<_> = args.iter().map(|arg| if *arg == "raw" { "qcow2" } else { arg }).collect();
        succeeds(ours(path, &ours_too));
    }
    succeeds(ours(path, &["io", "-r", "-r", "-c", "length", "-c", "read 0 1k", "image"]));
}

#[test]
fn the_options_are_listed_and_those_that_are_none_refused() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    for args in [
        &["-o", "help"][..],
        &["-o", "?"],
        &["-o", "cluster_size=4k,help", "image", "1M"],
        &["-o", "cluster_size=4k", "-o", "help", "image", "1M"],
        &["-o", "nonsense=3,help", "image", "1M"],
    ] {
        for program in [OURS, "qemu-img"] {
            let said = succeeds(run(program, path, &[&["create", "-f", "qcow2"], args].concat()));
            for name in
                ["size=", "cluster_size=", "compat=", "preallocation=", "backing_fmt=", "refcount_bits="]
            {
                assert!(said.contains(name), "{program} {args:?}: {said}");
            }
        }
    }
    for options in ["", ",", ",help", "help,", "compat=v3,", "cluster_size=4k,,help"] {
        for program in [OURS, "qemu-img"] {
            let said = run(program, path, &["create", "-f", "qcow2", "-o", options, "image", "1M"]);
            assert_eq!(code(&said), 1, "{program} {options:?}: {}", text(&said));
        }
    }
    assert_eq!(code(&ours(path, &["create", "-o", "size=1M"])), 1);
    assert!(!path.join("image").exists());
}

/// `preallocation=full` was refused. Each mode leaves no more of the file without space than QEMU's. (Iotest
/// 125.)
#[test]
fn preallocated_images_have_the_space_that_qemus_have() {
    // Others count their own records of a file's extents among its blocks, and these depend on what else is written
    // at the time.
    let directory = tempfile::tempdir_in("/dev/shm").expect("temporary directory");
    let path = directory.path();
    for mode in ["metadata", "falloc", "full"] {
        for cluster in
            ["cluster_size=512", "cluster_size=4k,refcount_bits=64", "cluster_size=64k", "cluster_size=2M"]
        {
            let options = format!("{cluster},preallocation={mode}");
            for (program, name) in [(OURS, "ours"), ("qemu-img", "theirs")] {
                succeeds(run(program, path, &["create", "-q", "-f", "qcow2", "-o", &options, name, "9M"]));
            }
            succeeds(run("qemu-img", path, &["check", "-q", "ours"]));
            succeeds(run("qemu-img", path, &["compare", "-q", "ours", "theirs"]));
            let blocks = |name| fs::metadata(path.join(name)).expect("made").blocks();
            if mode != "metadata" {
                assert!(
                    blocks("ours") >= blocks("theirs"),
                    "{options}: {} < {}",
                    blocks("ours"),
                    blocks("theirs")
                );
            }
            if mode == "full" {
                let map = json(&run("qemu-img", path, &["map", "--output=json", "ours"]));
                let is_written = |part: &Value| part["data"] == true && part["zero"] == false;
                assert!(map.as_array().expect("a list").iter().all(is_written), "{options}: {map}");
            }
        }
    }
}

/// `create file:image` made a file of that name; QEMU's makes `image`.
#[test]
fn a_protocol_is_no_part_of_a_file_s_name() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    for name in ["file:image", "nbd:localhost:10809", "a:b"] {
        let refused = ours(path, &["create", "-q", name, "1M"]);
        assert_eq!(code(&refused), 1, "{name}: {}", text(&refused));
        assert!(text(&refused).contains(&format!("'./{name}' is a file")), "{}", text(&refused));
        assert!(!path.join(name).exists(), "{name}");
    }
    succeeds(ours(path, &["create", "-q", "./a:b", "1M"]));
    assert!(path.join("a:b").exists());
}
