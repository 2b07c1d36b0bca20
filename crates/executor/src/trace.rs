//! What this process does, recorded when a controller asks for it: which functions were called, and when.
//!
//! A process has one record, whoever asks for it. While nobody has, a call pays for one look at a flag.

use farlink_addr::ExecutorAddr;
use farlink_wire::msg::TraceSpan;
use rustix::time::{ClockId, clock_gettime};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Spans that are kept until they are taken. What comes after is lost, so that a record nobody takes has an end.
const MAX_SPANS: usize = 1 << 20;

static IS_ON: AtomicBool = AtomicBool::new(false);

static SPANS: Mutex<Vec<TraceSpan>> = Mutex::new(Vec::new());

fn spans() -> MutexGuard<'static, Vec<TraceSpan>> {
    // Nothing that can panic half-way through a change runs under this lock.
    SPANS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the time on the monotonic clock in nanoseconds.
fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    // Neither is negative on this clock.
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Records from now on; gives the time.
pub(crate) fn start() -> u64 {
    IS_ON.store(true, Ordering::Relaxed);
    now()
}

/// Takes the first spans of what has been recorded.
pub(crate) fn take(count: u64) -> Vec<TraceSpan> {
    let mut spans = spans();
    let count = usize::try_from(count).unwrap_or(usize::MAX).min(spans.len());
    spans.drain(..count).collect()
}

/// Calls `call`, which is a call of `function`, and records it if somebody wants that.
#[inline]
pub(crate) fn span<T>(function: ExecutorAddr, call: impl FnOnce() -> T) -> T {
    if !IS_ON.load(Ordering::Relaxed) {
        return call();
    }
    let start = now();
    let result = call();
    let thread = rustix::thread::gettid().as_raw_nonzero().get() as u64;
    let span = TraceSpan { function, thread, start, end: now() };
    let mut spans = spans();
    if spans.len() < MAX_SPANS {
        spans.push(span);
    }
    result
}
