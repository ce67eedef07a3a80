use super::{
    setup::{Delivery, build},
    *,
};
use crate::{
    exec::{Executor, block_on},
    io::{Access, FileId, Io, Storage, files::Caching},
};
use std::{fs::File, os::unix::fs::MetadataExt, path::PathBuf, task::Waker};

/// A file of `len` bytes on a disk file system: the build directory, because /tmp may be a tmpfs.
struct Fixture {
    dir: tempfile::TempDir,
    ring: Uring,
    file: FileId,
}

impl Fixture {
    fn new(caching: Caching, len: u64) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("file");
        File::create(&path).unwrap().set_len(len).unwrap();
        let files = Arc::new(Files::new(caching));
        let file = files.open(&path, Access::ReadWrite).unwrap();
        Self { dir, ring: Uring::new(files, 16).unwrap(), file }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("file")
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        block_on(&self.ring, future).unwrap()
    }
}

#[test]
fn what_is_written_is_read_back_directly_and_buffered() {
    for caching in [Caching::Auto, Caching::Buffered] {
        let it = Fixture::new(caching, 0);
        it.run(async {
            let data = Buf::zeroed(8192);
            data.slice(512..1024).fill(5);
            assert_eq!(it.ring.write(it.file, 4096, data.clone()).await.unwrap(), 8192);
            it.ring.sync(it.file).await.unwrap();
            let back = Buf::zeroed(16384);
            assert_eq!(it.ring.read(it.file, 0, back.clone()).await.unwrap(), 12288, "short at the end");
            assert!(back.slice(0..4096).to_vec().iter().all(|&b| b == 0));
            assert_eq!(back.slice(4096..12288).to_vec(), data.to_vec());
        });
    }
}

/// A call into the kernel was given up while an operation was queued: that one failed, others of the same
/// call never ended, and nobody was told.
#[test]
fn a_ring_that_has_failed_once_does_not_turn_again() {
    let it = Fixture::new(Caching::Buffered, 0);
    it.ring.turn(Wait::No).unwrap();
    it.ring.call(|_| Err(io::Error::from_raw_os_error(libc::EBADR))).unwrap_err();
    assert_eq!(it.ring.turn(Wait::No).unwrap_err().raw_os_error(), Some(libc::EBADR));
}

/// Each completion that woke a task kicked the very thread that handed it out: a write, and the ring's read of it.
#[test]
fn a_thread_does_not_kick_itself() {
    let it = Fixture::new(Caching::Buffered, 0);
    for _ in 0..3 {
        // SAFETY: a no-op names no memory.
        it.run(unsafe { it.ring.submit(opcode::Nop::new().build(), None) }).unwrap();
    }
    it.ring.turn(Wait::No).unwrap();
    assert!(it.ring.0.kick_armed.get(), "nothing has been read");
}

#[test]
fn space_is_allocated_punched_and_the_length_set() {
    let it = Fixture::new(Caching::Auto, 0);
    it.run(async {
        it.ring.allocate(it.file, 0, 1 << 20).await.unwrap();
        let full = std::fs::metadata(it.path()).unwrap();
        assert_eq!((full.len(), full.blocks() * 512), (1 << 20, 1 << 20));
        let ones = Buf::zeroed(65536);
        ones.fill(1);
        it.ring.write(it.file, 65536, ones.clone()).await.unwrap();
        it.ring.punch_hole(it.file, 65536, 65536).await.unwrap();
        it.ring.read(it.file, 65536, ones.clone()).await.unwrap();
        assert!(ones.to_vec().iter().all(|&b| b == 0));
        let holed = std::fs::metadata(it.path()).unwrap();
        assert_eq!((holed.len(), holed.blocks() * 512), (1 << 20, (1 << 20) - 65536));
        it.ring.set_len(it.file, 4096).await.unwrap();
        assert_eq!(it.ring.files().len(it.file).unwrap(), 4096);
    });
}

#[test]
fn errors_carry_the_kernels_errno() {
    let it = Fixture::new(Caching::Auto, 4096);
    let read_only = it.ring.files().open(&it.path(), Access::ReadOnly).unwrap();
    it.run(async {
        let error = it.ring.write(read_only, 0, Buf::zeroed(512)).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        let error = it.ring.read(FileId(77), 0, Buf::zeroed(512)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    });
}

/// More operations than the submission queue (16) and the completion queue (64) have room for.
#[test]
fn a_thousand_operations_in_flight_overflow_no_queue() {
    const COUNT: u64 = 1000;
    let it = Fixture::new(Caching::Auto, COUNT * 512);
    it.run(async {
        let mut writes: Vec<_> = (0..COUNT)
            .map(|index| {
                let data = Buf::zeroed(512);
                data.fill(index as u8);
                Box::pin(it.ring.write(it.file, index * 512, data))
            })
            .collect();
        // Poll all of them first: an operation starts at its future's first poll.
        std::future::poll_fn(|context| {
            writes.retain_mut(|write| match write.as_mut().poll(context) {
                Poll::Ready(result) => {
                    assert_eq!(result.unwrap(), 512);
                    false
                }
                Poll::Pending => true,
            });
            if writes.is_empty() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    });
    assert_eq!(it.ring.in_flight(), 0);
    let bytes = std::fs::read(it.path()).unwrap();
    assert!(bytes.iter().enumerate().all(|(at, &byte)| byte == (at / 512) as u8));
}

#[test]
fn a_dropped_future_neither_loses_its_slot_nor_its_write() {
    let it = Fixture::new(Caching::Auto, 1 << 20);
    for round in 0..200_u64 {
        let data = Buf::zeroed(4096);
        data.fill(9);
        let mut write = Box::pin(it.ring.write(it.file, (round % 256) * 4096, data));
        assert!(write.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        drop(write);
        it.ring.turn(Wait::No).unwrap();
    }
    while it.ring.in_flight() > 0 {
        it.ring.turn(Wait::For(Duration::from_secs(1))).unwrap();
    }
    let bytes = std::fs::read(it.path()).unwrap();
    assert!(bytes[..200 * 4096].iter().all(|&b| b == 9));
}

#[test]
fn dropping_a_timer_cancels_it_and_dropping_the_ring_does_not_hang() {
    let it = Fixture::new(Caching::Auto, 0);
    let start = Instant::now();
    let mut hour = Box::pin(it.ring.sleep(Duration::from_secs(3600)));
    assert!(hour.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    drop(hour);
    while it.ring.in_flight() > 0 {
        it.ring.turn(Wait::For(Duration::from_secs(1))).unwrap();
    }
    // A task that never ends, with a read of an eventfd that nobody writes to.
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
    let executor = Executor::new(it.ring.clone());
    let buf = Buf::zeroed(8);
    let read = opcode::Read::new(types::Fd(event.as_fd().as_raw_fd()), buf.as_ptr(), 8).build();
    // SAFETY: the only memory of the entry is `buf`, which is handed over.
    let op = unsafe { it.ring.submit(read, Some(buf)) };
    executor.spawn(async move {
        let _ = op.await;
    });
    executor.block_on(it.ring.sleep(Duration::from_millis(5))).unwrap().unwrap();
    drop(executor);
    drop(it);
    assert!(start.elapsed() < TEARDOWN, "{:?}", start.elapsed());
}

#[test]
fn a_registered_descriptor_is_released_with_its_guard() {
    let it = Fixture::new(Caching::Auto, 4096);
    let other = File::open(it.path()).unwrap();
    for _ in 0..20 {
        let registered = it.ring.register_fd(other.as_fd());
        assert!(matches!(registered.target(), Target::Fixed(slot) if slot >= FIRST_GUEST_SLOT));
        let buf = Buf::zeroed(512);
        let read = entry_for!(registered.target(), |fd| opcode::Read::new(fd, buf.as_ptr(), 512).build());
        // SAFETY: the only memory of the entry is `buf`, which is handed over.
        let op = unsafe { it.ring.submit(read, Some(buf)) };
        assert_eq!(it.run(op).unwrap(), 512);
    }
}

/// The refinements that this kernel takes are also what an older one would be left with.
#[test]
fn every_kind_of_delivery_works() {
    for delivery in [Delivery::InOrder, Delivery::Deferred, Delivery::Cooperative, Delivery::Plain] {
        let it = Fixture::new(Caching::Auto, 4096);
        let ring = match build(delivery, 8) {
            Err(error) if delivery == Delivery::InOrder && error.raw_os_error() == Some(libc::EINVAL) => {
                eprintln!("{delivery:?} is not tried: this kernel does not know it");
                continue;
            }
            ring => ring.unwrap(),
        };
        it.ring.0.ring.replace(ring);
        // SAFETY: a no-op names no memory.
        let op = unsafe { it.ring.submit(opcode::Nop::new().build(), None) };
        assert_eq!(it.run(op).unwrap(), 0, "{delivery:?}");
        it.run(it.ring.sleep(Duration::from_millis(1))).unwrap();
    }
}

/// The runtime's own cost: `cargo test --release -p qcow2-engine uring_speed -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a check"]
fn uring_speed() {
    const OPERATIONS: u32 = 2_000_000;
    const DEPTH: u32 = 64;
    let it = Fixture::new(Caching::Auto, 4096);
    let executor = Executor::new(it.ring.clone());
    let start = Instant::now();
    for _ in 0..DEPTH {
        let ring = it.ring.clone();
        executor.spawn(async move {
            for _ in 0..OPERATIONS / DEPTH {
                // SAFETY: a no-op names no memory.
                unsafe { ring.submit(opcode::Nop::new().build(), None) }.await.unwrap();
            }
        });
    }
    executor.run().unwrap();
    println!("{:?} per no-op", start.elapsed() / OPERATIONS);
}

/// Transfers inside a registered window, beyond it, and on another ring must all move the right bytes.
#[test]
fn registered_buffers_are_used_where_they_reach() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, (0..32768_u32).map(|i| (i / 512) as u8).collect::<Vec<_>>()).unwrap();
    let files = Arc::new(Files::new(Caching::Buffered));
    let file = files.open(&path, Access::ReadWrite).unwrap();
    let (ring, other) = (Uring::new(Arc::clone(&files), 8).unwrap(), Uring::new(files, 8).unwrap());
    let buf = Buf::zeroed(32768);
    ring.register_buffers(vec![Buf::zeroed(4096), buf.slice(4096..16384)]).unwrap();
    assert!(ring.register_buffers(vec![buf.clone()]).is_err(), "once only");

    let held = |range, ring: &Uring| buf.named(range, ring.id()).registered;
    assert_eq!(held(4096..8192, &ring), Some(3), "the second window's beginning, by itself");
    assert_eq!(held(4096 + 512..8192 + 512, &ring), Some(1));
    assert_eq!(held(16384 - 512..16384, &ring), Some(1));
    assert_eq!(held(0..8192, &ring), None);
    assert_eq!(held(8192..20480, &ring), None);
    assert_eq!(held(4096..8192, &other), None);

    for ring in [&ring, &other] {
        for range in [4096..8192, 8704..9216, 0..8192, 8192..32768] {
            buf.fill(0xee);
            let at = 512;
            let part = buf.slice(range.clone());
            let count = block_on(ring, ring.read(file, at, part.clone())).unwrap().unwrap();
            assert_eq!(count, range.len());
            assert!(part.to_vec().iter().zip(at as usize..).all(|(byte, at)| *byte == (at / 512) as u8));
        }
        let part = buf.slice(5120..5632);
        part.fill(0x55);
        assert_eq!(block_on(ring, ring.write(file, 1024, part)).unwrap().unwrap(), 512);
        assert_eq!(std::fs::read(&path).unwrap()[1023..1537], [&[1][..], &[0x55; 512], &[3]].concat());
        std::fs::write(&path, (0..32768_u32).map(|i| (i / 512) as u8).collect::<Vec<_>>()).unwrap();
    }
    drop(ring);
    assert_eq!(buf.named(4096..8192, other.id()).registered, None);
}

/// More than the queues have room for, by twos and at once, good ones and bad ones.
#[test]
fn operations_without_a_future_are_reported_once_each() {
    const COUNT: u32 = 300;
    let it = Fixture::new(Caching::Auto, 0);
    it.run(async {
        let mut seen = vec![0; COUNT as usize + 1];
        for index in 0..COUNT {
            let data = Buf::zeroed(512);
            data.fill(index as u8);
            // Memory of the ring's and memory that only the operation has.
            if index % 2 == 0 {
                it.ring.keep(vec![data.clone()]);
            }
            it.ring.write_reporting(it.file, u64::from(index) * 512, &data, 0..512, index);
        }
        it.ring.read_reporting(FileId(77), 0, &Buf::zeroed(512), 0..512, COUNT);
        let mut reports = Vec::new();
        while seen.contains(&0) {
            it.ring.reports(&mut reports).await;
            for report in &reports {
                assert_eq!(report.result == 512, report.token < COUNT, "{report:?}");
                seen[report.token as usize] += 1;
            }
        }
        assert!(seen.iter().all(|&count| count == 1));
    });
    assert_eq!(it.ring.in_flight(), 0);
    let bytes = std::fs::read(it.path()).unwrap();
    assert!(bytes.iter().enumerate().all(|(at, &byte)| byte == (at / 512) as u8));
}

/// A write that waits for the end of the turn belongs to the kernel all the same.
#[test]
fn dropping_the_ring_does_not_lose_a_write() {
    for is_kept in [false, true] {
        let it = Fixture::new(Caching::Auto, 4096);
        let data = Buf::zeroed(512);
        data.fill(3);
        if is_kept {
            it.ring.keep(vec![data.clone()]);
        }
        it.ring.write_reporting(it.file, 512, &data, 0..data.len(), 0);
        assert_eq!(it.ring.in_flight(), 1);
        drop(data);
        let Fixture { dir, ring, .. } = it;
        drop(ring);
        assert_eq!(std::fs::read(dir.path().join("file")).unwrap()[512..1024], [3; 512], "{is_kept}");
    }
}

/// The kernel takes a ring apart some time after its descriptor is closed. Until then what was registered was
/// open: a file system could not be unmounted after its image's server had ended.
#[test]
fn no_file_stays_open_when_a_ring_is_gone() {
    for _ in 0..20 {
        let Fixture { dir, ring, file } = Fixture::new(Caching::Auto, 4096);
        block_on(&ring, ring.read(file, 0, Buf::zeroed(4096))).unwrap().unwrap();
        drop(ring);
        let again = File::open(dir.path().join("file")).unwrap();
        // A lease for writing is given when nobody else has the file open.
        // SAFETY: the call takes two numbers and touches no memory of ours.
        let lease = unsafe { libc::fcntl(again.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
        assert_eq!(lease, 0, "{}", io::Error::last_os_error());
    }
}
