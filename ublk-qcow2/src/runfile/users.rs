//! Who has an image, as the records say.
//!
//! The image's locks tell it too, and know other programs; but between a server's death and its successor's
//! opening of the image, or while `del` takes the device away, nobody has them, and some file systems have
//! none. The records know those cases, and the way out.

use super::{
    boot,
    directory::load_all,
    record::{Entry, Record},
};
use crate::{device, identity::KnownFile, wait};
use std::{
    fs,
    path::{Path, PathBuf, absolute},
    time::Duration,
};

/// How long whoever has an image may take to be gone: a server that has closed it and is on its way out.
const LEAVING_WAIT: Duration = Duration::from_secs(2);
/// Between two looks whether it is.
const LEAVING_PAUSE: Duration = Duration::from_millis(20);

/// Somebody has the image, or is to have it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InUse {
    #[error("{} is served as {}; detach it first: ublk-qcow2 del -n {id}", .image.display(), device::block_path(*.id).display())]
    Served { image: PathBuf, id: u32 },
    #[error(
        "{} was served as {}, whose server has died; first `ublk-qcow2 recover -n {id}`, or `ublk-qcow2 del -n {id}`",
        .image.display(), device::block_path(*.id).display()
    )]
    Awaited { image: PathBuf, id: u32 },
}

/// Refuses an image that a server of this program has open: two writers destroy it, and a reader would see
/// it half-written. Also one that waits for another server.
pub(crate) fn refuse_served(image: &Path) -> Result<(), InUse> {
    refuse_users(&users_of(image), image, |_| true)
}

/// Refuses an image whose server has died and is to be replaced: what that had acknowledged is not in it, and
/// its successor would write it over whatever is there by then. A dead server has no locks.
pub(crate) fn refuse_awaited(image: &Path) -> Result<(), InUse> {
    refuse_awaited_by(&users_of(image), image)
}

/// Refuses files one of which somebody else may change, or is to. For who has them open and locked, and has its
/// own record, the one with this cookie: so of two that come at the same time one sees the other at least. What
/// locks cannot tell is whether a device is being recovered or removed, whose image nobody has open yet, or
/// whose server has died while we waited for its lock.
pub(crate) fn refuse_changed_by_others(files: &[PathBuf], cookie: u64) -> Result<(), InUse> {
    let others = |file: &Path| {
        let mut users = users_of(file);
        users.retain(|entry| entry.record.cookie != cookie);
        users
    };
    let look = || {
        files.iter().try_for_each(|file| refuse_users(&others(file), file, |record| !record.config.read_only))
    };
    let may_leave = |found: &_| matches!(found, Err(InUse::Served { .. }));
    wait::patiently(LEAVING_WAIT, LEAVING_PAUSE, may_leave, look)
}

/// Refuses a file that one of these serves who is in the way, or that waits for another server.
fn refuse_users(users: &[Entry], file: &Path, is_in_the_way: impl Fn(&Record) -> bool) -> Result<(), InUse> {
    let disturbs = |entry: &&Entry| entry.is_alive && is_in_the_way(&entry.record);
    if let Some(Entry { record: Record { id, .. }, .. }) = users.iter().find(disturbs) {
        return Err(InUse::Served { image: file.to_owned(), id: *id });
    }
    refuse_awaited_by(users, file)
}

fn refuse_awaited_by(users: &[Entry], image: &Path) -> Result<(), InUse> {
    let boot = boot().unwrap_or_default();
    let awaits = |entry: &&Entry| {
        !entry.is_alive
            && entry.record.config.recovery
            && !entry.record.config.read_only
            && entry.record.boot == boot
    };
    match users.iter().find(awaits) {
        None => Ok(()),
        Some(Entry { record: Record { id, .. }, .. }) => {
            Err(InUse::Awaited { image: image.to_owned(), id: *id })
        }
    }
}

/// The servers of this program that have, or had, this image, or are to have it by its name.
fn users_of(image: &Path) -> Vec<Entry> {
    let known = |path: &Path| Some(KnownFile::of(String::new(), &fs::metadata(path).ok()?));
    let (Some(wanted), Ok(name)) = (known(image), absolute(image)) else { return Vec::new() };
    let all = load_all().unwrap_or_else(|error| {
        // Who is not root has started none of them, but may have handed the image to who has.
        tracing::warn!("whether {} is served, or waits to be, is not known: {error}", image.display());
        Vec::new()
    });
    let has = |Record { config, files, .. }: &Record| match files.first() {
        // No look at its file: the file system that it is on may be gone, and nobody answer.
        Some(top) => config.image == name || top.is(&wanted),
        // A version of before has not said which file it is.
        None => known(&config.image).is_some_and(|top| top.is(&wanted)),
    };
    all.into_iter().filter(|entry| has(&entry.record)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        alone,
        runfile::{example, lock::write_locked, path_of},
    };
    use std::thread;

    /// `add` took the image of a device that was being recovered, or removed: the record was locked, and so the
    /// device counted as served, but nobody had locked the image yet. What its old server had acknowledged was
    /// lost.
    #[test]
    fn an_image_that_somebody_is_about_to_write_to_is_refused() {
        let test = "runfile::users::tests::an_image_that_somebody_is_about_to_write_to_is_refused";
        alone::in_a_directory(test, |directory| {
            let (top, base) = (directory.join("top"), directory.join("base"));
            for file in [&top, &base] {
                fs::write(file, "").unwrap();
            }
            let refused = |cookie| refuse_changed_by_others(&[top.clone(), base.clone()], cookie);
            let mut record = example();
            record.config.image.clone_from(&base);

            let held = write_locked(&path_of(7), &record).unwrap();
            assert!(matches!(refused(5), Err(InUse::Served { id: 7, .. })), "somebody is at it");
            assert!(refused(record.cookie).is_ok(), "that is our own");
            thread::scope(|scope| {
                scope.spawn(|| {
                    thread::sleep(LEAVING_PAUSE);
                    fs::remove_file(path_of(7)).unwrap();
                });
                assert!(refused(5).is_ok(), "it was on its way out");
            });
            drop(held);

            drop(write_locked(&path_of(7), &record).unwrap());
            assert!(matches!(refused(5), Err(InUse::Awaited { id: 7, .. })), "its server has died meanwhile");
            record.config.read_only = true;
            let _held = write_locked(&path_of(7), &record).unwrap();
            assert!(refused(5).is_ok(), "nobody writes to it");
        });
    }

    /// The images of all records were looked at: one on a dead NFS mount had every command hang.
    #[test]
    fn a_record_says_which_file_its_image_is() {
        let test = "runfile::users::tests::a_record_says_which_file_its_image_is";
        alone::in_a_directory(test, |directory| {
            let [image, other] = ["image", "other"].map(|name| directory.join(name));
            for file in [&image, &other] {
                fs::write(file, "").unwrap();
            }
            let mut record = example();
            record.files = vec![KnownFile::of("image".to_owned(), &fs::metadata(&image).unwrap())];
            // Nothing answers there.
            record.config.image = "/proc/none/image".into();
            let _held = write_locked(&path_of(7), &record).unwrap();
            assert!(matches!(refuse_served(&image), Err(InUse::Served { id: 7, .. })));
            assert!(refuse_served(&other).is_ok());
        });
    }
}
