//! A session as lines of shell for guest/bench.sh: how its images are made, and who is measured when.
//!
//! The order is the point: within a round every engine does a row before the next row begins, and the
//! engines' order is another one in each round, so that what drifts meets all alike.

use super::{
    DEVICE_DEPTH,
    kit::Kit,
    matrix::{Begins, Engine, Extent, Image, Mapped, Measure, Row, SETTLING_SECONDS, Session, Workload},
};
use crate::process::quote;
use std::fmt::Write;

/// Where fio's random numbers start.
pub(super) const SEED: u64 = 20_220_930;

/// How long one fio job lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Length {
    /// A number of requests; the same for every engine.
    Requests,
    /// In the first round fewer; in the second as many more than those as a row has. What a run costs beside its
    /// requests is not in the difference.
    Difference,
    Seconds(u32),
}

/// Everything that turns a row into lines.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub session: &'a Session,
    pub engines: &'a [Engine],
    pub rounds: u32,
    pub extent: Extent,
    pub length: Length,
    /// What was made on the host.
    pub kit: &'a Kit,
}

/// Seconds that a server has before a run for a difference: its look for leaks must be in both runs or in none.
const PAUSE_SECONDS: u32 = 5;

/// The disk that carries the file system with the image of 4 TiB.
pub(super) const HUGE_DISK: &str = "huge";
/// The image's name in it.
pub(super) const HUGE_FILE: &str = "mapped-4TiB.qcow2";

impl Plan<'_> {
    /// The whole session, to be appended to guest/bench.sh.
    pub(super) fn script(&self) -> String {
        let mut lines = String::new();
        lines += &if self.session.is_huge() {
            format!("storage \"$DISK_{HUGE_DISK}\"\n")
        } else {
            "storage\n".into()
        };
        let mut made: Vec<String> = Vec::new();
        for row in &self.session.rows {
            for engine in self.served(row) {
                let file = self.file(row.image, engine);
                if !made.contains(&file.name) {
                    file.make.iter().for_each(|command| image_line(&mut lines, command));
                    made.push(file.name);
                }
            }
        }
        for round in 1..=self.rounds {
            for row in &self.session.rows {
                for engine in turn(self.engines, round).filter(|engine| row.image.excludes(*engine).is_none())
                {
                    self.measurement(&mut lines, round, engine, row);
                }
            }
        }
        lines
    }

    /// How many measurements the script makes.
    pub(super) fn measurements(&self) -> usize {
        self.session.rows.iter().map(|row| self.served(row).count()).sum::<usize>() * self.rounds as usize
    }

    fn served(&self, row: &Row) -> impl Iterator<Item = Engine> {
        let image = row.image;
        self.engines.iter().copied().filter(move |engine| image.excludes(*engine).is_none())
    }

    fn measurement(&self, lines: &mut String, round: u32, engine: Engine, row: &Row) {
        let file = self.file(row.image, engine);
        if row.spoils_image()
            && let Some(last) = file.make.last()
        {
            image_line(lines, last);
        }
        let (verb, options) = match row.measure {
            Measure::Speed(workload) => {
                let warm = if row.spoils_image() { 0 } else { self.warm_up(workload) };
                let settling = match workload.begins {
                    Begins::AtOnce if self.length == Length::Difference => PAUSE_SECONDS,
                    Begins::AtOnce => 0,
                    Begins::Settled => SETTLING_SECONDS,
                };
                ("speed", format!(" {settling} {warm}{}", self.fio(row.image, workload, round)))
            }
            Measure::Attach => ("attach_time", String::new()),
            Measure::Memory(load) => {
                ("memory", load.map_or_else(String::new, |workload| self.fio(row.image, workload, round)))
            }
        };
        let _ = writeln!(lines, "{verb} {round} {} {} {}{options}", engine.name(), file_part(row), file.name);
    }

    fn fio(&self, image: Image, workload: Workload, round: u32) -> String {
        let Workload { pattern, block_kib, depth, jobs, fsync_every, begins: _ } = workload;
        let mut options = format!(
            " --rw={} --bs={block_kib}k --iodepth={depth} --numjobs={jobs} --randseed={SEED}",
            pattern.name()
        );
        if let Some(every) = fsync_every {
            let _ = write!(options, " --fsync={every}");
        }
        if jobs > 1 && pattern.is_sequential() {
            let _ = write!(options, " --offset_increment={}%", 100 / jobs);
        }
        let whole = self.requests(image, workload);
        let fewer = whole * 2 / 5;
        let requests = match self.length {
            Length::Requests => whole,
            Length::Difference if round == 1 => fewer,
            Length::Difference => fewer + whole,
            Length::Seconds(seconds) => {
                let _ = write!(options, " --time_based --runtime={seconds}");
                return options;
            }
        };
        let _ = write!(options, " --number_ios={}", requests / jobs);
        options
    }

    /// Requests that do not count, of each job: together five for each buffer of a queue, so that nearly every one has
    /// been written to as well as read from. Of small requests the first touch of memory is too small a part to matter,
    /// but where every instruction is told apart.
    fn warm_up(&self, workload: Workload) -> u32 {
        let is_needed = workload.block_kib >= 512 || self.length == Length::Difference;
        if is_needed { 5 * DEVICE_DEPTH / workload.jobs } else { 0 }
    }

    /// Enough that fio's clock of milliseconds tells 1 % in count mode.
    fn requests(&self, image: Image, workload: Workload) -> u32 {
        let Workload { pattern, block_kib, depth, fsync_every, .. } = workload;
        let allocates = pattern.writes() && image != Image::Preallocated;
        let full = match block_kib {
            1024 => 200,
            512 => 400,
            _ if fsync_every == Some(1) || depth == 1 => 4000,
            _ if allocates || fsync_every.is_some() => 8000,
            _ => 10000,
        };
        match self.extent {
            Extent::Full if matches!(image, Image::Compressed(_)) => full / 2, // a smaller image, and dear requests
            // Of fewer large ones the first touches of memory that are left would decide.
            Extent::Quick if block_kib < 512 => full / 2,
            Extent::Full | Extent::Quick => full,
        }
    }

    /// The file that `engine` serves for `image`.
    fn file(&self, image: Image, engine: Engine) -> ImageFile {
        let mib = self.extent.image_mib();
        if engine.reads_qcow2() { self.qcow2(image, mib) } else { raw(image, mib) }
    }

    fn qcow2(&self, image: Image, mib: u32) -> ImageFile {
        let full = || format!("qemu-img create -q -f qcow2 -o preallocation=full preallocated.qcow2 {mib}M");
        // Without a look at the files below, whose number would count twice.
        let overlay = |name: &str, on: &str| {
            format!("rm -f {name}; qemu-img create -q -u -f qcow2 -b {on} -F qcow2 {name} {mib}M")
        };
        match image {
            Image::Preallocated | Image::Chain(..=1) => ImageFile::new("preallocated.qcow2", vec![full()]),
            Image::Empty => ImageFile::new(
                "empty.qcow2",
                vec![format!("rm -f empty.qcow2; qemu-img create -q -f qcow2 empty.qcow2 {mib}M")],
            ),
            Image::Compressed(how) => {
                let (name, disk) = (format!("{}.qcow2", image.name()), how.name());
                let bytes = self.kit.compressed_bytes(image);
                let copy = format!("rm -f {name}; head -c {bytes} \"$DISK_{disk}\" >{name}");
                ImageFile::new(&name, vec![copy])
            }
            Image::Backed => {
                ImageFile::new("backed.qcow2", vec![full(), overlay("backed.qcow2", "preallocated.qcow2")])
            }
            Image::Chain(depth) => {
                let name = |level: u32| {
                    if level == 1 {
                        "preallocated.qcow2".to_owned()
                    } else {
                        format!("of{depth}-{level}.qcow2")
                    }
                };
                let overlays = (2..=depth).map(|level| overlay(&name(level), &name(level - 1)));
                ImageFile::new(&name(depth), [full()].into_iter().chain(overlays).collect())
            }
            Image::Mapped(Mapped::FourTiB) => ImageFile::new(HUGE_FILE, vec![]), // came with the file system
            Image::Mapped(which) => {
                let clusters = if which == Mapped::FourTiBLargeClusters { ",cluster_size=2M" } else { "" };
                let name = format!("{}.qcow2", image.name());
                let make = format!(
                    "qemu-img create -q -f qcow2 -o preallocation=metadata{clusters} {name} {}",
                    which.size()
                );
                ImageFile::new(&name, vec![make])
            }
            Image::Largest => {
                ImageFile::new("64TiB.qcow2", vec!["qemu-img create -q -f qcow2 64TiB.qcow2 64T".into()])
            }
        }
    }
}

/// What is served, and the commands that make it; the last of them alone makes it anew.
struct ImageFile {
    name: String,
    make: Vec<String>,
}

impl ImageFile {
    fn new(name: &str, make: Vec<String>) -> Self {
        Self { name: name.to_owned(), make }
    }
}

/// The raw file beside `image`: written where that is, with holes where that has none or only metadata.
fn raw(image: Image, mib: u32) -> ImageFile {
    let sparse = |name: &str, size: &str| {
        // A guest's truncate may know no terabytes.
        ImageFile::new(name, vec![format!("rm -f {name}; qemu-img create -q -f raw {name} {size}")])
    };
    match image {
        Image::Empty => sparse("empty.raw", &format!("{mib}M")),
        Image::Mapped(which) => sparse(&format!("{}.raw", image.name()), which.size()),
        _ => ImageFile::new(
            "preallocated.raw",
            vec![format!("dd if=/dev/zero of=preallocated.raw bs=1M count={mib} oflag=direct 2>/dev/null")],
        ),
    }
}

fn image_line(lines: &mut String, command: &str) {
    let _ = writeln!(lines, "image {}", quote(command));
}

/// A row's name as a part of a file name.
pub(super) fn file_part(row: &Row) -> String {
    row.name().replace('/', "+")
}

/// The engines in the order of `round`: rotated, and backwards in every second round.
fn turn(engines: &[Engine], round: u32) -> impl Iterator<Item = Engine> {
    let mut order = engines.to_vec();
    let by = (round as usize - 1) % order.len().max(1);
    order.rotate_left(by);
    if round.is_multiple_of(2) {
        order.reverse();
    }
    order.into_iter()
}

#[cfg(test)]
mod tests {
    use super::{super::matrix::sessions, *};

    fn script(filter: &str, rounds: u32) -> Vec<String> {
        script_of(filter, rounds, Length::Requests)
    }

    fn script_of(filter: &str, rounds: u32, length: Length) -> Vec<String> {
        let sessions = sessions(Extent::Full, &[filter.to_owned()]);
        let plan = Plan {
            session: &sessions[0],
            engines: &Engine::ALL,
            rounds,
            extent: Extent::Full,
            length,
            kit: &Kit::default(),
        };
        plan.script().lines().map(str::to_owned).collect()
    }

    #[test]
    fn every_engine_does_a_row_in_every_round_and_in_another_place() {
        let lines = script("preallocated/randread-4k/qd64/1job", 5);
        let order = |round: u32| -> Vec<String> {
            let start = format!("speed {round} ");
            let runs = lines.iter().filter_map(|line| line.strip_prefix(&start));
            runs.filter_map(|line| line.split(' ').next().map(str::to_owned)).collect()
        };
        for engine in Engine::ALL {
            let mut places: Vec<_> = (1..=5)
                .filter_map(|round| order(round).iter().position(|name| name == engine.name()))
                .collect();
            assert_eq!(places.len(), 5);
            places.sort_unstable();
            places.dedup();
            assert!(places.len() >= 3, "{} is always in the same places {places:?}", engine.name());
        }
    }

    #[test]
    fn an_image_that_a_run_spoils_is_made_anew_before_each() {
        let lines = script("empty/randwrite-4k/qd64/1job", 1);
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| line.starts_with("speed")) {
            assert!(lines[at - 1].starts_with("image "), "{line} after {}", lines[at - 1]);
        }
        let kept = script("preallocated/randwrite-4k/qd64/1job", 1);
        assert_eq!(kept.iter().filter(|line| line.starts_with("image ")).count(), 2, "qcow2 and raw, once");
    }

    #[test]
    fn a_chain_is_made_from_its_base_up() {
        let lines = script("chain-8/", 1);
        let made: Vec<_> = lines.iter().filter(|line| line.contains("-b ")).collect();
        assert_eq!(made.len(), 7);
        assert!(made[0].contains("-b preallocated.qcow2") && made[6].contains("-b of8-7.qcow2"));
        assert!(lines.iter().any(|line| line.contains("chain-8+randread-4k+qd64+1job of8-8.qcow2")));
    }

    #[test]
    fn jobs_share_the_requests() {
        let lines = script("preallocated/rw-512k/qd64/4jobs", 1);
        let run = lines.iter().find(|line| line.starts_with("speed")).unwrap();
        assert!(run.contains("--number_ios=100") && run.contains("--offset_increment=25%"), "{run}");
        assert!(run.contains("preallocated.qcow2 0 160 --rw"), "large requests are warmed up: {run}");
    }

    #[test]
    fn a_profile_is_of_two_runs_whose_difference_is_a_row() {
        let speeds = |filter: &str| -> Vec<String> {
            let lines = script_of(filter, 2, Length::Difference);
            lines
                .into_iter()
                .filter(|line| line.starts_with("speed") && line.contains(" ublk-qcow2 "))
                .collect()
        };
        let [few, many] = &speeds("preallocated/randread-4k/qd64/1job")[..] else { panic!("two runs") };
        assert!(few.contains(" 5 640 --rw=randread") && few.ends_with("--number_ios=4000"), "{few}");
        assert!(many.contains(" 5 640 --rw=randread") && many.ends_with("--number_ios=14000"), "{many}");
        let [few, many] = &speeds("empty/randwrite-4k/qd64/4jobs")[..] else { panic!("two runs") };
        assert!(few.contains(" 5 0 --rw=randwrite") && few.ends_with("--number_ios=800"), "{few}");
        assert!(many.ends_with("--number_ios=2800"), "{many}");
    }

    #[test]
    fn every_engine_has_time_to_settle_where_the_row_says_so() {
        let lines = script("mapped-1GiB/", 1);
        let speed = |settled: bool| {
            lines.iter().filter(move |line| line.starts_with("speed") && line.contains("-settled") == settled)
        };
        assert_eq!((speed(true).count(), speed(false).count()), (5, 5));
        assert!(speed(true).all(|line| line.contains(&format!(" {SETTLING_SECONDS} 0 --rw=randread"))));
        assert!(speed(false).all(|line| line.contains(" 0 0 --rw=randread")));
    }
}
