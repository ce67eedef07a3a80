//! What the kernel asks for: a request descriptor, decoded once.
//!
//! Pure: a shared descriptor in, a checked [`Request`] out. Sectors become bytes here, and a request
//! that exceeds the device or the tag's buffer is refused here. An image whose size is no multiple
//! of 512 is served on a device rounded *up* to whole sectors, so that none of its data is out of
//! reach; the bytes past its end in the last sector belong to nobody.

use crate::uapi;

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
    /// With `unmap` the zeros may be made by deallocating; `fua` as above.
    WriteZeroes {
        range: Range,
        unmap: bool,
        fua: bool,
    },
}

/// A range of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// Offset on the device, a multiple of 512.
    pub(crate) at: u64,
    /// Length, a multiple of 512.
    pub(crate) len: u64,
}

/// What requests must keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// The device's size in sectors.
    pub(crate) sectors: u64,
    /// The length of a tag's buffer in bytes.
    pub(crate) buffer_bytes: u32,
}

/// A request that the device never announced to support, or that exceeds the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("operation {0} is not supported")]
    Operation(u32),
    #[error("{sectors} sectors from sector {start} on exceed the device")]
    OutOfRange { start: u64, sectors: u32 },
    #[error("{0} bytes of data exceed the buffer")]
    TooLong(u64),
}

/// Number of sectors of a device that holds `size` bytes.
pub(crate) fn device_sectors(size: u64) -> u64 {
    size.div_ceil(1 << SECTOR_SHIFT)
}

impl Request {
    /// Decodes a descriptor.
    #[inline]
    pub(crate) fn decode(descriptor: &uapi::IoDesc, bounds: Bounds) -> Result<Self, DecodeError> {
        let has = |flag: u32| descriptor.op_flags & flag != 0;
        let range = || Range::decode(descriptor, bounds.sectors);
        let data = || range()?.of_data(bounds.buffer_bytes);
        Ok(match descriptor.op_flags & OPERATION_MASK {
            uapi::UBLK_IO_OP_READ => Self::Read(data()?),
            uapi::UBLK_IO_OP_WRITE => Self::Write { range: data()?, fua: has(uapi::UBLK_IO_F_FUA) },
            uapi::UBLK_IO_OP_FLUSH => Self::Flush,
            uapi::UBLK_IO_OP_DISCARD => Self::Discard(range()?),
            uapi::UBLK_IO_OP_WRITE_ZEROES => Self::WriteZeroes {
                range: range()?,
                unmap: !has(uapi::UBLK_IO_F_NOUNMAP),
                fua: has(uapi::UBLK_IO_F_FUA),
            },
            other => return Err(DecodeError::Operation(other)),
        })
    }

    /// The bytes of data that it moves.
    pub(crate) fn data_len(&self) -> u64 {
        match self {
            Self::Read(range) | Self::Write { range, .. } => range.len,
            Self::Flush | Self::Discard(_) | Self::WriteZeroes { .. } => 0,
        }
    }
}

impl Range {
    fn decode(descriptor: &uapi::IoDesc, device_sectors: u64) -> Result<Self, DecodeError> {
        let (start, sectors) = (descriptor.start_sector, descriptor.nr_sectors);
        match start.checked_add(u64::from(sectors)) {
            // Neither shift loses bits: the device's end in bytes fits in 64 bits.
            Some(end) if end <= device_sectors => {
                Ok(Self { at: start << SECTOR_SHIFT, len: u64::from(sectors) << SECTOR_SHIFT })
            }
            _ => Err(DecodeError::OutOfRange { start, sectors }),
        }
    }

    /// Checks that the range's data has room in the tag's buffer.
    fn of_data(self, buffer_bytes: u32) -> Result<Self, DecodeError> {
        if self.len > u64::from(buffer_bytes) { Err(DecodeError::TooLong(self.len)) } else { Ok(self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(op_flags: u32, start_sector: u64, nr_sectors: u32) -> uapi::IoDesc {
        uapi::IoDesc { op_flags, nr_sectors, start_sector, addr: 0 }
    }

    #[test]
    fn each_operation_has_its_meaning() {
        let range = Range { at: 512, len: 1024 };
        let bounds = Bounds { sectors: 2048, buffer_bytes: 4096 };
        let decode = |op_flags| Request::decode(&descriptor(op_flags, 1, 2), bounds);
        assert_eq!(decode(0), Ok(Request::Read(range)));
        assert_eq!(decode(1), Ok(Request::Write { range, fua: false }));
        assert_eq!(decode(1 | 1 << 13), Ok(Request::Write { range, fua: true }));
        assert_eq!(decode(2), Ok(Request::Flush));
        assert_eq!(decode(3), Ok(Request::Discard(range)));
        assert_eq!(decode(5), Ok(Request::WriteZeroes { range, unmap: true, fua: false }));
        assert_eq!(decode(5 | 1 << 15), Ok(Request::WriteZeroes { range, unmap: false, fua: false }));
        assert_eq!(decode(5 | 1 << 13), Ok(Request::WriteZeroes { range, unmap: true, fua: true }));
        assert_eq!(decode(13), Err(DecodeError::Operation(13)));
        // Hints of the block layer change nothing.
        assert_eq!(decode(1 << 8 | 1 << 11 | 1 << 16), Ok(Request::Read(range)));
    }

    #[test]
    fn what_exceeds_the_device_or_the_buffer_is_refused() {
        assert_eq!(device_sectors(2 * 512 + 100), 3);
        let bounds = Bounds { sectors: 3, buffer_bytes: 1024 };
        let decode = |op, start, sectors| Request::decode(&descriptor(op, start, sectors), bounds);
        assert_eq!(decode(0, 1, 2), Ok(Request::Read(Range { at: 512, len: 1024 })));
        assert_eq!(decode(0, 2, 2), Err(DecodeError::OutOfRange { start: 2, sectors: 2 }));
        assert_eq!(decode(0, u64::MAX, 2), Err(DecodeError::OutOfRange { start: u64::MAX, sectors: 2 }));
        assert_eq!(decode(1, 0, 3), Err(DecodeError::TooLong(1536)));
        assert_eq!(decode(3, 0, 3), Ok(Request::Discard(Range { at: 0, len: 1536 })));
    }
}
