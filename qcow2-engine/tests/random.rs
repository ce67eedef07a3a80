//! Random operations on images of every geometry, held against an array and against qemu-img.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{IMAGE, Mirror, create};
use proptest::{prelude::*, test_runner::Config};
use qcow2_engine::{ZeroMode, io::mem::MemFiles};
use qcow2_format::{Backing, Compression, CreateOptions, Version};

#[derive(Clone, Debug)]
enum Op {
    Write { at: u64, sectors: u64, byte: u8 },
    Zero { at: u64, sectors: u64, keep: bool },
    Discard { at: u64, sectors: u64 },
    Flush,
    Maintain,
    Reopen,
}

fn op(sectors: u64) -> impl Strategy<Value = Op> {
    let range = (0..sectors).prop_flat_map(move |at| (Just(at), 1..=(sectors - at).min(300)));
    prop_oneof![
        6 => (range.clone(), any::<u8>()).prop_map(|((at, sectors), byte)| Op::Write { at, sectors, byte }),
        2 => (range.clone(), any::<bool>()).prop_map(|((at, sectors), keep)| Op::Zero { at, sectors, keep }),
        2 => range.prop_map(|(at, sectors)| Op::Discard { at, sectors }),
        1 => Just(Op::Flush),
        1 => Just(Op::Maintain),
        1 => Just(Op::Reopen),
    ]
}

fn geometry() -> impl Strategy<Value = (u32, Version, u32)> {
    (prop_oneof![Just(9_u32), Just(10), Just(12), Just(16), Just(21)], 0..=6_u32, any::<bool>())
        .prop_map(|(bits, order, v2)| if v2 { (bits, Version::V2, 4) } else { (bits, Version::V3, order) })
}

const DISK: u64 = 3 << 20;

fn options(bits: u32, version: Version, order: u32, backing: Option<Backing>) -> CreateOptions {
    CreateOptions {
        virtual_size: DISK + 1536,
        cluster_bits: bits,
        version,
        refcount_order: order,
        backing,
        compression: Compression::Zlib,
        lazy_refcounts: false,
    }
}

fn play(files: &MemFiles, bytes: Vec<u8>, ops: &[Op]) {
    let mut mirror = Mirror::open(files, bytes);
    for op in ops {
        match *op {
            Op::Write { at, sectors, byte } => mirror.write(at * 512, byte, sectors as usize * 512),
            Op::Zero { at, sectors, keep } => {
                let mode = if keep { ZeroMode::Keep } else { ZeroMode::Unmap };
                mirror.write_zeroes(at * 512, sectors * 512, mode);
            }
            Op::Discard { at, sectors } if mirror.lane.image().can_discard() => {
                mirror.discard(at * 512, sectors * 512);
            }
            Op::Discard { .. } => {}
            Op::Flush => mirror.flush(),
            Op::Maintain => common::run(mirror.lane.maintain()).expect("maintain"),
            Op::Reopen => {
                common::run(mirror.lane.close()).expect("close");
                mirror = Mirror::open(files, mirror.bytes);
            }
        }
    }
    mirror.verify();
    mirror.close_and_judge();
}

proptest! {
    #![proptest_config(Config { cases: 48, max_shrink_iters: 200, ..Config::default() })]

    #[test]
    fn an_image_holds_what_was_written(
        (bits, version, order) in geometry(),
        ops in prop::collection::vec(op(DISK / 512 + 3), 1..60),
    ) {
        let files = MemFiles::default();
        create(&files, IMAGE, &options(bits, version, order, None));
        play(&files, vec![0; DISK as usize + 1536], &ops);
    }

    #[test]
    fn an_overlay_shows_its_backing_file_where_it_was_not_written(
        (bits, version, order) in geometry(),
        raw_sectors in 0..DISK / 512 + 100,
        odd in 0..512_usize,
        ops in prop::collection::vec(op(DISK / 512 + 3), 1..40),
    ) {
        let files = MemFiles::default();
        let raw: Vec<u8> = (0..raw_sectors as usize * 512 + odd).map(|index| (index / 512 % 251) as u8 + 1).collect();
        files.put("base.raw", raw.clone());
        let backing = Backing { name: b"base.raw".to_vec(), format: "raw".into() };
        create(&files, IMAGE, &options(bits, version, order, Some(backing)));
        let mut bytes = raw;
        bytes.resize(DISK as usize + 1536, 0);
        play(&files, bytes, &ops);
    }
}
