//! What a new device is asked for, in the driver's words.

use super::DeviceError;
use crate::{cli::ZeroCopy, control::ANY_ID, uapi};

/// The largest request that the kernel hands over in one piece, in bytes, and how much more where it takes no
/// buffer of ours.
pub(super) const MAX_IO_BYTES: u32 = 512 << 10;
const MAX_ZERO_COPY_BYTES: u32 = 1 << 20;
/// Bytes of requests that a queue may have at once: there may be a buffer for each, or two where the data is
/// copied, and what has been used of them stays locked in memory.
const MAX_QUEUE_BYTES: u32 = 256 << 20;
/// The kernel's limit on the depth of a queue.
pub(crate) const MAX_DEPTH: u16 = uapi::UBLK_MAX_QUEUE_DEPTH;
/// The device waits for another server, which is given the requests that the old one had.
pub(super) const RECOVERY: u64 = uapi::UBLK_F_USER_RECOVERY | uapi::UBLK_F_USER_RECOVERY_REISSUE;
/// A driver that has it leaves partitions to the server where it is told so.
pub(super) const NO_PART_SCAN: u64 = uapi::UBLK_F_NO_AUTO_PART_SCAN;
/// `UBLK_F_QUIESCE`: a driver that has it forgets a server's queues when that server has died. For an older
/// one see `handover`.
pub(super) const FORGETS_SERVERS: u64 = uapi::UBLK_F_QUIESCE;
/// What a device needs for [`DataPath::ZeroCopy`]: the driver registers a request's pages itself, and copies
/// them on demand.
pub(super) const ZERO_COPY: u64 =
    uapi::UBLK_F_SUPPORT_ZERO_COPY | uapi::UBLK_F_AUTO_BUF_REG | uapi::UBLK_F_USER_COPY;

/// How the data of requests gets to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataPath {
    /// The driver copies it, into and out of a buffer of the server's.
    Copied,
    /// Not at all where the kernel can move it between the request's pages and the image's file; else it is
    /// copied on demand.
    ZeroCopy,
}

/// What to ask the driver for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    /// The device id, or the driver's choice.
    pub(crate) id: Option<u32>,
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    /// Whether the device waits for another server when its own dies.
    pub(crate) recovery: bool,
    /// Whether the kernel looks for a partition table when the device starts.
    pub(crate) part_scan: bool,
    /// Whether the server is to do without copies of the data.
    pub(crate) zero_copy: ZeroCopy,
    /// What the driver keeps for us, to know the device by.
    pub(crate) cookie: u64,
}

impl Request {
    /// How to ask a driver that offers these features: asked for what it does not know, it may refuse to make
    /// a device.
    pub(super) fn in_words_of(&self, offered: u64) -> Result<uapi::DevInfo, DeviceError> {
        let path = self.data_path(offered)?;
        Ok(uapi::DevInfo {
            nr_hw_queues: self.queues,
            queue_depth: self.depth,
            max_io_buf_bytes: largest_request(path, self.depth),
            dev_id: self.id.unwrap_or(ANY_ID),
            ublksrv_pid: -1,
            flags: self.flags(offered, path),
            ublksrv_flags: self.cookie,
            ..Default::default()
        })
    }

    fn data_path(&self, offered: u64) -> Result<DataPath, DeviceError> {
        match self.zero_copy {
            ZeroCopy::Off => Ok(DataPath::Copied),
            _ if offered & ZERO_COPY == ZERO_COPY => Ok(DataPath::ZeroCopy),
            ZeroCopy::Auto => Ok(DataPath::Copied),
            ZeroCopy::On => Err(DeviceError::ZeroCopy),
        }
    }

    fn flags(&self, offered: u64, path: DataPath) -> u64 {
        let recovery = if self.recovery { RECOVERY } else { 0 };
        // Left to itself such a driver scans when the start is over, at a moment that nothing tells, and would
        // hold the lock that a successor needs should the server die meanwhile.
        let part_scan = if self.part_scan { offered & NO_PART_SCAN } else { NO_PART_SCAN };
        let zero_copy = if path == DataPath::ZeroCopy { ZERO_COPY } else { 0 };
        uapi::UBLK_F_CMD_IOCTL_ENCODE | recovery | part_scan | zero_copy
    }
}

/// The largest request in bytes of a device with queues of this depth: a power of two, of a page at least.
fn largest_request(path: DataPath, depth: u16) -> u32 {
    let most = match path {
        DataPath::Copied => MAX_IO_BYTES,
        DataPath::ZeroCopy => MAX_ZERO_COPY_BYTES,
    };
    most.min(1 << (MAX_QUEUE_BYTES / u32::from(depth.max(1))).ilog2())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With -d 4096 the buffers of one queue could come to 4 GiB, all of it locked in memory.
    #[test]
    fn deep_queues_have_smaller_requests() {
        assert_eq!(largest_request(DataPath::Copied, 128), MAX_IO_BYTES);
        assert_eq!(largest_request(DataPath::ZeroCopy, 256), MAX_ZERO_COPY_BYTES);
        assert_eq!(largest_request(DataPath::Copied, MAX_DEPTH), 64 << 10);
        for depth in 1..=MAX_DEPTH {
            for path in [DataPath::Copied, DataPath::ZeroCopy] {
                let largest = largest_request(path, depth);
                assert!(largest.is_power_of_two() && largest >= 4096);
                assert!(u64::from(largest) * u64::from(depth) <= u64::from(MAX_QUEUE_BYTES), "{depth}");
            }
        }
    }
}
