//! Memory without a name that two processes map for good, and that nobody allocates from.

use crate::sys::{Mapping, Place, SharedObject};
use crate::{Error, WorkingMemory};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// Memory that this process shares with one to which it sends the descriptor. Zero at first; its size never changes.
#[derive(Debug)]
pub struct SharedArea {
    object: SharedObject,
    mapping: Arc<Mapping>,
}

impl SharedArea {
    /// Makes an area of `bytes`.
    ///
    /// # Errors
    ///
    /// Fails if the system has no such memory, or no address space for it.
    pub fn new(bytes: u64) -> Result<Self, Error> {
        let object = SharedObject::nameless(bytes)
            .map_err(|error| Error::system("memory without a name cannot be made", error))?;
        Self::map(object, bytes)
    }

    /// Maps an area that another process has made and whose descriptor it has sent.
    ///
    /// # Errors
    ///
    /// Fails if it has fewer than `bytes`, or cannot be mapped.
    pub fn received(descriptor: OwnedFd, bytes: u64) -> Result<Self, Error> {
        let unknown = |error| Error::system("the object received cannot be examined", error);
        let object = SharedObject::received(descriptor).map_err(unknown)?;
        if object.len().map_err(unknown)? < bytes {
            return Err(Error::BadSize { what: "mapped of a smaller object", bytes });
        }
        Self::map(object, bytes)
    }

    fn map(object: SharedObject, bytes: u64) -> Result<Self, Error> {
        let length = usize::try_from(bytes).map_err(|_| Error::OutOfAddressSpace { bytes })?;
        let mapping = object.map(length, Place::Anywhere).map_err(|_| Error::OutOfAddressSpace { bytes })?;
        Ok(Self { object, mapping: Arc::new(mapping) })
    }

    /// Returns the descriptor, to be sent to the other process.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.object.as_fd()
    }

    /// Copies all of it. What the other process writes meanwhile may be in the copy or not.
    ///
    /// # Errors
    ///
    /// Fails if there is no memory for the copy.
    pub fn copy(&self) -> Result<Vec<u8>, Error> {
        let len = self.mapping.range().len();
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len as usize).map_err(|error| Error::system("memory cannot be had", error))?;
        bytes.resize(len as usize, 0);
        WorkingMemory::in_mapping(&self.mapping, 0, len)?.read_volatile(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Makes the first `bytes` zero.
    ///
    /// # Errors
    ///
    /// Fails if it does not have as many.
    pub fn clear(&self, bytes: u64) -> Result<(), Error> {
        WorkingMemory::in_mapping(&self.mapping, 0, bytes)?.zero();
        Ok(())
    }

    /// Gives up the descriptor and keeps the memory for as long as the process lives; gives its first byte.
    pub fn keep_for_good(self) -> NonNull<u8> {
        let start = self.mapping.start();
        std::mem::forget(self.mapping);
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ends have the same memory, its size is checked, and clearing it clears it for both.
    #[test]
    fn one_memory() {
        let area = SharedArea::new(8192).unwrap();
        let descriptor = || area.descriptor().try_clone_to_owned().unwrap();
        assert!(SharedArea::received(descriptor(), 8193).is_err());
        let other = SharedArea::received(descriptor(), 8192).unwrap();
        WorkingMemory::in_mapping(&other.mapping, 0, 8192).unwrap().write(4096, b"x").unwrap();
        let copy = area.copy().unwrap();
        assert_eq!((copy.len(), copy[4095], copy[4096]), (8192, 0, b'x'));
        area.clear(8192).unwrap();
        assert_eq!(other.copy().unwrap(), vec![0; 8192]);
    }
}
