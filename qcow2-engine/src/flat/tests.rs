use super::*;
use crate::{
    Image, Lane, OpenOptions, ZeroMode,
    io::{Buf, mem::MemFiles},
    resolve::{Chain, Extent, Extents, Stop},
};
use proptest::{prelude::*, test_runner::Config};
use qcow2_format::{Backing, Blueprint, Compression, CreateOptions, Version};
use std::{
    future::Future,
    path::Path,
    pin::pin,
    process::Command,
    task::{Context, Poll, Waker},
};

/// I/O in memory ends at once.
fn run<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    for _ in 0..1000 {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return output;
        }
    }
    panic!("waits for nobody");
}

/// What is done to a file of the chain while it is the top.
#[derive(Clone, Debug)]
enum Op {
    Write { at: u64, sectors: u64, byte: u8 },
    Zero { at: u64, sectors: u64, mode: ZeroMode },
}

#[derive(Clone, Debug)]
struct File {
    bits: u32,
    sectors: u64,
    ops: Vec<Op>,
}

const MAX_SECTORS: u64 = 3 << 11;

fn op() -> impl Strategy<Value = Op> {
    let range = (0..MAX_SECTORS, prop_oneof![1..20_u64, 1..600_u64]);
    prop_oneof![
        3 => (range.clone(), 1..=u8::MAX).prop_map(|((at, sectors), byte)| Op::Write { at, sectors, byte }),
        1 => (range, any::<bool>()).prop_map(|((at, sectors), keep)| Op::Zero {
            at,
            sectors,
            mode: if keep { ZeroMode::Keep } else { ZeroMode::Unmap },
        }),
    ]
}

fn file() -> impl Strategy<Value = File> {
    let bits = prop_oneof![Just(9_u32), Just(10), Just(12), 13..=16_u32, Just(21)];
    (bits, MAX_SECTORS / 2..MAX_SECTORS, prop::collection::vec(op(), 0..12))
        .prop_map(|(bits, sectors, ops)| File { bits, sectors, ops })
}

fn create(files: &MemFiles, name: &str, file: &File, backing: Option<(&str, &str)>) {
    let options = CreateOptions {
        virtual_size: file.sectors * 512,
        cluster_bits: file.bits,
        version: Version::V3,
        refcount_order: 4,
        backing: backing.map(|(name, format)| Backing { name: name.into(), format: format.into() }),
        compression: Compression::Zlib,
        lazy_refcounts: false,
    };
    files.put(name, Blueprint::new(&options).unwrap().to_bytes());
}

fn open(files: &MemFiles, name: &str) -> Lane<MemFiles> {
    let options = OpenOptions { cache_bytes: 0, ..OpenOptions::default() };
    let image = run(Image::open(files, files, Path::new(name), &options)).unwrap();
    Lane::new(&image, files.clone(), 4)
}

/// Carries an operation out on the image and on the bytes that it should hold.
fn play(lane: &Lane<MemFiles>, bytes: &mut [u8], op: &Op) {
    let clip = |at: u64, sectors: u64| {
        let end = (bytes.len() as u64).min((at + sectors) * 512);
        (at * 512).min(end)..end
    };
    match *op {
        Op::Write { at, sectors, byte } => {
            let range = clip(at, sectors);
            let len = (range.end - range.start) as usize;
            if len > 0 {
                run(lane.write(range.start, Buf::from_bytes(&vec![byte; len]))).unwrap();
                bytes[range.start as usize..range.end as usize].fill(byte);
            }
        }
        Op::Zero { at, sectors, mode } => {
            let range = clip(at, sectors);
            run(lane.write_zeroes(range.start, range.end - range.start, mode)).unwrap();
            bytes[range.start as usize..range.end as usize].fill(0);
        }
    }
}

/// What the layers answer one by one, without the flattened rest.
fn walked(lane: &Lane<MemFiles>, at: u64, len: u64) -> Extents {
    let image = lane.image();
    let mut extents = Extents::new();
    loop {
        let chain = Chain { flat: None, ..image.as_chain() };
        match chain.resolve(at, len, &mut extents) {
            Ok(()) => return extents,
            Err(Stop::Miss(key)) => run(lane.load_slice(key)).unwrap(),
            Err(Stop::Failed(error)) => panic!("{error}"),
        }
    }
}

/// Compares every range of some sizes with the layer-by-layer way, and the content with `bytes`.
fn compare(lane: &Lane<MemFiles>, bytes: &[u8]) {
    for len in [512, 4096, 65536, 300 << 10] {
        for at in (0..bytes.len() as u64).step_by(len as usize) {
            let len = len.min(bytes.len() as u64 - at);
            let flattened = run(lane.resolve(at, len)).unwrap();
            assert_eq!(flattened, walked(lane, at, len), "{at}+{len}");
        }
    }
    let buf = Buf::zeroed(bytes.len());
    run(lane.read(0, buf.clone())).unwrap();
    assert!(buf.to_vec() == bytes, "content");
}

/// A base of compressed clusters between ones that are not.
fn compressed_base(files: &MemFiles) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let (raw, image) = (directory.path().join("raw"), directory.path().join("image"));
    let bytes: Vec<u8> = (0..MAX_SECTORS as usize * 512).map(|index| (index / 700 % 250) as u8 + 1).collect();
    std::fs::write(&raw, &bytes).unwrap();
    let status = Command::new("qemu-img")
        .args(["convert", "-q", "-c", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &image])
        .status()
        .expect("qemu-img is installed: cargo xtask setup");
    assert!(status.success());
    files.put("0", std::fs::read(&image).unwrap());
    bytes
}

/// The lowest file of a chain.
#[derive(Clone, Debug)]
enum Base {
    None,
    Raw { sectors: u64, odd: usize },
    Compressed,
}

fn base() -> impl Strategy<Value = Base> {
    prop_oneof![
        2 => Just(Base::None),
        2 => (0..MAX_SECTORS, 0..512_usize).prop_map(|(sectors, odd)| Base::Raw { sectors, odd }),
        1 => Just(Base::Compressed),
    ]
}

proptest! {
    #![proptest_config(Config { cases: 24, max_shrink_iters: 100, ..Config::default() })]

    /// Chains of every shape answer as their layers do one by one, also while the top changes.
    #[test]
    fn a_flattened_chain_answers_as_its_layers(
        base in base(),
        below in prop::collection::vec(file(), 2..6),
        top in file(),
        later in prop::collection::vec(op(), 1..12),
    ) {
        let files = MemFiles::default();
        let (mut bytes, mut backing) = match base {
            Base::None => (Vec::new(), None),
            Base::Raw { sectors, odd } => {
                let raw: Vec<u8> =
                    (0..sectors as usize * 512 + odd).map(|index| (index / 512 % 251) as u8 + 1).collect();
                files.put("0", raw.clone());
                (raw, Some("raw"))
            }
            Base::Compressed => (compressed_base(&files), Some("qcow2")),
        };
        let mut lane = None;
        for (number, file) in (1..).zip(below.iter().chain([&top])) {
            let (name, under) = (format!("{number}"), format!("{}", number - 1));
            create(&files, &name, file, backing.map(|format| (&*under, format)));
            backing = Some("qcow2");
            bytes.resize(file.sectors as usize * 512, 0);
            let opened = open(&files, &name);
            file.ops.iter().for_each(|op| play(&opened, &mut bytes, op));
            run(opened.close()).unwrap();
            lane = Some(open(&files, &name));
        }
        let lane = lane.unwrap();
        prop_assert!(lane.image().flat.is_some());
        compare(&lane, &bytes);
        for op in &later {
            play(&lane, &mut bytes, op);
        }
        compare(&lane, &bytes);
    }
}

/// A plain chain of files of one cluster size, `depth` deep, of which the lowest has all the data.
fn plain_chain(files: &MemFiles, depth: usize) -> Lane<MemFiles> {
    let all = Op::Write { at: 0, sectors: 1 << 20, byte: 7 };
    let file = File { bits: 16, sectors: 4 << 11, ops: Vec::new() };
    create(files, "0", &file, None);
    let lane = open(files, "0");
    play(&lane, &mut vec![0; 4 << 20], &all);
    run(lane.close()).unwrap();
    for number in 1..depth {
        create(files, &number.to_string(), &file, Some((&(number - 1).to_string(), "qcow2")));
    }
    open(files, &(depth - 1).to_string())
}

#[test]
fn what_lies_in_a_row_below_costs_no_slot() {
    let lane = plain_chain(&MemFiles::default(), 32);
    let extents = run(lane.resolve(0, 4 << 20)).unwrap();
    assert!(matches!(extents[..], [Extent::Data { len: 0x40_0000, .. }]), "{extents:?}");
    let image = lane.image();
    let flat = image.flat.unwrap();
    assert_eq!(
        flat.look_up(&image.cache, 65536 + 512),
        Ok(Answer::Data {
            layer: 31,
            at: {
                let Extent::Data { at, .. } = extents[0] else { unreachable!() };
                at + 65536
            }
        })
    );
    for layer in 1..32 {
        assert!(!image.cache.contains(SliceKey { layer, slice: 0 }), "layer {layer} is in memory");
    }
}

#[test]
fn damage_below_is_found_by_who_asks_for_it() {
    let files = MemFiles::default();
    let lane = plain_chain(&files, 3);
    let l1 = lane.image().qcow2_layer(2).l1_entry(0).unwrap();
    let qcow2_format::L1Entry::Table { offset, .. } = l1 else { panic!("{l1:?}") };
    let mut base = files.get("0").unwrap();
    base[offset.0 as usize + 8 * 5 + 7] |= 0x20;
    files.put("0", base);
    let lane = open(&files, "2");
    assert!(run(lane.resolve(0, 5 * 65536)).is_ok());
    let error = run(lane.resolve(4 * 65536, 2 * 65536)).unwrap_err();
    assert!(error.to_string().starts_with("0: "), "{error}");
    assert!(run(lane.resolve(6 * 65536, 65536)).is_ok());
}

#[test]
fn every_answer_fits_a_word() {
    for answer in [
        Answer::Zero,
        Answer::Data { layer: 0, at: 0 },
        Answer::Data { layer: 255, at: PLACE },
        Answer::Ask { layer: 255 },
    ] {
        assert_eq!(Answer::decode(answer.encode()), answer);
    }
    let beyond = Answer::Data { layer: 3, at: 1 << 60 };
    assert_eq!(Answer::decode(beyond.encode()), Answer::Ask { layer: 3 }, "a raw file may be that long");
}

/// Two layers whose tables are tiny, under a disk of 2 EiB: the windows' directory would take 1.6 TiB.
#[test]
fn a_disk_with_too_many_windows_is_walked() {
    let files = MemFiles::default();
    let file = |bits, sectors| File { bits, sectors, ops: Vec::new() };
    create(&files, "lowest", &file(9, 8), None);
    create(&files, "lower", &file(9, 8), Some(("lowest", "qcow2")));
    create(&files, "top", &file(21, 1 << 52), Some(("lower", "qcow2")));
    let lane = open(&files, "top");
    assert!(lane.image().flat.is_none());
    let buf = Buf::zeroed(4096);
    run(lane.read(0, buf)).unwrap();
}
