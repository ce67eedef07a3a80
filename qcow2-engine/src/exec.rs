//! The single-threaded executor that drives a ring's futures.
//!
//! One [`Executor`] runs on each serving thread: it polls the tasks that have been woken, and when
//! none is left it turns the ring, which submits what they asked for in one system call and waits.
//! Tasks are boxed once, when spawned; waking one does not allocate. A waker may be used from any
//! thread: it then ends the ring's wait. The executor knows nothing of what its tasks do.

use crate::io::uring::{Kick, Uring, Wait};
use std::{
    cell::{Cell, RefCell},
    future::Future,
    io, mem,
    pin::{Pin, pin},
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

/// Rounds of polling woken tasks before the ring gets its turn, so that tasks which keep waking
/// each other do not keep completions waiting.
const MAX_ROUNDS: usize = 16;

/// Runs tasks on this thread. Cloning gives another handle to the same executor, for spawning.
#[derive(Clone)]
pub struct Executor(Rc<Inner>);

struct Inner {
    ring: Uring,
    tasks: RefCell<Vec<Task>>,
    free: RefCell<Vec<usize>>,
    live: Cell<usize>,
    ready: Arc<Ready>,
    /// The round's tasks; kept for its capacity.
    round: RefCell<Vec<usize>>,
}

struct Task {
    state: Arc<TaskWaker>,
    /// Absent while the task is being polled and after it has ended.
    run: Option<Run>,
}

/// What it takes to poll a task.
struct Run {
    future: Pin<Box<dyn Future<Output = ()>>>,
    waker: Waker,
}

/// The tasks that have been woken, and the thread to be woken for them.
struct Ready {
    woken: Mutex<Vec<usize>>,
    kick: Arc<Kick>,
}

struct TaskWaker {
    index: usize,
    is_queued: AtomicBool,
    ready: Arc<Ready>,
}

impl Executor {
    /// An executor without tasks on `ring`.
    #[must_use]
    pub fn new(ring: Uring) -> Self {
        let ready = Arc::new(Ready { woken: Mutex::default(), kick: ring.kick_handle() });
        Self(Rc::new(Inner {
            ring,
            tasks: RefCell::default(),
            free: RefCell::default(),
            live: Cell::new(0),
            ready,
            round: RefCell::default(),
        }))
    }

    /// The ring that this executor turns.
    #[must_use]
    pub fn ring(&self) -> &Uring {
        &self.0.ring
    }

    /// Adds a task. It is polled first in the next round of [`Executor::run`] or
    /// [`Executor::block_on`].
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let inner = &*self.0;
        let future: Pin<Box<dyn Future<Output = ()>>> = Box::pin(future);
        let mut tasks = inner.tasks.borrow_mut();
        let index = inner.free.borrow_mut().pop().unwrap_or(tasks.len());
        let ready = Arc::clone(&inner.ready);
        // A fresh waker: one of the slot's previous task may still be about, and is harmless.
        let state = Arc::new(TaskWaker { index, is_queued: AtomicBool::new(false), ready });
        Wake::wake_by_ref(&state);
        let waker = Waker::from(Arc::clone(&state));
        let task = Task { state, run: Some(Run { future, waker }) };
        if index == tasks.len() {
            tasks.push(task);
        } else {
            tasks[index] = task;
        }
        inner.live.set(inner.live.get() + 1);
    }

    /// Runs until every task has ended.
    ///
    /// # Errors
    /// The ring's; tasks that have not ended are then still there.
    pub fn run(&self) -> io::Result<()> {
        while self.0.live.get() > 0 {
            self.step(|| self.0.live.get() == 0)?;
        }
        Ok(())
    }

    /// Runs until `future` is done; spawned tasks make progress meanwhile.
    ///
    /// # Errors
    /// The ring's.
    pub fn block_on<F: Future>(&self, future: F) -> io::Result<F::Output> {
        let mut future = pin!(future);
        let main = Arc::new(MainWaker { is_woken: AtomicBool::new(true), kick: self.0.ring.kick_handle() });
        let waker = Waker::from(Arc::clone(&main));
        loop {
            if main.is_woken.swap(false, Ordering::Acquire)
                && let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker))
            {
                return Ok(output);
            }
            self.step(|| main.is_woken.load(Ordering::SeqCst))?;
        }
    }

    /// Polls what is ready, then turns the ring; waits unless there is more to do or `stop` says so.
    fn step(&self, stop: impl Fn() -> bool) -> io::Result<()> {
        for _ in 0..MAX_ROUNDS {
            if !self.poll_round() {
                break;
            }
        }
        let ring = &self.0.ring;
        ring.prepare_wait();
        let wait = if stop() || !self.0.ready.lock().is_empty() { Wait::No } else { Wait::Forever };
        ring.turn(wait)
    }

    /// Polls each task that has been woken once. Returns whether there was one.
    fn poll_round(&self) -> bool {
        let mut round = self.0.round.take();
        mem::swap(&mut *self.0.ready.lock(), &mut round);
        let any = !round.is_empty();
        for index in round.drain(..) {
            self.poll_task(index);
        }
        self.0.round.replace(round);
        any
    }

    fn poll_task(&self, index: usize) {
        let inner = &*self.0;
        // Taken out, because polling may spawn.
        let run = {
            let task = &mut inner.tasks.borrow_mut()[index];
            task.state.is_queued.store(false, Ordering::Release);
            task.run.take()
        };
        // A waker of the slot's previous task, or of this one after its end, wakes nobody.
        let Some(mut run) = run else { return };
        if run.future.as_mut().poll(&mut Context::from_waker(&run.waker)).is_pending() {
            inner.tasks.borrow_mut()[index].run = Some(run);
            return;
        }
        drop(run);
        inner.free.borrow_mut().push(index);
        inner.live.set(inner.live.get() - 1);
    }
}

/// Runs one future to its end on `ring`: for tools, and for opening and closing.
///
/// # Errors
/// The ring's.
pub fn block_on<F: Future>(ring: &Uring, future: F) -> io::Result<F::Output> {
    Executor::new(ring.clone()).block_on(future)
}

/// Runs a future whose I/O completes at once, as that of [`crate::io::mem`] does.
///
/// # Panics
/// When it waits for something that nobody will do.
pub fn run_at_once<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    // A part of it may wake another.
    for _ in 0..100_000 {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return output;
        }
    }
    panic!("the future waits for something that nobody will do");
}

impl Ready {
    fn lock(&self) -> MutexGuard<'_, Vec<usize>> {
        self.woken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.is_queued.swap(true, Ordering::AcqRel) {
            self.ready.lock().push(self.index);
            self.ready.kick.kick();
        }
    }
}

/// Wakes [`Executor::block_on`]'s own future.
struct MainWaker {
    is_woken: AtomicBool,
    kick: Arc<Kick>,
}

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_woken.store(true, Ordering::SeqCst);
        self.kick.kick();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::{Caching, Files};
    use std::{
        future::poll_fn,
        sync::mpsc,
        time::{Duration, Instant},
    };

    fn ring() -> Uring {
        Uring::new(Arc::new(Files::new(Caching::Auto)), 8).unwrap()
    }

    #[test]
    fn tasks_spawn_tasks_and_slots_are_used_again() {
        let executor = Executor::new(ring());
        let count = Rc::new(Cell::new(0));
        for _ in 0..3 {
            let (inner, count) = (executor.clone(), Rc::clone(&count));
            executor.spawn(async move {
                inner.ring().sleep(Duration::from_millis(2)).await.unwrap();
                let child = Rc::clone(&count);
                inner.spawn(async move { child.set(child.get() + 10) });
                count.set(count.get() + 1);
            });
        }
        executor.run().unwrap();
        assert_eq!(count.get(), 33);
        executor.spawn(async {});
        executor.run().unwrap();
        assert!(executor.0.tasks.borrow().len() <= 6);
    }

    #[test]
    fn a_waker_ends_the_wait_from_another_thread() {
        let executor = Executor::new(ring());
        let (to_thread, wakers) = mpsc::channel::<(Waker, Arc<AtomicBool>)>();
        let thread = std::thread::spawn(move || {
            for (waker, flag) in wakers {
                flag.store(true, Ordering::SeqCst);
                waker.wake();
            }
        });
        let start = Instant::now();
        for task in 0..4 {
            let to_thread = to_thread.clone();
            executor.spawn(async move {
                for turn in 0..2_000 {
                    if (turn + task) % 500 == 0 {
                        // Let the ring fall asleep in earnest now and then.
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    let flag = Arc::new(AtomicBool::new(false));
                    let mut sent = false;
                    poll_fn(|context| {
                        if !mem::replace(&mut sent, true) {
                            to_thread.send((context.waker().clone(), Arc::clone(&flag))).unwrap();
                        }
                        if flag.load(Ordering::SeqCst) { Poll::Ready(()) } else { Poll::Pending }
                    })
                    .await;
                }
            });
        }
        drop(to_thread);
        executor.run().unwrap();
        thread.join().unwrap();
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn block_on_is_woken_by_its_own_operations_and_by_tasks() {
        let executor = Executor::new(ring());
        let done = Rc::new(Cell::new(false));
        let (ring, task_done) = (executor.ring().clone(), Rc::clone(&done));
        executor.spawn(async move {
            ring.sleep(Duration::from_millis(1)).await.unwrap();
            task_done.set(true);
        });
        let ring = executor.ring().clone();
        let output = executor.block_on(async move {
            ring.sleep(Duration::from_millis(20)).await.unwrap();
            7
        });
        assert_eq!(output.unwrap(), 7);
        assert!(done.get());
        assert_eq!(block_on(executor.ring(), async { 8 }).unwrap(), 8);
    }
}
