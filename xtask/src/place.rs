//! Where a device can be made: on this host, or only in the virtual machine.

use anyhow::{Context, Result};
use std::fs::OpenOptions;

const CONTROL_DEVICE: &str = "/dev/ublk-control";

/// Whether this host's own ublk driver can be used by us; the error says why not.
///
/// # Errors
/// Fails when the control device is missing or may not be opened.
pub(crate) fn host_driver() -> Result<()> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(CONTROL_DEVICE)
        .map(drop)
        .with_context(|| format!("cannot open {CONTROL_DEVICE}"))
}
