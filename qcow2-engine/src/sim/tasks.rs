//! The tasks of a life, which take turns.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

pub(super) type Task = Pin<Box<dyn Future<Output = Result<(), String>>>>;

/// Rounds of polling between two operations of the disk, at the most.
const MAX_POLLS: u64 = 10_000;

/// A task, which is polled when it has been woken, as in service: whoever forgets to wake it has it hang.
pub(super) struct Running {
    task: Task,
    woken: Arc<Woken>,
}

/// Whether a task has been woken.
struct Woken(AtomicBool);

impl Running {
    pub(super) fn new(task: Task) -> Self {
        Self { task, woken: Arc::new(Woken(AtomicBool::new(true))) }
    }

    /// Polls it, if it has been woken.
    fn poll(&mut self) -> Option<Poll<Result<(), String>>> {
        if !self.woken.0.swap(false, Ordering::Relaxed) {
            return None;
        }
        let waker = self.waker();
        Some(self.task.as_mut().poll(&mut Context::from_waker(&waker)))
    }

    /// What wakes it.
    pub(super) fn waker(&self) -> Waker {
        Waker::from(Arc::clone(&self.woken))
    }
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Polls until nobody is awake.
pub(super) fn poll(tasks: &mut Vec<Running>) -> Result<(), String> {
    for _ in 0..MAX_POLLS {
        let (mut is_quiet, mut failure) = (true, None);
        tasks.retain_mut(|task| match task.poll() {
            None => true,
            Some(Poll::Pending) => {
                is_quiet = false;
                true
            }
            Some(Poll::Ready(result)) => {
                is_quiet = false;
                failure = failure.take().or(result.err());
                false
            }
        });
        match failure {
            Some(failure) => return Err(failure),
            None if is_quiet => return Ok(()),
            None => {}
        }
    }
    Err("requests wake each other for ever".into())
}
