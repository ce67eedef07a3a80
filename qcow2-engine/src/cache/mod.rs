//! Metadata in memory: L2 slices for everyone, without locks; refcount pages for those who allocate.

pub(crate) mod directory;
pub(crate) mod page;
pub(crate) mod slices;
