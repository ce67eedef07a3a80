//! The engine in this process as a [`Disk`]: lanes on threads of their own, on real files.
//!
//! This is the daemon's data path without ublk. A batch is dealt out to the lanes; each lane spawns
//! its share as tasks, so that they are in flight together. Knows nothing of what is compared.

use crate::disk::{Disk, Op, Server};
use anyhow::{Context, Result, anyhow};
use qcow2_engine::{
    Image, Lane, OpenOptions, ZeroMode,
    exec::{Executor, block_on},
    io::{Buf, Files, files::Caching, uring::Uring},
};
use std::{
    cell::RefCell,
    path::{Path, PathBuf},
    rc::Rc,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
};

/// Submission slots of a lane's ring, and requests that it holds.
const DEPTH: u32 = 32;

/// Opens images through the engine.
#[derive(Clone, Copy, Debug)]
pub struct Engine {
    /// Bytes of metadata to keep in memory; small values make it come and go.
    pub cache_bytes: u64,
}

/// An image that is open in this process.
pub struct EngineDisk {
    size: u64,
    lanes: Vec<Worker>,
}

struct Worker {
    jobs: Sender<Job>,
    thread: JoinHandle<Result<()>>,
}

enum Job {
    /// Requests with their place in the batch.
    Run(Vec<(usize, Op)>, Sender<Answer>),
    /// Close the image; the other lanes have ended.
    Close,
}

type Answer = (usize, Result<Vec<u8>>);

impl Server for Engine {
    type Disk = EngineDisk;

    fn attach(&self, image: &Path, queues: u16) -> Result<EngineDisk> {
        let files = Arc::new(Files::new(Caching::Auto));
        let image = self.open(&files, image.to_owned())?;
        let lanes = (0..queues.max(1)).map(|_| Worker::start(&image, &files)).collect();
        Ok(EngineDisk { size: image.virtual_size(), lanes })
    }
}

impl Engine {
    /// Opens on a thread of its own, as the daemon does: a ring stays with its thread.
    fn open(self, files: &Arc<Files>, path: PathBuf) -> Result<Arc<Image>> {
        let files = Arc::clone(files);
        let options = OpenOptions { cache_bytes: self.cache_bytes, ..OpenOptions::default() };
        let opening = thread::spawn(move || -> Result<Arc<Image>> {
            let ring = Uring::new(Arc::clone(&files), DEPTH)?;
            Ok(block_on(&ring, Image::open(&ring, &*files, &path, &options))??)
        });
        opening.join().map_err(|_| anyhow!("opening the image panicked"))?
    }
}

impl Disk for EngineDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn run(&mut self, batch: &[Op]) -> Result<Vec<Vec<u8>>> {
        let (sender, answers) = channel();
        for (number, lane) in self.lanes.iter().enumerate() {
            let share =
                batch.iter().cloned().enumerate().filter(|(index, _)| index % self.lanes.len() == number);
            // A lane that is gone gives no answers; that is found out below.
            let _ = lane.jobs.send(Job::Run(share.collect(), sender.clone()));
        }
        drop(sender);
        let mut bytes: Vec<Option<Vec<u8>>> = vec![None; batch.len()];
        for (index, answer) in answers {
            bytes[index] = Some(answer.with_context(|| format!("{:?}", batch[index]))?);
        }
        bytes.into_iter().collect::<Option<_>>().context("a lane's thread has ended")
    }

    fn detach(mut self) -> Result<()> {
        // Lanes end one by one; the last one closes.
        let last = self.lanes.pop().context("there is a lane")?;
        for lane in self.lanes {
            drop(lane.jobs);
            lane.thread.join().map_err(|_| anyhow!("a lane panicked"))??;
        }
        let _ = last.jobs.send(Job::Close);
        drop(last.jobs);
        last.thread.join().map_err(|_| anyhow!("the last lane panicked"))?
    }
}

impl Worker {
    fn start(image: &Arc<Image>, files: &Arc<Files>) -> Self {
        let (jobs, receiver) = channel();
        let (image, files) = (Arc::clone(image), Arc::clone(files));
        let thread = thread::spawn(move || work(&image, &files, &receiver));
        Self { jobs, thread }
    }
}

/// The life of a lane's thread.
fn work(image: &Arc<Image>, files: &Arc<Files>, jobs: &Receiver<Job>) -> Result<()> {
    let ring = Uring::new(Arc::clone(files), DEPTH)?;
    let executor = Executor::new(ring.clone());
    let lane = Lane::new(image, ring, DEPTH as usize);
    for job in jobs {
        match job {
            Job::Run(share, answers) => run_share(&executor, &lane, share, &answers)?,
            Job::Close => executor.block_on(lane.close())??,
        }
    }
    Ok(())
}

fn run_share(
    executor: &Executor,
    lane: &Lane<Uring>,
    share: Vec<(usize, Op)>,
    answers: &Sender<Answer>,
) -> Result<()> {
    let done = Rc::new(RefCell::new(Vec::new()));
    let has_flush = share.iter().any(|(_, op)| matches!(op, Op::Flush));
    for (index, op) in share {
        let (lane, done) = (lane.clone(), Rc::clone(&done));
        executor.spawn(async move {
            let answer = carry_out(&lane, op).await;
            done.borrow_mut().push((index, answer));
        });
    }
    executor.run()?;
    if has_flush {
        // The daemon's timer; here it runs where the sequence says, so that a seed repeats.
        executor.block_on(lane.maintain())?.context("maintenance")?;
    }
    for answer in done.take() {
        // Nobody listens any more when another request has failed.
        let _ = answers.send(answer);
    }
    Ok(())
}

async fn carry_out(lane: &Lane<Uring>, op: Op) -> Result<Vec<u8>> {
    match op {
        Op::Write { at, bytes } => lane.write(at, Buf::from_bytes(&bytes)).await?,
        Op::Zero { at, len, unmap } => {
            let mode = if unmap { ZeroMode::Unmap } else { ZeroMode::Keep };
            lane.write_zeroes(at, len, mode).await?;
        }
        Op::Discard { at, len } => lane.discard(at, len).await?,
        Op::Flush => lane.flush().await?,
        Op::Read { at, len } => {
            let buf = Buf::zeroed(len as usize);
            lane.read(at, buf.clone()).await?;
            return Ok(buf.to_vec());
        }
    }
    Ok(Vec::new())
}
