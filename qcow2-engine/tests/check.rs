//! `check` held against qemu-img: sound images of every kind, damaged ones, repaired ones.

#[allow(dead_code, reason = "shared by several test programs")]
#[path = "common/hooked.rs"]
mod hooked;

use hooked::{FailingDisk, Hooked};
use proptest::{prelude::*, test_runner::Config};
use qcow2_engine::{CheckOptions, CheckReport, Repair, check, exec::run_at_once as run, io::mem::MemFiles};
use qcow2_format::word;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

fn tool(name: &str, args: &[&str]) -> Output {
    Command::new(name).args(args).output().expect("qemu-utils are installed: cargo xtask setup")
}

fn tool_ok(name: &str, args: &[&str]) -> Output {
    let output = tool(name, args);
    assert!(output.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

const IMAGE: &str = "image.qcow2";

fn options(repair: Repair) -> CheckOptions {
    CheckOptions { repair, max_findings: usize::MAX }
}

fn examine(bytes: &[u8], repair: Repair) -> (CheckReport, Vec<u8>) {
    let files = MemFiles::default();
    files.put(IMAGE, bytes.to_vec());
    let report = run(check(&files, &files, Path::new(IMAGE), options(repair))).expect("checks");
    let bytes = files.get(IMAGE).expect("kept");
    (report, bytes)
}

/// The exit code that `qemu-img check` would have.
fn exit_code(report: &CheckReport) -> i32 {
    let left = &report.remaining;
    match (left.check_errors, left.corruptions, left.leaks) {
        (0, 0, 0) => 0,
        (0, 0, _) => 3,
        (0, _, _) => 2,
        _ => 1,
    }
}

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("temporary directory"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// What qemu-img says about `bytes`: exit code and JSON.
    fn qemu_check(&self, bytes: &[u8]) -> (i32, String) {
        let path = self.path("judged.qcow2");
        std::fs::write(&path, bytes).expect("copy");
        let output =
            tool("qemu-img", &["check", "-f", "qcow2", "--output=json", path.to_str().expect("UTF-8")]);
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
    }
}

/// A number in the JSON of `qemu-img check`; 0 where it is left out.
fn number(json: &str, field: &str) -> u64 {
    let at = json.find(&format!("\"{field}\": "));
    let digits = at.map(|at| &json[at + field.len() + 4..]).unwrap_or("0");
    digits.chars().take_while(char::is_ascii_digit).collect::<String>().parse().expect("a number")
}

/// Makes an image of 16 MiB with data, zeros and compressed clusters where they are possible.
fn make(scratch: &Scratch, options: &str, extras: &[&str]) -> Vec<u8> {
    let path = scratch.path(IMAGE);
    let name = path.to_str().expect("UTF-8");
    tool_ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, name, "16M"]);
    let mut io =
        vec!["-f", "qcow2", "-c", "write -P 1 0 3M", "-c", "write -P 2 9M 70k", "-c", "write -P 3 5M 512"];
    io.extend(["-c", "discard 128k 128k", "-c", "write -z 1M 64k"]);
    io.push(name);
    tool_ok("qemu-io", &io);
    if extras.contains(&"compressed") {
        tool_ok("qemu-io", &["-f", "qcow2", "-c", "write -c -P 7 12M 2M", name]);
    }
    if extras.contains(&"snapshot") {
        tool_ok("qemu-img", &["snapshot", "-c", "one", name]);
        tool_ok("qemu-io", &["-f", "qcow2", "-c", "write -P 4 64k 1M", name]);
        tool_ok("qemu-img", &["snapshot", "-c", "two", name]);
        tool_ok("qemu-io", &["-f", "qcow2", "-c", "write -P 5 8M 1M", name]);
    }
    if extras.contains(&"bitmap") {
        tool_ok("qemu-img", &["bitmap", "--add", "-g", "4096", name, "b0"]);
        tool_ok("qemu-io", &["-f", "qcow2", "-c", "write -P 6 2M 1M", name]);
    }
    std::fs::read(&path).expect("image")
}

/// Images of every kind that `qemu-img create` makes.
fn sound_images() -> Vec<(String, Vec<u8>)> {
    let scratch = Scratch::new();
    let mut images = Vec::new();
    for (options, extras) in [
        ("compat=1.1", &["compressed", "snapshot", "bitmap"][..]),
        ("compat=0.10", &["compressed", "snapshot"]),
        ("cluster_size=512", &["compressed", "snapshot"]),
        ("cluster_size=4k,refcount_bits=64", &["snapshot", "bitmap"]),
        ("cluster_size=4k,refcount_bits=1", &[]),
        ("cluster_size=4k,refcount_bits=2", &["snapshot"]),
        ("cluster_size=2M", &["compressed"]),
        ("compression_type=zstd,lazy_refcounts=on", &["compressed"]),
        ("extended_l2=on,cluster_size=16k", &["compressed", "snapshot", "bitmap"]),
        ("preallocation=metadata", &[]),
        ("preallocation=falloc,cluster_size=4k", &[]),
    ] {
        images.push((format!("{options} {extras:?}"), make(&scratch, options, extras)));
    }
    let data = scratch.path("data.raw");
    let data = data.to_str().expect("UTF-8");
    for raw in ["off", "on"] {
        let options = format!("data_file={data},data_file_raw={raw}");
        images.push((options.clone(), make(&scratch, &options, &[])));
    }
    let path = scratch.path("luks.qcow2");
    let name = path.to_str().expect("UTF-8");
    let secret = "secret,id=s,data=x";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    tool_ok("qemu-img", &["create", "-q", "--object", secret, "-f", "qcow2", "-o", options, name, "16M"]);
    images.push((options.into(), std::fs::read(&path).expect("image")));
    images
}

#[test]
fn sound_images_are_clean_and_their_numbers_are_qemus() {
    let scratch = Scratch::new();
    for (name, bytes) in sound_images() {
        let (report, after) = examine(&bytes, Repair::None);
        assert!(report.found.is_clean(), "{name}: {:?}", report.found.list.first());
        assert!(bytes == after, "{name}: a check changed the image");
        // Without its key or data file, qemu-img does not even open it.
        if name.contains("data_file") || name.contains("luks") {
            continue;
        }
        let (code, json) = scratch.qemu_check(&bytes);
        assert_eq!(code, 0, "{name}: {json}");
        let statistics = report.statistics;
        for (field, value) in [
            ("total-clusters", statistics.total_clusters),
            ("allocated-clusters", statistics.allocated_clusters),
            ("fragmented-clusters", statistics.fragmented_clusters),
            ("compressed-clusters", statistics.compressed_clusters),
            ("image-end-offset", statistics.image_end_offset),
        ] {
            assert_eq!(value, number(&json, field), "{name}: {field}");
        }
        let (report, after) = examine(&bytes, Repair::All);
        assert!(report.remaining.is_clean() && bytes == after, "{name}: a repair changed a sound image");
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    word::get(bytes, at).expect("8 bytes")
}

fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Where the tables of an image are: byte offsets of entries, the header's L1 first.
struct Anatomy {
    cluster: usize,
    l1: usize,
    reftable: usize,
    refblock: usize,
    refcount_bits: usize,
    l2: usize,
    l2_entry_bytes: usize,
}

impl Anatomy {
    fn of(bytes: &[u8]) -> Self {
        let version = bytes[7];
        let l1 = u64_at(bytes, 40) as usize;
        let reftable = u64_at(bytes, 48) as usize;
        let extended = version == 3 && u64_at(bytes, 72) & 16 != 0;
        Self {
            cluster: 1 << bytes[23],
            l1,
            reftable,
            refblock: (u64_at(bytes, reftable) & OFFSET) as usize,
            refcount_bits: if version == 3 { 1 << bytes[99] } else { 16 },
            l2: (u64_at(bytes, l1) & OFFSET) as usize,
            l2_entry_bytes: if extended { 16 } else { 8 },
        }
    }
}

#[derive(Clone, Debug)]
enum Damage {
    /// Flips bits of an entry of the first L2 table.
    L2 {
        entry: usize,
        flip: u64,
    },
    /// Sets an entry of the first L2 table to another one's cluster.
    Duplicate {
        from: usize,
        to: usize,
    },
    /// Points an L2 entry at a host cluster.
    Redirect {
        entry: usize,
        cluster: u64,
    },
    L1 {
        flip: u64,
    },
    Refcount {
        byte: usize,
        flip: u8,
    },
    RefcountTable {
        flip: u64,
    },
    /// The header's refcount table is at this cluster, or not in the file at all.
    RefcountTablePlace {
        cluster: u64,
    },
    RefcountTableClusters {
        clusters: u32,
    },
    NoRefcountBlock,
    Truncate {
        clusters: usize,
    },
    Append {
        clusters: usize,
    },
}

fn damage() -> impl Strategy<Value = Damage> {
    let bit = (0..64_u32).prop_map(|bit| 1_u64 << bit);
    let flag = prop_oneof![Just(1_u64 << 63), Just(1 << 62), Just(1)];
    let flip = prop_oneof![bit.clone(), flag];
    prop_oneof![
        4 => (0..64_usize, flip).prop_map(|(entry, flip)| Damage::L2 { entry, flip }),
        2 => (0..32_usize, 0..32_usize).prop_map(|(from, to)| Damage::Duplicate { from, to }),
        2 => (0..64_usize, 1..90_u64).prop_map(|(entry, cluster)| Damage::Redirect { entry, cluster }),
        1 => bit.clone().prop_map(|flip| Damage::L1 { flip }),
        4 => (0..128_usize, any::<u8>()).prop_map(|(byte, flip)| Damage::Refcount { byte, flip }),
        1 => bit.prop_map(|flip| Damage::RefcountTable { flip }),
        1 => Just(Damage::NoRefcountBlock),
        1 => (0..120_u64).prop_map(|cluster| Damage::RefcountTablePlace { cluster }),
        1 => (0..3_u32).prop_map(|clusters| Damage::RefcountTableClusters { clusters }),
        2 => (1..20_usize).prop_map(|clusters| Damage::Truncate { clusters }),
        1 => (1..20_usize).prop_map(|clusters| Damage::Append { clusters }),
    ]
}

fn apply(bytes: &mut Vec<u8>, anatomy: &Anatomy, damage: &Damage) {
    let xor = |bytes: &mut [u8], at: usize, flip: u64| {
        let value = u64_at(bytes, at) ^ flip;
        put_u64(bytes, at, value);
    };
    let entry_at = |entry: usize| {
        anatomy.l2 + entry % (anatomy.cluster / anatomy.l2_entry_bytes) * anatomy.l2_entry_bytes
    };
    // An earlier truncation may have taken the place away.
    let is_there = |bytes: &[u8], at: usize| at + 8 <= bytes.len();
    match *damage {
        Damage::L2 { entry, flip } if is_there(bytes, entry_at(entry)) => xor(bytes, entry_at(entry), flip),
        Damage::Duplicate { from, to }
            if is_there(bytes, entry_at(from)) && is_there(bytes, entry_at(to)) =>
        {
            let value = u64_at(bytes, entry_at(from));
            put_u64(bytes, entry_at(to), value);
        }
        Damage::Redirect { entry, cluster } if is_there(bytes, entry_at(entry)) => {
            put_u64(bytes, entry_at(entry), (1 << 63) | (cluster * anatomy.cluster as u64));
        }
        Damage::L1 { flip } => xor(bytes, anatomy.l1, flip),
        Damage::Refcount { byte, flip } if is_there(bytes, anatomy.refblock + byte) => {
            bytes[anatomy.refblock + byte] ^= flip;
        }
        Damage::RefcountTable { flip } => xor(bytes, anatomy.reftable, flip),
        Damage::RefcountTablePlace { cluster } => put_u64(bytes, 48, cluster * anatomy.cluster as u64),
        Damage::RefcountTableClusters { clusters } => bytes[56..60].copy_from_slice(&clusters.to_be_bytes()),
        Damage::NoRefcountBlock => put_u64(bytes, anatomy.reftable, 0),
        Damage::Truncate { clusters } => {
            let len = bytes.len().saturating_sub(clusters * anatomy.cluster);
            bytes.truncate(len.max(anatomy.cluster * 8).min(bytes.len()));
        }
        Damage::Append { clusters } => bytes.resize(bytes.len() + clusters * anatomy.cluster, 0x5a),
        _ => {}
    }
}

fn images() -> &'static [(String, Vec<u8>)] {
    static IMAGES: OnceLock<Vec<(String, Vec<u8>)>> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let mut images = sound_images();
        // Those that qemu-img cannot judge here, and those that only take time.
        images.retain(|(name, bytes)| {
            !name.contains("data_file") && !name.contains("luks") && bytes.len() < 24 << 20
        });
        images
    })
}

/// Damage that QEMU does not look for: then our verdict may be the worse one, never the better. It
/// takes the zero flag in version 2 and beside subclusters, and sees an overlap only where the refcount
/// does not agree.
fn is_stricter(report: &CheckReport) -> bool {
    use qcow2_engine::check::Problem;
    use qcow2_format::Corruption::{ReservedBits, ZeroFlagInVersion2};
    report.found.list.iter().any(|finding| match finding.problem {
        Problem::Entry(ZeroFlagInVersion2 { .. }) | Problem::Overlap { .. } => true,
        // Bit 0 alone, in an image with subclusters.
        Problem::Entry(ReservedBits { raw, .. }) => raw & 1 != 0 && raw & 0x3f00_0000_0000_01fe == 0,
        _ => false,
    })
}

proptest! {
    #![proptest_config(Config { cases: 64, max_shrink_iters: 100, ..Config::default() })]

    #[test]
    fn damage_is_judged_as_by_qemu_and_repaired(
        image in any::<prop::sample::Index>(),
        damages in prop::collection::vec(damage(), 1..4),
    ) {
        let (name, sound) = image.get(images());
        let anatomy = Anatomy::of(sound);
        let mut bytes = sound.clone();
        for damage in &damages {
            apply(&mut bytes, &anatomy, damage);
        }
        let files = MemFiles::default();
        files.put(IMAGE, bytes.clone());
        let scratch = Scratch::new();
        let (qemu, text) = scratch.qemu_check(&bytes);
        let Ok(found) = run(check(&files, &files, Path::new(IMAGE), options(Repair::None))) else {
            prop_assert_ne!(qemu, 0, "{}: {:?}", name, damages);
            return Ok(());
        };
        let ours = exit_code(&found);
        if ours != qemu {
            let is_explained = qemu == 1 || (is_stricter(&found) && (qemu == 0 || ours == 2));
            prop_assert!(is_explained, "{name}: {damages:?}: {ours} here, {qemu} there: {text}\n{:?}", found.found.list);
        }

        let (repaired, after) = examine(&bytes, Repair::All);
        if repaired.remaining.is_clean() {
            let (code, text) = scratch.qemu_check(&after);
            prop_assert_eq!(code, 0, "{}: {:?} after the repair: {}", name, damages, text);
            let (again, unchanged) = examine(&after, Repair::All);
            prop_assert!(again.found.is_clean() && after == unchanged);
        } else {
            use qcow2_engine::check::{Finding, Remedy};
            let is_known = |finding: &Finding| matches!(finding.remedy, Remedy::None(_));
            prop_assert!(
                repaired.remaining.list.iter().all(is_known) || !repaired.refused.is_empty(),
                "{name}: {damages:?}: not repaired and nobody said so: {:?}", repaired.remaining.list,
            );
        }
    }
}

proptest! {
    // Each case is some dozens of repairs.
    #![proptest_config(Config { cases: 20, max_shrink_iters: 50, ..Config::default() })]

    #[test]
    fn an_interrupted_repair_makes_nothing_worse(
        image in any::<prop::sample::Index>(),
        damages in prop::collection::vec(damage(), 1..4),
        all in any::<bool>(),
    ) {
        let (name, sound) = image.get(images());
        let anatomy = Anatomy::of(sound);
        let mut bytes = sound.clone();
        for damage in &damages {
            apply(&mut bytes, &anatomy, damage);
        }
        let files = MemFiles::default();
        files.put(IMAGE, bytes.clone());
        let Ok(before) = run(check(&files, &files, Path::new(IMAGE), options(Repair::None))) else { return Ok(()) };
        let options = options(if all { Repair::All } else { Repair::Leaks });
        let (goal, _) = examine(&bytes, options.repair);
        // Every write at first, then ever fewer of them: large repairs make thousands.
        for writes in (0..).map(|step: usize| step + step.pow(3) / 300) {
            let disk = failing_disk(&bytes, writes);
            let done = run(check(&disk, &disk.files, Path::new(IMAGE), options)).is_ok();
            let state = disk.files.get(IMAGE).expect("kept");
            let (now, _) = examine(&state, Repair::None);
            let (now, before) = (dangers(&now), dangers(&before));
            let new: Vec<_> = now.difference(&before).collect();
            prop_assert!(new.is_empty(), "{name}: {damages:?}: after {writes} writes {new:#x?}");
            let (end, _) = examine(&state, options.repair);
            let same = |report: &CheckReport| (report.remaining.corruptions, report.remaining.leaks);
            prop_assert!(same(&end) <= same(&goal), "{name}: {damages:?}: after {writes} writes");
            if done {
                break;
            }
        }
    }
}

/// What endangers data: clusters whose count or flags are wrong, and entries that are. Leaks do
/// not, and a flag that is missing where the count is 1 only costs a copy.
fn dangers(report: &CheckReport) -> BTreeSet<u64> {
    use qcow2_engine::check::{Problem, Severity};
    let list = report.found.list.iter().filter(|finding| finding.severity != Severity::Leak);
    list.filter_map(|finding| match finding.problem {
        Problem::CopiedFlag { is_set: false, .. } => None,
        Problem::CopiedFlag { host, .. } => Some(host),
        _ => Some(finding.at),
    })
    .collect()
}

fn failing_disk(bytes: &[u8], writes: usize) -> Hooked<FailingDisk> {
    let files = MemFiles::default();
    files.put(IMAGE, bytes.to_vec());
    Hooked::new(&files, FailingDisk::after(writes))
}

#[test]
fn leaks_are_freed_and_marks_cleared() {
    let (_, sound) = &images()[0];
    let anatomy = Anatomy::of(sound);
    let mut bytes = sound.clone();
    bytes.resize(bytes.len().next_multiple_of(anatomy.cluster) + 3 * anatomy.cluster, 0);
    assert_eq!(anatomy.refcount_bits, 16);
    let last = bytes.len() / anatomy.cluster - 1;
    for cluster in last - 2..=last {
        bytes[anatomy.refblock + 2 * cluster + 1] = 1;
    }
    // Dirty and corrupt.
    bytes[79] |= 3;
    let (report, _) = examine(&bytes, Repair::None);
    assert_eq!((report.found.leaks, report.found.corruptions), (3, 0));
    assert!(report.is_dirty && report.is_corrupt);
    let (report, after) = examine(&bytes, Repair::Leaks);
    assert_eq!((report.leaks_fixed(), report.remaining.leaks), (3, 0));
    assert_eq!(after[79] & 3, 0);
    assert_eq!(Scratch::new().qemu_check(&after).0, 0);
}

/// A small file that claims much must not cost much.
#[test]
fn tables_that_all_name_the_same_table_are_walked_once() {
    let mut bytes = vec![0; 2 << 20];
    let cluster = 512;
    bytes[..4].copy_from_slice(b"QFI\xfb");
    let mut put = |at: usize, value: u64, len: usize| {
        bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
    };
    let entries = 128 << 10;
    put(4, 2, 4);
    put(20, 9, 4);
    put(24, entries * 64 * cluster, 8);
    put(36, entries, 4);
    put(40, 4 * cluster, 8);
    put(48, cluster, 8);
    put(56, 1, 4);
    put(cluster as usize, 2 * cluster, 8);
    for entry in 0..entries {
        put((4 * cluster + 8 * entry) as usize, 3 * cluster, 8);
    }
    for entry in 0..64 {
        put((3 * cluster + 8 * entry) as usize, 4000 * cluster, 8);
    }
    let (report, _) = examine(&bytes, Repair::None);
    assert!(report.found.corruptions > 0);
    let (_, after) = examine(&bytes, Repair::All);
    assert!(after.len() < 3 << 20, "the file grew to {}", after.len());
}
