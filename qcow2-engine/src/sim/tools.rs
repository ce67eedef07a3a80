//! Crashes while a tool is at work on an image that nobody serves: repair, the repair of the dirty bit
//! at open, growing, creation.
//!
//! A tool is judged at every moment, as requests are. What a crash leaves of
//!
//! - a *repair*: no sector reads worse than before, in the image or in a snapshot; the next repair comes
//!   to its end, and leaves a sound image without a leak; no count is further below the number of
//!   references than before, and nothing has been flagged whose count is still too high; that holds when
//!   the next repair is cut short as well;
//! - an image *marked dirty*: the same, and the next repair is the next opening;
//! - *growing*: a sound image of the old size or the new one;
//! - *creation*: the old image, no image, or the new one, whole and empty.

use super::{
    case::{self, Case, Totals},
    contents::Contents,
    counts::Standing,
    damage::{self, Damage, Wreck},
    disk::Disk,
    faults::{Failing, FileSystem, HeldBack},
    file::{Change, File, SECTOR, sector_bytes},
    mixed::stamps,
    model::{INITIAL, Model, Value},
    oracle::{self, Memo},
    rng::Rng,
    states,
    workload::{Fixture, IMAGE},
};
use crate::{
    CheckOptions, Error, Image, OpenOptions, Preallocation, Repair, check, create, exec::run_at_once, grow,
    io::mem::MemFiles,
};
use qcow2_format::{CreateOptions, header, word};
use std::{
    collections::HashSet,
    future::Future,
    path::Path,
    pin::Pin,
    task::{Context, Poll, Waker},
};

/// What is done to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// `check --repair`, of an image with this damage.
    Repair(Repair, Damage),
    /// Opening an image that is marked dirty and has this damage.
    OpenDirty(Damage),
    /// Growing by so many sectors, when the disk has been cut off by so many: what was there is there still.
    Grow(usize, usize),
    /// Making an empty image of what was one; whether on a block device, which has old content everywhere.
    Create(Preallocation, bool),
}

/// A block device has room for so many times what the disk of the image on it has, besides that image.
const DEVICE_ROOM: usize = 2;
/// No tool needs more operations than this on images as small as these.
const MAX_OPERATIONS: u64 = 100_000;

/// A tool at work.
struct Work<'a> {
    fixture: &'a Fixture,
    tool: Tool,
    /// The damaged image.
    image: Vec<u8>,
    /// Sectors of its disk.
    old_sectors: usize,
    model: Model,
    /// What sectors may read as while a repair is under way: before it, and after it.
    readings: [Vec<Option<Value>>; 2],
    /// How the counts of the damaged image stood.
    standing: Standing,
    memo: Memo,
    attempt: Attempt,
}

/// Whose crash states are judged.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Attempt {
    First,
    /// A repair of what a crash of the first one has left.
    Second,
}

/// One image in so many that is to be repaired says that something may be wrong.
const MARKED_SHARE: u64 = 3;
/// One crash state of a repair in so many is repaired by one that crashes in turn, at every moment.
const SECOND_CHANCE: u64 = 256;

/// Simulates a tool.
///
/// # Errors
/// What is wrong, in words.
pub(super) fn simulate(
    fixture: &Fixture,
    tool: Tool,
    case: &Case,
    totals: &mut Totals,
) -> Result<(), String> {
    totals.workloads += 1;
    let mut rng = Rng::new(case.seed);
    let work = Work::new(fixture, tool, &mut rng)?;
    let disk = fixture.disk(&work.image);
    let is_on_device = matches!(tool, Tool::Create(_, true));
    disk.set_file_system(if is_on_device { FileSystem::DEVICE } else { case.file_system });
    if let Some(rule) = case.disabled {
        disk.disable_rule(rule);
    }
    if let Some(failing) = case.fault {
        // Tools are short.
        disk.fail(Failing { after: failing.after / 4, ..failing });
    }
    let outcome = work.drive(&disk, &mut rng, case, totals)?;
    match outcome {
        Ok(()) if work.must_refuse() => return Err("it was not refused".to_owned()),
        Err(error) if case.fault.is_none() && !work.must_refuse() => {
            return Err(format!("it failed: {error}"));
        }
        _ => {}
    }
    disk.look(0, |file, in_flight| {
        let is_durable = file.pending.is_empty() && in_flight.is_empty();
        match &outcome {
            Err(_) if work.must_refuse() && file.current != work.image => {
                Err("it was refused, and the image is another one".to_owned())
            }
            // A check that could not read something says so, and has done what it could.
            _ if case.fault.is_some() => work.judge(&file.current),
            Ok(()) if !is_durable => Err("it has ended, and not everything is durable".to_owned()),
            Ok(()) => work.judge_end(&file.current),
            Err(_) => work.judge(&file.current),
        }
    })
}

impl<'a> Work<'a> {
    fn new(fixture: &'a Fixture, tool: Tool, rng: &mut Rng) -> Result<Self, String> {
        let mut image = fixture.image.clone();
        let mut content = fixture.content.clone();
        match tool {
            Tool::Repair(_, damage) => {
                damage::inflict(&mut image, damage, rng)?;
                if fixture.variant.compat == "1.1" && rng.below(MARKED_SHARE) == 0 {
                    damage::mark(&mut image, [header::DIRTY, header::CORRUPT][rng.below(2) as usize]);
                }
            }
            Tool::OpenDirty(damage) => {
                damage::inflict(&mut image, damage, rng)?;
                damage::mark(&mut image, header::DIRTY);
            }
            Tool::Grow(_, less) => {
                Wreck::of(&mut image)?.fill_rest_of_l1();
                content.truncate(content.len() - less);
                word::set(&mut image, header::SIZE_OFFSET as usize, sector_bytes(content.len()));
            }
            Tool::Create(_, is_on_device) => {
                let more = if is_on_device { DEVICE_ROOM * content.len() } else { 0 };
                image.extend(stamps(INITIAL, 0..more).flat_map(Value::bytes));
                content.fill(Value::Zero);
            }
        }
        let old_sectors = content.len();
        if let Tool::Grow(more, _) = tool {
            content.resize(old_sectors + more, Value::Zero);
        }
        let memo = Memo::default();
        let readings = match tool {
            Tool::Repair(repair, _) => {
                let repaired = repaired(&image, repair)?;
                let read =
                    |bytes: &[u8]| oracle::read(bytes, fixture.backing.as_deref(), content.len(), &memo);
                [read(&image)?, read(&repaired)?]
            }
            _ => [Vec::new(), Vec::new()],
        };
        let standing = Standing::of(&image)?;
        Ok(Self {
            fixture,
            tool,
            image,
            old_sectors,
            model: Model::new(&content),
            readings,
            standing,
            memo,
            attempt: Attempt::First,
        })
    }

    /// Whether the image cannot grow. Bitmaps would become stale. Snapshots of version 2 could not say how long
    /// they are; and what a backing file has in the new part would show, as there are no zero clusters to hide it.
    fn must_refuse(&self) -> bool {
        let fixture = self.fixture;
        let backing = fixture.backing.as_ref().map_or(0, |bytes| bytes.len() / SECTOR);
        let end = self.old_sectors.next_multiple_of(fixture.variant.cluster_sectors);
        let is_v2 = fixture.variant.compat == "0.10";
        matches!(self.tool, Tool::Grow(..))
            && (fixture.has_bitmaps()
                || is_v2 && (fixture.initial.is_shared() || backing.min(self.model.len()) > end))
    }

    /// Lets the tool work, and tries every crash state of every moment.
    fn drive(
        &self,
        disk: &Disk,
        rng: &mut Rng,
        case: &Case,
        totals: &mut Totals,
    ) -> Result<crate::Result<()>, String> {
        let mut future = self.start(disk, case);
        let mut context = Context::from_waker(Waker::noop());
        let mut version = u64::MAX;
        // What another case has left may be the same bytes, and is judged by other rules.
        let mut judged = HashSet::new();
        for _ in 0..MAX_OPERATIONS {
            // A part of it may wake another.
            let outcome = (0..8).find_map(|_| match future.as_mut().poll(&mut context) {
                Poll::Ready(outcome) => Some(outcome),
                Poll::Pending => None,
            });
            if std::mem::replace(&mut version, disk.version()) != disk.version() {
                disk.look(0, |file, in_flight| self.crash_here(file, in_flight, rng, totals, &mut judged))?;
            }
            if let Some(outcome) = outcome {
                return Ok(outcome);
            }
            match disk.waiting() as u64 {
                0 => return Err("it hangs".to_owned()),
                waiting => disk.complete(rng.below(waiting) as usize),
            }
            totals.operations += 1;
        }
        Err("it does not end".to_owned())
    }

    fn start<'f>(&self, disk: &Disk, case: &Case) -> Pin<Box<dyn Future<Output = crate::Result<()>> + 'f>> {
        let names = disk.names(&self.fixture.names());
        let (disk, tool, disabled) = (disk.clone(), self.tool, case.disabled);
        let options = self.create_options();
        let new_size = sector_bytes(self.model.len());
        Box::pin(async move {
            let path = Path::new(IMAGE);
            match tool {
                Tool::Repair(repair, _) => {
                    let options = CheckOptions { repair, ..CheckOptions::default() };
                    check(&disk, &names, path, options).await.map(drop)
                }
                Tool::OpenDirty(_) => Image::open(&disk, &names, path, &open_options()).await.map(drop),
                Tool::Grow(..) => {
                    let prepare =
                        |image: &Image| disabled.into_iter().for_each(|rule| image.disable_rule(rule));
                    grow::grow_to(&disk, &names, path, &open_options(), |_| new_size, prepare).await
                }
                Tool::Create(preallocation, _) => {
                    create::create(&disk, &names, path, &options, preallocation).await
                }
            }
        })
    }

    fn create_options(&self) -> CreateOptions {
        let variant = &self.fixture.variant;
        CreateOptions {
            virtual_size: sector_bytes(self.model.len()),
            cluster_bits: (variant.cluster_sectors * SECTOR).ilog2(),
            refcount_order: variant.refcount_bits.ilog2(),
            ..CreateOptions::default()
        }
    }

    fn crash_here(
        &self,
        file: &mut File,
        in_flight: Vec<Change>,
        rng: &mut Rng,
        totals: &mut Totals,
        judged: &mut HashSet<u64>,
    ) -> Result<(), String> {
        states::for_each(file, in_flight, rng, |crashed| {
            totals.states += 1;
            totals.images.insert(crashed.hash);
            if judged.insert(crashed.hash) { self.judge(crashed.bytes) } else { Ok(()) }
        })
    }

    /// Judges what a crash has left while the tool was at work.
    fn judge(&self, bytes: &[u8]) -> Result<(), String> {
        let is_repair = matches!(self.tool, Tool::Repair(..) | Tool::OpenDirty(_));
        if is_repair && has_unknown_bits(bytes) && bytes.get(SECTOR..) != self.image.get(SECTOR..) {
            return Err("it was changed, and says by a bit that nobody knows that it was not".to_owned());
        }
        match self.tool {
            Tool::Repair(repair, _) => {
                self.compare(bytes)?;
                Standing::of(bytes)?.check_no_worse(&self.standing)?;
                if self.is_marked(&self.image) && !self.is_marked(bytes) {
                    has_no_corruption(bytes)
                        .map_err(|error| format!("it says no more that something is wrong: {error}"))?;
                }
                let next = repaired(bytes, repair)?;
                self.compare(&next).map_err(|error| format!("after the next repair {error}"))?;
                self.judge_end(&next).map_err(|error| format!("after the next repair {error}"))?;
                self.cut_again(bytes).map_err(|error| format!("the next repair was cut short, too: {error}"))
            }
            Tool::OpenDirty(_) => {
                let next = self.opened(bytes)?;
                let verdict = self.judge_end(&next).and_then(|()| is_clean(&next));
                verdict.map_err(|error| format!("after the next opening {error}"))
            }
            Tool::Grow(..) => self.sound(bytes, &self.model).map(drop),
            Tool::Create(..) => {
                let new = match self.sound(bytes, &self.model) {
                    Ok(_) => return Ok(()),
                    Err(error) => error,
                };
                let is_image = qcow2_format::Header::decode(bytes, bytes.len() as u64).is_ok();
                if !is_image || bytes == self.image { Ok(()) } else { Err(format!("half an image: {new}")) }
            }
        }
    }

    /// Whether an image says that something may be wrong. Version 2 cannot.
    fn is_marked(&self, image: &[u8]) -> bool {
        self.fixture.variant.compat == "1.1" && damage::is_marked(image)
    }

    /// The next repair crashes as well, now and then; the one after it must come to its end all the same.
    fn cut_again(&self, bytes: &[u8]) -> Result<(), String> {
        let hash = Contents::new(bytes.to_vec()).hash();
        if self.attempt == Attempt::Second || !hash.is_multiple_of(SECOND_CHANCE) {
            return Ok(());
        }
        let next = Work {
            fixture: self.fixture,
            tool: self.tool,
            image: bytes.to_vec(),
            old_sectors: self.old_sectors,
            model: self.model.clone(),
            readings: self.readings.clone(),
            standing: Standing::of(bytes)?,
            memo: Memo::default(),
            attempt: Attempt::Second,
        };
        let disk = self.fixture.disk(bytes);
        let case = Case {
            work: case::Work::Tool(self.tool),
            seed: hash,
            held_back: HeldBack::Nothing,
            fault: None,
            fills_after: None,
            file_system: FileSystem::ABLE,
            paging: crate::Paging::default(),
            is_one_lane: false,
            logged: 0,
            abandons_after: None,
            wound: None,
            disabled: None,
        };
        let ended = next.drive(&disk, &mut Rng::new(hash), &case, &mut Totals::default())?;
        ended.map_err(|error| error.to_string())
    }

    /// Judges what the tool leaves when it has ended.
    fn judge_end(&self, bytes: &[u8]) -> Result<(), String> {
        let may_leak = matches!(self.tool, Tool::Grow(..)) && self.fixture.past.leaks();
        match self.tool {
            // What was lost is zero now, or what the backing file has: the content is not the fixture's.
            Tool::Repair(_, damage) if damage.hits_entries() => {
                if self.is_marked(bytes) {
                    Err("it still says that something is wrong".to_owned())
                } else {
                    is_clean(bytes)
                }
            }
            _ => match self.sound(bytes, &self.model)?.leaks {
                leaks if leaks > 0 && !may_leak => Err(format!("{leaks} leaks are left")),
                _ => Ok(()),
            },
        }
    }

    fn sound(&self, bytes: &[u8], model: &Model) -> Result<oracle::Findings, String> {
        let (old, new) = (sector_bytes(self.old_sectors), sector_bytes(model.len()));
        let case = oracle::Case {
            model,
            sizes: [old, new],
            backing: self.fixture.backing.as_deref().filter(|_| !matches!(self.tool, Tool::Create(..))),
            snapshots: if matches!(self.tool, Tool::Create(..)) { &[] } else { &self.fixture.snapshots },
            initial: &self.fixture.content,
            memo: &self.memo,
        };
        oracle::judge(bytes, &case)
    }

    /// Whether each sector reads as it did before the repair, or as it will after it.
    fn compare(&self, bytes: &[u8]) -> Result<(), String> {
        let [before, after] = &self.readings;
        let now = oracle::read(bytes, self.fixture.backing.as_deref(), self.model.len(), &self.memo)?;
        let expected = before.iter().zip(after);
        match now.iter().zip(expected).position(|(now, (before, after))| now != before && now != after) {
            Some(at) if now.len() == before.len() => Err(format!(
                "sector {at} reads as {:?}, which was {:?} and is to be {:?}",
                now[at], before[at], after[at]
            )),
            None if now.len() == before.len() => Ok(()),
            _ => Err("there are more snapshots, or fewer".to_owned()),
        }
    }

    /// What opening for writing makes of an image.
    fn opened(&self, bytes: &[u8]) -> Result<Vec<u8>, String> {
        let files = MemFiles::default();
        files.put(IMAGE, bytes.to_vec());
        self.fixture.below.iter().for_each(|file| files.put(file.name, file.bytes.clone()));
        run_at_once(Image::open(&files, &files, Path::new(IMAGE), &open_options()))
            .map_err(|error: Error| format!("it does not open: {error}"))?;
        files.get(IMAGE).ok_or_else(|| "no file".to_owned())
    }
}

/// Whether an image has autoclear bits that nobody knows.
fn has_unknown_bits(image: &[u8]) -> bool {
    let header = qcow2_format::Header::decode(image, image.len() as u64);
    header.is_ok_and(|header| header.autoclear & !header::KNOWN_AUTOCLEAR != 0)
}

fn open_options() -> OpenOptions {
    OpenOptions { cache_bytes: 0, ..OpenOptions::default() }
}

fn checked(files: &MemFiles, repair: Repair) -> Result<crate::CheckReport, String> {
    let options = CheckOptions { repair, ..CheckOptions::default() };
    run_at_once(check(files, files, Path::new(IMAGE), options)).map_err(|error| error.to_string())
}

/// What a whole repair makes of an image.
fn repaired(bytes: &[u8], repair: Repair) -> Result<Vec<u8>, String> {
    let files = MemFiles::default();
    files.put(IMAGE, bytes.to_vec());
    let report = checked(&files, repair)?;
    match report.remaining.list.first() {
        Some(finding) => Err(format!("repair leaves: {finding} ({:?})", report.refused)),
        None => files.get(IMAGE).ok_or_else(|| "no file".to_owned()),
    }
}

fn found(bytes: &[u8]) -> Result<crate::check::Findings, String> {
    let files = MemFiles::default();
    files.put(IMAGE, bytes.to_vec());
    Ok(checked(&files, Repair::None)?.found)
}

fn is_clean(bytes: &[u8]) -> Result<(), String> {
    found(bytes)?.list.first().map_or(Ok(()), |finding| Err(finding.to_string()))
}

/// What could not be read for a moment may have leaked.
fn has_no_corruption(bytes: &[u8]) -> Result<(), String> {
    match found(bytes)? {
        found if found.corruptions == 0 => Ok(()),
        found => Err(format!("{:?}", found.list)),
    }
}
