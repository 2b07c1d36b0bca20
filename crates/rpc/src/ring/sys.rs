//! The memory of a ring: the only unsafe code of this crate.

#![allow(unsafe_code)]

use super::queue::Memory;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use rustix::process::{Resource, getrlimit};
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

/// Words of each queue: 32 KiB.
pub(super) const WORDS: usize = 4096;

/// Both queues, as they are in shared memory.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Queues {
    pub(super) to_executor: Memory<WORDS>,
    pub(super) to_controller: Memory<WORDS>,
}

/// A mapping of a ring's memory, which the peer has too. Children that are forked do not get it.
#[derive(Debug)]
pub(super) struct Mapping(NonNull<Queues>);

// SAFETY: the mapping belongs to the process, not to a thread, and all of it is atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    const BYTES: usize = size_of::<Queues>();

    /// Makes the memory of a ring, which has no name and keeps its size; gives the descriptor for the peer.
    /// `memfd_create(2)`
    pub(super) fn create() -> Result<(Self, OwnedFd), Errno> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 do not know the flag.
        let object = match memfd_create("farlink-ring", flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => memfd_create("farlink-ring", flags)?,
            other => other?,
        };
        // Beyond the limit of files' sizes there is a signal instead of an error.
        if getrlimit(Resource::Fsize).current.is_some_and(|most| most < Self::BYTES as u64) {
            return Err(Errno::FBIG);
        }
        ftruncate(&object, Self::BYTES as u64)?;
        fcntl_add_seals(&object, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((Self::map(&object)?, object))
    }

    /// Maps the memory that a peer has made, if it is a ring's and keeps its size: what lies behind the end of a file
    /// cannot be accessed.
    pub(super) fn open(object: &OwnedFd) -> Result<Self, Errno> {
        let bytes = u64::try_from(fstat(object)?.st_size);
        if bytes != Ok(Self::BYTES as u64) || !fcntl_get_seals(object)?.contains(SealFlags::SHRINK) {
            return Err(Errno::INVAL);
        }
        Self::map(object)
    }

    /// `mmap(2)`
    fn map(object: impl AsFd) -> Result<Self, Errno> {
        let (place, prot) = (std::ptr::null_mut(), ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: it replaces no mapping: the system chooses the place.
        let start = unsafe { mmap(place, Self::BYTES, prot, MapFlags::SHARED, object, 0) }?;
        let mapping = Self(NonNull::new(start.cast()).expect("Linux maps nothing at null unless asked to"));
        // SAFETY: the range is the mapping made just now. It stays as it is in this process.
        unsafe { madvise(start, Self::BYTES, Advice::LinuxDontFork) }?;
        Ok(mapping)
    }

    /// Returns the queues.
    pub(super) fn queues(&self) -> &Queues {
        // SAFETY: the mapping is there as long as `self` and is as large as this; its start is that of a page, so it is
        // aligned. The structure is all atomics, which may have any value and may be changed by others at any time; the
        // object is sealed against shrinking, so that every page of it is there.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map`, and no reference to it outlives `self`.
        let unmapped = unsafe { munmap(self.0.as_ptr().cast(), Self::BYTES) };
        debug_assert!(unmapped.is_ok(), "unmapping a mapping of our own cannot fail");
    }
}
