//! The fuzzer: images of every kind, damaged field by field, and what engine and checker do with them.
//!
//! ```text
//! corpus ──► damage ──► a file ──┬─► child: open, read, write, discard, flush, check, repair
//! (qemu-img)  (seeded)           │          under limits of memory and time: it must not die
//!                                └─► qemu-img: check, convert ──► judge: the two must agree, and
//!                                                                 nothing that was sound is lost
//! ```
//!
//! [`corpus`] makes sound images with the real tools. [`damage`] changes their fields. [`child`] is the
//! engine's part, a process of its own. [`judge`] holds its account against QEMU's. [`campaign`] does
//! that for many cases and shrinks those that fail.

pub mod campaign;
pub mod child;
pub mod corpus;
pub mod damage;
pub mod differences;
mod host_files;
pub mod judge;
pub mod process;
