//! What a device looks like to its users, as the driver is told it.

use crate::uapi;

/// Logical block size: 512 bytes, as a shift.
const LOGICAL_SHIFT: u8 = 9;
/// What the kernel should rather not split: 4096 bytes, as a shift.
const PHYSICAL_SHIFT: u8 = 12;
/// The largest discard or write-zeroes request: 1 GiB, so that one request stays well below a second
/// even where every cluster is freed by itself.
const MAX_DISCARD_SECTORS: u32 = 1 << (30 - LOGICAL_SHIFT);
/// The largest write-zeroes request where the zeros are written, cluster by cluster: 32 MiB. The kernel has
/// as many of them under way as the queue is deep.
const MAX_WRITTEN_ZEROES_SECTORS: u32 = 1 << (25 - LOGICAL_SHIFT);

/// What the device looks like to its users.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Capacity in sectors of 512 bytes.
    pub(crate) sectors: u64,
    /// The image's cluster size in bytes, a power of two: what a discard should cover.
    pub(crate) cluster_bytes: u32,
    pub(crate) read_only: bool,
    /// Whether a discard can free space; write-zeroes works in any case.
    pub(crate) can_discard: bool,
    /// Whether zeros need not be written.
    pub(crate) has_zero_clusters: bool,
}

/// The driver's parameters for a device of this shape.
pub(super) fn params(shape: &Shape, max_io_bytes: u32) -> uapi::Params {
    let cluster_shift = shape.cluster_bytes.trailing_zeros() as u8;
    let read_only = if shape.read_only { uapi::UBLK_ATTR_READ_ONLY } else { 0 };
    let basic = uapi::ParamBasic {
        // FUA is not left to the kernel: it would make a write and a flush of it, and should the server die
        // between them, Linux before 6.15 waits for that write before it wants another server, for ever.
        attrs: uapi::UBLK_ATTR_VOLATILE_CACHE | uapi::UBLK_ATTR_FUA | read_only,
        logical_bs_shift: LOGICAL_SHIFT,
        physical_bs_shift: PHYSICAL_SHIFT,
        io_min_shift: PHYSICAL_SHIFT,
        io_opt_shift: cluster_shift.max(PHYSICAL_SHIFT),
        max_sectors: max_io_bytes >> LOGICAL_SHIFT,
        dev_sectors: shape.sectors,
        ..Default::default()
    };
    let mut params = uapi::Params {
        len: size_of::<uapi::Params>() as u32,
        types: uapi::UBLK_PARAM_TYPE_BASIC,
        basic,
        ..Default::default()
    };
    // No dma_align: memory for direct I/O has to be aligned to 4 bytes then. The driver copies it; with zero copy a
    // transfer that the host's disk does not take for that is repeated with a buffer of ours.
    if !shape.read_only {
        params.types |= uapi::UBLK_PARAM_TYPE_DISCARD;
        let zeroes = if shape.has_zero_clusters { MAX_DISCARD_SECTORS } else { MAX_WRITTEN_ZEROES_SECTORS };
        params.discard = uapi::ParamDiscard {
            discard_granularity: shape.cluster_bytes,
            max_discard_sectors: if shape.can_discard { MAX_DISCARD_SECTORS } else { 0 },
            max_write_zeroes_sectors: zeroes,
            max_discard_segments: 1,
            ..Default::default()
        };
    }
    params
}

/// Compares what the driver holds with what it was given, field by field.
pub(super) fn check_params(wanted: &uapi::Params, taken: &uapi::Params) -> Result<(), String> {
    let (w, t) = (&wanted.basic, &taken.basic);
    let (wd, td) = (&wanted.discard, &taken.discard);
    let fields = [
        // The driver adds the kinds that only it can fill in.
        ("types", u64::from(wanted.types), u64::from(wanted.types & taken.types)),
        ("attrs", w.attrs.into(), t.attrs.into()),
        ("logical_bs_shift", w.logical_bs_shift.into(), t.logical_bs_shift.into()),
        ("max_sectors", w.max_sectors.into(), t.max_sectors.into()),
        ("dev_sectors", w.dev_sectors, t.dev_sectors),
        ("discard_granularity", wd.discard_granularity.into(), td.discard_granularity.into()),
        ("max_discard_sectors", wd.max_discard_sectors.into(), td.max_discard_sectors.into()),
    ];
    match fields.iter().find(|(_, wanted, taken)| wanted != taken) {
        None => Ok(()),
        Some((name, wanted, taken)) => Err(format!("{name} is {taken}, not {wanted}")),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::request::MAX_IO_BYTES, *};

    const SHAPE: Shape = Shape {
        sectors: 2048,
        cluster_bytes: 65536,
        read_only: false,
        can_discard: true,
        has_zero_clusters: true,
    };

    /// Version 2 has no zero clusters: a request of 1 GiB that keeps its space was written out in one piece,
    /// one cluster after the other, and took as long as the disk takes for that.
    #[test]
    fn requests_for_zeros_are_short_where_zeros_are_written() {
        let limit = |shape: &Shape| params(shape, MAX_IO_BYTES).discard.max_write_zeroes_sectors;
        assert_eq!(limit(&SHAPE), (1 << 30) / 512);
        assert_eq!(limit(&Shape { has_zero_clusters: false, ..SHAPE }), (32 << 20) / 512);
    }

    #[test]
    fn limits_follow_the_image() {
        let it = params(&SHAPE, MAX_IO_BYTES);
        assert_eq!(it.basic.max_sectors, 1024);
        assert_eq!(it.basic.io_opt_shift, 16);
        assert_eq!((it.discard.discard_granularity, it.discard.max_discard_segments), (65536, 1));
        let small = params(&Shape { cluster_bytes: 512, ..SHAPE }, 4096);
        assert_eq!((small.basic.io_opt_shift, small.discard.discard_granularity), (12, 512));
        let keeping = params(&Shape { can_discard: false, ..SHAPE }, MAX_IO_BYTES).discard;
        assert_eq!((keeping.max_discard_sectors, keeping.max_write_zeroes_sectors > 0), (0, true));
    }

    #[test]
    fn a_read_only_device_has_no_discard_and_a_lost_parameter_is_noticed() {
        let it = params(&Shape { read_only: true, ..SHAPE }, MAX_IO_BYTES);
        assert_eq!(it.types, uapi::UBLK_PARAM_TYPE_BASIC);
        assert_ne!(it.basic.attrs & uapi::UBLK_ATTR_READ_ONLY, 0);
        let wanted = params(&SHAPE, MAX_IO_BYTES);
        assert!(check_params(&wanted, &wanted).is_ok());
        assert_eq!(check_params(&wanted, &it).unwrap_err(), "types is 1, not 3");
    }
}
