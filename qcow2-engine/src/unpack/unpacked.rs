//! Decompressed clusters that were wanted lately, and those that somebody is decompressing.
//!
//! A compressed cluster is never rewritten, and the engine makes none, so what was unpacked stays right
//! for as long as any mapping refers to it; when none does, nobody asks. Bounded by bytes; the least
//! recently wanted one goes first.

use super::Bytes;
use crate::waiters::Waiters;
use parking_lot::Mutex;
use std::{
    collections::{HashMap, VecDeque},
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
};

/// What is kept, in bytes: what a few requests in a row read, for one cluster of the largest size twice
/// over.
const KEPT_BYTES: usize = 4 << 20;

/// Which cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) layer: u16,
    /// Byte offset in the layer's file.
    pub(super) at: u64,
}

/// The clusters.
#[derive(Default)]
pub(crate) struct Unpacked(Mutex<Table>);

#[derive(Default)]
struct Table {
    states: HashMap<Key, State>,
    /// Those that are there, the least recently wanted first.
    order: VecDeque<Key>,
    bytes: usize,
}

enum State {
    /// Somebody is at it; these wait for it.
    Coming(Waiters),
    Here(Bytes),
}

/// How a cluster is come by.
pub(super) enum Claim<'a> {
    Here(Bytes),
    /// The caller has to unpack it.
    Ours(Task<'a>),
}

/// The duty to unpack a cluster; dropped, somebody else gets it.
pub(super) struct Task<'a> {
    table: &'a Unpacked,
    key: Key,
}

impl Unpacked {
    /// Waits until the cluster is there, or nobody is at work on it.
    pub(super) async fn claim(&self, key: Key) -> Claim<'_> {
        poll_fn(|context| self.poll_claim(key, context)).await
    }

    fn poll_claim(&self, key: Key, context: &Context<'_>) -> Poll<Claim<'_>> {
        let mut table = self.0.lock();
        match table.states.get_mut(&key) {
            None => {
                table.states.insert(key, State::Coming(Waiters::default()));
                Poll::Ready(Claim::Ours(Task { table: self, key }))
            }
            Some(State::Coming(waiting)) => {
                waiting.add(context);
                Poll::Pending
            }
            Some(State::Here(bytes)) => {
                let bytes = Arc::clone(bytes);
                table.touch(key);
                Poll::Ready(Claim::Here(bytes))
            }
        }
    }

    /// Ends the wait for a cluster, one way or the other.
    fn settle(&self, key: Key, bytes: Option<Bytes>) {
        let waiting = {
            let mut table = self.0.lock();
            let before = table.states.remove(&key);
            if let Some(bytes) = bytes {
                table.keep(key, bytes);
            }
            match before {
                Some(State::Coming(waiting)) => waiting,
                _ => Waiters::default(),
            }
        };
        waiting.wake();
    }
}

impl Table {
    fn touch(&mut self, key: Key) {
        if self.order.back() != Some(&key) {
            self.order.retain(|&other| other != key);
            self.order.push_back(key);
        }
    }

    fn keep(&mut self, key: Key, bytes: Bytes) {
        self.bytes += bytes.len();
        self.states.insert(key, State::Here(bytes));
        self.order.push_back(key);
        while self.bytes > KEPT_BYTES {
            let Some(oldest) = self.order.pop_front() else { return };
            if let Some(State::Here(bytes)) = self.states.remove(&oldest) {
                self.bytes -= bytes.len();
            }
        }
    }
}

impl Task<'_> {
    /// The cluster is unpacked.
    pub(super) fn done(self, bytes: Vec<u8>) -> Bytes {
        let bytes = Arc::new(bytes);
        self.table.settle(self.key, Some(Arc::clone(&bytes)));
        std::mem::forget(self);
        bytes
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        self.table.settle(self.key, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{pin::pin, task};

    const KEY: Key = Key { layer: 1, at: 1000 };

    fn poll<'a>(unpacked: &'a Unpacked, key: Key) -> Poll<Claim<'a>> {
        let claim = pin!(unpacked.claim(key));
        std::future::Future::poll(claim, &mut Context::from_waker(task::Waker::noop()))
    }

    fn ours<'a>(unpacked: &'a Unpacked, key: Key) -> Task<'a> {
        match poll(unpacked, key) {
            Poll::Ready(Claim::Ours(task)) => task,
            _ => panic!("it is there, or on its way"),
        }
    }

    fn is_here(unpacked: &Unpacked, key: Key) -> bool {
        matches!(poll(unpacked, key), Poll::Ready(Claim::Here(_)))
    }

    #[test]
    fn one_unpacks_and_the_others_wait() {
        let unpacked = Unpacked::default();
        let task = ours(&unpacked, KEY);
        assert!(poll(&unpacked, KEY).is_pending());
        assert_eq!(*task.done(vec![7; 512]), [7; 512]);
        assert!(is_here(&unpacked, KEY));
        drop(ours(&unpacked, Key { at: 2000, ..KEY }));
        drop(ours(&unpacked, Key { at: 2000, ..KEY }));
    }

    #[test]
    fn the_least_recently_wanted_goes_first_and_memory_is_bounded() {
        let unpacked = Unpacked::default();
        let key = |number: usize| Key { layer: 0, at: number as u64 };
        let fit = KEPT_BYTES / (1 << 20);
        (0..fit).for_each(|number| drop(ours(&unpacked, key(number)).done(vec![0; 1 << 20])));
        assert!(is_here(&unpacked, key(0)));
        drop(ours(&unpacked, key(fit)).done(vec![0; 1 << 20]));
        assert!(is_here(&unpacked, key(0)) && is_here(&unpacked, key(fit)));
        drop(ours(&unpacked, key(1)));
        let table = unpacked.0.lock();
        assert_eq!((table.bytes, table.order.len()), (KEPT_BYTES, fit));
    }
}
