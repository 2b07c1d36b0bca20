//! The same physical pages in both processes. Content is never copied between them.
//!
//! Between farlink's own ends this process makes an object without a name and sends its descriptor. Otherwise the
//! executor makes a POSIX shared memory object, and this process opens it and removes its name.

use super::{FinalizeRequest, MemoryMapper, Reservations, bad_answer, check_keys, check_reserved, refused};
use crate::sys::{Mapping, SharedObject};
use crate::{Error, WorkingMemory};
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt, PageSize};
use farlink_rpc::{CallError, Callee, Executor, Pending};
use farlink_wire::functions::{
    Expected, PID_KEY, SHARED_DEINITIALIZE, SHARED_INITIALIZE, SHARED_INITIALIZE_BATCH, SHARED_INSTANCE, SHARED_MAP,
    SHARED_RELEASE, SHARED_RESERVE,
};
use farlink_wire::msg::{SharedFinalizeRequest, SharedSegment, Stripe};
use farlink_wire::sps::{SpsError, from_bytes, to_bytes};
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Fewest pages that a stripe is worth having for.
const MIN_STRIPE_PAGES: u64 = 16;

/// Bytes of whole pages in a range that are worth a system call to give back.
const DISCARD_BYTES: u64 = 64 << 10;

/// The instruction that traps: `int3`.
const TRAP: u8 = 0xcc;

/// Longest name of a shared memory object in bytes: what a file system takes.
const MAX_NAME_BYTES: usize = 255;

/// Maps memory that an executor on the same machine shares.
pub struct SharedMemoryMapper {
    inner: Arc<Inner>,
}

type Keys = Vec<ExecutorAddr>;
type InitializeBatch = Callee<(ExecutorAddr, Vec<(ExecutorAddr, SharedFinalizeRequest)>), Expected<Keys>>;

struct Inner {
    page_size: PageSize,
    instance: ExecutorAddr,
    backing: Backing,
    initialize: Callee<(ExecutorAddr, ExecutorAddr, SharedFinalizeRequest), Expected<ExecutorAddr>>,
    initialize_batch: Option<InitializeBatch>,
    deinitialize: Callee<(ExecutorAddr, Keys), SpsError>,
    release: Callee<(ExecutorAddr, Keys), SpsError>,
    reservations: Mutex<Reservations<Arc<Reservation>>>,
    /// Allocations in stripes that the executor knows of: those with actions.
    known: Mutex<HashSet<ExecutorAddr>>,
}

/// Where the memory of a reservation comes from.
enum Backing {
    /// This process makes an object without a name and sends its descriptor.
    Nameless {
        executor: Executor,
        map: Callee<(ExecutorAddr, u64, u64, Vec<Stripe>), Expected<ExecutorAddr>>,
        /// Whether reservations have stripes.
        is_striped: bool,
    },
    /// The executor makes a POSIX shared memory object.
    Named {
        reserve: Callee<(ExecutorAddr, u64), Expected<(ExecutorAddr, String)>>,
        /// The executor's process id, if it says; its shared memory objects are called after it.
        pid: Option<u64>,
        /// Number of reservations asked for.
        asked: AtomicU64,
    },
}

/// This process's side of a reservation.
struct Reservation {
    object: SharedObject,
    mapping: Arc<Mapping>,
    stripes: Vec<Stripe>,
}

impl Reservation {
    /// Makes part of a stripe ready for another allocation.
    fn recycle(&self, offset: u64, bytes: u64, group: AllocGroup, page_size: PageSize) {
        let (start, end) = (offset, offset + bytes);
        let is_code = group.prot.contains(MemProt::EXEC);
        // Large ranges of data give their whole pages back to the system, and only the edges are written. Code is filled
        // in any case: a page of zeros would not trap.
        let pages = page_size.round_up(start).zip(Some(page_size.align().align_down(end)));
        let pages = pages.filter(|(first, last)| !is_code && last.saturating_sub(*first) >= DISCARD_BYTES);
        let is_discarded = |&(first, last): &(u64, u64)| {
            let base = self.mapping.range().start();
            let range = base.checked_add(first).and_then(|addr| ExecutorAddrRange::from_len(addr, last - first));
            range.is_some_and(|range| self.mapping.discard(range).is_ok())
        };
        let (first, last) = pages.filter(is_discarded).unwrap_or((end, end));
        let fill = if is_code { TRAP } else { 0 };
        for (from, to) in [(start, first), (last, end)] {
            if let Ok(memory) = WorkingMemory::in_mapping(&self.mapping, from, to - from) {
                memory.fill(fill);
            }
        }
    }
}

impl SharedMemoryMapper {
    /// Returns a mapper for the executor's shared memory service: over memory without a name, in stripes, if the
    /// connection passes descriptors, else over POSIX shared memory, page by page.
    ///
    /// # Errors
    ///
    /// Fails if the executor has no such service.
    pub fn new(executor: &Executor) -> Result<Self, Error> {
        Self::nameless(executor, true)
    }

    /// As [`Self::new`], but page by page in any case: each allocation's pages are protected when it is finalized.
    ///
    /// # Errors
    ///
    /// Fails if the executor has no such service.
    pub fn page_by_page(executor: &Executor) -> Result<Self, Error> {
        Self::nameless(executor, false)
    }

    fn nameless(executor: &Executor, is_striped: bool) -> Result<Self, Error> {
        match executor.bind(SHARED_MAP) {
            Ok(map) => Self::with_backing(executor, Backing::Nameless { executor: executor.clone(), map, is_striped }),
            Err(_) => Self::posix(executor),
        }
    }

    /// Returns a mapper for the executor's shared memory service, over POSIX shared memory.
    ///
    /// # Errors
    ///
    /// Fails if the executor has no such service.
    pub fn posix(executor: &Executor) -> Result<Self, Error> {
        let pid = executor.info().value(PID_KEY).and_then(|pid| from_bytes(pid).ok());
        let reserve = executor.bind(SHARED_RESERVE)?;
        Self::with_backing(executor, Backing::Named { reserve, pid, asked: AtomicU64::new(0) })
    }

    fn with_backing(executor: &Executor, backing: Backing) -> Result<Self, Error> {
        let inner = Inner {
            page_size: executor.page_size(),
            instance: executor.object(SHARED_INSTANCE)?,
            backing,
            initialize: executor.bind(SHARED_INITIALIZE)?,
            initialize_batch: executor.bind(SHARED_INITIALIZE_BATCH).ok(),
            deinitialize: executor.bind(SHARED_DEINITIALIZE)?,
            release: executor.bind(SHARED_RELEASE)?,
            reservations: Mutex::default(),
            known: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Reservations<Arc<Reservation>>> {
        // No code that can panic half-way through a change runs under this lock.
        self.reservations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> MutexGuard<'_, HashSet<ExecutorAddr>> {
        // Nothing that can panic runs under this lock.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_in_stripes(&self, addr: ExecutorAddr) -> bool {
        self.place(ExecutorAddrRange::at(addr)).is_ok_and(|(_, reservation)| !reservation.stripes.is_empty())
    }

    fn is_striped(&self, request: &FinalizeRequest) -> bool {
        self.is_in_stripes(request.reservation)
    }

    /// Returns the reservation that has all of `range`, and where in it the range begins.
    fn place(&self, range: ExecutorAddrRange) -> Result<(u64, Arc<Reservation>), Error> {
        let reservations = self.lock();
        let (around, reservation) = reservations.around(range)?;
        Ok((range.start().as_u64() - around.start().as_u64(), Arc::clone(reservation)))
    }

    /// Takes the executor's answer to a reserve call: the base, and the object behind the reservation or why there is
    /// none.
    fn reserved(
        &self,
        bytes: u64,
        base: ExecutorAddr,
        reservation: Result<Reservation, Error>,
    ) -> Result<ExecutorAddrRange, Error> {
        let attached = reservation.and_then(|reservation| {
            let range = check_reserved(base, bytes, self.page_size)?;
            self.lock().add(range, Arc::new(reservation)).map(|()| range)
        });
        // The executor has reserved what cannot be used here. What it says to giving it back adds nothing. A base that
        // is in use stays: it is another's.
        if attached.is_err() && !base.is_null() && !self.lock().has(base) {
            let _ = self.release.call(&(self.instance, vec![base])).wait();
        }
        attached
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

/// Removes the names that an executor may have left if it died between creating an object and telling us.
fn unlink_orphans(pid: Option<u64>, asked: u64) {
    if let Some(pid) = pid {
        for number in 1..=asked {
            SharedObject::unlink(&format!("/farlink_{pid}_{number}"));
        }
    }
}

/// Divides a reservation: a quarter for code, a quarter for read-only data, half for data, with a page between them that
/// cannot be accessed. One that is too small for that has no stripes.
fn divide(bytes: u64, page_size: PageSize) -> Vec<Stripe> {
    let page = page_size.bytes();
    let quarter = page_size.align().align_down(bytes / 4);
    if quarter < MIN_STRIPE_PAGES * page {
        return Vec::new();
    }
    let stripe = |prot, offset, size| Stripe { group: AllocGroup::standard(prot), offset, size };
    vec![
        stripe(MemProt::RX, 0, quarter - page),
        stripe(MemProt::READ, quarter, quarter - page),
        stripe(MemProt::RW, 2 * quarter, bytes - 2 * quarter),
    ]
}

/// Makes an object without a name, and maps it.
fn make(bytes: u64, stripes: Vec<Stripe>) -> Result<Reservation, Error> {
    let size = |error| match error {
        rustix::io::Errno::FBIG | rustix::io::Errno::INVAL => Error::BadSize { what: "reserved", bytes },
        error => Error::system("memory without a name cannot be made", error),
    };
    let object = SharedObject::nameless(bytes).map_err(size)?;
    let length = usize::try_from(bytes).map_err(|_| Error::OutOfAddressSpace { bytes })?;
    let mapping = object.map(length).map_err(|_| Error::OutOfAddressSpace { bytes })?;
    Ok(Reservation { object, mapping: Arc::new(mapping), stripes })
}

/// Opens the shared memory object that an executor has made, and removes its name.
fn take(name: &str) -> Result<SharedObject, Error> {
    let is_plain = name.starts_with('/') && !name[1..].contains('/') && !name.contains('\0') && name.len() > 1;
    if !is_plain || name.len() > MAX_NAME_BYTES || matches!(name, "/." | "/..") {
        return Err(bad_answer("reserve", format!("{name:?} is not the name of a shared memory object")));
    }
    SharedObject::take(name)
}

/// Maps a shared memory object that an executor has made.
fn attach(object: SharedObject, name: &str, bytes: u64) -> Result<Reservation, Error> {
    let size = object.len().map_err(|error| Error::shared(name, "examined", error))?;
    if size < bytes {
        return Err(bad_answer("reserve", format!("the object {name} has {size} bytes instead of {bytes}")));
    }
    let mapping = object.map(bytes as usize).map_err(|error| Error::shared(name, "mapped", error))?;
    Ok(Reservation { object, mapping: Arc::new(mapping), stripes: Vec::new() })
}

impl MemoryMapper for SharedMemoryMapper {
    fn page_size(&self) -> PageSize {
        self.inner.page_size
    }

    fn reserve(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        let inner = Arc::clone(&self.inner);
        let Some(rounded) = self.inner.page_size.round_up(bytes).filter(|&bytes| bytes != 0) else {
            return Pending::ready(Err(Error::BadSize { what: "reserved", bytes }));
        };
        match &self.inner.backing {
            Backing::Nameless { executor, map, is_striped } => {
                let stripes = if *is_striped { divide(rounded, self.inner.page_size) } else { Vec::new() };
                let sent = make(rounded, stripes.clone()).and_then(|reservation| {
                    let tag = executor.send_descriptor(reservation.object.as_fd())?;
                    Ok((reservation, map.call(&(self.inner.instance, tag, rounded, stripes))))
                });
                let (reservation, call) = match sent {
                    Ok(sent) => sent,
                    Err(error) => return Pending::ready(Err(error)),
                };
                call.map(move |answer| {
                    let base = answer?.map_err(refused("map shared memory"))?;
                    inner.reserved(rounded, base, Ok(reservation))
                })
            }
            Backing::Named { reserve, asked, .. } => {
                asked.fetch_add(1, Ordering::Relaxed);
                reserve.call(&(self.inner.instance, bytes)).map(move |answer| {
                    if let (Err(CallError::Disconnected(_)), Backing::Named { pid, asked, .. }) =
                        (&answer, &inner.backing)
                    {
                        unlink_orphans(*pid, asked.load(Ordering::Relaxed));
                    }
                    let (base, name) = answer?.map_err(refused("reserve shared memory"))?;
                    // The object comes first: its name has to go whatever else is wrong.
                    let reservation = take(&name).and_then(|object| attach(object, &name, rounded));
                    inner.reserved(rounded, base, reservation)
                })
            }
        }
    }

    fn prepare(&self, range: ExecutorAddrRange) -> Result<WorkingMemory, Error> {
        self.secure(range)?;
        let (offset, reservation) = self.inner.place(range)?;
        WorkingMemory::in_mapping(&reservation.mapping, offset, range.len())
    }

    fn secure(&self, range: ExecutorAddrRange) -> Result<(), Error> {
        let (offset, reservation) = self.inner.place(range)?;
        if !range.is_empty() {
            reservation.object.secure(offset, range.len()).map_err(|error| {
                let text = match error {
                    rustix::io::Errno::NOSPC => "/dev/shm is full".to_owned(),
                    error => error.to_string(),
                };
                Error::shared("", "had", text)
            })?;
        }
        Ok(())
    }

    fn finalize(&self, allocations: Vec<FinalizeRequest>) -> Pending<Result<Vec<ExecutorAddr>, Error>> {
        let wanted: Result<Vec<_>, _> = allocations.iter().map(FinalizeRequest::key).collect();
        let wanted = match wanted {
            Ok(wanted) => wanted,
            Err(error) => return Pending::ready(Err(error)),
        };
        let contents: Vec<_> =
            allocations.iter().flat_map(|request| &request.segments).map(|segment| segment.working.clone()).collect();
        // What is in stripes already is as it has to be: the executor is told of it only if it has actions.
        let is_told = |request: &FinalizeRequest| !request.actions.is_empty() || !self.inner.is_striped(request);
        let told: Vec<_> = allocations.into_iter().filter(is_told).collect();
        let inner = Arc::clone(&self.inner);
        if told.is_empty() {
            return Pending::ready(Ok(wanted));
        }
        let known: Vec<_> =
            told.iter().filter(|request| inner.is_striped(request)).filter_map(FinalizeRequest::lowest).collect();
        let told_keys: Vec<_> = told.iter().filter_map(FinalizeRequest::lowest).collect();
        let requests: Vec<_> = told.into_iter().map(|request| (request.reservation, shared_request(request))).collect();
        let keys = match &inner.initialize_batch {
            Some(batch) => {
                batch.call(&(inner.instance, requests)).map(|answer| answer?.map_err(refused("finalize memory")))
            }
            None => inner.finalize_one_by_one(requests),
        };
        keys.map(move |keys| {
            // An executor that refuses a request before it begins, or never gets it, leaves content where it is.
            if matches!(keys, Err(Error::Refused { .. } | Error::Call(CallError::TooLarge { .. }))) {
                contents.iter().for_each(WorkingMemory::zero);
            }
            check_keys(keys?, &told_keys)?;
            inner.known().extend(known);
            Ok(wanted)
        })
    }

    fn deallocate(&self, keys: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        let told: Vec<_> = {
            let mut known = self.inner.known();
            keys.into_iter().filter(|&key| known.remove(&key) || !self.inner.is_in_stripes(key)).collect()
        };
        if told.is_empty() {
            return Pending::ready(Ok(()));
        }
        let call = self.inner.deinitialize.call(&(self.inner.instance, told));
        call.map(|answer| answer?.0.map_err(refused("deallocate memory")))
    }

    fn stripes(&self, reservation: ExecutorAddr) -> Vec<(MemProt, ExecutorAddrRange)> {
        let reservations = self.inner.lock();
        let Ok((range, reservation)) = reservations.around(ExecutorAddrRange::at(reservation)) else {
            return Vec::new();
        };
        let addresses = |stripe: &Stripe| {
            let start = range.start().checked_add(stripe.offset)?;
            Some((stripe.group.prot, ExecutorAddrRange::from_len(start, stripe.size)?))
        };
        reservation.stripes.iter().filter_map(addresses).collect()
    }

    fn recycle(&self, segments: &[(AllocGroup, ExecutorAddrRange)]) {
        for &(group, range) in segments {
            if let Ok((offset, reservation)) = self.inner.place(range) {
                reservation.recycle(offset, range.len(), group, self.inner.page_size);
            }
        }
    }

    fn release(&self, bases: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        // What begins here ends here, whatever the executor says: after this its addresses may be another reservation's.
        if let Err(error) = self.inner.lock().remove(&bases) {
            return Pending::ready(Err(error));
        }
        let call = self.inner.release.call(&(self.inner.instance, bases));
        call.map(|answer| answer?.0.map_err(refused("release memory")))
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
