//! Memory that is allocated: what it takes, what it shows, and writing it again.

use super::{AllocatedSegment, FinalizedAlloc, MemoryManager};
use crate::{Error, MapperUsage, WorkingMemory};
use farlink_addr::{AllocGroup, ExecutorAddrRange, PageSize};
use farlink_rpc::Pending;

impl MemoryManager {
    /// Returns what the reservations take of the system, in both processes. Asks the executor.
    pub fn usage(&self) -> Pending<Result<MapperUsage, Error>> {
        self.inner.mapper.usage()
    }

    /// Returns memory that shows what the executor has in `range`, which may be live, and can be read and written without
    /// a call; none if the executor's memory is not shared, or the range is not in a reservation.
    #[must_use]
    pub fn view(&self, range: ExecutorAddrRange) -> Option<WorkingMemory> {
        self.inner.mapper.view(range)
    }

    /// Returns the segments of an allocation to be written again, with as many bytes of content each: where executors come and
    /// go, and none runs it now.
    ///
    /// # Errors
    ///
    /// Fails if the allocation has other segments, or is not of this manager's.
    pub fn rewrite(&self, alloc: &FinalizedAlloc, content_bytes: &[u64]) -> Result<Vec<AllocatedSegment>, Error> {
        let segments = alloc.parts();
        if segments.len() != content_bytes.len() {
            return Err(Error::NoSegments);
        }
        let segment = |(&(group, range), &content_bytes): (&(AllocGroup, ExecutorAddrRange), &u64)| {
            let content = ExecutorAddrRange::from_len(range.start(), content_bytes.min(range.len()));
            let working = self.inner.mapper.prepare(content.expect("it is a part of the range"))?;
            Ok(AllocatedSegment { group, range, content_bytes, working })
        };
        segments.iter().zip(content_bytes).map(segment).collect()
    }

    /// Returns the executor's page size.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.inner.page_size
    }
}
