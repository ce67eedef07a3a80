//! What an image says of itself, as `qemu-img info --output=json` has it.

use super::{FeatureBits, Info, bitmap_flags, granularity};
use crate::commands::printable;
use qcow2_format::{Snapshot, Version, header};
use serde_json::{Map, Value, json};

impl Info<'_> {
    pub(super) fn json(&self) -> Value {
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
        let features: Map<_, _> = self
            .features_beyond(FeatureBits::default())
            .into_iter()
            .map(|(kind, names)| (kind.to_owned(), names.into()))
            .collect();
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
