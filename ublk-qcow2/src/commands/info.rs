//! `info`: what an image says of itself. Neither its backing file nor its data file is opened.

use super::{
    CommandError,
    image::{Tool, human_size, printable},
};
use crate::{cli::OutputArgs, config};
use clap::Args;
use qcow2_engine::{
    has_protocol,
    inspect::ImageFile,
    io::{Access, files::Caching},
};
use qcow2_format::{
    CryptMethod, Header, Snapshot, Version,
    bitmap::{Bitmap, FLAG_AUTO, FLAG_IN_USE},
    extension::FeatureKind,
    header,
};
use serde_json::{Map, Value, json};
use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs,
    io::{self, Write},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// Read the image even if somebody writes to it; what is told may then not be so.
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    output: OutputArgs,
    /// The format of the image.
    #[arg(short, long, value_name = "FORMAT", default_value = "qcow2", value_parser = ["qcow2"], hide = true)]
    format: String,
    /// The image file.
    image: PathBuf,
}

/// What is told of an image.
struct Info<'a> {
    path: &'a Path,
    header: Header,
    file_len: u64,
    /// Bytes that the file occupies.
    disk_size: u64,
    snapshots: Vec<Snapshot>,
    bitmaps: Vec<Bitmap>,
}

/// Prints what the image says.
pub(crate) fn run(args: &InfoArgs) -> Result<(), CommandError> {
    let tool = Tool::new(Caching::Buffered, config::locking(args.force_share))?;
    let path = &args.image;
    let info = tool.run(async {
        let file = ImageFile::open(&tool.ring, &*tool.files, path, Access::ReadOnly).await?;
        Ok(Info {
            path,
            header: file.header().clone(),
            file_len: file.file_len(),
            disk_size: fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512),
            snapshots: file.snapshots().await?,
            bitmaps: file.bitmaps().await?,
        })
    })?;
    let text = if args.output.is_json() {
        serde_json::to_string_pretty(&info.json()).map_err(io::Error::from)? + "\n"
    } else {
        info.text()
    };
    Ok(io::stdout().lock().write_all(text.as_bytes())?)
}

impl Info<'_> {
    fn is_set(&self, bit: u64) -> bool {
        self.header.incompatible & bit != 0
    }

    fn backing_name(&self) -> Option<String> {
        self.header.backing_file.as_deref().map(printable)
    }

    /// The backing file's name as this image's directory makes it. A name with a protocol is no path.
    fn full_backing_name(&self) -> Option<String> {
        let name = self.header.backing_file.as_deref()?;
        let directory = match self.path.parent() {
            Some(directory) if !has_protocol(name) => directory,
            _ => Path::new(""),
        };
        Some(directory.join(OsStr::from_bytes(name)).to_string_lossy().into_owned())
    }

    fn compat(&self) -> &'static str {
        match self.header.version {
            Version::V2 => "0.10",
            Version::V3 => "1.1",
        }
    }

    fn encryption(&self) -> Option<&'static str> {
        match self.header.crypt {
            CryptMethod::None => None,
            CryptMethod::Aes => Some("aes"),
            CryptMethod::Luks => Some("luks"),
        }
    }

    /// The feature bits that are set, by kind: names from the image, or the bit's number.
    fn features(&self) -> Vec<(&'static str, Vec<String>)> {
        let kinds = [
            ("incompatible", FeatureKind::Incompatible, self.header.incompatible),
            ("compatible", FeatureKind::Compatible, self.header.compatible),
            ("autoclear", FeatureKind::Autoclear, self.header.autoclear),
        ];
        let named = |(name, kind, bits): (&'static str, FeatureKind, u64)| {
            let set = (0..64_u8).filter(|bit| bits >> bit & 1 != 0);
            let names = set.map(|bit| self.header.feature_name(kind, bit).unwrap_or(format!("bit {bit}")));
            (name, names.collect::<Vec<_>>())
        };
        kinds.map(named).into_iter().filter(|(_, names)| !names.is_empty()).collect()
    }

    fn json(&self) -> Value {
        let filename = self.path.display().to_string();
        let mut info = Map::new();
        let mut put = |name: &str, value: Value| {
            info.insert(name.into(), value);
        };
        put("virtual-size", self.header.virtual_size.into());
        put("filename", filename.clone().into());
        put("cluster-size", (1_u64 << self.header.cluster_bits).into());
        put("format", "qcow2".into());
        put("actual-size", self.disk_size.into());
        put("dirty-flag", self.is_set(header::DIRTY).into());
        put("format-specific", json!({ "type": "qcow2", "data": self.format_specific() }));
        if let Some(name) = self.backing_name() {
            put("backing-filename", name.into());
            put("full-backing-filename", self.full_backing_name().into());
        }
        if let Some(format) = &self.header.backing_format {
            put("backing-filename-format", format.clone().into());
        }
        if self.encryption().is_some() {
            put("encrypted", true.into());
        }
        if !self.snapshots.is_empty() {
            put("snapshots", self.snapshots.iter().map(snapshot_json).collect());
        }
        let features: Map<_, _> =
            self.features().into_iter().map(|(kind, names)| (kind.to_owned(), names.into())).collect();
        put("features", features.into());
        let file = json!({
            "filename": filename, "format": "file", "virtual-size": self.file_len,
            "actual-size": self.disk_size, "dirty-flag": false, "children": [],
            "format-specific": { "type": "file", "data": {} },
        });
        put("children", json!([{ "name": "file", "info": file }]));
        info.into()
    }

    fn format_specific(&self) -> Value {
        let mut data = Map::new();
        data.insert("compat".into(), self.compat().into());
        data.insert("compression-type".into(), self.header.compression.to_string().into());
        data.insert("refcount-bits".into(), (1_u64 << self.header.refcount_order).into());
        if self.header.version == Version::V3 {
            let lazy = self.header.compatible & header::LAZY_REFCOUNTS != 0;
            data.insert("lazy-refcounts".into(), lazy.into());
            data.insert("corrupt".into(), self.is_set(header::CORRUPT).into());
            data.insert("extended-l2".into(), self.is_set(header::EXTENDED_L2).into());
        }
        if self.is_set(header::EXTERNAL_DATA) {
            data.insert("data-file".into(), self.header.data_file.as_deref().map(printable).into());
            let raw = self.header.autoclear & header::RAW_EXTERNAL != 0;
            data.insert("data-file-raw".into(), raw.into());
        }
        if let Some(format) = self.encryption() {
            data.insert("encrypt".into(), json!({ "format": format }));
        }
        if !self.bitmaps.is_empty() {
            let bitmaps = self.bitmaps.iter().map(|bitmap| {
                json!({
                    "name": printable(&bitmap.name), "granularity": granularity(bitmap),
                    "flags": bitmap_flags(bitmap),
                })
            });
            data.insert("bitmaps".into(), bitmaps.collect());
        }
        data.into()
    }

    fn text(&self) -> String {
        let size = self.header.virtual_size;
        let mut text = String::new();
        let mut line = |args: std::fmt::Arguments<'_>| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{args}");
        };
        line(format_args!("image: {}", self.path.display()));
        line(format_args!("file format: qcow2"));
        line(format_args!("virtual size: {} ({size} bytes)", human_size(size)));
        line(format_args!("disk size: {}", human_size(self.disk_size)));
        if self.encryption().is_some() {
            line(format_args!("encrypted: yes"));
        }
        line(format_args!("cluster_size: {}", 1_u64 << self.header.cluster_bits));
        if self.is_set(header::DIRTY) {
            line(format_args!("cleanly shut down: no"));
        }
        if let (Some(name), Some(full)) = (self.backing_name(), self.full_backing_name()) {
            let path = if name == full {
                String::new()
            } else {
                format!(" (actual path: {})", printable(full.as_bytes()))
            };
            line(format_args!("backing file: {name}{path}"));
        }
        if let Some(format) = &self.header.backing_format {
            line(format_args!("backing file format: {}", printable(format.as_bytes())));
        }
        if !self.snapshots.is_empty() {
            line(format_args!("Snapshot list:"));
            line(format_args!(
                "{:<7} {:<16} {:>8} {:>20} {:>16} {:>10}",
                "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
            ));
            self.snapshots.iter().for_each(|snapshot| line(format_args!("{}", snapshot_line(snapshot))));
        }
        line(format_args!("Format specific information:"));
        for (name, value) in self.specific_lines() {
            line(format_args!("    {name}: {value}"));
        }
        for (kind, names) in self.features() {
            line(format_args!("    {kind} features: {}", names.join(", ")));
        }
        line(format_args!("Child node '/file':"));
        line(format_args!("    filename: {}", self.path.display()));
        line(format_args!("    protocol type: file"));
        line(format_args!("    file length: {} ({} bytes)", human_size(self.file_len), self.file_len));
        line(format_args!("    disk size: {}", human_size(self.disk_size)));
        text
    }

    /// The format-specific part, in QEMU's words and order.
    fn specific_lines(&self) -> Vec<(String, String)> {
        let mut lines = vec![
            ("compat".to_owned(), self.compat().to_owned()),
            ("compression type".into(), self.header.compression.to_string()),
        ];
        let v3 = self.header.version == Version::V3;
        if v3 {
            let lazy = self.header.compatible & header::LAZY_REFCOUNTS != 0;
            lines.push(("lazy refcounts".into(), lazy.to_string()));
        }
        for (index, bitmap) in self.bitmaps.iter().enumerate() {
            let flags = bitmap_flags(bitmap).join(", ");
            let (name, granularity) = (printable(&bitmap.name), granularity(bitmap));
            lines.push((
                format!("bitmap [{index}]"),
                format!("{name}, granularity {granularity}, flags [{flags}]"),
            ));
        }
        lines.push(("refcount bits".into(), (1_u64 << self.header.refcount_order).to_string()));
        if self.is_set(header::EXTERNAL_DATA) {
            let raw = self.header.autoclear & header::RAW_EXTERNAL != 0;
            lines.push(("data file".into(), self.header.data_file.as_deref().map_or("?".into(), printable)));
            lines.push(("data file raw".into(), raw.to_string()));
        }
        if let Some(format) = self.encryption() {
            lines.push(("encryption".into(), format.into()));
        }
        if v3 {
            lines.push(("corrupt".into(), self.is_set(header::CORRUPT).to_string()));
            lines.push(("extended l2".into(), self.is_set(header::EXTENDED_L2).to_string()));
        }
        lines
    }
}

fn granularity(bitmap: &Bitmap) -> u64 {
    1 << bitmap.granularity_bits
}

fn bitmap_flags(bitmap: &Bitmap) -> Vec<&'static str> {
    let flags = [(FLAG_IN_USE, "in-use"), (FLAG_AUTO, "auto")];
    flags.into_iter().filter(|(bit, _)| bitmap.flags & bit != 0).map(|(_, name)| name).collect()
}

fn snapshot_json(snapshot: &Snapshot) -> Value {
    let mut value = json!({
        "id": printable(&snapshot.id),
        "name": printable(&snapshot.name),
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec / 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
        "vm-state-size": snapshot.vm_state_bytes,
    });
    if let Some(icount) = snapshot.icount.filter(|icount| *icount != u64::MAX) {
        value["icount"] = icount.into();
    }
    value
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
        "{:<7} {:<16} {:>8} {:>20} {clock:>16} {icount:>10}",
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
