//! Threads for work that would keep a serving thread from serving.
//!
//! They are started when there is work for them, one more whenever all are busy, up to a limit; they end
//! with the [`Workers`]. A job's result wakes the task that waits for it, on whatever thread that runs.

use parking_lot::{Condvar, Mutex};
use std::{
    collections::VecDeque,
    future::poll_fn,
    mem,
    panic::{self, AssertUnwindSafe},
    sync::Arc,
    task::{Poll, Waker},
    thread,
};

type Job = Box<dyn FnOnce() + Send>;

/// The threads.
pub struct Workers {
    shared: Arc<Shared>,
    limit: usize,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    has_work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    is_closing: bool,
}

/// Where a job leaves its result.
struct Slot<T>(Mutex<Progress<T>>);

enum Progress<T> {
    Waiting(Option<Waker>),
    /// `None` if the job has died.
    Ended(Option<T>),
}

impl Workers {
    /// Up to `limit` threads, none of them started yet.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { shared: Arc::default(), limit: limit.max(1) }
    }

    /// Has a thread do the work, and waits for the result; `None` if it panicked. Where no thread can be
    /// had the caller's does it.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let slot = Arc::new(Slot(Mutex::new(Progress::Waiting(None))));
        let ending = Ending { slot: Arc::clone(&slot), result: None };
        self.submit(Box::new(move || {
            let mut ending = ending;
            ending.result = Some(work());
        }));
        poll_fn(|context| {
            let mut progress = slot.0.lock();
            match &mut *progress {
                Progress::Ended(result) => Poll::Ready(result.take()),
                Progress::Waiting(waker) => {
                    *waker = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    fn submit(&self, job: Job) {
        let mut state = self.shared.state.lock();
        if state.idle < state.jobs.len() + 1 && state.threads < self.limit && self.start_thread() {
            state.threads += 1;
        }
        if state.threads == 0 {
            drop(state);
            return job();
        }
        state.jobs.push_back(job);
        self.shared.has_work.notify_one();
    }

    fn start_thread(&self) -> bool {
        let shared = Arc::clone(&self.shared);
        thread::Builder::new().name("unpack".to_owned()).spawn(move || shared.work()).is_ok()
    }
}

impl Shared {
    /// A thread's life.
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            match state.jobs.pop_front() {
                Some(job) => {
                    drop(state);
                    // Its end tells that it has died; the next job is to find this thread alive.
                    let _ = panic::catch_unwind(AssertUnwindSafe(job));
                    state = self.state.lock();
                }
                None if state.is_closing => return,
                None => {
                    state.idle += 1;
                    self.has_work.wait(&mut state);
                    state.idle -= 1;
                }
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.state.lock().is_closing = true;
        self.shared.has_work.notify_all();
    }
}

/// Tells of a job's end, however that comes.
struct Ending<T> {
    slot: Arc<Slot<T>>,
    result: Option<T>,
}

impl<T> Drop for Ending<T> {
    fn drop(&mut self) {
        let ended = Progress::Ended(self.result.take());
        let before = mem::replace(&mut *self.slot.0.lock(), ended);
        if let Progress::Waiting(Some(waker)) = before {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::join_all;
    use std::{
        future::Future,
        pin::pin,
        sync::{Barrier, atomic::AtomicBool, atomic::Ordering},
        task::{Context, Wake},
        time::{Duration, Instant},
    };

    struct Unpark(thread::Thread, AtomicBool);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.1.store(true, Ordering::SeqCst);
            self.0.unpark();
        }
    }

    fn wait_for<T>(future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        let unpark = Arc::new(Unpark(thread::current(), AtomicBool::new(false)));
        let waker = Waker::from(Arc::clone(&unpark));
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return output;
            }
            while !unpark.1.swap(false, Ordering::SeqCst) {
                assert!(Instant::now() < deadline, "nobody woke the task");
                thread::park_timeout(Duration::from_secs(1));
            }
        }
    }

    #[test]
    fn jobs_run_beside_each_other_and_wake_their_task() {
        let workers = Workers::new(2);
        let both = Arc::new(Barrier::new(2));
        let jobs = (0..2).map(|number| {
            let both = Arc::clone(&both);
            // Ends only when the other has begun too.
            workers.run(move || {
                both.wait();
                number
            })
        });
        assert_eq!(wait_for(join_all(jobs)), [Some(0), Some(1)]);
        let many = (0..100).map(|number| workers.run(move || number * 2));
        assert!(wait_for(join_all(many)).into_iter().eq((0..100).map(|number| Some(number * 2))));
        assert_eq!(workers.shared.state.lock().threads, 2);
    }

    #[test]
    fn a_job_that_dies_is_told_of() {
        let workers = Workers::new(1);
        let died: Option<u32> = wait_for(workers.run(|| panic!("on purpose")));
        assert_eq!(died, None);
        assert_eq!(wait_for(workers.run(|| 7)), Some(7), "and the thread goes on");
    }
}
