//! Completing a hand-over of queues that a server's death has cut short.
//!
//! A driver that does not forget the queues of a dead server (Linux before 6.16) begins a recovery only if it
//! had got all of them. With none it refuses, and with some it crashes. So before it is asked, it is given
//! the rest, by a thread that serves nothing and ends at once: all queues are then those of dead threads. The
//! device is quiesced, so no request comes meanwhile. What the driver has got already it refuses, which does
//! no harm; should this be cut short as well, the next server does it again.

#![allow(unsafe_code, reason = "submissions to a ring")]

use crate::{queue::command_area, uapi};
use io_uring::{IoUring, opcode, types};
use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
    thread,
};

/// What the driver is told to be the buffer: an address in the page that nobody can map, as it is not used.
const NO_BUFFER: u64 = 1;

/// Fetches on all tags of all queues, and goes away.
pub(crate) fn complete(char_device: File, queues: u16, depth: u16) -> io::Result<()> {
    let fetch_all = move || {
        // They must stay until the last, and go before the file does.
        let rings: Result<Vec<_>, io::Error> =
            (0..queues).map(|queue| fetch(char_device.as_raw_fd(), queue, depth)).collect();
        rings.map(drop)
    };
    let thread = thread::Builder::new().name("handover".to_owned()).spawn(fetch_all)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("its thread panicked")))
}

/// Submits the fetches of one queue in one call, which a signal does not interrupt.
fn fetch(fd: RawFd, queue: u16, depth: u16) -> io::Result<IoUring> {
    let mut ring = IoUring::new(u32::from(depth).next_power_of_two())?;
    for tag in 0..depth {
        let area = command_area(queue, tag, 0, NO_BUFFER);
        let entry = opcode::UringCmd16::new(types::Fd(fd), uapi::UBLK_U_IO_FETCH_REQ).cmd(area).build();
        // SAFETY: the entry names no memory: its command is inside it, and the driver does not follow the
        // buffer's address before it has a request, of which a quiesced device gets none.
        unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
    }
    ring.submit()?;
    Ok(ring)
}
