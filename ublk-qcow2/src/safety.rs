//! What a server does for its own safety, beside its mount namespace.
//!
//! A process that serves a block device can be in its own way: memory that it asks for may only be had by
//! writing dirty pages of that very device, a page of its own may have been swapped out to it, and the OOM
//! killer may look for memory in the one process that is needed to free some. A limit on the size of files,
//! meant for somebody's shell, would have the kernel kill it for a request. And while a core of it is dumped it
//! has not ended, so nobody replaces it: dumped to a file system on its own device, which waits for its
//! successor, the core would take for ever. [`prepare`] sees to these, for the supervisor and the deputy too, and
//! [`hold_program`] to code that has not been used yet. And it reads what strangers wrote: [`keep_control`] and
//! [`keep_nothing`] give up the privileges that serving does not need.
//!
//! Each of these is a precaution: where the system refuses it the log says what may follow, and the
//! device is served all the same.

#![allow(unsafe_code, reason = "advice about memory")]

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use rustix::{
    io::Errno,
    mm::{Advice, MlockAllFlags, madvise, mlockall},
    process::{DumpableBehavior, configure_io_flusher_behavior, set_dumpable_behavior},
    thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs},
};
use std::{fs, io, ops::Range, ptr, time::Duration};

/// What the OOM killer leaves alone.
const OOM_EXEMPT: &str = "-1000";
/// Where that is said.
const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// Where the kernel says what is mapped.
const MAPS: &str = "/proc/self/maps";
/// How long those who have just attached a device may have the processors for themselves: what can wait waits.
pub(crate) const LEISURE: Duration = Duration::from_secs(1);

/// Readies this process for serving: to be called while it has one thread, since threads inherit a part.
pub(crate) fn prepare() {
    if let Err(error) = configure_io_flusher_behavior(true) {
        tracing::warn!("PR_SET_IO_FLUSHER: {error}; under memory pressure the device may deadlock");
    }
    if let Err(error) = lock_memory() {
        tracing::warn!("memory is not locked: {error}; with swap space on the device it may deadlock");
    }
    if let Err(error) = setrlimit(Resource::RLIMIT_FSIZE, RLIM_INFINITY, RLIM_INFINITY) {
        tracing::warn!("the limit on the size of files stays: {error}; a write beyond it kills the server");
    }
    if let Err(error) = leave_out_of_oom() {
        tracing::warn!("{OOM_SCORE}: {error}; the OOM killer may take the server");
    }
    // Last: who is not dumped may not write to all of its files in /proc.
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!("PR_SET_DUMPABLE: {error}; a core dumped onto the device would never end");
    }
}

/// Keeps in memory whatever is touched. Buffers are mapped for the largest requests, and most are never used whole.
fn lock_memory() -> io::Result<()> {
    // With a limit in force later mappings would fail.
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).or_else(|error| {
        match getrlimit(Resource::RLIMIT_MEMLOCK) {
            Ok((RLIM_INFINITY, _)) => Ok(()),
            _ => Err(error),
        }
    })?;
    Ok(mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)?)
}

/// Keeps the program and its libraries in memory whole, also what has not been used yet: after [`prepare`], and when
/// nobody waits for it, because it takes a millisecond or two. A deputy does without: it has no code that its server
/// does not hold, and ends with that.
pub(crate) fn hold_program() {
    let held = fs::read_to_string(MAPS).and_then(|maps| program_in(&maps).try_for_each(bring_into_memory));
    if let Err(error) = held {
        tracing::warn!(
            "the program is not held in memory: {error}; with swap space on the device it may deadlock"
        );
    }
}

/// Where files are mapped for this process alone and can be read: its program, not what it shares with the driver or
/// with its successor.
fn program_in(maps: &str) -> impl Iterator<Item = Range<usize>> {
    maps.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (begin, end) = words.next()?.split_once('-')?;
        let is_private = words.next().is_some_and(|rights| rights.starts_with('r') && rights.ends_with('p'));
        let is_file = words.nth(3).is_some_and(|path| path.starts_with('/'));
        let address = |digits| usize::from_str_radix(digits, 16).ok();
        (is_private && is_file).then_some(address(begin)?..address(end)?)
    })
}

fn bring_into_memory(range: Range<usize>) -> io::Result<()> {
    let start = ptr::with_exposed_provenance_mut(range.start);
    // SAFETY: no byte in memory becomes another one, whatever is there.
    Ok(unsafe { madvise(start, range.len(), Advice::LinuxPopulateRead) }?)
}

/// Asks the OOM killer to look elsewhere, unless somebody has given it another order.
fn leave_out_of_oom() -> io::Result<()> {
    match fs::read_to_string(OOM_SCORE)?.trim() {
        "0" => fs::write(OOM_SCORE, OOM_EXEMPT),
        _ => Ok(()),
    }
}

/// Leaves this thread, and those that it starts, what commands to the driver take, and that they can open the
/// device for reading when its node has been given to somebody else: to write back what its users have
/// written, at the end.
pub(crate) fn keep_control() {
    reduce_to(CapabilitySet::SYS_ADMIN | CapabilitySet::DAC_READ_SEARCH);
}

/// Leaves this thread no privileges: all that it works on is open.
pub(crate) fn keep_nothing() {
    reduce_to(CapabilitySet::empty());
}

fn reduce_to(wanted: CapabilitySet) {
    if let Err(error) = try_reduce_to(wanted) {
        tracing::warn!("privileges are kept that are not needed: {error}");
    }
}

fn try_reduce_to(wanted: CapabilitySet) -> Result<(), Errno> {
    set_no_new_privs(true)?;
    let kept = capabilities(None)?.permitted & wanted;
    let inheritable = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone;
    use rustix::process::dumpable_behavior;

    /// A server that panicked dumped a core, to a file system on the very device that waited for its successor,
    /// which was to come when the core was whole.
    #[test]
    fn a_server_s_end_waits_for_no_core() {
        alone::run("safety::tests::a_server_s_end_waits_for_no_core", || {
            prepare();
            assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
            let kept = std::thread::spawn(|| {
                keep_nothing();
                dumpable_behavior().unwrap()
            });
            assert_eq!(kept.join().unwrap(), DumpableBehavior::NotDumpable, "without privileges");
        });
    }

    /// What a field of the program's mappings comes to, in bytes.
    fn of_the_program(field: &str) -> usize {
        let text = fs::read_to_string("/proc/self/smaps").unwrap();
        let ranges: Vec<_> = program_in(&text).collect();
        let mut sum = 0;
        let mut is_counted = false;
        for line in text.lines() {
            if let Some((begin, _)) = line.split_once('-')
                && let Ok(begin) = usize::from_str_radix(begin, 16)
            {
                is_counted = ranges.iter().any(|range| range.start == begin);
            } else if let (true, Some(kib)) = (is_counted, line.strip_prefix(field)) {
                sum += kib.trim_end_matches("kB").trim().parse::<usize>().unwrap() << 10;
            }
        }
        sum
    }

    #[test]
    fn the_program_is_in_memory_whole() {
        alone::run("safety::tests::the_program_is_in_memory_whole", || {
            prepare();
            let before = of_the_program("Rss:");
            hold_program();
            let size = of_the_program("Size:");
            assert!(before < size && size > 1 << 20, "{before} of {size}");
            assert_eq!(of_the_program("Rss:"), size);
        });
    }

    #[test]
    fn what_others_share_is_no_part_of_the_program() {
        const MAPS: &str = "\
            1000-3000 r--p 00000000 00:02 77     /usr/bin/a program\n\
            3000-4000 r-xp 00002000 00:02 77     /usr/bin/a program\n\
            4000-5000 rw-p 00003000 00:02 77     /usr/bin/a program\n\
            5000-6000 rw-p 00000000 00:00 0      [heap]\n\
            6000-7000 r--s 00000000 00:05 9      /dev/ublkc0\n\
            7000-8000 ---p 00001000 00:02 78     /lib/libc.so.6\n\
            8000-9000 rw-p 00000000 00:00 0 \n\
            9000-a000 rw-s 00000000 00:17 3      /run/ublk-qcow2/0.redo\n";
        let ranges: Vec<_> = program_in(MAPS).collect();
        assert_eq!(ranges, [0x1000..0x3000, 0x3000..0x4000, 0x4000..0x5000]);
    }

    #[test]
    fn a_thread_that_gives_up_its_privileges_has_none() {
        let left = std::thread::spawn(|| {
            keep_nothing();
            capabilities(None).unwrap()
        });
        let left = left.join().unwrap();
        assert!(left.effective.is_empty() && left.permitted.is_empty() && left.inheritable.is_empty());
    }
}
