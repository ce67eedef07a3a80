//! What becomes of a device whose image was condemned while it was served: an entry leads to one of the
//! image's own tables, a write there fails, and nothing is changed any more until the image is repaired.

use crate::{
    device::{Binary, DeviceDisk},
    disk::{Disk, Op},
    qemu_img,
    recovery::wait_until_replaced,
};
use anyhow::{Context, Result, ensure};
use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
};

const CLUSTER: u64 = 65536;
/// What is in the image's first cluster, which is sound.
static MARK: [u8; CLUSTER as usize] = [7; CLUSTER as usize];
/// The guest cluster whose entry is damaged.
const DAMAGED: u64 = CLUSTER;
/// Fields of a header.
const L1_TABLE_OFFSET: u64 = 40;
const REFCOUNT_TABLE_OFFSET: u64 = 48;
/// Bit 63 of entries, and the bits that are a place.
const COPIED: u64 = 1 << 63;
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;

/// Detaches it with a page in memory that cannot be written: the device goes, the failure is told, and the
/// image can be repaired. It could not, for `del` wanted to write to it and tools wanted `del` to come first.
///
/// # Errors
/// What does not hold.
pub fn detached_and_repaired(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    let device = condemned(binary, &image)?.into_device();
    let buffered = OpenOptions::new().write(true).open(device.path())?;
    buffered.write_all_at(&[9; 4096], 3 * CLUSTER)?;
    drop(buffered);
    let finished = binary.run(["del", "-n", &device.id().to_string()])?;
    ensure!(!finished.status.success(), "nobody was told that a page is lost: {}", finished.text());
    device.has_gone()?;
    repaired(binary, &image)
}

/// Kills its server: reads go on, writes go on failing, and a clean end leaves nothing in the way of a
/// repair. All I/O hung, because no successor opened the image.
///
/// # Errors
/// What does not hold.
pub fn served_by_a_successor(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    let mut disk = condemned(binary, &image)?;
    let dead = disk.device().listed()?.pid;
    disk.device().kill_server()?;
    wait_until_replaced(disk.device(), dead)?;
    let found = disk.run(&[Op::Read { at: 0, len: CLUSTER }])?;
    ensure!(found[0] == MARK, "something else is read than before");
    let written = disk.run(&[Op::Write { at: 4 * CLUSTER, bytes: MARK.to_vec().into() }]);
    ensure!(written.is_err(), "the successor writes to the image");
    disk.detach()?;
    repaired(binary, &image)
}

/// A device that has met damage.
fn condemned(binary: &Binary, image: &Path) -> Result<DeviceDisk> {
    qemu_img::create(image, "cluster_size=64k", None, 16 << 20)?;
    let mut disk = DeviceDisk::open(binary.add(&[], image)?)?;
    for at in [0, DAMAGED] {
        disk.run(&[Op::Write { at, bytes: MARK.to_vec().into() }])?;
    }
    disk.detach()?;
    damage(image)?;
    let mut disk = DeviceDisk::open(binary.add(&[], image)?)?;
    let written = disk.run(&[Op::Write { at: DAMAGED, bytes: MARK.to_vec().into() }]);
    ensure!(written.is_err(), "a write to the refcount block succeeded");
    Ok(disk)
}

/// Has the entry of the cluster at [`DAMAGED`] lead to the refcount block: the one kind of table that a
/// repair can make anew.
fn damage(image: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(image)?;
    let l1_table = word(&file, L1_TABLE_OFFSET)?;
    let l2_table = word(&file, l1_table)? & PLACE;
    ensure!(l2_table != 0, "there is no L2 table");
    let block = word(&file, word(&file, REFCOUNT_TABLE_OFFSET)?)?;
    let at = l2_table + DAMAGED / CLUSTER * 8;
    file.write_all_at(&(block | COPIED).to_be_bytes(), at).context("the entry")
}

fn word(file: &File, at: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_be_bytes(bytes))
}

fn repaired(binary: &Binary, image: &Path) -> Result<()> {
    let args = ["check".as_ref(), "--repair".as_ref(), "all".as_ref(), image.as_os_str()];
    binary.run(args)?.success()?;
    qemu_img::check_clean(image)
}
