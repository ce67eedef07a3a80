//! Devices that have no server for a while, or no record, and what comes to them meanwhile.
//!
//! Others may want the image of a device that is about to be recovered; a device may have been made by a
//! server that did not live to write its record.

use crate::{
    command::TOOL_LIMIT,
    device::{Binary, Device},
    lifecycle::{still_written, without_writers, written_unsupervised},
    patience, qemu_img,
    recovery::wait_until_replaced,
    refusals::refuse,
};
use anyhow::{Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{fs, path::Path, process::Stdio};

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
    has_begun(&device, dead)?;
    kill(successor, Signal::SIGSTOP)?;
    drop(reader);
    let refused = refuse(binary, &["add".as_ref(), image.as_os_str()], &["is served as"]);
    kill(successor, Signal::SIGCONT)?;
    refused?;
    wait_until_replaced(&device, dead)?;
    still_written(device)?;
    ensure!(recovering.wait()?.success(), "the successor has not ended well");
    Ok(())
}

/// A successor waits for the image.
fn has_begun(device: &Device, dead: i32) -> Result<()> {
    let record = format!("/run/ublk-qcow2/{}.json", device.id());
    let begun = || {
        Ok(device.listed()?.pid != dead && fs::read_to_string(&record)?.contains(r#""phase":"preparing""#))
    };
    patience::until(TOOL_LIMIT, || "the successor has not come that far".to_owned(), begun)
}
