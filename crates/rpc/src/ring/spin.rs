//! How long to look again and again before sleeping.
//!
//! Looking is much quicker than being woken, but only pays while the peer is at work on another processor. So the time
//! that is spent on it adapts: it is all that is allowed after it has paid, halves each time it has not, and grows again
//! when a sleep turns out to have been short enough to be looked through.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The most that is spent on looking, in nanoseconds: a few times what sleeping and being woken take.
const MAX_NANOS: u32 = 50_000;

/// The same for the first waits, until one takes longer: a session that begins is busy with what has just been asked.
const FIRST_NANOS: u32 = 200_000;

/// Less than this is not worth beginning with, in nanoseconds.
const MIN_NANOS: u32 = 1_000;

/// How often to look between two looks at the clock, which takes about as long.
const LOOKS: u32 = 32;

/// The time to spend, which the waiting threads of a ring share.
#[derive(Debug)]
pub(super) struct Spin {
    nanos: AtomicU32,
}

impl Default for Spin {
    fn default() -> Self {
        Self { nanos: AtomicU32::new(FIRST_NANOS) }
    }
}

impl Spin {
    /// Waits until `is_ready` or `stop`: looks for a while, then sleeps by `sleep`. Looks only if the peer, which last ran
    /// on the processor `peers`, can be at work meanwhile.
    pub(super) fn wait(
        &self,
        peers: u64,
        is_ready: impl Fn() -> bool,
        stop: &dyn Fn() -> bool,
        sleep: impl FnOnce(&dyn Fn() -> bool),
    ) {
        let limit = self.nanos.load(Ordering::Relaxed);
        let can_pay = peers != processor();
        // The clock is not looked at before it matters.
        if can_pay && limit != 0 && looks(&is_ready) {
            return;
        }
        let begun = Instant::now();
        if can_pay && limit != 0 && looks_until(begun + Duration::from_nanos(u64::from(limit)), is_ready, stop) {
            self.nanos.store(limit.max(MAX_NANOS), Ordering::Relaxed);
            return;
        }
        sleep(stop);
        self.adapt(limit, can_pay, begun.elapsed());
    }

    /// Takes note of a wait that ended with a sleep.
    fn adapt(&self, limit: u32, can_pay: bool, waited: Duration) {
        let would_have_paid = can_pay && waited < Duration::from_nanos(u64::from(MAX_NANOS));
        let next = match limit {
            _ if would_have_paid => limit.saturating_mul(2).clamp(MIN_NANOS, MAX_NANOS),
            _ if !can_pay => limit,
            0..MIN_NANOS => 0,
            _ => limit / 2,
        };
        self.nanos.store(next, Ordering::Relaxed);
    }
}

/// Looks for as long as a look at the clock takes, a few times over; returns whether it was ready.
fn looks(is_ready: &impl Fn() -> bool) -> bool {
    for _ in 0..LOOKS {
        if is_ready() {
            return true;
        }
        std::hint::spin_loop();
    }
    false
}

fn looks_until(end: Instant, is_ready: impl Fn() -> bool, stop: &dyn Fn() -> bool) -> bool {
    loop {
        if looks(&is_ready) || stop() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
    }
}

/// Returns the processor that this thread runs on, at this moment.
pub(super) fn processor() -> u64 {
    rustix::thread::sched_getcpu() as u64
}
