//! Memory of an executor: reserved in large units, allocated from there, finalized, deallocated.
//!
//! - [`MemoryMapper`] is the seam between linking and address spaces: reserve, prepare, finalize, deallocate, release.
//!   [`InProcessMapper`], [`SharedMemoryMapper`] and [`RemoteMapper`] implement it.
//! - [`MemoryManager`] allocates from what a mapper has reserved; [`InFlightAlloc`] and [`FinalizedAlloc`] are the
//!   states of an allocation.
//! - `directory` has the tables by which an executor finds linked code by its address without having been told of it.
//! - [`MemoryService`] is the executor's side: slabs, and the allocations finalized in them with their actions.
//! - [`wrapper`] has the C ABI of the functions that actions and calls name.
//! - `sys` is the only room with memory calls of the operating system; [`probe`] tries what it needs of that.

#![deny(unsafe_code)]

mod action;
mod area;
mod directory;
mod error;
mod free_list;
mod manager;
mod mapper;
mod service;
mod sys;
mod working;
#[allow(unsafe_code)]
pub mod wrapper;

pub use area::SharedArea;
pub use directory::{CodeDirectory, INDEX_LINK_BYTES};
pub use error::Error;
pub use manager::{
    AllocatedSegment, AreaLayout, DirectoryActions, FinalizedAlloc, InFlightAlloc, MemoryManager, MemoryStats,
    ReservationLayout, SegmentLayout, SharedBuffer,
};
pub use mapper::{
    FinalizeRequest, FinalizeSegment, InProcessMapper, MapperUsage, MemoryMapper, RemoteMapper, SharedMemoryMapper,
    StripeBytes, StripeRange, StripedView,
};
pub use service::{Allocation, ChildCopy, MemoryService, ServiceUsage};
pub use sys::count::system_calls;
#[cfg(feature = "fault-injection")]
pub use sys::fault;
pub use sys::probe;
pub use working::WorkingMemory;

/// The page size of this process.
#[must_use]
pub fn page_size() -> farlink_addr::PageSize {
    sys::page_size()
}
