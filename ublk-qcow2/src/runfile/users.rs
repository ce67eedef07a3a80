//! Who has an image, or a file below one, as the records say.
//!
//! The locks of the files tell it too, and know other programs; but between a server's death and its successor's
//! opening of the image, or while `del` takes the device away, nobody has them, and some file systems have
//! none. The records know those cases, and the way out.

use super::{
    boot,
    directory::load_all,
    record::{Entry, Record},
};
use crate::{config::Config, device, identity::KnownFile, wait};
use std::{
    fs,
    path::{Path, PathBuf, absolute},
    time::Duration,
};

/// How long whoever has an image may take to be gone: a server that has closed it and is on its way out.
const LEAVING_WAIT: Duration = Duration::from_secs(2);
/// Between two looks whether it is.
const LEAVING_PAUSE: Duration = Duration::from_millis(20);

/// Somebody has the file, or is to have it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InUse {
    #[error("{} is served as {}; detach it first: ublk-qcow2 del -n {id}", .file.display(), device::block_path(*.id).display())]
    Served { file: PathBuf, id: u32 },
    #[error(
        "{} was served as {}, whose server has died; first `ublk-qcow2 recover -n {id}`, or `ublk-qcow2 del -n {id}`",
        .file.display(), device::block_path(*.id).display()
    )]
    Awaited { file: PathBuf, id: u32 },
    #[error(
        "{} is a backing file of {}, which would show another disk; detach that first: ublk-qcow2 del -n {id}",
        .file.display(), device::block_path(*.id).display()
    )]
    Below { file: PathBuf, id: u32 },
}

/// Where in its chain a device has a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Top,
    Below,
}

/// A device that has a file, or had, or is to have it.
struct User {
    entry: Entry,
    place: Place,
}

/// What is to be done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Read,
    Write,
}

impl Use {
    fn of_image(config: &Config) -> Self {
        if config.read_only { Self::Read } else { Self::Write }
    }

    /// Whether it cannot be done beside what the device does, or is to do.
    fn clashes_with(self, User { entry, place }: &User) -> bool {
        let Config { read_only, force_share, .. } = entry.record.config;
        match self {
            Self::Read => *place == Place::Top && !read_only,
            // Who only reads has what he has read half in his memory.
            Self::Write => !force_share,
        }
    }
}

/// Refuses a file that is to be written to and that a server of this program has open: two writers destroy it, and
/// a reader would see it half-written. Also one that waits for another server.
pub(crate) fn refuse_served(file: &Path) -> Result<(), InUse> {
    refuse_users(&users_of(file), file, |_| true)
}

/// Refuses an image that is in the way of one whose server has died and is to be replaced: what that had
/// acknowledged is not in the files, or its users have them half in their memory. A dead server has no locks.
pub(crate) fn refuse_awaited(config: &Config) -> Result<(), InUse> {
    let wanted = Use::of_image(config);
    refuse_users(&users_of(&config.image), &config.image, |user| {
        !user.entry.is_alive && wanted.clashes_with(user)
    })
}

/// Refuses an image if somebody else may change one of its `files`, or is to, or has the one that it would change.
/// For who has them open and locked, and has its own record, the one with this cookie: so of two that come at the
/// same time one sees the other at least. What locks cannot tell is whether a device is being recovered or removed,
/// whose image nobody has open yet, or whose server has died while we waited for its lock.
pub(crate) fn refuse_clashes(config: &Config, files: &[PathBuf], cookie: u64) -> Result<(), InUse> {
    let refuse = |file: &PathBuf| {
        let wanted = if *file == config.image { Use::of_image(config) } else { Use::Read };
        let mut others = users_of(file);
        others.retain(|user| user.entry.record.cookie != cookie);
        refuse_users(&others, file, |user| wanted.clashes_with(user))
    };
    // A file below is no longer had either when its device has gone.
    let may_leave = |found: &_| matches!(found, Err(InUse::Served { .. } | InUse::Below { .. }));
    wait::patiently(LEAVING_WAIT, LEAVING_PAUSE, may_leave, || files.iter().try_for_each(refuse))
}

/// Refuses a file that one of these has who is in the way, and lives or waits for another server.
fn refuse_users(users: &[User], file: &Path, is_in_the_way: impl Fn(&User) -> bool) -> Result<(), InUse> {
    let boot = boot().unwrap_or_default();
    let has = |user: &&User| user.entry.is_alive || is_awaited(&user.entry.record, &boot);
    let disturbing = users.iter().filter(has).filter(|user| is_in_the_way(user));
    // Who lives first, and of those whose image it is.
    let worst = disturbing.min_by_key(|user| (!user.entry.is_alive, user.place == Place::Below));
    let Some(User { entry: Entry { record: Record { id, .. }, is_alive }, place }) = worst else {
        return Ok(());
    };
    let (file, id) = (file.to_owned(), *id);
    Err(match (place, is_alive) {
        (Place::Top, true) => InUse::Served { file, id },
        (Place::Top, false) => InUse::Awaited { file, id },
        (Place::Below, _) => InUse::Below { file, id },
    })
}

/// Whether a dead server is to be replaced, or what it has left is to be written to its image.
fn is_awaited(record: &Record, boot: &str) -> bool {
    record.config.recovery && record.boot == boot
}

/// The devices of this program that have, or had, this file, or are to have it as their image by its name.
fn users_of(file: &Path) -> Vec<User> {
    let known = |path: &Path| Some(KnownFile::of(String::new(), &fs::metadata(path).ok()?));
    let (Some(wanted), Ok(name)) = (known(file), absolute(file)) else { return Vec::new() };
    let all = load_all().unwrap_or_else(|error| {
        // Who is not root has started none of them, but may have handed the image to who has.
        tracing::warn!("whether {} is served, or waits to be, is not known: {error}", file.display());
        Vec::new()
    });
    let place = |Record { config, files, .. }: &Record| match &files[..] {
        // No look at its files: the file system that they are on may be gone, and nobody answer.
        [top, ..] if config.image == name || top.is(&wanted) => Some(Place::Top),
        [_, below @ ..] => below.iter().any(|it| it.is(&wanted)).then_some(Place::Below),
        // A version of before has not said which files they are.
        [] => known(&config.image).is_some_and(|top| top.is(&wanted)).then_some(Place::Top),
    };
    all.into_iter().filter_map(|entry| Some(User { place: place(&entry.record)?, entry })).collect()
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
            let mut record = example();
            let config = Config { image: top.clone(), ..record.config.clone() };
            let refused = |cookie| refuse_clashes(&config, &[top.clone(), base.clone()], cookie);
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

    /// Only who has a file as his image was known to have it: files below the images of others were changed.
    #[test]
    fn a_file_below_an_image_is_read_by_many_and_changed_by_nobody() {
        let test = "runfile::users::tests::a_file_below_an_image_is_read_by_many_and_changed_by_nobody";
        alone::in_a_directory(test, |directory| {
            let [top, base, other] = ["top", "base", "other"].map(|name| directory.join(name));
            for file in [&top, &base, &other] {
                fs::write(file, "").unwrap();
            }
            let mut record = example();
            record.config.image.clone_from(&top);
            record.files =
                [&top, &base].map(|it| KnownFile::of(String::new(), &fs::metadata(it).unwrap())).to_vec();
            let adding =
                |image: &Path, read_only| Config { image: image.to_owned(), read_only, ..example().config };
            let (writing, reading) = (adding(&base, false), adding(&base, true));
            let over = |config: &Config, files: &[&PathBuf]| {
                let files: Vec<_> = files.iter().copied().cloned().collect();
                refuse_awaited(config).and_then(|()| refuse_clashes(config, &files, 5))
            };
            let look = |what: &str| {
                assert!(matches!(refuse_served(&base), Err(InUse::Below { id: 7, .. })), "{what}");
                assert!(matches!(over(&writing, &[&base]), Err(InUse::Below { id: 7, .. })), "{what}");
                over(&reading, &[&base]).unwrap();
                over(&adding(&other, false), &[&other, &base]).unwrap();
            };
            let held = write_locked(&path_of(7), &record).unwrap();
            look("it is served");
            drop(held);
            look("it is to be served again");
            record.config.read_only = true;
            drop(write_locked(&path_of(7), &record).unwrap());
            look("its users have read it");
            assert!(over(&adding(&top, false), &[&top]).is_err(), "and the image itself");
            over(&adding(&top, true), &[&top, &base]).unwrap();
            record.config.force_share = true;
            drop(write_locked(&path_of(7), &record).unwrap());
            over(&writing, &[&base]).unwrap();
            record.boot = "before".to_owned();
            drop(write_locked(&path_of(7), &record).unwrap());
            refuse_served(&base).unwrap();
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
