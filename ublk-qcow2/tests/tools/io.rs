//! What sessions of `io` leave behind, however they end.

use super::*;

#[test]
fn io_fails_where_qemu_io_fails() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path: PathBuf = directory.path().into();
    succeeds(ours(&path, &["create", "-q", "image.qcow2", "1M"]));
    for (commands, expected) in [
        (&["write -P 5 0 4k", "read -P 5 0 4k"][..], 0),
        (&["read -P 6 0 4k"], 1),
        (&["read -P 5 -s 1 -l 100 100 1k"], 0),
        (&["read 1M 1"], 1),
        (&["nonsense", "read 0 1"], 1),
        (&["quit", "nonsense"], 0),
        (&["sleep 1", "length", "flush"], 0),
    ] {
        let args: Vec<_> = commands.iter().flat_map(|command| ["-c", *command]).collect();
        let said = ours(&path, &[&["io"][..], &args, &["image.qcow2"]].concat());
        assert_eq!(code(&said), expected, "{commands:?}: {}", text(&said));
        let theirs = run("qemu-io", &path, &[&["-f", "qcow2"][..], &args, &["image.qcow2"]].concat());
        assert_eq!(code(&theirs), expected, "{commands:?}: {}", text(&theirs));
    }
    // qemu-io prints it and exits with 0; here a failure is one wherever it happens.
    for commands in [&["-c", "aio_read -P 6 0 4k", "-c", "aio_flush"][..], &["-c", "aio_read -P 6 0 4k"]] {
        let said = ours(&path, &[&["io"][..], commands, &["image.qcow2"]].concat());
        assert_eq!(code(&said), 1, "{}", text(&said));
        assert!(
            text(&said).contains("Pattern verification failed at offset 0, 4096 bytes"),
            "{}",
            text(&said)
        );
    }
    let refused = ours(&path, &["io", "-r", "-c", "write 0 512", "image.qcow2"]);
    assert_eq!(code(&refused), 1);
    assert!(text(&refused).contains("read-only"), "{}", text(&refused));
}

/// `write -s FILE` read the whole file: one without an end until there was no memory left.
#[test]
fn a_file_to_write_from_may_be_longer_than_the_request() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    succeeds(ours(path, &["create", "-q", "image.qcow2", "1M"]));
    let bounded = "ulimit -v 4194304 && exec \"$@\"";
    let commands = ["-c", "write -P 7 0 8k", "-c", "write -s /dev/zero 0 4k", "-c", "read -P 0 0 4k"];
    succeeds(run(
        "sh",
        path,
        &[&["-c", bounded, "sh", OURS, "io"][..], &commands, &["image.qcow2"]].concat(),
    ));
}

/// Zeros at odd offsets allocated a cluster where nothing was allocated.
#[test]
fn zeros_over_nothing_allocate_nothing() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    succeeds(ours(path, &["create", "-q", "image.qcow2", "1M"]));
    let commands = [
        "write -z 3 1",
        "write -z 1000 100",
        "write -z -u 65535 65538",
        "write -P 7 200k 1k",
        "write -z 205000 3",
    ];
    let args: Vec<_> = commands.iter().flat_map(|command| ["-c", *command]).collect();
    succeeds(ours(path, &[&["io"][..], &args, &["image.qcow2"]].concat()));
    let read = [
        "-f",
        "qcow2",
        "-c",
        "read -P 0 205000 3",
        "-c",
        "read -P 7 204800 200",
        "-c",
        "read -P 7 205003 821",
    ];
    succeeds(run("qemu-io", path, &[&read[..], &["image.qcow2"]].concat()));
    let map = json(&run("qemu-img", path, &["map", "--output=json", "image.qcow2"]));
    let data: Vec<_> =
        map.as_array().expect("a list").iter().filter(|extent| extent["data"] == true).collect();
    assert_eq!(data.len(), 1, "{map}");
    assert_eq!((&data[0]["start"], &data[0]["length"]), (&Value::from(196608), &Value::from(65536)), "{map}");
}

/// `alloc` was not there, and `map` said something else.
#[test]
fn what_is_allocated_is_told_as_qemu_io_tells_it() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    succeeds(ours(path, &["create", "-q", "base", "1M"]));
    succeeds(ours(path, &["io", "-c", "write 0 256k", "base"]));
    succeeds(ours(path, &["create", "-q", "-b", "base", "-F", "qcow2", "top", "1000k"]));
    let commands =
        ["write 64k 64k", "write -z 256k 64k", "write -z -u 320k 64k", "write -P 3 0 64k", "discard 0 64k"];
    let args: Vec<_> = commands.iter().flat_map(|command| ["-c", *command]).collect();
    succeeds(ours(path, &[&["io"][..], &args, &["top"]].concat()));
    succeeds(run("qemu-io", path, &["-c", "write -c 512k 64k", "top"]));
    succeeds(ours(path, &["create", "-q", "-o", "preallocation=metadata", "whole", "1M"]));
    let looks = [
        "map",
        "alloc 0",
        "alloc 64k 128k",
        "alloc 65k 100",
        "alloc 0 1M",
        "alloc 999k 2k",
        "alloc 1000k",
        "alloc 2M 1k",
        "alloc 0 0",
        "length",
    ];
    for image in ["base", "top", "whole"] {
        for look in looks {
            let said = succeeds(ours(path, &["io", "-r", "-c", look, image]));
            assert_eq!(said, succeeds(run("qemu-io", path, &["-r", "-c", look, image])), "{image}: {look}");
        }
    }
    let places = succeeds(ours(path, &["io", "-r", "-c", "map -v", "top"]));
    for part in ["data in base at", "compressed data in file 0", "zero"] {
        assert!(places.contains(part), "{part}: {places}");
    }
}

/// `io IMAGE < commands | head -1`: what was written until nobody listened is in the image, and nothing after
/// it.
#[test]
fn a_session_that_cannot_print_closes_its_image() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    let session = |commands: &[&str], out: Stdio, errors: Stdio| {
        succeeds(ours(path, &["create", "-q", "image", "1M"]));
        let args = commands.iter().flat_map(|command| ["-c", *command]);
        let mut command = Command::new(OURS);
        command.arg("io").args(args).arg("image").current_dir(path).stdout(out).stderr(errors);
        command.spawn().expect("starts").wait_with_output().expect("ends")
    };
    let closed = || Stdio::from(OwnedFd::from(UnixStream::pair().expect("sockets").0));
    let full = || Stdio::from(fs::File::options().write(true).open("/dev/full").expect("opens"));
    let writes = ["write -P 3 0 64k", "write -P 4 64k 64k"];
    let in_flight = ["aio_write -q -P 3 0 64k", "length", "write -P 4 64k 64k"];
    let at_the_end = ["aio_write -P 3 0 64k"];
    for commands in [&writes[..], &in_flight, &at_the_end] {
        for (out, reason) in [(closed(), "Broken pipe"), (full(), "No space left on device")] {
            let said = session(commands, out, Stdio::piped());
            let told = text(&said);
            assert_eq!(code(&said), 1, "{commands:?}: {told}");
            assert!(told.starts_with("ublk-qcow2: cannot print: ") && told.contains(reason), "{told}");
            assert_eq!(told.lines().count(), 1, "{told}");
            let read =
                run("qemu-io", path, &["-r", "-c", "read -P 3 0 64k", "-c", "read -P 0 64k 64k", "image"]);
            assert_eq!(code(&read), 0, "{commands:?}: {}", text(&read));
            succeeds(run("qemu-img", path, &["check", "-q", "image"]));
        }
    }
    // Nobody listens to complaints either.
    assert_eq!(code(&session(&writes, closed(), closed())), 1);
}

/// A line of the log that cannot be written: nobody reads it, or the file system of the log is full.
#[test]
fn a_log_that_cannot_be_written_stops_nothing() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    let closed = Stdio::from(OwnedFd::from(UnixStream::pair().expect("sockets").0));
    let full = Stdio::from(fs::File::options().write(true).open("/dev/full").expect("opens"));
    for errors in [closed, full] {
        succeeds(ours(path, &["create", "-q", "image", "1M"]));
        // The dirty bit: that the image is repaired goes to the log.
        let file = fs::File::options().write(true).open(path.join("image")).expect("opens");
        file.write_all_at(&[1], 79).expect("written");
        let mut command = Command::new(OURS);
        let command = command.args(["io", "-c", "write -P 3 0 64k", "image"]).current_dir(path);
        succeeds(command.stderr(errors).output().expect("starts"));
        succeeds(run("qemu-io", path, &["-r", "-c", "read -P 3 0 64k", "image"]));
    }
}

/// Bytes that are no text end a session; what came before them is in the image.
#[test]
fn a_session_that_cannot_read_its_commands_closes_its_image() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    succeeds(ours(path, &["create", "-q", "image", "1M"]));
    fs::write(path.join("commands"), b"write -P 3 0 64k\n\xff\nwrite -P 4 0 64k\n").expect("commands");
    let input = fs::File::open(path.join("commands")).expect("commands");
    let mut command = Command::new(OURS);
    let said = command.args(["io", "image"]).current_dir(path).stdin(input).output().expect("starts");
    assert_eq!(code(&said), 1);
    assert!(text(&said).contains("ublk-qcow2: standard input: "), "{}", text(&said));
    succeeds(run("qemu-io", path, &["-r", "-c", "read -P 3 0 64k", "image"]));
}

/// An fstrim over one mapping entry that makes no sense had the whole disk read-only for good. (QEMU's iotest
/// 060, "non-fatal corruption on freeing".)
#[test]
fn a_discard_over_an_entry_that_makes_no_sense_goes_on_as_in_qemu() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    for discard in ["discard 0 64k", "write -z 0 64k", "write -z -u 0 64k"] {
        // After zeros QEMU cannot read there: it keeps the place, as it is.
        let theirs = (discard == "discard 0 64k").then_some(("qemu-io", &["-f", "qcow2"][..]));
        for (program, args) in [(OURS, &["io"][..])].into_iter().chain(theirs) {
            succeeds(run("qemu-img", path, &["create", "-q", "-f", "qcow2", "image", "64M"]));
            succeeds(run("qemu-io", path, &["-f", "qcow2", "-c", "write -P 0x2a 0 64k", "image"]));
            let image = fs::File::options().write(true).open(path.join("image")).expect("opens");
            image.write_all_at(&0x8000_0000_0005_2a00_u64.to_be_bytes(), 0x4_0000).expect("damage");
            let commands = ["-c", discard, "-c", "read -P 0 0 64k", "-c", "write -P 9 1M 64k"];
            let said = succeeds(run(program, path, &[args, &commands, &["image"]].concat()));
            if program == OURS {
                let warned = said.matches("not cluster-aligned: a discard or zeros have replaced it").count();
                assert_eq!(warned, 1, "{discard}: {said}");
            }
            let check = ["check", "-f", "qcow2", "image"];
            let theirs = run("qemu-img", path, &check);
            assert_eq!(code(&theirs), 3, "{program}: {discard}: {}", text(&theirs));
            let ours = ours(path, &["check", "image"]);
            assert_eq!(code(&ours), 3, "{program}: {discard}: {}", text(&ours));
        }
    }
}

/// Names of backing files are an image's to choose. In errors, warnings and what `io` says of failed reads they came
/// as they are: one could steer the terminal, or put a line of its own into a server's log.
#[test]
fn names_in_an_image_neither_steer_a_terminal_nor_make_lines() {
    const NAME: &str = "a\x1b[31m\nERROR b";
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    let make = |name: &str, backing: &[&str]| {
        let args =
            [&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"], backing, &[name, "1M"]].concat();
        succeeds(run("qemu-img", path, &args));
    };
    make("image", &["-u", "-b", NAME, "-F", "qcow2"]);
    let told = |args: &[&str]| {
        let output = ours(path, args);
        let all = [&output.stdout[..], &output.stderr].concat();
        assert!(!all.iter().any(|byte| byte.is_ascii_control() && *byte != b'\n'), "{}", text(&output));
        assert!(
            !all.split(|byte| *byte == b'\n').any(|line| line.starts_with(b"ERROR b")),
            "{}",
            text(&output)
        );
        text(&output)
    };
    let read = ["io", "-r", "-c", "read 0 4k", "image"];
    assert!(told(&read).contains("cannot open"));
    // A name that is there, of an image whose refcount table cannot be one and whose L1 entry makes no sense.
    make(NAME, &[]);
    succeeds(run("qemu-io", path, &["-f", "qcow2", "-c", "write 0 4k", NAME]));
    let file = fs::File::options().write(true).read(true).open(path.join(NAME)).expect("made");
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 40).expect("the L1 table's offset");
    file.write_all_at(&[0xff; 8], u64::from_be_bytes(word)).expect("damaged");
    file.write_all_at(&[0, 0, 0, 0, 0, 0, 0, 1], 48).expect("damaged");
    let said = told(&read);
    assert!(said.contains("WARN") && said.contains("read failed"), "{said}");
}
