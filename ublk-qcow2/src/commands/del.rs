//! `del`: detach devices.
//!
//! A device whose server lives is detached by that server: it is asked to stop, and this command waits until
//! the image is closed, the device is gone and so are the processes that had to do with it, which hold the
//! image's file system. Where the server has died, the one that its supervisor puts in its place is asked;
//! where there is none, the device is stopped and deleted from here, and what that server had acknowledged is
//! written to the image. Who has the lock of the run file does it: another `del` may be at work. Nothing
//! else's devices are touched, unless named by `-n`: then the kernel writes back before, if somebody serves
//! them. A device that is mounted, or claimed in another way, or on which another one is built, is not taken from
//! under its user without `--force`. Who detaches all of them begins with the upper ones.
//!
//! A systemd unit whose processes have all ended has it run as well (`--unit`), and shows what it returns: success if
//! somebody has detached the device, or does so now while its server lives; a failure if all had died.

mod order;

use super::{CommandError, complain};
use crate::{
    cli::DelArgs,
    control::Control,
    crew::FORCING_SENT,
    daemon::{self, ServeError, Settled},
    device::{self, DeviceError, Machine},
    orphans,
    processes::Process,
    runfile::{self, Entry, Phase, Record, Refusal, RunFile, TakeOverError},
    wait::{self, Bound},
};
use order::{Task, for_each};
use rustix::process::Signal;
use std::{
    collections::BTreeSet,
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
        Some(id) if args.unit => detach_own(id, users, runfile::invocation().as_deref()),
        Some(id) => match runfile::load(id)? {
            Some(entry) => detach(entry, users).map(drop),
            None => delete_foreign(id, users),
        },
        None => detach_all(users),
    }
}

/// Detaches the device that this start of a unit has made, if it is there still. The number may be another's by now.
fn detach_own(id: u32, users: Users, invocation: Option<&str>) -> Result<(), CommandError> {
    match runfile::load(id)?.filter(|entry| entry.record.is_of(invocation)) {
        None => Ok(()),
        Some(entry) => match detach(entry, users)? {
            Removed::InOrder => Ok(()),
            Removed::AfterDeath => Err(CommandError::Died(id)),
        },
    }
}

/// Goes on after a failure; returns it if it is the only one.
fn detach_all(users: Users) -> Result<(), CommandError> {
    let machine = Machine::look(Entry::needs_its_image);
    let task = |entry: Result<Entry, _>| match &entry {
        Ok(Entry { record: Record { id, .. }, .. }) => {
            Task { id: Some(*id), after: machine.servers_on(*id), item: entry }
        }
        Err(_) => Task { id: None, after: BTreeSet::new(), item: entry },
    };
    let tasks = runfile::load_each()?.into_iter().map(task).collect();
    let mut failures = for_each(tasks, |entry| detach(entry?, users).map(drop));
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

/// Who has taken a device away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Removed {
    /// Its server, or somebody else.
    InOrder,
    /// This command, because its server was dead.
    AfterDeath,
}

/// Detaches a device, until nobody is left who holds its image's file system.
fn detach(first: Entry, users: Users) -> Result<Removed, CommandError> {
    let id = first.record.id;
    let mut served_by = BTreeSet::new();
    let removed = take_away(first, users, &mut served_by)?;
    let deadline = Instant::now() + END_WAIT;
    for process in served_by {
        if !process.ends_by(deadline).map_err(|source| CommandError::Wait { id, pid: process.pid, source })? {
            return Err(CommandError::Lingering { id, pid: process.pid, seconds: END_WAIT.as_secs() });
        }
    }
    Ok(removed)
}

/// Takes a device away, whoever serves it in the meantime; tells who has.
fn take_away(first: Entry, users: Users, served_by: &mut BTreeSet<Process>) -> Result<Removed, CommandError> {
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
                    return Ok(Removed::AfterDeath);
                }
            }
            // Another `del` is at it.
            (true, Phase::Removing) => {}
            (true, _) => match asked.filter(|asked| asked.pid == pid) {
                Some(asked) => asked.check(&entry.record, users)?,
                None => {
                    check_unused(id, users, "")?;
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
            _ => return Ok(Removed::InOrder),
        };
    }
}

/// Whether a server is on its way, in a dead one's place perhaps, or a supervisor there that will start one.
/// It can have the kernel write what that has in memory for the device; without a server that would be lost.
fn is_about_to_serve(entry: &Entry) -> bool {
    let Record { phase, config, .. } = &entry.record;
    config.recovery && *phase != Phase::Removing && !entry.serves() && entry.is_looked_after()
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

/// Makes sure that nobody has mounted the device or claimed it otherwise, nor built another one on it, as far as users
/// are spared. What the user is to do about it comes after `before`.
fn check_unused(id: u32, users: Users, before: &'static str) -> Result<(), CommandError> {
    if users == Users::Ignored {
        return Ok(());
    }
    let look = || device::check_unused(id, Bound::Here);
    match wait::patiently(CLAIM_WAIT, LOOK, Result::is_err, look) {
        Ok(()) => Ok(()),
        Err(DeviceError::Used { by, .. }) => Err(CommandError::Used { id, by, before }),
        Err(unclear) => Err(CommandError::Unclear { id, source: unclear }),
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
        check_unused(id, users, "`ublk-qcow2 recover` and ")?;
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
    if record.config.recovery {
        return Ok(daemon::settle(record)?);
    }
    if !record.config.read_only {
        let image = record.config.image.display();
        tracing::warn!(
            id = record.id,
            "its server died, and it had no recovery: what was written to {image} since the last flush may be lost, \
             and clusters may be leaked until it is attached again"
        );
    }
    Ok(Settled::Whole)
}

/// Detaches a device of which nothing is known. Somebody may serve it, and the kernel have something in memory
/// for it: what comes after the beginning of the stop may fail.
fn delete_foreign(id: u32, users: Users) -> Result<(), CommandError> {
    let mut control = Control::open()?;
    let info = match control.info(id) {
        Err(error) if error.errno() == Some(libc::ENODEV) => return Err(CommandError::NoDevice(id)),
        info => info?,
    };
    check_unused(id, users, "")?;
    // Where nobody answers, what the kernel has is lost, or it would wait for ever.
    let is_served =
        device::is_live(&info) && Process::with(info.ublksrv_pid).is_ok_and(|server| server.lives());
    let written = if is_served { write_foreign_back(id, users)? } else { Ok(()) };
    device::delete_orphan(&mut control, id)?;
    written.map_err(|source| CommandError::Unwritten { id, source })
}

/// Has the kernel write back what it has in memory for a device of which nothing is known. The inner result is for
/// when the device has gone all the same.
fn write_foreign_back(id: u32, users: Users) -> Result<Result<(), DeviceError>, CommandError> {
    match (device::write_back(id, Bound::Here), users) {
        (Err(error), Users::Spared) if error.is_unfinished() => {
            Err(CommandError::NotWritten { id, reason: error.to_string() })
        }
        (written, Users::Spared) => Ok(written),
        (written, Users::Ignored) => Ok(written.and(device::sync_everything(id, Bound::Here))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone;
    use std::{fs, os::unix::process::ExitStatusExt, process::Command};

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

    /// The unit of a device that was detached by hand was shown as failed, and would have had whoever came by the number
    /// next detached.
    #[test]
    fn a_unit_detaches_what_it_has_made_and_misses_nothing() {
        let test = "commands::del::tests::a_unit_detaches_what_it_has_made_and_misses_nothing";
        alone::in_a_directory(test, |_| {
            let detach = |invocation| detach_own(7, Users::Spared, invocation);
            detach(Some("ours")).unwrap();
            let record = Record { invocation: Some("another's".into()), ..runfile::example() };
            assert!(record.is_of(Some("another's")) && record.is_of(None) && !record.is_of(Some("ours")));
            assert!(!runfile::example().is_of(Some("ours")), "it was made by hand");
            fs::write(runfile::path_of(7), serde_json::to_string(&record).unwrap()).unwrap();
            detach(Some("ours")).unwrap();
            assert_eq!(runfile::load(7).unwrap().unwrap().record, record, "it is another's");
        });
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
