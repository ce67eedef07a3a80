//! What is measured, as plain data: engines, images, workloads, and the table of rows that they make.
//!
//! A row is one line of the report: one image, one thing to measure, every engine. Rows that belong to one
//! session are measured in one boot of the machine, interleaved round by round, so every figure of a session
//! may be held against every other. Knows nothing of shells (`plan`) nor of results (`document`).

use std::fmt;

/// Who serves the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(super) enum Engine {
    QemuNbd,
    RublkQcow2,
    /// The ublk driver on a raw file: the limit of what copying can reach.
    RublkLoop,
    KernelLoop,
    #[value(skip)] // nobody is held against himself
    Us,
}

impl Engine {
    pub(super) const ALL: [Self; 5] =
        [Self::QemuNbd, Self::RublkQcow2, Self::RublkLoop, Self::KernelLoop, Self::Us];

    /// The name in reports and in guest/bench.sh.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::QemuNbd => "qemu-nbd",
            Self::RublkQcow2 => "rublk-qcow2",
            Self::RublkLoop => "rublk-loop",
            Self::KernelLoop => "kernel-loop",
            Self::Us => "ublk-qcow2",
        }
    }

    /// Whether it is rublk's, which has to be built first.
    pub(super) const fn is_rublk(self) -> bool {
        matches!(self, Self::RublkQcow2 | Self::RublkLoop)
    }

    pub(super) const fn reads_qcow2(self) -> bool {
        !matches!(self, Self::RublkLoop | Self::KernelLoop)
    }
}

/// How much of the table is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    Quick,
    Full,
}

impl Extent {
    /// The size of images whose name does not say it. Writing them takes an emulated machine longer than
    /// booting.
    pub(super) const fn image_mib(self) -> u32 {
        match self {
            Self::Quick => 128,
            Self::Full => 256,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Zlib,
    Zstd,
}

impl Compression {
    pub(super) const ALL: [Self; 2] = [Self::Zlib, Self::Zstd];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// An image that is mapped from its first byte to its last, whose data clusters are holes of the file: only
/// so do terabytes fit into a guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mapped {
    OneGiB,
    HundredGiB,
    /// 512 MiB of L2 tables: made on the host and brought along.
    FourTiB,
    /// The same with clusters of 2 MiB: 16 MiB of L2 tables.
    FourTiBLargeClusters,
}

impl Mapped {
    const ALL: [Self; 4] = [Self::OneGiB, Self::HundredGiB, Self::FourTiB, Self::FourTiBLargeClusters];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::OneGiB => "1GiB",
            Self::HundredGiB => "100GiB",
            Self::FourTiB => "4TiB",
            Self::FourTiBLargeClusters => "4TiB-2MiB-clusters",
        }
    }

    /// The size as qemu-img takes it.
    pub(super) const fn size(self) -> &'static str {
        match self {
            Self::OneGiB => "1G",
            Self::HundredGiB => "100G",
            Self::FourTiB | Self::FourTiBLargeClusters => "4T",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Image {
    /// Every cluster allocated and written.
    Preallocated,
    /// No cluster allocated.
    Empty,
    Compressed(Compression),
    /// An empty overlay on a written raw file.
    Backed,
    /// This many files, all data in the lowest.
    Chain(u32),
    Mapped(Mapped),
    /// Empty, of the largest size that 64 KiB clusters reach with QEMU's limits.
    Largest,
}

impl Image {
    pub(super) fn name(self) -> String {
        match self {
            Self::Preallocated => "preallocated".into(),
            Self::Empty => "empty".into(),
            Self::Compressed(how) => format!("compressed-{}", how.name()),
            Self::Backed => "backed".into(),
            Self::Chain(depth) => format!("chain-{depth}"),
            Self::Mapped(which) => format!("mapped-{}", which.name()),
            Self::Largest => "64TiB".into(),
        }
    }

    /// Why `engine` has no part in this image's rows, if it has none.
    pub(super) const fn excludes(self, engine: Engine) -> Option<&'static str> {
        match self {
            _ if engine.reads_qcow2() => None,
            Self::Preallocated | Self::Empty | Self::Mapped(_) => None,
            Self::Compressed(_) => Some("a raw file is not compressed"),
            Self::Backed | Self::Chain(_) => Some("a raw file has no backing file"),
            Self::Largest => Some("ext4 holds no raw file of this size"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pattern {
    RandRead,
    RandWrite,
    RandRw,
    Read,
    Write,
    Rw,
}

impl Pattern {
    /// The name, also fio's.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::RandRead => "randread",
            Self::RandWrite => "randwrite",
            Self::RandRw => "randrw",
            Self::Read => "read",
            Self::Write => "write",
            Self::Rw => "rw",
        }
    }

    pub(super) const fn writes(self) -> bool {
        !matches!(self, Self::RandRead | Self::Read)
    }

    pub(super) const fn is_sequential(self) -> bool {
        matches!(self, Self::Read | Self::Write | Self::Rw)
    }
}

/// One fio job, or several alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Workload {
    pub pattern: Pattern,
    pub block_kib: u32,
    pub depth: u32,
    pub jobs: u32,
    /// One fsync per so many writes.
    pub fsync_every: Option<u32>,
    /// When, after the engine has attached the image.
    pub begins: Begins,
}

/// When a workload begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begins {
    AtOnce,
    /// After [`SETTLING_SECONDS`] without a request.
    Settled,
}

/// Seconds in which an engine may do what it does in the background with an image that it has just attached: for the
/// mapping of 4 TiB ours takes half of that in count mode, where time without work costs nothing.
pub(super) const SETTLING_SECONDS: u32 = 600;

impl Workload {
    const fn new(pattern: Pattern, block_kib: u32) -> Self {
        Self { pattern, block_kib, depth: 64, jobs: 1, fsync_every: None, begins: Begins::AtOnce }
    }

    fn name(self) -> String {
        let block = if self.block_kib >= 1024 {
            format!("{}m", self.block_kib / 1024)
        } else {
            format!("{}k", self.block_kib)
        };
        let jobs = if self.jobs == 1 { "1job".into() } else { format!("{}jobs", self.jobs) };
        let fsync = self.fsync_every.map_or_else(String::new, |every| format!("-fsync{every}"));
        let settled = if self.begins == Begins::Settled { "-settled" } else { "" };
        format!("{}-{block}{fsync}{settled}/qd{}/{jobs}", self.pattern.name(), self.depth)
    }
}

/// What a row's figure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Measure {
    /// Requests per second.
    Speed(Workload),
    /// From the command's start to the end of the first read.
    Attach,
    /// Resident memory of the serving processes before any request (None), or the peak after this workload.
    Memory(Option<Workload>),
}

/// What is measured in one boot of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Session {
    pub name: String,
    pub rows: Vec<Row>,
}

impl Session {
    /// Whether its storage begins as a copy of the file system that holds the image of 4 TiB.
    pub(super) fn is_huge(&self) -> bool {
        self.rows.iter().any(|row| row.image == Image::Mapped(Mapped::FourTiB))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    pub image: Image,
    pub measure: Measure,
}

impl Row {
    const fn speed(image: Image, workload: Workload) -> Self {
        Self { image, measure: Measure::Speed(workload) }
    }

    /// The name by which filters, files and reports know the row.
    pub(super) fn name(&self) -> String {
        let image = self.image.name();
        match self.measure {
            Measure::Speed(workload) => format!("{image}/{}", workload.name()),
            Measure::Attach => format!("attach/{image}"),
            Measure::Memory(None) => format!("memory/{image}/idle"),
            Measure::Memory(Some(workload)) => format!("memory/{image}/{}", workload.name()),
        }
    }

    /// Whether a measurement leaves the image other than it was.
    pub(super) fn spoils_image(&self) -> bool {
        match self.measure {
            Measure::Speed(workload) | Measure::Memory(Some(workload)) => {
                workload.pattern.writes() && self.image != Image::Preallocated
            }
            Measure::Attach | Measure::Memory(None) => false,
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// The sessions of `extent`, those that decide most first. Filters keep the rows whose name one of them is a part of.
pub(super) fn sessions(extent: Extent, filters: &[String]) -> Vec<Session> {
    chosen(extent, |name| filters.is_empty() || filters.iter().any(|part| name.contains(part)))
}

/// The sessions with the rows whose names are wanted, and those that such a row is held against.
pub(super) fn chosen(extent: Extent, is_wanted: impl Fn(&str) -> bool) -> Vec<Session> {
    let mut sessions = match extent {
        Extent::Quick => quick(),
        Extent::Full => full(),
    };
    for session in &mut sessions {
        let wanted = |row: &Row| is_wanted(&row.name());
        let references: Vec<_> =
            session.rows.iter().filter(|row| wanted(row)).filter_map(reference).collect();
        session.rows.retain(|row| wanted(row) || references.contains(row));
    }
    sessions.retain(|session| !session.rows.is_empty());
    join(sessions)
}

/// Sessions with few rows become one: a boot, and making the images, takes as long as a dozen measurements.
fn join(sessions: Vec<Session>) -> Vec<Session> {
    /// The images of more rows than these would not fit into the machine's memory, nor a lost boot into
    /// anyone's patience.
    const MOST_ROWS: usize = 12;
    let mut joined: Vec<Session> = Vec::new();
    for session in sessions {
        match joined.last_mut() {
            Some(last)
                if last.rows.len() + session.rows.len() <= MOST_ROWS
                    && !last.is_huge()
                    && !session.is_huge() =>
            {
                last.name = format!("{} + {}", last.name, session.name);
                last.rows.extend(session.rows);
            }
            _ => joined.push(session),
        }
    }
    joined
}

/// All rows, in the order of the report.
pub(super) fn rows() -> Vec<Row> {
    full().into_iter().flat_map(|session| session.rows).collect()
}

/// The row of the same session that a target holds this one against, in our own figures.
pub(super) fn reference(row: &Row) -> Option<Row> {
    let image = match row.image {
        Image::Chain(2..) => Image::Chain(1),
        Image::Mapped(which) if which != Mapped::OneGiB => Image::Mapped(Mapped::OneGiB),
        _ => return None,
    };
    matches!(row.measure, Measure::Speed(_)).then_some(Row { image, ..*row })
}

/// The workloads of the targets, and what each kind of image is best known by.
fn quick() -> Vec<Session> {
    use Pattern::{RandRead, RandRw, RandWrite, Rw};
    let random = [RandRead, RandWrite, RandRw].map(|pattern| Workload::new(pattern, 4));
    let preallocated = random.into_iter().chain([Workload::new(Rw, 512)]);
    let mut rows: Vec<_> = preallocated.map(|workload| Row::speed(Image::Preallocated, workload)).collect();
    rows.push(Row::speed(Image::Empty, random[1]));
    vec![Session { name: "quick".into(), rows }]
}

fn full() -> Vec<Session> {
    const FSYNC: [u32; 2] = [1, 16];
    const CHAINS: [u32; 3] = [1, 8, 32];
    let random_read = Workload::new(Pattern::RandRead, 4);
    let random_write = Workload::new(Pattern::RandWrite, 4);

    let grid = |image: Image, depth: u32, jobs: u32| Session {
        name: format!("{}, queue depth {depth}, {jobs} job(s)", image.name()),
        rows: basic().map(|workload| Row::speed(image, Workload { depth, jobs, ..workload })).collect(),
    };
    let mut sessions = vec![grid(Image::Preallocated, 64, 1)];
    let fsync = [Image::Preallocated, Image::Empty].into_iter().flat_map(|image| {
        FSYNC.map(|every| Row::speed(image, Workload { fsync_every: Some(every), ..random_write }))
    });
    sessions.push(Session { name: "fsync".into(), rows: fsync.collect() });
    let chains = CHAINS.map(|depth| Row::speed(Image::Chain(depth), random_read));
    sessions.push(Session { name: "chains".into(), rows: chains.into() });
    let sizes = Mapped::ALL.map(|which| Row::speed(Image::Mapped(which), random_read));
    sessions.push(Session { name: "sizes".into(), rows: sizes.into() });
    let settled = Workload { begins: Begins::Settled, ..random_read };
    let settled = [Mapped::OneGiB, Mapped::FourTiB].map(|which| Row::speed(Image::Mapped(which), settled));
    sessions.push(Session { name: "settled".into(), rows: settled.into() });
    let attach = [Image::Preallocated, Image::Largest, Image::Chain(32)];
    sessions.push(Session {
        name: "attach".into(),
        rows: attach.map(|image| Row { image, measure: Measure::Attach }).into(),
    });
    let busy = [Workload::new(Pattern::RandRw, 4), Workload::new(Pattern::Rw, 512)]
        .map(|workload| Some(Workload { depth: 128, ..workload }));
    let memory = [None].into_iter().chain(busy);
    sessions.push(Session {
        name: "memory".into(),
        rows: memory.map(|load| Row { image: Image::Preallocated, measure: Measure::Memory(load) }).collect(),
    });
    let others =
        || [Image::Empty].into_iter().chain(Compression::ALL.map(Image::Compressed)).chain([Image::Backed]);
    sessions.extend(others().map(|image| grid(image, 64, 1)));
    sessions.push(grid(Image::Preallocated, 1, 1));
    sessions.push(grid(Image::Preallocated, 64, 4));
    sessions.push(grid(Image::Preallocated, 1, 4));
    for (depth, jobs) in [(1, 1), (64, 4), (1, 4)] {
        sessions.extend(others().map(|image| grid(image, depth, jobs)));
    }
    sessions
}

/// The nine workloads of every grid.
fn basic() -> impl Iterator<Item = Workload> {
    use Pattern::{RandRead, RandRw, RandWrite, Read, Rw, Write};
    let random = [RandRead, RandWrite, RandRw].map(|pattern| Workload::new(pattern, 4));
    let large =
        [512, 1024].into_iter().flat_map(|kib| [Read, Write, Rw].map(|pattern| Workload::new(pattern, kib)));
    random.into_iter().chain(large)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_full_table_has_every_row_of_the_plan_once() {
        let rows = rows();
        let names: BTreeSet<_> = rows.iter().map(Row::name).collect();
        assert_eq!(names.len(), rows.len(), "no name twice");
        // 5 images × 9 workloads × 2 depths × 2 numbers of jobs, and the special ones.
        assert_eq!(rows.len(), 5 * 9 * 2 * 2 + 4 + 3 + 4 + 2 + 3 + 3);
        for name in [
            "preallocated/rw-512k/qd64/1job",
            "backed/randwrite-4k/qd1/4jobs",
            "empty/randwrite-4k-fsync16/qd64/1job",
            "chain-32/randread-4k/qd64/1job",
            "attach/64TiB",
            "memory/preallocated/idle",
        ] {
            assert!(names.contains(name), "{name} is missing from {names:?}");
        }
    }

    #[test]
    fn a_filter_keeps_what_a_row_is_held_against() {
        let kept = |filter: &str| -> Vec<String> {
            let filters = [filter.to_owned()];
            sessions(Extent::Full, &filters).iter().flat_map(|s| &s.rows).map(Row::name).collect()
        };
        assert_eq!(kept("chain-32/"), ["chain-1/randread-4k/qd64/1job", "chain-32/randread-4k/qd64/1job"]);
        assert_eq!(kept("attach/64"), ["attach/64TiB"]);
        assert!(kept("no such row").is_empty());
    }

    #[test]
    fn sessions_of_few_rows_share_a_boot() {
        let names = |filters: &[&str]| -> Vec<usize> {
            let filters: Vec<_> = filters.iter().map(|&part| part.to_owned()).collect();
            sessions(Extent::Full, &filters).iter().map(|session| session.rows.len()).collect()
        };
        assert_eq!(names(&["fsync", "attach/"]), [7]);
        assert_eq!(names(&["fsync", "mapped-4TiB/", "attach/"]), [4, 2, 2, 3], "the huge image stands alone");
        assert!(names(&[]).iter().all(|rows| *rows <= 12));
    }

    #[test]
    fn the_quick_rows_are_rows_of_the_full_table() {
        for row in quick().iter().flat_map(|session| &session.rows) {
            assert!(rows().contains(row), "{row}");
        }
    }
}
