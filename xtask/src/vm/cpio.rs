//! Writes the "newc" cpio format, which the kernel unpacks as its first file system and busybox reads
//! anywhere.
//!
//! Pure: bytes in, bytes out. Every entry is owned by root and carries time 0, so equal trees give equal
//! archives.

use std::io::{self, Write};

/// What kind of entry is written; the permission bits are added by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    Regular,
    Symlink,
    /// A character device: major and minor number.
    CharDevice(u32, u32),
}

impl Kind {
    const fn mode_bits(self) -> u32 {
        match self {
            Self::Directory => 0o040_000,
            Self::Regular => 0o100_000,
            Self::Symlink => 0o120_000,
            Self::CharDevice(..) => 0o020_000,
        }
    }
}

/// An archive being written to `out`.
pub(crate) struct Writer<W: Write> {
    out: W,
    inode: u32,
    written: u64,
}

impl<W: Write> Writer<W> {
    pub(crate) const fn new(out: W) -> Self {
        Self { out, inode: 0, written: 0 }
    }

    /// Appends one entry. `path` has no leading slash; `content` is a file's bytes or a symbolic link's
    /// target.
    ///
    /// # Errors
    /// Fails when the content is 4 GiB or more, which the format cannot say, and when `out` does.
    pub(crate) fn entry(
        &mut self,
        path: &str,
        kind: Kind,
        permissions: u32,
        content: &[u8],
    ) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len()).map_err(|_| {
            io::Error::new(io::ErrorKind::FileTooLarge, format!("{path} is too large for cpio"))
        })?;
        let (major, minor) = if let Kind::CharDevice(major, minor) = kind { (major, minor) } else { (0, 0) };
        let links = if kind == Kind::Directory { 2 } else { 1 };
        let name_size = path.len() as u32 + 1; // with its NUL
        let fields = [
            self.inode,
            kind.mode_bits() | permissions,
            0, // owner
            0, // group
            links,
            0, // time
            size,
            0, // major and minor number of the device it was taken from
            0,
            major,
            minor,
            name_size,
            0, // no checksum
        ];
        let header: String = fields.iter().map(|field| format!("{field:08x}")).collect();
        self.put(format!("070701{header}{path}\0").as_bytes())?;
        self.pad()?;
        self.put(content)?;
        self.pad()
    }

    /// Ends the archive and returns what it was written to.
    ///
    /// # Errors
    /// Fails when `out` does.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", Kind::Regular, 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    /// Headers and contents each start at a multiple of four bytes.
    fn pad(&mut self) -> io::Result<()> {
        let missing = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 3][..missing as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_header_and_content_is_aligned_to_four_bytes() {
        let mut writer = Writer::new(Vec::new());
        writer.entry("a", Kind::Regular, 0o644, b"hello").unwrap();
        writer.entry("dev/null", Kind::CharDevice(1, 3), 0o666, b"").unwrap();
        let bytes = writer.finish().unwrap();
        // 110 bytes of header and "a\0" make 112; five bytes of content are padded to eight.
        assert_eq!(&bytes[112..117], b"hello");
        assert_eq!(&bytes[120..126], b"070701");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
