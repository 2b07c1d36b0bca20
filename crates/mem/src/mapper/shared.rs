//! The same physical pages in both processes. Content is never copied between them.
//!
//! Between farlink's own ends this process makes an object without a name and sends its descriptor. Otherwise the
//! executor makes a POSIX shared memory object, and this process opens it and removes its name.

mod reserving;

use super::key_pages::KeyPages;
use super::view::{DISCARDED_BYTES, SWEPT_BYTES, StripedView};
use super::views::{Told, Undo, Views, buffers, divide, divide_for};
use super::{
    FinalizeRequest, FinalizeSegment, MapperUsage, MemoryMapper, StripeBytes, StripeRange, check_keys, executor_usage,
    refused,
};
use crate::{Error, WorkingMemory};
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt, PageSize};
use farlink_rpc::{CallError, Callee, Executor, Pending};
use farlink_wire::functions::{
    Expected, MEMORY_USAGE, PID_KEY, SHARED_DEINITIALIZE, SHARED_INITIALIZE, SHARED_INITIALIZE_BATCH, SHARED_INSTANCE,
    SHARED_MAP, SHARED_MAP_AT, SHARED_RELEASE, SHARED_RESERVE, VERSION_KEY,
};
use farlink_wire::msg::{MemoryUsage, SharedFinalizeRequest, SharedSegment, Stripe};
use farlink_wire::sps::{SpsError, from_bytes, to_bytes};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Bytes of a reservation for key pages.
const KEY_PAGES_BYTES: u64 = 64 << 20;

/// Maps memory that an executor on the same machine shares.
pub struct SharedMemoryMapper {
    inner: Arc<Inner>,
}

type Keys = Vec<ExecutorAddr>;
type MapObject = Callee<(ExecutorAddr, u64, u64, Vec<Stripe>), Expected<ExecutorAddr>>;
type MapObjectAt = Callee<(ExecutorAddr, u64, u64, Vec<Stripe>, ExecutorAddr), Expected<ExecutorAddr>>;
type InitializeBatch = Callee<(ExecutorAddr, Vec<(ExecutorAddr, SharedFinalizeRequest)>), Expected<Keys>>;

struct Inner {
    page_size: PageSize,
    instance: ExecutorAddr,
    backing: Backing,
    /// Whether reservations for linked code have stripes.
    is_striped: bool,
    initialize: Callee<(ExecutorAddr, ExecutorAddr, SharedFinalizeRequest), Expected<ExecutorAddr>>,
    initialize_batch: Option<InitializeBatch>,
    deinitialize: Callee<(ExecutorAddr, Keys), SpsError>,
    release: Callee<(ExecutorAddr, Keys), SpsError>,
    usage: Option<Callee<(ExecutorAddr,), Expected<MemoryUsage>>>,
    views: Views,
}

/// Where the memory of a reservation comes from.
enum Backing {
    /// This process makes an object without a name and sends its descriptor.
    Nameless {
        executor: Executor,
        map: Map,
        /// Whether nobody may map it to be written once both have.
        ends_writing: bool,
    },
    /// The executor makes a POSIX shared memory object, and stripes in it by finalizing an allocation of which they are
    /// the segments.
    Named {
        reserve: Callee<(ExecutorAddr, u64), Expected<(ExecutorAddr, String)>>,
        key_pages: KeyPages,
        /// Whether memory is readable and writable from the beginning: LLVM's executors let nobody access it.
        reserves_writable: bool,
        /// The executor's process id, if it says; its shared memory objects are called after it.
        pid: Option<u64>,
        /// Number of reservations asked for.
        asked: AtomicU64,
    },
}

/// How executors map an object.
enum Map {
    /// Where there is room, all writing the same data.
    Anywhere(MapObject),
    /// At one address in all of them, below the limit if there is one; each with its own data.
    At { map: MapObjectAt, limit: Option<ExecutorAddr> },
}

impl Backing {
    /// Returns whether what the executor writes is not seen here.
    fn is_copied(&self) -> bool {
        matches!(self, Self::Nameless { map: Map::At { .. }, .. })
    }

    fn key_pages(&self) -> Option<&KeyPages> {
        match self {
            Self::Named { key_pages, .. } => Some(key_pages),
            Self::Nameless { .. } => None,
        }
    }
}

impl SharedMemoryMapper {
    /// Returns a mapper for the executor's shared memory service: over memory without a name if the connection
    /// passes descriptors, else over POSIX shared memory; in stripes.
    ///
    /// # Errors
    ///
    /// Fails if the executor has no such service.
    pub fn new(executor: &Executor) -> Result<Self, Error> {
        Self::nameless(executor, true)
    }

    /// As [`Self::new`], but page by page: each allocation's pages are protected when it is finalized.
    ///
    /// # Errors
    ///
    /// Fails if the executor has no such service.
    pub fn page_by_page(executor: &Executor) -> Result<Self, Error> {
        Self::nameless(executor, false)
    }

    fn nameless(executor: &Executor, is_striped: bool) -> Result<Self, Error> {
        match executor.bind(SHARED_MAP) {
            Ok(map) => Self::with_backing(
                executor,
                Backing::Nameless { executor: executor.clone(), map: Map::Anywhere(map), ends_writing: false },
                is_striped,
            ),
            Err(_) => Self::named(executor, is_striped),
        }
    }

    /// As [`Self::new`], over memory without a name only, which nobody can map to be written once the executor has mapped
    /// it: what a hardened executor runs cannot be changed by it. Pages are not given back to the system.
    ///
    /// # Errors
    ///
    /// Fails if the executor has no such service, or the connection passes no descriptors.
    pub fn hardened(executor: &Executor) -> Result<Self, Error> {
        let map = Map::Anywhere(executor.bind(SHARED_MAP)?);
        let backing = Backing::Nameless { executor: executor.clone(), map, ends_writing: true };
        Self::with_backing(executor, backing, true)
    }

    /// As [`Self::new`] or, with `ends_writing`, [`Self::hardened`], for executors that are all alike, of which any may go
    /// and another come: a reservation has one address in all, they share code and constants, and each has its own copy
    /// of each page of data that it writes. What this mapper holds is data as it was linked, which no executor changes.
    /// Reservations are below `limit`, if there is one.
    ///
    /// # Errors
    ///
    /// Fails if the executor has no such service, or the connection passes no descriptors.
    pub fn replicated(executor: &Executor, ends_writing: bool, limit: Option<ExecutorAddr>) -> Result<Self, Error> {
        let map = Map::At { map: executor.bind(SHARED_MAP_AT)?, limit };
        let backing = Backing::Nameless { executor: executor.clone(), map, ends_writing };
        Self::with_backing(executor, backing, true)
    }

    /// Returns a mapper for the executor's shared memory service, over POSIX shared memory.
    ///
    /// # Errors
    ///
    /// Fails if the executor has no such service.
    pub fn posix(executor: &Executor) -> Result<Self, Error> {
        Self::named(executor, true)
    }

    /// As [`Self::posix`], but page by page: each allocation's pages are protected when it is finalized.
    ///
    /// # Errors
    ///
    /// Fails if the executor has no such service.
    pub fn posix_page_by_page(executor: &Executor) -> Result<Self, Error> {
        Self::named(executor, false)
    }

    fn named(executor: &Executor, is_striped: bool) -> Result<Self, Error> {
        let pid = executor.info().value(PID_KEY).and_then(|pid| from_bytes(pid).ok());
        let reserve = executor.bind(SHARED_RESERVE)?;
        let key_pages = KeyPages::new(executor.page_size());
        let reserves_writable = executor.info().value(VERSION_KEY).is_some();
        let backing = Backing::Named { reserve, key_pages, reserves_writable, pid, asked: AtomicU64::new(0) };
        Self::with_backing(executor, backing, is_striped)
    }

    fn with_backing(executor: &Executor, backing: Backing, is_striped: bool) -> Result<Self, Error> {
        let inner = Inner {
            page_size: executor.page_size(),
            instance: executor.object(SHARED_INSTANCE)?,
            backing,
            is_striped,
            initialize: executor.bind(SHARED_INITIALIZE)?,
            initialize_batch: executor.bind(SHARED_INITIALIZE_BATCH).ok(),
            deinitialize: executor.bind(SHARED_DEINITIALIZE)?,
            release: executor.bind(SHARED_RELEASE)?,
            usage: executor.bind(MEMORY_USAGE).ok(),
            views: Views::new(executor.page_size()),
        };
        Ok(Self { inner: Arc::new(inner) })
    }
}

impl Inner {
    /// Turns allocations in stripes into what an executor that knows pages only can keep: the actions, under a page of
    /// their own.
    fn use_key_pages(
        self: &Arc<Self>,
        key_pages: &KeyPages,
        in_stripes: &[usize],
        keys: &mut [ExecutorAddr],
        requests: &mut [FinalizeRequest],
    ) -> Result<(), Error> {
        let striped: Vec<_> = in_stripes.iter().map(|&index| keys[index]).collect();
        let assigned = loop {
            if let Some(assigned) = key_pages.assign(&striped) {
                break assigned;
            }
            let bytes = KEY_PAGES_BYTES.max(striped.len() as u64 * self.page_size.bytes());
            key_pages.add(self.reserve(Ok(bytes), |_| Vec::new()).wait()?);
        };
        for (&index, (page, reservation)) in in_stripes.iter().zip(assigned) {
            let range = ExecutorAddrRange::from_len(page, self.page_size.bytes());
            let range = range.ok_or(Error::OutsideReservation(ExecutorAddrRange::at(page)))?;
            let working = self.views.working(range)?;
            let segment =
                FinalizeSegment { group: AllocGroup::standard(MemProt::RW), range, content_bytes: 0, working };
            keys[index] = page;
            requests[index].reservation = reservation;
            requests[index].segments = vec![segment];
        }
        Ok(())
    }

    /// Undoes what a request that failed has left here.
    fn forget(&self, undo: &Undo) {
        if let Some(key_pages) = self.backing.key_pages() {
            key_pages.give_back(key_pages.withdraw(&mut undo.striped().to_vec()));
        }
        self.views.undo(undo);
    }

    fn deinitialize(self: &Arc<Self>, mut keys: Keys) -> Pending<Result<(), Error>> {
        let withdrawn = self.backing.key_pages().map(|key_pages| key_pages.withdraw(&mut keys));
        let call = self.deinitialize.call(&(self.instance, keys));
        let inner = Arc::clone(self);
        call.map(move |answer| {
            if let Some((key_pages, withdrawn)) = inner.backing.key_pages().zip(withdrawn) {
                key_pages.give_back(withdrawn);
            }
            answer?.0.map_err(refused("deallocate memory"))
        })
    }

    /// Returns the allocations in these reservations that have key pages.
    fn with_key_pages_in(&self, bases: &[ExecutorAddr]) -> Result<Keys, Error> {
        let Some(key_pages) = self.backing.key_pages() else { return Ok(Vec::new()) };
        Ok(key_pages.keys_in(&self.views.ranges(bases)?))
    }

    /// Finalizes allocations of an executor that takes one in a call: all are sent, then all are awaited.
    fn finalize_one_by_one(
        self: &Arc<Self>,
        requests: Vec<(ExecutorAddr, SharedFinalizeRequest)>,
    ) -> Pending<Result<Keys, Error>> {
        let encode = |(base, request)| to_bytes(&(self.instance, base, request));
        let calls = requests.into_iter().map(|request| self.initialize.call_encoded(encode(request))).collect();
        let inner = Arc::clone(self);
        super::undo_unless_all(calls, move |keys| {
            let _ = inner.deinitialize.call(&(inner.instance, keys)).wait();
        })
    }
}

impl MemoryMapper for SharedMemoryMapper {
    fn page_size(&self) -> PageSize {
        self.inner.page_size
    }

    fn reserve(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        let (page_size, is_striped) = (self.inner.page_size, self.inner.is_striped);
        self.inner.reserve(self.inner.whole_pages(bytes), |bytes| match is_striped {
            true => divide(bytes, page_size),
            false => Vec::new(),
        })
    }

    fn reserve_for(&self, bytes: u64, needs: StripeBytes) -> Pending<Result<ExecutorAddrRange, Error>> {
        match divide_for(needs, self.inner.page_size) {
            Some((bytes, stripes)) if self.inner.is_striped => self.inner.reserve(Ok(bytes), |_| stripes),
            _ => self.reserve(bytes),
        }
    }

    fn reserve_buffers(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        self.inner.reserve(self.inner.whole_pages(bytes), buffers)
    }

    fn prepare(&self, range: ExecutorAddrRange) -> Result<WorkingMemory, Error> {
        self.inner.views.secured(range)
    }

    fn secure(&self, range: ExecutorAddrRange) -> Result<(), Error> {
        let (offset, view) = self.inner.views.place(range)?;
        view.secure(offset, range.len())
    }

    fn stripes(&self, reservation: ExecutorAddr) -> Vec<StripeRange> {
        self.inner.views.stripes(reservation)
    }

    fn striped_view(&self, reservation: ExecutorAddr) -> Option<StripedView> {
        self.inner.views.striped_view(reservation)
    }

    fn view(&self, range: ExecutorAddrRange) -> Option<WorkingMemory> {
        let is_elsewhere = self.inner.backing.is_copied() && self.inner.views.is_data(range);
        self.inner.views.working(range).ok().filter(|_| !is_elsewhere)
    }

    fn outlives_executors(&self) -> bool {
        self.inner.backing.is_copied()
    }

    fn recycle(&self, segments: &[(AllocGroup, ExecutorAddrRange)]) {
        self.inner.views.recycle(segments, DISCARDED_BYTES);
    }

    fn discard(&self, segments: &[(AllocGroup, ExecutorAddrRange)]) {
        self.inner.views.recycle(segments, SWEPT_BYTES);
    }

    fn usage(&self) -> Pending<Result<MapperUsage, Error>> {
        let own = self.inner.views.usage();
        match &self.inner.usage {
            Some(usage) => usage.call(&(self.inner.instance,)).map(|answer| executor_usage(own?, answer?)),
            None => Pending::ready(own),
        }
    }

    fn finalize(&self, allocations: Vec<FinalizeRequest>) -> Pending<Result<Vec<ExecutorAddr>, Error>> {
        let Told { keys, mut requests, mut told_keys, in_stripes, undo } = match self.inner.views.begin(allocations) {
            Ok(told) => told,
            Err(error) => return Pending::ready(Err(error)),
        };
        if requests.is_empty() {
            return Pending::ready(Ok(keys));
        }
        let inner = Arc::clone(&self.inner);
        if let Some(key_pages) = inner.backing.key_pages()
            && let Err(error) = inner.use_key_pages(key_pages, &in_stripes, &mut told_keys, &mut requests)
        {
            inner.forget(&undo);
            return Pending::ready(Err(error));
        }
        let requests = requests.into_iter().map(|request| (request.reservation, shared_request(request))).collect();
        let answer = match &inner.initialize_batch {
            Some(batch) => {
                batch.call(&(inner.instance, requests)).map(|answer| answer?.map_err(refused("finalize memory")))
            }
            None => inner.finalize_one_by_one(requests),
        };
        answer.map(move |answer| {
            // An executor that refuses a request before it begins, or never gets it, leaves content where it is.
            if matches!(answer, Err(Error::Refused { .. } | Error::Call(CallError::TooLarge { .. }))) {
                undo.contents.iter().for_each(WorkingMemory::zero);
            }
            let checked = answer.and_then(|told| check_keys(told, &told_keys));
            checked.inspect_err(|_| inner.forget(&undo)).map(|_| keys)
        })
    }

    fn deallocate(&self, keys: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        match self.inner.views.end(keys) {
            Err(error) => Pending::ready(Err(error)),
            Ok(told) if told.is_empty() => Pending::ready(Ok(())),
            Ok(told) => self.inner.deinitialize(told),
        }
    }

    fn release(&self, bases: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        // What is known to the executor by a page elsewhere does not end with the reservation.
        let with_pages = match self.inner.with_key_pages_in(&bases) {
            Ok(with_pages) => with_pages,
            Err(error) => return Pending::ready(Err(error)),
        };
        let ended = if with_pages.is_empty() { Ok(()) } else { self.deallocate(with_pages).wait() };
        // What begins here ends here, whatever the executor says: after this its addresses may be another reservation's.
        if let Err(error) = self.inner.views.remove(&bases) {
            return Pending::ready(Err(error));
        }
        let call = self.inner.release.call(&(self.inner.instance, bases));
        call.map(|answer| answer?.0.map_err(refused("release memory")).and(ended))
    }
}

/// Returns what is sent of an allocation: its content is in shared memory.
fn shared_request(request: FinalizeRequest) -> SharedFinalizeRequest {
    let segments = request.segments.iter().map(|segment| SharedSegment {
        group: segment.group,
        addr: segment.range.start(),
        size: segment.range.len(),
    });
    SharedFinalizeRequest { segments: segments.collect(), actions: request.actions }
}
