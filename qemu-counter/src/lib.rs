//! A plugin of QEMU's emulator that counts, exactly, what a guest executes where.
//!
//! ```text
//! qemu-system-x86_64 … -plugin file=libqemu_counter.so,out=PATH
//!
//! translation of a block ── plugin ──▶ Tally: a Block with its address and length
//! execution of a block ──────────────▶ one more
//! execution of the marker ───────────▶ what was executed since the last one, into the file PATH.NUMBER
//! ```
//!
//! The marker is an instruction that does nothing, which the program `qemu-mark` carries out in the guest. A file has a
//! line for each address at which a block begins, in hexadecimal digits, and the instructions that were executed in
//! the blocks there. Addresses are virtual: the plugin knows neither symbols nor processes. A block that an exception
//! ends early counts as a whole.
//!
//! `cargo xtask bench --profile` builds and loads it, and makes a table of the files (`xtask/src/bench/profile.rs`).
//! The interface needs QEMU 9.1. What QEMU brings is not there in a test, so the tests leave `plugin.rs` out.

mod marker;
#[cfg(not(test))]
mod plugin;
mod tally;
