//! Placeholder.
pub mod io;
