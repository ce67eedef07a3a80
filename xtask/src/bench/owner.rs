//! Whose instructions a file of the counter's plugin tells of: functions by address.

use super::US;
use anyhow::{Context, Result};
use std::{collections::BTreeMap, ops::Range};

/// The kernel has the upper half of the addresses.
const KERNEL: u64 = 1 << 63;

/// Whose instructions they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owner {
    Kernel,
    Server,
    /// Of user space, and not the server's.
    Other,
}

impl Owner {
    pub(super) const ALL: [Self; 3] = [Self::Kernel, Self::Server, Self::Other];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Server => "server",
            Self::Other => "other user space",
        }
    }
}

/// A function; of what has no symbols, the file.
pub(super) type Function = (Owner, String);

/// Functions by address.
#[derive(Debug, Default)]
pub(super) struct Symbols(Vec<(u64, String)>);

impl Symbols {
    /// What nm prints and /proc/kallsyms shows: lines of an address, a letter for the kind, and the name.
    pub(super) fn parse(text: &str) -> Self {
        let function = |line: &str| {
            let mut words = line.splitn(3, ' ');
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            let is_code = matches!(words.next()?, "t" | "T" | "w" | "W");
            // Behind the names of modules' functions are those of the modules.
            is_code.then_some((address, words.next()?.replace('\t', " ")))
        };
        let mut functions: Vec<_> = text.lines().filter_map(function).collect();
        functions.sort_by_key(|(address, _)| *address);
        Self(functions)
    }

    /// The function that begins at `address`, or last before it.
    fn at(&self, address: u64) -> Option<&str> {
        let behind = self.0.partition_point(|(begin, _)| *begin <= address);
        self.0[..behind].last().map(|(_, name)| name.as_str())
    }
}

/// Code in a process's memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    range: Range<u64>,
    /// Where the file's addresses begin.
    base: u64,
    file: String,
}

/// What /proc/PID/maps shows of code, of several processes one after the other.
pub(super) fn mappings(text: &str) -> Vec<Mapping> {
    let mut found = Vec::new();
    let mut base = 0;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(rights), Some(offset)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let Some((begin, end)) = range.split_once('-') else { continue };
        let (Ok(begin), Ok(end)) = (u64::from_str_radix(begin, 16), u64::from_str_radix(end, 16)) else {
            continue;
        };
        // A file's first part has its headers, and is what its addresses count from.
        if offset.bytes().all(|digit| digit == b'0') {
            base = begin;
        }
        let path = words.nth(2).unwrap_or_default();
        // The rest is the kernel's, and the same for all processes.
        if rights.contains('x') && path.starts_with('/') {
            let file = path.rsplit('/').next().unwrap_or(path).to_owned();
            found.push(Mapping { range: begin..end, base, file });
        }
    }
    found
}

/// Gives each instruction of a file of the plugin's to a function.
///
/// # Errors
/// Fails when it is no such file.
pub(super) fn by_function(
    counts: &str,
    kernel: &Symbols,
    mappings: &[Mapping],
    server: &Symbols,
) -> Result<BTreeMap<Function, u64>> {
    let mut functions = BTreeMap::new();
    for line in counts.lines() {
        let parsed = line.split_once(' ').and_then(|(address, instructions)| {
            Some((u64::from_str_radix(address, 16).ok()?, instructions.parse::<u64>().ok()?))
        });
        let (address, instructions) =
            parsed.with_context(|| format!("`{line}` is no line of the counter's"))?;
        let function = if address >= KERNEL {
            (Owner::Kernel, kernel.at(address).unwrap_or("without a symbol").to_owned())
        } else if let Some(mapping) = mappings.iter().find(|mapping| mapping.range.contains(&address)) {
            let ours = if mapping.file == US { server.at(address - mapping.base) } else { None };
            (Owner::Server, ours.unwrap_or(&mapping.file).to_owned())
        } else {
            (Owner::Other, "fio, and what else runs".to_owned())
        };
        *functions.entry(function).or_default() += instructions;
    }
    Ok(functions)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KALLSYMS: &str = "0000000000000000 A fixed_percpu_data\n\
                            ffffffff81000000 T _text\n\
                            ffffffff81000040 t copy\n\
                            ffffffff81000080 D data\n\
                            ffffffffc0000000 t ublk_queue_rq\t[ublk_drv]\n";
    const NM: &str = "0000000000001100 t <a::B as c::D>::run\n                 U read\n\
                      0000000000001000 T main\n0000000000009000 r table\n";
    /// Two processes of one program: the second lies elsewhere.
    const MAPS: &str = "\
        55aa00000000-55aa00001000 r--p 00000000 00:02 77     /payload/bin/ublk-qcow2\n\
        55aa00001000-55aa00002000 r-xp 00000f00 00:02 77     /payload/bin/ublk-qcow2\n\
        7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n\
        7f0000001000-7f0000002000 r--p 00000000 00:02 78     /lib/libc.so.6\n\
        7f0000002000-7f0000003000 r-xp 00001000 00:02 78     /lib/libc.so.6\n\
        7fff00000000-7fff00001000 r-xp 00000000 00:00 0      [vdso]\n\
        56bb00000000-56bb00001000 r--p 00000000 00:02 77     /payload/bin/ublk-qcow2\n\
        56bb00001000-56bb00002000 r-xp 00000f00 00:02 77     /payload/bin/ublk-qcow2\n";

    fn functions(counts: &str) -> BTreeMap<Function, u64> {
        by_function(counts, &Symbols::parse(KALLSYMS), &mappings(MAPS), &Symbols::parse(NM)).unwrap()
    }

    #[test]
    fn each_instruction_has_one_owner() {
        let counts = "55aa000010ff 1\n55aa00001100 2\n56bb00001108 4\n7f0000002010 8\n7fff00000010 16\n\
                      7f0000001010 32\n400000 64\nffffffff8100003f 128\nffffffff81000090 256\n\
                      ffffffffc0000123 512\nffff800000000000 1024\n";
        let found = functions(counts);
        let of = |owner, name: &str| found.get(&(owner, name.to_owned())).copied();
        assert_eq!(of(Owner::Server, "main"), Some(1));
        assert_eq!(of(Owner::Server, "<a::B as c::D>::run"), Some(2 + 4), "in either process");
        assert_eq!(of(Owner::Server, "libc.so.6"), Some(8));
        let other = of(Owner::Other, "fio, and what else runs");
        assert_eq!(other, Some(16 + 32 + 64), "what is no code of the server's alone");
        assert_eq!(of(Owner::Kernel, "_text"), Some(128));
        assert_eq!(of(Owner::Kernel, "copy"), Some(256), "data has no instructions");
        assert_eq!(of(Owner::Kernel, "ublk_queue_rq [ublk_drv]"), Some(512));
        assert_eq!(of(Owner::Kernel, "without a symbol"), Some(1024));
        assert_eq!(found.values().sum::<u64>(), 2047, "none is lost");
        assert!(by_function("no", &Symbols::default(), &[], &Symbols::default()).is_err());
    }
}
