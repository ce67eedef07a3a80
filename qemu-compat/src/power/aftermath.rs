//! What must hold of an image after the power has gone.

use super::journal::Journal;
use crate::{
    device::{Binary, DeviceDisk},
    disk::{Disk, Op, Server},
    qemu_img::{self, Verdict},
};
use anyhow::{Context, Result, bail, ensure};
use std::{fs, path::Path, thread, time::Duration};

/// What the search for leaks is given at first; it begins a second after the device serves.
const FIRST_PATIENCE: Duration = Duration::from_secs(3);
/// Each attempt is given twice as long as the one before.
const ATTEMPTS: u32 = 4;
/// Bytes compared at a time.
const PIECE: u64 = 1 << 20;

/// Whether a cut has left clusters that nobody refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leaks {
    None,
    Some,
}

/// Holds an image against a journal, between mark number `mark` and the next one. `raw` becomes what
/// QEMU reads in it.
///
/// # Errors
/// More than leaks, or a sector that may not be there.
pub(super) fn judge(image: &Path, raw: &Path, journal: &Journal, mark: usize) -> Result<Leaks> {
    let leaks = match qemu_img::check(image)? {
        Verdict::Clean => Leaks::None,
        Verdict::Leaks(_) => Leaks::Some,
        Verdict::Damaged(text) => bail!("qemu-img check finds more than leaks: {text}"),
    };
    qemu_img::extract(image, raw)?;
    journal.hold(raw, mark)?;
    Ok(leaks)
}

/// Serves what a cut has left until its leaks are gone; it shows what QEMU has read in it.
///
/// # Errors
/// It cannot be served, shows something else, or is not clean in the end.
pub(super) fn serve_again(binary: &Binary, image: &Path, queues: u16, raw: &Path) -> Result<()> {
    let mut patience = FIRST_PATIENCE;
    for _ in 0..ATTEMPTS {
        let mut disk = binary.attach(image, queues)?;
        compare(&mut disk, raw).context("served again, it shows something else")?;
        thread::sleep(patience);
        disk.detach()?;
        match qemu_img::check(image)? {
            Verdict::Clean => return Ok(()),
            Verdict::Leaks(_) => patience *= 2,
            Verdict::Damaged(text) => bail!("served again, qemu-img check finds damage: {text}"),
        }
    }
    qemu_img::check_clean(image).context("the leaks of the cut were not given back")
}

fn compare(disk: &mut DeviceDisk, raw: &Path) -> Result<()> {
    let expected = fs::read(raw)?;
    for (index, expected) in expected.chunks(PIECE as usize).enumerate() {
        let at = index as u64 * PIECE;
        let found = disk.run(&[Op::Read { at, len: expected.len() as u64 }])?.pop().unwrap_or_default();
        ensure!(found == expected, "the MiB at {at:#x} differs");
    }
    Ok(())
}
