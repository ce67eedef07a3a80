//! Hostile images: names of backing files, chains without end, compressed data that is none, claims
//! that no file keeps. Tables that point at each other are in `overlap.rs`.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, create,
    hooked::{Hook, Hooked, Operation},
    run,
};
use qcow2_engine::{
    BackingPolicy, CheckOptions, ErrorKind, Image, Lane, OpenOptions, Repair, check,
    exec::block_on,
    grow,
    io::{Buf, Files, files::Caching, mem::MemFiles, uring::Uring},
};
use qcow2_format::{Backing, Compression, CreateOptions, Version, header, word};
use std::{fs, os::unix::fs::symlink, path::Path, process::Command, sync::Arc};

const SIZE: u64 = 1 << 20;

fn options(backing: Option<(&str, &str)>) -> CreateOptions {
    let backing = backing.map(|(name, format)| Backing { name: name.into(), format: format.into() });
    CreateOptions { virtual_size: SIZE, cluster_bits: 12, backing, ..CreateOptions::default() }
}

fn open(files: &MemFiles, read_only: bool) -> qcow2_engine::Result<Arc<Image>> {
    let options = OpenOptions { read_only, ..OpenOptions::default() };
    run(Image::open(files, files, Path::new(IMAGE), &options))
}

fn assert_refused(files: &MemFiles, words: &str) {
    for read_only in [true, false] {
        let error = open(files, read_only).err().expect("refused");
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn a_chain_that_does_not_end_is_refused() {
    let files = MemFiles::default();
    create(&files, IMAGE, &options(Some((IMAGE, "qcow2"))));
    assert_refused(&files, "loop");

    let files = MemFiles::default();
    create(&files, IMAGE, &options(Some(("other", "qcow2"))));
    create(&files, "other", &options(Some((IMAGE, "qcow2"))));
    assert_refused(&files, "loop");

    let files = MemFiles::default();
    create(&files, IMAGE, &options(Some(("base0", "qcow2"))));
    for depth in 0..1000 {
        create(&files, &format!("base{depth}"), &options(Some((&format!("base{}", depth + 1), "qcow2"))));
    }
    create(&files, "base1000", &options(None));
    assert_refused(&files, "longer than 256 files");
}

/// Counts of one bit in clusters of 2 MiB reach further than a byte has a number. A free cluster there was
/// byte 0, and the new L1 table was written over the header.
#[test]
fn no_cluster_is_handed_out_that_no_entry_could_name() {
    const CLUSTER: usize = 2 << 20;
    let files = MemFiles::default();
    let options =
        CreateOptions { cluster_bits: 21, refcount_order: 0, virtual_size: SIZE, ..CreateOptions::default() };
    create(&files, IMAGE, &options);
    let mut bytes = files.get(IMAGE).expect("made");
    bytes.resize(4 * CLUSTER, 0);
    // All that the first block counts is in use; of the others there is the one that counts from 2^64 on.
    let (table, first, far) = (4 * CLUSTER, 2 * CLUSTER, 7 * CLUSTER);
    bytes.resize(8 * CLUSTER, 0);
    assert_eq!(word::get(&bytes, CLUSTER), Some(first as u64), "where the first block is");
    bytes[first..first + CLUSTER].fill(0xff);
    word::set(&mut bytes, table, first as u64);
    word::set(&mut bytes, table + (8 << 19), far as u64);
    word::set(&mut bytes, header::REFCOUNT_TABLE_OFFSET as usize, table as u64);
    bytes[header::REFCOUNT_TABLE_CLUSTERS_OFFSET as usize..][..4].copy_from_slice(&3_u32.to_be_bytes());
    files.put(IMAGE, bytes.clone());
    let grown = run(grow(files.clone(), &files, Path::new(IMAGE), &OpenOptions::default(), 1 << 40));
    assert_eq!(grown.expect_err("no room").kind(), ErrorKind::TooLarge);
    let after = files.get(IMAGE).expect("kept");
    assert!(after[..after.len().min(bytes.len())] == bytes[..], "nothing is changed");
}

/// 256 files whose L1 tables are as long as they may be would take 8 GiB of memory.
#[test]
fn the_l1_tables_of_a_chain_are_bounded_together() {
    let files = MemFiles::default();
    create(&files, IMAGE, &options(Some((IMAGE, "qcow2"))));
    let mut bytes = files.get(IMAGE).expect("made");
    let at = (bytes.len() as u64).next_multiple_of(4096);
    bytes.resize(at as usize + (32 << 20), 0);
    bytes[header::L1_SIZE_OFFSET as usize..][..4].copy_from_slice(&(4_u32 << 20).to_be_bytes());
    bytes[header::L1_TABLE_OFFSET as usize..][..8].copy_from_slice(&at.to_be_bytes());
    files.put(IMAGE, bytes);
    assert_refused(&files, "L1 tables of the chain");
}

#[test]
fn names_that_are_no_plain_paths_are_refused_and_nothing_is_opened() {
    for name in ["json:{\"driver\":\"raw\"}", "nbd:localhost:10809", "nbd://host/x", "ssh:x", "fat:rw:/"] {
        let files = MemFiles::default();
        create(&files, IMAGE, &options(Some((name, "raw"))));
        files.put(name, vec![7; 4096]);
        assert_refused(&files, "not a plain path");
    }
    let files = MemFiles::default();
    create(&files, IMAGE, &options(Some(("base", "vmdk"))));
    files.put("base", vec![7; 4096]);
    assert_refused(&files, "is not served");
}

/// A guest may write the magic of QCOW2 into its raw disk. If that made it a QCOW2 image, the guest
/// would choose the next backing file.
#[test]
fn a_raw_base_with_the_magic_of_qcow2_stays_raw() {
    let files = MemFiles::default();
    create(&files, "base", &options(Some(("secret", "raw"))));
    files.put("secret", vec![0x5e; SIZE as usize]);
    let base = files.get("base").expect("made");
    create(&files, IMAGE, &options(Some(("base", "raw"))));
    let lane = Lane::new(&open(&files, true).expect("opens"), files.clone(), 1);
    assert_eq!(lane.image().chain().collect::<Vec<_>>(), [IMAGE, "base"]);
    let buf = Buf::zeroed(4096);
    run(lane.read(0, buf.clone())).expect("reads");
    assert_eq!(buf.to_vec(), base[..4096]);
}

/// The policies, with real files and links.
#[test]
fn backing_files_are_opened_by_policy_only() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| directory.path().join(name);
    fs::create_dir(path("allowed")).expect("directory");
    fs::create_dir(path("images")).expect("directory");
    fs::write(path("allowed/base"), vec![1; SIZE as usize]).expect("base");
    fs::write(path("secret"), vec![2; SIZE as usize]).expect("secret");
    symlink(path("secret"), path("allowed/link")).expect("link");
    let absolute = path("allowed/base").to_str().expect("UTF-8").to_owned();
    let image = path("images/image.qcow2");
    let attempt = |name: &str, policy: BackingPolicy| {
        let made = MemFiles::default();
        create(&made, IMAGE, &options(Some((name, "raw"))));
        fs::write(&image, made.get(IMAGE).expect("made")).expect("image");
        let files = Arc::new(Files::new(Caching::Buffered));
        let ring = Uring::new(Arc::clone(&files), 8).expect("ring");
        let options = OpenOptions { read_only: true, backing_policy: policy, ..OpenOptions::default() };
        block_on(&ring, Image::open(&ring, &*files, &image, &options)).expect("ring").map(drop)
    };
    let under = || BackingPolicy::Under(vec![path("images"), path("allowed")]);
    for name in [absolute.as_str(), "../allowed/base", "../allowed/../allowed/base"] {
        assert!(attempt(name, BackingPolicy::Any).is_ok(), "{name}");
        assert!(attempt(name, under()).is_ok(), "{name}");
        let error = attempt(name, BackingPolicy::None).expect_err("none").to_string();
        assert!(error.contains("names the backing file"), "{error}");
    }
    assert!(attempt("../secret", BackingPolicy::Any).is_ok(), "as QEMU");
    for name in ["../secret", "../allowed/link", "../allowed/../secret", "/etc/passwd"] {
        let error = attempt(name, under()).expect_err(name).to_string();
        assert!(error.contains("--backing-dir"), "{error}");
    }
}

/// Bit 1 at byte 72 would be the corrupt bit of a version 3 header; in version 2 it is an extension.
#[test]
fn version_2_has_no_bits_at_byte_72() {
    let files = MemFiles::default();
    create(&files, IMAGE, &CreateOptions { version: Version::V2, ..options(None) });
    let mut bytes = files.get(IMAGE).expect("made");
    // An unknown extension of no bytes, which reads as incompatible feature 33 in version 3.
    bytes[72..80].copy_from_slice(&[0, 0, 0, 2, 0, 0, 0, 0]);
    files.put(IMAGE, bytes);
    let lane = Lane::new(&open(&files, false).expect("opens"), files.clone(), 1);
    run(lane.write(0, Buf::zeroed(4096))).expect("writes");
    run(lane.close()).expect("closes");
    assert_eq!(files.get(IMAGE).expect("kept")[72..80], [0, 0, 0, 2, 0, 0, 0, 0]);
}

/// A header of version 3 with words at some offsets, of an image that is empty otherwise.
fn with_words(files: &MemFiles, words: &[(u64, u64)]) -> Vec<u8> {
    create(files, IMAGE, &options(None));
    let mut bytes = files.get(IMAGE).expect("made");
    words.iter().for_each(|(at, word)| bytes[*at as usize..][..8].copy_from_slice(&word.to_be_bytes()));
    files.put(IMAGE, bytes.clone());
    bytes
}

/// What nobody here understands is not served, not even to a reader, and not repaired.
#[test]
fn what_is_not_understood_is_refused_by_name_and_left_as_it_is() {
    for (at, word, words) in [
        (header::INCOMPATIBLE_OFFSET, 1 << 40, "not known: bit 40"),
        (header::INCOMPATIBLE_OFFSET, header::EXTERNAL_DATA, "data file"),
        // crypt_method and the L1 table's size share a word.
        (32, 1 << 32 | 1, "AES"),
    ] {
        let files = MemFiles::default();
        let bytes = with_words(&files, &[(at, word)]);
        assert_refused(&files, words);
        let checked = [Repair::None, Repair::Leaks, Repair::All].map(|repair| {
            let options = CheckOptions { repair, ..CheckOptions::default() };
            run(check(&files, &files, Path::new(IMAGE), options)).is_ok()
        });
        // The metadata of the others can be checked.
        assert_eq!(checked, [word != 1 << 40; 3], "{words}");
        assert!(files.get(IMAGE).expect("kept") == bytes, "{words}: it was written to");
    }
}

/// Notes where the autoclear bits were still set when something else was written.
struct Watcher(MemFiles);

impl Hook for Watcher {
    async fn before(&self, operation: Operation<'_>) -> std::io::Result<()> {
        let is_change = match operation {
            Operation::Write { at, .. } => at > 0,
            Operation::PunchHole | Operation::Allocate { .. } | Operation::SetLen => true,
            Operation::Read { .. } | Operation::Sync(_) => false,
        };
        let autoclear = self.0.get(IMAGE).expect("kept")[header::AUTOCLEAR_OFFSET as usize..][..8].to_vec();
        assert!(
            !is_change || autoclear == [0; 8],
            "the image is changed, and its autoclear bits still vouch for it"
        );
        Ok(())
    }
}

/// Autoclear bits vouch for what this program does not keep true: they go before the first change, and only
/// for one. Compatible bits and extensions that are not known stay.
#[test]
fn unknown_bits_are_cleared_or_kept_as_the_format_asks() {
    let files = MemFiles::default();
    let before = with_words(
        &files,
        &[
            (header::COMPATIBLE_OFFSET, 1 << 50),
            (header::AUTOCLEAR_OFFSET, 1 << 40 | 4),
            (112, 0x7777_7777 << 32),
            (120, 0),
        ],
    );
    let host = Hooked::new(&files, Watcher(files.clone()));
    let lane = host.lane(&host.open(64 << 10));
    run(lane.read(0, Buf::zeroed(4096))).expect("reads");
    run(lane.close()).expect("closes");
    assert!(files.get(IMAGE).expect("kept") == before, "nothing was asked for");

    let lane = host.lane(&host.open(64 << 10));
    run(lane.write(0, Buf::from_bytes(&[1; 4096]))).expect("writes");
    run(lane.close()).expect("closes");
    let after = files.get(IMAGE).expect("kept");
    let autoclear = header::AUTOCLEAR_OFFSET as usize..header::AUTOCLEAR_OFFSET as usize + 8;
    assert_eq!(after[autoclear.clone()], [0; 8]);
    assert_eq!(after[72..autoclear.start], before[72..autoclear.start], "incompatible and compatible bits");
    assert_eq!(after[autoclear.end..4096], before[autoclear.end..4096], "the rest of the header's cluster");
}

/// A descriptor beyond the end of the file, or of data that is none: the cluster fails, its
/// neighbours do not, and the image is not condemned for it.
#[test]
fn compressed_data_that_is_none_fails_alone() {
    let files = MemFiles::default();
    create(&files, IMAGE, &options(None));
    let lane = Lane::new(&open(&files, false).expect("opens"), files.clone(), 1);
    run(lane.write(0, Buf::from_bytes(&[0x11; 3 * 4096]))).expect("writes");
    run(lane.close()).expect("closes");
    let sound = files.get(IMAGE).expect("kept");
    let word = |at: u64| word::get(&sound, at as usize).expect("eight bytes");
    let l2 = word(word(header::L1_TABLE_OFFSET)) & 0x00ff_ffff_ffff_fe00;
    let data = word(l2) & 0x00ff_ffff_ffff_fe00;
    for place in [data, sound.len() as u64 + 512, 1 << 40] {
        let mut bytes = sound.clone();
        // Seven sectors: as many as the descriptor can say.
        bytes[l2 as usize + 8..][..8].copy_from_slice(&(1 << 62 | 7 << 58 | place).to_be_bytes());
        files.put(IMAGE, bytes);
        let lane = Lane::new(&open(&files, true).expect("opens"), files.clone(), 1);
        let error = run(lane.read(4096, Buf::zeroed(4096))).expect_err("no stream");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains("compressed cluster at offset"), "{error}");
        for at in [0, 8192] {
            let buf = Buf::zeroed(4096);
            run(lane.read(at, buf.clone())).expect("reads");
            assert_eq!(buf.to_vec(), [0x11; 4096]);
        }
    }
}

/// What QEMU reads of a cluster of an image: its bytes, or that it cannot be read.
fn read_by_qemu(image: &[u8], at: u64) -> Option<Vec<u8>> {
    let directory = tempfile::tempdir().expect("temporary directory");
    let (image_path, raw_path) = (directory.path().join("image"), directory.path().join("raw"));
    fs::write(&image_path, image).expect("written");
    let mut convert = Command::new("qemu-img");
    let convert = convert.args(["convert", "-f", "qcow2", "-O", "raw"]).arg(&image_path).arg(&raw_path);
    let finished = convert.output().expect("qemu-utils are installed: cargo xtask setup");
    let raw = finished.status.success().then(|| fs::read(&raw_path).expect("converted"))?;
    Some(raw[at as usize..][..4096].to_vec())
}

/// Streams that give more or less than a cluster, and frames in a row: ours and QEMU read the same, or both
/// refuse.
#[test]
fn compressed_data_of_another_length_is_as_qemu_has_it() {
    let bytes: Vec<u8> = (0..8192_u32).map(|at| (at / 9) as u8).collect();
    let zlib = |bytes: &[u8]| {
        let mut stream = flate2::Compress::new(flate2::Compression::default(), false);
        let mut out = Vec::with_capacity(8192);
        stream.compress_vec(bytes, &mut out, flate2::FlushCompress::Finish).expect("compressed");
        out
    };
    let zstd = |bytes: &[u8]| zstd::bulk::compress(bytes, 3).expect("compressed");
    let mut verdicts = Vec::new();
    for (compression, pack) in
        [(Compression::Zlib, &zlib as &dyn Fn(&[u8]) -> Vec<u8>), (Compression::Zstd, &zstd)]
    {
        let files = MemFiles::default();
        create(&files, IMAGE, &CreateOptions { compression, ..options(None) });
        let lane = Lane::new(&open(&files, false).expect("opens"), files.clone(), 1);
        run(lane.write(0, Buf::from_bytes(&[0x11; 3 * 4096]))).expect("writes");
        run(lane.close()).expect("closes");
        let mut image = files.get(IMAGE).expect("kept");
        let word = |at: u64| word::get(&image, at as usize).expect("eight bytes");
        let l2 = word(word(header::L1_TABLE_OFFSET)) & 0x00ff_ffff_ffff_fe00;
        let place = (word(l2 + 8) & 0x00ff_ffff_ffff_fe00) as usize;
        image[l2 as usize + 8..][..8].copy_from_slice(&(1 << 62 | 7 << 58 | place as u64).to_be_bytes());
        for stream in [
            pack(&bytes[..4096]),
            pack(&bytes),
            pack(&bytes[..4097]),
            pack(&bytes[..4095]),
            [pack(&bytes[..1024]), pack(&bytes[1024..4096])].concat(),
            [pack(&bytes[..1024]), pack(&bytes[1024..])].concat(),
            pack(&bytes[..4096])[..100].to_vec(),
        ] {
            image[place..][..4096].fill(0xAA);
            image[place..][..stream.len()].copy_from_slice(&stream);
            files.put(IMAGE, image.clone());
            let lane = Lane::new(&open(&files, true).expect("opens"), files.clone(), 1);
            let buf = Buf::zeroed(4096);
            let ours = run(lane.read(4096, buf.clone())).ok().map(|()| buf.to_vec());
            assert!(ours == read_by_qemu(&image, 4096), "{compression:?} {ours:?}");
            verdicts.push(ours.is_some());
        }
    }
    let (zlib, zstd) = verdicts.split_at(verdicts.len() / 2);
    assert_eq!(zlib, [true, true, true, false, false, false, false]);
    assert_eq!(zstd, [true, false, false, false, true, false, false]);
}

/// What QEMU reads of the disk that the files make together.
fn chain_by_qemu(files: &MemFiles, names: &[String]) -> Vec<u8> {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| directory.path().join(name);
    names.iter().for_each(|name| fs::write(path(name), files.get(name).expect("kept")).expect("copy"));
    let mut convert = Command::new("qemu-img");
    let convert = convert.args(["convert", "-f", "qcow2", "-O", "raw"]).arg(path(IMAGE)).arg(path("raw"));
    let finished = convert.output().expect("qemu-utils are installed: cargo xtask setup");
    assert!(finished.status.success(), "{}", String::from_utf8_lossy(&finished.stderr));
    fs::read(path("raw")).expect("converted")
}

/// A disk whose size is no multiple of a sector, beneath others: QEMU shows the whole sectors of it. One file
/// below the top, and more, which are flattened.
#[test]
fn a_backing_disk_of_an_odd_size_ends_where_it_does_for_qemu() {
    let set_size = |files: &MemFiles, name: &str, size: u64| {
        let mut bytes = files.get(name).expect("kept");
        bytes[header::SIZE_OFFSET as usize..][..8].copy_from_slice(&size.to_be_bytes());
        files.put(name, bytes);
    };
    let end = 64 << 10;
    for size in [1000, 511, 4095, 4097, 40_000, 512] {
        for depth in 2..=4 {
            let files = MemFiles::default();
            let sized =
                |backing: Option<(&str, &str)>| CreateOptions { virtual_size: end, ..options(backing) };
            create(&files, IMAGE, &sized(None));
            let lane = Lane::new(&open(&files, false).expect("opens"), files.clone(), 1);
            run(lane.write(0, Buf::from_bytes(&vec![7; end as usize]))).expect("writes");
            run(lane.close()).expect("closes");
            let mut names = vec!["0".to_owned()];
            files.put("0", files.get(IMAGE).expect("kept"));
            set_size(&files, "0", size);
            for number in 1..depth {
                let name = if number + 1 == depth { IMAGE.to_owned() } else { number.to_string() };
                create(&files, &name, &sized(Some((&names[number - 1], "qcow2"))));
                names.push(name);
            }
            let read = || {
                let lane = Lane::new(&open(&files, true).expect("opens"), files.clone(), 1);
                let buf = Buf::zeroed(end as usize);
                run(lane.read(0, buf.clone())).expect("reads");
                buf.to_vec()
            };
            let shown = (size - size % 512) as usize;
            let bytes = read();
            assert!(bytes[..shown].iter().all(|byte| *byte == 7), "{size}, {depth} files");
            assert!(bytes[shown..].iter().all(|byte| *byte == 0), "{size}, {depth} files");
            assert!(bytes == chain_by_qemu(&files, &names), "{size}, {depth} files");

            // What is copied up around a write is what was shown.
            let lane = Lane::new(&open(&files, false).expect("opens"), files.clone(), 1);
            run(lane.write(shown as u64 & !4095, Buf::from_bytes(&[9; 512]))).expect("writes");
            run(lane.close()).expect("closes");
            assert!(read() == chain_by_qemu(&files, &names), "{size}, {depth} files, written to");
        }
    }
}
