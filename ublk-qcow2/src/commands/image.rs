//! What the commands that work on an image without a device share: a ring, and how sizes are shown.

use super::CommandError;
use qcow2_engine::{
    exec::block_on,
    io::{
        Files,
        files::{Caching, Locking},
        uring::Uring,
    },
};
use std::{future::Future, sync::Arc};

/// Submission slots of a tool's ring.
const RING: u32 = 64;

/// A ring with its files.
pub(super) struct Tool {
    pub(super) files: Arc<Files>,
    pub(super) ring: Uring,
}

impl Tool {
    pub(super) fn new(caching: Caching, locking: Locking) -> Result<Self, CommandError> {
        let files = Arc::new(Files::with_locking(caching, locking));
        let ring = Uring::new(Arc::clone(&files), RING).map_err(CommandError::Ring)?;
        Ok(Self { files, ring })
    }

    /// Runs a future to its end.
    pub(super) fn run<T>(
        &self,
        future: impl Future<Output = qcow2_engine::Result<T>>,
    ) -> Result<T, CommandError> {
        Ok(block_on(&self.ring, future).map_err(CommandError::Ring)??)
    }
}

/// A size as QEMU shows it: three significant digits and a binary unit.
pub(super) fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    // What would be rounded up to 1000 is shown in the next unit.
    while unit + 1 < UNITS.len() && bytes as f64 / 1024_f64.powi(unit as i32) >= 999.5 {
        unit += 1;
    }
    let value = bytes as f64 / 1024_f64.powi(unit as i32);
    format!("{} {}", significant(value), UNITS[unit])
}

/// Three significant digits without zeros at the end; whole numbers in full.
fn significant(value: f64) -> String {
    if value >= 100.0 || value.fract() == 0.0 {
        return format!("{value:.0}");
    }
    let digits = if value >= 10.0 { 1 } else { 2 };
    let text = format!("{value:.digits$}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Bytes that come from an image, for people: neither invalid nor able to steer a terminal.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let shown = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    String::from_utf8_lossy(bytes).chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_as_qemu_shows_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.98 KiB"),
            (1024, "1 KiB"),
            (197_120, "192 KiB"),
            (1_573_376, "1.5 MiB"),
            (1_335_296, "1.27 MiB"),
            (64 << 20, "64 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
    }

    #[test]
    fn names_cannot_steer_the_terminal() {
        assert_eq!(printable(b"a\x1b[2Jb"), "a\u{fffd}[2Jb");
    }
}
