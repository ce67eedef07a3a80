//! Images over chains of QCOW2 files: longer and shorter than the disk, with other clusters, and with
//! compressed, plain and zero clusters in them and none.

use super::{
    file::SECTOR,
    model::{INITIAL, Value},
    workload::{BASE, Below, Fixture, IMAGE, Initial, Maker, Past, SECTORS, Variant},
};
use std::{io, ops::Range};

/// The file between the image and the base.
const MIDDLE: &str = "middle";
/// The number of the data in it, apart from those of the base and of requests.
const IN_MIDDLE: u32 = 1 << 22;
/// Its sectors: it ends inside clusters, its own and those of images above it.
const MIDDLE_SECTORS: usize = SECTORS - 91;
/// Sectors of a base that is longer than the disk, and of one that is shorter than what is over it.
const LONG: usize = SECTORS + 30;
const SHORT: usize = MIDDLE_SECTORS - 29;
/// What the middle has of its own.
const DATA: [Range<usize>; 4] = [2..9, 60..61, 126..140, 384..MIDDLE_SECTORS];
const ZEROS: [Range<usize>; 3] = [4..8, 20..36, 248..260];

impl Maker {
    /// Makes an image that has nothing of its own, over one file or two.
    pub(super) fn make_over_chain(&self, variant: Variant, initial: Initial) -> io::Result<Fixture> {
        let is_long = initial == Initial::OverFile;
        let mut shown = self.make_base(if is_long { LONG } else { SHORT })?;
        let mut names = vec![BASE];
        if !is_long {
            self.make_middle(&mut shown)?;
            names.insert(0, MIDDLE);
        }
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

    /// The last file: compressed but for some clusters. Returns what it holds.
    fn make_base(&self, sectors: usize) -> io::Result<Vec<Value>> {
        let stamp = |sector: usize| Value::Stamp { request: INITIAL, sector: sector as u32 };
        let mut content: Vec<_> = (0..sectors).map(stamp).collect();
        self.put("raw", &content)?;
        let to_qcow2 = ["-O", "qcow2", "-o", "cluster_size=2048", "raw", BASE];
        self.qemu_img(&[&["convert", "-c", "-f", "raw"], &to_qcow2[..]].concat())?;
        let plain = 40..300;
        self.put("part", &content[plain.clone()])?;
        self.change(BASE, "write -s part", &plain)?;
        let zeros = 64..88;
        self.change(BASE, "write -z", &zeros)?;
        content[zeros].fill(Value::Zero);
        Ok(content)
    }

    /// The file over it; `shown` is what the base holds, and then what both show.
    fn make_middle(&self, shown: &mut Vec<Value>) -> io::Result<()> {
        let size = (MIDDLE_SECTORS * SECTOR).to_string();
        let over = ["-b", BASE, "-F", "qcow2", MIDDLE, &size];
        self.qemu_img(&[&["create", "-f", "qcow2", "-o", "cluster_size=512"], &over[..]].concat())?;
        shown.resize(MIDDLE_SECTORS, Value::Zero);
        for sectors in DATA {
            let stamp = |sector: usize| Value::Stamp { request: IN_MIDDLE, sector: sector as u32 };
            let data: Vec<_> = sectors.clone().map(stamp).collect();
            self.put("part", &data)?;
            self.change(MIDDLE, "write -s part", &sectors)?;
            shown[sectors].copy_from_slice(&data);
        }
        for sectors in ZEROS {
            self.change(MIDDLE, "write -z", &sectors)?;
            shown[sectors].fill(Value::Zero);
        }
        Ok(())
    }
}
