//! Many devices at the same time, those on others first.

use std::{
    collections::BTreeSet,
    mem,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

/// Devices that are detached at the same time.
const AT_ONCE: usize = 16;

/// Something to be done to a device.
pub(super) struct Task<T> {
    /// Which one, if that is known.
    pub(super) id: Option<u32>,
    /// The devices on it: it is their turn first.
    pub(super) after: BTreeSet<u32>,
    pub(super) item: T,
}

/// What is left, and what is being done.
struct Plan<T> {
    left: Vec<Task<T>>,
    under_way: Vec<Option<u32>>,
}

impl<T> Plan<T> {
    /// The next one whose turn it is.
    fn ready(&self) -> Option<usize> {
        let left = self.left.iter().map(|task| task.id);
        let unfinished: BTreeSet<_> = left.chain(self.under_way.iter().copied()).flatten().collect();
        let first = self.left.iter().position(|task| task.after.is_disjoint(&unfinished));
        // Devices in a circle, says somebody's record: then it is anybody's turn.
        first.or_else(|| (self.under_way.is_empty() && !self.left.is_empty()).then_some(0))
    }
}

/// Who hands the tasks out.
struct Desk<T> {
    plan: Mutex<Plan<T>>,
    /// That one has ended.
    ended: Condvar,
}

impl<T> Desk<T> {
    /// The next task. Waits while it is the turn of what others are at.
    fn next(&self) -> Option<(Turn<'_, T>, T)> {
        let mut plan = self.plan();
        while !plan.left.is_empty() {
            if let Some(at) = plan.ready() {
                let Task { id, item, .. } = plan.left.remove(at);
                plan.under_way.push(id);
                return Some((Turn { desk: self, id }, item));
            }
            plan = self.ended.wait(plan).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    fn plan(&self) -> MutexGuard<'_, Plan<T>> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// That a task is under way; dropped, it has ended, however.
struct Turn<'a, T> {
    desk: &'a Desk<T>,
    id: Option<u32>,
}

impl<T> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        let under_way = &mut self.desk.plan().under_way;
        if let Some(at) = under_way.iter().position(|id| *id == self.id) {
            under_way.swap_remove(at);
        }
        self.desk.ended.notify_all();
    }
}

/// Does this to each of them, to some at a time: none waits for one that hangs, unless that is on it. Returns what
/// failed.
pub(super) fn for_each<T: Send, E: Send>(
    tasks: Vec<Task<T>>,
    work: impl Fn(T) -> Result<(), E> + Sync,
) -> Vec<E> {
    let others = tasks.len().min(AT_ONCE).saturating_sub(1);
    let desk = Desk { plan: Mutex::new(Plan { left: tasks, under_way: Vec::new() }), ended: Condvar::new() };
    let failures = Mutex::new(Vec::new());
    let work_on = || {
        while let Some((turn, item)) = desk.next() {
            if let Err(error) = work(item) {
                failures.lock().unwrap_or_else(PoisonError::into_inner).push(error);
            }
            drop(turn);
        }
    };
    thread::scope(|scope| {
        for _ in 0..others {
            // Where there is no thread left for it this takes longer.
            let _ = thread::Builder::new().spawn_scoped(scope, work_on);
        }
        work_on();
    });
    mem::take(&mut *failures.lock().unwrap_or_else(PoisonError::into_inner))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::mpsc, time::Duration};

    fn task(id: u32, after: &[u32]) -> Task<u32> {
        Task { id: Some(id), after: after.iter().copied().collect(), item: id }
    }

    /// `del --all` waited ten minutes for a server that hung before it asked the next one to stop.
    #[test]
    fn devices_do_not_wait_for_each_other() {
        let (begun, other) = mpsc::channel();
        let ends = Mutex::new((Some(begun), Some(other)));
        let failed = for_each(vec![task(2, &[]), task(1, &[])], |device| {
            let taken = ends
                .lock()
                .map(|mut ends| (ends.0.take_if(|_| device == 1), ends.1.take_if(|_| device == 2)));
            match taken.unwrap() {
                (_, Some(other)) => {
                    other.recv_timeout(Duration::from_secs(10)).map_err(|_| "the other waits")
                }
                (begun, _) => begun.unwrap().send(()).map_err(|_| "the other is through"),
            }
        });
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(for_each((0..40).map(|id| task(id, &[])).collect(), Err).len(), 40);
        assert_eq!(for_each(Vec::<Task<u32>>::new(), |_| Err::<(), ()>(())), []);
    }

    /// A device went while the server of one on it still closed its image there.
    #[test]
    fn a_device_goes_when_those_on_it_are_gone_or_have_failed() {
        let done = Mutex::new(Vec::new());
        let tasks = vec![task(0, &[1, 2, 9]), task(1, &[2]), task(2, &[]), task(3, &[0, 1, 2])];
        let failed = for_each(tasks, |id| {
            thread::sleep(Duration::from_millis(10));
            done.lock().unwrap().push(id);
            if id == 1 { Err(id) } else { Ok(()) }
        });
        assert_eq!(*done.lock().unwrap(), [2, 1, 0, 3]);
        assert_eq!(failed, [1]);
    }

    #[test]
    fn devices_in_a_circle_are_done_as_well() {
        let done = Mutex::new(BTreeSet::new());
        let tasks = vec![task(0, &[1]), task(1, &[0])];
        for_each(tasks, |id| {
            done.lock().unwrap().insert(id);
            Ok::<(), ()>(())
        });
        assert_eq!(*done.lock().unwrap(), BTreeSet::from([0, 1]));
    }
}
