//! Keys for allocations in stripes of executors that know pages only.
//!
//! Such an executor keeps the actions of an allocation under the lowest address of its segments, which it protects, and so
//! has to be that of a page. An allocation in stripes has no page of its own: it gets one in a reservation that is never
//! written, and so has no memory, to be known by.

use farlink_addr::{ExecutorAddr, ExecutorAddrRange, PageSize};
use rustc_hash::FxHashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Pages, each of which is free or stands for an allocation.
pub(super) struct KeyPages {
    page_size: PageSize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    reservations: Vec<ExecutorAddrRange>,
    free: Vec<ExecutorAddr>,
    /// The page of each key, and how many keys had got one before.
    pages: FxHashMap<ExecutorAddr, (ExecutorAddr, u64)>,
    assigned: u64,
}

impl KeyPages {
    pub(super) fn new(page_size: PageSize) -> Self {
        Self { page_size, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic half-way through a change runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the pages of a reservation.
    pub(super) fn add(&self, range: ExecutorAddrRange) {
        let page = self.page_size.bytes();
        let count = range.len() / page;
        let mut state = self.lock();
        state.reservations.push(range);
        // The lowest are used first: those in use are next to each other, and so is what the executor maps.
        state.free.extend((0..count).rev().filter_map(|index| range.start().checked_add(index * page)));
    }

    /// Gives a page to each key: the page and the base of the reservation that it is in. None if there are too few.
    pub(super) fn assign(&self, keys: &[ExecutorAddr]) -> Option<Vec<(ExecutorAddr, ExecutorAddr)>> {
        let mut state = self.lock();
        if state.free.len() < keys.len() {
            return None;
        }
        let mut assigned = Vec::with_capacity(keys.len());
        for &key in keys {
            let page = state.free.pop()?;
            let base = state.reservations.iter().find(|range| range.contains(page))?.start();
            let number = state.assigned;
            state.pages.insert(key, (page, number));
            state.assigned += 1;
            assigned.push((page, base));
        }
        Some(assigned)
    }

    /// Replaces each key by its page, if it has one, which it then no longer has; gives those pages.
    pub(super) fn withdraw(&self, keys: &mut [ExecutorAddr]) -> Vec<ExecutorAddr> {
        let mut state = self.lock();
        let mut withdrawn = Vec::new();
        for key in keys {
            if let Some((page, _)) = state.pages.remove(key) {
                withdrawn.push(page);
                *key = page;
            }
        }
        withdrawn
    }

    /// Returns the keys in any of `ranges` that have pages, in the order in which they got those.
    pub(super) fn keys_in(&self, ranges: &[ExecutorAddrRange]) -> Vec<ExecutorAddr> {
        let state = self.lock();
        let inside = state.pages.iter().filter(|(key, _)| ranges.iter().any(|range| range.contains(**key)));
        let mut keys: Vec<_> = inside.map(|(&key, &(_, number))| (number, key)).collect();
        keys.sort_unstable();
        keys.into_iter().map(|(_, key)| key).collect()
    }

    /// Makes pages free that stand for nothing any more: the executor has forgotten them.
    pub(super) fn give_back(&self, pages: Vec<ExecutorAddr>) {
        self.lock().free.extend(pages);
    }
}
