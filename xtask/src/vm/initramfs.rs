//! The guest's root file system: busybox, the host's storage tools with their libraries, and the kernel's
//! modules.
//!
//! It depends on the kernel and the installed tools only, so it is built once and cached by a fingerprint.
//! What a single run brings along (our binary, its script) travels on a disk of its own; see `machine`.

use super::tree::{Tree, busybox_applets};
use crate::{kernel::UnpackedKernel, workspace};
use anyhow::{Context, Result, bail};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::BufWriter,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// Programs that the guest lanes cannot do without.
const NEEDED: [&str; 18] = [
    "bash",
    "fio",
    "qemu-img",
    "qemu-io",
    "qemu-nbd",
    "mkfs.xfs",
    "xfs_repair",
    "xfs_io",
    "mkfs.ext4",
    "e2fsck",
    "dumpe2fs",
    "dmsetup",
    "losetup",
    "blkdiscard",
    "lsblk",
    "blockdev",
    "sfdisk",
    "blkid",
];
/// Programs that are taken along where the host has them.
const WELCOME: [&str; 8] =
    ["xfs_db", "debugfs", "resize2fs", "wipefs", "strace", "perf", "gdbserver", "qemu-storage-daemon"];
/// fio loads its I/O engines from here on distributions that package them apart.
const FIO_ENGINES: [&str; 2] = ["/usr/lib/x86_64-linux-gnu/fio", "/usr/lib/fio"];
/// Loaded on demand by C++ and thread cancellation, so ldd does not show it.
const ON_DEMAND_LIBRARIES: [&str; 1] = ["/usr/lib/x86_64-linux-gnu/libgcc_s.so.1"];
/// Kernel modules; one that is built in has no file and is passed over.
const MODULES: [&str; 26] = [
    "ublk_drv",
    "nbd",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "ext4",
    "xfs",
    "crc32c_generic",
    "crc32c-intel",
    "configfs",
    "null_blk",
    "brd",
    "loop",
    "dm-mod",
    "dm-flakey",
    "dm-log-writes",
    "dm-snapshot",
    "dm-thin-pool",
    "dm-crypt",
    "xts",
    "mq-deadline",
    "kyber-iosched",
    "bfq",
    "vfat",
    "overlay",
    "btrfs",
];
/// Without these there is no run at all, built in or not; the guest proves the rest.
const MODULES_ALWAYS_FILES: [&str; 2] = ["ublk_drv", "virtio_blk"];

/// A root file system takes 150 MB.
const UNUSED_AFTER: Duration = Duration::from_secs(12 * 3600);

const INIT: &str = include_str!("../../guest/init.sh");

/// The cached initramfs for `kernel`, built when missing or out of date. Returns its path.
///
/// # Errors
/// Fails when a needed program or module is missing, or the cache cannot be written.
pub(crate) fn ensure(kernel: &UnpackedKernel) -> Result<PathBuf> {
    let tree = tree(kernel)?;
    let dir = workspace::cache()?.join("initramfs");
    fs::create_dir_all(&dir)?;
    let path = dir.join(format!("{}-{:016x}.cpio", kernel.release, tree.fingerprint()?));
    if let Ok(cached) = File::open(&path) {
        cached.set_modified(SystemTime::now())?; // still wanted
        return Ok(path);
    }
    let _lock = workspace::lock("initramfs")?;
    if path.exists() {
        return Ok(path);
    }
    eprintln!("building the machine's root file system for Linux {}", kernel.release);
    remove_unused(&dir)?;
    let staging = tempfile::NamedTempFile::new_in(&dir)?;
    tree.write_cpio(BufWriter::with_capacity(1 << 20, &staging))?;
    staging.persist(&path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Another clone may share the cache and use a file that is not ours; one that nobody used for long goes.
fn remove_unused(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.metadata()?.modified()?.elapsed().is_ok_and(|age| age > UNUSED_AFTER) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn tree(kernel: &UnpackedKernel) -> Result<Tree> {
    let mut tree = Tree::root();
    for dir in ["proc", "sys", "tmp", "run", "mnt", "scratch", "payload", "results", "var/tmp", "etc", "root"]
    {
        tree.directory(dir);
    }
    tree.symlink("var/run", "/run");
    tree.symlink("var/lock", "/run/lock"); // qemu-nbd insists on it
    tree.text("init", INIT, 0o755);
    tree.text(
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        0o644,
    );
    tree.text("etc/group", "root:x:0:\ndisk:x:6:\nnogroup:x:65534:\n", 0o644);
    add_programs(&mut tree)?;
    add_modules(&mut tree, kernel)?;
    Ok(tree)
}

fn add_programs(tree: &mut Tree) -> Result<()> {
    let absent = tree.host_programs(&NEEDED)?;
    if !absent.is_empty() {
        bail!("the machine needs {}; `cargo xtask setup` installs what brings them", absent.join(", "));
    }
    tree.host_programs(&WELCOME)?;
    for engines in FIO_ENGINES.map(Path::new).into_iter().filter(|dir| dir.is_dir()) {
        tree.host_directory(&engines.to_string_lossy(), engines)?;
    }
    for library in ON_DEMAND_LIBRARIES.map(Path::new).into_iter().filter(|path| path.exists()) {
        tree.file(&library.to_string_lossy(), library);
    }
    let busybox = crate::process::find_program("busybox").context("busybox is not installed")?;
    tree.file("usr/bin/busybox", &busybox);
    tree.libraries_of(&[busybox])?; // none when it is static
    for applet in busybox_applets()? {
        let taken = ["bin", "sbin"].iter().any(|dir| tree.contains(&format!("usr/{dir}/{applet}")));
        if !taken {
            tree.symlink(&format!("usr/bin/{applet}"), "busybox");
        }
    }
    Ok(())
}

/// Adds the wanted modules and what they depend on, unpacked, with a `modules.dep` of just these.
fn add_modules(tree: &mut Tree, kernel: &UnpackedKernel) -> Result<()> {
    let path = kernel.modules.join("modules.dep");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let all = ModuleDependencies::parse(&text);
    let mut wanted = BTreeSet::new();
    for name in MODULES {
        match all.by_name.get(&canonical(name)) {
            Some(file) => {
                wanted.insert(*file);
                wanted.extend(all.needs.get(file).into_iter().flatten());
            }
            None if MODULES_ALWAYS_FILES.contains(&name) => bail!("{} has no module {name}", kernel.release),
            None => {}
        }
    }
    let target = format!("usr/lib/modules/{}", kernel.release);
    let mut dep = String::new();
    for file in wanted {
        tree.unpacked(&format!("{target}/{}", plain_name(file)), &kernel.modules.join(file));
        let needs: Vec<_> = all.needs.get(file).into_iter().flatten().map(|need| plain_name(need)).collect();
        dep += &format!("{}: {}\n", plain_name(file), needs.join(" "));
    }
    tree.text(&format!("{target}/modules.dep"), &dep, 0o644);
    Ok(())
}

/// `modules.dep`, decoded: module files by name, and the files that each needs, nearest first.
struct ModuleDependencies<'a> {
    by_name: BTreeMap<String, &'a str>,
    needs: BTreeMap<&'a str, Vec<&'a str>>,
}

impl<'a> ModuleDependencies<'a> {
    fn parse(text: &'a str) -> Self {
        let mut parsed = Self { by_name: BTreeMap::new(), needs: BTreeMap::new() };
        for (file, needs) in text.lines().filter_map(|line| line.split_once(':')) {
            let base = file.rsplit('/').next().unwrap_or(file);
            let name = base.split(".ko").next().unwrap_or(base);
            parsed.by_name.insert(canonical(name), file);
            parsed.needs.insert(file, needs.split_whitespace().collect());
        }
        parsed
    }
}

/// Module names know no difference between `-` and `_`.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn plain_name(file: &str) -> &str {
    file.trim_end_matches(".xz").trim_end_matches(".zst")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_dep_is_found_by_either_spelling() {
        let parsed =
            ModuleDependencies::parse("kernel/md/dm-flakey.ko.xz: kernel/md/dm-mod.ko.xz\nkernel/a.ko:\n");
        let file = parsed.by_name[&canonical("dm-flakey")];
        assert_eq!(file, "kernel/md/dm-flakey.ko.xz");
        assert_eq!(parsed.needs[file], ["kernel/md/dm-mod.ko.xz"]);
        assert_eq!(plain_name(file), "kernel/md/dm-flakey.ko");
        assert!(parsed.needs["kernel/a.ko"].is_empty());
    }
}
