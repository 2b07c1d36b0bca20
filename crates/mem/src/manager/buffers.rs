//! Buffers: allocations of memory that both processes use, in reservations of their own.

use super::alloc::Taken;
use super::space::{Place, Request, Reservation};
use super::{Inner, MemoryManager, SegmentLayout, SharedBuffer};
use crate::Error;
use farlink_addr::{Align, AllocGroup, ExecutorAddrRange, MemProt};
use farlink_rpc::Pending;
use std::sync::Arc;

/// Bytes that are reserved for buffers at once, unless one is larger: 64 MiB. Pages are used only as they are touched.
const BUFFER_RESERVATION_BYTES: u64 = 64 << 20;

/// Buffers begin at multiples of a cache line's bytes.
const BUFFER_ALIGN: Align = match Align::new(64) {
    Some(align) => align,
    None => unreachable!(),
};

impl MemoryManager {
    /// Allocates `bytes` that both processes read and write for as long as they like: see [`SharedBuffer`].
    ///
    /// Makes no call to the executor if a reservation for buffers has room. The operation fails with
    /// [`Error::NotShared`] if the executor's memory is reached by messages only, and if there is no memory.
    pub fn allocate_buffer(&self, bytes: u64) -> Pending<Result<SharedBuffer, Error>> {
        let layout = SegmentLayout {
            group: AllocGroup::standard(MemProt::RW),
            content_bytes: bytes,
            zero_fill_bytes: 0,
            align: BUFFER_ALIGN,
        };
        let request = match Request::new(vec![layout], self.inner.page_size) {
            Ok(request) => request,
            Err(error) => return Pending::ready(Err(error)),
        };
        if let Some(buffer) = self.inner.take_buffer(&request) {
            return Pending::ready(buffer);
        }
        let inner = Arc::clone(&self.inner);
        let wanted = request.reserve_bytes(BUFFER_RESERVATION_BYTES, self.inner.page_size);
        self.inner.mapper.reserve_buffers(wanted).map(move |reserved| {
            let range = reserved?;
            let reservation = Reservation::new(range, &*inner.mapper);
            inner.lock().buffers.insert(range.start(), reservation);
            let taken = inner.take_buffer(&request);
            taken.unwrap_or(Err(Error::OutOfAddressSpace { bytes: wanted }))
        })
    }
}

impl Inner {
    /// Takes a buffer from the first reservation for buffers that has it.
    fn take_buffer(self: &Arc<Self>, request: &Request) -> Option<Result<SharedBuffer, Error>> {
        let mut state = self.lock();
        let found = state.buffers.iter_mut().find_map(|(&base, reservation)| {
            let ranges = reservation.take(request)?;
            let (is_striped, requested_bytes) = (reservation.is_striped(), request.requested_bytes());
            Some(Place { reservation: base, ranges, is_striped, requested_bytes, view: None })
        });
        drop(state);
        let place = found?;
        let bytes = request.requested_bytes();
        let range = ExecutorAddrRange::from_len(place.ranges[0].start(), bytes).expect("the range has all of it");
        let taken = Taken { inner: Arc::clone(self), place: Some(place) };
        Some(match self.mapper.prepare(range) {
            Ok(working) => Ok(SharedBuffer { range, working, taken }),
            Err(error) => {
                if let Some(place) = taken.keep() {
                    self.free_buffer(&place);
                }
                Err(error)
            }
        })
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
