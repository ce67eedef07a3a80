//! Image locks held against QEMU's own tools, in both directions. The images are opened as the daemon
//! does it, with real files and a ring.

use qcow2_engine::{
    Image, OpenOptions,
    exec::block_on,
    io::{
        Files,
        files::{Caching, Locking},
        uring::Uring,
    },
};
use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};

/// A chain top → middle (both qcow2) → base (raw).
struct Chain {
    dir: tempfile::TempDir,
}

impl Chain {
    fn new() -> Self {
        let chain = Self { dir: tempfile::tempdir().expect("a directory") };
        chain.img(&["create", "-q", "-f", "raw", "base", "16M"]).expect("made");
        chain.img(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "middle"]).expect("made");
        chain.img(&["create", "-q", "-f", "qcow2", "-b", "middle", "-F", "qcow2", "top"]).expect("made");
        chain
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs qemu-img; fails with what it says.
    fn img(&self, args: &[&str]) -> Result<(), String> {
        self.tool("qemu-img", args)
    }

    fn tool(&self, name: &str, args: &[&str]) -> Result<(), String> {
        let output = Command::new(name)
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .output()
            .expect("qemu-utils are installed: cargo xtask setup");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() && text.is_empty() { Ok(()) } else { Err(text) }
    }

    fn open(&self, name: &str, mode: Mode) -> Result<Open, String> {
        let locking = if mode == Mode::Shared { Locking::ForceShare } else { Locking::AsQemu };
        let files = Arc::new(Files::with_locking(Caching::Auto, locking));
        let ring = Uring::new(Arc::clone(&files), 8).expect("a ring");
        let options = OpenOptions { read_only: mode != Mode::ReadWrite, ..OpenOptions::default() };
        let image = block_on(&ring, Image::open(&ring, &*files, &self.path(name), &options)).expect("a ring");
        Ok(Open { _image: image.map_err(|error| error.to_string())?, _ring: ring })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    ReadWrite,
    ReadOnly,
    Shared,
}

/// An image that is open here, and closed when dropped.
struct Open {
    _image: Arc<Image>,
    _ring: Uring,
}

/// A qemu-io that has an image open until it is dropped.
struct QemuIo(Child);

impl QemuIo {
    fn start(path: &Path, args: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(args)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-utils are installed: cargo xtask setup");
        // It answers once the image is open.
        child.stdin.as_mut().expect("piped").write_all(b"length\n").expect("listens");
        let mut answer = String::new();
        BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut answer).expect("answers");
        assert!(answer.contains("16 MiB"), "{answer}");
        Self(child)
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn assert_refused(result: Result<impl Sized, String>, lock: &str) -> String {
    let text = result.err().expect("it is refused");
    assert!(text.contains(lock), "{text}");
    text
}

const SHARED_WRITE: &str = "Failed to get shared \"write\" lock";
const WRITE: &str = "Failed to get \"write\" lock";

#[test]
fn qemu_is_kept_off_an_image_that_we_write() {
    let chain = Chain::new();
    let open = chain.open("top", Mode::ReadWrite).expect("opens");
    for args in [&["info", "top"][..], &["check", "top"], &["compare", "top", "base"], &["map", "top"]] {
        assert_refused(chain.img(args), SHARED_WRITE);
    }
    assert_refused(chain.tool("qemu-io", &["-c", "write 0 4k", "top"]), WRITE);
    chain.img(&["info", "-U", "top"]).expect("sharing is possible");
    chain.img(&["check", "-U", "top"]).expect("sharing is possible");
    drop(open);
    chain.img(&["check", "top"]).expect("free, at once");
    chain.tool("qemu-io", &["-c", "write 0 4k", "top"]).expect("free, at once");
}

#[test]
fn qemu_reads_but_does_not_write_what_we_read() {
    let chain = Chain::new();
    for (name, mode, below) in [("top", Mode::ReadOnly, "top"), ("top", Mode::ReadWrite, "middle")] {
        let _open = chain.open(name, mode).expect("opens");
        chain.img(&["info", below]).expect("readers get on");
        chain.img(&["check", below]).expect("readers get on");
        assert_refused(chain.tool("qemu-io", &["-c", "write 0 4k", below]), WRITE);
        assert_refused(chain.img(&["resize", below, "32M"]), WRITE);
        assert_refused(chain.tool("qemu-io", &["-f", "raw", "-c", "write 0 4k", "base"]), WRITE);
    }
    chain.tool("qemu-io", &["-f", "raw", "-c", "write 0 4k", "base"]).expect("free, at once");
}

#[test]
fn we_keep_off_an_image_that_qemu_writes() {
    let chain = Chain::new();
    let qemu = QemuIo::start(&chain.path("top"), &[]);
    for mode in [Mode::ReadWrite, Mode::ReadOnly] {
        let lock = if mode == Mode::ReadWrite { "\"write\" lock" } else { "shared \"write\" lock" };
        let text = assert_refused(chain.open("top", mode), lock);
        let who = format!("qemu-io (process {})", qemu.0.id());
        assert!(text.contains("/top: ") && text.contains(&who) && text.contains("--force-share"), "{text}");
    }
    chain.open("top", Mode::Shared).expect("sharing is possible");
    chain.open("middle", Mode::ReadOnly).expect("a backing file has many readers");
    let text = assert_refused(chain.open("middle", Mode::ReadWrite), "\"write\" lock");
    assert!(text.contains("/middle: "), "{text}");
    drop(qemu);
    chain.open("top", Mode::ReadWrite).expect("free");
}

#[test]
fn we_keep_off_an_overlay_whose_backing_file_qemu_writes() {
    let chain = Chain::new();
    let qemu = QemuIo::start(&chain.path("middle"), &[]);
    for mode in [Mode::ReadWrite, Mode::ReadOnly] {
        let text = assert_refused(chain.open("top", mode), "shared \"write\" lock");
        assert!(text.contains("/middle: "), "{text}");
    }
    drop(qemu);
    let _qemu = QemuIo::start(&chain.path("base"), &["-f", "raw"]);
    let text = assert_refused(chain.open("top", Mode::ReadWrite), "shared \"write\" lock");
    assert!(text.contains("/base: "), "{text}");
}

#[test]
fn readers_share_here_as_well() {
    let chain = Chain::new();
    let _qemu = QemuIo::start(&chain.path("top"), &["-r"]);
    let one = chain.open("top", Mode::ReadOnly).expect("opens");
    let two = chain.open("top", Mode::ReadOnly).expect("opens");
    assert_refused(chain.open("top", Mode::ReadWrite), "\"write\" lock");
    drop((one, two));
}

#[test]
fn a_file_that_an_image_has_twice_is_not_in_its_own_way() {
    let chain = Chain::new();
    // Overlay and backing file are one: a loop, and told as one.
    chain.img(&["create", "-q", "-f", "qcow2", "loop", "16M"]).expect("made");
    chain.img(&["rebase", "-u", "-b", "loop", "-F", "qcow2", "loop"]).expect("changed");
    assert_refused(chain.open("loop", Mode::ReadWrite), "a loop");
}
