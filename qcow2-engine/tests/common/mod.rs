//! Images in memory, held against a plain array of bytes and against the real qemu-img.

pub(crate) mod hooked;

pub(crate) use qcow2_engine::exec::run_at_once as run;
use qcow2_engine::{
    CheckOptions, Image, Lane, OpenOptions, Pace, ZeroMode, check,
    io::{Buf, FileId, Storage, mem::MemFiles},
};
use qcow2_format::{Blueprint, CreateOptions};
use std::{future::Future, path::Path, pin::Pin, process::Command, sync::Arc};

pub(crate) const IMAGE: &str = "image.qcow2";

/// Writes a new, empty image into `files`.
pub(crate) fn create(files: &MemFiles, name: &str, options: &CreateOptions) {
    files.put(name, Blueprint::new(options).expect("sound options").to_bytes());
}

/// What a check finds, in words.
pub(crate) fn findings(files: &MemFiles) -> Vec<String> {
    let report = run(check(files, files, Path::new(IMAGE), CheckOptions::default())).expect("checks");
    report.found.list.iter().map(ToString::to_string).collect()
}

/// How many leaks a check finds, and nothing else.
pub(crate) fn leaks(files: &MemFiles) -> u64 {
    let found = run(check(files, files, Path::new(IMAGE), CheckOptions::default())).expect("checks").found;
    assert_eq!((found.corruptions, found.check_errors), (0, 0), "{:?}", found.list);
    found.leaks
}

/// Rests without doing anything.
pub(crate) struct Idle;

impl Pace for Idle {
    fn rest(&self) -> Pin<Box<dyn Future<Output = bool> + '_>> {
        Box::pin(std::future::ready(true))
    }
}

/// How long the image is, in bytes.
pub(crate) fn image_len(files: &MemFiles) -> u64 {
    files.len(FileId(0)).expect("a file")
}

/// An open image with the bytes that it should hold.
pub(crate) struct Mirror {
    pub(crate) files: MemFiles,
    pub(crate) lane: Lane<MemFiles>,
    pub(crate) bytes: Vec<u8>,
}

impl Mirror {
    pub(crate) fn open(files: &MemFiles, bytes: Vec<u8>) -> Self {
        let image = run(Image::open(files, files, Path::new(IMAGE), &OpenOptions::default())).expect("opens");
        Self::around(files, &image, bytes)
    }

    pub(crate) fn around(files: &MemFiles, image: &Arc<Image>, bytes: Vec<u8>) -> Self {
        assert_eq!(image.virtual_size(), bytes.len() as u64);
        Self { files: files.clone(), lane: Lane::new(image, files.clone(), 8), bytes }
    }

    pub(crate) fn write(&mut self, at: u64, byte: u8, len: usize) {
        let data: Vec<u8> = (0..len).map(|index| byte.wrapping_add((index / 512) as u8)).collect();
        run(self.lane.write(at, Buf::from_bytes(&data))).expect("write");
        self.bytes[at as usize..at as usize + len].copy_from_slice(&data);
    }

    pub(crate) fn write_zeroes(&mut self, at: u64, len: u64, mode: ZeroMode) {
        run(self.lane.write_zeroes(at, len, mode)).expect("write zeroes");
        self.bytes[at as usize..(at + len) as usize].fill(0);
    }

    pub(crate) fn discard(&mut self, at: u64, len: u64) {
        run(self.lane.discard(at, len)).expect("discard");
        let geometry = *self.lane.image().geometry();
        let first = geometry.clusters_for(at) << geometry.cluster_bits;
        let end = if at + len == geometry.virtual_size { at + len } else { geometry.cluster_start(at + len) };
        if first < end {
            self.bytes[first as usize..end as usize].fill(0);
        }
    }

    pub(crate) fn flush(&self) {
        run(self.lane.flush()).expect("flush");
    }

    /// Reads everything and compares.
    pub(crate) fn verify(&self) {
        for (index, expected) in self.bytes.chunks(1 << 20).enumerate() {
            let buf = Buf::zeroed(expected.len());
            let at = index as u64 * (1 << 20);
            run(self.lane.read(at, buf.clone())).expect("read");
            let found = buf.to_vec();
            if let Some(wrong) = found.iter().zip(expected).position(|(found, expected)| found != expected) {
                panic!("byte {} is {:#x}, not {:#x}", at as usize + wrong, found[wrong], expected[wrong]);
            }
        }
    }

    /// Closes the image; qemu-img must find it clean and with the same content.
    pub(crate) fn close_and_judge(self) {
        run(self.lane.close()).expect("close");
        let directory = tempfile::tempdir().expect("temporary directory");
        for name in self.lane.image().chain() {
            std::fs::write(directory.path().join(name), self.files.get(name).expect("kept")).expect("copy");
        }
        let image = directory.path().join(IMAGE);
        qemu_img(&["check", "-f", "qcow2"], &[&image]);
        let raw = directory.path().join("mirror.raw");
        std::fs::write(&raw, &self.bytes).expect("mirror");
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw"], &[&image, &raw]);
    }
}

fn qemu_img(args: &[&str], files: &[&Path]) {
    let output = Command::new("qemu-img")
        .args(args)
        .args(files)
        .output()
        .expect("qemu-img is installed: cargo xtask setup");
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
}
