//! Linked code in memory of the executor's own, for debuggers and profilers; buffers are shared as ever.
//!
//! The kernel lets no debugger write breakpoints into a shared mapping that its process may not write, and `perf` looks for
//! names of functions only where memory has no file. So code and data come in messages, page by page.

use crate::Memory;
use crate::harden::refused;
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, PageSize};
use farlink_mem::{
    Error, FinalizeRequest, MapperUsage, MemoryMapper, RemoteMapper, SharedMemoryMapper, StripeRange, WorkingMemory,
};
use farlink_rpc::{Executor, Pending};
use std::sync::Arc;

/// Returns the mapper for a kind of memory, with code in memory of the executor's own or for an executor that is hardened
/// if that is wanted.
pub(crate) fn mapper(
    executor: &Executor,
    memory: Memory,
    private: bool,
    hardened: bool,
) -> Result<Arc<dyn MemoryMapper>, crate::Error> {
    let shared = match memory {
        Memory::Shared if hardened && private => return Err(refused("debuggers and profilers write its code")),
        Memory::Shared if hardened => SharedMemoryMapper::hardened(executor)?,
        _ if hardened => return Err(refused("its memory has to be shared, without a name")),
        Memory::Shared => SharedMemoryMapper::new(executor)?,
        Memory::Posix => SharedMemoryMapper::posix(executor)?,
        Memory::Remote => return Ok(Arc::new(RemoteMapper::new(executor)?)),
    };
    Ok(if private { Arc::new(PrivateCode::new(executor, shared)?) } else { Arc::new(shared) })
}

/// Two mappers: reservations for buffers are one's, all others the other's.
struct PrivateCode {
    code: RemoteMapper,
    buffers: SharedMemoryMapper,
}

impl PrivateCode {
    /// Returns a mapper that shares buffers by `buffers`.
    fn new(executor: &Executor, buffers: SharedMemoryMapper) -> Result<Self, Error> {
        Ok(Self { code: RemoteMapper::new(executor)?, buffers })
    }

    /// Returns the mapper that has the reservation around an address.
    fn of(&self, addr: ExecutorAddr) -> &dyn MemoryMapper {
        let is_buffer = !self.buffers.stripes(addr).is_empty();
        if is_buffer { &self.buffers } else { &self.code }
    }
}

impl MemoryMapper for PrivateCode {
    fn page_size(&self) -> PageSize {
        self.code.page_size()
    }

    fn reserve(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        self.code.reserve(bytes)
    }

    fn prepare(&self, range: ExecutorAddrRange) -> Result<WorkingMemory, Error> {
        self.of(range.start()).prepare(range)
    }

    fn secure(&self, range: ExecutorAddrRange) -> Result<(), Error> {
        self.of(range.start()).secure(range)
    }

    fn stripes(&self, reservation: ExecutorAddr) -> Vec<StripeRange> {
        self.buffers.stripes(reservation)
    }

    fn is_exclusive(&self) -> bool {
        self.code.is_exclusive()
    }

    fn reserve_buffers(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        self.buffers.reserve_buffers(bytes)
    }

    fn view(&self, range: ExecutorAddrRange) -> Option<WorkingMemory> {
        self.buffers.view(range)
    }

    fn usage(&self) -> Pending<Result<MapperUsage, Error>> {
        // The executor answers for all of its memory; what this process has of it is in buffers.
        self.buffers.usage()
    }

    fn recycle(&self, segments: &[(AllocGroup, ExecutorAddrRange)]) {
        self.buffers.recycle(segments);
    }

    fn discard(&self, segments: &[(AllocGroup, ExecutorAddrRange)]) {
        self.buffers.discard(segments);
    }

    fn finalize(&self, allocations: Vec<FinalizeRequest>) -> Pending<Result<Vec<ExecutorAddr>, Error>> {
        self.code.finalize(allocations)
    }

    fn deallocate(&self, keys: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        self.code.deallocate(keys)
    }

    fn release(&self, bases: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        let is_buffer = |base: &ExecutorAddr| !self.buffers.stripes(*base).is_empty();
        let (buffers, code): (Vec<_>, Vec<_>) = bases.into_iter().partition(is_buffer);
        let release = |mapper: &dyn MemoryMapper, bases: Vec<ExecutorAddr>| {
            if bases.is_empty() { Pending::ready(Ok(())) } else { mapper.release(bases) }
        };
        let both = vec![release(&self.buffers, buffers), release(&self.code, code)];
        Pending::all(both).map(|results| results.map(drop))
    }
}
