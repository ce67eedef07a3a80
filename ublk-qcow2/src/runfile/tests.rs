use super::{
    directory::{load_each_in, load_made_in, load_path},
    lock::{Named, has_name, lock_named, read_held, spare_path as spare_of},
    *,
};
use crate::{
    alone,
    namespace::{self, Namespace},
};
use nix::{
    fcntl::FlockArg,
    mount::{MsFlags, mount},
    sys::stat::{Mode, umask},
};
use std::{
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt},
    sync::atomic::{AtomicBool, Ordering},
    thread::{self, sleep},
};

/// `del` had removed a device and could not write to its image; the next `add` got the number, and emptied
/// the log.
#[test]
fn a_number_is_not_given_away_while_its_log_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("7.json");
    let new = example();
    let owing_after = |dead: &Record, owes| {
        fs::write(&path, serde_json::to_string(dead).unwrap()).unwrap();
        owing(&File::open(&path).unwrap(), &new, |_| owes).unwrap()
    };
    let image = new.config.image.clone();
    assert_eq!(owing_after(&new, true), Some(image));
    assert_eq!(owing_after(&new, false), None);
    assert_eq!(owing_after(&Record { boot: "before".to_owned(), ..new.clone() }, true), None);
    let config = Config { recovery: false, ..new.config.clone() };
    assert_eq!(owing_after(&Record { config, ..new.clone() }, true), None);
    fs::write(&path, "{").unwrap();
    assert!(owing(&File::open(&path).unwrap(), &new, |_| true).is_err(), "it leads nowhere, but must have");
    assert_eq!(owing(&File::open(&path).unwrap(), &new, |_| false).unwrap(), None);
}

#[test]
fn who_has_no_place_for_records_is_told_how_to_name_another() {
    let dir = tempfile::tempdir().unwrap();
    let told = |errno| {
        let source = io::Error::from_raw_os_error(errno);
        RunFileError { what: "cannot make", path: dir.path().to_owned(), source }.to_string()
    };
    assert!(told(libc::EROFS).contains(directory::DIRECTORY_VARIABLE));
    assert!(!told(libc::ENOSPC).contains(directory::DIRECTORY_VARIABLE));
}

/// A record could not be read (damaged, or another version's), and the log beside it was of use: every `add` that
/// the driver gave this number to failed, which is all of them while it is the first that is free.
#[test]
fn a_number_whose_record_cannot_be_read_is_passed_over_while_its_log_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("7.json");
    fs::write(&path, "{").unwrap();
    let made = RunFile::create_at(path.clone(), example(), Duration::ZERO, |_| true);
    let Err(error) = made else { panic!("what is in the log is lost") };
    assert!(error.is_of_number());
    assert!(error.to_string().contains("remove the file"), "{error}");
    assert!(fs::exists(&path).unwrap());
}

/// A device was gone and its server still wrote back: every `add` of another image waited a minute for the
/// number that the driver had given out again, and failed.
#[test]
fn a_number_whose_server_is_busy_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("7.json");
    let _busy = write_locked(&path, &example()).unwrap();
    let made = RunFile::create_at(path, example(), Duration::ZERO, |_| panic!("it is not ours to ask"));
    assert!(made.is_err_and(|error| matches!(error, CreateError::Busy(7)) && error.is_of_number()));
}

#[test]
fn a_record_survives_and_the_lock_tells_who_lives() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("7.json");
    let record = example();
    let lock = write_locked(&path, &record).unwrap();
    assert_eq!(load_path(&path).unwrap(), Some(Entry { record: record.clone(), is_alive: true }));
    assert!(matches!(lock_dead(&path, Duration::ZERO).unwrap(), Dead::Alive));
    drop(lock);
    assert_eq!(load_path(&path).unwrap(), Some(Entry { record: record.clone(), is_alive: false }));
    let Dead::Locked(_lock) = lock_dead(&path, Duration::ZERO).unwrap() else { panic!("it is dead") };
    assert!(matches!(lock_dead(&path, Duration::ZERO).unwrap(), Dead::Alive), "one of two takes it over");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "it and its spare");
    assert_eq!(load_path(&dir.path().join("8.json")).unwrap(), None);
}

/// One record that could not be parsed hid all others: tools wrote to images that were served, or waited.
#[test]
fn a_record_that_cannot_be_read_hides_no_other() {
    let dir = tempfile::tempdir().unwrap();
    for id in [11, 2] {
        let text = serde_json::to_string(&Record { id, ..example() }).unwrap();
        fs::write(dir.path().join(format!("{id}.json")), text).unwrap();
    }
    fs::write(dir.path().join("3.json"), "{").unwrap();
    fs::write(dir.path().join("x.json"), "{").unwrap();
    let found = load_each_in(dir.path()).unwrap();
    let ids: Vec<_> = found.iter().map(|entry| entry.as_ref().ok().map(|it| it.record.id)).collect();
    assert_eq!(ids, [Some(2), None, Some(11)]);
}

/// The caller's mask of modes was 0: any user could replace a record, and so say which image is whose. And any
/// user could lock one, so that a dead server seemed alive and was neither recovered nor detached.
#[test]
fn nobody_else_may_change_or_lock_what_servers_leave() {
    alone::run("runfile::tests::nobody_else_may_change_or_lock_what_servers_leave", || {
        umask(Mode::empty());
        let dir = tempfile::tempdir().unwrap();
        let (above, directory) = (dir.path().join("run"), dir.path().join("run/ublk-qcow2"));
        make_directory(&directory).unwrap();
        let (record, log) = (directory.join("7.json"), directory.join("7.log"));
        write_locked(&record, &example()).unwrap();
        open_log(&log).unwrap();
        let spare = spare_of(&record);
        fs::set_permissions(&record, fs::Permissions::from_mode(0o644)).unwrap();
        for _ in 0..2 {
            write_locked(&record, &example()).unwrap();
        }
        let modes = [(above, 0o755), (directory, 0o755), (record, 0o600), (spare, 0o600), (log, 0o644)];
        for (path, mode) in modes {
            let found = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
            assert_eq!(found, mode, "{}: {found:o}", path.display());
        }
    });
}

/// The run directory was full when a server died: its device could be neither recovered nor removed.
#[test]
fn a_full_directory_has_room_for_what_becomes_of_its_devices() {
    let test = "runfile::tests::a_full_directory_has_room_for_what_becomes_of_its_devices";
    alone::in_a_directory(test, |directory| {
        // Its owner must be privileged.
        if namespace::leave(None).0 == Namespace::Shared {
            return alone::skip("a full run directory: no namespace of mounts can be had");
        }
        let (kind, flags) = (Some("tmpfs"), MsFlags::empty());
        mount(None::<&str>, directory, kind, flags, Some("size=64k,nr_inodes=8")).unwrap();
        let fill = || {
            let mut file = File::create(directory.join("fill")).unwrap();
            while file.write_all(&[0; 4096]).is_ok() {}
            (0..8).for_each(|number| drop(File::create(directory.join(format!("fill{number}")))));
        };
        let files = || fs::read_dir(directory).unwrap().count();
        fill();
        let full = files();
        assert!(RunFile::create(example(), Choice::Any, |_| false).is_err());
        assert_eq!(files(), full, "nothing half-made is left");
        for file in fs::read_dir(directory).unwrap() {
            fs::remove_file(file.unwrap().path()).unwrap();
        }

        RunFile::create(example(), Choice::Any, |_| false).unwrap().leave();
        fill();
        for _ in 0..3 {
            let mut file = RunFile::take_over(7).unwrap();
            assert!(matches!(RunFile::take_over(7), Err(TakeOverError::Alive(7))), "one of two");
            for phase in [Phase::Preparing, Phase::Fetching, Phase::Fetched, Phase::Serving] {
                file.enter(phase).unwrap();
                assert!(load(7).unwrap().is_some_and(|it| it.is_alive && it.record.phase == phase));
            }
            file.refuse("r".repeat(1000)).unwrap();
            assert!(load(7).unwrap().unwrap().record.refusal.is_some());
            file.fail("e".repeat(500));
            let entry = load(7).unwrap().unwrap();
            assert!(!entry.is_alive && entry.record.error.is_some());
        }
        drop(RunFile::take_over(7).unwrap());
        assert!(!fs::exists(path_of(7)).unwrap() && !fs::exists(spare_path(7)).unwrap());
    });
}

/// A file that was replaced is written to again: who was reading it then read half of each content.
#[test]
fn who_looks_while_a_record_is_written_sees_one_content_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("7.json");
    let text = |number: u32| format!("{number:0>width$}", width = 200 + number as usize % 7 * 100);
    let record = |number| Record { error: Some(text(number)), ..example() };
    let mut lock = write_locked(&path, &record(0)).unwrap();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let looker = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let entry = load_path(&path).unwrap().unwrap();
                assert!(entry.is_alive);
                let error = entry.record.error.clone().unwrap();
                assert_eq!(error, text(error.parse().unwrap()));
            }
        });
        for number in 1..300 {
            lock = write_locked(&path, &record(number)).unwrap();
        }
        is_over.store(true, Ordering::Relaxed);
        looker.join().unwrap();
    });
    let before = File::open(&path).unwrap();
    assert!(read_held(&before, &path).unwrap().is_some());
    lock = write_locked(&path, &record(0)).unwrap();
    assert_eq!(read_held(&before, &path).unwrap(), None, "it is about to be written to");
    drop(lock);
}

/// Who has found a file by its name may still have it locked when it is the spare already.
#[test]
fn a_spare_that_somebody_has_locked_is_waited_for_and_then_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("7.json");
    drop(write_locked(&path, &example()).unwrap());
    let look = || {
        let spare = File::open(spare_of(&path)).unwrap();
        Flock::lock(spare, FlockArg::LockSharedNonblock).unwrap()
    };
    let glance = look();
    let inode = glance.metadata().unwrap().ino();
    let named = || fs::metadata(&path).unwrap().ino();
    thread::scope(|scope| {
        scope.spawn(|| {
            sleep(Duration::from_millis(100));
            drop(glance);
        });
        drop(write_locked(&path, &example()).unwrap());
        assert_eq!(named(), inode, "it was waited for");
    });
    let stopped = look();
    drop(write_locked(&path, &example()).unwrap());
    assert_ne!(named(), stopped.metadata().unwrap().ino());
}

/// `list` waited for somebody to write to a FIFO of a record's name.
#[test]
fn a_record_that_is_no_file_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("7.json");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(load_path(&path).is_err());
}

/// `list` said that a device served whose successor had not begun.
#[test]
fn a_phase_is_the_predecessor_s_until_another_is_entered() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("7.json");
    let now = || load_path(&path).unwrap().unwrap().record;
    drop(write_locked(&path, &Record { processes: Vec::new(), ..example() }).unwrap());
    let mut file = RunFile::take_over_at(path.clone(), 7).unwrap();
    assert_eq!((now().phase, now().is_inherited), (Phase::Serving, true));
    assert_eq!(now().server(), Process::this().ok(), "it can be asked to stop");
    file.enter(Phase::Preparing).unwrap();
    assert_eq!((now().phase, now().is_inherited), (Phase::Preparing, false));
    file.leave();
}

/// A server was killed while somebody ran `list`: its successor took that for a living server, and gave up.
/// And who looked at a file that a server was replacing took that server for dead.
#[test]
fn a_glance_is_no_owner_and_a_file_without_a_name_tells_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("7.json");
    let named = |how| lock_named(&path, how).unwrap();
    fs::write(&path, "{}").unwrap();
    let Named::Locked(glance) = named(FlockArg::LockSharedNonblock) else { panic!("nobody has it") };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            sleep(Duration::from_millis(100));
            drop(glance);
        });
        assert!(matches!(lock_dead(&path, GLANCE).unwrap(), Dead::Locked(_)));
    });

    let before = File::open(&path).unwrap();
    fs::write(dir.path().join("new"), "{}").unwrap();
    let new = File::open(dir.path().join("new")).unwrap();
    let _lock = Flock::lock(new, FlockArg::LockExclusiveNonblock).unwrap();
    fs::rename(dir.path().join("new"), &path).unwrap();
    let before = Flock::lock(before, FlockArg::LockSharedNonblock).unwrap();
    assert!(
        !has_name(&before, &path).unwrap(),
        "it could be locked, and says nothing of the one that is there"
    );
    assert!(matches!(named(FlockArg::LockSharedNonblock), Named::Held(_)));
}

/// A server was killed when its record said that it serves and before it could: `add` failed, and took the
/// device for one that somebody uses.
#[test]
fn what_an_add_has_made_is_known_by_its_cookie_and_not_by_how_far_it_came() {
    let dir = tempfile::tempdir().unwrap();
    for phase in [Phase::Preparing, Phase::Fetching, Phase::Fetched, Phase::Serving] {
        let made = Record { phase, cookie: 5, ..example() };
        drop(write_locked(&dir.path().join("7.json"), &made).unwrap());
        assert_eq!(load_made_in(dir.path(), 5).map(|record| record.id), Some(7), "{phase:?}");
        assert_eq!(load_made_in(dir.path(), 6), None, "{phase:?}");
    }
}
