//! `create`, `info`, `check` and `io` of the real binary, held against qemu-img and qemu-io.

mod create;
mod info;

use serde_json::Value;
use std::{
    fs,
    io::Write,
    os::{
        fd::OwnedFd,
        unix::{fs::FileExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

const OURS: &str = env!("CARGO_BIN_EXE_ublk-qcow2");

fn run(program: &str, directory: &Path, args: &[&str]) -> Output {
    Command::new(program)
        .args(args)
        .current_dir(directory)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; cargo xtask setup installs it"))
}

fn ours(directory: &Path, args: &[&str]) -> Output {
    run(OURS, directory, args)
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

fn succeeds(output: Output) -> String {
    assert!(output.status.success(), "{}", text(&output));
    text(&output)
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("an exit code")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(output)))
}

/// Runs a script on standard input.
fn scripted(program: &str, directory: &Path, args: &[&str], script: &str) -> Output {
    fs::write(directory.join("script"), script).expect("script");
    let input = fs::File::open(directory.join("script")).expect("script");
    let mut command = Command::new(program);
    command.args(args).current_dir(directory).stdin(Stdio::from(input));
    command.output().expect("starts")
}

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

const DISK: u64 = 3 << 20;

/// Commands at any byte, and some at whole sectors that are in flight together.
fn script(seed: u64, discards: bool) -> String {
    let mut dice = Dice(seed);
    let mut script = String::new();
    for _ in 0..60 {
        let at = dice.roll(DISK);
        let len = 1 + dice.roll((DISK - at).min(200_000));
        let pattern = dice.roll(256);
        script += &match dice.roll(8) {
            0 => format!("write -z {at} {len}\n"),
            1 => format!("write -z -u {at} {len}\n"),
            2 if discards => format!("discard {} 64k\n", at / 65536 * 65536),
            3 => {
                let sector = (at / 512).min(DISK / 512 - 40);
                let writes =
                    (0..4).map(|part| format!("aio_write -P {pattern} {} 4096\n", (sector + 8 * part) * 512));
                writes.chain(["aio_flush\n".to_owned()]).collect()
            }
            4 => "flush\n".into(),
            _ => format!("write -P {pattern} {at} {len}\nread -P {pattern} {at} {len}\n"),
        };
    }
    script
}

#[test]
fn images_that_we_make_and_write_are_as_if_qemu_had() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    let base: Vec<u8> = (0..2_000_000_u32).map(|index| (index / 512) as u8 | 1).collect();
    fs::write(path.join("base.raw"), base).expect("base");
    succeeds(run(
        "qemu-img",
        path,
        &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2"],
    ));
    succeeds(run("qemu-io", path, &["-f", "qcow2", "-c", "write -P 77 300000 400000", "mid.qcow2"]));
    let backings = [&[][..], &["-b", "base.raw", "-F", "raw"], &["-b", "mid.qcow2", "-F", "qcow2"]];
    let mut seed = 0;
    for options in [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "compat=0.10",
        "cluster_size=64k,refcount_bits=64,lazy_refcounts=on",
        "cluster_size=2M,compression_type=zstd",
        "preallocation=metadata",
        "preallocation=falloc,cluster_size=4k",
    ] {
        for backing in backings {
            if !backing.is_empty() && options.contains("preallocation") {
                continue;
            }
            seed += 1;
            let story = format!("{options} {backing:?} seed {seed}");
            let make =
                |name| [&["create", "-q", "-f", "qcow2", "-o", options][..], backing, &[name, "3M"]].concat();
            succeeds(ours(path, &make("ours.qcow2")));
            succeeds(run("qemu-img", path, &make("theirs.qcow2")));
            succeeds(run("qemu-img", path, &["check", "-q", "ours.qcow2"]));
            succeeds(run("qemu-img", path, &["compare", "-q", "ours.qcow2", "theirs.qcow2"]));

            // What a discard of less than a cluster does is up to the implementation. (Version 2 cannot
            // discard over a backing file, which is no failure: `io` said that it was one.)
            let discards = !options.contains("2M");
            let script = script(seed, discards);
            let said = succeeds(scripted(OURS, path, &["io", "ours.qcow2"], &script));
            assert!(!said.contains("failed"), "{story}: {said}");
            succeeds(scripted("qemu-io", path, &["-f", "qcow2", "theirs.qcow2"], &script));
            let compared = run("qemu-img", path, &["compare", "ours.qcow2", "theirs.qcow2"]);
            assert_eq!(code(&compared), 0, "{story}: {}", text(&compared));
            succeeds(run("qemu-img", path, &["check", "-q", "ours.qcow2"]));
            succeeds(ours(path, &["check", "ours.qcow2"]));
            succeeds(ours(path, &["check", "theirs.qcow2"]));
        }
    }
}

#[test]
fn a_new_overlay_has_the_size_of_its_backing_file_and_failures_leave_nothing() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    fs::create_dir(path.join("sub")).expect("directory");
    fs::write(path.join("sub/odd.raw"), vec![1; 70_001]).expect("base");
    succeeds(ours(path, &["create", "-b", "odd.raw", "-F", "raw", "sub/a.qcow2"]));
    succeeds(ours(path, &["create", "-b", "a.qcow2", "-F", "qcow2", "sub/b.qcow2"]));
    // Of this one qemu-img shows what overlays see.
    let odd = fs::File::options().write(true).open(path.join("sub/b.qcow2")).expect("opens");
    odd.write_all_at(&70_001_u64.to_be_bytes(), 24).expect("written");
    succeeds(ours(path, &["create", "-b", "b.qcow2", "-F", "qcow2", "sub/c.qcow2"]));
    succeeds(run(
        "qemu-img",
        path,
        &["create", "-q", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", "sub/d"],
    ));
    for (name, size) in
        [("sub/a.qcow2", 70_144), ("sub/b.qcow2", 69_632), ("sub/c.qcow2", 69_632), ("sub/d", 69_632)]
    {
        let info = json(&run("qemu-img", path, &["info", "--output=json", name]));
        assert_eq!(info["virtual-size"], size, "{name}");
    }
    // What does not show now does not show in a new part either.
    succeeds(ours(path, &["resize", "sub/c.qcow2", "1M"]));
    succeeds(run("qemu-img", path, &["resize", "-q", "sub/d", "1M"]));
    succeeds(run("qemu-img", path, &["compare", "-q", "sub/c.qcow2", "sub/d"]));
    succeeds(ours(path, &["create", "-u", "-b", "none.raw", "-F", "raw", "c.qcow2", "1M"]));
    fs::copy(path.join("c.qcow2"), path.join("kept.qcow2")).expect("copy");
    for bad in [
        &["create", "-b", "kept.qcow2", "new.qcow2"][..],
        &["create", "new.qcow2"],
        &["create", "-u", "-b", "none.raw", "-F", "raw", "new.qcow2"],
        &["create", "-b", "none.raw", "-F", "raw", "new.qcow2"],
        &["create", "-o", "cluster_size=1000", "new.qcow2", "1M"],
        &["create", "-o", "compat=0.10,refcount_bits=1", "new.qcow2", "1M"],
        &["create", "-b", "kept.qcow2", "-F", "qcow2", "kept.qcow2"],
        &["create", "-o", "preallocation=metadata", "-u", "-b", "x", "-F", "raw", "kept.qcow2", "1M"],
    ] {
        assert_ne!(code(&ours(path, bad)), 0, "{bad:?}");
    }
    assert!(!path.join("new.qcow2").exists());
    let content = |name| fs::read(path.join(name)).expect("readable");
    assert_eq!(content("kept.qcow2"), content("c.qcow2"));
}

/// Every field of `ours` is in `theirs` with the same value, but for what is known to differ.
fn assert_agrees(ours: &Value, theirs: &Value, at: &str) {
    // Features by name are our addition; QEMU rounds the file's length up to a sector; the space
    // that a file takes changes with time.
    if ["/features", "/children", "/actual-size"].contains(&at) {
        return;
    }
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for (name, value) in ours {
                assert_agrees(value, theirs.get(name).unwrap_or(&Value::Null), &format!("{at}/{name}"));
            }
        }
        (Value::Array(ours), Value::Array(theirs)) if ours.len() == theirs.len() => {
            ours.iter().zip(theirs).for_each(|(ours, theirs)| assert_agrees(ours, theirs, at));
        }
        _ => assert_eq!(ours, theirs, "{at}"),
    }
}

#[test]
fn info_says_what_qemu_img_says() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    succeeds(run("qemu-img", path, &["create", "-q", "-f", "raw", "base.raw", "5M"]));
    for (name, options, extra) in [
        ("plain.qcow2", "cluster_size=4k,refcount_bits=64", &[][..]),
        ("old.qcow2", "compat=0.10", &[]),
        ("zstd.qcow2", "compression_type=zstd,lazy_refcounts=on", &[]),
        ("subclusters.qcow2", "extended_l2=on", &[]),
        ("overlay.qcow2", "compat=1.1", &["-b", "base.raw", "-F", "raw"]),
        ("data.qcow2", "data_file=data.raw,data_file_raw=on", &[]),
    ] {
        let args = [&["create", "-q", "-f", "qcow2", "-o", options][..], extra, &[name, "5M"]].concat();
        succeeds(run("qemu-img", path, &args));
        if name == "plain.qcow2" {
            succeeds(run("qemu-img", path, &["snapshot", "-c", "first", name]));
            succeeds(run("qemu-img", path, &["bitmap", "--add", "-g", "8192", name, "dirt"]));
        }
        let theirs = json(&run("qemu-img", path, &["info", "--output=json", name]));
        let said = json(&ours(path, &["info", "--output=json", name]));
        assert_eq!(said, json(&ours(path, &["info", "--json", name])));
        assert_agrees(&said, &theirs, "");
        assert_agrees(&theirs["format-specific"], &said["format-specific"], "");
        assert_agrees(&theirs["snapshots"], &said["snapshots"], "");
        succeeds(ours(path, &["info", name]));
        let human = succeeds(ours(path, &["info", "--output=human", name]));
        assert!(human.starts_with("image: "), "{human}");
    }
    // Nothing but the image itself is opened.
    fs::remove_file(path.join("base.raw")).expect("removed");
    assert!(succeeds(ours(path, &["info", "overlay.qcow2"])).contains("backing file: base.raw"));
}

#[test]
fn resize_takes_what_qemu_img_takes() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    for name in ["ours", "theirs"] {
        succeeds(ours(path, &["create", "-q", name, "1M"]));
    }
    let size = |name| json(&run("qemu-img", path, &["info", "--output=json", name]))["virtual-size"].as_u64();
    for args in [
        &["IMAGE", "+1M"][..],
        &["-f", "qcow2", "IMAGE", "+512"],
        &["IMAGE", "+0"],
        &["-f", "qcow2", "IMAGE", "5M"],
    ] {
        let args = |name: &'static str| -> Vec<_> {
            ["resize"].iter().chain(args).map(|arg| if *arg == "IMAGE" { name } else { arg }).collect()
        };
        succeeds(ours(path, &args("ours")));
        succeeds(run("qemu-img", path, &args("theirs")));
        assert_eq!(size("ours"), size("theirs"), "{:?}", args("ours"));
    }
    assert_eq!(size("ours"), Some(5 << 20));
    for bad in [
        &["ours", "+16E"][..],
        &["ours", "+"],
        &["ours", "++1M"],
        &["ours", "+15E"],
        &["-f", "raw", "ours", "6M"],
    ] {
        assert_ne!(code(&ours(path, &[&["resize"], bad].concat())), 0, "{bad:?}");
    }
    assert_eq!(size("ours"), Some(5 << 20));
    succeeds(run("qemu-img", path, &["check", "-q", "ours"]));
}

/// QEMU reads a name with a protocol as it stands: it is not beside the image, and neither is what `file:`
/// names.
#[test]
fn names_with_a_protocol_are_not_looked_for_beside_the_image() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    fs::create_dir(path.join("images")).expect("directory");
    for (base, byte) in [("images/base", 0xaa), ("base", 0xcc)] {
        fs::write(path.join(base), vec![byte; 1 << 20]).expect("base");
    }
    let absolute = format!("file:{}/base", path.display());
    for name in
        ["file:base", &absolute, "nbd:localhost:10809", "json:{}", "./a:b", "/a:b", "base", "sub/base", "a b"]
    {
        succeeds(run(
            "qemu-img",
            path,
            &["create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", "images/i", "1M"],
        ));
        let theirs = run("qemu-img", path, &["info", "--output=json", "images/i"]);
        assert_agrees(&json(&ours(path, &["info", "--json", "images/i"])), &json(&theirs), "");
        let line = |output: Output| {
            let text = succeeds(output);
            text.lines().find(|line| line.starts_with("backing file:")).map(str::to_owned)
        };
        let said = line(ours(path, &["info", "images/i"]));
        assert_eq!(said, line(run("qemu-img", path, &["info", "images/i"])));
        let read = ["-r", "-c", "read -P 0xcc 0 1M", "images/i"];
        let read = (ours(path, &[&["io"][..], &read].concat()), run("qemu-io", path, &read));
        if name == absolute {
            assert_eq!((code(&read.0), code(&read.1)), (0, 0), "{}{}", text(&read.0), text(&read.1));
        } else if name == "file:base" {
            // QEMU reads the one where it was started; a server has another working directory.
            assert_eq!((code(&read.0), code(&read.1)), (1, 0), "{}{}", text(&read.0), text(&read.1));
            assert!(text(&read.0).contains("relative to the working directory"), "{}", text(&read.0));
        }
    }
    let refused = ours(path, &["create", "-b", "file:base", "-F", "raw", "images/new"]);
    assert!(text(&refused).contains("relative to the working directory"), "{}", text(&refused));
    assert!(!path.join("images/new").exists());
}

#[test]
fn check_has_the_exit_codes_of_qemu_img_and_repairs() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    let check = |args: &[&str]| ours(path, &[&["check"][..], args, &["image.qcow2"]].concat());
    let theirs = || run("qemu-img", path, &["check", "-f", "qcow2", "image.qcow2"]);
    succeeds(ours(path, &["create", "-q", "image.qcow2", "16M"]));
    succeeds(ours(path, &["io", "-c", "write 0 1M", "image.qcow2"]));
    assert_eq!((code(&check(&[])), code(&theirs())), (0, 0));

    // The refcount block is the third cluster. A cluster that is counted and that nobody uses:
    let file = fs::File::options().read(true).write(true).open(path.join("image.qcow2")).expect("opens");
    let len = file.metadata().expect("metadata").len();
    let (count_of_last, count_of_new) = (2 * 65536 + 2 * (len / 65536 - 1), 2 * 65536 + 2 * len / 65536);
    file.set_len(len + 65536).expect("longer");
    file.write_all_at(&[0, 1], count_of_new).expect("damage");
    assert_eq!(json(&check(&["--json"]))["leaks"], 1);
    assert_eq!((code(&check(&[])), code(&theirs())), (3, 3));
    let repaired = check(&["-r", "leaks"]);
    assert!(text(&repaired).contains("1 leaked clusters"), "{}", text(&repaired));
    assert_eq!((code(&repaired), code(&theirs())), (0, 0));

    // A count too low:
    file.write_all_at(&[0, 0], count_of_last).expect("damage");
    assert_eq!((code(&check(&["-q"])), code(&theirs())), (2, 2));
    assert_eq!(code(&check(&["--repair", "leaks"])), 2);
    assert_eq!((code(&check(&["--repair", "all"])), code(&theirs()), code(&check(&[]))), (0, 0, 0));

    fs::remove_file(path.join("image.qcow2")).expect("removed");
    assert_eq!((code(&check(&[])), code(&theirs())), (1, 1));
}

/// Scripts ask for `--output=json`, which was an option that is not known.
#[test]
fn check_prints_the_fields_that_qemu_img_prints() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    succeeds(ours(path, &["create", "-q", "image", "16M"]));
    let file = fs::File::options().read(true).write(true).open(path.join("image")).expect("opens");
    let agree = |what: &str, args: &[&str]| {
        let line = |name| [&["check", "-f", "qcow2", "--output=json"][..], args, &[name]].concat();
        fs::copy(path.join("image"), path.join("theirs")).expect("copy");
        let (said, theirs) = (ours(path, &line("image")), run("qemu-img", path, &line("theirs")));
        assert_eq!(code(&said), code(&theirs), "{what}: {}", text(&said));
        let (mut said, mut theirs) = (json(&said), json(&theirs));
        for (json, name) in [(&mut said, "image"), (&mut theirs, "theirs")] {
            let fields = json.as_object_mut().expect("an object");
            assert_eq!(fields.remove("filename"), Some(name.into()), "{what}");
            if args.contains(&"all") {
                // Where QEMU has put its new refcounts.
                assert!(fields.remove("image-end-offset").is_some(), "{what}");
            }
        }
        assert_eq!(said, theirs, "{what}");
    };
    agree("nothing allocated", &[]);
    succeeds(ours(path, &["io", "-c", "write 0 1M", "-c", "write 3M 64k", "image"]));
    succeeds(run("qemu-io", path, &["-f", "qcow2", "-c", "write -c 5M 64k", "image"]));
    agree("all kinds of clusters", &[]);
    // The refcount block is the third cluster, and the L1 table the fourth; one cluster counted that nobody
    // uses, one not counted.
    let len = file.metadata().expect("metadata").len().next_multiple_of(65536);
    file.set_len(len + 65536).expect("longer");
    file.write_all_at(&[0, 1], 2 * 65536 + 2 * len / 65536).expect("damage");
    agree("a leak", &[]);
    agree("a leak, repaired", &["-r", "leaks"]);
    file.write_all_at(&[0, 0], 2 * 65536 + 2 * 3).expect("damage");
    agree("a count too low", &[]);
    agree("a count too low, repaired", &["-r", "all"]);
    assert!(succeeds(ours(path, &["check", "--output=human", "image"])).contains("No errors were found"));
}

/// A script that runs `check` with an option that is not there was told of corruptions: clap exits with 2.
#[test]
fn a_command_line_that_is_none_is_no_verdict() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    succeeds(ours(path, &["create", "-q", "image", "1M"]));
    for args in [
        &["check", "--nonsense", "image"][..],
        &["check", "--repair", "some", "image"],
        &["check"],
        &["create", "-o", "cluster_size=x", "new", "1M"],
        &["create", "new", "many"],
    ] {
        assert_eq!((code(&ours(path, args)), code(&run("qemu-img", path, args))), (1, 1), "{args:?}");
    }
    for args in [&[][..], &["nonsense"]] {
        let said = ours(path, args);
        assert_eq!((code(&said), said.stdout.len()), (1, 0), "{args:?}: {}", text(&said));
    }
    for args in [&["--help"][..], &["check", "--help"], &["--version"]] {
        let said = ours(path, args);
        assert_eq!((code(&said), said.stderr.len()), (0, 0), "{args:?}: {}", text(&said));
    }
}

/// qemu-img has 63 for what is no QCOW2 image, and 1 for one that it cannot open.
#[test]
fn check_tells_files_that_are_no_images_from_images_that_cannot_be_read() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    succeeds(ours(path, &["create", "-q", "image.qcow2", "16M"]));
    succeeds(run("qemu-img", path, &["create", "-q", "-f", "qcow", "old.qcow", "16M"]));
    let sound = fs::read(path.join("image.qcow2")).expect("image");
    let patched = |at: usize, byte: u8| {
        let mut bytes = sound.clone();
        bytes[at] = byte;
        bytes
    };
    for (what, bytes, expected) in [
        ("text", b"no image at all".to_vec(), 63),
        ("a word", b"text".to_vec(), 63),
        ("nothing", Vec::new(), 63),
        ("zeros", vec![0; 4096], 63),
        ("another magic", patched(0, b'X'), 63),
        ("another magic, cut off", patched(0, b'X')[..50].to_vec(), 63),
        ("QCOW", fs::read(path.join("old.qcow")).expect("image"), 63),
        ("version 0", patched(7, 0), 63),
        ("less than a version", sound[..7].to_vec(), 63),
        ("a magic and a version", sound[..8].to_vec(), 1),
        ("half a header", sound[..50].to_vec(), 1),
        ("a version 2 header of version 3", sound[..72].to_vec(), 1),
        ("version 4", patched(7, 4), 1),
        ("version 9, cut off", patched(7, 9)[..50].to_vec(), 1),
        ("an unknown incompatible bit", patched(78, 0x80), 1),
        ("clusters of 32 bytes", patched(23, 5), 1),
    ] {
        fs::write(path.join("image"), bytes).expect("written");
        let (said, theirs) = (ours(path, &["check", "image"]), run("qemu-img", path, &["check", "image"]));
        assert_eq!((code(&said), code(&theirs)), (expected, expected), "{what}: {}", text(&said));
    }
}

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

/// A file of a few hundred KiB whose header, L1 table and refcount table claim petabytes. What `info`,
/// `check` and a repair cost must follow the file, so they get 256 MiB of address space.
#[test]
fn a_tiny_file_that_claims_petabytes_costs_little() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    // An L1 table for 2 PiB at 2 MiB clusters, all of whose entries name an L2 table far out.
    succeeds(run("qemu-img", path, &["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "i", "2P"]));
    let file = fs::OpenOptions::new().read(true).write(true).open(path.join("i")).expect("image");
    let word = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).expect("read");
        u64::from_be_bytes(bytes)
    };
    let (l1, refcount_table) = (word(40), word(48));
    for index in 0..4096 {
        let entry = (1 << 63) | ((1 << 50) + (index << 21));
        file.write_all_at(&u64::to_be_bytes(entry), l1 + index * 8).expect("write");
        file.write_all_at(&u64::to_be_bytes((1 << 50) + (index << 21)), refcount_table + 8 + index * 8)
            .expect("write");
    }
    let limited = |args: &[&str]| {
        let script = "ulimit -v 262144; exec timeout 60 \"$0\" \"$@\"";
        run("sh", path, &[&["-c", script, OURS], args].concat())
    };
    succeeds(limited(&["info", "i"]));
    for args in
        [&["check", "i"][..], &["check", "--repair", "all", "i"], &["check", "--repair", "leaks", "i"]]
    {
        let output = limited(args);
        let text = text(&output);
        assert!(matches!(code(&output), 0..=3), "{args:?}: {text}");
        assert!(!text.contains("memory") && !text.contains("panicked"), "{args:?}: {text}");
    }
}

#[test]
fn backing_files_are_opened_by_policy_and_never_by_info() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    fs::write(path.join("base"), vec![7; 1 << 20]).expect("base");
    succeeds(run("qemu-img", path, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "i"]));
    let io = |args: &[&str]| ours(path, &[&["io", "-r", "-c", "read -P 7 0 64k"], args, &["i"]].concat());
    succeeds(io(&[]));
    succeeds(io(&["--backing-dir", "."]));
    assert!(text(&io(&["--no-backing"])).contains("names the backing file"));
    assert!(text(&io(&["--backing-dir", "/usr"])).contains("is not below a directory"));
    fs::remove_file(path.join("base")).expect("base");
    assert!(succeeds(ours(path, &["info", "i"])).contains("backing file: base"));
}

/// `io` and `resize` of an image that does not say its backing file's format advised an option that only
/// `add` had.
#[test]
fn the_format_of_a_backing_file_can_be_given_wherever_it_is_asked_for() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    fs::write(path.join("base"), vec![7; 1 << 20]).expect("base");
    succeeds(run("qemu-img", path, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "i"]));
    // The extension's type becomes one that nobody knows.
    let image = fs::File::options().read(true).write(true).open(path.join("i")).expect("opens");
    let mut extension = [0; 4];
    image.read_exact_at(&mut extension, 112).expect("read");
    assert_eq!(u32::from_be_bytes(extension), 0xe279_2aca, "the format of the backing file");
    image.write_all_at(&[1], 112).expect("written");
    let asked_for = || {
        for args in [&["io", "-c", "read -P 7 0 64k", "i"][..], &["resize", "i", "+1M"]] {
            let refused = ours(path, args);
            assert_eq!(code(&refused), 1);
            assert!(text(&refused).contains("--backing-format"), "{}", text(&refused));
            succeeds(ours(path, &[args, &["--backing-format", "raw"]].concat()));
        }
    };
    asked_for();
    // A format that is not served could not be overridden. (QEMU's iotest 114.)
    image.write_all_at(&extension, 112).expect("written");
    image.write_all_at(b"foo", 120).expect("written");
    asked_for();
    let info = json(&run("qemu-img", path, &["info", "--output=json", "i"]));
    assert_eq!(info["virtual-size"], 3 << 20);
    assert_eq!(code(&ours(path, &["resize", "--no-backing", "--backing-format=raw", "i", "+1M"])), 1);
}
