//! Both ways of a request's data, `--zero-copy=on` and `off`, and memory of the user's that begins where it
//! likes.
//!
//! With zero copy the image's file system is given the user's own pages. It may refuse memory that is
//! not aligned as its disk wants it; nobody must see that.

use crate::{
    device::{Binary, DeviceDisk},
    disk::{Disk, Op, Server},
    fixture::{Backing, Compression, Recipe},
    journey::{Effort, journey},
    refusals::refuse,
};
use anyhow::{Context, Result, ensure};
use std::{fs, path::Path, slice};

/// The driver's feature that zero copy takes; Linux 6.16 has it.
const FEATURE: &str = "auto-buf-reg";
/// Where memory begins in its page. The devices ask for multiples of four bytes.
const SKEWS: [usize; 3] = [0, 512, 4];

/// Serves with one value of `--zero-copy`.
struct Way<'a> {
    binary: &'a Binary,
    option: &'static str,
    skew: usize,
}

impl Server for Way<'_> {
    type Disk = DeviceDisk;

    fn attach(&self, image: &Path, queues: u16) -> Result<DeviceDisk> {
        let device = self.binary.add(&["-q", &queues.to_string(), self.option], image)?;
        Ok(DeviceDisk::open(device)?.with_skew(self.skew))
    }
}

/// Demands that images of many kinds of mapping are served alike on both ways, or, where the driver has one
/// only, that the other is refused by name.
///
/// # Errors
/// What does not hold.
pub fn both(binary: &Binary, dir: &Path, seed: u64) -> Result<()> {
    let features = binary.run(["features"])?.success()?.stdout;
    let line = features.lines().find(|line| line.contains(FEATURE)).context("no such feature")?;
    let has_zero_copy = line.split_whitespace().nth(1) == Some("yes");
    let small = Recipe { queues: 2, backing: Backing::Raw, ..Recipe::plain(12) };
    let packed = Recipe { compression: Compression::Zlib, ..Recipe::plain(16) };
    let all = [(small, SKEWS[0]), (small, SKEWS[1]), (small, SKEWS[2]), (packed, SKEWS[2])];
    for option in ["--zero-copy=off", "--zero-copy=on"] {
        if option == "--zero-copy=on" && !has_zero_copy {
            let image = dir.join("image.qcow2");
            crate::qemu_img::create(&image, "cluster_size=64k", None, 1 << 20)?;
            refuse(binary, &["add".as_ref(), option.as_ref(), image.as_os_str()], &["6.16"])?;
            continue;
        }
        for (recipe, skew) in all {
            let dir = dir.join(format!("{}{option}-{skew}", recipe.name()));
            fs::create_dir(&dir)?;
            let effort = Effort { batches: 10, returns: 0 };
            journey(&Way { binary, option, skew }, &dir, &recipe, effort, seed)
                .with_context(|| format!("{option}, memory at {skew}, {}", recipe.name()))?;
            fs::remove_dir_all(&dir)?;
        }
        zeros_beside_data(binary, option, dir).context(option)?;
    }
    Ok(())
}

/// Demands that what the image has no data for reads as zeros, whatever was in a tag's memory before: two tags take
/// turns with data read, data written and holes read, in requests of all sizes.
fn zeros_beside_data(binary: &Binary, option: &str, dir: &Path) -> Result<()> {
    const DATA: u8 = 0xa5;
    const HOLE: u64 = 2 << 20;
    let image = dir.join("zeros.qcow2");
    crate::qemu_img::create(&image, "cluster_size=64k", None, 2 * HOLE)?;
    let mut disk = DeviceDisk::open(binary.add(&["-d", "2", option], &image)?)?;
    let write = |len: u64| Op::Write { at: 0, bytes: vec![DATA; len as usize].into() };
    disk.run(&[write(1 << 20)])?;
    let read = |disk: &mut DeviceDisk, at: u64, len: u64, wanted: u8| {
        let op = Op::Read { at, len };
        let bytes = disk.run(slice::from_ref(&op))?.concat();
        ensure!(bytes.iter().all(|byte| *byte == wanted), "{op:?}: not all of it is {wanted:#x}");
        Ok(())
    };
    for round in 0..24 {
        for len in [4 << 10, 512 << 10, 16 << 10, 64 << 10] {
            read(&mut disk, 0, len, DATA)?;
            if round % 2 == 0 {
                disk.run(&[write(len)])?;
            }
            read(&mut disk, HOLE, len, 0)?;
        }
    }
    disk.detach()?;
    fs::remove_file(&image)?;
    Ok(())
}
