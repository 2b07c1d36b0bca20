//! Memory of this process: the controller is the executor.

use super::{FinalizeRequest, MemoryMapper};
use crate::{Allocation, Error, MemoryService, WorkingMemory};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange, PageSize};
use farlink_rpc::Pending;
use farlink_wire::msg::Segment;
use farlink_wire::sps::Blob;

/// Maps memory of this process. Working memory is the memory itself, so nothing is copied.
///
/// Also the way to test what stands on [`MemoryMapper`] apart from shared memory.
#[derive(Debug, Default)]
pub struct InProcessMapper {
    service: MemoryService,
}

impl InProcessMapper {
    /// Returns a mapper without reservations.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl MemoryMapper for InProcessMapper {
    fn page_size(&self) -> PageSize {
        self.service.page_size()
    }

    fn reserve(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        Pending::ready(self.service.reserve_private(bytes))
    }

    fn prepare(&self, range: ExecutorAddrRange) -> Result<WorkingMemory, Error> {
        let mapping = self.service.mapping_of(range)?;
        let offset = range.start().as_u64() - mapping.range().start().as_u64();
        WorkingMemory::in_mapping(&mapping, offset, range.len())
    }

    fn finalize(&self, allocations: Vec<FinalizeRequest>) -> Pending<Result<Vec<ExecutorAddr>, Error>> {
        let allocations = allocations.into_iter().map(|request| Allocation {
            slab: Some(request.reservation),
            segments: request
                .segments
                .iter()
                .map(|segment| Segment {
                    group: segment.group,
                    addr: segment.range.start(),
                    size: segment.range.len(),
                    content: Blob::default(),
                })
                .collect(),
            actions: request.actions,
        });
        Pending::ready(self.service.initialize(allocations.collect()))
    }

    fn deallocate(&self, keys: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        Pending::ready(self.service.deinitialize(&keys))
    }

    fn release(&self, bases: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        Pending::ready(self.service.release(&bases))
    }
}
