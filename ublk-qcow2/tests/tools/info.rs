//! `info`, and the words of `check` and `io`, as qemu-img and qemu-io have them.

use super::*;

/// What both say, without the file's own length and use of space: QEMU rounds the one up to a sector, and the
/// other changes with time.
fn words(output: Output) -> Vec<String> {
    let said = succeeds(output);
    let is_kept =
        |line: &&str| !line.trim_start().starts_with("file length:") && !line.contains("disk size:");
    said.lines().filter(is_kept).map(str::to_owned).collect()
}

/// The text had lines of its own for features, bitmaps in a form of its own, and a snapshot list whose columns
/// were a character wider: whoever reads qemu-img's text did not find theirs. (Iotest 065.)
#[test]
fn the_text_of_info_is_that_of_qemu_img() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    fs::write(path.join("base"), vec![1; 1 << 20]).expect("base");
    let set = |at: u64, byte: u8| {
        let file = fs::File::options().write(true).open(path.join("image")).expect("opens");
        file.write_all_at(&[byte], at).expect("written");
    };
    for options in [
        &["-o", "cluster_size=4k,refcount_bits=64", "image", "5M"][..],
        &["-o", "compat=0.10", "image", "5M"],
        &["-o", "compression_type=zstd,lazy_refcounts=on", "image", "5M"],
        &["-o", "extended_l2=on", "image", "5M"],
        &["-b", "base", "-F", "raw", "image"],
        &["-o", "data_file=data,data_file_raw=on", "image", "5M"],
        &["--object", "secret,id=s,data=abc", "-o", "encrypt.format=aes,encrypt.key-secret=s", "image", "5M"],
    ] {
        let agree = |what: &str| {
            let theirs = words(run("qemu-img", path, &["info", "image"]));
            assert_eq!(words(ours(path, &["info", "image"])), theirs, "{options:?}, {what}");
        };
        succeeds(run("qemu-img", path, &[&["create", "-q", "-f", "qcow2"], options].concat()));
        agree("new");
        if options[1].contains("refcount_bits") {
            succeeds(run("qemu-img", path, &["snapshot", "-c", "first", "image"]));
            succeeds(run("qemu-img", path, &["snapshot", "-c", "of a name that fills its column", "image"]));
            agree("snapshots");
            succeeds(run("qemu-img", path, &["bitmap", "--add", "-g", "8192", "image", "dirt"]));
            succeeds(run("qemu-img", path, &["bitmap", "--add", "--disable", "image", "off"]));
            agree("bitmaps");
        }
        if !options[1].contains("0.10") {
            // A compatible bit and an autoclear bit that nobody knows.
            set(86, 1);
            set(94, 2);
            let said = words(ours(path, &["info", "image"]));
            let unknown = |line: &&String| line.contains("bit 8") || line.contains("bit 9");
            assert_eq!(said.iter().filter(unknown).count(), 2, "{said:?}");
        }
    }
}

/// `info` described images of which nobody knows what their fields mean, and said that all was well. (Iotest
/// 036.)
#[test]
fn images_of_unknown_make_are_not_described() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    succeeds(ours(path, &["create", "-q", "image", "1M"]));
    let file = fs::File::options().write(true).open(path.join("image")).expect("opens");
    file.write_all_at(&[0x80], 72).expect("written");
    for args in [&["info", "image"][..], &["info", "--output=json", "image"]] {
        for program in [OURS, "qemu-img"] {
            let said = run(program, path, args);
            assert_eq!((code(&said), said.stdout.len()), (1, 0), "{program}: {}", text(&said));
        }
        assert!(text(&ours(path, args)).contains("bit 63"));
    }
}

/// A header of 512 bytes has no room for names: the features that the specification defines were numbers then.
#[test]
fn features_have_names_where_the_image_has_no_room_for_them() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    let options = "cluster_size=512,compression_type=zstd,lazy_refcounts=on";
    succeeds(run("qemu-img", path, &["create", "-q", "-f", "qcow2", "-o", options, "image", "1M"]));
    let said = text(&ours(path, &["info", "--output=json", "image"]));
    for name in ["compression type", "lazy refcounts"] {
        assert!(said.contains(&format!("\"{name}\"")), "{name}: {said}");
    }
}

/// An image whose bitmaps or L1 table lie beyond its end could not be described at all, where QEMU describes
/// it; `check` has to say what is wrong.
#[test]
fn images_that_are_cut_off_are_described() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    let make = || {
        succeeds(run("qemu-img", path, &["create", "-q", "-f", "qcow2", "image", "1M"]));
        for name in ["one", "two"] {
            succeeds(run("qemu-img", path, &["bitmap", "--add", "image", name]));
        }
        fs::File::options().read(true).write(true).open(path.join("image")).expect("opens")
    };
    let agree = |what: &str| {
        let theirs = words(run("qemu-img", path, &["info", "image"]));
        assert_eq!(words(ours(path, &["info", "image"])), theirs, "{what}");
        assert_eq!(code(&ours(path, &["check", "image"])), 2, "{what}");
        assert_eq!(code(&run("qemu-img", path, &["check", "image"])), 2, "{what}");
    };
    let far = 0x1000_0000_u64.to_be_bytes();
    let file = make();
    let mut directory = [0; 8];
    // The bitmaps extension is the second one, behind the feature names.
    file.read_exact_at(&mut directory, 112 + 8 + 384 + 8 + 16).expect("read");
    file.write_all_at(&far, u64::from_be_bytes(directory)).expect("written");
    agree("a bitmap's table");

    make().write_all_at(&far, 40).expect("written");
    agree("the L1 table");
}

/// Scripts that cut qemu-img's text at its empty lines, or wait for the second look, found neither.
#[test]
fn the_text_of_check_is_that_of_qemu_img() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    succeeds(ours(path, &["create", "-q", "image", "16M"]));
    succeeds(ours(path, &["io", "-c", "write 0 1M", "image"]));
    let file = fs::File::options().write(true).open(path.join("image")).expect("opens");
    let len = file.metadata().expect("metadata").len().next_multiple_of(65536);
    let agree = |what: &str, args: &[&str]| {
        fs::copy(path.join("image"), path.join("theirs")).expect("copied");
        let said = ours(path, &[&["check"], args, &["image"]].concat());
        let theirs = run("qemu-img", path, &[&["check"], args, &["theirs"]].concat());
        let words = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!((code(&said), words(&said)), (code(&theirs), words(&theirs)), "{what}");
    };
    agree("sound", &[]);
    agree("sound, repaired", &["-r", "all"]);
    // The refcount block is the third cluster: two clusters are counted that nobody uses.
    let leak = || {
        file.set_len(len + 2 * 65536).expect("longer");
        file.write_all_at(&[0, 1, 0, 1], 2 * 65536 + 2 * len / 65536).expect("damage");
    };
    leak();
    agree("leaks", &[]);
    agree("leaks, repaired", &["-r", "leaks"]);
    leak();
    agree("leaks, repaired with all", &["-r", "all"]);
    leak();
    // The first cluster of data is the one behind the L2 table: it is counted twice.
    file.write_all_at(&[0, 2], 2 * 65536 + 2 * 5).expect("damage");
    agree("leaks and a count too high", &[]);
}

#[test]
fn a_dump_is_that_of_qemu_io() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path();
    fs::write(path.join("bytes"), (0..=255).collect::<Vec<u8>>()).expect("written");
    succeeds(ours(path, &["create", "-q", "image", "1M"]));
    succeeds(ours(path, &["io", "-c", "write -s bytes 0 512", "image"]));
    for range in ["0 512", "100 33"] {
        let commands = ["-r", "-c", &format!("read -v {range}"), "image"];
        let dump = |output: Output| {
            let said = succeeds(output);
            let is_dump = |line: &&str| line.contains(":  ");
            said.lines().filter(is_dump).map(str::to_owned).collect::<Vec<_>>()
        };
        let theirs = dump(run("qemu-io", path, &[&["-f", "qcow2"][..], &commands].concat()));
        assert!(!theirs.is_empty());
        assert_eq!(dump(ours(path, &[&["io"][..], &commands].concat())), theirs, "{range}");
    }
}
