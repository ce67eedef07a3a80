//! One life of a machine whose plug is pulled: whoever runs us kills the whole machine at any moment.
//!
//! ```text
//! life 0    makes a file system on the machine's disk, and an image on it
//! others    the file system recovers; the image holds what the life before may have left, and is
//!           served until its leaks are gone
//! then      what the image holds is put on a disk of its own ("known"), the image is served, and
//!           changed and flushed until the end
//! ```
//!
//! What is issued and what is durable goes out of the machine line by line as it happens, through the
//! *report*: a file that outlives us. Changes follow from a seed, so the report need only count them.

use super::{
    aftermath::{self, Leaks},
    drive::{History, Witness},
    host,
    journal::Journal,
    load::Plan,
};
use crate::{
    device::Binary,
    disk::Server,
    fixture::{Backing, Fixture, Preallocation, Recipe},
    fs::{Kind, Mounted},
    mirror::Mirror,
};
use anyhow::{Context, Result, ensure};
use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::PathBuf,
};

/// Bytes copied at a time.
const PIECE: u64 = 1 << 20;
/// Writes of different lives have different numbers.
const NUMBERS_OF_A_LIFE: u64 = 1_000_000_000;

/// What a life is given.
#[derive(Clone, Debug, clap::Args)]
pub struct Life {
    /// The ublk-qcow2 to test
    #[arg(long, default_value = "ublk-qcow2")]
    binary: PathBuf,
    /// The block device on which the image's file system lies
    #[arg(long)]
    disk: PathBuf,
    /// A block device that keeps what the image held when it was last at rest
    #[arg(long)]
    known: PathBuf,
    /// Where to report what is issued and what is durable
    #[arg(long)]
    report: PathBuf,
    /// What the life before has reported; without it, this is the first
    #[arg(long)]
    before: Option<PathBuf>,
    /// Which life this is
    #[arg(long)]
    number: u64,
    /// Of all lives; chooses file system and image, too
    #[arg(long)]
    seed: u64,
    /// Only hold what the life before has left
    #[arg(long)]
    last: bool,
    /// For what need not outlive this life
    #[arg(long, default_value = ".")]
    dir: PathBuf,
}

/// Lives it. Returns only if it is the last one.
///
/// # Errors
/// What did not hold.
pub fn live(life: &Life) -> Result<()> {
    let place = Place::new(life)?;
    let mounted = match &life.before {
        None => place.begin(life)?,
        Some(before) => place.go_on(life, &fs::read_to_string(before)?)?,
    };
    if life.last {
        return mounted.unmount();
    }
    let recipe = place.recipe;
    let mut disk = Binary::new(life.binary.clone()).attach(&place.image, recipe.queues)?;
    let report = Report(File::options().append(true).open(&life.report)?);
    let history = History::new(Journal::new(place.known()?), &report);
    report.say(&format!("serving {}", life.number))?;
    history.drive(&mut disk, place.plan(life.number), usize::MAX, life.seed ^ life.number)
}

/// Where things are, and what they are; the same in all lives of a seed.
struct Place<'a> {
    life: &'a Life,
    kind: Kind,
    recipe: Recipe,
    mount_point: PathBuf,
    image: PathBuf,
}

impl<'a> Place<'a> {
    fn new(life: &'a Life) -> Result<Self> {
        let mount_point = life.dir.join("mnt");
        fs::create_dir_all(&mount_point)?;
        let kinds = [Kind::Xfs, Kind::Ext4];
        let recipes = recipes();
        // Coprime numbers: in time each meets each.
        let kind = kinds[life.seed as usize % kinds.len()];
        let recipe = recipes[life.seed as usize % recipes.len()];
        Ok(Self { life, kind, recipe, image: mount_point.join("image.qcow2"), mount_point })
    }

    /// The first life: makes everything.
    fn begin(&self, life: &Life) -> Result<Mounted> {
        host::make_file_system(self.kind, &life.disk)?;
        let mounted = self.mount()?;
        let fixture = Fixture::make(&self.mount_point, &self.recipe, life.seed)?;
        self.keep(&fixture.mirror)?;
        // The image is at rest: everything of it is to be there in the next life.
        nix::unistd::syncfs(File::open(&fixture.image)?)?;
        println!("life 0: {} on {}", self.recipe.name(), self.kind.name());
        Ok(mounted)
    }

    /// What the life before has left is held against what it reported.
    fn go_on(&self, life: &Life, before: &str) -> Result<Mounted> {
        let reported = Reported::parse(before).context("the report of the life before")?;
        let mounted = self.mount()?;
        let journal = self.journal_of(&reported)?;
        let raw = self.life.dir.join("found.raw");
        let leaks = aftermath::judge(&self.image, &raw, &journal, 1).with_context(|| {
            format!(
                "after life {}: {} changes, {} of them durable",
                reported.life, reported.begun, reported.flushed
            )
        })?;
        let binary = Binary::new(life.binary.clone());
        aftermath::serve_again(&binary, &self.image, self.recipe.queues, &raw)?;
        self.keep(&Mirror::read_raw(&raw, self.recipe.size, self.recipe.cluster())?)?;
        println!(
            "life {}: {} changes, {} of them durable, all held; leaks: {}",
            reported.life,
            reported.begun,
            reported.flushed,
            if leaks == Leaks::None { "none" } else { "some, given back" }
        );
        Ok(mounted)
    }

    fn mount(&self) -> Result<Mounted> {
        Mounted::new(self.kind, &self.life.disk, &self.mount_point, "noatime")
    }

    fn plan(&self, life: u64) -> Plan {
        let (size, cluster) = (self.recipe.size, self.recipe.cluster());
        let first = NUMBERS_OF_A_LIFE * (life + 1);
        Plan::new(size, cluster, self.recipe.discards(), self.life.seed ^ life, first)
    }

    /// What the image may hold after a life: mark 1.
    fn journal_of(&self, reported: &Reported) -> Result<Journal> {
        let mut journal = Journal::new(self.known()?);
        let mut plan = self.plan(reported.life);
        while journal.issued() < reported.begun {
            plan.batch().iter().for_each(|op| journal.issue(op));
        }
        journal.open_mark(reported.flushed);
        Ok(journal)
    }

    fn known(&self) -> Result<Mirror> {
        Mirror::read_raw(&self.life.known, self.recipe.size, self.recipe.cluster())
    }

    fn keep(&self, mirror: &Mirror) -> Result<()> {
        let known = File::options().write(true).open(&self.life.known)?;
        for at in (0..mirror.size()).step_by(PIECE as usize) {
            known.write_all_at(&mirror.read(at, PIECE.min(mirror.size() - at)), at)?;
        }
        known.sync_all().context("the disk of what is known")
    }
}

/// Images, small enough that one life changes most of one.
fn recipes() -> [Recipe; 3] {
    [
        Recipe { queues: 2, ..Recipe::plain(16) },
        Recipe { queues: 2, backing: Backing::Raw, ..Recipe::plain(12) },
        Recipe { preallocation: Preallocation::Full, ..Recipe::plain(16) },
    ]
}

/// The way out of the machine.
struct Report(File);

impl Report {
    /// A line, which is out when this returns.
    fn say(&self, line: &str) -> Result<()> {
        (&self.0).write_all(format!("{line}\n").as_bytes()).context("the report")
    }
}

impl Witness for Report {
    fn issued(&self, count: usize) -> Result<()> {
        self.say(&format!("begun {count}"))
    }

    fn durable(&self, _number: usize, covered: usize) -> Result<()> {
        self.say(&format!("flushed {covered}"))
    }
}

/// What has got out of a life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reported {
    life: u64,
    begun: usize,
    flushed: usize,
}

impl Reported {
    /// The last word counts; a line that was cut off does not.
    fn parse(text: &str) -> Result<Self> {
        let mut reported = Self { life: u64::MAX, begun: 0, flushed: 0 };
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let (word, number) = line.split_once(' ').with_context(|| format!("{line:?}"))?;
            match word {
                "serving" => reported.life = number.parse()?,
                "begun" => reported.begun = reported.begun.max(number.parse()?),
                "flushed" => reported.flushed = reported.flushed.max(number.parse()?),
                _ => anyhow::bail!("{line:?}"),
            }
        }
        ensure!(reported.life != u64::MAX, "it has not come as far as serving");
        ensure!(reported.flushed <= reported.begun, "{reported:?}: more durable than issued");
        Ok(reported)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_whole_line_of_each_kind_counts() {
        let text = "serving 3\nbegun 4\nbegun 9\nflushed 4\nbegun 12\nflushed 9\nbegun 1";
        assert_eq!(Reported::parse(text).unwrap(), Reported { life: 3, begun: 12, flushed: 9 });
        assert!(Reported::parse("begun 4\n").is_err());
        assert!(Reported::parse("serving 3\nflushed 1\n").is_err());
        assert!(Reported::parse("serving 3\nnonsense\n").is_err());
    }
}
