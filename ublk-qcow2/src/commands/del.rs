//! `del`: detach devices.
//!
//! A device whose server lives is detached by that server: it is asked to stop, and this command waits until
//! the image is closed, the device is gone and so are the processes that had to do with it, which hold the
//! image's file system. Where the server has died, the one that its supervisor puts in its place is asked;
//! where there is none, the device is stopped and deleted from here, and what that server had acknowledged is
//! written to the image. Who has the lock of the run file does it: another `del` may be at work. Nothing
//! else's devices are touched, unless named by `-n`: then the kernel writes back before, if somebody serves
//! them. A device that is mounted, or claimed in another way, is not taken from under its user without
//! `--force`.

use super::{CommandError, complain};
use crate::{
    cli::DelArgs,
    control::Control,
    crew::FORCING_SENT,
    daemon::{self, ServeError, Settled},
    device, orphans,
    processes::Process,
    runfile::{self, Entry, Phase, Record, Refusal, RunFile, TakeOverError},
    wait,
};
use rustix::process::Signal;
use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// How long a server may take to write back and close.
const STOP_WAIT: Duration = Duration::from_secs(600);
/// How long a server and its supervisor may take to end when their device is gone. One that had died early
/// may be in the supervisor's pause before the next.
const END_WAIT: Duration = Duration::from_secs(60);
/// How long a server may take to come into service, with its supervisor's longest pause (15 s) before.
const START_WAIT: Duration = Duration::from_secs(30);
/// How often to look whether it has.
const LOOK: Duration = Duration::from_millis(10);
/// Devices that are detached at the same time.
const AT_ONCE: usize = 16;
/// How long a device may be claimed by somebody who only has a look at it, as udev does.
const CLAIM_WAIT: Duration = Duration::from_secs(2);

/// Whether a device is taken from under its users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Users {
    Spared,
    Ignored,
}

/// Detaches the devices asked for.
pub(crate) fn run(args: &DelArgs) -> Result<(), CommandError> {
    let users = if args.force { Users::Ignored } else { Users::Spared };
    match args.which.id {
        Some(id) => match runfile::load(id)? {
            Some(entry) => detach(entry, users),
            None => delete_foreign(id, users),
        },
        None => detach_all(users),
    }
}

/// Goes on after a failure; returns it if it is the only one.
fn detach_all(users: Users) -> Result<(), CommandError> {
    let mut failures = for_each(runfile::load_each()?, |entry| detach(entry?, users));
    if let Err(error) = orphans::remove_all() {
        failures.push(error.into());
    }
    if failures.len() <= 1 {
        return failures.pop().map_or(Ok(()), Err);
    }
    for failure in &failures {
        complain(failure);
    }
    Err(CommandError::Several(failures.len()))
}

/// Does this to each of them, to some at a time: none waits for one that hangs. Returns what failed.
fn for_each<T: Send, E: Send>(items: Vec<T>, work: impl Fn(T) -> Result<(), E> + Sync) -> Vec<E> {
    let others = items.len().min(AT_ONCE).saturating_sub(1);
    let (left, failures) = (Mutex::new(items.into_iter()), Mutex::new(Vec::new()));
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work_on = || {
        while let Some(item) = next() {
            if let Err(error) = work(item) {
                failures.lock().unwrap_or_else(PoisonError::into_inner).push(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..others {
            // Where there is no thread left for it this takes longer.
            let _ = thread::Builder::new().spawn_scoped(scope, work_on);
        }
        work_on();
    });
    failures.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Detaches a device, until nobody is left who holds its image's file system.
fn detach(first: Entry, users: Users) -> Result<(), CommandError> {
    let id = first.record.id;
    let mut served_by = BTreeSet::new();
    take_away(first, users, &mut served_by)?;
    let deadline = Instant::now() + END_WAIT;
    for process in served_by {
        if !process.ends_by(deadline).map_err(|source| CommandError::Wait { id, pid: process.pid, source })? {
            return Err(CommandError::Lingering { id, pid: process.pid, seconds: END_WAIT.as_secs() });
        }
    }
    Ok(())
}

/// Takes a device away, whoever serves it in the meantime; tells who has.
fn take_away(first: Entry, users: Users, served_by: &mut BTreeSet<Process>) -> Result<(), CommandError> {
    let Record { id, cookie, .. } = first.record;
    let deadline = Instant::now() + STOP_WAIT;
    let (mut asked, mut since): (Option<Asked>, _) = (None, Instant::now());
    let mut entry = first;
    loop {
        let pid = entry.record.pid;
        served_by.extend(&entry.record.processes);
        if entry.serves() {
            since = Instant::now();
        }
        match (entry.is_alive, entry.record.phase) {
            _ if since.elapsed() < START_WAIT && is_about_to_serve(&entry) => {}
            (false, _) => {
                if let Cleaned::Whole = clean_up(&entry.record, users)? {
                    return Ok(());
                }
            }
            // Another `del` is at it.
            (true, Phase::Removing) => {}
            (true, _) => match asked.filter(|asked| asked.pid == pid) {
                Some(asked) => asked.check(&entry.record, users)?,
                None => {
                    check_unclaimed(id, users, "unmount it first")?;
                    if ask_to_stop(&entry.record, users)? {
                        asked = Some(Asked::of(&entry.record));
                    }
                }
            },
        }
        if Instant::now() >= deadline {
            return Err(CommandError::StillRunning { id, pid, seconds: STOP_WAIT.as_secs() });
        }
        thread::sleep(LOOK);
        entry = match runfile::load(id)? {
            // Its successor, if its server was killed before it could stop.
            Some(entry) if entry.record.cookie == cookie => entry,
            // Another device has the number already.
            _ => return Ok(()),
        };
    }
}

/// Whether a server is on its way, in a dead one's place perhaps, or a supervisor there that will start one.
/// It can have the kernel write what that has in memory for the device; without a server that would be lost.
fn is_about_to_serve(entry: &Entry) -> bool {
    let Record { phase, config, processes, error, .. } = &entry.record;
    let somebody_will = entry.is_alive || error.is_none() && processes.iter().any(|process| process.lives());
    config.recovery && *phase != Phase::Removing && !entry.serves() && somebody_will
}

/// A server that was asked to end.
#[derive(Clone, Copy)]
struct Asked {
    pid: i32,
    /// How often it had gone on before, though it was asked.
    refusals: u32,
}

impl Asked {
    fn of(record: &Record) -> Self {
        Self { pid: record.pid, refusals: record.refusal.as_ref().map_or(0, |refusal| refusal.number) }
    }

    /// Whether it has not refused since.
    fn check(self, record: &Record, users: Users) -> Result<(), CommandError> {
        match &record.refusal {
            // It may have been asked by somebody before, who did not insist.
            Some(Refusal { number, reason }) if users == Users::Spared && *number > self.refusals => {
                Err(CommandError::NotWritten { id: record.id, reason: reason.clone() })
            }
            _ => Ok(()),
        }
    }
}

/// Whether there was somebody to ask.
fn ask_to_stop(record: &Record, users: Users) -> Result<bool, CommandError> {
    // The lock says that somebody lives. For a moment the record may still be that of who has died.
    let Some(server) = record.server() else { return Ok(false) };
    let Record { id, pid, .. } = *record;
    let signal = if users == Users::Ignored { FORCING_SENT } else { Signal::TERM };
    server.send(signal).map_err(|source| CommandError::Signal { id, pid, source })
}

/// Makes sure that nobody has mounted the device or claimed it otherwise.
fn check_unclaimed(id: u32, users: Users, first: &'static str) -> Result<(), CommandError> {
    let is_taken = || users == Users::Spared && device::check_unclaimed(id).is_err();
    match wait::patiently(CLAIM_WAIT, LOOK, |is_taken| *is_taken, is_taken) {
        true => Err(CommandError::Claimed { id, first }),
        false => Ok(()),
    }
}

/// How far [`clean_up`] has come.
enum Cleaned {
    /// Nothing is left.
    Whole,
    /// Somebody else has taken the device over.
    Not,
}

/// Removes what a server has left behind that died, or failed on its way out.
fn clean_up(record: &Record, users: Users) -> Result<Cleaned, CommandError> {
    let id = record.id;
    if record.config.recovery {
        // Its users wait, and lose nothing if it is recovered. They have lost all already if it cannot be.
        check_unclaimed(id, users, "`ublk-qcow2 recover` and unmount it first")?;
    }
    let mut run_file = match RunFile::take_over(id) {
        Err(TakeOverError::Alive(_) | TakeOverError::Missing(_)) => return Ok(Cleaned::Not),
        Err(TakeOverError::OtherBoot(_)) => return Ok(Cleaned::Whole),
        taken => taken.map_err(ServeError::from)?,
    };
    if run_file.record().cookie != record.cookie {
        run_file.leave();
        return Ok(Cleaned::Not);
    }
    let removed = run_file.enter(Phase::Removing).map_err(CommandError::from).and_then(|()| remove(record));
    match (removed, &record.error) {
        (Ok(Settled::Whole), None) => Ok(Cleaned::Whole),
        (Ok(Settled::Lost(error)), None) => Err(CommandError::Unclean { id, error }),
        (Ok(_), Some(error)) => Err(CommandError::Unclean { id, error: error.clone() }),
        (Err(error), before) => {
            // For another attempt.
            match before {
                Some(before) => run_file.fail(before.clone()),
                None => run_file.leave(),
            }
            Err(error)
        }
    }
}

/// Removes the device, and writes to the image what its server has not.
fn remove(record: &Record) -> Result<Settled, CommandError> {
    device::delete_left(&mut Control::open()?, record.id, record.cookie)?;
    match record.config.recovery {
        true => Ok(daemon::settle(record)?),
        false => Ok(Settled::Whole),
    }
}

/// Detaches a device of which nothing is known. Somebody may serve it, and the kernel have something in memory
/// for it: what comes after the beginning of the stop may fail.
fn delete_foreign(id: u32, users: Users) -> Result<(), CommandError> {
    let mut control = Control::open()?;
    let info = match control.info(id) {
        Err(error) if error.errno() == Some(libc::ENODEV) => return Err(CommandError::NoDevice(id)),
        info => info?,
    };
    check_unclaimed(id, users, "unmount it first")?;
    // Where nobody answers, what the kernel has is lost, or it would wait for ever.
    if device::is_live(&info) && Process::with(info.ublksrv_pid).is_ok_and(|server| server.lives()) {
        match (device::write_back(id), users) {
            (Err(late), Users::Spared) if late.is_late() => {
                return Err(CommandError::NotWritten { id, reason: late.to_string() });
            }
            (written, Users::Spared) => written.unwrap_or_else(|error| tracing::warn!("{error}")),
            (written, Users::Ignored) => {
                written.and(device::sync_everything(id)).unwrap_or_else(|error| tracing::warn!("{error}"));
            }
        }
    }
    Ok(device::delete_orphan(&mut control, id)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::process::ExitStatusExt, process::Command, sync::mpsc};

    /// `del --all` waited ten minutes for a server that hung before it asked the next one to stop.
    #[test]
    fn devices_do_not_wait_for_each_other() {
        let (begun, other) = mpsc::channel();
        let ends = Mutex::new((Some(begun), Some(other)));
        let failed = for_each(vec![2, 1], |device| {
            let taken = ends
                .lock()
                .map(|mut ends| (ends.0.take_if(|_| device == 1), ends.1.take_if(|_| device == 2)));
            match taken.unwrap() {
                (_, Some(other)) => {
                    other.recv_timeout(Duration::from_secs(10)).map_err(|_| "the other waits")
                }
                (begun, _) => begun.unwrap().send(()).map_err(|_| "the other is through"),
            }
        });
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(for_each(vec![1; 40], Err).len(), 40);
        assert_eq!(for_each(Vec::new(), Err::<(), ()>), []);
    }

    /// A server was killed while it stopped. `del` removed the device at once, or asked the next server before
    /// it served: what the kernel had in memory for the device was lost.
    #[test]
    fn whoever_is_about_to_serve_is_waited_for() {
        let with = |is_alive, change: fn(&mut Record)| {
            let mut record = Record { processes: vec![Process::this().unwrap()], ..runfile::example() };
            record.config.recovery = true;
            change(&mut record);
            is_about_to_serve(&Entry { record, is_alive })
        };
        assert!(with(false, |_| {}), "there is a supervisor");
        assert!(with(true, |record| record.is_inherited = true), "it has taken over");
        assert!(with(true, |record| record.phase = Phase::Fetching));
        assert!(!with(true, |_| {}), "it serves");
        assert!(!with(false, |record| record.processes.clear()), "nobody is there");
        assert!(!with(false, |record| record.error = Some("failed".into())), "nobody tries again");
        assert!(!with(false, |record| record.phase = Phase::Removing));
        assert!(!with(false, |record| record.config.recovery = false), "nobody can");
    }

    /// `del` was to stop a device whose kernel had not written back in time; it heard nothing of the server's
    /// going on, or took what that had said to somebody before for an answer.
    #[test]
    fn an_answer_is_told_from_the_one_before() {
        let refused = |times: Option<u32>| {
            let refusal = times.map(|number| Refusal { number, reason: "late".to_owned() });
            Record { refusal, ..runfile::example() }
        };
        for before in [None, Some(1)] {
            let asked = Asked::of(&refused(before));
            assert!(asked.check(&refused(before), Users::Spared).is_ok());
            let later = refused(Some(before.unwrap_or(0) + 1));
            let told = asked.check(&later, Users::Spared).unwrap_err().to_string();
            assert!(told.contains("late") && told.contains("del --force -n 7"), "{told}");
            assert!(asked.check(&later, Users::Ignored).is_ok());
        }
    }

    /// A dead server's record could be locked by anybody, and its number was a stranger's by then: `del` ended
    /// that one.
    #[test]
    fn who_has_only_a_server_s_number_is_not_asked() {
        let mut stranger = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = stranger.id().cast_signed();
        let process = format!(r#"{{"pid":{pid},"start":1}}"#);
        let mut record =
            Record { pid, processes: vec![serde_json::from_str(&process).unwrap()], ..runfile::example() };
        assert!(!ask_to_stop(&record, Users::Spared).unwrap());
        record.processes.clear();
        assert!(!ask_to_stop(&record, Users::Spared).unwrap());
        stranger.kill().unwrap();
        assert_eq!(stranger.wait().unwrap().signal(), Some(Signal::KILL.as_raw()), "it was ended before");
    }
}
