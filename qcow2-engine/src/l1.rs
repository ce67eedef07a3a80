//! The L1 table of a file, in memory as far as it says anything.
//!
//! A page of it that has only zeros takes no memory, so that a chain of huge and mostly empty disks costs
//! next to nothing. Readers take no lock; entries change under the metadata lock, and only the top layer's
//! do. The tables of a chain are read together, several parts at a time.

use crate::{
    cache::page::TablePage,
    error::{Error, Result},
    io::{Buf, Io, exact},
    layer::{Layer, Qcow2Layer},
};
use futures_util::future::join_all;
use qcow2_format::word;
use std::{
    cell::RefCell,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// Entries of a page.
const PAGE: usize = 512;
const PAGE_BYTES: usize = PAGE * size_of::<u64>();
/// Bytes of a table that are read at a time. While it is being read they are in memory besides.
const PART_BYTES: u64 = 64 << 10;
/// Parts that are read at the same time, each into memory that the next one takes over: new memory costs more than
/// what is read into it.
const PARTS_AT_A_TIME: usize = 8;

/// The entries of an L1 table, in host byte order.
pub(crate) struct L1Table {
    len: usize,
    pages: Box<[OnceLock<Box<[AtomicU64]>>]>,
}

/// A part of a layer's table, in bytes from its start.
struct Part<'a> {
    layer: &'a Qcow2Layer,
    start: u64,
    len: u64,
}

impl L1Table {
    /// A table of `len` empty entries.
    pub(crate) fn empty(len: usize) -> Self {
        Self { len, pages: (0..len.div_ceil(PAGE)).map(|_| OnceLock::new()).collect() }
    }

    /// How many entries it has.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Entry `index`; 0 where there is none.
    #[inline]
    pub(crate) fn get(&self, index: u64) -> u64 {
        let (page, entry) = split(index);
        let page = self.pages.get(page).and_then(OnceLock::get);
        page.map_or(0, |page| page[entry].load(Ordering::Acquire))
    }

    /// Changes an entry, under the metadata lock.
    ///
    /// # Panics
    /// When there is none of this number.
    pub(crate) fn set(&self, index: u64, value: u64) {
        let (page, entry) = split(index);
        self.page(page)[entry].store(value, Ordering::Release);
    }

    /// The entries that are not 0, with their numbers.
    pub(crate) fn used(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let pages =
            (0..).step_by(PAGE).zip(&self.pages).filter_map(|(first, page)| Some((first, page.get()?)));
        let entries = pages
            .flat_map(|(first, page)| (first..).zip(page.iter().map(|entry| entry.load(Ordering::Acquire))));
        entries.filter(|(_, raw)| *raw != 0)
    }

    /// Some entries as they go to disk.
    pub(crate) fn bytes(&self, first: u64, count: u64) -> Vec<u8> {
        word::to_bytes((first..first + count).map(|index| self.get(index)))
    }

    /// Takes over what was read from entry `first` on, which begins a page.
    fn load(&self, first: usize, bytes: &Buf) {
        for start in (0..bytes.len()).step_by(PAGE_BYTES) {
            let part = bytes.slice(start..bytes.len().min(start + PAGE_BYTES));
            let part = TablePage::in_buf(&part);
            if !part.is_zero() {
                part.store(self.page(first / PAGE + start / PAGE_BYTES));
            }
        }
    }

    fn page(&self, index: usize) -> &[AtomicU64] {
        self.pages[index].get_or_init(|| (0..PAGE).map(|_| AtomicU64::new(0)).collect())
    }
}

fn split(index: u64) -> (usize, usize) {
    let page = usize::try_from(index / PAGE as u64).unwrap_or(usize::MAX);
    (page, (index % PAGE as u64) as usize)
}

/// Reads the tables of all layers.
pub(crate) async fn load_all(io: &impl Io, layers: &[Layer]) -> Result<()> {
    let tables = layers.iter().filter_map(Layer::as_qcow2);
    let parts = RefCell::new(tables.flat_map(parts));
    // It takes memory as far as it is used.
    let memory = Buf::zeroed(PARTS_AT_A_TIME * PART_BYTES as usize);
    let readers = (0..PARTS_AT_A_TIME).map(async |reader| {
        let begin = reader * PART_BYTES as usize;
        loop {
            let next = parts.borrow_mut().next();
            let Some(Part { layer, start, len }) = next else { return Ok(()) };
            let some = memory.slice(begin..begin + len as usize);
            let at = layer.l1_at.0 + start;
            exact::read_zero_extended(io, layer.file, at, &some).await.map_err(|source| Error::Io {
                operation: "L1 table read",
                file: Arc::clone(&layer.name),
                at: Some(at),
                source: Arc::new(source),
            })?;
            layer.l1.load(start as usize / size_of::<u64>(), &some);
        }
    });
    join_all(readers).await.into_iter().collect()
}

/// The parts of a table.
fn parts(layer: &Qcow2Layer) -> impl Iterator<Item = Part<'_>> {
    let end = (layer.l1.len() * size_of::<u64>()) as u64;
    (0..end).step_by(PART_BYTES as usize).map(move |start| Part {
        layer,
        start,
        len: PART_BYTES.min(end - start),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(entries: &[u64]) -> L1Table {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let table = L1Table::empty(entries.len());
        table.load(0, &Buf::from_bytes(&bytes));
        table
    }

    #[test]
    fn only_pages_with_entries_take_memory() {
        let mut entries = vec![0; 4 * PAGE + 64];
        entries[2 * PAGE - 1] = 7;
        entries[4 * PAGE + 63] = 9;
        let table = read(&entries);
        let present: Vec<_> = table.pages.iter().map(|page| page.get().is_some()).collect();
        assert_eq!(present, [false, true, false, false, true]);
        assert_eq!(table.used().collect::<Vec<_>>(), [(1023, 7), (4 * 512 + 63, 9)]);
        assert!((0_u64..).zip(&entries).all(|(index, entry)| table.get(index) == *entry));
        assert_eq!([table.get(4 * 512 + 64), table.get(u64::MAX)], [0, 0], "behind its end");
    }

    #[test]
    fn an_entry_that_is_set_goes_to_disk() {
        let table = read(&[0; 2 * PAGE]);
        table.set(PAGE as u64 + 1, 0x0102);
        assert_eq!(table.get(PAGE as u64 + 1), 0x0102);
        assert_eq!(table.bytes(PAGE as u64 + 1, 2), [0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(table.bytes(0, PAGE as u64), [0; PAGE_BYTES]);
    }
}
