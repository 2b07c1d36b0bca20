//! Linking without running: memory at addresses of the caller's choice, in no process at all.

use crate::death::Deaths;
use crate::harden::Hardening;
use crate::session::{Connection, Session, SessionBuilder, SessionInner};
use crate::trace::Trace;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange, PageSize};
use farlink_mem::{Error, FinalizeRequest, MemoryManager, MemoryMapper, WorkingMemory};
use farlink_rpc::Pending;
use std::sync::{Arc, Mutex, PoisonError};

impl SessionBuilder {
    /// Links without an executor, from the address `base` upward: nothing runs, and the linked bytes can be had.
    ///
    /// Symbols that no library defines are an error, or have the address 0 if `undefined_zero` is set. The graphs of
    /// linked objects are kept for [`Library::linked_graphs`](crate::Library::linked_graphs).
    ///
    /// # Errors
    ///
    /// Fails if `base` is not at a page boundary.
    pub fn image(self, base: ExecutorAddr, undefined_zero: bool) -> Result<(Session, Image), crate::Error> {
        let page = PageSize::SIZE_4K;
        if !base.is_aligned(page.align()) {
            return Err(crate::Error::BadBase { base: base.as_u64(), page: page.bytes() });
        }
        let image = Image::default();
        let mapper = Arc::new(ImageMapper::new(base, image.clone()));
        let memory = MemoryManager::new(mapper, self.reservation_bytes);
        let session = Session::new(SessionInner {
            connection: Connection::None,
            memory,
            runtime: None,
            callbacks: Arc::default(),
            deaths: Deaths::default(),
            flights: crate::flight::Flights::default(),
            call_timeout: None,
            ends_when_stuck: false,
            hardening: Hardening::default(),
            keeps_graphs: true,
            undefined_zero,
            low_memory: false,
            trace: Trace::default(),
            shows_debuggers: false,
            perf: None,
        });
        Ok((session, image))
    }
}

/// The linked bytes of a session that only links: see [`SessionBuilder::image`](crate::SessionBuilder::image).
#[derive(Clone, Default)]
pub struct Image {
    segments: Arc<Mutex<Vec<ImageSegment>>>,
}

/// A linked segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSegment {
    /// Its addresses, zero fill included.
    pub range: ExecutorAddrRange,
    /// Its bytes. What the range has beyond them is zero.
    pub content: Vec<u8>,
}

impl Image {
    /// Returns the segments linked so far, by address.
    #[must_use]
    pub fn segments(&self) -> Vec<ImageSegment> {
        let mut segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner).clone();
        segments.sort_by_key(|segment| segment.range);
        segments
    }

    fn add(&self, request: &FinalizeRequest) -> Result<(), Error> {
        let mut segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        for segment in &request.segments {
            let mut content = vec![0; segment.content_bytes as usize];
            segment.working.read(0, &mut content)?;
            segments.push(ImageSegment { range: segment.range, content });
        }
        Ok(())
    }
}

/// Reserves once, at the base, and keeps what is finalized.
pub(crate) struct ImageMapper {
    page_size: PageSize,
    image: Image,
    next: Mutex<ExecutorAddr>,
}

impl ImageMapper {
    pub(crate) fn new(base: ExecutorAddr, image: Image) -> Self {
        Self { page_size: PageSize::SIZE_4K, image, next: Mutex::new(base) }
    }
}

impl MemoryMapper for ImageMapper {
    fn page_size(&self) -> PageSize {
        self.page_size
    }

    fn reserve(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let range = ExecutorAddrRange::from_len(*next, bytes);
        Pending::ready(match range {
            Some(range) => {
                *next = range.end();
                Ok(range)
            }
            None => Err(Error::OutOfAddressSpace { bytes }),
        })
    }

    fn prepare(&self, range: ExecutorAddrRange) -> Result<WorkingMemory, Error> {
        WorkingMemory::in_heap(range.len())
    }

    fn finalize(&self, allocations: Vec<FinalizeRequest>) -> Pending<Result<Vec<ExecutorAddr>, Error>> {
        let mut keys = Vec::with_capacity(allocations.len());
        for request in &allocations {
            if let Err(error) = self.image.add(request) {
                return Pending::ready(Err(error));
            }
            keys.extend(request.segments.iter().map(|segment| segment.range.start()).min());
        }
        Pending::ready(Ok(keys))
    }

    fn deallocate(&self, _keys: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        Pending::ready(Ok(()))
    }

    fn release(&self, _bases: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        Pending::ready(Ok(()))
    }
}
