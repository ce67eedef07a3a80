//! A small cache on a host that takes no metadata: nothing can be written back, and so nothing dirty leaves it.

#[allow(dead_code, reason = "shared by several test programs")]
mod common;

use common::{
    IMAGE, create,
    hooked::{Hook, Hooked, Operation},
    run,
};
use qcow2_engine::{
    Image, OpenOptions,
    io::{Buf, mem::MemFiles},
};
use qcow2_format::{Backing, CreateOptions};
use std::{cell::Cell, io, path::Path, sync::Arc};

const CLUSTER: u64 = 512;
/// What an L2 table maps, which is one slice.
const SLICE: u64 = 64 * CLUSTER;
/// More than the cache has slots.
const SLICES: u64 = 150;
const PAYLOAD: u8 = 0x5a;

/// Fails every write but those of the payload, while it is told to; and no test waits for ever for reads.
#[derive(Default)]
struct Host {
    refuses: Cell<bool>,
    reads: Cell<usize>,
}

impl Hook for Host {
    async fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::Write { buf, .. }
                if self.refuses.get() && buf.to_vec().iter().any(|&byte| byte != PAYLOAD) =>
            {
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
            Operation::Read { .. } => {
                self.reads.set(self.reads.get() + 1);
                assert!(self.reads.get() < 100_000, "it reads for ever");
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Nothing could be written back, and what waited for it held all slots, so that reads failed, or all but one: a look-up
/// needs one for each file of the chain at the same time, and each drove out what the other needed, for ever.
/// (Simulator.)
#[test]
fn reads_go_on_while_nothing_can_be_written_back() {
    let host = Hooked::new(&MemFiles::default(), Host::default());
    let options = |backing| CreateOptions {
        virtual_size: SLICES * SLICE,
        cluster_bits: 9,
        backing,
        ..CreateOptions::default()
    };
    create(&host.files, "base", &options(None));
    create(&host.files, IMAGE, &options(Some(Backing { name: b"base".to_vec(), format: "qcow2".into() })));
    let open = |path: &str| -> Arc<Image> {
        let options = OpenOptions { cache_bytes: 0, ..OpenOptions::default() };
        run(Image::open(&host, &host.files, Path::new(path), &options)).expect("opens")
    };
    let payload = || Buf::from_bytes(&[PAYLOAD; CLUSTER as usize]);
    // Each slice has its table, in both.
    for path in ["base", IMAGE] {
        let image = open(path);
        let lane = host.lane(&image);
        for slice in 0..SLICES {
            run(lane.write(slice * SLICE, payload())).expect("a write");
        }
        run(lane.close()).expect("closes");
    }

    let image = open(IMAGE);
    let lane = host.lane(&image);
    host.hook.refuses.set(true);
    let written =
        (0..SLICES).filter(|slice| run(lane.write(slice * SLICE + CLUSTER, payload())).is_ok()).count();
    assert!(written < SLICES as usize, "all was written back");
    host.hook.reads.set(0);
    for slice in 0..SLICES {
        let buf = Buf::zeroed(4 * CLUSTER as usize);
        run(lane.read(slice * SLICE, buf.clone())).expect("a read");
        assert_eq!(buf.to_vec()[..CLUSTER as usize], [PAYLOAD; CLUSTER as usize]);
    }
    host.hook.refuses.set(false);
    run(lane.write(2 * CLUSTER, payload())).expect("the host takes it again");
    run(lane.close()).expect("closes");
}
