//! What the kernel asks for: a request descriptor, decoded once.
//!
//! Pure: bytes of the shared descriptor in, a checked [`Request`] out. Sectors become bytes here,
//! and the part of a request that lies beyond the image's end is set apart here: an image whose size
//! is no multiple of 512 is served on a device rounded *up* to whole sectors, so that none of its
//! data is out of reach. In the last sector the bytes past the end read as zeros, and what is
//! written to them is dropped.

use libublk::sys;
use qcow2_engine::Image;

/// Bytes per sector, as a shift.
const SECTOR_SHIFT: u32 = 9;
/// The operation code's part of `op_flags`.
const OPERATION_MASK: u32 = 0xff;

/// One request of the block layer. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Read(Range),
    /// With `fua` the data must be durable on completion.
    Write {
        range: Range,
        fua: bool,
    },
    Flush,
    Discard(Range),
    /// With `unmap` the zeros may be made by deallocating.
    WriteZeroes {
        range: Range,
        unmap: bool,
    },
}

/// A range of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// Offset on the device.
    pub(crate) at: u64,
    /// What was asked for.
    pub(crate) len: u64,
    /// How much of it, from the start, lies inside the image.
    pub(crate) inside: u64,
}

/// A request that the device never announced to support, or that exceeds the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("operation {0} is not supported")]
    Operation(u32),
    #[error("{sectors} sectors from sector {start} on exceed the device")]
    OutOfRange { start: u64, sectors: u32 },
}

/// Bytes of the device that serves an image: its virtual size, rounded up to whole sectors.
pub(crate) fn device_size(image: &Image) -> u64 {
    image.virtual_size().next_multiple_of(1 << SECTOR_SHIFT)
}

/// Number of sectors of a device that holds `size` bytes.
pub(crate) fn device_sectors(size: u64) -> u64 {
    size.div_ceil(1 << SECTOR_SHIFT)
}

impl Request {
    /// Decodes a descriptor for an image of `size` bytes.
    pub(crate) fn decode(descriptor: &sys::ublksrv_io_desc, size: u64) -> Result<Self, DecodeError> {
        let has = |flag: u32| descriptor.op_flags & flag != 0;
        let range = || Range::decode(descriptor, size);
        Ok(match descriptor.op_flags & OPERATION_MASK {
            sys::UBLK_IO_OP_READ => Self::Read(range()?),
            sys::UBLK_IO_OP_WRITE => Self::Write { range: range()?, fua: has(sys::UBLK_IO_F_FUA) },
            sys::UBLK_IO_OP_FLUSH => Self::Flush,
            sys::UBLK_IO_OP_DISCARD => Self::Discard(range()?),
            sys::UBLK_IO_OP_WRITE_ZEROES => {
                Self::WriteZeroes { range: range()?, unmap: !has(sys::UBLK_IO_F_NOUNMAP) }
            }
            other => return Err(DecodeError::Operation(other)),
        })
    }
}

impl Range {
    fn decode(descriptor: &sys::ublksrv_io_desc, size: u64) -> Result<Self, DecodeError> {
        let (start, sectors) = (descriptor.start_sector, descriptor.nr_sectors);
        let end = start.checked_add(u64::from(sectors)).filter(|&end| end <= device_sectors(size));
        if end.is_none() {
            return Err(DecodeError::OutOfRange { start, sectors });
        }
        // Neither shift loses bits: both are at most the device's end, which fits in 64 bits.
        let (at, len) = (start << SECTOR_SHIFT, u64::from(sectors) << SECTOR_SHIFT);
        Ok(Self { at, len, inside: len.min(size.saturating_sub(at)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(op_flags: u32, start_sector: u64, nr_sectors: u32) -> sys::ublksrv_io_desc {
        sys::ublksrv_io_desc { op_flags, nr_sectors, start_sector, addr: 0 }
    }

    #[test]
    fn each_operation_has_its_meaning() {
        let range = Range { at: 512, len: 1024, inside: 1024 };
        let decode = |op_flags| Request::decode(&descriptor(op_flags, 1, 2), 1 << 20);
        assert_eq!(decode(0), Ok(Request::Read(range)));
        assert_eq!(decode(1), Ok(Request::Write { range, fua: false }));
        assert_eq!(decode(1 | 1 << 13), Ok(Request::Write { range, fua: true }));
        assert_eq!(decode(2), Ok(Request::Flush));
        assert_eq!(decode(3), Ok(Request::Discard(range)));
        assert_eq!(decode(5), Ok(Request::WriteZeroes { range, unmap: true }));
        assert_eq!(decode(5 | 1 << 15), Ok(Request::WriteZeroes { range, unmap: false }));
        assert_eq!(decode(13), Err(DecodeError::Operation(13)));
        // Hints of the block layer change nothing.
        assert_eq!(decode(1 << 8 | 1 << 11 | 1 << 16), Ok(Request::Read(range)));
    }

    #[test]
    fn an_odd_size_is_rounded_up_and_its_tail_set_apart() {
        let size = 2 * 512 + 100;
        assert_eq!(device_sectors(size), 3);
        let read = |start, sectors| Request::decode(&descriptor(0, start, sectors), size);
        assert_eq!(read(1, 2), Ok(Request::Read(Range { at: 512, len: 1024, inside: 612 })));
        assert_eq!(read(0, 2), Ok(Request::Read(Range { at: 0, len: 1024, inside: 1024 })));
        assert_eq!(read(2, 2), Err(DecodeError::OutOfRange { start: 2, sectors: 2 }));
        assert_eq!(read(u64::MAX, 2), Err(DecodeError::OutOfRange { start: u64::MAX, sectors: 2 }));
    }
}
