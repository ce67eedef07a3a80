//! Where the data of a queue's requests is, and how it gets to and from the image's files.
//!
//! [`DataPath::Copied`]: each tag has a buffer (`buffers`). The driver copies a write's data into it before the tag's
//! fetch completes, and a read's out of it when the result is committed.
//!
//! [`DataPath::ZeroCopy`]: the request's own pages are the ring's registered buffer with the tag's number, from before
//! the fetch completes until the commit. A request that a few transfers answer is moved there and back by the
//! kernel alone. What this process has to see (the edges of a cluster, compressed or missing clusters) takes
//! a buffer of a common pool instead, and is copied between that and the request by reading and writing the
//! character device ([`Payloads::collect`], [`Payloads::deliver`]).

use super::{Queue, buffers::TagBuffers};
use crate::{device::DataPath, uapi};
use io_uring::{opcode, squeue};
use qcow2_engine::{
    Run, entry_for,
    io::{
        Buf, Pool,
        uring::{KernelBuf, Target, Uring},
    },
};
use std::io;

/// The data of a queue's requests.
pub(super) struct Payloads {
    ring: Uring,
    target: Target,
    queue: u16,
    place: Place,
}

enum Place {
    /// A buffer per tag.
    Tags(TagBuffers),
    /// The requests' pages, and buffers for what cannot stay there.
    Pages(Pool),
}

/// What a command tells the driver about its tag's data.
pub(super) struct Announced {
    /// The address of the tag's buffer, which the ring keeps; 0 where it has none.
    pub(super) buffer: u64,
    /// Where in the ring's table the request's pages are to be.
    pub(super) registration: Option<u64>,
}

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    FromFile,
    ToFile,
}

impl Payloads {
    /// Gets the ring ready for a queue's data.
    pub(super) fn new(queue: &Queue, ring: &Uring, target: Target) -> io::Result<Self> {
        let bytes = queue.bounds.buffer_bytes as usize;
        let place = match queue.data_path {
            DataPath::Copied => Place::Tags(TagBuffers::new(queue, ring)),
            DataPath::ZeroCopy => {
                ring.reserve_buffers(queue.depth.into())?;
                Place::Pages(Pool::new(bytes, queue.depth.into()))
            }
        };
        Ok(Self { ring: ring.clone(), target, queue: queue.index, place })
    }

    #[inline]
    pub(super) fn announce(&self, tag: u16) -> Announced {
        match &self.place {
            Place::Tags(buffers) => Announced { buffer: buffers.address(tag), registration: None },
            Place::Pages(_) => {
                // A request whose pages the driver could not register is to come all the same, and say so.
                let registration = Some(uapi::auto_buf_reg(tag, uapi::UBLK_AUTO_BUF_REG_FALLBACK));
                Announced { buffer: 0, registration }
            }
        }
    }

    /// Whether a transfer can move the data of a request, given what the driver says of it.
    pub(super) fn is_movable(&self, op_flags: u32) -> bool {
        matches!(self.place, Place::Tags(_)) || op_flags & uapi::UBLK_IO_F_NEED_REG_BUF == 0
    }

    /// Gets ready for a request that has been fetched, and moves `len` bytes.
    pub(super) fn begin(&self, tag: u16, way: Way, len: u64) {
        if let (Place::Tags(buffers), Way::FromFile) = (&self.place, way) {
            buffers.suit(tag, len);
        }
    }

    /// Notes that where the tag's data is there may be anything from now on.
    #[inline]
    pub(super) fn spoil(&self, tag: u16) {
        if let Some(buffers) = self.buffers() {
            buffers.spoil(tag);
        }
    }

    /// The tags' buffers, if there are any.
    #[inline]
    pub(super) fn buffers(&self) -> Option<&TagBuffers> {
        if let Place::Tags(buffers) = &self.place { Some(buffers) } else { None }
    }

    /// Gets ready for whatever comes after a request that has moved `len` bytes.
    pub(super) fn end(&self, tag: u16, way: Way, len: u64) {
        if let (Place::Tags(buffers), Way::ToFile) = (&self.place, way) {
            buffers.suit(tag, len);
        }
    }

    /// Starts the transfers of a request's data, which are reported under the tag's number.
    #[inline]
    pub(super) fn transfer(&self, tag: u16, way: Way, runs: &[Run]) {
        if way == Way::FromFile {
            self.spoil(tag);
        }
        let mut begin = 0;
        for run in runs {
            self.transfer_run(tag, way, begin, run);
            begin += run.len;
        }
    }

    /// Starts the transfer of a run, which begins at byte `begin` of the request.
    #[inline]
    fn transfer_run(&self, tag: u16, way: Way, begin: u64, run: &Run) {
        let Run { file, at, len } = *run;
        let token = u32::from(tag);
        match &self.place {
            Place::Tags(buffers) => {
                let (buf, part) = (buffers.of(tag), begin as usize..(begin + len) as usize);
                match way {
                    Way::FromFile => self.ring.read_reporting(file, at, buf, part, token),
                    Way::ToFile => self.ring.write_reporting(file, at, buf, part, token),
                }
            }
            Place::Pages(_) => {
                // At most the longest request, 1 MiB.
                let pages = KernelBuf { index: tag, offset: begin, len: len as u32 };
                match way {
                    Way::FromFile => self.ring.read_into_reporting(file, at, pages, token),
                    Way::ToFile => self.ring.write_from_reporting(file, at, pages, token),
                }
            }
        }
    }

    /// A buffer for a request's data, to be given back with [`Self::give_back`].
    pub(super) fn take(&self, tag: u16, len: u64) -> Buf {
        match &self.place {
            Place::Tags(buffers) => {
                buffers.spoil(tag);
                buffers.of(tag).slice(0..len as usize)
            }
            Place::Pages(pool) => pool.take(len as usize),
        }
    }

    /// Takes a buffer back, whose use is over.
    pub(super) fn give_back(&self, buf: Buf) {
        if let Place::Pages(pool) = &self.place {
            pool.give_back(buf);
        }
    }

    /// Copies the data of a tag's write into `buf`, unless the driver has.
    pub(super) async fn collect(&self, tag: u16, buf: &Buf) -> io::Result<()> {
        let at = offset_of(self.queue, tag);
        let entry = entry_for!(self.target, |fd| {
            opcode::Read::new(fd, buf.as_ptr(), buf.len() as u32).offset(at).build()
        });
        self.copy(entry, buf).await
    }

    /// Copies `buf` into the pages of a tag's read, unless the driver will.
    pub(super) async fn deliver(&self, tag: u16, buf: &Buf) -> io::Result<()> {
        let at = offset_of(self.queue, tag);
        let entry = entry_for!(self.target, |fd| {
            opcode::Write::new(fd, buf.as_ptr(), buf.len() as u32).offset(at).build()
        });
        self.copy(entry, buf).await
    }

    async fn copy(&self, entry: squeue::Entry, buf: &Buf) -> io::Result<()> {
        if let Place::Tags(_) = self.place {
            return Ok(());
        }
        // SAFETY: the only memory that the entry names is `buf`, whose owner is handed over.
        let copied = unsafe { self.ring.submit(entry, Some(buf.clone())) }.await?;
        if copied as usize == buf.len() {
            return Ok(());
        }
        Err(io::Error::other(format!("{copied} of {} bytes", buf.len())))
    }
}

/// Where in the character device the data of a tag's request begins.
fn offset_of(queue: u16, tag: u16) -> u64 {
    uapi::UBLKSRV_IO_BUF_OFFSET
        + (u64::from(queue) << uapi::UBLK_QID_OFF)
        + (u64::from(tag) << uapi::UBLK_TAG_OFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_found_where_the_driver_looks_for_it() {
        assert_eq!(offset_of(0, 0), 0x8000_0000);
        assert_eq!(offset_of(1, 0) - offset_of(0, 0), 1 << 41);
        assert_eq!(offset_of(0, 1) - offset_of(0, 0), 1 << 25);
    }
}
