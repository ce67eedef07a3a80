//! Devices that have no server for a while, or no record, and what comes to them meanwhile.
//!
//! Others may want the image of a device that is about to be recovered; a device may have been made by a
//! server that did not live to write its record.

use crate::{
    command::{TOOL_LIMIT, wait},
    device::{Binary, DeviceDisk, existing, free_number},
    disk::{Disk, Op},
    lifecycle::{MARK, is_supervised, still_written, without_writers, written_unsupervised},
    patience, qemu_img,
    recovery::{only_leaks, wait_until_preparing, wait_until_replaced},
    refusals::refuse,
    server::only_child_of,
};
use anyhow::{Context, Result, ensure};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Stdio},
    thread,
    time::Duration,
};

/// How long one that is interrupted may take to end.
const INTERRUPTED: Duration = Duration::from_secs(10);
/// In that time a supervisor has several successors try.
const SEVERAL_ATTEMPTS: Duration = Duration::from_secs(4);

/// A successor has taken a device over and has not opened its image yet: `add` must not have the image. It
/// had it, because nobody had locked it; what the dead server had acknowledged was lost, and the device could
/// not be recovered any more.
///
/// # Errors
/// What does not hold.
pub fn added_while_recovered(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let device = written_unsupervised(binary, &image)?;
    let dead = device.listed()?.pid;
    device.kill_server()?;
    let reader = without_writers(&image)?;
    let id = device.id().to_string();
    let mut command = binary.command();
    let mut recovering =
        command.args(["recover", "--foreground", "-n", &id]).stdout(Stdio::null()).spawn()?;
    let successor = Pid::from_raw(recovering.id().cast_signed());
    wait_until_preparing(&device, dead)?;
    kill(successor, Signal::SIGSTOP)?;
    drop(reader);
    // It may have been stopped in the midst of an attempt to lock the image.
    let refused =
        refuse(binary, &["add".as_ref(), image.as_os_str()], &["is served as", "in use by ublk-qcow2"]);
    kill(successor, Signal::SIGCONT)?;
    refused?;
    wait_until_replaced(&device, dead)?;
    still_written(device)?;
    ensure!(recovering.wait()?.success(), "the successor has not ended well");
    Ok(())
}

/// Interrupts a successor in the foreground while it opens the image, which somebody else has: it ends at once, and the
/// device waits for the next. It could not be interrupted.
///
/// # Errors
/// What does not hold.
pub fn recovery_interrupted(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let device = written_unsupervised(binary, &image)?;
    let (id, dead) = (device.id().to_string(), device.listed()?.pid);
    device.kill_server()?;
    let reader = without_writers(&image)?;
    let mut command = binary.command();
    let mut recovering =
        command.args(["recover", "--foreground", "-n", &id]).stdout(Stdio::null()).spawn()?;
    wait_until_preparing(&device, dead)?;
    kill(Pid::from_raw(recovering.id().cast_signed()), Signal::SIGTERM)?;
    ensure!(wait(&mut recovering, INTERRUPTED)?.is_some(), "it goes on");
    drop(reader);
    ensure!(device.listed()?.state == "waiting", "it is {}", device.listed()?.state);
    binary.run(["recover", "--no-supervisor", "-n", &id])?.success()?;
    still_written(device)
}

/// The image of a dead server is gone: where nothing is owed to it the device is removed and all is well; where
/// something is, `del` says how to give that up. It failed for ever. Until then the number is nobody else's, even
/// if its record cannot be read: every `add` failed.
///
/// # Errors
/// What does not hold.
pub fn removed_though_the_image_is_gone(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let device = binary.add(&["--no-supervisor"], &image)?;
    device.kill_server()?;
    fs::remove_file(&image)?;
    device.detach().context("nothing was owed")?;

    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let device = written_unsupervised(binary, &image)?;
    device.kill_server()?;
    fs::remove_file(&image)?;
    let id = device.id().to_string();
    let del = ["del", "-n", &id];
    let (log, record) = (device.file("redo"), device.file("json"));
    let failed = binary.run(del)?;
    ensure!(!failed.status.success(), "what was acknowledged is lost, and `del` says nothing");
    ensure!(failed.stderr.contains(&*log.to_string_lossy()), "no way out: {}", failed.text());

    let text = fs::read(&record)?;
    fs::write(&record, "{")?;
    let other = dir.join("other.qcow2");
    qemu_img::create(&other, "cluster_size=64k", None, 16 << 20)?;
    let added = binary.add(&[], &other).context("another image");
    fs::write(&record, text)?;
    let beside = added?;
    ensure!(beside.id() != device.id(), "another image has the number");
    beside.detach()?;

    fs::remove_file(&log)?;
    binary.run(del)?.success()?;
    device.has_gone()
}

/// The image is not there when its server is killed: no successor can take the device over, until the image is
/// back; then one does, without being asked. The first that failed ended the supervisor. Why they fail is said
/// once.
///
/// # Errors
/// What does not hold.
pub fn recovered_when_the_image_is_back(binary: &Binary, dir: &Path) -> Result<()> {
    let (image, aside) = (dir.join("image.qcow2"), dir.join("aside.qcow2"));
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let mut disk = DeviceDisk::open(binary.add(&[], &image)?)?;
    disk.run(&[Op::Write { at: 0, bytes: MARK.to_vec().into() }])?;
    let device = disk.into_device();
    let dead = device.listed()?.pid;
    fs::rename(&image, &aside)?;
    device.kill_server()?;
    let said = || device.log().unwrap_or_default().matches("recovery failed").count();
    patience::until(TOOL_LIMIT, || "no successor has failed".to_owned(), || Ok(said() > 0))?;
    thread::sleep(SEVERAL_ATTEMPTS);
    ensure!(said() == 1, "the log says it {} times: {}", said(), device.last_words());
    ensure!(device.listed()?.state != "serving", "another file is served");
    fs::rename(&aside, &image)?;
    wait_until_replaced(&device, dead)?;
    ensure!(is_supervised(device.listed()?.pid)?, "it has no supervisor");
    still_written(device)?;
    only_leaks(&image)
}

/// Kills servers that have made their device and have not written their record: they wait for whoever has the
/// record of the one before. Nothing is left if somebody waited for the server; else what is left is gone after
/// the next `add`, or `del --all`. It was left for good, and in no list.
///
/// # Errors
/// It is left.
pub fn killed_before_it_is_recorded(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let (before, number) = (existing(), free_number());
    let record = binary.file(number, "json");

    let held = hold_record(&record)?;
    let mut adding = begin_to_add(binary, number, &[], &image)?;
    let server = only_child_of(only_child_of(adding.id().cast_signed())?)?;
    kill(Pid::from_raw(server), Signal::SIGKILL)?;
    let status = wait(&mut adding, TOOL_LIMIT)?.context("`add` does not end")?;
    ensure!(!status.success(), "a server that was killed is said to serve");
    ensure!(existing() == before, "a device is left");
    drop(held);

    for remedy in ["add", "del"] {
        let held = hold_record(&record)?;
        let mut adding = begin_to_add(binary, number, &["--foreground"], &image)?;
        adding.kill()?;
        adding.wait()?;
        ensure!(existing() != before, "there is no device to be removed");
        fs::remove_file(&record)?;
        drop(held);
        if remedy == "add" {
            binary.add(&[], &image)?.detach()?;
        } else {
            binary.run(["del", "--all"])?.success()?;
        }
        ensure!(existing() == before, "a device is left after `{remedy}`");
    }
    qemu_img::check_clean(&image)
}

/// Has a record, which says nothing, locked as a server of before would that still closes its image.
fn hold_record(record: &Path) -> Result<Flock<File>> {
    Flock::lock(File::create(record)?, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno.into())
}

/// Returns when the device is there.
fn begin_to_add(binary: &Binary, number: u32, options: &[&str], image: &Path) -> Result<Child> {
    let mut command = binary.command();
    let command = command.args(["add", "-n", &number.to_string()]).args(options).arg(image);
    let adding = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let node = format!("ublkc{number}");
    patience::until(TOOL_LIMIT, || "no device".to_owned(), || Ok(existing().contains(&node)))?;
    Ok(adding)
}
