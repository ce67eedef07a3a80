//! One compressed cluster to its bytes, with every bound checked.
//!
//! zlib clusters are raw deflate streams, zstd clusters are frames; both may be followed by slack up
//! to the next sector. The output must be one cluster exactly.

use flate2::{Decompress, FlushDecompress, Status};
use qcow2_format::Compression;
use std::{
    cell::RefCell,
    io::{self, Read},
};
use zstd::{bulk::Decompressor, zstd_safe};

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
    static INFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static UNZSTD: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

fn inflate(input: &[u8], len: usize) -> io::Result<Vec<u8>> {
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
        None => unzstd_start(input, len),
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

/// The first `len` bytes of a frame that may have more, or the reason why there are fewer.
fn unzstd_start(input: &[u8], len: usize) -> io::Result<Vec<u8>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?.single_frame();
    decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
    let mut output = vec![0; len];
    decoder
        .read_exact(&mut output)
        .map_err(|error| invalid(format!("the frame is damaged or too short: {error}")))?;
    Ok(output)
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

    /// More than a cluster is what QEMU takes as well: the rest of the stream is not looked at.
    #[test]
    fn overlong_output_is_cut_off_at_the_cluster() {
        let bytes: Vec<u8> = (0..16384_u32).map(|at| (at / 9) as u8).collect();
        for (kind, input) in [
            (Compression::Zlib, deflated(&bytes)),
            (Compression::Zstd, zstd::bulk::compress(&bytes, 3).unwrap()),
        ] {
            assert_eq!(cluster(kind, &input, 4096).unwrap(), bytes[..4096], "{kind:?}");
        }
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
