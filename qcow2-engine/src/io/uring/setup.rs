//! Makes a ring with as many refinements as this kernel takes, or says why there can be none.

use io_uring::IoUring;
use std::io;

/// How completions are delivered, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// Linux 6.6: as the next, and entries are taken from the queue in their order, without a table that tells it.
    InOrder,
    /// 6.1: worked off only when this thread asks for them, without interrupts.
    Deferred,
    /// 5.19: worked off at this thread's next system call, without interrupts.
    Cooperative,
    /// Whenever the kernel likes.
    Plain,
}

/// Makes the ring, with the best delivery that the kernel takes.
pub(super) fn set_up(entries: u32) -> io::Result<IoUring> {
    let mut result = build(Delivery::InOrder, entries);
    for delivery in [Delivery::Deferred, Delivery::Cooperative, Delivery::Plain] {
        match &result {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => result = build(delivery, entries),
            _ => break,
        }
    }
    result.map_err(explain)
}

pub(super) fn build(delivery: Delivery, entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_clamp().setup_cqsize(entries.saturating_mul(4));
    if let Delivery::InOrder = delivery {
        builder.setup_no_sqarray();
    }
    match delivery {
        Delivery::InOrder | Delivery::Deferred => {
            builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all()
        }
        Delivery::Cooperative => builder.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all(),
        Delivery::Plain => &mut builder,
    };
    builder.build(entries)
}

/// Adds the way out to the reasons for which an operator can do something.
fn explain(error: io::Error) -> io::Error {
    let text = match error.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has no io_uring: Linux 6.0 or newer is needed",
        Some(libc::EPERM) => {
            "io_uring is forbidden here: see the sysctl kernel.io_uring_disabled, or the container's seccomp profile"
        }
        Some(libc::ENOMEM) => "no memory for an io_uring: raise the limit on locked memory (ulimit -l)",
        _ => return error,
    };
    io::Error::new(error.kind(), text)
}
