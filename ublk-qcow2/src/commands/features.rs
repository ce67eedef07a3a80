//! `features`: what this kernel's ublk driver offers.

use super::CommandError;
use crate::control::Control;
use std::{
    fmt::Write as _,
    io::{self, Write},
};

/// The driver's feature bits, in order, each with what it is good for.
const FEATURES: [(&str, &str); 21] = [
    ("zero-copy", "requests' pages as registered buffers"),
    ("comp-in-task", "completion by task work"),
    ("need-get-data", "a write's data is fetched separately"),
    ("user-recovery", "the device survives its server"),
    ("user-recovery-reissue", "and its requests are issued again"),
    ("unprivileged", "devices without root"),
    ("ioctl-encode", "ioctl-encoded commands; needed by this program"),
    ("user-copy", "data is copied by pread and pwrite"),
    ("zoned", "zoned devices"),
    ("user-recovery-fail-io", "while there is no server, requests fail"),
    ("update-size", "resizing while in use"),
    ("auto-buf-reg", "automatic buffer registration"),
    ("quiesce", "pausing for a server's upgrade"),
    ("per-io-daemon", "a server thread per request"),
    ("buf-reg-off-daemon", "buffer registration from any thread"),
    ("batch-io", "commands in batches"),
    ("integrity", "integrity metadata"),
    ("safe-stop", "stopping only while unused"),
    ("no-part-scan", "no partition scan at start"),
    ("shmem-zero-copy", "shared memory as buffers"),
    ("io-desc-size", "descriptors of variable size"),
];

/// Prints the driver's features.
pub(crate) fn run() -> Result<(), CommandError> {
    let bits = Control::open()?.features()?;
    Ok(io::stdout().lock().write_all(table(bits).as_bytes())?)
}

fn table(bits: u64) -> String {
    let mut text = format!("features: {bits:#x}\n");
    for bit in 0..u64::BITS {
        let known = FEATURES.get(bit as usize);
        let is_set = bits >> bit & 1 != 0;
        // Writing to a string does not fail.
        let _ = match known {
            Some((name, meaning)) => {
                writeln!(text, "{bit:>2}  {:<3}  {name:<22}  {meaning}", if is_set { "yes" } else { "no" })
            }
            None if is_set => writeln!(text, "{bit:>2}  yes  (unknown)"),
            None => Ok(()),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_named_and_unknown_ones_shown() {
        let text = table(1 << 6 | 1 << 40);
        assert!(text.starts_with("features: 0x10000000040\n"), "{text}");
        assert!(text.contains(" 6  yes  ioctl-encode "), "{text}");
        assert!(text.contains(" 3  no   user-recovery "), "{text}");
        assert!(text.contains("40  yes  (unknown)"), "{text}");
    }
}
