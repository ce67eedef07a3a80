//! Whole transfers: what to do when the kernel moves fewer bytes than asked for.

use super::{Buf, FileId, Io};
use std::io;

/// Reads the whole buffer; what lies beyond the end of the file reads as zeros.
///
/// # Errors
/// The file's read error.
pub async fn read_zero_extended(io: &impl Io, file: FileId, at: u64, buf: &Buf) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let count = io.read(file, at + done as u64, buf.slice(done..buf.len())).await?;
        done += count;
        // The end of the file. An unaligned count is that too: direct I/O could not go on from there.
        if count == 0 || count % 512 != 0 {
            buf.slice(done..buf.len()).fill(0);
            return Ok(());
        }
    }
    Ok(())
}

/// Writes the whole buffer.
///
/// # Errors
/// The file's write error; `WriteZero` when it takes no more bytes.
pub async fn write_all(io: &impl Io, file: FileId, at: u64, buf: &Buf) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match io.write(file, at + done as u64, buf.slice(done..buf.len())).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => done += count,
        }
    }
    Ok(())
}
