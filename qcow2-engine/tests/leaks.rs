//! What a crash leaks is given back at the next opening, beside requests on other lanes.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, Idle, Mirror,
    hooked::{Hook, Hooked, Operation},
    leaks, run,
};
use qcow2_engine::{
    Image, Lane, OpenOptions, Pace, Reclaimed, Verdict, ZeroMode,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::word;
use std::{
    cell::{Cell, RefCell},
    future::Future,
    path::Path,
    pin::Pin,
    process::Command,
};

const DISK: usize = 8 << 20;

fn tool(name: &str, args: &[&str]) {
    let output = Command::new(name).args(args).output().expect("qemu-utils are installed: cargo xtask setup");
    assert!(output.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An image made by QEMU, with what a crash of ours leaves of it, and its content.
fn leaky(options: &str, has_snapshots: bool) -> (MemFiles, Vec<u8>) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join(IMAGE);
    let name = path.to_str().expect("UTF-8");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, name, "8M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 3M", "-c", "write -P 9 5M 1M", name]);
    let mut bytes = vec![0; DISK];
    bytes[..3 << 20].fill(7);
    bytes[5 << 20..6 << 20].fill(9);
    if has_snapshots {
        tool("qemu-img", &["snapshot", "-c", "one", name]);
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 8 1M 64k", name]);
        tool("qemu-img", &["snapshot", "-c", "two", name]);
        bytes[1 << 20..(1 << 20) + (64 << 10)].fill(8);
    }
    let files = MemFiles::default();
    files.put(IMAGE, std::fs::read(&path).expect("image"));
    let mut mirror = Mirror::open(&files, bytes);
    mirror.write(0, 1, 512 << 10);
    mirror.write(6 << 20, 2, 300 << 10);
    mirror.flush();
    mirror.discard(2 << 20, 1 << 20);
    mirror.write(5 << 20, 3, 100 << 10);
    mirror.flush();
    let bytes = std::mem::take(&mut mirror.bytes);
    (files, bytes)
}

/// Requests on two lanes, one between any two steps of the search.
struct Busy {
    lanes: [Lane<MemFiles>; 2],
    bytes: RefCell<Vec<u8>>,
    steps: Cell<usize>,
    stop_at: usize,
}

impl Pace for Busy {
    fn rest(&self) -> Pin<Box<dyn Future<Output = bool> + '_>> {
        Box::pin(async {
            let step = self.steps.replace(self.steps.get() + 1);
            let lane = &self.lanes[step % 2];
            let at = step * 77 * 4096 % (DISK - (64 << 10)) / 512 * 512;
            match step % 5 {
                0..=2 => {
                    let data = vec![step as u8 | 1; 24 << 10];
                    lane.write(at as u64, Buf::from_bytes(&data)).await.expect("write");
                    self.bytes.borrow_mut()[at..at + data.len()].copy_from_slice(&data);
                }
                3 => {
                    let at = at >> 16 << 16;
                    lane.write_zeroes(at as u64, 64 << 10, ZeroMode::Unmap).await.expect("zeroes");
                    self.bytes.borrow_mut()[at..at + (64 << 10)].fill(0);
                }
                _ => lane.maintain().await.expect("maintain"),
            }
            step + 1 < self.stop_at
        })
    }
}

fn open(files: &MemFiles) -> std::sync::Arc<Image> {
    run(Image::open(files, files, Path::new(IMAGE), &OpenOptions::default())).expect("opens")
}

#[test]
fn leaks_are_given_back_under_load() {
    for (options, has_snapshots) in [
        ("cluster_size=64k", false),
        ("cluster_size=64k", true),
        ("cluster_size=4k,refcount_bits=64", true),
        ("cluster_size=4k,refcount_bits=1", false),
        ("cluster_size=512", true),
        ("compat=0.10,cluster_size=2M", true),
    ] {
        let (files, bytes) = leaky(options, has_snapshots);
        let before = leaks(&files);
        assert!(before > 0, "{options}: the crash has leaked nothing");
        let image = open(&files);
        let mut mirror = Mirror::around(&files, &image, bytes);
        let lanes = [(); 2].map(|()| Lane::new(&image, files.clone(), 4));
        let busy = Busy {
            lanes,
            bytes: RefCell::new(std::mem::take(&mut mirror.bytes)),
            steps: Cell::new(0),
            stop_at: usize::MAX,
        };
        let done = run(mirror.lane.reclaim_leaks(&busy)).expect("search");
        assert_eq!(done.verdict, Verdict::Complete, "{options}");
        assert_eq!((done.freed + done.lowered, done.left), (before, 0), "{options}");
        mirror.bytes = busy.bytes.into_inner();
        mirror.verify();
        mirror.close_and_judge();
    }
}

#[test]
fn a_search_stops_when_told_and_begins_anew_at_the_next_opening() {
    let (files, bytes) = leaky("cluster_size=4k", true);
    let image = open(&files);
    let lane = Lane::new(&image, files.clone(), 4);
    for stop_at in [1, 2, 3, 5, 8] {
        let lanes = [(); 2].map(|()| Lane::new(&image, files.clone(), 4));
        let bytes = RefCell::new(bytes.clone());
        let done =
            run(lane.reclaim_leaks(&Busy { lanes, bytes, steps: Cell::new(0), stop_at })).expect("search");
        assert_eq!(done.verdict, Verdict::Stopped);
    }
    run(lane.close()).expect("close");
    assert!(leaks(&files) > 0);
}

/// One word of an image, as it must not be.
#[test]
fn whatever_makes_no_sense_ends_the_search_and_nothing_is_given_back() {
    let (files, _) = leaky("cluster_size=64k", false);
    let sound = files.get(IMAGE).expect("kept");
    let word = |at: usize| word::get(&sound, at).expect("8 bytes");
    let l2 = (word(word(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    let block = word(word(48) as usize) as usize;
    // A reserved bit, a place beyond the file, a count of 0 (of the L2 table) below the references.
    let count = block + (l2 >> 16) * 2;
    let damages: [(usize, Vec<u8>); 3] = [
        (l2 + 8 * 20, (word(l2 + 8 * 20) | 1 << 57).to_be_bytes().to_vec()),
        (l2 + 8 * 20, (1_u64 << 63 | 0x7fff << 16).to_be_bytes().to_vec()),
        (count, vec![0, 0]),
    ];
    for (at, bytes) in damages {
        let mut damaged = sound.clone();
        damaged[at..at + bytes.len()].copy_from_slice(&bytes);
        files.put(IMAGE, damaged.clone());
        let image = open(&files);
        let done = run(Lane::new(&image, files.clone(), 1).reclaim_leaks(&Idle)).expect("search");
        assert!(matches!(done.verdict, Verdict::Doubt(_)), "{done:?}");
        assert_eq!((done.freed, done.lowered), (0, 0));
        assert!(files.get(IMAGE).expect("kept") == damaged, "the file was changed");
    }
}

/// At a certain step, a write that meets damage; `after` is the file as it is then.
struct Unlucky {
    lane: Lane<MemFiles>,
    files: MemFiles,
    at: u64,
    damaged_at: usize,
    steps: Cell<usize>,
    after: RefCell<Option<Vec<u8>>>,
}

impl Pace for Unlucky {
    fn rest(&self) -> Pin<Box<dyn Future<Output = bool> + '_>> {
        Box::pin(async {
            if self.steps.replace(self.steps.get() + 1) == self.damaged_at {
                self.lane.write(self.at, Buf::from_bytes(&[1; 512])).await.expect_err("a damaged table");
                *self.after.borrow_mut() = self.files.get(IMAGE);
            }
            true
        })
    }
}

/// The count of an L2 table is two, which the search by itself would leave alone; a write condemns the image
/// for it.
#[test]
fn damage_that_a_request_meets_ends_the_search() {
    const UNMAPPED: u64 = 2 << 20;
    let (files, _) = leaky("cluster_size=512", false);
    let mut image = files.get(IMAGE).expect("kept");
    let word = |at: usize| word::get(&image, at).expect("8 bytes");
    let l2 = word(word(40) as usize + (UNMAPPED >> 15) as usize * 8) & 0x00ff_ffff_ffff_fe00;
    let cluster = (l2 >> 9) as usize;
    let block = word(word(48) as usize + cluster / 256 * 8) as usize;
    image[block + cluster % 256 * 2 + 1] = 2;
    for damaged_at in 0.. {
        files.put(IMAGE, image.clone());
        let opened = open(&files);
        let lane = || Lane::new(&opened, files.clone(), 4);
        let after = RefCell::default();
        let pace = Unlucky {
            lane: lane(),
            files: files.clone(),
            at: UNMAPPED,
            damaged_at,
            steps: Cell::new(0),
            after,
        };
        let done = run(lane().reclaim_leaks(&pace)).expect("search");
        let Some(after) = pace.after.take() else {
            assert!(damaged_at > 100 && done.freed > 1000, "{damaged_at} {done:?}");
            break;
        };
        assert!(matches!(done.verdict, Verdict::Doubt(_)), "damage at step {damaged_at}: {done:?}");
        assert!(files.get(IMAGE) == Some(after), "damage at step {damaged_at}: the file was changed");
    }
}

#[test]
fn a_read_only_image_is_left_alone() {
    let (files, _) = leaky("cluster_size=64k", false);
    let before = files.get(IMAGE);
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let image = run(Image::open(&files, &files, Path::new(IMAGE), &options)).expect("opens");
    let done = run(Lane::new(&image, files.clone(), 1).reclaim_leaks(&Idle)).expect("search");
    assert_eq!(done.freed, 0);
    assert!(files.get(IMAGE) == before);
}

/// What it has read of the mapping, and is a run, requests find in memory.
#[test]
fn a_search_leaves_behind_what_it_has_learnt_of_the_mapping() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join(IMAGE);
    let name = path.to_str().expect("UTF-8");
    // 8 slices, each a run; then one entry in the last of them is another.
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,preallocation=metadata", name, "16M"],
    );
    tool("qemu-io", &["-f", "qcow2", "-c", "discard 15M 4k", name]);
    let files = MemFiles::default();
    files.put(IMAGE, std::fs::read(&path).expect("image"));
    let image = open(&files);
    let lane = Lane::new(&image, files.clone(), 4);
    let is_known = |at: u64| lane.direct_read(at, 512).map(|direct| lane.end_direct(direct)).is_some();
    assert!(!is_known(0));
    let done = run(lane.reclaim_leaks(&Idle)).expect("search");
    assert_eq!((done.verdict, done.freed), (Verdict::Complete, 0));
    let known: Vec<_> = (0..8).map(|slice| is_known(slice << 21)).collect();
    assert_eq!(known, [true, true, true, true, true, true, true, false]);
    // What changes then is what counts.
    run(lane.write_zeroes(0, 4096, ZeroMode::Unmap)).expect("zeroes");
    assert!(!is_known(0) && is_known(4096));
}

/// Compressed clusters that share one host cluster, which a crash has left with more counts than references,
/// and a cluster that nobody refers to. With the guest's offsets.
fn shared() -> (MemFiles, Vec<u64>) {
    shared_by(20, 4096, |at| (at / 64 % 251) as u8)
}

/// So many of them, of this size and with this content.
fn shared_by(sharers: u64, cluster_size: u64, content: impl Fn(u64) -> u8) -> (MemFiles, Vec<u64>) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let (raw, path) = (directory.path().join("raw"), directory.path().join(IMAGE));
    let content: Vec<u8> = (0..sharers * cluster_size).map(content).collect();
    std::fs::write(&raw, content).expect("raw file");
    let [raw, name] = [&raw, &path].map(|path| path.to_str().expect("UTF-8"));
    let options = format!("cluster_size={cluster_size},refcount_bits=64");
    tool("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, raw, name]);
    let mut image = std::fs::read(&path).expect("image");
    let word = |image: &[u8], at: u64| word::get(image, at as usize).expect("8 bytes");
    let l2 = word(&image, word(&image, 40)) & 0x00ff_ffff_ffff_fe00;
    let place = (word(&image, l2) & ((1 << 54) - 1)) / cluster_size;
    let block = word(&image, word(&image, 48));
    assert_eq!(word(&image, block + place * 8), sharers);
    let unused = (image.len() as u64).div_ceil(cluster_size);
    image.resize(((unused + 1) * cluster_size) as usize, 1);
    for (cluster, leaked) in [(place, 3), (unused, 1)] {
        let count = word(&image, block + cluster * 8) + leaked;
        image[(block + cluster * 8) as usize..][..8].copy_from_slice(&count.to_be_bytes());
    }
    let files = MemFiles::default();
    files.put(IMAGE, image);
    assert_eq!(leaks(&files), 2);
    (files, (0..sharers).map(|guest| guest * cluster_size).collect())
}

/// References were counted up to 126, and what had more was passed over as if it were in order: it kept what
/// had leaked, and the search said that nothing was left.
#[test]
fn a_cluster_with_hundreds_of_references_is_judged_too() {
    let (files, _) = shared_by(300, 64 << 10, |_| 7);
    let image = open(&files);
    let lane = Lane::new(&image, files.clone(), 4);
    let done = run(lane.reclaim_leaks(&Idle)).expect("search");
    assert_eq!(done, Reclaimed { freed: 1, lowered: 1, left: 0, verdict: Verdict::Complete });
    run(lane.close()).expect("close");
    assert_eq!(leaks(&files), 0);
}

/// With tens of thousands it is not, and the search says so.
#[test]
fn what_has_more_references_than_are_counted_is_left() {
    let (files, _) = shared();
    let mut image = files.get(IMAGE).expect("kept");
    let word = |image: &[u8], at: u64| word::get(image, at as usize).expect("8 bytes");
    let entry = word(&image, word(&image, 40)) & 0x00ff_ffff_ffff_fe00;
    let compressed = word(&image, entry);
    let place = (compressed & ((1 << 54) - 1)) / 4096;
    let count = word(&image, word(&image, 48)) + place * 8;
    // 65 more tables of 512 entries each, behind the end of the file, all of the same cluster.
    const TABLES: u64 = 65;
    let (l1, tables) = (word(&image, 40), (image.len() as u64).next_multiple_of(4096));
    image.resize((tables + TABLES * 4096) as usize, 0);
    for at in (tables..tables + TABLES * 4096).step_by(8) {
        image[at as usize..][..8].copy_from_slice(&compressed.to_be_bytes());
    }
    image[24..32].copy_from_slice(&((TABLES + 1) << 21).to_be_bytes());
    image[36..40].copy_from_slice(&(TABLES as u32 + 1).to_be_bytes());
    let block = word(&image, word(&image, 48));
    for table in 0..TABLES {
        let host = tables + table * 4096;
        image[(l1 + 8 + table * 8) as usize..][..8].copy_from_slice(&(host | 1 << 63).to_be_bytes());
        image[(block + host / 4096 * 8) as usize..][..8].copy_from_slice(&1_u64.to_be_bytes());
    }
    let counted = word(&image, count) + TABLES * 512;
    image[count as usize..][..8].copy_from_slice(&counted.to_be_bytes());
    files.put(IMAGE, image);
    assert_eq!(leaks(&files), 2);
    let image = open(&files);
    let lane = Lane::new(&image, files.clone(), 4);
    let done = run(lane.reclaim_leaks(&Idle)).expect("search");
    assert_eq!(done, Reclaimed { freed: 1, lowered: 0, left: 1, verdict: Verdict::Complete });
    run(lane.close()).expect("close");
    assert_eq!(leaks(&files), 1);
}

/// Lets go of guest clusters, at a certain step or at the first hole that is punched.
struct LetsGo {
    lane: Lane<MemFiles>,
    clusters: Vec<u64>,
    at: usize,
    steps: Cell<usize>,
}

impl LetsGo {
    async fn step(&self) {
        if self.steps.replace(self.steps.get() + 1) == self.at {
            for &at in &self.clusters {
                self.lane.discard(at, 4096).await.expect("discard");
            }
        }
    }
}

impl Pace for LetsGo {
    fn rest(&self) -> Pin<Box<dyn Future<Output = bool> + '_>> {
        Box::pin(async {
            self.step().await;
            true
        })
    }
}

impl Hook for LetsGo {
    async fn before(&self, operation: Operation<'_>) -> std::io::Result<()> {
        if let Operation::PunchHole = operation {
            self.step().await;
        }
        Ok(())
    }
}

/// A shared cluster lost a reference between being judged and being lowered. It was not lowered then,
/// rightly, but was not looked at again either, and kept what had leaked.
#[test]
fn a_cluster_that_changes_after_it_was_judged_is_looked_at_again() {
    let (files, sharers) = shared();
    let image = open(&files);
    let lane = Lane::new(&image, files.clone(), 4);
    let hook = LetsGo { lane, clusters: sharers[1..2].to_vec(), at: 0, steps: Cell::new(0) };
    let files = Hooked::new(&files, hook);
    let lane = files.lane(&image);
    let done = run(lane.reclaim_leaks(&Idle)).expect("search");
    let expected = Reclaimed { freed: 1, lowered: 1, left: 0, verdict: Verdict::Complete };
    assert_eq!(done, expected);
    run(lane.close()).expect("close");
    assert_eq!(leaks(&files.files), 0);
}

/// It loses all of them: what is left of its count has leaked, though nothing refers to it any more.
#[test]
fn a_shared_cluster_whose_references_all_go_is_given_back_whenever_they_go() {
    for at in 0.. {
        let (files, clusters) = shared();
        let image = open(&files);
        let lane = Lane::new(&image, files.clone(), 4);
        let pace = LetsGo { lane: lane.clone(), clusters, at, steps: Cell::new(0) };
        let done = run(lane.reclaim_leaks(&pace)).expect("search");
        assert_eq!((done.verdict, done.left), (Verdict::Complete, 0), "step {at}");
        run(lane.close()).expect("close");
        assert_eq!(leaks(&files), 0, "let go of at step {at}");
        if pace.steps.get() <= at {
            assert!(at > 5, "{at} steps");
            break;
        }
    }
}

/// It loses as many references as have leaked, and they are given back, after its references were counted: then
/// there were as many counts as references had been seen, and what had leaked was passed over.
#[test]
fn references_that_go_while_they_are_counted_do_not_stand_for_leaks() {
    for at in 0.. {
        let (files, sharers) = shared();
        let image = open(&files);
        let lane = Lane::new(&image, files.clone(), 4);
        let pace = GivesBack(LetsGo {
            lane: lane.clone(),
            clusters: sharers[..3].to_vec(),
            at,
            steps: Cell::new(0),
        });
        let done = run(lane.reclaim_leaks(&pace)).expect("search");
        assert_eq!((done.verdict, done.left), (Verdict::Complete, 0), "step {at}");
        run(lane.close()).expect("close");
        assert_eq!(leaks(&files), 0, "let go of at step {at}");
        if pace.0.steps.get() <= at {
            assert!(at > 5, "{at} steps");
            break;
        }
    }
}

/// And gives back what it has let go of, at once.
struct GivesBack(LetsGo);

impl Pace for GivesBack {
    fn rest(&self) -> Pin<Box<dyn Future<Output = bool> + '_>> {
        Box::pin(async {
            self.0.step().await;
            self.0.lane.maintain().await.expect("maintenance");
            true
        })
    }
}
