//! The engine's part of a case: a process of its own, with little memory and little time.
//!
//! It works in the present directory, on copies of one image, and prints what it did and saw, a line
//! for each thing. That it fails is no violation; that it dies is.

use super::{corpus::IMAGE, host_files::HostFiles};
use crate::{
    CheckOptions, Error, ErrorKind, Image, Lane, OpenOptions, Repair, ZeroMode, check,
    exec::run_at_once as run,
    inspect::ImageFile,
    io::{Access, Buf, SECTOR, whole_sectors},
    sim::rng::Rng,
};
use nix::sys::resource::{Resource, setrlimit};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

/// Address space, in bytes.
const MEMORY: u64 = 512 << 20;
/// Processor seconds.
const TIME: u64 = 20;
/// Bytes of a file: what is beyond the end is sparse, and small on disk all the same.
const FILE: u64 = 1 << 45;
/// The unit of reading and of the account.
pub const CHUNK: u64 = 4096;
/// So much of a disk is read.
pub const READ_BYTES: u64 = 48 << 20;
/// The copy that is written to, and the one that is repaired.
pub const WRITTEN: &str = "written.qcow2";
/// See [`WRITTEN`].
pub const REPAIRED: &str = "repaired.qcow2";
/// What was read of the image as it came, and of the one that was written to.
pub const READ_BEFORE: &str = "before.raw";
/// See [`READ_BEFORE`].
pub const READ_AFTER: &str = "after.raw";
const REQUESTS: u64 = 48;
/// Most requests are for the first clusters, of which there are so many.
pub const REACH: u64 = 40;

/// Works on the image in the present directory.
///
/// # Errors
/// The directory cannot be used. What the engine says is printed.
pub fn work(seed: u64) -> io::Result<()> {
    setrlimit(Resource::RLIMIT_AS, MEMORY, MEMORY)?;
    setrlimit(Resource::RLIMIT_CPU, TIME, TIME)?;
    setrlimit(Resource::RLIMIT_FSIZE, FILE, FILE)?;
    inspect();
    read_all(IMAGE, READ_BEFORE, "before")?;
    verdict(IMAGE, Repair::None, "check");
    fs::copy(IMAGE, WRITTEN)?;
    if change(&mut Rng::new(seed)) {
        read_all(WRITTEN, READ_AFTER, "after")?;
    }
    for (repair, label) in [(Repair::Leaks, "leaks"), (Repair::All, "repair")] {
        fs::copy(IMAGE, REPAIRED)?;
        verdict(REPAIRED, repair, label);
        verdict(REPAIRED, Repair::None, &format!("{label}-again"));
    }
    println!("done");
    Ok(())
}

/// What `info` does.
fn inspect() {
    let files = HostFiles::default();
    let told = run(async {
        let file = ImageFile::open(&files, &files, Path::new(IMAGE), Access::ReadOnly).await?;
        file.snapshots().await?;
        file.bitmaps().await.map(drop)
    });
    if let Err(error) = told {
        println!("info: {error}");
    }
}

/// Reads the disk into a file; chunks that cannot be read are told, and stay holes.
fn read_all(image: &str, into: &str, label: &str) -> io::Result<()> {
    let files = HostFiles::default();
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let image = match run(Image::open(&files, &files, Path::new(image), &options)) {
        Ok(image) => image,
        Err(error) => {
            println!("{label}-open: {error}");
            return Ok(());
        }
    };
    let size = whole_sectors(image.virtual_size());
    println!("{label}-size {}", image.virtual_size());
    let lane = Lane::new(&image, files, 4);
    let out = File::create(into)?;
    out.set_len(size.min(READ_BYTES))?;
    let mut told = 0;
    for at in (0..size.min(READ_BYTES)).step_by(CHUNK as usize) {
        let buf = Buf::zeroed(CHUNK.min(size - at) as usize);
        match run(lane.read(at, buf.clone())) {
            Ok(()) => {
                let bytes = buf.to_vec();
                if bytes.iter().any(|byte| *byte != 0) {
                    out.write_all_at(&bytes, at)?;
                }
            }
            Err(error) => {
                println!("{label}-bad {at}");
                if told < 3 {
                    println!("{label}-error: {error}");
                    told += 1;
                }
            }
        }
    }
    // Far out, where a claim may be larger than the tables.
    for at in [size / 2, size.saturating_sub(SECTOR)] {
        let at = at - at % SECTOR;
        let _ = run(lane.read(at, Buf::zeroed(SECTOR.min(size - at) as usize)));
    }
    Ok(())
}

/// Random requests on the copy. Says whether it was opened.
fn change(rng: &mut Rng) -> bool {
    let files = HostFiles::default();
    let options = OpenOptions { extent_bytes: 64 << 10, ..OpenOptions::default() };
    let image = match run(Image::open(&files, &files, Path::new(WRITTEN), &options)) {
        Ok(image) => image,
        Err(error) => {
            println!("write-open: {error}");
            return false;
        }
    };
    println!("write-opened");
    let size = image.virtual_size() & !511;
    let cluster = image.geometry().cluster_size();
    let lane = Lane::new(&image, files, 4);
    for _ in 0..REQUESTS {
        let was_condemned = image.damage.is_condemned();
        match request(rng, &lane, size, cluster) {
            Ok(Kind::Write) if was_condemned => println!("taken after damage"),
            Ok(_) => {}
            Err(error) => tell(&error),
        }
    }
    if let Err(error) = run(lane.close()) {
        tell(&error);
    }
    println!("closed");
    true
}

fn tell(error: &Error) {
    let what = match error {
        Error::Condemned { .. } => "refused",
        // The bytes of a cluster are damaged, the image's structure is not.
        Error::Decompress { .. } => "failed",
        error if error.kind() == ErrorKind::Corrupt => "corrupt",
        _ => "failed",
    };
    println!("{what}: {error}");
}

/// What was asked for. Only of a write it is clear that it changes the image.
enum Kind {
    Write,
    Other,
}

fn request(rng: &mut Rng, lane: &Lane<HostFiles>, size: u64, cluster: u64) -> Result<Kind, Error> {
    if size == 0 {
        return Ok(Kind::Other);
    }
    // Mostly where the sample has something.
    let reach = if rng.below(8) == 0 { size } else { size.min(READ_BYTES).min(REACH * cluster) };
    let at = rng.below(reach);
    let at = at - at % SECTOR;
    let len = match rng.below(3) {
        0 => SECTOR,
        1 => cluster,
        _ => 1 + rng.below(3 * cluster),
    };
    let len = whole_sectors(len).min(size - at);
    let kind = rng.below(10);
    if kind < 8 {
        println!("touched {at} {len}");
    }
    match kind {
        0..=3 => {
            let byte = 0x80 | rng.below(64) as u8;
            return run(lane.write(at, Buf::from_bytes(&vec![byte; len as usize]))).map(|()| Kind::Write);
        }
        4..=5 => run(lane.discard(at, len)),
        6 => run(lane.write_zeroes(at, len, ZeroMode::Unmap)),
        7 => run(lane.write_zeroes(at, len, ZeroMode::Keep)),
        8 => run(lane.flush()),
        _ => run(lane.maintain()),
    }?;
    Ok(Kind::Other)
}

fn verdict(image: &str, repair: Repair, label: &str) {
    let files = HostFiles::default();
    let options = CheckOptions { repair, ..CheckOptions::default() };
    match run(check(&files, &files, Path::new(image), options)) {
        Ok(report) => {
            let left = &report.remaining;
            println!("{label}: {} {} {}", left.corruptions, left.leaks, left.check_errors);
        }
        Err(error) => println!("{label}-error: {error}"),
    }
}
