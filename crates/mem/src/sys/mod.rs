//! Memory calls of the operating system: the only room with them. Another system is another folder here.

pub(crate) mod count;
#[cfg(feature = "fault-injection")]
pub mod fault;
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
mod linux;

#[cfg(target_os = "linux")]
pub use linux::probe;
#[cfg(target_os = "linux")]
pub(crate) use linux::{Data, Mapping, Place, SharedObject, Snapshot, count_mappings, page_size};

#[cfg(not(target_os = "linux"))]
compile_error!("farlink-mem has no memory calls for this system yet: src/sys needs a folder for it");
