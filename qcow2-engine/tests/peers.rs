//! What corrupted other engines' images, each as a test that an engine with the same defect fails.
//!
//! All of these are reports on Cloud Hypervisor, the other QCOW2 engine in Rust with several queues. Each
//! test opens with what went wrong there, in our words. The simulator covers the same ground at random;
//! here the stories have names.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, Mirror, create,
    hooked::{Hook, Hooked, Operation},
    run,
};
use futures_util::future::{join, join4};
use qcow2_engine::{
    CheckOptions, ErrorKind, OpenOptions, check, grow,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::{Backing, CreateOptions};
use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    path::Path,
    process::Command,
    task::Poll,
};

const CLUSTER: u64 = 4096;

/// Where, and what.
type Write = (u64, Vec<u8>);

/// A host that fails, waits and takes notes.
#[derive(Default)]
struct Host {
    /// Writes and allocations until one fails for want of space.
    room: Cell<Option<u64>>,
    /// Holes wait while this is set.
    holds_holes: Cell<bool>,
    /// Holes that wait, or did.
    holes: Cell<u64>,
    /// Every operation waits for a few polls, drawn from this; 0: none does.
    chance: Cell<u64>,
    /// Groups of writes, with a barrier between two.
    written: RefCell<Vec<Vec<Write>>>,
}

impl Host {
    fn note(&self, at: u64, buf: &Buf) {
        let mut groups = self.written.borrow_mut();
        if groups.is_empty() {
            groups.push(Vec::new());
        }
        if let Some(last) = groups.last_mut() {
            last.push((at, buf.to_vec()));
        }
    }

    fn take_room(&self) -> io::Result<()> {
        match self.room.get() {
            Some(0) => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            Some(room) => {
                self.room.set(Some(room - 1));
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Lets others go first, now and then.
    async fn dawdle(&self) {
        let chance = self.chance.get();
        if chance == 0 {
            return;
        }
        let next = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.chance.set(next | 1);
        let mut polls = next >> 61;
        poll_fn(|_| {
            polls = polls.saturating_sub(1);
            if polls == 0 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

impl Hook for Host {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        if let Operation::PunchHole = operation {
            self.holes.set(self.holes.get() + 1);
            poll_fn(|_| if self.holds_holes.get() { Poll::Pending } else { Poll::Ready(()) }).await;
        }
        self.dawdle().await;
        match operation {
            Operation::Write { at, buf } => {
                self.take_room()?;
                self.note(at, buf);
            }
            Operation::Allocate { .. } => self.take_room()?,
            Operation::Sync(_) => self.written.borrow_mut().push(Vec::new()),
            Operation::Read { .. } | Operation::PunchHole | Operation::SetLen => {}
        }
        Ok(())
    }
}

fn options(size: u64) -> CreateOptions {
    CreateOptions { virtual_size: size, cluster_bits: CLUSTER.ilog2(), ..CreateOptions::default() }
}

fn tool(name: &str, args: &[&str]) {
    let output = Command::new(name).args(args).output().expect("qemu-utils are installed: cargo xtask setup");
    assert!(output.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What `check` calls corrupt.
fn corruptions(files: &MemFiles) -> Vec<String> {
    let report = run(check(files, files, Path::new(IMAGE), CheckOptions::default())).expect("checks");
    let count = report.found.corruptions + report.found.check_errors;
    let list: Vec<_> = report.found.list.iter().map(ToString::to_string).collect();
    if count == 0 { Vec::new() } else { list }
}

/// Issue 8606: the allocator took clusters for free that were live L2 tables, and refcount blocks and
/// guest data were written over 134 of 200 tables. The image was the compressed output of a conversion,
/// made larger afterwards, and had been written to for ten days.
#[test]
fn cloud_hypervisor_8606_live_l2_tables_are_handed_out_as_free() {
    let (old, new) = (4_usize << 20, 9_usize << 20);
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| directory.path().join(name).to_str().expect("UTF-8").to_owned();
    let content: Vec<u8> = (0..old).map(|at| if at % 3 < 2 { (at >> 12) as u8 } else { 0 }).collect();
    std::fs::write(path("raw"), &content).expect("raw file");
    let format = ["-f", "raw", "-O", "qcow2", "-o", "cluster_size=512,refcount_bits=64"];
    tool("qemu-img", &[&["convert", "-c"], &format[..], &[&path("raw"), &path("image")]].concat());
    let files = MemFiles::default();
    files.put(IMAGE, std::fs::read(path("image")).expect("image"));
    run(grow(files.clone(), &files, Path::new(IMAGE), &OpenOptions::default(), new as u64)).expect("grows");
    let mut bytes = content;
    bytes.resize(new, 0);
    // 288 tables of 64 entries. Every session begins with an allocator that knows nothing.
    for session in 0..6_u64 {
        let mut mirror = Mirror::open(&files, bytes);
        for step in 0..80 {
            let at = (session * 7919 + step * 104_729) * 512 % (new as u64 - (64 << 10));
            match step % 4 {
                0 | 1 => mirror.write(at, (session * 80 + step) as u8, 12 << 10),
                2 => mirror.discard(at, 48 << 10),
                _ => {
                    mirror.flush();
                    run(mirror.lane.maintain()).expect("maintain");
                }
            }
        }
        mirror.verify();
        run(mirror.lane.close()).expect("close");
        assert_eq!(corruptions(&files), Vec::<String>::new(), "session {session}");
        bytes = mirror.bytes;
    }
    Mirror::open(&files, bytes).close_and_judge();
}

/// Issue 8621: with several queues and a backing file, on an overlay whose tables were filled already,
/// file systems were damaged under concurrent writes, deletions and flushes; with one queue they were not.
#[test]
fn cloud_hypervisor_8621_several_queues_on_a_warm_overlay() {
    let size = 2_u64 << 20;
    for seed in 1..=6_u64 {
        let files = MemFiles::default();
        let base: Vec<u8> = (0..size).map(|at| (at >> 9) as u8 ^ 0x5a).collect();
        files.put("base.raw", base.clone());
        let backing = Some(Backing { name: b"base.raw".to_vec(), format: "raw".into() });
        create(&files, IMAGE, &CreateOptions { backing, ..options(size) });
        let mut warm = Mirror::open(&files, base);
        (0..size).step_by(3 * CLUSTER as usize).for_each(|at| warm.write(at, 3, 1024));
        run(warm.lane.close()).expect("close");
        let host = Hooked::new(&files, Host::default());
        let image = host.open(8 * CLUSTER);
        let bytes = RefCell::new(warm.bytes);
        host.hook.chance.set(seed);
        // Four queues, whose sectors lie side by side in the same clusters.
        let queue = |number: u64| {
            let (lane, bytes) = (host.lane(&image), &bytes);
            async move {
                for step in 0..120_u64 {
                    let cluster = (step * 37 + seed * 11) % (size / CLUSTER);
                    let at = cluster * CLUSTER + number * 1024;
                    if step % 16 == number {
                        lane.flush().await.expect("flush");
                    } else if step % 16 == 8 + number {
                        lane.maintain().await.expect("maintain");
                    } else {
                        let data = vec![(step * 4 + number) as u8; 1024];
                        lane.write(at, Buf::from_bytes(&data)).await.expect("write");
                        bytes.borrow_mut()[at as usize..at as usize + 1024].copy_from_slice(&data);
                    }
                }
            }
        };
        run(join4(queue(0), queue(1), queue(2), queue(3)));
        host.hook.chance.set(0);
        run(host.lane(&image).close()).expect("close");
        let mirror = Mirror::open(&files, bytes.into_inner());
        mirror.verify();
        mirror.close_and_judge();
    }
}

/// Pull request 8624: a discard lowered the refcount first and left the hole for later. A flush on
/// another queue made the cluster available, it became an L2 table, and then came the hole.
#[test]
fn cloud_hypervisor_8624_a_late_hole_in_a_cluster_that_was_reused() {
    let size = 4_u64 << 20;
    let files = MemFiles::default();
    create(&files, IMAGE, &options(size));
    let host = Hooked::new(&files, Host::default());
    let image = host.open(CLUSTER);
    let (first, second) = (host.lane(&image), host.lane(&image));
    run(first.write(0, Buf::from_bytes(&vec![1; 256 << 10]))).expect("write");
    run(first.flush()).expect("flush");
    let length = files.get(IMAGE).expect("kept").len();
    run(first.discard(0, 256 << 10)).expect("discard");
    host.hook.holds_holes.set(true);
    let data = vec![2; 128 << 10];
    run(async {
        let reclaim = async { first.maintain().await.expect("maintain") };
        let reuse = async {
            // The hole is on its way: other queues flush, and need clusters for data and for a table.
            poll_fn(|_| if host.hook.holes.get() > 0 { Poll::Ready(()) } else { Poll::Pending }).await;
            second.flush().await.expect("flush");
            second.write(0, Buf::from_bytes(&data)).await.expect("write");
            second.write(3 << 20, Buf::from_bytes(&data)).await.expect("write");
            second.flush().await.expect("flush");
            host.hook.holds_holes.set(false);
        };
        join(reclaim, reuse).await
    });
    // With the hole made they are free: this takes them again.
    run(second.write(1 << 20, Buf::from_bytes(&data))).expect("write");
    run(second.flush()).expect("flush");
    let grown = files.get(IMAGE).expect("kept").len() - length;
    assert!(grown < 300 << 10, "the clusters are used again: {grown}");
    let mut bytes = vec![0; size as usize];
    [0, 1 << 20, 3 << 20].iter().for_each(|&at: &usize| bytes[at..at + (128 << 10)].fill(2));
    run(second.close()).expect("close");
    let mirror = Mirror::open(&files, bytes);
    mirror.verify();
    mirror.close_and_judge();
}

/// Pull requests 8637 and 8748: an allocation failed in the middle of a write, on a full host. What
/// had been done by then was not undone: the old L2 table was on the free list already, or the new one
/// was in the L1 table and counted 0; the next opening gave it to somebody else.
#[test]
fn cloud_hypervisor_8637_8748_double_allocation_after_a_failed_write() {
    let size = 2_u64 << 20;
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join(IMAGE);
    let name = path.to_str().expect("UTF-8");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", name, "2M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 1M", name]);
    // With a snapshot, tables are replaced by copies, as there.
    tool("qemu-img", &["snapshot", "-c", "one", name]);
    let image = std::fs::read(&path).expect("image");
    let mut failures = 0;
    for room in 0..60 {
        let files = MemFiles::default();
        files.put(IMAGE, image.clone());
        let mut bytes = vec![0; size as usize];
        bytes[..1 << 20].fill(7);
        let host = Hooked::new(&files, Host::default());
        let lane = host.lane(&host.open(4 * 512));
        host.hook.room.set(Some(room));
        let mut torn = Vec::new();
        for step in 0..12_usize {
            // In both halves, each time under another table.
            let at = step * 5 * (32 << 10) % size as usize;
            match run(lane.write(at as u64, Buf::from_bytes(&[step as u8 + 100; 3000 / 512 * 512]))) {
                Ok(()) => bytes[at..at + 2560].fill(step as u8 + 100),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                    torn.push((at, step as u8 + 100));
                }
            }
            // It fails as well as long as there is no room.
            let _ = run(lane.flush());
        }
        failures += torn.len();
        // There is room again, and the next process allocates what it takes for free.
        host.hook.room.set(None);
        run(lane.flush()).expect("flush");
        assert_eq!(corruptions(&files), Vec::<String>::new(), "room for {room}");
        drop(lane);
        let lane = host.lane(&host.open(64 * 512));
        for at in (0..size as usize).step_by(96 << 10) {
            run(lane.write(at as u64 + 8192, Buf::from_bytes(&[9; 4096]))).expect("write");
            bytes[at + 8192..at + 8192 + 4096].fill(9);
        }
        let found = Buf::zeroed(size as usize);
        run(lane.read(0, found.clone())).expect("read");
        let found = found.to_vec();
        for (at, value) in torn {
            // A write that failed may have been done in part.
            for sector in (at..at + 2560).step_by(512) {
                if found[sector..sector + 512] == [value; 512] {
                    bytes[sector..sector + 512].fill(value);
                }
            }
        }
        assert!(found == bytes, "room for {room}");
        run(lane.close()).expect("close");
        assert_eq!(corruptions(&files), Vec::<String>::new(), "room for {room}");
    }
    assert!(failures > 100, "{failures}");
}

/// Pull request 8721: a new L2 table was entered in the L1 table, which could be written, before its
/// cluster was counted: whoever stopped in between left a table that the next opening took for free.
#[test]
fn cloud_hypervisor_8721_l1_is_written_before_the_refcount() {
    let files = MemFiles::default();
    let size = 1 << 20;
    create(&files, IMAGE, &CreateOptions { cluster_bits: 9, refcount_order: 6, ..options(size) });
    let mut bytes = files.get(IMAGE).expect("made");
    let host = Hooked::new(&files, Host::default());
    let lane = host.lane(&host.open(4 * 512));
    for step in 0..40_u64 {
        run(lane.write(step * (24 << 10), Buf::from_bytes(&[1; 1536]))).expect("write");
        if step % 3 == 0 {
            run(lane.flush()).expect("flush");
        }
    }
    run(lane.flush()).expect("flush");
    // Whatever stops it, one write after a barrier may be all that is there of those up to the next.
    let written = host.hook.written.borrow();
    let count = written.iter().flatten().count();
    assert!(count > 50 && written.len() > 15, "{count} writes, {} barriers", written.len());
    bytes.resize(2 << 20, 0);
    let put = |bytes: &mut Vec<u8>, at: u64, data: &[u8]| {
        bytes[at as usize..at as usize + data.len()].copy_from_slice(data);
    };
    for (number, group) in written.iter().enumerate() {
        for (at, data) in group {
            let mut stopped = bytes.clone();
            put(&mut stopped, *at, data);
            let files = MemFiles::default();
            files.put(IMAGE, stopped);
            assert_eq!(corruptions(&files), Vec::<String>::new(), "{at:#x} alone after barrier {number}");
        }
        group.iter().for_each(|(at, data)| put(&mut bytes, *at, data));
    }
}

/// Pull request 8597: refcount blocks moved with each flush that changed them, and the clusters that they
/// left were not used again before the next opening. The file grew to twice its content and on, while
/// `check` had nothing to say.
#[test]
fn cloud_hypervisor_8597_the_file_grows_with_every_flush() {
    let size = 1_u64 << 20;
    let files = MemFiles::default();
    create(&files, IMAGE, &CreateOptions { cluster_bits: 9, refcount_order: 6, ..options(size) });
    let host = Hooked::new(&files, Host::default());
    let lane = host.lane(&host.open(16 * 512));
    let content: Vec<u8> = (0..size).map(|at| (at >> 9) as u8 | 1).collect();
    run(lane.write(0, Buf::from_bytes(&content))).expect("write");
    run(lane.flush()).expect("flush");
    let length = || files.get(IMAGE).expect("kept").len();
    let full = length();
    for round in 0..1500_u64 {
        let at = round * 7 * 4096 % (size - 8192) / 512 * 512;
        run(lane.discard(at, 8192)).expect("discard");
        run(lane.flush()).expect("flush");
        run(lane.maintain()).expect("maintain");
        run(lane.write(at, Buf::from_bytes(&content[at as usize..at as usize + 8192]))).expect("write");
        run(lane.flush()).expect("flush");
    }
    let grown = length() - full;
    assert!(grown <= 64 << 10, "{} rounds of 8 KiB: the file grew by {grown} bytes", 1500);
    run(lane.close()).expect("close");
    let mirror = Mirror::open(&files, content);
    mirror.verify();
    mirror.close_and_judge();
}
