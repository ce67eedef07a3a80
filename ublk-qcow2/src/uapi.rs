//! What the driver and its servers say to each other: the structures and numbers of the kernel's
//! `include/uapi/linux/ublk_cmd.h`, under the kernel's names.
//!
//! Only what is used here. They are the kernel's promise to user space and never change; what later kernels
//! add comes in new numbers, which the driver's feature bits announce.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The letter of the driver's commands.
const LETTER: u8 = b'u';

/// A command of the control device that only reads (`_IOR`).
const fn asking(number: u8) -> u32 {
    nix::request_code_read!(LETTER, number, size_of::<CtrlCmd>()) as u32
}

/// A command of the control device that changes something (`_IOWR`).
const fn changing(number: u8) -> u32 {
    nix::request_code_readwrite!(LETTER, number, size_of::<CtrlCmd>()) as u32
}

/// A command of a queue.
const fn serving(number: u8) -> u32 {
    nix::request_code_readwrite!(LETTER, number, size_of::<IoCmd>()) as u32
}

pub(crate) const UBLK_U_CMD_GET_DEV_INFO: u32 = asking(0x02);
pub(crate) const UBLK_U_CMD_ADD_DEV: u32 = changing(0x04);
pub(crate) const UBLK_U_CMD_DEL_DEV: u32 = changing(0x05);
pub(crate) const UBLK_U_CMD_START_DEV: u32 = changing(0x06);
pub(crate) const UBLK_U_CMD_STOP_DEV: u32 = changing(0x07);
pub(crate) const UBLK_U_CMD_SET_PARAMS: u32 = changing(0x08);
pub(crate) const UBLK_U_CMD_GET_PARAMS: u32 = asking(0x09);
pub(crate) const UBLK_U_CMD_START_USER_RECOVERY: u32 = changing(0x10);
pub(crate) const UBLK_U_CMD_END_USER_RECOVERY: u32 = changing(0x11);
pub(crate) const UBLK_U_CMD_GET_FEATURES: u32 = asking(0x13);

pub(crate) const UBLK_U_IO_FETCH_REQ: u32 = serving(0x20);
pub(crate) const UBLK_U_IO_COMMIT_AND_FETCH_REQ: u32 = serving(0x21);

/// What a queue's command ends with when its device is stopped.
pub(crate) const UBLK_IO_RES_ABORT: i32 = -libc::ENODEV;

pub(crate) const UBLK_MAX_QUEUE_DEPTH: u16 = 4096;

/// Where the character device is mapped for the descriptors of its queues.
pub(crate) const UBLKSRV_CMD_BUF_OFFSET: u64 = 0;
/// Where the payloads of requests are in the character device: then come a queue's and a tag's number.
pub(crate) const UBLKSRV_IO_BUF_OFFSET: u64 = 0x8000_0000;
pub(crate) const UBLK_TAG_OFF: u32 = 25;
pub(crate) const UBLK_QID_OFF: u32 = 41;

pub(crate) const UBLK_F_SUPPORT_ZERO_COPY: u64 = 1 << 0;
pub(crate) const UBLK_F_USER_RECOVERY: u64 = 1 << 3;
pub(crate) const UBLK_F_USER_RECOVERY_REISSUE: u64 = 1 << 4;
pub(crate) const UBLK_F_CMD_IOCTL_ENCODE: u64 = 1 << 6;
pub(crate) const UBLK_F_USER_COPY: u64 = 1 << 7;
pub(crate) const UBLK_F_AUTO_BUF_REG: u64 = 1 << 11;
pub(crate) const UBLK_F_QUIESCE: u64 = 1 << 12;
pub(crate) const UBLK_F_NO_AUTO_PART_SCAN: u64 = 1 << 18;

pub(crate) const UBLK_S_DEV_DEAD: u16 = 0;

pub(crate) const UBLK_IO_OP_READ: u32 = 0;
pub(crate) const UBLK_IO_OP_WRITE: u32 = 1;
pub(crate) const UBLK_IO_OP_FLUSH: u32 = 2;
pub(crate) const UBLK_IO_OP_DISCARD: u32 = 3;
pub(crate) const UBLK_IO_OP_WRITE_ZEROES: u32 = 5;

pub(crate) const UBLK_IO_F_FUA: u32 = 1 << 13;
pub(crate) const UBLK_IO_F_NOUNMAP: u32 = 1 << 15;
pub(crate) const UBLK_IO_F_NEED_REG_BUF: u32 = 1 << 17;

pub(crate) const UBLK_AUTO_BUF_REG_FALLBACK: u8 = 1 << 0;

pub(crate) const UBLK_ATTR_READ_ONLY: u32 = 1 << 0;
pub(crate) const UBLK_ATTR_VOLATILE_CACHE: u32 = 1 << 2;
pub(crate) const UBLK_ATTR_FUA: u32 = 1 << 3;

pub(crate) const UBLK_PARAM_TYPE_BASIC: u32 = 1 << 0;
pub(crate) const UBLK_PARAM_TYPE_DISCARD: u32 = 1 << 1;

/// `struct ublksrv_ctrl_cmd`: a command to the control device.
#[derive(Debug, Clone, Copy, Default, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct CtrlCmd {
    pub dev_id: u32,
    pub queue_id: u16,
    /// Of what `addr` points to.
    pub len: u16,
    pub addr: u64,
    pub data: u64,
    pub dev_path_len: u16,
    pub pad: u16,
    pub reserved: u32,
}

/// `struct ublksrv_ctrl_dev_info`: a device, as it is wanted and as it is.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct DevInfo {
    pub nr_hw_queues: u16,
    pub queue_depth: u16,
    pub state: u16,
    pub pad0: u16,
    pub max_io_buf_bytes: u32,
    pub dev_id: u32,
    pub ublksrv_pid: i32,
    pub pad1: u32,
    pub flags: u64,
    /// The server's own, kept by the driver.
    pub ublksrv_flags: u64,
    pub owner_uid: u32,
    pub owner_gid: u32,
    pub reserved1: u64,
    pub reserved2: u64,
}

/// `struct ublk_params` as it was at first: the driver takes what `len` covers.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Params {
    pub len: u32,
    /// Which of the parts are meant.
    pub types: u32,
    pub basic: ParamBasic,
    pub discard: ParamDiscard,
    /// The beginning of what the driver alone fills in.
    pub rest: u32,
}

/// `struct ublk_param_basic`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct ParamBasic {
    pub attrs: u32,
    pub logical_bs_shift: u8,
    pub physical_bs_shift: u8,
    pub io_opt_shift: u8,
    pub io_min_shift: u8,
    pub max_sectors: u32,
    pub chunk_sectors: u32,
    pub dev_sectors: u64,
    pub virt_boundary_mask: u64,
}

/// `struct ublk_param_discard`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct ParamDiscard {
    pub discard_alignment: u32,
    pub discard_granularity: u32,
    pub max_discard_sectors: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_discard_segments: u16,
    pub reserved0: u16,
}

/// `struct ublksrv_io_cmd`: a queue's command.
#[derive(Debug, Clone, Copy, Default, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct IoCmd {
    pub q_id: u16,
    pub tag: u16,
    pub result: i32,
    pub addr: u64,
}

/// `struct ublksrv_io_desc`: a request, as the driver writes it down.
#[derive(Debug, Clone, Copy, Default, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct IoDesc {
    /// The operation is the low byte, flags above it.
    pub op_flags: u32,
    pub nr_sectors: u32,
    pub start_sector: u64,
    pub addr: u64,
}

/// The word that `struct ublk_auto_buf_reg` is in a submission: where the driver registers a request's
/// payload in the ring's table.
pub(crate) fn auto_buf_reg(index: u16, flags: u8) -> u64 {
    u64::from(index) | u64::from(flags) << 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// Written down from a header's compilation, so that a slip in a structure or a number is seen.
    #[test]
    fn structures_lie_as_the_kernel_has_them() {
        assert_eq!(size_of::<CtrlCmd>(), 32);
        assert_eq!(offset_of!(CtrlCmd, dev_path_len), 24);
        assert_eq!(size_of::<DevInfo>(), 64);
        assert_eq!(offset_of!(DevInfo, ublksrv_flags), 32);
        assert_eq!(offset_of!(Params, discard), 8 + 32);
        assert_eq!(offset_of!(ParamBasic, dev_sectors), 16);
        assert_eq!(size_of::<ParamDiscard>(), 20);
        assert_eq!(size_of::<IoCmd>(), 16);
        assert_eq!(offset_of!(IoCmd, result), 4);
        assert_eq!(size_of::<IoDesc>(), 24);
        assert_eq!(offset_of!(IoDesc, start_sector), 8);
    }

    #[test]
    fn commands_have_the_kernel_s_numbers() {
        assert_eq!(UBLK_U_CMD_GET_DEV_INFO, 0x8020_7502);
        assert_eq!(UBLK_U_CMD_ADD_DEV, 0xc020_7504);
        assert_eq!(UBLK_U_CMD_GET_FEATURES, 0x8020_7513);
        assert_eq!(UBLK_U_CMD_END_USER_RECOVERY, 0xc020_7511);
        assert_eq!(UBLK_U_IO_FETCH_REQ, 0xc010_7520);
        assert_eq!(UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0xc010_7521);
    }
}
