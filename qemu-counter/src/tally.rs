//! How often each block was executed. Knows nothing of QEMU.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, Write},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// A run of instructions without a jump into it or out of it. It stays for ever: translated code refers to it.
#[derive(Debug)]
pub(crate) struct Block {
    instructions: u64,
    executions: AtomicU64,
}

impl Block {
    /// Counts one execution.
    pub(crate) fn executed(&self) {
        self.executions.fetch_add(1, Relaxed);
    }
}

/// All blocks that have been translated, by address and length.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    blocks: HashMap<(u64, u64), &'static Block>,
    written: u32,
}

impl Tally {
    /// The block at `address`: the same one when it is translated once more, with what it has counted.
    pub(crate) fn block(&mut self, address: u64, instructions: u64) -> &'static Block {
        self.blocks
            .entry((address, instructions))
            .or_insert_with(|| Box::leak(Box::new(Block { instructions, executions: AtomicU64::new(0) })))
    }

    /// The number of what is taken next; each is given once.
    pub(crate) fn next_number(&mut self) -> u32 {
        self.written += 1;
        self.written - 1
    }

    /// Writes what was executed since the last time, by ascending address, and begins anew.
    ///
    /// # Errors
    /// Those of `out`.
    pub(crate) fn take(&self, mut out: impl Write) -> io::Result<()> {
        let mut executed = BTreeMap::<u64, u64>::new();
        for ((address, _), block) in &self.blocks {
            let times = block.executions.swap(0, Relaxed);
            if times > 0 {
                *executed.entry(*address).or_default() += times * block.instructions;
            }
        }
        executed
            .iter()
            .try_for_each(|(address, instructions)| writeln!(out, "{address:x} {instructions}"))?;
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::marker::MARKER;

    fn taken(tally: &Tally) -> String {
        let mut out = Vec::new();
        tally.take(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn what_is_executed_is_counted_once() {
        let mut tally = Tally::default();
        let long = tally.block(0xffff_8000_0000_0010, 5);
        let short = tally.block(0x20, 2);
        tally.block(0x30, 7);
        for block in [long, long, short] {
            block.executed();
        }
        assert_eq!(taken(&tally), "20 2\nffff800000000010 10\n");
        assert_eq!(taken(&tally), "", "the next begins where the last one ended");
    }

    /// QEMU drops translations and makes them anew, also with another length where a page or a breakpoint ends them.
    #[test]
    fn a_block_that_is_translated_anew_goes_on_counting() {
        let mut tally = Tally::default();
        tally.block(0x10, 3).executed();
        tally.block(0x10, 3).executed();
        tally.block(0x10, 1).executed();
        assert_eq!(taken(&tally), "10 7\n");
    }

    #[test]
    fn numbers_are_given_once() {
        let mut tally = Tally::default();
        assert_eq!([tally.next_number(), tally.next_number()], [0, 1]);
    }

    #[test]
    fn the_marker_is_one_instruction_with_an_operand_that_is_told_apart() {
        assert_eq!(MARKER[..4], [0x0f, 0x1f, 0x84, 0x24], "nop with four bytes of displacement");
        assert_ne!(MARKER[4..], [0; 4], "which compilers make");
    }
}
