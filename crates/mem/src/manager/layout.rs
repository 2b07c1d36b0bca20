//! Where everything is in reserved space, to be shown.

use super::space::{Area, Reservation};
use super::{Inner, MemoryManager};
use farlink_addr::{ExecutorAddrRange, MemProt};

/// A reservation, as it is divided.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReservationLayout {
    /// Its addresses.
    pub range: ExecutorAddrRange,
    /// Whether it is for buffers that both processes use, instead of linked code and data.
    pub is_for_buffers: bool,
    /// Its stripes, or one area for all protections. What is between them cannot be accessed.
    pub areas: Vec<AreaLayout>,
}

/// A stripe, or a reservation without stripes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AreaLayout {
    /// The protection of a stripe.
    pub prot: Option<MemProt>,
    /// Its addresses.
    pub range: ExecutorAddrRange,
    /// What of it is free, by address. The rest is allocated.
    pub free: Vec<ExecutorAddrRange>,
}

impl MemoryManager {
    /// Returns the reservations by address, as they are divided at this moment.
    #[must_use]
    pub fn layout(&self) -> Vec<ReservationLayout> {
        self.inner.layout()
    }
}

impl Inner {
    fn layout(&self) -> Vec<ReservationLayout> {
        let state = self.lock();
        let linked = state.reservations.values().map(|reservation| layout(reservation, false));
        let mut all: Vec<_> =
            linked.chain(state.buffers.values().map(|reservation| layout(reservation, true))).collect();
        all.sort_by_key(|reservation| reservation.range);
        all
    }
}

fn layout(reservation: &Reservation, is_for_buffers: bool) -> ReservationLayout {
    let area = |area: &Area| AreaLayout { prot: area.prot, range: area.range, free: area.free.ranges() };
    ReservationLayout { range: reservation.range, is_for_buffers, areas: reservation.areas.iter().map(area).collect() }
}
