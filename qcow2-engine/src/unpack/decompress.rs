//! One compressed cluster to its bytes, with every bound checked.
//!
//! zlib clusters are raw deflate streams, zstd clusters are frames; both may be followed by slack up to the
//! next sector. What gives too little is refused. What would give more is as QEMU has it: a deflate stream is
//! not looked at beyond the cluster, a zstd frame must end with it; one frame may follow another until then.

use flate2::{Decompress, FlushDecompress, Status};
use qcow2_format::Compression;
use std::{cell::RefCell, io};
use zstd::{
    bulk::Decompressor,
    zstd_safe::{self, DCtx, DParameter, InBuffer, OutBuffer},
};

/// The largest zstd window that is accepted, as a power of two: larger than any cluster, and small
/// enough that a hostile frame cannot ask for memory.
const ZSTD_WINDOW_LOG_MAX: u32 = 24;

/// Decompresses `input` into `len` bytes.
///
/// # Errors
/// `InvalidData` when the stream is damaged, too short or too long.
pub(crate) fn cluster(compression: Compression, input: &[u8], len: usize) -> io::Result<Vec<u8>> {
    match compression {
        Compression::Zlib => inflate(input, len),
        Compression::Zstd => unzstd(input, len),
    }
}

thread_local! {
    /// What a thread needs for each stream, made once.
    static INFLATE_WHOLE: RefCell<libdeflater::Decompressor> = RefCell::new(libdeflater::Decompressor::new());
    static INFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static UNZSTD: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

fn inflate(input: &[u8], len: usize) -> io::Result<Vec<u8>> {
    match inflate_whole(input, len) {
        Some(output) => Ok(output),
        None => inflate_begin(input, len),
    }
}

/// A stream of exactly `len` bytes, as everybody writes them, in one go.
fn inflate_whole(input: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut output = vec![0; len];
    let written = INFLATE_WHOLE.with_borrow_mut(|stream| stream.deflate_decompress(input, &mut output));
    (written.ok()? == len).then_some(output)
}

/// The first `len` bytes of a stream, whatever it goes on with. Or the reason why there are not so many.
fn inflate_begin(input: &[u8], len: usize) -> io::Result<Vec<u8>> {
    let mut output = Vec::with_capacity(len);
    let status = INFLATE.with_borrow_mut(|stream| {
        stream.reset(false);
        stream
            .decompress_vec(input, &mut output, FlushDecompress::Finish)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    })?;
    // A stream that fills the cluster may stop short of saying that it ends.
    match (output.len() == len, status) {
        (true, Status::StreamEnd | Status::BufError | Status::Ok) => Ok(output),
        (false, _) => Err(invalid(format!("the stream gives {} bytes of {len}", output.len()))),
    }
}

fn unzstd(input: &[u8], len: usize) -> io::Result<Vec<u8>> {
    match unzstd_whole(input, len) {
        Some(output) => Ok(output),
        None => unzstd_frames(input, len),
    }
}

/// A frame of exactly `len` bytes, in one go and straight to its place.
fn unzstd_whole(input: &[u8], len: usize) -> Option<Vec<u8>> {
    let frame = zstd_safe::find_frame_compressed_size(input).ok()?;
    UNZSTD.with_borrow_mut(|context| {
        if context.is_none() {
            *context = Decompressor::new().ok();
        }
        let mut output = Vec::with_capacity(len);
        let written = context.as_mut()?.decompress_to_buffer(&input[..frame], &mut output).ok()?;
        (written == len).then_some(output)
    })
}

/// Frame after frame until there are `len` bytes, with which the last frame must end. Or the reason why not.
fn unzstd_frames(input: &[u8], len: usize) -> io::Result<Vec<u8>> {
    let named = |code| invalid(zstd_safe::get_error_name(code).to_owned());
    let mut context = DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
    context.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX)).map_err(named)?;
    let mut bytes = vec![0; len];
    let mut output = OutBuffer::around(&mut bytes[..]);
    let mut input = InBuffer::around(input);
    let mut left_of_frame = 0;
    while output.pos() < len {
        let before = (input.pos(), output.pos());
        left_of_frame = context.decompress_stream(&mut output, &mut input).map_err(named)?;
        if before == (input.pos(), output.pos()) {
            return Err(invalid(format!("the frames give {} bytes of {len}", output.pos())));
        }
    }
    if left_of_frame > 0 {
        return Err(invalid(format!("the frame gives more than {len} bytes")));
    }
    Ok(bytes)
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compress, Compression as Level, FlushCompress};

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len() + 64);
        Compress::new(Level::default(), false).compress_vec(bytes, &mut out, FlushCompress::Finish).unwrap();
        out
    }

    #[test]
    fn both_kinds_give_the_cluster_back_and_ignore_slack() {
        let bytes: Vec<u8> = (0..65536_u32).map(|i| (i / 7) as u8).collect();
        for (kind, mut input) in [
            (Compression::Zlib, deflated(&bytes)),
            (Compression::Zstd, zstd::bulk::compress(&bytes, 3).unwrap()),
        ] {
            input.extend([0xAA; 300]);
            assert_eq!(cluster(kind, &input, bytes.len()).unwrap(), bytes);
            if kind == Compression::Zlib {
                assert!(inflate_whole(&input, bytes.len()).is_some(), "the short way is the usual one");
            }
        }
    }

    /// A frame header may ask for a window of terabytes, to be allocated before a byte is decoded.
    #[test]
    fn a_zstd_frame_cannot_ask_for_memory() {
        // Magic; no single segment, no checksum; a window descriptor with the largest exponent, 2^41; one
        // last raw block of a byte.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8, 0x09, 0x00, 0x00, 0x41];
        let error = cluster(Compression::Zstd, &frame, 4096).unwrap_err().to_string();
        assert!(error.contains("too much memory"), "{error}");
    }

    #[test]
    fn what_gives_more_than_a_cluster_is_as_qemu_has_it() {
        let bytes: Vec<u8> = (0..16384_u32).map(|at| (at / 9) as u8).collect();
        assert!(inflate_whole(&deflated(&bytes), 4096).is_none());
        assert_eq!(cluster(Compression::Zlib, &deflated(&bytes), 4096).unwrap(), bytes[..4096]);
        let error = cluster(Compression::Zstd, &zstd::bulk::compress(&bytes, 3).unwrap(), 4096).unwrap_err();
        assert!(error.to_string().contains("more than 4096 bytes"), "{error}");
    }

    #[test]
    fn zstd_frames_may_follow_each_other() {
        let bytes: Vec<u8> = (0..4096_u32).map(|at| (at / 9) as u8).collect();
        let mut frames = Vec::new();
        for part in bytes.chunks(1000) {
            let with_checksum = zstd::bulk::Compressor::new(3).and_then(|mut compressor| {
                compressor.include_checksum(true)?;
                compressor.compress(part)
            });
            frames.extend(with_checksum.unwrap());
        }
        let end = frames.len();
        frames.extend([0xAA; 300]);
        assert_eq!(cluster(Compression::Zstd, &frames, 4096).unwrap(), bytes);
        let error = cluster(Compression::Zstd, &frames[..end], 8192).unwrap_err();
        assert!(error.to_string().contains("4096 bytes of 8192"), "{error}");
    }

    #[test]
    fn short_and_damaged_streams_are_refused() {
        let bytes = vec![7; 4096];
        let zlib = deflated(&bytes);
        let frame = zstd::bulk::compress(&bytes, 3).unwrap();
        assert!(cluster(Compression::Zlib, &zlib[..zlib.len() / 2], 4096).is_err());
        assert!(cluster(Compression::Zlib, &zlib, 8192).is_err());
        assert!(cluster(Compression::Zlib, &[0xFF; 64], 4096).is_err());
        assert!(cluster(Compression::Zstd, &frame[..frame.len() / 2], 4096).is_err());
        assert!(cluster(Compression::Zstd, &[0; 64], 4096).is_err());
    }
}
