//! A disk so large that its L1 table has two pages, and so many L2 tables that most of them are missing.
//! Requests are for its beginning and for what is around the border of the two pages.

use super::{
    file::SECTOR,
    mixed::stamps,
    model::{INITIAL, Value},
    workload::{Fixture, IMAGE, Initial, Maker, Past, SECTORS, Variant},
};
use std::io;

/// Sectors that a page of the L1 table maps where all clusters have one: 64 tables of 64 entries.
const PAGE_SECTORS: usize = 64 * 64;
/// Requests that cross the border of two tables cross that of two pages.
const GAP: usize = PAGE_SECTORS - 256;

impl Maker {
    /// Makes such an image, which has no data, or some that it shares with a snapshot.
    pub(super) fn make_wide(&self, initial: Initial) -> io::Result<Fixture> {
        let variant = Variant::SMALL_BLOCKS;
        let mut content = vec![Value::Zero; SECTORS + GAP];
        let size = (content.len() * SECTOR).to_string();
        self.qemu_img(&["create", "-f", "qcow2", "-o", &variant.options(), IMAGE, &size])?;
        if initial.is_shared() {
            for sectors in [0..200, PAGE_SECTORS - 20..content.len()] {
                let data: Vec<_> = stamps(INITIAL, sectors.clone()).collect();
                self.put("part", &data)?;
                self.change(IMAGE, "write -s part", &sectors)?;
                content[sectors].copy_from_slice(&data);
            }
            self.qemu_img(&["snapshot", "-c", "first", IMAGE])?;
        }
        Ok(Fixture {
            name: format!("{initial:?} wide {}", variant.name()),
            initial,
            variant,
            image: self.made(variant)?,
            can_discard: true,
            backing: None,
            below: Vec::new(),
            snapshots: if initial.is_shared() { vec![content.clone()] } else { Vec::new() },
            content,
            past: Past::Made,
            gap: GAP,
            hole: 0,
        })
    }
}
