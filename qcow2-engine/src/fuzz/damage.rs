//! Damage: fields of an image set to values that mean something else there, clusters where others should be,
//! extensions that nobody wrote, files that end elsewhere.

use super::{child::REACH, corpus::Sample};
use crate::sim::rng::Rng;
use qcow2_format::{Header, Version, snapshot, word};
use std::{fmt, ops::Range};

/// One change of an image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Bytes at an offset are these.
    Bytes {
        /// Which field.
        field: String,
        /// Where.
        at: u64,
        /// What is there now.
        bytes: Vec<u8>,
    },
    /// One stretch of the file is also where another one is.
    Copy {
        /// Where it is.
        from: u64,
        /// Where it is put.
        to: u64,
        /// Bytes of it.
        len: u64,
    },
    /// Two stretches of the file have changed places.
    Swap {
        /// Where one is.
        one: u64,
        /// Where the other is.
        other: u64,
        /// Bytes of each.
        len: u64,
    },
    /// A header extension is put before the others; what it pushes out of the first cluster is lost.
    Extension {
        /// Where the header's fields end.
        at: u64,
        /// Where the first cluster does.
        end: u64,
        /// The extension.
        bytes: Vec<u8>,
    },
    /// The file ends here; what is new of it is zeros.
    Length(u64),
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes { field, at, bytes } => write!(f, "{field} at {at:#x} = {bytes:02x?}"),
            Self::Copy { from, to, len } => write!(f, "{len:#x} bytes at {from:#x} are at {to:#x}, too"),
            Self::Swap { one, other, len } => {
                write!(f, "{len:#x} bytes at {one:#x} and {other:#x} have changed places")
            }
            Self::Extension { bytes, .. } => write!(f, "header extension {bytes:02x?}"),
            Self::Length(len) => write!(f, "file of {len:#x} bytes"),
        }
    }
}

impl Damage {
    /// Does it to an image.
    pub fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Self::Bytes { at, bytes, .. } => {
                let end = (*at as usize + bytes.len()).min(image.len());
                let start = (*at as usize).min(end);
                image[start..end].copy_from_slice(&bytes[..end - start]);
            }
            Self::Copy { from, to, len } => {
                let (from, to) = (stretch(image, *from, *len), stretch(image, *to, *len));
                let len = from.len().min(to.len());
                image.copy_within(from.start..from.start + len, to.start);
            }
            Self::Swap { one, other, len } => {
                let (one, other) = (stretch(image, *one, *len), stretch(image, *other, *len));
                (0..one.len().min(other.len())).for_each(|at| image.swap(one.start + at, other.start + at));
            }
            Self::Extension { at, end, bytes } => insert(image, *at, *end, bytes),
            Self::Length(len) => image.resize(*len as usize, 0),
        }
    }
}

/// As much of a stretch as the file has.
fn stretch(image: &[u8], at: u64, len: u64) -> Range<usize> {
    let end = (at.saturating_add(len)).min(image.len() as u64) as usize;
    (at as usize).min(end)..end
}

/// Puts bytes into the header's cluster, which ends at `end`, and has the backing file's name found again.
fn insert(image: &mut [u8], at: u64, end: u64, bytes: &[u8]) {
    let area = stretch(image, at, end - at);
    let Some(moved) = area.len().checked_sub(bytes.len()) else { return };
    image.copy_within(area.start..area.start + moved, area.start + bytes.len());
    image[area.start..][..bytes.len()].copy_from_slice(bytes);
    let name = word::get(image, BACKING_FILE_OFFSET).filter(|name| *name >= at);
    if let Some(name) = name {
        word::set(image, BACKING_FILE_OFFSET, name.wrapping_add(bytes.len() as u64));
    }
}

/// File offset of the header's word on where the backing file's name is.
const BACKING_FILE_OFFSET: usize = 8;
/// Header extensions: those that are known, and one that is not.
const EXTENSIONS: [u32; 7] =
    [0, 0xe279_2aca, 0x6803_f857, 0x2385_2875, 0x0537_be77, 0x4441_5441, 0x1234_5678];
/// The longest extension that is inserted, in bytes.
const MAX_EXTENSION_BYTES: u64 = 64;
/// Clusters that a file is longer by, at the most.
const MAX_MORE_CLUSTERS: u64 = 4;

/// A field of a sound image.
#[derive(Clone, Debug)]
struct Spot {
    field: &'static str,
    at: u64,
    width: usize,
}

/// Offsets and widths of the header's fields.
const HEADER_FIELDS: [(&str, u64, usize); 18] = [
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing_file_offset", 8, 8),
    ("backing_file_size", 16, 4),
    ("cluster_bits", 20, 4),
    ("size", 24, 8),
    ("crypt_method", 32, 4),
    ("l1_size", 36, 4),
    ("l1_table_offset", 40, 8),
    ("refcount_table_offset", 48, 8),
    ("refcount_table_clusters", 56, 4),
    ("nb_snapshots", 60, 4),
    ("snapshots_offset", 64, 8),
    ("incompatible_features", 72, 8),
    ("autoclear_features", 88, 8),
    ("refcount_order", 96, 4),
    ("header_length", 100, 4),
    ("compression_type", 104, 1),
];

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Mostly "copied", which allows a write in place.
const FLAGS: [u64; 7] = [1 << 63, 1 << 63, 1 << 63, 0, 1 << 62, 1, 1 << 63 | 1];

/// What is known of a sample: its fields by kind, and places worth pointing at.
pub struct Anatomy {
    kinds: Vec<Vec<Spot>>,
    /// L2 entries of clusters that most requests are for.
    busy: Vec<Spot>,
    places: Vec<u64>,
    /// Where header extensions begin, if the version has any.
    extensions: Option<u64>,
    cluster: u64,
    len: u64,
}

/// A sound image, read word by word.
struct Body<'a> {
    image: &'a [u8],
    len: u64,
}

impl Body<'_> {
    fn word(&self, at: u64) -> u64 {
        word::get(self.image, at as usize).unwrap_or(0)
    }

    /// Up to `count` words from `at` on, as far as the file goes.
    fn words(&self, field: &'static str, at: u64, count: u64) -> Vec<Spot> {
        let inside = self.len.saturating_sub(at) / 8;
        (0..count.min(inside)).map(|index| Spot { field, at: at + index * 8, width: 8 }).collect()
    }

    /// What the entries at these spots point at.
    fn targets(&self, spots: &[Spot]) -> Vec<u64> {
        let all = spots.iter().map(|spot| self.word(spot.at) & OFFSET);
        all.filter(|&at| at != 0 && at < self.len).collect()
    }

    /// Those that are in use, and a few of the others.
    fn used(&self, spots: Vec<Spot>) -> Vec<Spot> {
        let mut free = 0;
        let keep = |spot: &Spot| {
            self.word(spot.at) != 0 || {
                free += 1;
                free % 16 == 1
            }
        };
        spots.into_iter().filter(keep).collect()
    }

    /// The fields of the snapshot table and of the snapshots' L1 tables, and where these are.
    fn snapshots(&self, header: &Header, places: &mut Vec<u64>) -> Vec<Spot> {
        if header.snapshot_count == 0 {
            return Vec::new();
        }
        let at = header.snapshot_table.0;
        let mut spots = self.words("snapshot table", at, 24);
        places.push(at);
        let table = &self.image[at as usize..];
        for one in snapshot::decode_table(table, header.snapshot_count).unwrap_or_default() {
            let l1 = self.words("L1 entry of a snapshot", one.l1_table.0, one.l1_entries.into());
            places.push(one.l1_table.0);
            places.extend(self.targets(&l1).iter().take(2));
            spots.extend(self.used(l1));
        }
        spots
    }
}

impl Anatomy {
    /// Takes a sound image apart.
    ///
    /// # Errors
    /// It is not sound.
    pub fn of(sample: &Sample) -> Result<Self, String> {
        let len = sample.bytes.len() as u64;
        let header =
            Header::decode(&sample.bytes, len).map_err(|error| format!("{}: {error}", sample.name))?;
        let cluster = header.geometry().cluster_size();
        let body = Body { image: &sample.bytes, len };
        let table_words = cluster / 8;
        let tables_of = |field, spots: &[Spot]| -> Vec<Spot> {
            let tables = body.targets(spots);
            tables.into_iter().flat_map(|at| body.used(body.words(field, at, table_words))).collect()
        };
        let l1 = body.words("L1 entry", header.l1_table.0, header.l1_entries.into());
        let refcount_words = (u64::from(header.refcount_table_clusters) * table_words).min(64);
        let refcount_table = body.words("refcount table entry", header.refcount_table.0, refcount_words);
        let (l2, counts) = (tables_of("L2 entry", &l1), tables_of("refcounts", &refcount_table));
        let first_table = body.targets(&l1).first().copied().unwrap_or(len);
        let busy = body.words("L2 entry", first_table, table_words.min(REACH));
        let mut places = vec![0, header.l1_table.0, header.refcount_table.0];
        let snapshots = body.snapshots(&header, &mut places);
        let bitmaps = header.bitmaps.as_ref().map_or_else(Vec::new, |bitmaps| {
            places.push(bitmaps.directory.0);
            body.words("bitmap directory", bitmaps.directory.0, 8)
        });
        places.extend(body.targets(&l1).into_iter().chain(body.targets(&refcount_table)).take(6));
        places.extend(body.targets(&l2).iter().take(4));
        let fields = HEADER_FIELDS.iter().map(|&(field, at, width)| Spot { field, at, width }).collect();
        let area = u64::from(header.header_length);
        let extensions_at = (header.version == Version::V3).then_some(area);
        let extensions = body.words("header extensions", area, ((cluster.min(1024) - area) / 8).min(48));
        // Entries are chosen twice as often as other fields.
        let (l1_used, l2_again) = (body.used(l1.clone()), l2.clone());
        let kinds =
            [fields, extensions, l1, l1_used, l2_again, l2, refcount_table, counts, snapshots, bitmaps];
        let kinds = kinds.into_iter().filter(|kind: &Vec<Spot>| !kind.is_empty()).collect();
        Ok(Self { kinds, busy, places, extensions: extensions_at, cluster, len })
    }

    /// One to four changes.
    pub fn choose(&self, rng: &mut Rng, image: &[u8]) -> Vec<Damage> {
        if rng.below(4) == 0 && !self.busy.is_empty() {
            return vec![self.name_a_table(rng)];
        }
        let count = [1, 1, 1, 2, 2, 3, 4][rng.below(7) as usize];
        (0..count).map(|_| self.choose_one(rng, image)).collect()
    }

    /// An entry that is soon replaced names a table, which must not be freed for that.
    fn name_a_table(&self, rng: &mut Rng) -> Damage {
        let spot = &self.busy[rng.below(self.busy.len() as u64) as usize];
        let place = self.place(rng);
        // With the flag it would be written to in place.
        let flag = if rng.below(4) == 0 { 1 << 63 } else { 0 };
        Damage::Bytes { field: spot.field.into(), at: spot.at, bytes: (place | flag).to_be_bytes().to_vec() }
    }

    fn choose_one(&self, rng: &mut Rng, image: &[u8]) -> Damage {
        match rng.below(24) {
            0 => Damage::Length(rng.below(self.len)),
            1 => Damage::Length(self.place(rng)),
            2 => Damage::Length(self.len + 1 + rng.below(MAX_MORE_CLUSTERS * self.cluster)),
            3 => Damage::Copy { from: self.place(rng), to: self.table(rng), len: self.cluster },
            4 => Damage::Swap { one: self.table(rng), other: self.table(rng), len: self.cluster },
            5 => self.insert_extension(rng),
            6..=7 => {
                let at = rng.below(self.len);
                let bytes = (0..1 + rng.below(16)).map(|_| rng.draw() as u8).collect();
                Damage::Bytes { field: "bytes".into(), at, bytes }
            }
            _ => {
                let kind = &self.kinds[rng.below(self.kinds.len() as u64) as usize];
                let spot = &kind[rng.below(kind.len() as u64) as usize];
                self.at_spot(rng, image, spot)
            }
        }
    }

    fn place(&self, rng: &mut Rng) -> u64 {
        self.places[rng.below(self.places.len() as u64) as usize]
    }

    /// A place that is not the header's: without that there is little to see.
    fn table(&self, rng: &mut Rng) -> u64 {
        self.place(rng).max(self.cluster)
    }

    fn insert_extension(&self, rng: &mut Rng) -> Damage {
        let Some(at) = self.extensions else { return Damage::Length(self.len + self.cluster) };
        let kind = EXTENSIONS[rng.below(EXTENSIONS.len() as u64) as usize];
        let len = rng.below(MAX_EXTENSION_BYTES);
        let noise = rng.below(2) == 0;
        let content = (0..len).map(|_| if noise { rng.draw() as u8 } else { b'a' });
        let mut bytes = [kind.to_be_bytes(), (len as u32).to_be_bytes()].concat();
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        Damage::Extension { at, end: self.cluster, bytes }
    }

    fn at_spot(&self, rng: &mut Rng, image: &[u8], spot: &Spot) -> Damage {
        let old = &image[spot.at as usize..][..spot.width];
        let value = old.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        let bits = spot.width as u64 * 8;
        let flags = FLAGS[rng.below(FLAGS.len() as u64) as usize];
        let new = match rng.below(18) {
            0 => 0,
            1 => u64::MAX,
            2 => value ^ 1 << rng.below(bits),
            3 => value.wrapping_add(1),
            4 => value.wrapping_sub(1),
            5 => value.wrapping_add(self.cluster),
            6 => self.len.next_multiple_of(self.cluster) | flags,
            7 => 1 << rng.below(bits),
            8 => rng.draw() >> rng.below(64),
            9 => (spot.at & !(self.cluster - 1)) | flags,
            10 => (value & OFFSET) | flags,
            _ => self.place(rng) | flags,
        };
        let bytes = new.to_be_bytes()[8 - spot.width..].to_vec();
        Damage::Bytes { field: spot.field.into(), at: spot.at, bytes }
    }
}
