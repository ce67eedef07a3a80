//! What an image says of itself, for people.

use super::{FeatureBits, Info, bitmap_flags, granularity};
use crate::commands::{image::human_size, printable};
use qcow2_format::{Snapshot, Version, bitmap::Bitmap, header};

/// What the other lines tell of; of the rest nobody here knows more than the bit.
const TOLD: FeatureBits = FeatureBits {
    incompatible: header::KNOWN_INCOMPATIBLE,
    compatible: header::KNOWN_COMPATIBLE,
    autoclear: header::KNOWN_AUTOCLEAR,
};

impl Info<'_> {
    /// For people, in QEMU's words and order.
    pub(super) fn text(&self) -> String {
        let parts = [self.image_lines(), self.snapshot_lines(), self.format_lines(), self.file_lines()];
        parts.concat().iter().fold(String::new(), |text, line| text + line + "\n")
    }

    fn image_lines(&self) -> Vec<String> {
        let size = self.header.virtual_size;
        let mut lines = vec![
            format!("image: {}", self.path.display()),
            "file format: qcow2".to_owned(),
            format!("virtual size: {} ({size} bytes)", human_size(size)),
            format!("disk size: {}", human_size(self.disk_size)),
        ];
        if self.encryption().is_some() {
            lines.push("encrypted: yes".to_owned());
        }
        lines.push(format!("cluster_size: {}", 1_u64 << self.header.cluster_bits));
        if self.is_set(header::DIRTY) {
            lines.push("cleanly shut down: no".to_owned());
        }
        if let (Some(name), Some(full)) = (self.backing_name(), self.full_backing_name()) {
            let path = if name == full {
                String::new()
            } else {
                format!(" (actual path: {})", printable(full.as_bytes()))
            };
            lines.push(format!("backing file: {name}{path}"));
        }
        if let Some(format) = &self.header.backing_format {
            lines.push(format!("backing file format: {}", printable(format.as_bytes())));
        }
        lines
    }

    fn snapshot_lines(&self) -> Vec<String> {
        if self.snapshots.is_empty() {
            return Vec::new();
        }
        let head = format!(
            "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
            "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
        );
        let heads = ["Snapshot list:".to_owned(), head];
        heads.into_iter().chain(self.snapshots.iter().map(snapshot_line)).collect()
    }

    fn format_lines(&self) -> Vec<String> {
        let mut lines = vec!["Format specific information:".to_owned()];
        lines.extend(self.specific().into_iter().map(|line| format!("    {line}")));
        let unknown = self.features_beyond(TOLD).into_iter();
        lines.extend(
            unknown.map(|(kind, names)| format!("    unknown {kind} features: {}", names.join(", "))),
        );
        lines
    }

    fn file_lines(&self) -> Vec<String> {
        vec![
            "Child node '/file':".to_owned(),
            format!("    filename: {}", self.path.display()),
            "    protocol type: file".to_owned(),
            format!("    file length: {} ({} bytes)", human_size(self.file_len), self.file_len),
            format!("    disk size: {}", human_size(self.disk_size)),
        ]
    }

    /// What only this format has.
    fn specific(&self) -> Vec<String> {
        let mut lines = vec![
            format!("compat: {}", self.compat()),
            format!("compression type: {}", self.header.compression),
        ];
        let v3 = self.header.version == Version::V3;
        if v3 {
            let lazy = self.header.compatible & header::LAZY_REFCOUNTS != 0;
            lines.push(format!("lazy refcounts: {lazy}"));
        }
        if !self.bitmaps.is_empty() {
            lines.push("bitmaps:".to_owned());
            lines.extend(self.bitmaps.iter().enumerate().flat_map(bitmap_lines));
        }
        lines.push(format!("refcount bits: {}", 1_u64 << self.header.refcount_order));
        if self.is_set(header::EXTERNAL_DATA) {
            let raw = self.header.autoclear & header::RAW_EXTERNAL != 0;
            let name = self.header.data_file.as_deref().map_or("?".to_owned(), printable);
            lines.extend([format!("data file: {name}"), format!("data file raw: {raw}")]);
        }
        if let Some(format) = self.encryption() {
            lines.extend(["encrypt:".to_owned(), format!("    format: {format}")]);
        }
        if v3 {
            lines.push(format!("corrupt: {}", self.is_set(header::CORRUPT)));
            lines.push(format!("extended l2: {}", self.is_set(header::EXTENDED_L2)));
        }
        lines
    }
}

fn bitmap_lines((index, bitmap): (usize, &Bitmap)) -> Vec<String> {
    let mut lines = vec![format!("    [{index}]:"), "        flags:".to_owned()];
    let flags = bitmap_flags(bitmap).into_iter().enumerate();
    lines.extend(flags.map(|(index, flag)| format!("            [{index}]: {flag}")));
    lines.push(format!("        name: {}", printable(&bitmap.name)));
    lines.push(format!("        granularity: {}", granularity(bitmap)));
    lines
}

fn snapshot_line(snapshot: &Snapshot) -> String {
    let clock = snapshot.vm_clock_nsec / 1_000_000;
    let (hours, rest) = (clock / 3_600_000, clock % 3_600_000);
    let clock = format!("{hours:04}:{:02}:{:02}.{:03}", rest / 60_000, rest % 60_000 / 1000, rest % 1000);
    let icount = snapshot
        .icount
        .filter(|icount| *icount != u64::MAX)
        .map_or(String::new(), |icount| icount.to_string());
    format!(
        "{:<7} {:<16} {:>8} {:>19} {clock:>15} {icount:>10}",
        printable(&snapshot.id),
        printable(&snapshot.name),
        human_size(snapshot.vm_state_bytes),
        date(snapshot.date_sec),
    )
}

/// Date and time, UTC.
fn date(seconds: u32) -> String {
    let (days, time) = (i64::from(seconds / 86_400), seconds % 86_400);
    // Days since 1 March of year 0, so that the leap day is the last of its year.
    let from_march = days + 719_468;
    let (era, day) = (from_march / 146_097, from_march % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", time / 3600, time / 60 % 60, time % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_664_539_200, "2022-09-30 12:00:00"),
            (u32::MAX, "2106-02-07 06:28:15"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }
}
