//! Many cases: chosen by seed and number, carried out in directories of their own, shrunk if they fail.

use super::{
    corpus::{IMAGE, Sample},
    damage::{Anatomy, Damage},
    judge,
    process::{self, Finished},
};
use crate::sim::rng::Rng;
use std::{
    env, fs, io,
    path::Path,
    process::Command,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Wall time of the engine's process: its processor time is bounded by itself.
const CHILD_TIME: Duration = Duration::from_secs(120);

/// A damaged image and the seed of what is done with it.
#[derive(Clone, Debug)]
pub struct Case {
    /// The number of the sample.
    pub sample: usize,
    /// What is wrong with it.
    pub damages: Vec<Damage>,
    /// Chooses the requests.
    pub requests: u64,
}

/// A case that failed, with no more damage than it needs.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The case's number.
    pub number: u64,
    /// The shrunk case.
    pub case: Case,
    /// What is wrong.
    pub message: String,
}

/// What was tried.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Cases.
    pub cases: u64,
    /// Of them, images that were opened for reading.
    pub read: u64,
    /// Opened for writing.
    pub written: u64,
    /// Condemned by a request.
    pub condemned: u64,
}

/// The samples, taken apart.
pub struct Corpus {
    samples: Vec<(Sample, Anatomy)>,
}

impl Corpus {
    /// Takes the samples apart.
    ///
    /// # Errors
    /// One is not sound.
    pub fn new(samples: Vec<Sample>) -> Result<Self, String> {
        let taken_apart = |sample: Sample| Anatomy::of(&sample).map(|anatomy| (sample, anatomy));
        Ok(Self { samples: samples.into_iter().map(taken_apart).collect::<Result<_, _>>()? })
    }

    /// The samples' names.
    #[must_use]
    pub fn name(&self, sample: usize) -> &str {
        &self.samples[sample].0.name
    }

    /// The case with a number: always the same for the same seed. The first ones are the sound samples.
    #[must_use]
    pub fn case(&self, seed: u64, number: u64) -> Case {
        let mut rng = Rng::new(seed ^ number.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        let count = self.samples.len() as u64;
        if number < count {
            return Case { sample: number as usize, damages: Vec::new(), requests: rng.draw() };
        }
        let sample = rng.below(count) as usize;
        let (image, anatomy) = &self.samples[sample];
        Case { sample, damages: anatomy.choose(&mut rng, &image.bytes), requests: rng.draw() }
    }

    /// Carries a case out in a directory. Returns the violation, if there is one.
    ///
    /// # Errors
    /// The directory cannot be used, or a program not be started.
    pub fn try_case(&self, case: &Case, directory: &Path) -> io::Result<(Option<String>, Finished)> {
        self.lay_out(case, directory)?;
        let mut child = Command::new(env::current_exe()?);
        child.args(["--child", &case.requests.to_string()]);
        let finished = process::run(&mut child, directory, CHILD_TIME)?;
        Ok((judge::violation(directory, &finished)?, finished))
    }

    /// Puts a case's image into a directory, with all that it refers to.
    ///
    /// # Errors
    /// The directory cannot be used.
    pub fn lay_out(&self, case: &Case, directory: &Path) -> io::Result<()> {
        let (sample, _) = &self.samples[case.sample];
        let mut image = sample.bytes.clone();
        case.damages.iter().for_each(|damage| damage.apply(&mut image));
        fs::write(directory.join(IMAGE), &image)?;
        for (name, bytes) in &sample.others {
            fs::write(directory.join(name), bytes)?;
        }
        Ok(())
    }

    /// Tries cases from number `first` on until `time` is over or one fails.
    ///
    /// # Errors
    /// A directory cannot be used, or a program not be started.
    pub fn run(
        &self,
        seed: u64,
        first: u64,
        time: Duration,
        threads: usize,
        scratch: &Path,
    ) -> io::Result<(Totals, Option<Failure>)> {
        let (next, begun) = (AtomicU64::new(first), Instant::now());
        let found: Mutex<Option<Failure>> = Mutex::new(None);
        let work = |thread: usize| -> io::Result<Totals> {
            let directory = scratch.join(format!("thread{thread}"));
            fs::create_dir_all(&directory)?;
            let mut totals = Totals::default();
            let is_found = || found.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            while begun.elapsed() < time && !is_found() {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let case = self.case(seed, number);
                let (violation, finished) = self.try_case(&case, &directory)?;
                totals.count(&finished.output);
                if let Some(message) = violation {
                    let failure = self.shrunk(Failure { number, case, message }, &directory)?;
                    found.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
                }
            }
            Ok(totals)
        };
        let totals = std::thread::scope(|scope| {
            let work = &work;
            let workers: Vec<_> = (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
            let mut totals = Totals::default();
            for worker in workers {
                match worker.join() {
                    Ok(more) => totals.add(more?),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            io::Result::Ok(totals)
        })?;
        Ok((totals, found.into_inner().unwrap_or_else(PoisonError::into_inner)))
    }

    /// The same failure with less damage.
    fn shrunk(&self, mut failure: Failure, directory: &Path) -> io::Result<Failure> {
        let mut index = 0;
        while index < failure.case.damages.len() {
            let mut smaller = failure.case.clone();
            smaller.damages.remove(index);
            match self.try_case(&smaller, directory)?.0 {
                Some(message) => failure = Failure { case: smaller, message, ..failure },
                None => index += 1,
            }
        }
        Ok(failure)
    }
}

impl Totals {
    fn count(&mut self, output: &str) {
        let has = |word: &str| u64::from(output.lines().any(|line| line.starts_with(word)));
        self.cases += 1;
        self.read += has("before-size");
        self.written += has("write-opened");
        self.condemned += has("corrupt:");
    }

    fn add(&mut self, other: Self) {
        self.cases += other.cases;
        self.read += other.read;
        self.written += other.written;
        self.condemned += other.condemned;
    }
}
