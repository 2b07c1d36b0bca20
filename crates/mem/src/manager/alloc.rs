//! Allocations and their states, which are types.

use super::Inner;
use super::space::Place;
use crate::{FinalizeSegment, WorkingMemory};
use farlink_addr::{Align, AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt};
use smallvec::SmallVec;
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
    kept: Kept,
    /// The number of its manager.
    pub(super) manager: u32,
    pub(super) is_striped: bool,
    /// Whether the mapper has finalized it, and so has to deallocate it.
    pub(super) is_told: bool,
    /// Whether its code is in the directory of its reservation.
    pub(super) is_published: bool,
}

/// The segments of an allocation, and where they are.
pub(super) type Segments = SmallVec<[(AllocGroup, ExecutorAddrRange); NEAR]>;

/// How many segments an allocation has as a rule: one for each of three protections.
const NEAR: usize = 3;

/// Segments as they are kept: there may be a million of them.
enum Kept {
    /// Up to three, as offsets in their reservation and lengths. Those that are not there have the length 0.
    Near {
        groups: [AllocGroup; NEAR],
        places: [(u32, u32); NEAR],
    },
    Far(Box<[(AllocGroup, ExecutorAddrRange)]>),
}

impl Kept {
    fn new(reservation: ExecutorAddr, segments: &[(AllocGroup, ExecutorAddrRange)]) -> Self {
        let mut groups = [AllocGroup::standard(MemProt::empty()); NEAR];
        let mut places = [(0, 0); NEAR];
        if segments.len() > NEAR {
            return Self::Far(segments.into());
        }
        for (index, (group, range)) in segments.iter().enumerate() {
            let offset = range.start().offset_from(reservation).and_then(|offset| u32::try_from(offset).ok());
            let length = u32::try_from(range.len()).ok().filter(|&length| length > 0);
            let Some(place) = offset.zip(length) else { return Self::Far(segments.into()) };
            (groups[index], places[index]) = (*group, place);
        }
        Self::Near { groups, places }
    }
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
    /// Returns the allocation with these segments that is at `place`.
    pub(super) fn new(manager: u32, place: &Place, segments: &[AllocatedSegment], is_told: bool) -> Self {
        let (reservation, is_striped) = (place.reservation, place.is_striped);
        let segments: Segments = segments.iter().map(|segment| (segment.group, segment.range)).collect();
        let kept = Kept::new(reservation, &segments);
        Self { reservation, kept, manager, is_striped, is_told, is_published: false }
    }

    /// Returns the allocation's lowest address, which names it to the executor.
    #[must_use]
    pub fn key(&self) -> ExecutorAddr {
        let starts = self.parts().into_iter().map(|(_, range)| range.start());
        starts.min().expect("an allocation has segments")
    }

    /// Returns whether the allocation is in stripes, which this process has mapped: [`MemoryManager::view`] shows it.
    ///
    /// [`MemoryManager::view`]: crate::MemoryManager::view
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        self.is_striped
    }

    /// Returns the segments' groups and addresses.
    #[must_use]
    pub fn segments(&self) -> Vec<(AllocGroup, ExecutorAddrRange)> {
        self.parts().into_vec()
    }

    /// As [`Self::segments`].
    pub(super) fn parts(&self) -> Segments {
        match &self.kept {
            Kept::Far(segments) => Segments::from_slice(segments),
            Kept::Near { groups, places } => {
                let segment = |(&group, &(offset, length)): (&AllocGroup, &(u32, u32))| {
                    let start = self.reservation.checked_add(offset.into())?;
                    Some((group, ExecutorAddrRange::from_len(start, length.into()).filter(|range| !range.is_empty())?))
                };
                groups.iter().zip(places).filter_map(segment).collect()
            }
        }
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
