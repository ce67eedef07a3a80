//! Placeholder.
pub mod exec;
pub mod io;
