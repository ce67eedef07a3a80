//! The words of qemu-io.

use crate::commands::printable;
use std::{fmt::Write as _, time::Duration};

/// The two lines about a finished request.
pub(super) fn outcome(verb: &str, at: u64, len: u64, took: Duration, is_terse: bool) -> String {
    let seconds = took.as_secs_f64().max(1e-9);
    let (rate, operations) = (len as f64 / seconds, 1.0 / seconds);
    if is_terse {
        return format!("{len},1,{seconds:.2},{rate:.3},{operations:.3}");
    }
    format!(
        "{verb} {len}/{len} bytes at offset {at}\n{}, 1 ops; {seconds:05.2} sec ({}/sec and {operations:.4} ops/sec)",
        size(len as f64),
        size(rate),
    )
}

/// A size with its unit and three digits after the point, unless they are zeros.
pub(super) fn size(bytes: f64) -> String {
    const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let text = format!("{value:.3}");
    format!("{} {}", text.strip_suffix(".000").unwrap_or(&text), UNITS[unit])
}

/// A hexadecimal dump, 16 bytes a line.
pub(super) fn dump(at: u64, bytes: &[u8]) -> String {
    let mut text = String::new();
    for (at, line) in (at..).step_by(16).zip(bytes.chunks(16)) {
        // Writing to a string does not fail.
        let _ = write!(text, "{at:08x}:  ");
        for byte in line {
            let _ = write!(text, "{byte:02x} ");
        }
        let shown = |&byte: &u8| if byte.is_ascii_alphanumeric() { byte } else { b'.' };
        let _ = writeln!(text, " {}", printable(&line.iter().map(shown).collect::<Vec<_>>()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_qemu_ios() {
        assert_eq!(
            outcome("read", 512, 65536, Duration::from_millis(500), false),
            "read 65536/65536 bytes at offset 512\n64 KiB, 1 ops; 00.50 sec (128 KiB/sec and 2.0000 ops/sec)"
        );
        assert_eq!(size(1000.0), "1000 bytes");
        assert_eq!(size(1_023_488.0), "999.500 KiB");
        assert_eq!(size(67_109_376.0), "64 MiB");
        assert_eq!(dump(0x64, b"\x03a 7~"), "00000064:  03 61 20 37 7e  .a.7.\n");
    }
}
