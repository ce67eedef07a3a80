//! From a line to a command.

use super::session::SECTOR;
use crate::cli::parse_size;
use std::path::PathBuf;

/// The largest request, as QEMU's.
const MAX_LEN: u64 = 2_147_483_136;
/// What is written where no pattern is given, as qemu-io.
const DEFAULT_PATTERN: u8 = 0xcd;

/// A command of the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Transfer(Transfer),
    AioFlush,
    Flush,
    Length,
    Alloc { at: u64, len: u64 },
    Info,
    Map(Map),
    Sleep { milliseconds: u64 },
    Help,
    Quit,
}

/// What is told of where the disk's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Map {
    /// Whether the image itself has it.
    Allocated,
    /// The place, whichever file of the chain it is in.
    Places,
}

/// A command that moves or changes data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Transfer {
    /// The command's name, as qemu-io gives it where the command fails.
    pub(super) name: &'static str,
    pub(super) at: u64,
    pub(super) len: u64,
    pub(super) action: Action,
    /// It is started, and the next command does not wait for it.
    pub(super) is_async: bool,
    /// Only failures are told.
    pub(super) is_quiet: bool,
    /// The figures are printed with commas only.
    pub(super) is_terse: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Read { verify: Option<Verify>, dumps: bool },
    Write { source: Source, done: Done },
    Zero { unmap: bool, done: Done },
    Discard,
}

/// When a write is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Done {
    Written,
    Durable,
}

/// What a read is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verify {
    pub(super) pattern: u8,
    /// Bytes of the request before those that are compared.
    pub(super) skip: u64,
    pub(super) len: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Pattern(u8),
    /// The file's bytes, over and over.
    File(PathBuf),
}

/// What `help` prints.
pub(super) const HELP: &str = "\
read [-Cqv] [-P pattern [-s off] [-l len]] off len -- reads, and compares with a pattern
write [-Cfqzu] [-P pattern | -s file] off len -- writes; -z zeros, -u gives their space back, -f flushes
aio_read [-Cqv] [-P pattern] off len [len..] -- starts a read
aio_write [-Cfqzu] [-P pattern] off len [len..] -- starts a write
aio_flush -- waits for what was started
discard [-Cq] off len -- discards whole clusters
flush -- makes everything durable
length -- the size of the disk
info -- about the image
map [-v] -- what is allocated in the image; -v where the data is, in which file of its chain
alloc off [len] -- how much is allocated in the image
sleep ms -- waits
quit -- ends
Offsets and lengths are bytes, with suffix K, M, G, T, or hexadecimal with 0x.
";

/// Reads a line; `None` when it is blank.
pub(super) fn command(line: &str) -> Result<Option<Command>, String> {
    let mut words = line.split_whitespace();
    let Some(name) = words.next() else { return Ok(None) };
    let words: Vec<_> = words.collect();
    let alone = |command| if words.is_empty() { Ok(command) } else { Err(bad_count(name)) };
    let command = match name {
        "read" | "r" | "readv" | "aio_read" => transfer(name, &words, Kind::Read),
        "write" | "w" | "writev" | "aio_write" => transfer(name, &words, Kind::Write),
        "discard" | "d" => transfer(name, &words, Kind::Discard),
        "aio_flush" => alone(Command::AioFlush),
        "flush" | "f" => alone(Command::Flush),
        "length" | "l" => alone(Command::Length),
        "info" | "i" => alone(Command::Info),
        "map" => match words[..] {
            [] => Ok(Command::Map(Map::Allocated)),
            ["-v"] => Ok(Command::Map(Map::Places)),
            _ => Err(bad_count(name)),
        },
        "alloc" => alloc(&words),
        "help" | "?" => Ok(Command::Help),
        "quit" | "q" => alone(Command::Quit),
        "sleep" => match words[..] {
            [text] => parse_size(text).map(|milliseconds| Command::Sleep { milliseconds }),
            _ => Err(bad_count(name)),
        },
        "open" | "close" | "reopen" => Err(format!("{name}: the image is open, and is closed at the end")),
        _ => Err(format!("command \"{name}\" not found")),
    };
    command.map(Some)
}

fn alloc(words: &[&str]) -> Result<Command, String> {
    match words {
        // As qemu-io.
        [at] => Ok(Command::Alloc { at: parse_size(at)?, len: SECTOR }),
        [at, len] => Ok(Command::Alloc { at: parse_size(at)?, len: parse_size(len)? }),
        _ => Err(bad_count("alloc")),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Discard,
}

impl Kind {
    /// The flags, and those of them that take a value.
    fn flags(self) -> (&'static str, &'static str) {
        match self {
            // -p has no meaning any more, in qemu-io neither; old scripts give it.
            Self::Read => ("CpqrvPsl", "Psl"),
            Self::Write => ("CfnpqzucPs", "Ps"),
            Self::Discard => ("Cq", ""),
        }
    }
}

/// The flags of a transfer, as they were given.
#[derive(Default)]
struct Flags<'a> {
    set: String,
    values: Vec<(char, &'a str)>,
}

impl Flags<'_> {
    fn has(&self, flag: char) -> bool {
        self.set.contains(flag)
    }

    fn value(&self, flag: char) -> Option<&str> {
        self.values.iter().rev().find(|(name, _)| *name == flag).map(|(_, value)| *value)
    }

    fn number(&self, flag: char) -> Result<Option<u64>, String> {
        self.value(flag).map(parse_size).transpose()
    }

    fn pattern(&self) -> Result<Option<u8>, String> {
        let Some(text) = self.value('P') else { return Ok(None) };
        let parsed = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
            Some(digits) => u8::from_str_radix(digits, 16),
            None => text.parse(),
        };
        parsed.map(Some).map_err(|_| format!("{text} is not a valid pattern byte"))
    }
}

fn transfer(name: &str, words: &[&str], kind: Kind) -> Result<Command, String> {
    let is_async = name.starts_with("aio_");
    let (flags, rest) = split_flags(name, words, kind)?;
    let takes_several = is_async || name.ends_with('v');
    let [at, lens @ ..] = rest else { return Err(bad_count(name)) };
    if lens.is_empty() || (lens.len() > 1 && !takes_several) {
        return Err(bad_count(name));
    }
    let mut len = 0_u64;
    for text in lens {
        len = len
            .checked_add(parse_size(text)?)
            .filter(|len| *len <= MAX_LEN || kind == Kind::Discard)
            .ok_or_else(|| format!("length cannot exceed {MAX_LEN}, given {text}"))?;
    }
    let action = match kind {
        Kind::Read => read(&flags, len)?,
        Kind::Write => write(&flags)?,
        Kind::Discard => Action::Discard,
    };
    Ok(Command::Transfer(Transfer {
        name: name_of_failure(name, kind),
        at: parse_size(at)?,
        len,
        action,
        is_async,
        is_quiet: flags.has('q'),
        is_terse: flags.has('C'),
    }))
}

fn name_of_failure(name: &str, kind: Kind) -> &'static str {
    match (name, kind) {
        ("readv" | "aio_read", _) => "readv",
        ("writev", _) => "writev",
        ("aio_write", _) => "aio_write",
        (_, Kind::Read) => "read",
        (_, Kind::Write) => "write",
        (_, Kind::Discard) => "discard",
    }
}

/// The flags at the start, as getopt reads them, and what follows.
fn split_flags<'a, 'w>(
    name: &str,
    words: &'w [&'a str],
    kind: Kind,
) -> Result<(Flags<'a>, &'w [&'a str]), String> {
    let (known, valued) = kind.flags();
    let mut flags = Flags::default();
    let mut next = 0;
    while let Some(letters) =
        words.get(next).and_then(|word| word.strip_prefix('-')).filter(|l| !l.is_empty())
    {
        next += 1;
        for (index, flag) in letters.char_indices() {
            if !known.contains(flag) {
                return Err(format!("{name}: -{flag} is not known or not supported here"));
            }
            flags.set.push(flag);
            if valued.contains(flag) {
                let attached = &letters[index + flag.len_utf8()..];
                let value = if attached.is_empty() {
                    next += 1;
                    *words.get(next - 1).ok_or_else(|| format!("{name}: -{flag} needs a value"))?
                } else {
                    attached
                };
                flags.values.push((flag, value));
                break;
            }
        }
    }
    Ok((flags, &words[next..]))
}

fn read(flags: &Flags<'_>, len: u64) -> Result<Action, String> {
    let (skip, compared) = (flags.number('s')?, flags.number('l')?);
    let verify = match flags.pattern()? {
        Some(pattern) => {
            let skip = skip.unwrap_or(0);
            let rest = len.checked_sub(skip);
            let compared = compared.or(rest).filter(|&part| rest.is_some_and(|rest| part <= rest));
            let len = compared.ok_or("pattern verification range exceeds end of read data")?;
            Some(Verify { pattern, skip, len })
        }
        None if skip.is_some() || compared.is_some() => return Err("-s and -l need -P".into()),
        None => None,
    };
    Ok(Action::Read { verify, dumps: flags.has('v') })
}

fn write(flags: &Flags<'_>) -> Result<Action, String> {
    let done = if flags.has('f') { Done::Durable } else { Done::Written };
    if flags.has('c') {
        return Err("compressed writes (-c) are not supported".into());
    }
    if flags.has('u') && !flags.has('z') {
        return Err("-u requires -z to be specified".into());
    }
    match (flags.has('z'), flags.pattern()?, flags.value('s')) {
        (true, None, None) => Ok(Action::Zero { unmap: flags.has('u'), done }),
        (false, Some(_), Some(_)) | (true, ..) => Err("only one of -z, -P and -s can be specified".into()),
        (false, None, Some(path)) => Ok(Action::Write { source: Source::File(path.into()), done }),
        (false, pattern, None) => {
            Ok(Action::Write { source: Source::Pattern(pattern.unwrap_or(DEFAULT_PATTERN)), done })
        }
    }
}

fn bad_count(name: &str) -> String {
    format!("{name}: wrong number of arguments; see help")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Transfer {
        match command(line) {
            Ok(Some(Command::Transfer(transfer))) => transfer,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn transfers_are_read_as_qemu_io_reads_them() {
        let write = parsed("write -P 0x1f -q 4k 1M");
        assert_eq!((write.at, write.len, write.is_quiet, write.is_async), (4096, 1 << 20, true, false));
        assert_eq!(write.action, Action::Write { source: Source::Pattern(0x1f), done: Done::Written });
        assert_eq!(
            parsed("w 0 1").action,
            Action::Write { source: Source::Pattern(0xcd), done: Done::Written }
        );
        assert_eq!(parsed("write -zu 0 64k").action, Action::Zero { unmap: true, done: Done::Written });
        let read = parsed("read -P255 -s 512 -l 10 0x200 1k");
        let verify = Some(Verify { pattern: 255, skip: 512, len: 10 });
        assert_eq!((read.at, read.action), (512, Action::Read { verify, dumps: false }));
        assert_eq!(parsed("read -pP 255 0 1k").action, parsed("read -P 255 0 1k").action);
        let aio = parsed("aio_write -P 7 0 512 512");
        assert_eq!((aio.len, aio.is_async), (1024, true));
        assert_eq!(command("alloc 64k"), Ok(Some(Command::Alloc { at: 65536, len: 512 })));
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "foo",
            "read",
            "read 0",
            "read 0 1 2",
            "read x 1",
            "read -P 256 0 1",
            "read -s 1 0 10",
            "read -P 1 -s 11 0 10",
            "read -P 1 -s 5 -l 6 0 10",
            "read 0 2G",
            "write -u 0 1",
            "write -z -P 1 0 1",
            "write -c 0 64k",
            "write -P",
            "flush now",
            "sleep",
            "alloc",
            "alloc 0 1 2",
            "map 1",
            "open",
        ] {
            assert!(command(line).is_err(), "{line}");
        }
        assert_eq!(command("   "), Ok(None));
    }
}
