//! Content that travels in messages, to an executor that shares no memory with this process.

use super::{
    FinalizeRequest, MapperUsage, MemoryMapper, Reservations, check_keys, check_reserved, executor_usage, refused,
};
use crate::{Error, WorkingMemory};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange, PageSize};
use farlink_rpc::{CallError, Callee, Executor, Pending};
use farlink_wire::functions::{
    Expected, MEMORY_USAGE, SIMPLE_DEALLOCATE, SIMPLE_DEINITIALIZE, SIMPLE_FINALIZE, SIMPLE_INITIALIZE,
    SIMPLE_INITIALIZE_BATCH, SIMPLE_INSTANCE, SIMPLE_RELEASE, SIMPLE_RESERVE, VERSION_KEY,
};
use farlink_wire::msg::{FinalizeRequest as Message, MemoryUsage, Segment};
use farlink_wire::sps::{Encode, SpsError, to_bytes};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Maps memory of an executor that is reached by messages only.
pub struct RemoteMapper {
    inner: Arc<Inner>,
}

type Keys = Vec<ExecutorAddr>;
type InitializeBatch = Callee<(ExecutorAddr, Vec<Message<'static>>), Expected<Keys>>;

struct Inner {
    page_size: PageSize,
    instance: ExecutorAddr,
    reserve: Callee<(ExecutorAddr, u64), Expected<ExecutorAddr>>,
    release: Callee<(ExecutorAddr, Vec<ExecutorAddr>), SpsError>,
    dialect: Dialect,
    usage: Option<Callee<(ExecutorAddr,), Expected<MemoryUsage>>>,
    reservations: Mutex<Reservations<()>>,
}

/// What an executor can do with what it has reserved.
enum Dialect {
    /// Finalize any part of it, and end that again.
    Parts {
        initialize: Callee<(ExecutorAddr, Message<'static>), Expected<ExecutorAddr>>,
        initialize_batch: Option<InitializeBatch>,
        deinitialize: Callee<(ExecutorAddr, Vec<ExecutorAddr>), SpsError>,
    },
    /// LLVM 22: the same, but what has ended cannot be finalized again, so a reservation is used for one allocation.
    Once { initialize: Callee<(ExecutorAddr, Message<'static>), Expected<ExecutorAddr>> },
    /// LLVM 19: finalize what begins where it begins, once; it ends with that, and also if that fails.
    Whole { finalize: Callee<(ExecutorAddr, Message<'static>), SpsError> },
}

impl Dialect {
    fn of(executor: &Executor) -> Result<Self, Error> {
        if let (false, Ok(finalize)) = (executor.offers(SIMPLE_INITIALIZE), executor.bind(SIMPLE_FINALIZE)) {
            return Ok(Self::Whole { finalize });
        }
        if executor.info().value(VERSION_KEY).is_none() {
            return Ok(Self::Once { initialize: executor.bind(SIMPLE_INITIALIZE)? });
        }
        Ok(Self::Parts {
            initialize: executor.bind(SIMPLE_INITIALIZE)?,
            initialize_batch: executor.bind(SIMPLE_INITIALIZE_BATCH).ok(),
            deinitialize: executor.bind(SIMPLE_DEINITIALIZE)?,
        })
    }
}

impl RemoteMapper {
    /// Returns a mapper for the executor's simple memory manager.
    ///
    /// # Errors
    ///
    /// Fails if the executor has none.
    pub fn new(executor: &Executor) -> Result<Self, Error> {
        let inner = Inner {
            page_size: executor.page_size(),
            instance: executor.object(SIMPLE_INSTANCE)?,
            reserve: executor.bind(SIMPLE_RESERVE)?,
            release: executor.bind(SIMPLE_RELEASE).or_else(|_| executor.bind(SIMPLE_DEALLOCATE))?,
            dialect: Dialect::of(executor)?,
            usage: executor.bind(MEMORY_USAGE).ok(),
            reservations: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Reservations<()>> {
        // No code that can panic half-way through a change runs under this lock.
        self.reservations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reserved(
        &self,
        bytes: u64,
        answer: Result<Expected<ExecutorAddr>, CallError>,
    ) -> Result<ExecutorAddrRange, Error> {
        let base = answer?.map_err(refused("reserve memory"))?;
        let added =
            check_reserved(base, bytes, self.page_size).and_then(|range| self.lock().add(range, ()).map(|()| range));
        // The executor has reserved what cannot be used. A base that is in use stays: it is another's.
        if added.is_err() && !base.is_null() && !self.lock().has(base) {
            let _ = self.release.call(&(self.instance, vec![base])).wait();
        }
        added
    }

    /// As for shared memory: all calls are sent, then awaited; what succeeded is undone if one fails.
    fn finalize_one_by_one(
        self: &Arc<Self>,
        requests: &[FinalizeRequest],
        wanted: Vec<ExecutorAddr>,
    ) -> Pending<Result<Vec<ExecutorAddr>, Error>> {
        let encode = |request: &FinalizeRequest| to_bytes(&(self.instance, Outgoing(request)));
        let finalize = |(request, key): (&FinalizeRequest, ExecutorAddr)| match &self.dialect {
            Dialect::Parts { initialize, .. } | Dialect::Once { initialize } => {
                initialize.call_encoded(encode(request))
            }
            Dialect::Whole { finalize } => finalize
                .call_encoded(encode(request))
                .map(move |answer| answer.map(|SpsError(result)| result.map(|()| key))),
        };
        let calls: Vec<_> = requests.iter().zip(wanted).map(finalize).collect();
        let inner = Arc::clone(self);
        super::undo_unless_all(calls, move |keys| {
            let _ = inner.end(keys).wait();
        })
    }

    /// Ends allocations.
    fn end(&self, keys: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        let call = match &self.dialect {
            Dialect::Parts { deinitialize, .. } => deinitialize.call(&(self.instance, keys)),
            Dialect::Once { .. } | Dialect::Whole { .. } => {
                // Their reservations end with them.
                let mut reservations = self.lock();
                for key in &keys {
                    let _ = reservations.remove(std::slice::from_ref(key));
                }
                self.release.call(&(self.instance, keys))
            }
        };
        call.map(|answer| answer?.0.map_err(refused("deallocate memory")))
    }
}

/// A request whose content is encoded straight from working memory.
struct Outgoing<'a>(&'a FinalizeRequest);

impl Encode for Outgoing<'_> {
    fn encode(&self, out: &mut Vec<u8>) {
        (self.0.segments.len() as u64).encode(out);
        for segment in &self.0.segments {
            let mut content = vec![0; segment.content_bytes as usize];
            // Working memory has the content's length, or more.
            if segment.working.read(0, &mut content).is_err() {
                content.clear();
            }
            let (addr, size) = (segment.range.start(), segment.range.len());
            Segment { group: segment.group, addr, size, content: content.into() }.encode(out);
        }
        self.0.actions.encode(out);
    }
}

impl MemoryMapper for RemoteMapper {
    fn page_size(&self) -> PageSize {
        self.inner.page_size
    }

    fn reserve(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        let inner = Arc::clone(&self.inner);
        let call = self.inner.reserve.call(&(self.inner.instance, bytes));
        call.map(move |answer| inner.reserved(bytes, answer))
    }

    fn prepare(&self, range: ExecutorAddrRange) -> Result<WorkingMemory, Error> {
        self.inner.lock().around(range)?;
        WorkingMemory::in_heap(range.len())
    }

    fn usage(&self) -> Pending<Result<MapperUsage, Error>> {
        let Some(usage) = &self.inner.usage else { return Pending::ready(Ok(MapperUsage::default())) };
        usage.call(&(self.inner.instance,)).map(|answer| {
            let told = answer?;
            let committed_bytes = told.as_ref().map_or(0, |told| told.committed_bytes);
            executor_usage(MapperUsage { committed_bytes, ..MapperUsage::default() }, told)
        })
    }

    fn finalize(&self, allocations: Vec<FinalizeRequest>) -> Pending<Result<Vec<ExecutorAddr>, Error>> {
        let wanted: Result<Vec<_>, _> = allocations.iter().map(FinalizeRequest::key).collect();
        let wanted = match wanted {
            Ok(wanted) => wanted,
            Err(error) => return Pending::ready(Err(error)),
        };
        let inner = &self.inner;
        let keys = match &inner.dialect {
            Dialect::Parts { initialize_batch: Some(batch), .. } => {
                let requests: Vec<_> = allocations.iter().map(Outgoing).collect();
                let call = batch.call_encoded(to_bytes(&(inner.instance, requests)));
                call.map(|answer| answer?.map_err(refused("finalize memory")))
            }
            _ => inner.finalize_one_by_one(&allocations, wanted.clone()),
        };
        keys.map(move |keys| check_keys(keys?, &wanted))
    }

    fn deallocate(&self, keys: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        self.inner.end(keys)
    }

    fn is_exclusive(&self) -> bool {
        !matches!(self.inner.dialect, Dialect::Parts { .. })
    }

    fn release(&self, bases: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        if let Err(error) = self.inner.lock().remove(&bases) {
            return Pending::ready(Err(error));
        }
        let call = self.inner.release.call(&(self.inner.instance, bases));
        call.map(|answer| answer?.0.map_err(refused("release memory")))
    }
}
