//! The operations in flight on one ring: who waits for each, and what the kernel may still touch.
//!
//! A slot is taken when an operation is submitted and given back when two things have happened, in
//! either order: its completion has arrived, and its future is gone or has taken the result. Until
//! the completion arrives the slot owns the operation's memory, so dropping a future is always sound.
//! Taking and giving back do not allocate once the table has reached its working size.

use super::Buf;
use io_uring::types::Timespec;
use std::task::{Context, Poll, Waker};

/// Memory that the kernel may use until the operation completes.
pub(super) enum Keep {
    /// None, or memory that outlives the ring.
    Nothing,
    /// A transfer's buffer.
    Buf(#[allow(dead_code, reason = "held, not read")] Buf),
    /// A timer's duration.
    Time(#[allow(dead_code, reason = "held, not read")] Box<Timespec>),
}

/// Names a slot; the `user_data` of its submission.
pub(super) type Key = u32;

#[derive(Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<Key>,
    in_flight: usize,
}

struct Slot {
    state: State,
    keep: Keep,
}

enum State {
    Free,
    /// Submitted; the waker is there once the future has been polled.
    InFlight(Option<Waker>),
    /// Submitted, and the future is gone.
    Abandoned,
    /// Completed with this result, which the future has not taken yet.
    Done(i32),
}

impl Slots {
    pub(super) fn with_capacity(count: usize) -> Self {
        Self { slots: Vec::with_capacity(count), free: Vec::with_capacity(count), in_flight: 0 }
    }

    /// Operations whose completion has not arrived.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Takes a slot for an operation that is about to be submitted.
    pub(super) fn take(&mut self, keep: Keep) -> Key {
        let slot = Slot { state: State::InFlight(None), keep };
        self.in_flight += 1;
        if let Some(key) = self.free.pop() {
            self.slots[key as usize] = slot;
            return key;
        }
        self.slots.push(slot);
        // 2^32 operations would need more memory than any machine has.
        (self.slots.len() - 1) as Key
    }

    /// Records a completion and releases the operation's memory. Returns whom to wake.
    pub(super) fn complete(&mut self, key: Key, result: i32) -> Option<Waker> {
        let slot = self.slots.get_mut(key as usize)?;
        slot.keep = Keep::Nothing;
        match std::mem::replace(&mut slot.state, State::Done(result)) {
            State::InFlight(waker) => {
                self.in_flight -= 1;
                waker
            }
            State::Abandoned => {
                self.in_flight -= 1;
                self.release(key);
                None
            }
            unexpected @ (State::Free | State::Done(_)) => {
                debug_assert!(false, "a completion for slot {key}, which has nothing in flight");
                slot.state = unexpected;
                None
            }
        }
    }

    /// The operation's result, if it is there; else `context` is woken when it comes.
    pub(super) fn poll(&mut self, key: Key, context: &Context<'_>) -> Poll<i32> {
        let State::InFlight(waker) = &mut self.slots[key as usize].state else {
            let State::Done(result) = self.slots[key as usize].state else {
                unreachable!("slot {key} was polled after it had been given back");
            };
            return Poll::Ready(result);
        };
        match waker {
            Some(waker) => waker.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    /// The future is gone. Returns whether its operation is still in flight.
    pub(super) fn abandon(&mut self, key: Key) -> bool {
        let slot = &mut self.slots[key as usize];
        if matches!(slot.state, State::InFlight(_)) {
            slot.state = State::Abandoned;
            return true;
        }
        self.release(key);
        false
    }

    /// Gives all memory up for lost: the kernel may still write to it and cannot be waited for.
    pub(super) fn leak(&mut self) {
        for slot in &mut self.slots {
            std::mem::forget(std::mem::replace(&mut slot.keep, Keep::Nothing));
        }
    }

    fn release(&mut self, key: Key) {
        self.slots[key as usize].state = State::Free;
        self.free.push(key);
    }
}
