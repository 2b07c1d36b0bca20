//! What the queue is built on: atomics, and a word that a thread of another process can wait on.
//!
//! The model test puts loom's in the place of these.

use rustix::thread::{Timespec, futex};
pub(super) use std::sync::Mutex;
use std::sync::atomic::AtomicU32;
pub(super) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::Duration;

use crate::count::{SystemCall, count};

/// A word that threads of several processes wait on: a futex.
#[derive(Debug)]
#[repr(transparent)]
pub(super) struct Word(AtomicU32);

impl Word {
    #[cfg(test)]
    pub(super) fn new(value: u32) -> Self {
        Self(AtomicU32::new(value))
    }

    pub(super) fn load(&self, ordering: Ordering) -> u32 {
        self.0.load(ordering)
    }

    pub(super) fn store(&self, value: u32, ordering: Ordering) {
        self.0.store(value, ordering);
    }

    pub(super) fn swap(&self, value: u32, ordering: Ordering) -> u32 {
        self.0.swap(value, ordering)
    }

    /// Sleeps until somebody wakes those who wait, for at most `timeout`, unless the word has another value already. May
    /// return without cause. `futex(2)`
    pub(super) fn wait(&self, expected: u32, timeout: Option<Duration>) {
        count(SystemCall::FutexWait);
        // More seconds than fit are as good as for ever. Whatever ends it, the caller looks again.
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let _ = futex::wait(&self.0, futex::Flags::empty(), expected, timeout.as_ref());
    }

    /// Wakes all who wait. `futex(2)`
    pub(super) fn wake(&self) {
        count(SystemCall::FutexWake);
        // It fails only for memory that is not there.
        let _ = futex::wake(&self.0, futex::Flags::empty(), i32::MAX as u32);
    }
}

/// How often others are let go on without sleeping.
const YIELDS: u32 = 100;

/// Lets other threads go on, for the nth time.
pub(super) fn pause(nth: u32) {
    if nth < YIELDS {
        std::thread::yield_now();
    } else {
        std::thread::sleep(Duration::from_micros(50));
    }
}
