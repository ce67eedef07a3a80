//! An image in which everything lies beside everything else: compressed, zero and plain clusters in one L2
//! table, two snapshots, and tables that the image shares with both, with one, or no longer.

use super::{
    model::{INITIAL, Value},
    workload::{Fixture, IMAGE, Initial, Maker, Past, SECTORS, Variant},
};
use std::{io, ops::Range};

/// What was done to it. In whole clusters of the largest size, so that every variant has the same.
const STEPS: [Step; 16] = [
    Step::Compressed,
    Step::Data(16..40),
    Step::Zero(24..32),
    Step::Unmap(64..88),
    Step::Data(96..104),
    Step::Data(240..264),
    Step::Snapshot("first"),
    Step::Data(0..8),
    Step::Data(32..48),
    Step::Zero(96..112),
    Step::Unmap(128..144),
    Step::Data(504..512),
    Step::Snapshot("second"),
    Step::Data(8..24),
    Step::Zero(0..8),
    Step::Unmap(40..64),
];
/// The number of the first step's data, apart from those of requests.
const FIRST: u32 = 1 << 21;

enum Step {
    /// All of it, compressed.
    Compressed,
    /// Sectors are written.
    Data(Range<usize>),
    /// They become zero and keep their space, if it is their own.
    Zero(Range<usize>),
    /// They become zero.
    Unmap(Range<usize>),
    /// A snapshot is made.
    Snapshot(&'static str),
}

pub(super) fn stamps(request: u32, sectors: Range<usize>) -> impl Iterator<Item = Value> {
    sectors.map(move |sector| Value::Stamp { request, sector: sector as u32 })
}

impl Maker {
    /// Makes such an image, of version 3.
    pub(super) fn make_mixed(&self, variant: Variant) -> io::Result<Fixture> {
        let mut content = vec![Value::Zero; SECTORS];
        let mut snapshots = Vec::new();
        for (request, step) in (FIRST..).zip(STEPS) {
            match step {
                Step::Compressed => {
                    content = stamps(INITIAL, 0..SECTORS).collect();
                    self.put("raw", &content)?;
                    self.qemu_img(&[
                        "convert",
                        "-c",
                        "-f",
                        "raw",
                        "-O",
                        "qcow2",
                        "-o",
                        &variant.options(),
                        "raw",
                        IMAGE,
                    ])?;
                }
                Step::Data(sectors) => {
                    let data: Vec<Value> = stamps(request, sectors.clone()).collect();
                    self.put("part", &data)?;
                    self.change(IMAGE, "write -s part", &sectors)?;
                    content[sectors].copy_from_slice(&data);
                }
                Step::Zero(sectors) => {
                    self.change(IMAGE, "write -z", &sectors)?;
                    content[sectors].fill(Value::Zero);
                }
                Step::Unmap(sectors) => {
                    self.change(IMAGE, "write -z -u", &sectors)?;
                    content[sectors].fill(Value::Zero);
                }
                Step::Snapshot(name) => {
                    self.qemu_img(&["snapshot", "-c", name, IMAGE])?;
                    snapshots.push(content.clone());
                }
            }
        }
        Ok(Fixture {
            name: format!("{:?} {}", Initial::Mixed, variant.name()),
            initial: Initial::Mixed,
            variant,
            image: self.made(variant)?,
            can_discard: true,
            backing: None,
            below: Vec::new(),
            snapshots,
            content,
            past: Past::Made,
            gap: 0,
            hole: 0,
        })
    }

    pub(super) fn put(&self, name: &str, content: &[Value]) -> io::Result<()> {
        let bytes: Vec<u8> = content.iter().flat_map(|value| value.bytes()).collect();
        std::fs::write(self.directory.join(name), bytes)
    }

    pub(super) fn change(&self, file: &str, command: &str, sectors: &Range<usize>) -> io::Result<()> {
        let command = format!("{command} {} {}", sectors.start * 512, sectors.len() * 512);
        self.run("qemu-io", &["-f", "qcow2", "-d", "unmap", "-c", &command, file])
    }
}
