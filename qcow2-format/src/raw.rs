//! The fixed structures as they lie on disk: big-endian, unaligned, unchecked.
//!
//! Nothing outside this crate sees them; each has one reader and one writer, next to the checks.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32, U64},
};

/// The first four bytes of every image.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bytes 0 to 71: all of a version 2 header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub(crate) magic: [u8; 4],
    pub(crate) version: U32,
    pub(crate) backing_file_offset: U64,
    pub(crate) backing_file_size: U32,
    pub(crate) cluster_bits: U32,
    pub(crate) size: U64,
    pub(crate) crypt_method: U32,
    pub(crate) l1_size: U32,
    pub(crate) l1_table_offset: U64,
    pub(crate) refcount_table_offset: U64,
    pub(crate) refcount_table_clusters: U32,
    pub(crate) nb_snapshots: U32,
    pub(crate) snapshots_offset: U64,
}

/// Bytes 72 to 103: what every version 3 header has besides.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeaderV3 {
    pub(crate) incompatible_features: U64,
    pub(crate) compatible_features: U64,
    pub(crate) autoclear_features: U64,
    pub(crate) refcount_order: U32,
    pub(crate) header_length: U32,
}

/// The head of a header extension.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawExtension {
    pub(crate) kind: U32,
    pub(crate) len: U32,
}

/// The bitmaps extension.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawBitmaps {
    pub(crate) nb_bitmaps: U32,
    pub(crate) reserved: U32,
    pub(crate) directory_size: U64,
    pub(crate) directory_offset: U64,
}

/// The encryption header pointer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawCryptoHeader {
    pub(crate) offset: U64,
    pub(crate) len: U64,
}

/// The fixed part of a snapshot table entry; extra data, ID and name follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawSnapshot {
    pub(crate) l1_table_offset: U64,
    pub(crate) l1_size: U32,
    pub(crate) id_len: U16,
    pub(crate) name_len: U16,
    pub(crate) date_sec: U32,
    pub(crate) date_nsec: U32,
    pub(crate) vm_clock_nsec: U64,
    pub(crate) vm_state_size: U32,
    pub(crate) extra_data_size: U32,
}

/// The fixed part of a bitmap directory entry; extra data and name follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawBitmap {
    pub(crate) table_offset: U64,
    pub(crate) table_size: U32,
    pub(crate) flags: U32,
    pub(crate) kind: u8,
    pub(crate) granularity_bits: u8,
    pub(crate) name_size: U16,
    pub(crate) extra_data_size: U32,
}

/// Reads a structure at the start of `bytes`; `None` when they are too few.
pub(crate) fn read<T: FromBytes + KnownLayout + Immutable + Unaligned + Copy>(bytes: &[u8]) -> Option<T> {
    T::ref_from_prefix(bytes).ok().map(|(raw, _)| *raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_specifications() {
        assert_eq!(size_of::<RawHeader>(), 72);
        assert_eq!(size_of::<RawHeaderV3>(), 32);
        assert_eq!(size_of::<RawSnapshot>(), 40);
        assert_eq!(size_of::<RawBitmap>(), 24);
        assert_eq!(size_of::<RawBitmaps>(), 24);
    }
}
