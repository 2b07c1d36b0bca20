//! Physical memory that is given back to the system.
//!
//! Data that became free keeps its pages for a while, since to have new ones takes several times as long as to use those that
//! are there. A thread looks from time to time, as long as there is much of that: what nobody has taken again between two
//! looks goes. So what is used again and again stays, and a process that idles has nothing that nobody uses. No more is kept
//! than was in use a moment before.

use super::space::Reservation;
use super::{Inner, MemoryManager};
use crate::StripedView;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

/// Time between two looks: long for a program that frees and allocates by turns, and short for memory that nobody uses.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Bytes of free memory that nobody can have while they are given back: that takes a millisecond or so.
const PIECE_BYTES: u64 = 4 << 20;

/// What the thread that looks has of a manager.
pub(super) struct Watch {
    /// Locked while it is looked, so that a manager that goes waits for that.
    inner: Mutex<Weak<Inner>>,
    ended: Condvar,
    /// Whether the manager goes, and with it all that could be given back.
    is_ending: AtomicBool,
}

impl Watch {
    pub(super) fn new(inner: Weak<Inner>) -> Arc<Self> {
        Arc::new(Self { inner: Mutex::new(inner), ended: Condvar::new(), is_ending: AtomicBool::new(false) })
    }

    /// Has nobody look any more.
    pub(super) fn end(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner) = Weak::new();
        self.ended.notify_all();
    }

    fn run(&self) {
        loop {
            let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self.ended.wait_timeout_while(inner, LOOK_EVERY, |inner| inner.strong_count() > 0);
            let (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if !inner.upgrade().is_some_and(|inner| inner.look()) {
                return;
            }
        }
    }
}

impl MemoryManager {
    /// Gives the physical memory of what is free back to the system at once, which otherwise happens a second or two after it
    /// was last needed. Small pieces between live allocations keep theirs.
    pub fn trim(&self) {
        self.inner.sweep_unneeded(true);
    }
}

impl Inner {
    /// Has a thread look what is not needed any more.
    pub(super) fn watch(&self) {
        let watch = Arc::clone(&self.watch);
        let thread = std::thread::Builder::new().name("farlink-memory".to_owned());
        if thread.spawn(move || watch.run()).is_err() {
            // Nobody would look later.
            self.lock().is_watched = false;
            self.sweep_unneeded(true);
        }
    }

    /// Gives back what has not been needed since the last look; gives whether there is something to be looked at again.
    fn look(&self) -> bool {
        self.sweep_unneeded(false);
        let mut state = self.lock();
        state.is_watched = state.reservations.values().any(Reservation::is_stale);
        state.is_watched
    }

    fn sweep_unneeded(&self, is_any_wanted: bool) {
        let unneeded: Vec<_> = {
            let mut state = self.lock();
            let each = state.reservations.iter_mut();
            each.map(|(&base, reservation)| (base, reservation.unneeded(is_any_wanted))).collect()
        };
        for (base, areas) in unneeded {
            if let Some(view) = self.view_of(base) {
                areas.into_iter().for_each(|area| self.sweep(base, &view, area));
            }
        }
    }

    /// Drops the physical memory of the large free ranges of a stripe, piece by piece, each of which is taken meanwhile. They
    /// are swept from their ends, since what is taken of one is taken where it begins.
    fn sweep(&self, base: ExecutorAddr, view: &StripedView, area: ExecutorAddrRange) {
        let large = self.lock().reservations.get_mut(&base).map(|reservation| reservation.large_free(area));
        for range in large.into_iter().flatten() {
            let mut rest = range;
            while !rest.is_empty() && !self.watch.is_ending.load(Ordering::Relaxed) {
                let start = rest.end().checked_sub(PIECE_BYTES).map_or(range.start(), |start| start.max(range.start()));
                let piece = ExecutorAddrRange::new(start, rest.end()).expect("it is a part of the range");
                let take = |reservation: &mut Reservation| reservation.take_to_sweep(range.end(), piece, rest.len());
                let Some(taken) = self.lock().reservations.get_mut(&base).and_then(take) else { break };
                view.trim(taken);
                if let Some(reservation) = self.lock().reservations.get_mut(&base) {
                    reservation.give_swept(taken);
                }
                rest = ExecutorAddrRange::new(range.start(), start).expect("it is what is left of the range");
            }
        }
    }
}
