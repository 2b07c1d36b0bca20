//! Allocations and their states, which are types.

use super::Inner;
use super::space::Place;
use crate::{FinalizeSegment, WorkingMemory};
use farlink_addr::{Align, AllocGroup, ExecutorAddr, ExecutorAddrRange};
use std::sync::Arc;

/// What a segment needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentLayout {
    /// Protection and lifetime.
    pub group: AllocGroup,
    /// Length of the content in bytes.
    pub content_bytes: u64,
    /// Length in bytes of the zeros after the content.
    pub zero_fill_bytes: u64,
    /// Alignment of the first byte.
    pub align: Align,
}

/// A segment that has been allocated.
#[derive(Clone, Debug)]
pub struct AllocatedSegment {
    /// Protection and lifetime.
    pub group: AllocGroup,
    /// Its addresses, zero fill included.
    pub range: ExecutorAddrRange,
    /// Length of the content in bytes.
    pub content_bytes: u64,
    /// Where the content is written. It has the content's length and is zero, but for code in a stripe, which traps.
    pub working: WorkingMemory,
}

/// Ranges taken from a reservation. Given back when dropped.
pub(super) struct Taken {
    pub(super) inner: Arc<Inner>,
    pub(super) place: Option<Place>,
}

impl Taken {
    /// Keeps the ranges from being given back.
    pub(super) fn keep(mut self) -> Option<Place> {
        self.place.take()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(place) = &self.place {
            self.inner.give(place);
        }
    }
}

/// An allocation whose content is being written. Dropping it abandons it: what it took is free again.
#[must_use = "dropping an allocation in flight abandons it"]
pub struct InFlightAlloc {
    pub(super) segments: Vec<AllocatedSegment>,
    pub(super) taken: Option<Taken>,
}

/// An allocation whose content is final. It lives until it is given to
/// [`MemoryManager::deallocate`](crate::MemoryManager::deallocate), the manager goes
/// or its session ends; dropping it does not end it.
#[must_use = "finalized memory lives until it is deallocated"]
pub struct FinalizedAlloc {
    pub(super) reservation: ExecutorAddr,
    pub(super) segments: Box<[(AllocGroup, ExecutorAddrRange)]>,
    pub(super) is_striped: bool,
    /// Whether its code is in the directory of its reservation.
    pub(super) is_published: bool,
}

impl InFlightAlloc {
    /// Returns the segments, in the order in which they were asked for.
    #[must_use]
    pub fn segments(&self) -> &[AllocatedSegment] {
        &self.segments
    }

    /// Gives up the allocation: what it took is free again.
    pub fn abandon(self) {}
}

impl Drop for InFlightAlloc {
    fn drop(&mut self) {
        if self.taken.is_some() {
            // Whoever allocates the range next finds it zero.
            for segment in &self.segments {
                segment.working.zero();
            }
        }
    }
}

impl FinalizedAlloc {
    /// Returns the allocation's lowest address, which names it to the executor.
    #[must_use]
    pub fn key(&self) -> ExecutorAddr {
        let starts = self.segments.iter().map(|(_, range)| range.start());
        starts.min().expect("an allocation has segments")
    }

    /// Returns the segments' groups and addresses.
    #[must_use]
    pub fn segments(&self) -> &[(AllocGroup, ExecutorAddrRange)] {
        &self.segments
    }
}

impl From<AllocatedSegment> for FinalizeSegment {
    fn from(segment: AllocatedSegment) -> Self {
        let AllocatedSegment { group, range, content_bytes, working } = segment;
        Self { group, range, content_bytes, working }
    }
}

/// Memory that the controller and the executor read and write for as long as this lives, and that the executor's children
/// share. It is zero at first. Dropping it frees it: nothing in the executor may use it any more.
pub struct SharedBuffer {
    pub(super) range: ExecutorAddrRange,
    pub(super) working: WorkingMemory,
    pub(super) taken: Taken,
}

impl SharedBuffer {
    /// Returns its addresses in the executor.
    #[must_use]
    pub fn range(&self) -> ExecutorAddrRange {
        self.range
    }

    /// Returns this process's view of it. The executor may write it at any time, so it is to be accessed by
    /// [`WorkingMemory::read_volatile`] and [`WorkingMemory::write_volatile`].
    #[must_use]
    pub fn memory(&self) -> &WorkingMemory {
        &self.working
    }
}

impl Drop for SharedBuffer {
    fn drop(&mut self) {
        if let Some(place) = self.taken.place.take() {
            self.taken.inner.free_buffer(&place);
        }
    }
}
