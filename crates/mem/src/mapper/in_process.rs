//! Memory of this process: the controller is the executor.

use super::view::{DISCARDED_BYTES, SWEPT_BYTES, StripedView, View};
use super::views::{Told, Views, buffers, divide, divide_for};
use super::{FinalizeRequest, MapperUsage, MemoryMapper, StripeBytes, StripeRange};
use crate::{Allocation, Error, MemoryService, WorkingMemory};
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, PageSize};
use farlink_rpc::Pending;
use farlink_wire::msg::{Segment, Stripe};
use farlink_wire::sps::Blob;

/// Maps memory of this process.
///
/// Also the way to test what stands on [`MemoryMapper`] apart from shared memory.
pub struct InProcessMapper {
    service: MemoryService,
    views: Views,
    is_striped: bool,
}

impl Default for InProcessMapper {
    fn default() -> Self {
        Self::new()
    }
}

impl InProcessMapper {
    /// Returns a mapper without reservations. They will be in stripes: code and read-only data are written through
    /// another view of the same memory than the one that they are used by, so no page is ever writable and executable at
    /// one address.
    #[must_use]
    pub fn new() -> Self {
        Self::with_stripes(true)
    }

    /// As [`Self::new`], but page by page: each allocation's pages are written where they are, and protected when it is
    /// finalized.
    #[must_use]
    pub fn page_by_page() -> Self {
        Self::with_stripes(false)
    }

    fn with_stripes(is_striped: bool) -> Self {
        let service = MemoryService::new();
        let views = Views::new(service.page_size());
        Self { service, views, is_striped }
    }

    fn reserve_striped(&self, bytes: u64, stripes: Vec<Stripe>) -> Result<ExecutorAddrRange, Error> {
        let (range, mapping) = self.service.reserve_in_two_views(bytes, &stripes)?;
        let own_data = Some(self.service.mapping_of(range)?);
        self.views.add(range, View::new(None, mapping, own_data, stripes)).map(|()| range)
    }

    /// Places what is reserved from now on below `limit`.
    pub fn place_below(&self, limit: farlink_addr::ExecutorAddr) {
        self.service.place_below(limit);
    }

    /// Returns `bytes` in whole pages.
    fn whole_pages(&self, bytes: u64) -> Result<u64, Error> {
        self.page_size().round_up(bytes).ok_or(Error::BadSize { what: "reserved", bytes })
    }
}

impl MemoryMapper for InProcessMapper {
    fn page_size(&self) -> PageSize {
        self.service.page_size()
    }

    fn reserve(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        let stripes =
            || if self.is_striped { Ok(divide(self.whole_pages(bytes)?, self.page_size())) } else { Ok(Vec::new()) };
        Pending::ready(stripes().and_then(|stripes| match &stripes[..] {
            [] => self.service.reserve_private(bytes),
            _ => self.reserve_striped(bytes, stripes),
        }))
    }

    fn reserve_for(&self, bytes: u64, needs: StripeBytes) -> Pending<Result<ExecutorAddrRange, Error>> {
        match divide_for(needs, self.page_size()) {
            Some((bytes, stripes)) if self.is_striped => Pending::ready(self.reserve_striped(bytes, stripes)),
            _ => self.reserve(bytes),
        }
    }

    fn reserve_buffers(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        Pending::ready(self.whole_pages(bytes).and_then(|bytes| self.reserve_striped(bytes, buffers(bytes))))
    }

    fn prepare(&self, range: ExecutorAddrRange) -> Result<WorkingMemory, Error> {
        if self.views.place(range).is_ok() {
            return self.views.secured(range);
        }
        let mapping = self.service.mapping_of(range)?;
        let offset = range.start().as_u64() - mapping.range().start().as_u64();
        WorkingMemory::in_mapping(&mapping, offset, range.len())
    }

    fn stripes(&self, reservation: ExecutorAddr) -> Vec<StripeRange> {
        self.views.stripes(reservation)
    }

    fn striped_view(&self, reservation: ExecutorAddr) -> Option<StripedView> {
        self.views.striped_view(reservation)
    }

    fn view(&self, range: ExecutorAddrRange) -> Option<WorkingMemory> {
        self.views.working(range).ok()
    }

    fn usage(&self) -> Pending<Result<MapperUsage, Error>> {
        let usage = || {
            let (own, service) = (self.views.usage()?, self.service.usage()?);
            let (committed_bytes, executor_mappings) = (service.committed_bytes, Some(service.mappings));
            Ok(MapperUsage { committed_bytes, executor_mappings, ..own })
        };
        Pending::ready(usage())
    }

    fn recycle(&self, segments: &[(AllocGroup, ExecutorAddrRange)]) {
        self.views.recycle(segments, DISCARDED_BYTES);
    }

    fn discard(&self, segments: &[(AllocGroup, ExecutorAddrRange)]) {
        self.views.recycle(segments, SWEPT_BYTES);
    }

    fn finalize(&self, allocations: Vec<FinalizeRequest>) -> Pending<Result<Vec<ExecutorAddr>, Error>> {
        let Told { keys, requests, undo, .. } = match self.views.begin(allocations) {
            Ok(told) => told,
            Err(error) => return Pending::ready(Err(error)),
        };
        if requests.is_empty() {
            return Pending::ready(Ok(keys));
        }
        let finalized = self.service.initialize(requests.into_iter().map(allocation).collect());
        Pending::ready(finalized.inspect_err(|_| self.views.undo(&undo)).map(|_| keys))
    }

    fn deallocate(&self, keys: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        Pending::ready(self.views.end(keys).and_then(|told| self.service.deinitialize(&told)))
    }

    fn release(&self, bases: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        // A base that is not the service's changes nothing there, and then nothing here.
        let released = self.service.release(&bases);
        if !matches!(released, Err(Error::UnknownReservation(_) | Error::Busy(_))) {
            let viewed: Vec<_> = bases.into_iter().filter(|&base| self.views.has(base)).collect();
            // Each is there.
            let _ = self.views.remove(&viewed);
        }
        Pending::ready(released)
    }
}

/// Returns what the service has to know of an allocation: its content is in place.
fn allocation(request: FinalizeRequest) -> Allocation<'static> {
    let segments = request.segments.iter().map(|segment| Segment {
        group: segment.group,
        addr: segment.range.start(),
        size: segment.range.len(),
        content: Blob::default(),
    });
    Allocation { slab: Some(request.reservation), segments: segments.collect(), actions: request.actions }
}
