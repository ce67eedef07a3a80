//! A crash-consistent QCOW2 engine.
//!
//! An [`Image`] is opened once and shared by all threads; each thread uses it through a [`Lane`], which joins
//! it to that thread's [`io::Io`]. The life of a request is in the module named after it: `read`, `write`,
//! `discard`, `flush`; `direct` is the short cut for those that one transfer answers. The engine knows
//! nothing of ublk.
//!
//! Durability: a completed write or discard is durable after a later completed [`Lane::flush`]. A
//! crash at any moment leaves an image whose mapping is consistent and whose worst defect is leaked
//! clusters; docs/crash-consistency.md has the rules and the argument.

const _: () = assert!(usize::BITS >= 64, "lengths of 64 bits index memory");

mod alloc;
mod autoclear;
mod backing;
mod cache;
pub mod check;
mod close;
pub mod create;
mod damage;
mod direct;
mod discard;
mod epoch;
mod error;
pub mod exec;
mod flat;
mod flush;
#[cfg(feature = "sim")]
pub mod fuzz;
mod grow;
mod image;
pub mod inspect;
pub mod io;
mod l1;
mod lane;
mod layer;
mod leaks;
mod load;
mod locks;
mod meta;
mod old;
mod open;
mod opened;
mod order;
mod owner;
mod paging;
mod publish;
mod read;
mod reclaim;
mod redo;
mod replay;
mod resolve;
#[cfg(feature = "sim")]
pub mod sim;
mod territory;
mod unpack;
mod waiters;
mod write;

pub use backing::{BackingPolicy, Format, MAX_CHAIN, has_protocol};
pub use check::{CheckOptions, CheckReport, Repair, check};
pub use create::Preallocation;
pub use direct::{Direct, MAX_RUNS, Run};
pub use discard::ZeroMode;
pub use error::{Error, ErrorKind, Result};
pub use grow::{grow, grow_by};
pub use image::Image;
pub use lane::{Flight, Lane};
pub use leaks::{Pace, Reclaimed, Verdict};
pub use open::{DEFAULT_CACHE_BYTES, DEFAULT_EXTENT_BYTES, OpenOptions};
pub use order::rules::RuleName;
pub use paging::Paging;
pub use redo::{MIN_REDO_BYTES, REDO_BYTES, RedoError, RedoLog, RedoMemory};
pub use resolve::{Extent, Extents};
pub use territory::Conflict;
pub use unpack::Workers;
