//! `cargo xtask fuzz`: damaged images, from the command line.

use clap::Parser;
use qcow2_engine::fuzz::{
    campaign::{Corpus, Failure},
    child, corpus,
    differences::{self, Tally},
};
use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

/// Damages images field by field, and holds what becomes of them against QEMU's tools.
#[derive(Parser)]
struct Args {
    /// Seconds to go on for.
    #[arg(long, default_value_t = 60)]
    time: u64,
    /// The seed of the campaign.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run this case of the seed alone, with all that the engine tells; its files are kept.
    #[arg(long)]
    case: Option<u64>,
    /// Fail if fewer cases than this were tried.
    #[arg(long, default_value_t = 0)]
    at_least: u64,
    /// Show where our check and repair differ from qemu-img's, instead of looking for what is wrong.
    #[arg(long)]
    differences: bool,
    /// Go on after a case that fails.
    #[arg(long)]
    keep_going: bool,
    /// Threads.
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
    threads: usize,
    /// Be the engine's process, with this seed of requests.
    #[arg(long, hide = true)]
    child: Option<u64>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match args.child {
        Some(seed) => child::work(seed).map(|()| true),
        None => in_scratch(&args),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("fuzz: {error} (are qemu-img and qemu-io installed? cargo xtask setup)");
            ExitCode::FAILURE
        }
    }
}

/// In memory where that can be: every case writes its image several times.
fn in_scratch(args: &Args) -> io::Result<bool> {
    let memory = Path::new("/dev/shm");
    let parent: PathBuf = if memory.is_dir() { memory.into() } else { std::env::temp_dir() };
    let mut scratch = tempfile::Builder::new().prefix("qcow2-fuzz").tempdir_in(parent)?;
    scratch.disable_cleanup(args.case.is_some());
    let corpus = Corpus::new(corpus::make(scratch.path())?).map_err(io::Error::other)?;
    match args.case {
        _ if args.differences => compare(&corpus, args, scratch.path()),
        Some(number) => replay(&corpus, args.seed, number, scratch.path()),
        None => search(&corpus, args, scratch.path()),
    }
}

fn search(corpus: &Corpus, args: &Args, scratch: &Path) -> io::Result<bool> {
    let begun = Instant::now();
    let time = Duration::from_secs(args.time);
    let (mut cases, mut failures, mut first) = (0, 0, 0);
    loop {
        let rest = time.saturating_sub(begun.elapsed());
        let (totals, failure) = corpus.run(args.seed, first, rest, args.threads, scratch)?;
        cases += totals.cases;
        println!(
            "{} images, {} opened for reading, {} for writing, {} condemned by a request, seed {}, {:.1} images/s",
            totals.cases,
            totals.read,
            totals.written,
            totals.condemned,
            args.seed,
            totals.cases as f64 / begun.elapsed().as_secs_f64().max(0.001),
        );
        let Some(failure) = failure else { break };
        describe(corpus, args.seed, &failure);
        failures += 1;
        first = failure.number + 1;
        if !args.keep_going {
            break;
        }
    }
    if failures == 0 && cases < args.at_least {
        println!("too few images: {cases} of {}", args.at_least);
    }
    Ok(failures == 0 && cases >= args.at_least)
}

fn compare(corpus: &Corpus, args: &Args, scratch: &Path) -> io::Result<bool> {
    let (begun, time) = (Instant::now(), Duration::from_secs(args.time));
    let (mut tally, mut cases) = (Tally::default(), 0);
    let numbers = args.case.map_or(0..u64::MAX, |case| case..case + 1);
    for number in numbers.take_while(|_| begun.elapsed() < time) {
        corpus.lay_out(&corpus.case(args.seed, number), scratch)?;
        tally.add(number, differences::of(scratch)?);
        cases += 1;
    }
    println!("{cases} images, seed {}\n{tally}", args.seed);
    Ok(true)
}

fn describe(corpus: &Corpus, seed: u64, failure: &Failure) {
    println!("VIOLATION on {}: {}", corpus.name(failure.case.sample), failure.message);
    println!("replay with --seed {seed} --case {}; shrunk to:", failure.number);
    failure.case.damages.iter().for_each(|damage| println!("  {damage}"));
}

fn replay(corpus: &Corpus, seed: u64, number: u64, scratch: &Path) -> io::Result<bool> {
    let case = corpus.case(seed, number);
    println!("{} in {}", corpus.name(case.sample), scratch.display());
    case.damages.iter().for_each(|damage| println!("  {damage}"));
    let (violation, finished) = corpus.try_case(&case, scratch)?;
    print!("{}{}", finished.output, finished.errors);
    match &violation {
        Some(message) => println!("violation: {message}"),
        None => println!("no violation"),
    }
    Ok(violation.is_none())
}
