//! What a manager knows of its reservations, and what becomes of places that are given back.

use super::Inner;
use super::space::{Place, Reservation};
use farlink_addr::ExecutorAddr;
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct State {
    pub(super) reservations: BTreeMap<ExecutorAddr, Reservation>,
    /// Reservations for buffers.
    pub(super) buffers: BTreeMap<ExecutorAddr, Reservation>,
    pub(super) live_allocations: u64,
    pub(super) requested_bytes: u64,
    /// Whether somebody looks what is not needed any more.
    pub(super) is_watched: bool,
}

impl State {
    /// Gives back a place. If that leaves its reservation without allocations, takes out others that have none, to be
    /// released; or that one, if it was for one allocation.
    fn give(&mut self, place: &Place, is_exclusive: bool) -> Vec<ExecutorAddr> {
        // An allocation of another manager has no place here.
        let Some(reservation) = self.reservations.get_mut(&place.reservation) else { return Vec::new() };
        if !place.ranges.iter().all(|&range| reservation.range.contains_range(range)) {
            return Vec::new();
        }
        self.live_allocations -= 1;
        self.requested_bytes -= place.requested_bytes;
        reservation.give(&place.ranges);
        if reservation.live > 0 {
            return Vec::new();
        }
        // One is kept, so that a program that links and removes by turns does not reserve each time. There may be several
        // others, since threads that find no room at the same time all reserve.
        let is_spare = |(&base, other): (&ExecutorAddr, &Reservation)| {
            other.live == 0 && (base == place.reservation) == is_exclusive
        };
        let spare: Vec<_> = self.reservations.iter().filter(|&entry| is_spare(entry)).map(|(&base, _)| base).collect();
        spare.iter().for_each(|base| drop(self.reservations.remove(base)));
        spare
    }
}

impl Inner {
    /// Gives a place back, and has an eye kept on it if it is much that has become free.
    pub(super) fn give(&self, place: &Place) {
        let (spare, is_unwatched) = {
            let mut state = self.lock();
            let spare = state.give(place, self.mapper.is_exclusive());
            let is_stale = state.reservations.get(&place.reservation).is_some_and(Reservation::is_stale);
            (spare, is_stale && !std::mem::replace(&mut state.is_watched, true))
        };
        if !spare.is_empty() {
            // Nothing is there any more that could go wrong, and nobody to be told.
            drop(self.mapper.release(spare));
        }
        if is_unwatched {
            self.watch();
        }
    }
}
