//! Allocation of executor memory from reserved space.
//!
//! The manager reserves in large units and allocates from them, so most allocations make no call to the executor. An
//! allocation has a segment for each protection. In a reservation with stripes each is packed in the stripe of its
//! protection; in one without, they are whole pages beside each other. An allocation never straddles two reservations.
//! Its states are types: [`InFlightAlloc`] while content is written, [`FinalizedAlloc`] from finalize to
//! deallocate. Dropping one that is in flight abandons it.

mod space;

use crate::{Error, FinalizeRequest, FinalizeSegment, MemoryMapper, WorkingMemory};
use farlink_addr::{Align, AllocGroup, ExecutorAddr, ExecutorAddrRange, PageSize};
use farlink_rpc::{CallError, Pending};
use farlink_wire::msg::ActionPair;
use space::{Place, Request, Reservation};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

/// What a manager holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryStats {
    /// Number of reservations.
    pub reservations: u64,
    /// Bytes of address space reserved.
    pub reserved_bytes: u64,
    /// Bytes allocated, in whole pages.
    pub live_bytes: u64,
    /// Bytes that are free in reservations.
    pub free_bytes: u64,
    /// Length in bytes of the longest free range.
    pub largest_free_bytes: u64,
    /// Number of allocations, in flight and finalized.
    pub live_allocations: u64,
}

/// Allocates executor memory through a [`MemoryMapper`].
///
/// Dropping it releases its reservations with whatever is finalized in them, and waits until that is done; allocations
/// in flight and results that are pending keep them until they go.
pub struct MemoryManager {
    inner: Arc<Inner>,
}

struct Inner {
    mapper: Arc<dyn MemoryMapper>,
    page_size: PageSize,
    reservation_bytes: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    reservations: BTreeMap<ExecutorAddr, Reservation>,
    live_allocations: u64,
}

impl State {
    fn give(&mut self, place: &Place) {
        // An allocation of another manager has no place here.
        if let Some(reservation) = self.reservations.get_mut(&place.reservation)
            && place.ranges.iter().all(|&range| reservation.range.contains_range(range))
        {
            self.live_allocations -= 1;
            reservation.give(&place.ranges);
        }
    }
}

/// Ranges taken from a reservation. Given back when dropped.
struct Taken {
    inner: Arc<Inner>,
    place: Option<Place>,
}

impl Taken {
    /// Keeps the ranges from being given back.
    fn keep(mut self) -> Option<Place> {
        self.place.take()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(place) = &self.place {
            self.inner.lock().give(place);
        }
    }
}

/// An allocation whose content is being written. Dropping it abandons it: what it took is free again.
#[must_use = "dropping an allocation in flight abandons it"]
pub struct InFlightAlloc {
    segments: Vec<AllocatedSegment>,
    taken: Option<Taken>,
}

/// An allocation whose content is final. It lives until it is given to [`MemoryManager::deallocate`], the manager goes
/// or its session ends; dropping it does not end it.
#[must_use = "finalized memory lives until it is deallocated"]
pub struct FinalizedAlloc {
    key: ExecutorAddr,
    segments: Vec<(AllocGroup, ExecutorAddrRange)>,
    place: Place,
}

impl MemoryManager {
    /// Returns a manager that reserves `reservation_bytes` at a time.
    #[must_use]
    pub fn new(mapper: Arc<dyn MemoryMapper>, reservation_bytes: u64) -> Self {
        let page_size = mapper.page_size();
        Self { inner: Arc::new(Inner { mapper, page_size, reservation_bytes, state: Mutex::default() }) }
    }

    /// Allocates a segment for each element of `segments`, in their order, in one reservation.
    ///
    /// Makes no call to the executor if a reservation has room; else reserves, of a size that is halved, down to what
    /// is needed, while the executor refuses it. The operation fails if a size or an alignment is beyond what can be,
    /// or there is no memory.
    pub fn allocate(&self, segments: Vec<SegmentLayout>) -> Pending<Result<InFlightAlloc, Error>> {
        let request = match Request::new(segments, self.inner.page_size) {
            Ok(request) => request,
            Err(error) => return Pending::ready(Err(error)),
        };
        if let Some(taken) = self.inner.take(&request) {
            return Pending::ready(self.inner.prepare(request, taken));
        }
        let inner = Arc::clone(&self.inner);
        let wanted = self.inner.wanted_bytes(&request);
        self.inner.mapper.reserve(wanted).map(move |reserved| inner.grow(request, wanted, reserved))
    }

    /// Finalizes allocations with one request, all or none. On failure all of them are free again, unless it is
    /// unknown what the executor did: when the connection ended or the answer makes no sense, or when the result is
    /// dropped instead of waited for, they stay taken.
    pub fn finalize(
        &self,
        batch: Vec<(InFlightAlloc, Vec<ActionPair>)>,
    ) -> Pending<Result<Vec<FinalizedAlloc>, Error>> {
        let mut requests = Vec::with_capacity(batch.len());
        // Places and not what gives them back when dropped: the executor may finalize what nobody waits for.
        let mut in_flight = Vec::with_capacity(batch.len());
        for (mut alloc, actions) in batch {
            let Some(place) = alloc.taken.take().and_then(Taken::keep) else { continue };
            let (segments, reservation) = (std::mem::take(&mut alloc.segments), place.reservation);
            in_flight.push((place, segments.iter().map(|segment| (segment.group, segment.range)).collect::<Vec<_>>()));
            requests.push(FinalizeRequest {
                reservation,
                segments: segments.into_iter().map(finalize_segment).collect(),
                actions,
            });
        }
        let inner = Arc::clone(&self.inner);
        self.inner.mapper.finalize(requests).map(move |keys| match keys {
            Ok(keys) if keys.len() == in_flight.len() => {
                let finalized = keys.into_iter().zip(in_flight);
                Ok(finalized.map(|(key, (place, segments))| FinalizedAlloc { key, segments, place }).collect())
            }
            Ok(keys) => {
                let text = format!("{} keys for {} allocations", keys.len(), in_flight.len());
                Err(Error::BadAnswer { what: "finalize", text })
            }
            Err(error) => {
                // The mapper has made the ranges as they were reserved, if it knows what became of them.
                if !error.leaves_unknown() {
                    inner.free(in_flight);
                }
                Err(error)
            }
        })
    }

    /// Ends allocations with one request: their dealloc actions run, and their ranges are free again, also if an
    /// action fails. If the executor cannot be reached, or the result is dropped instead of waited for, they stay
    /// taken.
    pub fn deallocate(&self, allocs: Vec<FinalizedAlloc>) -> Pending<Result<(), Error>> {
        let keys = allocs.iter().map(|alloc| alloc.key).collect();
        let inner = Arc::clone(&self.inner);
        self.inner.mapper.deallocate(keys).map(move |result| {
            // Only an executor that ran the request has nothing there any more. One that cannot be asked why it refused
            // a valid request did run it: its actions failed.
            if matches!(result, Ok(()) | Err(Error::Actions(_) | Error::Refused { .. })) {
                inner.free(allocs.into_iter().map(|alloc| (alloc.place, alloc.segments)));
            }
            result
        })
    }

    /// Returns what the manager holds.
    #[must_use]
    pub fn stats(&self) -> MemoryStats {
        let state = self.inner.lock();
        let mut stats = MemoryStats { live_allocations: state.live_allocations, ..MemoryStats::default() };
        for reservation in state.reservations.values() {
            stats.reservations += 1;
            stats.reserved_bytes += reservation.range.len();
            for area in &reservation.areas {
                let free = area.free.total();
                stats.free_bytes += free;
                stats.live_bytes += area.range.len() - free;
                stats.largest_free_bytes = stats.largest_free_bytes.max(area.free.largest());
            }
        }
        stats
    }
}

fn finalize_segment(segment: AllocatedSegment) -> FinalizeSegment {
    let AllocatedSegment { group, range, content_bytes, working } = segment;
    FinalizeSegment { group, range, content_bytes, working }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let bases: Vec<_> = std::mem::take(&mut state.reservations).into_keys().collect();
        if !bases.is_empty() {
            // An executor that has gone has released everything by that.
            let _ = self.mapper.release(bases).wait();
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic half-way through a change runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how much to reserve for a request that no reservation has room for.
    fn wanted_bytes(&self, request: &Request) -> u64 {
        let usual = request.reserve_bytes(self.reservation_bytes, self.page_size);
        // Where earlier reservations have stripes, the next one has.
        let is_striped = self.lock().reservations.values().any(Reservation::is_striped);
        if is_striped { usual.max(request.striped_bytes(self.page_size)) } else { usual }
    }

    /// Makes what was allocated ready for others, and gives it back.
    fn free(&self, allocations: impl IntoIterator<Item = (Place, Vec<(AllocGroup, ExecutorAddrRange)>)>) {
        for (place, segments) in allocations {
            if place.is_striped {
                self.mapper.recycle(&segments);
            }
            self.lock().give(&place);
        }
    }

    /// Takes what a request needs from the first reservation that has it.
    fn take(self: &Arc<Self>, request: &Request) -> Option<Taken> {
        let mut state = self.lock();
        let found = state.reservations.iter_mut().find_map(|(&base, reservation)| {
            let ranges = reservation.take(request)?;
            Some(Place { reservation: base, ranges, is_striped: reservation.is_striped() })
        });
        let place = found?;
        state.live_allocations += 1;
        Some(Taken { inner: Arc::clone(self), place: Some(place) })
    }

    /// Adds what was reserved, or tries again with less, and allocates from it.
    fn grow(
        self: Arc<Self>,
        request: Request,
        mut wanted: u64,
        mut reserved: Result<ExecutorAddrRange, Error>,
    ) -> Result<InFlightAlloc, Error> {
        let least = request.reserve_bytes(0, self.page_size);
        loop {
            match reserved {
                Ok(range) if range.len() < least => {
                    let _ = self.mapper.release(vec![range.start()]).wait();
                    let text = format!("{range} is less than {least} bytes");
                    return Err(Error::BadAnswer { what: "reserve", text });
                }
                Ok(range) => {
                    let reservation = Reservation::new(range, self.mapper.stripes(range.start()));
                    if reservation.is_striped() {
                        // The next one, if this is not enough: a stripe is only a part of a reservation.
                        wanted = wanted.max(request.striped_bytes(self.page_size));
                    }
                    self.lock().reservations.insert(range.start(), reservation);
                    // Another thread may be quicker to take from it, or have grown already.
                    if let Some(taken) = self.take(&request) {
                        return self.prepare(request, taken);
                    }
                }
                Err(error) if wanted <= least || !error.may_be_size() => return Err(error),
                Err(_) => wanted = (wanted / 2).max(least),
            }
            reserved = self.mapper.reserve(wanted).wait();
        }
    }

    /// Places the segments in the range that was taken, and prepares their working memory.
    fn prepare(&self, request: Request, taken: Taken) -> Result<InFlightAlloc, Error> {
        let place = taken.place.as_ref();
        let (ranges, is_striped) = place.map_or((&[][..], false), |place| (&place.ranges[..], place.is_striped));
        let place = |(index, (layout, offset)): (usize, (SegmentLayout, u64))| {
            // In stripes each segment has a range, else all have one.
            let (range, offset) = if is_striped { (ranges[index], 0) } else { (ranges[0], offset) };
            let addr = range.start().checked_add(offset).expect("the range has all segments");
            let len = layout.content_bytes + layout.zero_fill_bytes;
            let range = |len| ExecutorAddrRange::from_len(addr, len).expect("the range has all segments");
            if let Some(zeros) = ExecutorAddrRange::new(range(layout.content_bytes).end(), range(len).end())
                && !zeros.is_empty()
            {
                self.mapper.secure(zeros)?;
            }
            let working = self.mapper.prepare(range(layout.content_bytes))?;
            let (group, content_bytes) = (layout.group, layout.content_bytes);
            Ok(AllocatedSegment { group, range: range(len), content_bytes, working })
        };
        let segments: Result<Vec<_>, Error> = request.segments.into_iter().enumerate().map(place).collect();
        Ok(InFlightAlloc { segments: segments?, taken: Some(taken) })
    }
}

impl Error {
    /// Whether the executor may have done what failed: it cannot be told from the error.
    fn leaves_unknown(&self) -> bool {
        let is_unsent = matches!(self, Self::Call(CallError::Missing(_) | CallError::TooLarge { .. }));
        matches!(self, Self::Call(_) | Self::BadAnswer { .. }) && !is_unsent
    }

    /// Whether a smaller reservation might succeed.
    fn may_be_size(&self) -> bool {
        matches!(
            self,
            Self::OutOfAddressSpace { .. }
                | Self::BadSize { .. }
                | Self::Refused { .. }
                | Self::SharedMemory { what: "mapped", .. }
        )
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
    /// Returns the allocation's lowest address, which names it to the executor.
    #[must_use]
    pub fn key(&self) -> ExecutorAddr {
        self.key
    }

    /// Returns the segments' groups and addresses.
    #[must_use]
    pub fn segments(&self) -> &[(AllocGroup, ExecutorAddrRange)] {
        &self.segments
    }
}
