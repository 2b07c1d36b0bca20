//! System calls of connections, counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// A kind of system call that a connection makes.
#[derive(Clone, Copy)]
pub(crate) enum SystemCall {
    Send,
    Receive,
    Poll,
    FutexWait,
    FutexWake,
}

const NAMES: [&str; 5] = ["send", "receive", "poll", "futex_wait", "futex_wake"];

static COUNTS: [AtomicU64; NAMES.len()] = [const { AtomicU64::new(0) }; NAMES.len()];

pub(crate) fn count(kind: SystemCall) {
    COUNTS[kind as usize].fetch_add(1, Ordering::Relaxed);
}

/// Returns how many system calls the connections of this process have made to send, to receive, to wait for either, and to
/// sleep at a shared ring and wake who sleeps there.
pub fn system_calls() -> impl Iterator<Item = (&'static str, u64)> {
    NAMES.iter().zip(&COUNTS).map(|(&name, count)| (name, count.load(Ordering::Relaxed)))
}
