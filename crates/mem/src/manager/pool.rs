//! What a manager knows of its reservations, and what it gives back to the system.

use super::Inner;
use super::space::{Place, Reservation};
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt};
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct State {
    pub(super) reservations: BTreeMap<ExecutorAddr, Reservation>,
    /// Reservations for buffers.
    pub(super) buffers: BTreeMap<ExecutorAddr, Reservation>,
    pub(super) live_allocations: u64,
    pub(super) requested_bytes: u64,
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
    /// Gives a place back, and to the system what nobody needs any more.
    pub(super) fn give(&self, place: &Place) {
        let (spare, stale) = {
            let mut state = self.lock();
            let spare = state.give(place, self.mapper.is_exclusive());
            (spare, state.reservations.get_mut(&place.reservation).map(Reservation::stale).unwrap_or_default())
        };
        if !spare.is_empty() {
            // Nothing is there any more that could go wrong, and nobody to be told.
            drop(self.mapper.release(spare));
        }
        for (prot, area) in stale {
            self.sweep(place.reservation, prot, area);
        }
    }

    /// Drops the physical memory of the large free ranges of a stripe. Each is taken meanwhile.
    fn sweep(&self, base: ExecutorAddr, prot: MemProt, area: ExecutorAddrRange) {
        let large = self.lock().reservations.get_mut(&base).map(|reservation| reservation.large_free(area));
        for start in large.into_iter().flatten() {
            let take = |reservation: &mut Reservation| reservation.take_to_sweep(area, start);
            let Some(range) = self.lock().reservations.get_mut(&base).and_then(take) else { continue };
            // Also of code: where this is done, there is none.
            self.mapper.discard(&[(AllocGroup::standard(prot.difference(MemProt::EXEC)), range)]);
            if let Some(reservation) = self.lock().reservations.get_mut(&base) {
                reservation.give_swept(range);
            }
        }
    }

    /// Ends a buffer. What is in it is dropped, and its reservation if nothing else is in it.
    pub(super) fn free_buffer(&self, place: &Place) {
        let segments: Vec<_> = place.ranges.iter().map(|&range| (AllocGroup::standard(MemProt::RW), range)).collect();
        self.mapper.discard(&segments);
        let is_empty = {
            let mut state = self.lock();
            let Some(reservation) = state.buffers.get_mut(&place.reservation) else { return };
            reservation.give(&place.ranges);
            let is_empty = reservation.live == 0;
            if is_empty {
                state.buffers.remove(&place.reservation);
            }
            is_empty
        };
        if is_empty {
            // As above.
            drop(self.mapper.release(vec![place.reservation]));
        }
    }
}
