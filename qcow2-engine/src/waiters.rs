//! Tasks that wait for the same thing.

use std::task::{Context, Waker};

/// Who waits. Kept under the lock of what is waited for; woken when that lock has been let go, because a task
/// may be polled at once.
#[derive(Default)]
pub(crate) struct Waiters(Vec<Waker>);

impl Waiters {
    /// Has the task wait, which may be asked more than once while it does.
    pub(crate) fn add(&mut self, context: &Context<'_>) {
        if !self.0.iter().any(|waker| waker.will_wake(context.waker())) {
            self.0.push(context.waker().clone());
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those who wait, to be woken; nobody waits from now on.
    pub(crate) fn take(&mut self) -> Self {
        std::mem::take(self)
    }

    /// Wakes them: each looks for itself whether what it waits for is there.
    pub(crate) fn wake(self) {
        self.0.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::Arc, task::Wake};

    struct Task;

    impl Wake for Task {
        fn wake(self: Arc<Self>) {}
    }

    #[test]
    fn a_task_that_is_polled_again_waits_once() {
        let (mut waiters, waker) = (Waiters::default(), Waker::from(Arc::new(Task)));
        let context = Context::from_waker(&waker);
        waiters.add(&context);
        waiters.add(&context);
        assert_eq!(waiters.0.len(), 1);
        let woken = waiters.take();
        assert!(waiters.is_empty() && !woken.is_empty());
        woken.wake();
    }
}
