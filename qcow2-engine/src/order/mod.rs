//! What may be written before what: the rules, and the graph that they build.
//!
//! Pure: nothing here does I/O or knows what a page contains. `flush.rs` carries the plans out.

pub(crate) mod graph;
pub(crate) mod rules;
