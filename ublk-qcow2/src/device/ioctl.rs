//! The commands to block devices that are used.

#![allow(unsafe_code, reason = "ioctls")]

use std::{fs::File, io, os::fd::AsRawFd};
use zerocopy::FromZeros;

/// Has the kernel sync the file system that has claimed a device, or else the device's own pages, and let go of what
/// is clean.
pub(crate) fn flush_buffers(device: &File) -> io::Result<()> {
    // SAFETY: the command names no memory; the descriptor is open for as long as it runs.
    unsafe { numbers::flush_buffers(device.as_raw_fd()) }?;
    Ok(())
}

/// Has the kernel read a partition table again.
pub(crate) fn reread_partitions(device: &File) -> io::Result<()> {
    // SAFETY: as above.
    unsafe { numbers::reread_partitions(device.as_raw_fd()) }?;
    Ok(())
}

/// What a loop device has open.
pub(super) fn loop_status(device: &File) -> io::Result<LoopStatus> {
    let mut status = LoopStatus::new_zeroed();
    // SAFETY: the kernel writes a `loop_info64`, of which every value is valid, to memory of that size; the descriptor
    // is open for as long as it runs.
    unsafe { numbers::loop_status(device.as_raw_fd(), &raw mut status) }?;
    Ok(status)
}

/// The kernel's `loop_info64`.
#[repr(C)]
#[derive(FromZeros)]
pub(super) struct LoopStatus {
    /// The file system of the file, by its number, and the file there.
    pub(super) lo_device: u64,
    lo_inode: u64,
    /// The block device that the file is, or 0.
    pub(super) lo_rdevice: u64,
    lo_range: [u64; 2],
    lo_numbers: [u32; 4],
    lo_names: [[u8; 64]; 2],
    lo_encrypt_key: [u8; 32],
    lo_init: [u64; 2],
}

const _: () = assert!(size_of::<LoopStatus>() == 232);

mod numbers {
    // `BLKFLSBUF`, `BLKRRPART` and `LOOP_GET_STATUS64`.
    nix::ioctl_none!(flush_buffers, 0x12, 97);
    nix::ioctl_none!(reread_partitions, 0x12, 95);
    nix::ioctl_read_bad!(loop_status, 0x4c05, super::LoopStatus);
}
