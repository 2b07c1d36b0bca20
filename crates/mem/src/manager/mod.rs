//! Allocation of executor memory from reserved space.
//!
//! The manager reserves in large units and allocates from them, so most allocations make no call to the executor. An
//! allocation has a segment for each protection. In a reservation with stripes each is packed in the stripe of its
//! protection; in one without, they are whole pages beside each other. An allocation never straddles two reservations.
//! Its states are types: [`InFlightAlloc`] while content is written, [`FinalizedAlloc`] from finalize to
//! deallocate. Dropping one that is in flight abandons it.

mod access;
mod alloc;
mod buffers;
mod finding;
mod layout;
mod pool;
mod space;
mod sweep;

pub use alloc::{AllocatedSegment, FinalizedAlloc, InFlightAlloc, SegmentLayout, SharedBuffer};
pub use finding::DirectoryActions;
pub use layout::{AreaLayout, ReservationLayout};

use crate::{Error, FinalizeRequest, FinalizeSegment, MemoryMapper, StripeBytes, StripedView};
use alloc::Taken;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange, PageSize};
use farlink_rpc::{CallError, Pending};
use farlink_wire::msg::ActionPair;
use pool::State;
use space::{Place, Request, Reservation, is_code};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use sweep::Watch;

/// What a manager holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryStats {
    /// Number of reservations.
    pub reservations: u64,
    /// Bytes of address space reserved.
    pub reserved_bytes: u64,
    /// Bytes allocated: in whole pages, or in stripes in multiples of 8, and 32 for code.
    pub live_bytes: u64,
    /// Bytes that were asked for in those allocations; the rest is lost to alignment.
    pub requested_bytes: u64,
    /// Bytes of tables by which executors find code. Most of them are never touched.
    pub table_bytes: u64,
    /// Bytes that are free in reservations.
    pub free_bytes: u64,
    /// Length in bytes of the longest free range.
    pub largest_free_bytes: u64,
    /// Number of allocations, in flight and finalized.
    pub live_allocations: u64,
}

/// Number of managers that there have been.
static MANAGERS: AtomicU32 = AtomicU32::new(0);

/// Allocates executor memory through a [`MemoryMapper`].
///
/// Dropping it releases its reservations with whatever is finalized in them, and waits until that is done; allocations
/// in flight and results that are pending keep them until they go.
pub struct MemoryManager {
    inner: Arc<Inner>,
}

struct Inner {
    /// Tells its allocations from those of other managers of this process.
    number: u32,
    mapper: Arc<dyn MemoryMapper>,
    page_size: PageSize,
    reservation_bytes: u64,
    /// What has the executor find code by a directory, if it can.
    directory_actions: Option<DirectoryActions>,
    state: Mutex<State>,
    /// A reservation that has been asked for before an allocation needs it.
    ahead: Mutex<Option<Pending<Result<ExecutorAddrRange, Error>>>>,
    watch: Arc<Watch>,
}

impl MemoryManager {
    /// Returns a manager that reserves `reservation_bytes` at a time.
    #[must_use]
    pub fn new(mapper: Arc<dyn MemoryMapper>, reservation_bytes: u64) -> Self {
        Self::with_directories(mapper, reservation_bytes, None)
    }

    /// As [`Self::new`]; with these actions the executor can find code that [`Self::publish`] has told of.
    #[must_use]
    pub fn with_directories(
        mapper: Arc<dyn MemoryMapper>,
        reservation_bytes: u64,
        directory_actions: Option<DirectoryActions>,
    ) -> Self {
        let page_size = mapper.page_size();
        let number = MANAGERS.fetch_add(1, Ordering::Relaxed);
        let inner = Arc::new_cyclic(|inner| {
            let (state, ahead, watch) = (Mutex::default(), Mutex::default(), Watch::new(Weak::clone(inner)));
            Inner { number, mapper, page_size, reservation_bytes, directory_actions, state, ahead, watch }
        });
        Self { inner }
    }

    /// Asks for the first reservation without waiting for it: the executor makes it while the controller prepares what goes
    /// there. For an executor that ends with the manager: one that is never needed stays reserved there.
    pub fn reserve_ahead(&self) {
        let reserved = self.inner.mapper.reserve(self.inner.reservation_bytes);
        *self.inner.ahead.lock().unwrap_or_else(PoisonError::into_inner) = Some(reserved);
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
        let reserved = match self.inner.stripes_for(&request) {
            Some((bytes, needs)) => self.inner.mapper.reserve_for(bytes, needs),
            None => self.inner.reserve(wanted),
        };
        reserved.map(move |reserved| inner.grow(request, wanted, reserved))
    }

    /// Finalizes allocations with one request, all or none. On failure all of them are free again, unless it is
    /// unknown what the executor did: when the connection ended or the answer makes no sense, or when the result is
    /// dropped instead of waited for, they stay taken.
    pub fn finalize(
        &self,
        batch: Vec<(InFlightAlloc, Vec<ActionPair>)>,
    ) -> Pending<Result<Vec<FinalizedAlloc>, Error>> {
        // Not what gives the places back when dropped: the executor may finalize what nobody waits for.
        let mut finalized = Vec::with_capacity(batch.len());
        let mut requests = Vec::new();
        for (mut alloc, actions) in batch {
            let Some(place) = alloc.taken.take().and_then(Taken::keep) else { continue };
            // What is in stripes that this process writes is what it has to be.
            let is_told = place.view.is_none() || !actions.is_empty();
            finalized.push(FinalizedAlloc::new(self.inner.number, &place, &alloc.segments, is_told));
            if is_told {
                let segments = std::mem::take(&mut alloc.segments).into_iter().map(FinalizeSegment::from).collect();
                requests.push(FinalizeRequest { reservation: place.reservation, segments, actions });
            }
        }
        if requests.is_empty() {
            return Pending::ready(Ok(finalized));
        }
        let inner = Arc::clone(&self.inner);
        self.inner.mapper.finalize(requests).map(move |keys| match keys {
            Ok(keys) if keys.iter().copied().eq(told_keys(&finalized)) => Ok(finalized),
            Ok(keys) => {
                let text = format!("{} keys for {} allocations, or others", keys.len(), told_keys(&finalized).count());
                Err(Error::BadAnswer { what: "finalize", text })
            }
            Err(error) => {
                // The mapper has made the ranges as they were reserved, if it knows what became of them.
                if !error.leaves_unknown() || inner.mapper.outlives_executors() {
                    inner.free(finalized);
                }
                Err(error)
            }
        })
    }

    /// Ends allocations with one request: their dealloc actions run, and their ranges are free again, also if an
    /// action fails. If the executor cannot be reached, or the result is dropped instead of waited for, they stay
    /// taken.
    pub fn deallocate(&self, allocs: Vec<FinalizedAlloc>) -> Pending<Result<(), Error>> {
        if let Some(foreign) = allocs.iter().find(|alloc| alloc.manager != self.inner.number) {
            return Pending::ready(Err(Error::UnknownAllocation(foreign.key())));
        }
        let keys: Vec<_> = told_keys(&allocs).collect();
        if keys.is_empty() {
            self.inner.withdraw(&allocs);
            self.inner.free(allocs);
            return Pending::ready(Ok(()));
        }
        let inner = Arc::clone(&self.inner);
        self.inner.mapper.deallocate(keys).map(move |result| {
            // Only an executor that ran the request has nothing there any more. One that cannot be asked why it refused
            // a valid request did run it: its actions failed.
            if matches!(result, Ok(()) | Err(Error::Actions(_) | Error::Refused { .. })) {
                inner.withdraw(&allocs);
                inner.free(allocs);
            }
            result
        })
    }

    /// Returns what the manager holds.
    #[must_use]
    pub fn stats(&self) -> MemoryStats {
        let state = self.inner.lock();
        let (live_allocations, requested_bytes) = (state.live_allocations, state.requested_bytes);
        let mut stats = MemoryStats { live_allocations, requested_bytes, ..MemoryStats::default() };
        for reservation in state.reservations.values().chain(state.buffers.values()) {
            stats.reservations += 1;
            stats.reserved_bytes += reservation.range.len();
            stats.table_bytes += reservation.table_bytes();
            for area in &reservation.areas {
                let free = area.free.total();
                stats.free_bytes += free;
                stats.live_bytes += area.range.len() - free;
                stats.largest_free_bytes = stats.largest_free_bytes.max(area.free.largest());
            }
            stats.live_bytes -= reservation.table_bytes();
        }
        stats
    }
}

impl Drop for MemoryManager {
    fn drop(&mut self) {
        self.inner.watch.end();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let (reservations, buffers) = (std::mem::take(&mut state.reservations), std::mem::take(&mut state.buffers));
        let bases: Vec<_> = reservations.into_keys().chain(buffers.into_keys()).collect();
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
        if self.mapper.is_exclusive() {
            return request.reserve_bytes(0, self.page_size);
        }
        let usual = request.reserve_bytes(self.reservation_bytes, self.page_size);
        // Where earlier reservations have stripes, the next one has.
        let is_striped = self.lock().reservations.values().any(Reservation::is_striped);
        if is_striped { usual.max(request.striped_bytes(self.page_size)) } else { usual }
    }

    /// Returns what to reserve for a request that may not fit in stripes of the usual lengths, and what it needs of each.
    /// Its parts lie close to each other then, within reach, however large one of them is.
    fn stripes_for(&self, request: &Request) -> Option<(u64, StripeBytes)> {
        let is_large = request.striped_bytes(self.page_size) > self.reservation_bytes;
        let mut needs = request.stripe_bytes(self.page_size).filter(|_| is_large && !self.mapper.is_exclusive())?;
        // As much as without stripes, which is what is expected of the answer.
        let total = needs.code.checked_add(needs.read_only)?.checked_add(needs.data)?;
        let missing = request.reserve_bytes(0, self.page_size).saturating_sub(total);
        needs.data = needs.data.checked_add(self.page_size.round_up(missing)?)?;
        Some((request.reserve_bytes(self.reservation_bytes, self.page_size), needs))
    }

    /// Makes what was allocated ready for others, and gives it back.
    fn free(&self, allocations: Vec<FinalizedAlloc>) {
        for alloc in allocations {
            let segments = alloc.parts();
            match self.view_of(alloc.reservation) {
                Some(view) => view.recycle(&segments),
                None => self.mapper.recycle(&segments),
            }
            self.give(&Place::of(alloc.reservation, alloc.is_striped, &segments, self.page_size));
        }
    }

    fn view_of(&self, reservation: ExecutorAddr) -> Option<StripedView> {
        self.lock().reservations.get(&reservation).and_then(|reservation| reservation.view.clone())
    }

    /// Reserves, or takes the reservation that was asked for ahead.
    fn reserve(&self, wanted: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        let is_usual = wanted == self.reservation_bytes;
        let ahead = is_usual.then(|| self.ahead.lock().unwrap_or_else(PoisonError::into_inner).take()).flatten();
        ahead.unwrap_or_else(|| self.mapper.reserve(wanted))
    }

    /// Takes what a request needs from the first reservation that has it.
    fn take(self: &Arc<Self>, request: &Request) -> Option<Taken> {
        self.take_of(&mut self.lock(), request)
    }

    fn take_of(self: &Arc<Self>, state: &mut State, request: &Request) -> Option<Taken> {
        let is_exclusive = self.mapper.is_exclusive();
        let found = state.reservations.iter_mut().find_map(|(&base, reservation)| {
            if is_exclusive && reservation.live > 0 {
                return None;
            }
            let ranges = reservation.take(request)?;
            let (is_striped, view) = (reservation.is_striped(), reservation.view.clone());
            Some(Place { reservation: base, ranges, is_striped, requested_bytes: request.requested_bytes(), view })
        });
        let place = found?;
        state.live_allocations += 1;
        state.requested_bytes += place.requested_bytes;
        Some(Taken { inner: Arc::clone(self), place: Some(place) })
    }

    /// Adds what was reserved, or tries again with less, and allocates from it.
    fn grow(
        self: Arc<Self>,
        request: Request,
        mut wanted: u64,
        mut reserved: Result<ExecutorAddrRange, Error>,
    ) -> Result<InFlightAlloc, Error> {
        let mut least = request.reserve_bytes(0, self.page_size);
        loop {
            match reserved {
                Ok(range) if range.len() < least => {
                    let _ = self.mapper.release(vec![range.start()]).wait();
                    let text = format!("{range} is less than {least} bytes");
                    return Err(Error::BadAnswer { what: "reserve", text });
                }
                Ok(range) => {
                    let mut reservation = Reservation::new(range, &*self.mapper);
                    if self.directory_actions.is_some() {
                        reservation.make_room_for_directory();
                    }
                    if reservation.is_striped() {
                        // The next one, if this is not enough: a stripe is only a part of a reservation.
                        least = request.striped_bytes(self.page_size);
                        wanted = wanted.max(least);
                    }
                    // Another thread may have grown already. An empty reservation may go as soon as others see it.
                    let taken = {
                        let mut state = self.lock();
                        state.reservations.insert(range.start(), reservation);
                        self.take_of(&mut state, &request)
                    };
                    if let Some(taken) = taken {
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
        let view = place.and_then(|place| place.view.as_ref());
        let prepare = |range| match view {
            Some(view) => view.prepare(range),
            None => self.mapper.prepare(range),
        };
        let mut segments = Vec::with_capacity(request.segments.len());
        for (index, (layout, offset)) in request.segments.into_iter().enumerate() {
            // In stripes each segment has a range, else all have one.
            let (range, offset) = if is_striped { (ranges[index], 0) } else { (ranges[0], offset) };
            let addr = range.start().checked_add(offset).expect("the range has all segments");
            let len = layout.content_bytes + layout.zero_fill_bytes;
            let range = |len| ExecutorAddrRange::from_len(addr, len).expect("the range has all segments");
            if let Some(zeros) = ExecutorAddrRange::new(range(layout.content_bytes).end(), range(len).end())
                && !zeros.is_empty()
            {
                match view {
                    Some(view) => view.secure(zeros)?,
                    None => self.mapper.secure(zeros)?,
                }
                if is_striped && is_code(&layout) {
                    // What was code before traps.
                    prepare(zeros)?.zero();
                }
            }
            let working = prepare(range(layout.content_bytes))?;
            let (group, content_bytes) = (layout.group, layout.content_bytes);
            segments.push(AllocatedSegment { group, range: range(len), content_bytes, working });
        }
        Ok(InFlightAlloc { segments, taken: Some(taken) })
    }
}

/// Returns the keys of those allocations that the mapper knows.
fn told_keys(allocs: &[FinalizedAlloc]) -> impl Iterator<Item = ExecutorAddr> {
    allocs.iter().filter(|alloc| alloc.is_told).map(FinalizedAlloc::key)
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
