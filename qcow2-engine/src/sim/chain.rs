//! Images over chains of QCOW2 files: longer and shorter than the disk, with other clusters, and with
//! compressed, plain and zero clusters in them and none.

use super::{
    file::SECTOR,
    mixed::stamps,
    model::{INITIAL, Value},
    workload::{BASE, Below, Fixture, IMAGE, Initial, Maker, Past, SECTORS, Variant},
};
use std::{io, ops::Range};

/// The files between the image and the base, the higher one first.
const MIDDLE: &str = "middle";
const LOWER: &str = "lower";
/// The number of the data in the higher one, apart from those of the base and of requests.
const IN_MIDDLE: u32 = 1 << 22;
/// Its sectors: it ends inside clusters, its own and those of images above it.
const MIDDLE_SECTORS: usize = SECTORS - 92;
/// Sectors of a file that is longer than the disk, and of one that is shorter than what is over it.
const LONG: usize = SECTORS + 30;
const SHORT: usize = MIDDLE_SECTORS - 29;
/// Of a compressed file, what is plain, and what is zeros; in whole clusters.
const PLAIN: Range<usize> = 40..300;
const ZERO: Range<usize> = 64..88;
/// What the middle has of its own.
const DATA: [Range<usize>; 4] = [2..9, 60..61, 126..140, 384..MIDDLE_SECTORS];
const ZEROS: [Range<usize>; 3] = [4..8, 20..36, 248..260];

impl Maker {
    /// Makes an image that has nothing of its own, over one QCOW2 file, or over two and a raw one.
    pub(super) fn make_over_chain(&self, variant: Variant, initial: Initial) -> io::Result<Fixture> {
        let (shown, names) = match initial {
            // A longer one would show when an image of version 2 grows, which cannot hide it.
            Initial::OverFile if variant.compat == "0.10" => (self.make_compressed(SHORT)?, vec![BASE]),
            Initial::OverFile => (self.make_compressed(LONG)?, vec![BASE]),
            _ => (self.make_middle()?, vec![MIDDLE, LOWER, BASE]),
        };
        let size = (SECTORS * SECTOR).to_string();
        let over = ["-b", names[0], "-F", "qcow2", IMAGE, &size];
        self.qemu_img(&[&["create", "-f", "qcow2", "-o", &variant.options()], &over[..]].concat())?;
        let mut content = shown.clone();
        content.resize(SECTORS, Value::Zero);
        let read =
            |&name: &&'static str| Ok(Below { name, bytes: std::fs::read(self.directory.join(name))? });
        Ok(Fixture {
            name: format!("{initial:?} {}", variant.name()),
            initial,
            variant,
            image: self.made(variant)?,
            can_discard: variant.compat == "1.1",
            backing: Some(shown.into_iter().flat_map(Value::bytes).collect()),
            below: names.iter().map(read).collect::<io::Result<_>>()?,
            snapshots: Vec::new(),
            content,
            past: Past::Made,
            gap: 0,
        })
    }

    /// A file that is compressed but for some clusters. Returns what it holds.
    fn make_compressed(&self, sectors: usize) -> io::Result<Vec<Value>> {
        let mut content: Vec<_> = stamps(INITIAL, 0..sectors).collect();
        self.put("raw", &content)?;
        let to_qcow2 = ["-O", "qcow2", "-o", "cluster_size=2048", "raw", BASE];
        self.qemu_img(&[&["convert", "-c", "-f", "raw"], &to_qcow2[..]].concat())?;
        self.put("part", &content[PLAIN])?;
        self.change(BASE, "write -s part", &PLAIN)?;
        self.change(BASE, "write -z", &ZERO)?;
        content[ZERO].fill(Value::Zero);
        Ok(content)
    }

    /// The upper two files of a chain, over a raw one. Returns what they show.
    fn make_middle(&self) -> io::Result<Vec<Value>> {
        let mut shown: Vec<_> = stamps(INITIAL, 0..SHORT).collect();
        self.put(BASE, &shown)?;
        let size = (SHORT * SECTOR).to_string();
        self.overlay(LOWER, 2048, &[BASE, "raw"], &size)?;
        self.change(LOWER, "write -z", &ZERO)?;
        shown[ZERO].fill(Value::Zero);
        let size = (MIDDLE_SECTORS * SECTOR).to_string();
        self.overlay(MIDDLE, 1024, &[LOWER, "qcow2"], &size)?;
        shown.resize(MIDDLE_SECTORS, Value::Zero);
        for sectors in DATA {
            let data: Vec<_> = stamps(IN_MIDDLE, sectors.clone()).collect();
            self.put("part", &data)?;
            self.change(MIDDLE, "write -s part", &sectors)?;
            shown[sectors].copy_from_slice(&data);
        }
        for sectors in ZEROS {
            self.change(MIDDLE, "write -z", &sectors)?;
            shown[sectors].fill(Value::Zero);
        }
        Ok(shown)
    }

    fn overlay(&self, name: &str, cluster: usize, over: &[&str; 2], size: &str) -> io::Result<()> {
        let options = format!("cluster_size={cluster}");
        self.qemu_img(&["create", "-f", "qcow2", "-o", &options, "-b", over[0], "-F", over[1], name, size])
    }
}
