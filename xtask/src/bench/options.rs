//! The command line of `cargo xtask bench`, and what follows from it.

use super::{
    gate,
    matrix::{Engine, Extent, Row},
    plan::Length,
    profile,
};
use crate::{kernel::Kernel, process::quote, vm::machine::Console, workspace};
use clap::Parser;
use std::path::PathBuf;

/// What a second is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Mode {
    /// A thousand million instructions of the whole machine
    Count,
    /// A second
    Wall,
}

impl Mode {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::Wall => "wall",
        }
    }
}

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The targets' workloads only, half the requests, few rounds; nothing is written unless --out or --json
    /// asks
    #[arg(long)]
    pub(super) quick: bool,
    /// The guest's kernel
    #[arg(long, value_enum, default_value = "6.12")]
    pub(super) kernel: Kernel,
    /// Count instructions, or measure time
    #[arg(long, value_enum, default_value = "count")]
    pub(super) mode: Mode,
    /// Rounds, each with every engine and workload [default: 5, quick: 1, gate: 2]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) rounds: Option<u32>,
    /// Only rows whose name contains this (can be repeated; --list shows the names)
    #[arg(long, value_name = "PART")]
    pub(super) filter: Vec<String>,
    /// Only rows that --out has nothing of yet
    #[arg(long, conflicts_with_all = ["filter", "quick", "report"])]
    pub(super) missing: bool,
    /// Show the rows that would be run
    #[arg(long)]
    pub(super) list: bool,
    /// Write nothing but the report of what is in --out already
    #[arg(long)]
    pub(super) report: bool,
    /// Where the results are kept: rows that are run replace those of before [default: docs/benchmarks]
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Write every figure of this run to this file
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Use this program instead of building ublk-qcow2
    #[arg(long, value_name = "FILE", conflicts_with = "peers_only")]
    pub(super) binary: Option<PathBuf>,
    /// Not the devices, but the engine alone, on this host: cargo bench -p benches
    #[arg(long, conflicts_with_all = [
        "quick", "filter", "missing", "list", "report", "rounds", "json", "binary", "peers_only",
    ])]
    pub(super) engine: bool,
    /// Measure the peers without us
    #[arg(long)]
    pub(super) peers_only: bool,
    /// Hold the targets' workloads against floors below which no change may bring them: on Linux 6.12, in count
    /// mode, against the peers that need no building; as `cargo xtask test` does
    #[arg(long, conflicts_with_all = [
        "filter", "missing", "list", "report", "out", "mode", "kernel", "peers_only", "engine",
    ])]
    pub(super) gate: bool,
    /// How many instructions a request of this row (one of --list) costs in each function of the kernel and of the
    /// server, as Markdown
    #[arg(long, value_name = "ROW", value_parser = profile::parse_row, conflicts_with_all = [
        "quick", "filter", "missing", "list", "report", "rounds", "mode", "out", "json", "engine", "gate", "peers_only",
    ])]
    pub(super) profile: Option<Row>,
    /// Whom --profile shows beside us
    #[arg(
        long,
        value_name = "ENGINE",
        value_enum,
        value_delimiter = ',',
        default_value = "rublk-loop",
        requires = "profile"
    )]
    pub(super) against: Vec<Engine>,
}

impl Options {
    /// What these words say on the command line, a space between each two, and all else as it is by default.
    pub(super) fn parse(words: &str) -> Result<Self, clap::Error> {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            options: Options,
        }
        let words = ["bench"].into_iter().chain(words.split_ascii_whitespace());
        Line::try_parse_from(words).map(|line| line.options)
    }

    pub(super) const fn is_quick(&self) -> bool {
        self.quick || self.gate
    }

    pub(super) const fn extent(&self) -> Extent {
        if self.is_quick() { Extent::Quick } else { Extent::Full }
    }

    pub(super) fn rounds(&self) -> u32 {
        let default = match self.profile {
            Some(_) => profile::RUNS,
            None if self.gate => gate::ROUNDS,
            None if self.is_quick() => 1,
            None => 5,
        };
        self.rounds.unwrap_or(default)
    }

    pub(super) const fn length(&self) -> Length {
        match (self.mode, self.is_quick()) {
            (Mode::Count, _) if self.profile.is_some() => Length::Difference,
            (Mode::Count, _) => Length::Requests,
            (Mode::Wall, true) => Length::Seconds(2),
            (Mode::Wall, false) => Length::Seconds(5),
        }
    }

    /// Seconds after which an engine is taken not to answer. One that spins makes a counted second last ten.
    pub(super) const fn patience(&self) -> u32 {
        match self.mode {
            Mode::Count => 20,
            Mode::Wall => 900,
        }
    }

    pub(super) fn out(&self) -> Option<PathBuf> {
        let default = || (!self.is_quick()).then(|| workspace::root().join("docs/benchmarks"));
        self.out.clone().or_else(default)
    }

    pub(super) fn engines(&self) -> Vec<Engine> {
        if self.gate {
            return gate::ENGINES.to_vec();
        }
        if self.profile.is_some() {
            return [Engine::Us].into_iter().chain(self.against.iter().copied()).collect();
        }
        Engine::ALL.into_iter().filter(|engine| !(self.peers_only && *engine == Engine::Us)).collect()
    }

    /// Who talks to the machine's console.
    pub(super) const fn console(&self) -> Console {
        match self.profile {
            _ if self.gate => Console::Labelled("speed"), // other machines speak as well
            Some(_) => Console::Aside,
            None => Console::Streamed,
        }
    }

    /// The command line without the paths of this machine.
    pub(super) fn shown(&self) -> String {
        if self.gate {
            return format!("cargo xtask bench --gate --rounds {}", self.rounds());
        }
        if let Some(row) = &self.profile {
            let against: Vec<_> = self.against.iter().map(|engine| engine.name()).collect();
            let against = against.join(",");
            return format!("cargo xtask bench --profile {row} --kernel {} --against {against}", self.kernel);
        }
        let mut text = format!("cargo xtask bench --mode {} --kernel {}", self.mode.name(), self.kernel);
        if self.quick {
            text += " --quick";
        }
        text += &format!(" --rounds {}", self.rounds());
        if self.missing {
            text += " --missing";
        }
        for part in &self.filter {
            text += &format!(" --filter {}", quote(part));
        }
        text
    }
}
