//! The table of real files: opening, QEMU's image locks, direct or buffered I/O, length.
//!
//! [`Files`] is shared by all serving threads; a [`FileId`] is an index into it, and an entry is
//! never replaced or closed before the table itself goes. So a ring may keep a file's descriptor,
//! or a registration of it, for as long as it holds the table. The table as a whole is one user of the
//! files in it: opened twice, a file is not in its own way. This module blocks (it is used
//! while an image is opened or closed) and knows nothing of rings or formats.

mod locks;

pub use locks::Locking;

use super::{Access, FileId, Storage};
use locks::Claim;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise},
    unistd::{Whence, lseek},
};
use rustix::fs::{AtFlags, StatxFlags};
use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::{FileExt, FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock, RwLockReadGuard},
};

/// The strictest alignment, in bytes, that the engine keeps for offsets, lengths and memory.
const ENGINE_ALIGNMENT: u32 = 512;

/// Whether file data passes the host's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Caching {
    /// Direct where the file allows it at 512-byte alignment, else buffered; on FUSE always buffered.
    #[default]
    Auto,
    /// Direct, or opening fails.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// The open files of one image: the [`Storage`] of the serving process.
#[derive(Debug)]
pub struct Files {
    caching: Caching,
    locking: Locking,
    table: RwLock<Vec<OpenFile>>,
}

#[derive(Debug)]
struct OpenFile {
    file: File,
    path: PathBuf,
    direct: bool,
    /// Device and inode.
    identity: (u64, u64),
    /// The locks that this descriptor has; if the file is in the table twice, the first has them all.
    claim: Claim,
}

impl Drop for OpenFile {
    /// Nothing of a ring is under way: a ring holds the table until its operations have ended.
    fn drop(&mut self) {
        locks::release(&self.file, self.claim);
    }
}

impl Files {
    /// An empty table whose files will be opened with `caching`, and locked as QEMU does.
    #[must_use]
    pub fn new(caching: Caching) -> Self {
        Self::with_locking(caching, Locking::default())
    }

    /// An empty table whose files will be opened with `caching` and locked as `locking` says.
    #[must_use]
    pub fn with_locking(caching: Caching, locking: Locking) -> Self {
        Self { caching, locking, table: RwLock::new(Vec::new()) }
    }

    /// The file's descriptor. It stays open, and stays this file's, while `self` lives.
    ///
    /// # Errors
    /// `NotFound` for an id that this table did not give out.
    pub fn fd(&self, file: FileId) -> io::Result<RawFd> {
        self.with(file, |open| Ok(open.file.as_raw_fd()))
    }

    /// Whether the file is open for direct I/O.
    ///
    /// # Errors
    /// `NotFound` for an id that this table did not give out.
    pub fn is_direct(&self, file: FileId) -> io::Result<bool> {
        self.with(file, |open| Ok(open.direct))
    }

    /// The path under which the file was opened.
    ///
    /// # Errors
    /// `NotFound` for an id that this table did not give out.
    pub fn path(&self, file: FileId) -> io::Result<PathBuf> {
        self.with(file, |open| Ok(open.path.clone()))
    }

    /// What the file system says of the file now.
    ///
    /// # Errors
    /// The operating system's; `NotFound` for an id that this table did not give out.
    pub fn metadata(&self, file: FileId) -> io::Result<Metadata> {
        self.with(file, |open| open.file.metadata())
    }

    /// The paths under which files were opened.
    #[must_use]
    pub fn paths(&self) -> Vec<PathBuf> {
        self.read_table().iter().map(|open| open.path.clone()).collect()
    }

    /// The files that are read and written through the page cache because they cannot be directly
    /// ([`Caching::Auto`]).
    #[must_use]
    pub fn fallen_back(&self) -> Vec<PathBuf> {
        let wished = self.caching == Caching::Auto;
        self.read_table().iter().filter(|open| wished && !open.direct).map(|open| open.path.clone()).collect()
    }

    /// Sets the file's length by a plain, blocking call: for kernels whose rings cannot.
    ///
    /// # Errors
    /// The operating system's; `NotFound` for an unknown id.
    pub fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.with(file, |open| open.file.set_len(len))
    }

    fn with<T>(&self, file: FileId, f: impl FnOnce(&OpenFile) -> io::Result<T>) -> io::Result<T> {
        match self.read_table().get(file.0 as usize) {
            Some(open) => f(open),
            None => Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("no open file has the number {}", file.0),
            )),
        }
    }

    fn read_table(&self) -> RwLockReadGuard<'_, Vec<OpenFile>> {
        // The table is only ever appended to: it is whole even if a holder of the lock panicked.
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Storage for Files {
    fn open(&self, path: &Path, access: Access) -> io::Result<FileId> {
        let wanted = Claim::of(access, self.locking)?;
        let file = open_regular_or_block(path, access)?;
        let metadata = file.metadata()?;
        let direct = set_up_caching(&file, path, self.caching)?;
        leave_access_time(&file);
        let identity = (metadata.dev(), metadata.ino());
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let id = u32::try_from(table.len()).map_err(|_| io::Error::other("too many open files"))?;
        let mut claim = Claim::default();
        match table.iter_mut().find(|open| open.identity == identity) {
            Some(first) => first.claim = locks::extend(&first.file, path, first.claim, wanted)?,
            None => claim = locks::extend(&file, path, claim, wanted)?,
        }
        if access == Access::ReadWrite {
            drop_cached(&file);
        }
        table.push(OpenFile { file, path: path.to_owned(), direct, identity, claim });
        Ok(FileId(id))
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        // Seeking gives the length of a file and the capacity of a block device alike. The shared
        // file position is of no consequence: every transfer names its offset.
        self.with(file, |open| (&open.file).seek(SeekFrom::End(0)))
    }

    fn is_hole(&self, file: FileId, at: u64, len: u64) -> bool {
        let Ok(start) = i64::try_from(at) else { return false };
        let next_data = self.with(file, |open| Ok(lseek(&open.file, start, Whence::SeekData)));
        match next_data {
            Ok(Ok(data)) => data.cast_unsigned() >= at.saturating_add(len),
            // No data from here to the end of the file.
            Ok(Err(Errno::ENXIO)) => true,
            _ => false,
        }
    }
}

/// Opens a regular file or block device and nothing else. The type is asked first, because opening
/// a FIFO would wait for its other end, and again after, because the name may have changed hands.
fn open_regular_or_block(path: &Path, access: Access) -> io::Result<File> {
    let wanted = std::fs::metadata(path)?;
    check_type(&wanted)?;
    let file = OpenOptions::new().read(true).write(access == Access::ReadWrite).open(path)?;
    let opened = file.metadata()?;
    check_type(&opened)?;
    if (wanted.dev(), wanted.ino()) != (opened.dev(), opened.ino()) {
        return Err(io::Error::other("the file was replaced while it was being opened"));
    }
    if access == Access::ReadWrite && is_read_only_device(&opened) {
        return Err(Errno::EROFS.into());
    }
    Ok(file)
}

/// Whether a block device takes no writes. Opening it for writing works all the same, and then each write fails.
/// The kernel says it in sysfs as it does by BLKROGET; one that is not to be seen there is taken at its word.
fn is_read_only_device(opened: &Metadata) -> bool {
    let (major, minor) = (rustix::fs::major(opened.rdev()), rustix::fs::minor(opened.rdev()));
    opened.file_type().is_block_device()
        && std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro"))
            .is_ok_and(|is_read_only| is_read_only.trim() == "1")
}

fn check_type(metadata: &std::fs::Metadata) -> io::Result<()> {
    let kind = metadata.file_type();
    let name = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a character device"
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is not a regular file or block device")))
}

/// Turns direct I/O on where asked for and possible. Returns whether it is on.
fn set_up_caching(file: &File, path: &Path, caching: Caching) -> io::Result<bool> {
    if caching == Caching::Buffered || caching == Caching::Auto && loses_direct_writes(file) {
        return Ok(false);
    }
    match try_direct(file) {
        Ok(()) => Ok(true),
        Err(reason) => {
            set_direct(file, false)?;
            match caching {
                Caching::Direct => Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("direct I/O on {} is not possible: {reason}", path.display()),
                )),
                _ => Ok(false),
            }
        }
    }
}

/// Whether what the storage did not take of a direct write may be lost without a word. On FUSE it is, unless the
/// file system's server has asked for asynchronous direct I/O, which nobody else can see: io_uring writes the rest
/// at the place of the first part then, and says that all of it is written (seen on Linux 6.18).
fn loses_direct_writes(file: &File) -> bool {
    const FUSE: i64 = 0x6573_5546;
    #[allow(clippy::unnecessary_cast, reason = "its type is the architecture's")]
    rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type as i64 == FUSE)
}

/// Drops what the page cache has of the file and takes to be on disk. It need not be: what the disk would not
/// take stays in the cache, as clean, and one process alone is told. Whoever believed it then would build on what
/// is gone with the cache. That is under the file's locks, so that nobody's writes can fail any more who had it
/// before; those that are still to come fail for us. Also, a direct write to a cached page has to throw that out
/// first, and is handed to another thread for it.
fn drop_cached(file: &File) {
    // Advice, which the kernel does not take for pages that somebody has mapped or is just reading.
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

/// Turns direct I/O on and makes sure that it works at the engine's alignment; else says why not.
fn try_direct(file: &File) -> Result<(), String> {
    match reported_alignment(file) {
        Some(0) => return Err("the file system does not support it".to_owned()),
        Some(bytes) if bytes > ENGINE_ALIGNMENT => {
            return Err(format!("it needs {bytes}-byte alignment here, more than {ENGINE_ALIGNMENT}"));
        }
        _ => {}
    }
    set_direct(file, true).map_err(|error| error.to_string())?;
    if reported_alignment(file).is_none() {
        trial_read(file).map_err(|error| format!("a {ENGINE_ALIGNMENT}-byte read failed: {error}"))?;
    }
    Ok(())
}

fn set_direct(file: &File, on: bool) -> io::Result<()> {
    set_flag(file, OFlag::O_DIRECT, on)
}

/// Has reads leave the file's time of access alone, where this user may ask for that: when a disk was last read is
/// nobody's question of its image, and answering it would cost every read.
fn leave_access_time(file: &File) {
    let _ = set_flag(file, OFlag::O_NOATIME, true);
}

fn set_flag(file: &File, flag: OFlag, on: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    flags.set(flag, on);
    fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// What the kernel says direct I/O needs: the larger of offset and memory alignment in bytes, 0
/// where direct I/O is not supported, `None` where the kernel or file system does not say.
fn reported_alignment(file: &File) -> Option<u32> {
    let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return None;
    }
    Some(match (stat.stx_dio_mem_align, stat.stx_dio_offset_align) {
        (0, _) | (_, 0) => 0,
        (memory, offset) => memory.max(offset),
    })
}

/// Reads 512 bytes into memory that is aligned to 512 and not to more.
fn trial_read(file: &File) -> io::Result<()> {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let mut page = Page([0; 4096]);
    let length = ENGINE_ALIGNMENT as usize;
    file.read_at(&mut page.0[length..2 * length], 0).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{sys::signal, unistd::Pid};

    fn image(dir: &Path) -> PathBuf {
        let path = dir.join("image");
        std::fs::write(&path, vec![7; 4096]).unwrap();
        path
    }

    /// Tells past the test program, which shows what is printed by tests that fail only.
    fn not_tested(why: &str) {
        let _ = io::Write::write_all(&mut io::stderr(), format!("NOT TESTED: {why}\n").as_bytes());
    }

    /// What QEMU shows of a file by FUSE, until it is dropped.
    struct Exported(std::process::Child);

    impl Exported {
        fn new(image: &Path, place: &Path) -> Option<Self> {
            std::fs::write(place, "").unwrap();
            let daemon = std::process::Command::new("qemu-storage-daemon")
                .args(["--blockdev", &format!("driver=file,node-name=n,filename={}", image.display())])
                .args([
                    "--export",
                    &format!("fuse,id=e,node-name=n,writable=on,mountpoint={}", place.display()),
                ])
                .spawn();
            let exported = Self(daemon.ok()?);
            let is_there = || File::open(place).is_ok_and(|file| loses_direct_writes(&file));
            for _ in 0..100 {
                if is_there() {
                    return Some(exported);
                }
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            None
        }
    }

    impl Drop for Exported {
        fn drop(&mut self) {
            let server = Pid::from_raw(self.0.id().cast_signed());
            let _ = signal::kill(server, signal::Signal::SIGTERM);
            let _ = self.0.wait();
        }
    }

    /// Part of a direct write that a FUSE server does not take is lost in silence, and lands elsewhere.
    #[test]
    fn what_fuse_shows_is_written_through_the_cache_unless_told_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        let (image, place) = (image(dir.path()), dir.path().join("shown"));
        let Some(_exported) = Exported::new(&image, &place) else {
            return not_tested("files on FUSE: qemu-storage-daemon cannot show one");
        };
        let is_direct = |caching| {
            let files = Files::new(caching);
            files.open(&place, Access::ReadWrite).and_then(|file| files.is_direct(file)).unwrap()
        };
        assert!(!is_direct(Caching::Auto));
        assert!(is_direct(Caching::Direct), "it was asked for");
    }

    #[test]
    fn auto_is_direct_where_that_is_possible_and_reports_the_length() {
        // The build directory, because /tmp may be a tmpfs.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let files = Files::new(Caching::Auto);
        let id = files.open(&image(dir.path()), Access::ReadWrite).unwrap();
        assert_eq!(id, FileId(0));
        assert_eq!(files.len(id).unwrap(), 4096);
        files.set_len(id, 1000).unwrap();
        assert_eq!(files.len(id).unwrap(), 1000);
        let flags = OFlag::from_bits_retain(
            fcntl(File::open(dir.path().join("image")).unwrap(), FcntlArg::F_GETFL).unwrap(),
        );
        assert!(!flags.intersects(OFlag::O_DIRECT | OFlag::O_NOATIME), "another descriptor is not changed");
        let ours = OFlag::from_bits_retain(
            files.with(id, |open| Ok(fcntl(&open.file, FcntlArg::F_GETFL)?)).unwrap(),
        );
        assert!(ours.contains(OFlag::O_NOATIME), "it is this user's own file");
        let other = files.open(&dir.path().join("image"), Access::ReadOnly).unwrap();
        assert_ne!(files.fd(id).unwrap(), files.fd(other).unwrap());
        // Whether this file system can is for the kernel to say, to whoever insists.
        let another = dir.path().join("another");
        std::fs::write(&another, [7; 4096]).unwrap();
        let can = Files::new(Caching::Direct).open(&another, Access::ReadOnly).is_ok();
        for id in [id, other] {
            assert_eq!(files.is_direct(id).unwrap(), can);
        }
    }

    #[test]
    fn buffered_stays_buffered_and_unknown_ids_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(Caching::Buffered);
        let id = files.open(&image(dir.path()), Access::ReadOnly).unwrap();
        assert!(!files.is_direct(id).unwrap());
        assert!(files.fallen_back().is_empty(), "as was asked for");
        assert_eq!(files.fd(FileId(9)).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    /// What a disk had not taken stayed in the page cache as if it had, and the next process built on it.
    #[test]
    fn who_opens_a_file_for_writing_reads_what_is_on_disk() {
        let is_cached = |file: &File| {
            let mut byte = [0];
            let buf = io::IoSliceMut::new(&mut byte);
            // Only from memory. Not every file system can tell.
            rustix::io::preadv2(file, &mut [buf], 0, rustix::io::ReadWriteFlags::NOWAIT)
        };
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = image(dir.path());
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        if is_cached(&file) != Ok(1) {
            return not_tested("what a writer reads: this file system does not tell what is cached");
        }
        let files = Files::new(Caching::Buffered);
        files.open(&path, Access::ReadOnly).unwrap();
        assert_eq!(is_cached(&file), Ok(1), "readers share it");
        // A page that was written a moment ago may still be busy.
        let drops = |_| {
            files.open(&path, Access::ReadWrite).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(10));
            is_cached(&file) == Err(rustix::io::Errno::AGAIN)
        };
        assert!((0..100).any(drops));
    }

    #[test]
    fn direct_is_refused_by_name_where_it_is_impossible() {
        let files = Files::new(Caching::Direct);
        // procfs has regular files and no direct I/O, on every kernel.
        let error = files.open(Path::new("/proc/self/stat"), Access::ReadOnly).unwrap_err();
        assert!(error.to_string().contains("direct I/O on /proc/self/stat"), "{error}");
        let files = Files::new(Caching::Auto);
        let id = files.open(Path::new("/proc/self/stat"), Access::ReadOnly).unwrap();
        assert!(!files.is_direct(id).unwrap());
        assert_eq!(files.fallen_back(), [Path::new("/proc/self/stat")]);
    }

    #[test]
    fn holes_are_known_where_the_file_system_tells() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        let file = File::create(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[1; 4096], 32 << 20).unwrap();
        let files = Files::new(Caching::Buffered);
        let id = files.open(&path, Access::ReadOnly).unwrap();
        assert!(!files.is_hole(id, 0, 64 << 20));
        assert!(!files.is_hole(id, (32 << 20) - 1, 2));
        // A file system that does not tell calls nothing a hole, which is right, too.
        if files.is_hole(id, 0, 1 << 20) {
            assert!(files.is_hole(id, 48 << 20, u64::MAX));
        }
    }

    #[test]
    fn only_files_and_block_devices_open() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let files = Files::new(Caching::Auto);
        for (path, name) in
            [(dir.path(), "a directory"), (&fifo, "a FIFO"), (Path::new("/dev/null"), "a character")]
        {
            let error = files.open(path, Access::ReadOnly).unwrap_err();
            assert!(error.to_string().starts_with(name), "{path:?}: {error}");
        }
        let missing = files.open(&dir.path().join("none"), Access::ReadOnly).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
