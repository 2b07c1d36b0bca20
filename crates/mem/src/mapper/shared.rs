//! The same physical pages in both processes. Content is never copied between them.
//!
//! Between farlink's own ends this process makes an object without a name and sends its descriptor. Otherwise the
//! executor makes a POSIX shared memory object, and this process opens it and removes its name.

use super::views::{Told, View, Views, buffers, divide};
use super::{
    FinalizeRequest, MapperUsage, MemoryMapper, StripeRange, bad_answer, check_keys, check_reserved, executor_usage,
    refused,
};
use crate::service::nameless_error;
use crate::sys::SharedObject;
use crate::{Error, WorkingMemory};
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, PageSize};
use farlink_rpc::{CallError, Callee, Executor, Pending};
use farlink_wire::functions::{
    Expected, MEMORY_USAGE, PID_KEY, SHARED_DEINITIALIZE, SHARED_INITIALIZE, SHARED_INITIALIZE_BATCH, SHARED_INSTANCE,
    SHARED_MAP, SHARED_RELEASE, SHARED_RESERVE,
};
use farlink_wire::msg::{MemoryUsage, SharedFinalizeRequest, SharedSegment, Stripe};
use farlink_wire::sps::{SpsError, from_bytes, to_bytes};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
    usage: Option<Callee<(ExecutorAddr,), Expected<MemoryUsage>>>,
    views: Views,
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
            usage: executor.bind(MEMORY_USAGE).ok(),
            views: Views::new(executor.page_size()),
        };
        Ok(Self { inner: Arc::new(inner) })
    }
}

impl Inner {
    /// Takes the executor's answer to a reserve call: the base, and the object behind the reservation or why there is
    /// none.
    fn reserved(&self, bytes: u64, base: ExecutorAddr, view: Result<View, Error>) -> Result<ExecutorAddrRange, Error> {
        let attached = view.and_then(|view| {
            let range = check_reserved(base, bytes, self.page_size)?;
            self.views.add(range, view).map(|()| range)
        });
        // The executor has reserved what cannot be used here. What it says to giving it back adds nothing. A base that
        // is in use stays: it is another's.
        if attached.is_err() && !base.is_null() && !self.views.has(base) {
            let _ = self.release.call(&(self.instance, vec![base])).wait();
        }
        attached
    }

    /// Reserves at least `bytes`, in the stripes that `stripes` gives for a size: if memory has no name, and whether
    /// reservations for linked code have stripes.
    fn reserve(
        self: &Arc<Self>,
        bytes: u64,
        stripes: impl FnOnce(u64, bool) -> Vec<Stripe>,
    ) -> Pending<Result<ExecutorAddrRange, Error>> {
        let inner = Arc::clone(self);
        let Some(rounded) = self.page_size.round_up(bytes).filter(|&bytes| bytes != 0) else {
            return Pending::ready(Err(Error::BadSize { what: "reserved", bytes }));
        };
        match &self.backing {
            Backing::Nameless { executor, map, is_striped } => {
                let stripes = stripes(rounded, *is_striped);
                let sent = make(rounded, stripes.clone()).and_then(|view| {
                    let descriptor = view.object.as_ref().map(SharedObject::as_fd);
                    let tag = executor.send_descriptor(descriptor.expect("it has just been made"))?;
                    Ok((view, map.call(&(self.instance, tag, rounded, stripes))))
                });
                let (view, call) = match sent {
                    Ok(sent) => sent,
                    Err(error) => return Pending::ready(Err(error)),
                };
                call.map(move |answer| {
                    let base = answer?.map_err(refused("map shared memory"))?;
                    inner.reserved(rounded, base, Ok(view))
                })
            }
            Backing::Named { reserve, asked, .. } => {
                asked.fetch_add(1, Ordering::Relaxed);
                reserve.call(&(self.instance, bytes)).map(move |answer| {
                    if let (Err(CallError::Disconnected(_)), Backing::Named { pid, asked, .. }) =
                        (&answer, &inner.backing)
                    {
                        unlink_orphans(*pid, asked.load(Ordering::Relaxed));
                    }
                    let (base, name) = answer?.map_err(refused("reserve shared memory"))?;
                    // The object comes first: its name has to go whatever else is wrong.
                    let view = take(&name).and_then(|object| attach(object, &name, rounded));
                    inner.reserved(rounded, base, view)
                })
            }
        }
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

/// Makes an object without a name, and maps it.
fn make(bytes: u64, stripes: Vec<Stripe>) -> Result<View, Error> {
    let object = SharedObject::nameless(bytes).map_err(|error| nameless_error(error, bytes))?;
    let length = usize::try_from(bytes).map_err(|_| Error::OutOfAddressSpace { bytes })?;
    let mapping = object.map(length).map_err(|_| Error::OutOfAddressSpace { bytes })?;
    Ok(View { object: Some(object), mapping: Arc::new(mapping), own_data: None, stripes })
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
fn attach(object: SharedObject, name: &str, bytes: u64) -> Result<View, Error> {
    let size = object.len().map_err(|error| Error::shared(name, "examined", error))?;
    if size < bytes {
        return Err(bad_answer("reserve", format!("the object {name} has {size} bytes instead of {bytes}")));
    }
    let mapping = object.map(bytes as usize).map_err(|error| Error::shared(name, "mapped", error))?;
    Ok(View { object: Some(object), mapping: Arc::new(mapping), own_data: None, stripes: Vec::new() })
}

impl MemoryMapper for SharedMemoryMapper {
    fn page_size(&self) -> PageSize {
        self.inner.page_size
    }

    fn reserve(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        let page_size = self.inner.page_size;
        self.inner.reserve(bytes, |bytes, is_striped| if is_striped { divide(bytes, page_size) } else { Vec::new() })
    }

    fn reserve_buffers(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        self.inner.reserve(bytes, |bytes, _| buffers(bytes))
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

    fn view(&self, range: ExecutorAddrRange) -> Option<WorkingMemory> {
        self.inner.views.working(range).ok()
    }

    fn recycle(&self, segments: &[(AllocGroup, ExecutorAddrRange)]) {
        self.inner.views.recycle(segments);
    }

    fn usage(&self) -> Pending<Result<MapperUsage, Error>> {
        let own = self.inner.views.usage();
        match &self.inner.usage {
            Some(usage) => usage.call(&(self.inner.instance,)).map(|answer| executor_usage(own?, answer?)),
            None => Pending::ready(own),
        }
    }

    fn finalize(&self, allocations: Vec<FinalizeRequest>) -> Pending<Result<Vec<ExecutorAddr>, Error>> {
        let Told { keys, requests, told_keys, undo } = match self.inner.views.begin(allocations) {
            Ok(told) => told,
            Err(error) => return Pending::ready(Err(error)),
        };
        if requests.is_empty() {
            return Pending::ready(Ok(keys));
        }
        let requests = requests.into_iter().map(|request| (request.reservation, shared_request(request))).collect();
        let inner = Arc::clone(&self.inner);
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
            checked.inspect_err(|_| inner.views.undo(&undo)).map(|_| keys)
        })
    }

    fn deallocate(&self, keys: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        match self.inner.views.end(keys) {
            Err(error) => Pending::ready(Err(error)),
            Ok(told) if told.is_empty() => Pending::ready(Ok(())),
            Ok(told) => {
                let call = self.inner.deinitialize.call(&(self.inner.instance, told));
                call.map(|answer| answer?.0.map_err(refused("deallocate memory")))
            }
        }
    }

    fn release(&self, bases: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        // What begins here ends here, whatever the executor says: after this its addresses may be another reservation's.
        if let Err(error) = self.inner.views.remove(&bases) {
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
