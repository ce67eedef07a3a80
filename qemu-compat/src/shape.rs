//! What a device looks like to its users: limits of its queue, and read-only service.

use crate::{
    device::{Binary, Device, DeviceDisk, carry_out},
    disk::{Disk, Op, Server},
    fixture::{Fixture, Recipe, sum},
    sequence::Discards,
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::{self, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// The limits in sysfs follow the image.
///
/// # Errors
/// A limit that does not.
pub fn limits(binary: &Binary, dir: &Path, recipe: &Recipe) -> Result<()> {
    let fixture = Fixture::make(dir, recipe, 1)?;
    let disk = binary.attach(&fixture.image, recipe.queues)?;
    let device = disk.device();
    let number = |file: &str| -> Result<u64> { Ok(device.sysfs(file)?.parse()?) };
    let is = |file: &str, wanted: u64| -> Result<()> {
        let found = number(file)?;
        ensure!(found == wanted, "{file} is {found}, not {wanted}");
        Ok(())
    };
    is("size", recipe.size / 512)?;
    is("ro", 0)?;
    is("queue/logical_block_size", 512)?;
    match recipe.discards() {
        Discards::Zero => {
            // The kernel rounds it up to the physical block.
            let physical = number("queue/physical_block_size")?;
            is("queue/discard_granularity", recipe.cluster().max(physical))?;
            ensure!(number("queue/discard_max_bytes")? > 0, "no discard");
        }
        Discards::Unsupported => is("queue/discard_max_bytes", 0)?,
    }
    ensure!(number("queue/write_zeroes_max_bytes")? > 0, "no write-zeroes");
    ensure!(number("queue/max_sectors_kb")? >= 512, "requests of less than 512 KiB only");
    ensure!(device.sysfs("queue/write_cache")? == "write back", "no volatile cache: flushes are not sent");
    let queues = fs::read_dir(format!("/sys/block/ublkb{}/mq", device.id()))?.count();
    ensure!(queues == usize::from(recipe.queues), "{queues} queues, not {}", recipe.queues);
    disk.detach()
}

/// A read-only device reads, refuses changes with the right errno, and leaves the file alone.
///
/// # Errors
/// It does not.
pub fn read_only(binary: &Binary, dir: &Path, recipe: &Recipe) -> Result<()> {
    let fixture = Fixture::make(dir, recipe, 2)?;
    let before = (sum(&fixture.image)?, fs::metadata(&fixture.image)?.modified()?);
    let device = binary.add(&["--read-only"], &fixture.image)?;
    ensure!(device.sysfs("ro")? == "1", "sysfs does not say that it is read-only");
    let bytes = fs::read(device.path())?;
    fixture.mirror.compare(0, &bytes)?;
    refuses_changes(&device)?;
    device.detach()?;
    let after = (sum(&fixture.image)?, fs::metadata(&fixture.image)?.modified()?);
    ensure!(before == after, "the image file has changed");
    fixture.judge()
}

/// Every kind of change is refused: at open, or one by one.
fn refuses_changes(device: &Device) -> Result<()> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_DIRECT);
    let file = match options.open(device.path()) {
        Err(error) if is_refusal(error.raw_os_error()) => return Ok(()),
        file => file.context("opening for writing")?,
    };
    let (at, len) = (0, 65536);
    let changes = [
        Op::Write { at, bytes: vec![1; 65536].into() },
        Op::Zero { at, len, unmap: false },
        Op::Zero { at, len, unmap: true },
        Op::Discard { at, len },
    ];
    for op in changes {
        let error = match carry_out(&file, &op) {
            Err(error) => error,
            Ok(_) => bail!("{op:?} succeeded"),
        };
        let io = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
        let errno = io.or(error.downcast_ref::<nix::errno::Errno>().map(|errno| *errno as i32));
        // A device that never discards says so before it says that it is read-only.
        let has_no_discard = matches!(op, Op::Discard { .. }) && errno == Some(libc::EOPNOTSUPP);
        ensure!(is_refusal(errno) || has_no_discard, "{op:?} failed with {error:#}");
    }
    Ok(())
}

fn is_refusal(errno: Option<i32>) -> bool {
    matches!(errno, Some(libc::EPERM | libc::EACCES | libc::EROFS))
}

/// Requests that reach beyond the end fail, and the disk goes on.
///
/// # Errors
/// They succeed, or the disk does not go on.
pub fn beyond_the_end(disk: &mut DeviceDisk) -> Result<()> {
    let at = disk.size();
    for op in [
        Op::Read { at, len: 512 },
        Op::Write { at, bytes: vec![1; 512].into() },
        Op::Discard { at, len: 512 },
    ] {
        ensure!(disk.run(std::slice::from_ref(&op)).is_err(), "{op:?} succeeded beyond the end");
    }
    disk.run(&[Op::Read { at: at - 512, len: 512 }]).map(drop)
}
