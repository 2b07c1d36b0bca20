//! The same physical pages in both processes: the executor creates a POSIX shared memory object, this process opens
//! it, removes its name, and maps it. Content is never copied between the processes.

use super::{FinalizeRequest, MemoryMapper, Reservations, bad_answer, check_keys, check_reserved, refused};
use crate::sys::{Mapping, SharedObject};
use crate::{Error, WorkingMemory};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange, PageSize};
use farlink_rpc::{CallError, Callee, Executor, Pending};
use farlink_wire::functions::{
    Expected, PID_KEY, SHARED_DEINITIALIZE, SHARED_INITIALIZE, SHARED_INITIALIZE_BATCH, SHARED_INSTANCE,
    SHARED_RELEASE, SHARED_RESERVE,
};
use farlink_wire::msg::{SharedFinalizeRequest, SharedSegment};
use farlink_wire::sps::{SpsError, from_bytes, to_bytes};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    reserve: Callee<(ExecutorAddr, u64), Expected<(ExecutorAddr, String)>>,
    initialize: Callee<(ExecutorAddr, ExecutorAddr, SharedFinalizeRequest), Expected<ExecutorAddr>>,
    initialize_batch: Option<InitializeBatch>,
    deinitialize: Callee<(ExecutorAddr, Keys), SpsError>,
    release: Callee<(ExecutorAddr, Keys), SpsError>,
    /// The executor's process id, if it says; its shared memory objects are called after it.
    pid: Option<u64>,
    /// Number of reservations asked for.
    asked: AtomicU64,
    reservations: Mutex<Reservations<Arc<Reservation>>>,
}

/// This process's side of a reservation.
struct Reservation {
    object: SharedObject,
    mapping: Arc<Mapping>,
}

impl SharedMemoryMapper {
    /// Returns a mapper for the executor's shared memory service.
    ///
    /// # Errors
    ///
    /// Fails if the executor has none.
    pub fn new(executor: &Executor) -> Result<Self, Error> {
        let inner = Inner {
            page_size: executor.page_size(),
            instance: executor.object(SHARED_INSTANCE)?,
            reserve: executor.bind(SHARED_RESERVE)?,
            initialize: executor.bind(SHARED_INITIALIZE)?,
            initialize_batch: executor.bind(SHARED_INITIALIZE_BATCH).ok(),
            deinitialize: executor.bind(SHARED_DEINITIALIZE)?,
            release: executor.bind(SHARED_RELEASE)?,
            pid: executor.info().value(PID_KEY).and_then(|pid| from_bytes(pid).ok()),
            asked: AtomicU64::new(0),
            reservations: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Reservations<Arc<Reservation>>> {
        // No code that can panic half-way through a change runs under this lock.
        self.reservations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the reservation that has all of `range`, and where in it the range begins.
    fn place(&self, range: ExecutorAddrRange) -> Result<(u64, Arc<Reservation>), Error> {
        let reservations = self.lock();
        let (around, reservation) = reservations.around(range)?;
        Ok((range.start().as_u64() - around.start().as_u64(), Arc::clone(reservation)))
    }

    /// Takes the executor's answer to a reserve call.
    fn reserved(
        &self,
        bytes: u64,
        answer: Result<Expected<(ExecutorAddr, String)>, CallError>,
    ) -> Result<ExecutorAddrRange, Error> {
        if let Err(CallError::Disconnected(_)) = &answer {
            self.unlink_orphans();
        }
        let (base, name) = answer?.map_err(refused("reserve shared memory"))?;
        // The object comes first: its name has to go whatever else is wrong.
        let attached = take(&name)
            .and_then(|object| {
                let range = check_reserved(base, bytes, self.page_size)?;
                Ok((range, Arc::new(attach(object, &name, range.len())?)))
            })
            .and_then(|(range, reservation)| self.lock().add(range, reservation).map(|()| range));
        // The executor has reserved what cannot be used here. What it says to giving it back adds nothing. A base that
        // is in use stays: it is another's.
        if attached.is_err() && !base.is_null() && !self.lock().has(base) {
            let _ = self.release.call(&(self.instance, vec![base])).wait();
        }
        attached
    }

    /// Removes the names that the executor may have left if it died between creating an object and telling us.
    fn unlink_orphans(&self) {
        if let Some(pid) = self.pid {
            for number in 1..=self.asked.load(Ordering::Relaxed) {
                SharedObject::unlink(&format!("/farlink_{pid}_{number}"));
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
    Ok(Reservation { object, mapping: Arc::new(mapping) })
}

impl MemoryMapper for SharedMemoryMapper {
    fn page_size(&self) -> PageSize {
        self.inner.page_size
    }

    fn reserve(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        self.inner.asked.fetch_add(1, Ordering::Relaxed);
        let inner = Arc::clone(&self.inner);
        let call = self.inner.reserve.call(&(self.inner.instance, bytes));
        call.map(move |answer| inner.reserved(bytes, answer))
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
        let requests: Vec<_> =
            allocations.into_iter().map(|request| (request.reservation, shared_request(request))).collect();
        let inner = &self.inner;
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
            check_keys(keys?, &wanted)
        })
    }

    fn deallocate(&self, keys: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        let call = self.inner.deinitialize.call(&(self.inner.instance, keys));
        call.map(|answer| answer?.0.map_err(refused("deallocate memory")))
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
