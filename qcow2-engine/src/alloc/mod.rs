//! Host clusters: who counts them, who hands them out, who takes them back.
//!
//! [`refcounts`] keeps the refcount table and the resident pages of its blocks. [`space`] decides
//! which clusters come next and grows the table. [`reserve`] hands extents to the lanes. [`frees`]
//! holds what was unmapped until it may be reused, as [`rows`].

pub(crate) mod frees;
pub(crate) mod refcounts;
pub(crate) mod reserve;
pub(crate) mod rows;
pub(crate) mod space;
