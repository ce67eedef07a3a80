//! `create`, `info`, `check` and `io` of the real binary, held against qemu-img and qemu-io.

mod check;
mod create;
mod info;
mod io;

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
        &["ours", "+1"],
        &["ours", "5242881"],
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
