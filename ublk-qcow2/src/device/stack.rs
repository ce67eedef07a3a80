//! What is built on a block device.
//!
//! ```text
//! /dev/ublkb1, whose image is it, or on it ─ /dev/loop0 ─┐
//! /dev/dm-1 (LUKS) ─ /dev/dm-0 (LVM) ────────────────────┴ /dev/ublkb0p1 ─ /dev/ublkb0
//! ```
//!
//! Of partitions, and of what the kernel builds on a device and its claim, sysfs tells where that device is. A loop
//! device, and a server of ours, have theirs open like anybody else, or a file on its file system. So that it is not
//! taken from under them they are asked in turn what they are on: the kernel knows it of loop devices
//! ([`loops`]), or else sysfs, and the records of servers. They know devices by their numbers. Nothing is
//! asked of files outside /dev: the file system that they are on may be gone, and nobody answer. A file system that has
//! a number of its own (Btrfs, overlayfs) hides what it is on.

use super::loops;
use crate::{
    identity::KnownFile,
    runfile::{self, Entry, Record},
};
use rustix::fs::makedev;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Devices on devices on devices, at the most: partitions, LUKS, LVM.
pub(crate) const MAX_STACK: usize = 16;
/// Where the kernel tells of block devices.
pub(super) const BLOCK_DEVICES: &str = "/sys/class/block";
/// Where their nodes are.
const NODES: &str = "/dev";

/// Whom a device would be taken away from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum User {
    /// Who has claimed it: a file system, or what the kernel has built on it.
    Claim,
    /// This loop device.
    Loop(PathBuf),
    /// The device of ours with this number: its image is on it, or a file below that.
    Server(u32),
}

impl User {
    /// What it takes for the device to be free.
    pub(crate) fn way_out(&self) -> String {
        match self {
            Self::Claim => "unmount it".to_owned(),
            Self::Loop(node) => format!("`losetup -d {}`", node.display()),
            Self::Server(id) => format!("`ublk-qcow2 del -n {id}`"),
        }
    }
}

impl fmt::Display for User {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Claim => write!(to, "mounted or claimed otherwise"),
            Self::Loop(node) => write!(to, "what the loop device {} is on", node.display()),
            Self::Server(id) => write!(to, "what the image of {} is on", super::block_path(*id).display()),
        }
    }
}

/// A block device of a stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    /// In sysfs.
    pub(super) name: String,
    /// If it uses what it is on without a claim.
    pub(super) user: Option<User>,
}

/// Who uses a block device without a claim.
struct Opener {
    name: String,
    user: User,
    /// The block devices that its files are, or are on, by their numbers.
    on: BTreeSet<u64>,
    /// One that it has open, if it is known by its name alone.
    node: Option<PathBuf>,
}

/// The block devices of this machine.
pub(crate) struct Machine {
    /// As [`BLOCK_DEVICES`] and [`NODES`].
    devices: PathBuf,
    nodes: PathBuf,
    openers: Vec<Opener>,
}

impl Machine {
    /// As it is now, with those servers of ours that are asked for.
    pub(crate) fn look(is_asked_for: impl Fn(&Entry) -> bool) -> Self {
        let servers = runfile::load_each().unwrap_or_default().into_iter().flatten().filter(is_asked_for);
        Self::with(BLOCK_DEVICES.into(), NODES.into(), servers.map(|entry| entry.record))
    }

    fn with(devices: PathBuf, nodes: PathBuf, servers: impl Iterator<Item = Record>) -> Self {
        let mut machine = Self { devices, nodes, openers: Vec::new() };
        let servers = servers.map(|Record { id, config, files, .. }| Opener {
            name: name_of(id),
            user: User::Server(id),
            on: files.iter().map(KnownFile::block_device).collect(),
            // A version of before has not said which files they are.
            node: files.is_empty().then_some(config.image),
        });
        machine.openers = servers.chain(machine.loop_devices()).collect();
        machine
    }

    /// Those that have a file.
    fn loop_devices(&self) -> Vec<Opener> {
        let file_of = |name: &str| fs::read_to_string(self.devices.join(name).join("loop/backing_file")).ok();
        let loops: Vec<_> =
            names_in(&self.devices).filter_map(|name| Some((file_of(&name)?, name))).collect();
        let known = loops::bases(loops.iter().map(|(_, name)| self.node_of(name)));
        let opener = |(file, name): (String, String)| {
            self.loop_device(name, Path::new(file.trim_end_matches('\n')), &known)
        };
        loops.into_iter().map(opener).collect()
    }

    fn loop_device(&self, name: String, file: &Path, known: &BTreeMap<PathBuf, u64>) -> Opener {
        let this = self.node_of(&name);
        let by_name = || {
            let node = file.starts_with(&self.nodes).then(|| fs::metadata(file).ok());
            node.flatten().map(|node| node.rdev())
        };
        let base = known.get(&this).copied();
        let node = base.is_none().then(|| file.to_owned());
        Opener { name, user: User::Loop(this), on: base.or_else(by_name).into_iter().collect(), node }
    }

    /// Device `id` of ours and what is built on it, the upper ones first.
    pub(super) fn stack_on(&self, id: u32) -> Vec<Layer> {
        let mut found = Vec::new();
        self.gather(Layer { name: name_of(id), user: None }, MAX_STACK, &mut found);
        found
    }

    /// The devices of ours whose images are on device `id`.
    pub(crate) fn servers_on(&self, id: u32) -> BTreeSet<u32> {
        let users = self.stack_on(id).into_iter().filter_map(|layer| layer.user);
        users.filter_map(|user| if let User::Server(id) = user { Some(id) } else { None }).collect()
    }

    fn gather(&self, layer: Layer, depth: usize, found: &mut Vec<Layer>) {
        let directory = self.devices.join(&layer.name);
        let partitions = names_in(&directory).filter(|name| directory.join(name).join("partition").exists());
        let claimed = partitions.chain(names_in(&directory.join("holders")));
        let above = claimed.map(|name| Layer { name, user: None }).chain(self.opened(&layer.name));
        for above in above {
            if depth > 0 && !found.iter().any(|layer| layer.name == above.name) {
                self.gather(above, depth - 1, found);
            }
        }
        found.push(layer);
    }

    /// Who has a device open, or a file on its file system.
    fn opened(&self, name: &str) -> impl Iterator<Item = Layer> {
        let (node, number) = (self.node_of(name), self.number_of(name));
        self.openers.iter().filter_map(move |Opener { name, user, on, node: known }| {
            let has_it = known.as_ref() == Some(&node) || number.is_some_and(|number| on.contains(&number));
            has_it.then(|| Layer { name: name.clone(), user: Some(user.clone()) })
        })
    }

    fn number_of(&self, name: &str) -> Option<u64> {
        let text = fs::read_to_string(self.devices.join(name).join("dev")).ok()?;
        let (major, minor) = text.trim_end().split_once(':')?;
        Some(makedev(major.parse().ok()?, minor.parse().ok()?))
    }

    /// In sysfs a name has no slash.
    pub(super) fn node_of(&self, name: &str) -> PathBuf {
        self.nodes.join(name.replace('!', "/"))
    }

    /// Whether there is a block device, unless the kernel tells nothing of any: then there may be.
    pub(super) fn has(&self, name: &str) -> bool {
        self.devices.join(name).exists() || !self.devices.exists()
    }
}

pub(super) fn name_of(id: u32) -> String {
    format!("ublkb{id}")
}

fn names_in(directory: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::identity;
    use std::os::unix::fs::symlink;

    /// A machine in a directory.
    pub(crate) fn machine(directory: &Path, servers: Vec<Record>) -> Machine {
        Machine::with(directory.join("sys"), directory.join("dev"), servers.into_iter())
    }

    fn names(machine: &Machine, id: u32) -> Vec<String> {
        machine.stack_on(id).into_iter().map(|layer| layer.name).collect()
    }

    fn make(directory: &Path, device: &str) {
        fs::create_dir_all(directory.join("sys").join(device).join("holders")).unwrap();
    }

    /// The device's number.
    fn make_numbered(directory: &Path, device: &str, minor: u32) -> u64 {
        make(directory, device);
        fs::write(directory.join("sys").join(device).join("dev"), format!("259:{minor}\n")).unwrap();
        makedev(259, minor)
    }

    fn make_loop(directory: &Path, name: &str, on: &Path) {
        make(directory, name);
        let about = directory.join("sys").join(name).join("loop");
        fs::create_dir(&about).unwrap();
        fs::write(about.join("backing_file"), format!("{}\n", on.display())).unwrap();
    }

    fn record(id: u32, image: &str, files: &[KnownFile]) -> Record {
        let mut record = runfile::example();
        record.id = id;
        record.config.image = image.into();
        record.files = files.to_vec();
        record
    }

    /// Partitions, and what is built on them, lost what lay in memory for them when their disk was detached:
    /// only the disk's own pages were written back.
    #[test]
    fn all_that_is_built_on_a_disk_comes_before_what_it_is_built_on() {
        let dir = tempfile::tempdir().unwrap();
        for device in ["ublkb0/ublkb0p1", "ublkb0/ublkb0p2", "ublkb0/queue", "dm-0", "dm-1", "dm-2"] {
            make(dir.path(), device);
        }
        let sys = dir.path().join("sys");
        for partition in ["ublkb0p1", "ublkb0p2"] {
            let directory = sys.join("ublkb0").join(partition);
            fs::write(directory.join("partition"), "1").unwrap();
            symlink(directory, sys.join(partition)).unwrap();
        }
        // A file system's volume on both partitions, encrypted.
        for (below, above) in [("ublkb0p1", "dm-0"), ("ublkb0p2", "dm-0"), ("dm-0", "dm-1")] {
            symlink("anywhere", sys.join(below).join("holders").join(above)).unwrap();
        }
        let mut found = names(&machine(dir.path(), Vec::new()), 0);
        assert_eq!(found[..2], ["dm-1", "dm-0"]);
        assert_eq!(found[4], "ublkb0");
        found[2..4].sort();
        assert_eq!(found[2..4], ["ublkb0p1", "ublkb0p2"]);
    }

    /// A loop device, and a device of ours whose image was the device, had it taken from under them.
    #[test]
    fn loop_devices_and_images_are_built_on_what_they_have_open() {
        let dir = tempfile::tempdir().unwrap();
        let lower = make_numbered(dir.path(), "ublkb0", 0);
        make_numbered(dir.path(), "dm-0", 1);
        symlink("anywhere", dir.path().join("sys/ublkb0/holders/dm-0")).unwrap();
        let looped = make_numbered(dir.path(), "loop3", 2);
        // They do not answer.
        make_loop(dir.path(), "loop3", &dir.path().join("dev/dm-0"));
        make_loop(dir.path(), "loop4", Path::new("/dev/ublkb0"));
        let node = dir.path().join("dev/ublkb0").to_string_lossy().into_owned();
        let (file, disk) = (identity::example(7, 1), |number| identity::example(0, number));

        let servers = vec![
            record(1, "/nowhere/overlay", &[file.clone(), disk(looped)]),
            record(2, "/nowhere/link", &[disk(lower)]),
            record(3, &node, &[]),
            record(4, "/nowhere/else", &[file]),
        ];
        let machine = machine(dir.path(), servers);
        let found = names(&machine, 0);
        assert_eq!(found[..3], ["ublkb1", "loop3", "dm-0"]);
        assert_eq!(found[3..], ["ublkb2", "ublkb3", "ublkb0"]);
        assert_eq!(machine.servers_on(0), BTreeSet::from([1, 2, 3]));
        let user = |at: usize| machine.stack_on(0)[at].user.clone();
        assert_eq!(user(1), Some(User::Loop(dir.path().join("dev/loop3"))));
        assert_eq!((user(2), user(5)), (None, None), "the kernel has these claimed");
        assert!(machine.servers_on(1).is_empty());
    }

    /// An image on a file system on a device did not count as built on it: `del --all --force`, and who ended all servers,
    /// had the lower one go first.
    #[test]
    fn an_image_on_a_file_system_is_built_on_what_that_is_on() {
        let dir = tempfile::tempdir().unwrap();
        let lower = make_numbered(dir.path(), "ublkb0", 0);
        let upper = make_numbered(dir.path(), "ublkb1", 1);
        let on = |device| identity::example(device, 11);
        let servers = vec![
            record(1, "/mnt/image", &[on(lower)]),
            record(2, "/mnt/mnt/image", &[on(7), on(upper)]),
            record(3, "/image", &[on(7)]),
        ];
        assert_eq!(names(&machine(dir.path(), servers), 0), ["ublkb2", "ublkb1", "ublkb0"]);
    }

    /// The name of a loop device's file was removed, or meant something else here: the device that it was on was taken
    /// from under it.
    #[test]
    fn what_a_loop_device_says_counts_for_more_than_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let number = make_numbered(dir.path(), "ublkb0", 0);
        let machine = machine(dir.path(), Vec::new());
        let (this, lower) = (dir.path().join("dev/loop3"), dir.path().join("dev/ublkb0"));
        let told = |base| {
            let known = BTreeMap::from([(this.clone(), base)]);
            machine.loop_device("loop3".to_owned(), &lower, &known)
        };
        assert_eq!((told(number).on, told(number).node), (BTreeSet::from([number]), None));
        assert_eq!((told(7).on, told(7).node), (BTreeSet::from([7]), None));
        let silent = machine.loop_device("loop3".to_owned(), &lower, &BTreeMap::new());
        assert_eq!(silent.node, Some(lower));
    }

    /// A device cannot be on itself, but a record may say so.
    #[test]
    fn devices_in_a_circle_are_gone_through_once_more_at_the_most() {
        let dir = tempfile::tempdir().unwrap();
        let numbers = [0, 1].map(|minor| make_numbered(dir.path(), &format!("ublkb{minor}"), minor));
        let on = |at: usize| [identity::example(0, numbers[at])];
        let machine = machine(dir.path(), vec![record(0, "a", &on(1)), record(1, "b", &on(0))]);
        assert!(names(&machine, 0).len() <= MAX_STACK + 1);
    }

    #[test]
    fn what_the_kernel_tells_nothing_of_may_be_there() {
        let dir = tempfile::tempdir().unwrap();
        assert!(machine(dir.path(), Vec::new()).has("ublkb0"));
        make(dir.path(), "ublkb1");
        let machine = machine(dir.path(), Vec::new());
        assert!(machine.has("ublkb1") && !machine.has("ublkb0"));
    }
}
