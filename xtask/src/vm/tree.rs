//! A file tree for the guest, gathered from host files: programs with their shared libraries, texts, links.
//!
//! Knows that /bin, /sbin, /lib and /lib64 are links into /usr, as on any current Debian. Does not know what
//! a machine needs; the callers say. A tree is written as a cpio archive, and fingerprinted without reading
//! its files.

use super::cpio::{Kind, Writer};
use crate::process::{capture, find_program, program};
use anyhow::{Context, Result, bail};
use std::{
    collections::BTreeMap,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

/// Links of the guest's root, so that programs and libraries keep the paths they have on the host.
const USR_LINKS: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

#[derive(Debug, Clone)]
enum Node {
    Directory,
    Symlink(String),
    CharDevice(u32, u32),
    /// A host file, copied as it is.
    Host(PathBuf),
    /// A host file that is unpacked on the way: `.xz` or `.zst`.
    Compressed(PathBuf),
    Text {
        content: String,
        permissions: u32,
    },
}

/// Guest paths, without a leading slash, and what is there.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// A root directory: the /usr links and the two devices that the first process needs.
    pub(crate) fn root() -> Self {
        let mut tree = Self::default();
        for link in USR_LINKS {
            tree.nodes.insert(link.to_owned(), Node::Symlink(format!("usr/{link}")));
            tree.directory(&format!("usr/{link}"));
        }
        tree.insert("dev/console", Node::CharDevice(5, 1));
        tree.insert("dev/null", Node::CharDevice(1, 3));
        tree
    }

    pub(crate) fn directory(&mut self, path: &str) {
        self.insert(path, Node::Directory);
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) {
        self.insert(path, Node::Symlink(target.to_owned()));
    }

    pub(crate) fn text(&mut self, path: &str, content: &str, permissions: u32) {
        self.insert(path, Node::Text { content: content.to_owned(), permissions });
    }

    /// The host file `source` at `path`.
    pub(crate) fn file(&mut self, path: &str, source: &Path) {
        self.insert(path, Node::Host(source.to_owned()));
    }

    /// The host file `source` at `path`, unpacked when its name says that it is compressed.
    pub(crate) fn unpacked(&mut self, path: &str, source: &Path) {
        let compressed = source.extension().is_some_and(|ext| ext == "xz" || ext == "zst");
        let source = source.to_owned();
        self.insert(path, if compressed { Node::Compressed(source) } else { Node::Host(source) });
    }

    /// The host directory `source` and everything in it at `path`.
    ///
    /// # Errors
    /// Fails when it cannot be read.
    pub(crate) fn host_directory(&mut self, path: &str, source: &Path) -> Result<()> {
        self.directory(path);
        for entry in fs::read_dir(source).with_context(|| format!("cannot read {}", source.display()))? {
            let entry = entry?;
            let inner = format!("{path}/{}", entry.file_name().to_string_lossy());
            let host = entry.path();
            if host.is_dir() { self.host_directory(&inner, &host)? } else { self.file(&inner, &host) }
        }
        Ok(())
    }

    /// Programs of the host under their own paths, with their libraries. Those not installed are returned.
    ///
    /// # Errors
    /// Fails when their libraries cannot be found out.
    pub(crate) fn host_programs<'a>(&mut self, names: &[&'a str]) -> Result<Vec<&'a str>> {
        let mut absent = Vec::new();
        let mut found = Vec::new();
        for name in names {
            match find_program(name) {
                Some(path) => {
                    self.file(&path.to_string_lossy(), &path);
                    found.push(path);
                }
                None => absent.push(*name),
            }
        }
        self.libraries_of(&found)?;
        Ok(absent)
    }

    /// Adds the shared libraries of `programs`; scripts and static programs have none.
    ///
    /// # Errors
    /// Fails when a library is not on this host.
    pub(crate) fn libraries_of(&mut self, programs: &[PathBuf]) -> Result<()> {
        let elf: Vec<_> = programs.iter().filter(|path| is_elf(path)).collect();
        if elf.is_empty() {
            return Ok(());
        }
        // ldd fails when one of several programs is static, and still lists the others.
        let mut ldd = program("ldd")?;
        ldd.args(elf).env_remove("LD_LIBRARY_PATH").env("LC_ALL", "C");
        let listed = crate::process::output(&mut ldd)?;
        for line in String::from_utf8_lossy(&listed.stdout).lines() {
            if line.contains("=> not found") {
                bail!("a program for the machine lacks a library:{line}");
            }
            if let Some(library) = library_in(line) {
                self.file(library, Path::new(library));
            }
        }
        Ok(())
    }

    pub(crate) fn contains(&self, path: &str) -> bool {
        self.nodes.contains_key(&guest_path(path))
    }

    /// A number that changes whenever the archive would: over paths, sizes and modification times.
    ///
    /// # Errors
    /// Fails when a host file cannot be examined.
    pub(crate) fn fingerprint(&self) -> Result<u64> {
        let mut hasher = DefaultHasher::new();
        for (path, node) in &self.nodes {
            path.hash(&mut hasher);
            match node {
                Node::Directory => 0_u8.hash(&mut hasher),
                Node::Symlink(target) => target.hash(&mut hasher),
                Node::CharDevice(major, minor) => (major, minor).hash(&mut hasher),
                Node::Text { content, permissions } => (content, permissions).hash(&mut hasher),
                Node::Host(source) | Node::Compressed(source) => {
                    let meta = examine(source)?;
                    (source, meta.len(), meta.mtime(), meta.mtime_nsec(), meta.mode()).hash(&mut hasher);
                }
            }
        }
        Ok(hasher.finish())
    }

    /// Writes the tree as a cpio archive; parents come before what they hold.
    ///
    /// # Errors
    /// Fails when a host file cannot be read or `out` cannot be written.
    pub(crate) fn write_cpio(&self, out: impl Write) -> Result<()> {
        let mut writer = Writer::new(out);
        for (path, node) in &self.nodes {
            match node {
                Node::Directory => writer.entry(path, Kind::Directory, 0o755, &[])?,
                Node::Symlink(target) => writer.entry(path, Kind::Symlink, 0o777, target.as_bytes())?,
                Node::CharDevice(major, minor) => {
                    writer.entry(path, Kind::CharDevice(*major, *minor), 0o666, &[])?
                }
                Node::Text { content, permissions } => {
                    writer.entry(path, Kind::Regular, *permissions, content.as_bytes())?;
                }
                Node::Host(source) => {
                    let bytes =
                        fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
                    writer.entry(
                        path,
                        Kind::Regular,
                        examine(source)?.permissions().mode() & 0o777,
                        &bytes,
                    )?;
                }
                Node::Compressed(source) => writer.entry(path, Kind::Regular, 0o644, &unpack(source)?)?,
            }
        }
        writer.finish().context("cannot finish the archive")?;
        Ok(())
    }

    /// Adds a node and the directories that lead to it. The first entry of a directory stays.
    fn insert(&mut self, path: &str, node: Node) {
        let path = guest_path(path);
        for (end, _) in path.match_indices('/') {
            self.nodes.entry(path[..end].to_owned()).or_insert(Node::Directory);
        }
        if matches!(node, Node::Directory) {
            self.nodes.entry(path).or_insert(node);
        } else {
            self.nodes.insert(path, node);
        }
    }
}

/// `/lib/x` is `usr/lib/x` in the guest: the archive must not write through its own links.
fn guest_path(path: &str) -> String {
    let path = path.trim_start_matches('/');
    let first = path.split('/').next().unwrap_or_default();
    if USR_LINKS.contains(&first) && path != first { format!("usr/{path}") } else { path.to_owned() }
}

/// The path in a line of ldd's: `libc.so.6 => /lib/libc.so.6 (0x…)` or `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn library_in(line: &str) -> Option<&str> {
    if !line.starts_with('\t') {
        return None; // `/usr/bin/program:` heads the list of each program
    }
    let named = line.split_once("=> ").map_or(line, |(_, path)| path);
    let path = named.split_whitespace().next()?;
    path.starts_with('/').then_some(path)
}

fn is_elf(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 4];
    fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
}

fn examine(path: &Path) -> Result<fs::Metadata> {
    fs::metadata(path).with_context(|| format!("cannot examine {}", path.display()))
}

fn unpack(path: &Path) -> Result<Vec<u8>> {
    let tool = if path.extension().is_some_and(|ext| ext == "xz") { "xz" } else { "zstd" };
    let mut command: Command = program(tool)?;
    let finished = crate::process::output(command.args(["-dc"]).arg(path))?;
    if !finished.status.success() {
        bail!("cannot unpack {}: {}", path.display(), crate::process::said(&finished));
    }
    Ok(finished.stdout)
}

/// The names of busybox's applets.
///
/// # Errors
/// Fails when busybox is missing.
pub(crate) fn busybox_applets() -> Result<Vec<String>> {
    Ok(capture(program("busybox")?.arg("--list"))?.lines().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_paths_go_through_usr() {
        assert_eq!(guest_path("/lib/x86_64-linux-gnu/libc.so.6"), "usr/lib/x86_64-linux-gnu/libc.so.6");
        assert_eq!(guest_path("/usr/bin/fio"), "usr/bin/fio");
        assert_eq!(guest_path("/library"), "library");
    }

    #[test]
    fn libraries_are_read_from_both_kinds_of_lines() {
        assert_eq!(library_in("\tlibm.so.6 => /lib/libm.so.6 (0x7f)"), Some("/lib/libm.so.6"));
        assert_eq!(library_in("\t/lib64/ld-linux-x86-64.so.2 (0x7f)"), Some("/lib64/ld-linux-x86-64.so.2"));
        assert_eq!(library_in("\tlinux-vdso.so.1 (0x7ffc)"), None);
        assert_eq!(library_in("/usr/bin/fio:"), None);
    }

    #[test]
    fn parents_come_first_and_fingerprints_follow_content() {
        let mut tree = Tree::root();
        tree.text("etc/deep/file", "one", 0o644);
        let paths: Vec<_> = tree.nodes.keys().map(String::as_str).collect();
        let at = |path| paths.iter().position(|p| *p == path).unwrap();
        assert!(at("etc") < at("etc/deep") && at("etc/deep") < at("etc/deep/file"));
        let before = tree.fingerprint().unwrap();
        tree.text("etc/deep/file", "two", 0o644);
        assert_ne!(before, tree.fingerprint().unwrap());
    }
}
