//! What `check` says of images, and how it ends.

use super::*;

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
