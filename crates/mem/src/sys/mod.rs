//! Memory calls of the operating system: the only room with them. Another system is another file here.

#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
mod linux;

#[cfg(target_os = "linux")]
pub(crate) use linux::{Mapping, SharedObject, page_size};

#[cfg(not(target_os = "linux"))]
compile_error!("farlink-mem has no memory calls for this system yet: src/sys needs a file for it");
