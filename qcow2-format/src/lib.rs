//! The QCOW2 on-disk format: bytes to checked types and back.
//!
//! This crate owns what the bytes of an image mean and which of them are legal. It does no I/O,
//! knows no caches and keeps no state: each decoder takes the bytes or the host-endian value that
//! somebody else has read, and returns a type that can be matched on without a second check, or an
//! error that names the damage, the field and where it is.
//!
//! Bytes become types here and nowhere else:
//!
//! | on disk | decoder | result |
//! |---|---|---|
//! | first cluster | [`Header::decode`] | [`Header`], [`Geometry`] |
//! | L1 entry | [`L1Entry::decode`] | [`L1Entry`] |
//! | L2 entry, 8 bytes | [`Mapping::decode`] | [`Mapping`] |
//! | L2 entry, 16 bytes | [`ExtendedEntry::decode`] | [`ExtendedEntry`] |
//! | refcount table entry | [`RefcountTableEntry::decode`] | the block's offset, if there is one |
//! | refcount block | [`refcount::get`], [`refcount::set`] | a count of 1 to 64 bits |
//! | words of a table | [`word::all`], [`word::get`] | numbers of 64 bits |
//! | snapshot table | [`snapshot::decode_table`], [`snapshot::salvage`] | [`Snapshot`]s |
//! | bitmap directory | [`bitmap::decode_directory`] | [`bitmap::Bitmap`]s |
//! | bitmap table entry | [`bitmap::BitmapTableEntry::decode`] | where that part of the bitmap is |
//! | L2 entry of compressed data | [`CompressedRange::decode`] | [`CompressedRange`] |
//!
//! [`Blueprint`] goes the other way for a whole image: the bytes of a new, empty one.
//!
//! The reference is QEMU's `docs/interop/qcow2.rst`; limits that the specification leaves open are
//! QEMU's, so that both sides accept the same images.

#![forbid(unsafe_code)]

const _: () = assert!(usize::BITS >= 64, "tables of the format are indexed by numbers of 64 bits");

pub mod address;
pub mod bitmap;
pub mod blueprint;
pub mod compressed;
pub mod error;
pub mod extension;
pub mod geometry;
pub mod header;
pub mod l1;
pub mod l2;
mod raw;
pub mod refcount;
pub mod snapshot;
pub mod subcluster;
mod validate;
pub mod word;

pub use address::{Clusters, GuestCluster, HostCluster, HostOffset};
pub use blueprint::{Backing, Blueprint, CreateOptions};
pub use compressed::CompressedRange;
pub use error::{Corruption, Field, FormatError, Unsupported};
pub use geometry::{Geometry, Version};
pub use header::{Compression, CryptMethod, Defects, Header};
pub use l1::L1Entry;
pub use l2::Mapping;
pub use refcount::RefcountTableEntry;
pub use snapshot::Snapshot;
pub use subcluster::{ExtendedEntry, Subcluster};
