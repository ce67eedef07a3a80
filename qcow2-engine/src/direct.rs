//! The short cut: a request that transfers alone answer is resolved at once and moved by the caller.
//!
//! Most requests find their mapping in memory and one run of bytes in one file, or a few: a read of data, or
//! a write over clusters that are the image's own. For these the engine has nothing to wait for, so no future
//! is needed: [`Lane::direct_read`] and [`Lane::direct_write`] say where the bytes are, the caller moves them
//! and says when it is done. Whatever is not as simple, now or when the transfers end (short, or failed),
//! goes to [`Lane::read`] and [`Lane::write`], which do the whole request from its beginning: doing a part of
//! it twice is harmless, as it has not been answered.
//!
//! The same decisions as on the long way: `resolve` and `write::split`, which are asked for whatever is not data
//! in one cluster of the top layer (`Qcow2Layer::own`), as most is. The request is in flight from before its look-up
//! until [`Lane::end_direct`] (R5).

use crate::{
    cache::slices::SliceCache,
    image::Image,
    io::{FileId, Io},
    lane::{Flight, Lane},
    layer::Qcow2Layer,
    resolve::{Extent, Extents, to_boundary},
    write::{Kind, Piece, split},
};
use qcow2_format::{HostOffset, Mapping};
use smallvec::SmallVec;

/// The most runs that a [`Direct`] request has: a transfer costs something too, and small pieces are better gathered
/// in a buffer.
pub const MAX_RUNS: usize = 16;

/// Where the bytes of a request are, in its order.
#[derive(Debug)]
#[must_use = "the request is in flight until `Lane::end_direct`"]
pub struct Direct {
    runs: Runs,
    flight: Flight,
}

/// All of a [`Direct`] that is needed once its transfers have been started.
impl From<Direct> for Flight {
    #[inline]
    fn from(direct: Direct) -> Self {
        direct.flight
    }
}

/// Bytes that are contiguous in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The file.
    pub file: FileId,
    /// Byte offset in it.
    pub at: u64,
    /// Bytes.
    pub len: u64,
}

/// The runs of a request, mostly one.
#[derive(Debug)]
enum Runs {
    One(Run),
    Few(Vec<Run>),
}

impl Direct {
    /// One transfer for each; at least one, and at most [`MAX_RUNS`].
    #[inline]
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        match &self.runs {
            Runs::One(run) => std::slice::from_ref(run),
            Runs::Few(runs) => runs,
        }
    }
}

impl<I: Io> Lane<I> {
    /// Begins a read that a few transfers answer. `None` where it is not so simple, or might fail:
    /// [`Lane::read`] tells. A transfer that ends short has met the end of the file and is no answer.
    #[inline]
    pub fn direct_read(&self, at: u64, len: u64) -> Option<Direct> {
        self.begin_direct(at, len, Image::runs_to_read)
    }

    /// Begins a write that a few transfers carry out; otherwise as [`Lane::direct_read`].
    #[inline]
    pub fn direct_write(&self, at: u64, len: u64) -> Option<Direct> {
        // What `begin_mutation` refuses or has to prepare.
        if self.image().check_changes().is_err() || !self.image().autoclear.is_clear() {
            return None;
        }
        self.begin_direct(at, len, Image::runs_to_write)
    }

    /// Ends the request: its transfers are over, well or not.
    #[inline]
    pub fn end_direct(&self, direct: impl Into<Flight>) {
        self.end(direct.into());
    }

    /// Whether all of a range is known to read as zeros: its mapping is in memory, and there is data nowhere in the
    /// chain.
    pub fn is_zero(&self, at: u64, len: u64) -> bool {
        let mut extents = Extents::new();
        self.image().top().has_range(at, len)
            && self.image().resolve(at, len, &mut extents).is_ok()
            && extents.iter().all(Extent::is_zero)
    }

    #[inline]
    fn begin_direct(
        &self,
        at: u64,
        len: u64,
        find: impl Fn(&Image, &Qcow2Layer, u64, u64) -> Option<Runs>,
    ) -> Option<Direct> {
        // Looked for once: of a request that is served here, each step counts.
        let top = self.image().top();
        if !top.has_range(at, len) {
            return None;
        }
        let flight = self.try_begin()?;
        if let Some(runs) = find(self.image(), top, at, len) {
            return Some(Direct { runs, flight });
        }
        self.end(flight);
        None
    }
}

impl Qcow2Layer {
    /// What the layer says of a range that lies in one of its clusters, if that is in memory.
    #[inline]
    fn in_cluster(&self, cache: &SliceCache, at: u64, len: u64) -> Option<Mapping> {
        if len > to_boundary(at, self.geometry.cluster_size()) {
            return None;
        }
        self.resident(cache, at)
    }

    /// The run that a range is which lies in one cluster of the layer's own data.
    #[inline]
    fn own(&self, host: HostOffset, at: u64, len: u64) -> Runs {
        Runs::One(Run { file: self.file, at: host.0 + self.geometry.in_cluster(at), len })
    }
}

impl Image {
    /// Where a range can be read, if it is all data.
    #[inline]
    fn runs_to_read(&self, top: &Qcow2Layer, at: u64, len: u64) -> Option<Runs> {
        match top.in_cluster(&self.cache, at, len) {
            Some(Mapping::Data { host, .. }) => Some(top.own(host, at, len)),
            Some(Mapping::Unallocated) => self.runs_from(self.as_chain().below(at, len).ok()?, at, len),
            _ => self.runs_from(self.as_chain().step(at, len).ok()?, at, len),
        }
    }

    /// Where a range can be read that begins with an extent, if it is all data.
    #[inline(never)] // out of the way of what is in the top layer
    fn runs_from(&self, first: Extent, at: u64, len: u64) -> Option<Runs> {
        let run_of = |extent: &Extent| match *extent {
            Extent::Data { file, at, len } => Some(Run { file, at, len }),
            _ => None,
        };
        if first.len() == len {
            return run_of(&first).map(Runs::One);
        }
        let mut extents = Extents::from_slice(&[first]);
        self.resolve(at, len, &mut extents).ok()?;
        few(&extents, run_of)
    }

    /// Where a range can be overwritten, if all of it can.
    #[inline]
    fn runs_to_write(&self, top: &Qcow2Layer, at: u64, len: u64) -> Option<Runs> {
        match top.in_cluster(&self.cache, at, len) {
            Some(Mapping::Data { host, copied: true }) if !self.is_suspect(host) => {
                Some(top.own(host, at, len))
            }
            _ => self.pieces_to_write(at, len),
        }
    }

    /// The same, where one look-up does not tell.
    #[inline(never)]
    fn pieces_to_write(&self, at: u64, len: u64) -> Option<Runs> {
        let file = self.top().file;
        let run_of = |piece: &Piece| match piece.kind {
            Kind::InPlace { host } => Some(Run { file, at: host.0, len: piece.len }),
            Kind::Allocate => None,
        };
        let mut pieces = SmallVec::new();
        split(self, at, len, &mut pieces).ok()?;
        few(&pieces, run_of)
    }
}

/// The runs of all parts, if each is one.
fn few<P>(parts: &[P], run_of: impl Fn(&P) -> Option<Run>) -> Option<Runs> {
    if parts.len() > MAX_RUNS {
        return None;
    }
    parts.iter().map(run_of).collect::<Option<_>>().map(Runs::Few)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        OpenOptions,
        exec::run_at_once as run,
        io::{Buf, mem::MemFiles},
    };
    use qcow2_format::{Blueprint, CreateOptions};
    use std::{path::Path, sync::Arc};

    const CLUSTER: u64 = 65536;

    fn open(files: &MemFiles, read_only: bool) -> Lane<MemFiles> {
        let options = OpenOptions { read_only, ..OpenOptions::default() };
        let image: Arc<Image> = run(Image::open(files, files, Path::new("it"), &options)).unwrap();
        Lane::new(&image, files.clone(), 2)
    }

    fn new_image() -> MemFiles {
        let files = MemFiles::default();
        let options = CreateOptions { virtual_size: 32 * CLUSTER, ..CreateOptions::default() };
        files.put("it", Blueprint::new(&options).unwrap().to_bytes());
        files
    }

    #[test]
    fn only_what_one_transfer_answers_is_direct() {
        let files = new_image();
        let lane = open(&files, false);
        assert!(lane.direct_read(0, 4096).is_none(), "zeros");
        assert!(lane.direct_write(0, 4096).is_none(), "to be allocated");
        run(lane.write(0, Buf::zeroed(2 * CLUSTER as usize))).unwrap();
        let across = lane.direct_read(CLUSTER - 512, 1024).expect("neighbours on the host");
        let within = lane.direct_write(CLUSTER + 512, 512).expect("its own");
        let [before] = across.runs() else { panic!("{:?}", across.runs()) };
        assert_eq!(before.len, 1024);
        assert_eq!(within.runs(), [Run { at: before.at + 1024, len: 512, ..*before }]);
        assert!(lane.direct_read(0, 512).is_none(), "the lane's depth is 2");
        lane.end_direct(across);
        assert!(lane.direct_read(CLUSTER, 2 * CLUSTER).is_none(), "data, then zeros");
        assert!(lane.direct_write(CLUSTER, 2 * CLUSTER).is_none());
        assert!(lane.direct_read(32 * CLUSTER, 512).is_none(), "beyond the end");
        lane.end_direct(within);
        run(lane.flush()).unwrap();

        let reader = open(&files, true);
        assert!(reader.direct_read(0, 512).is_none(), "not in memory yet");
        run(reader.read(0, Buf::zeroed(512))).unwrap();
        assert!(reader.direct_write(0, 512).is_none(), "read-only");
        reader.end_direct(reader.direct_read(0, 512).expect("in memory now"));
    }

    #[test]
    fn scattered_clusters_are_runs_in_the_order_of_the_request() {
        let lane = open(&new_image(), false);
        // The higher guest cluster gets the lower place.
        for cluster in [1, 0] {
            run(lane.write(cluster * CLUSTER, Buf::zeroed(CLUSTER as usize))).unwrap();
        }
        for direct in [lane.direct_read(CLUSTER - 512, 1536), lane.direct_write(CLUSTER - 512, 1536)] {
            let direct = direct.expect("both are the image's own");
            let [first, second] = direct.runs() else { panic!("{:?}", direct.runs()) };
            assert_eq!((first.len, second.len), (512, 1024));
            assert_eq!(first.at, second.at + 2 * CLUSTER - 512);
            lane.end_direct(direct);
        }
        for cluster in (2..2 + MAX_RUNS as u64).rev() {
            run(lane.write(cluster * CLUSTER, Buf::zeroed(CLUSTER as usize))).unwrap();
        }
        let many = |clusters: u64| lane.direct_read(2 * CLUSTER, clusters * CLUSTER);
        lane.end_direct(many(MAX_RUNS as u64).expect("as many as allowed"));
        assert!(lane.direct_read(0, (2 + MAX_RUNS as u64) * CLUSTER).is_none(), "too many");
    }

    #[test]
    fn zeros_are_known_where_the_mapping_is() {
        let files = new_image();
        let lane = open(&files, false);
        assert!(lane.is_zero(0, 32 * CLUSTER), "no table");
        assert!(!lane.is_zero(31 * CLUSTER, CLUSTER + 512), "beyond the end");
        run(lane.write(4 * CLUSTER, Buf::zeroed(512))).unwrap();
        run(lane.write_zeroes(5 * CLUSTER, 2 * CLUSTER, crate::ZeroMode::Keep)).unwrap();
        assert!(lane.is_zero(0, 4 * CLUSTER) && lane.is_zero(5 * CLUSTER, 27 * CLUSTER));
        assert!(!lane.is_zero(3 * CLUSTER, 2 * CLUSTER), "data, though it is zeros");
        run(lane.flush()).unwrap();
        let reader = open(&files, true);
        assert!(!reader.is_zero(0, 512), "not in memory yet");
        run(reader.read(0, Buf::zeroed(512))).unwrap();
        assert!(reader.is_zero(0, 512));
    }

    /// R5: what a transfer under way may touch is not given to another.
    #[test]
    fn a_direct_request_is_in_flight_until_its_end() {
        let lane = open(&new_image(), false);
        run(lane.write(0, Buf::zeroed(4096))).unwrap();
        let direct = lane.direct_read(0, 4096).unwrap();
        let unmapped = lane.image().epochs.advance();
        assert!(!lane.image().epochs.has_passed(unmapped) && !lane.is_idle());
        lane.end_direct(direct);
        assert!(lane.is_idle());
        assert!(lane.image().epochs.has_passed(unmapped));
        assert!(lane.direct_read(4 * CLUSTER, 512).is_none());
        assert!(lane.image().epochs.has_passed(lane.image().epochs.advance()), "a refusal leaves nothing");
    }
}
