//! Memory that this process and linked code both use, without copies and without calls.

use crate::session::{Session, SessionInner};
use crate::{Error, ExecutorPtr};
use bytemuck::Pod;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use std::marker::PhantomData;

/// An array in memory that the controller and the executor both read and write, for arguments and results that are not to
/// be copied. Zero at first.
///
/// Linked code gets [`Self::executor_ptr`]. It may write at any time, so there are only accessors that copy, and never a
/// reference. Aligned values of up to 8 bytes are read and written whole; for anything larger, and for the order of
/// accesses to different values, both sides have to agree, for example by calls. Children that linked code forks share
/// it. Dropping it frees it: linked code must not use it any more.
pub struct SharedBuffer<T> {
    buffer: farlink_mem::SharedBuffer,
    /// Keeps the executor.
    _session: Session,
    len: usize,
    element: PhantomData<fn(T) -> T>,
}

impl Session {
    /// Allocates an array of `len` elements that the controller and the executor share.
    ///
    /// # Errors
    ///
    /// Fails if the executor's memory is reached by messages only ([`farlink_mem::Error::NotShared`]), if `len` or the
    /// size of an element is 0, or if there is no memory.
    pub fn shared_buffer<T: Pod>(&self, len: usize) -> Result<SharedBuffer<T>, Error> {
        const { assert!(align_of::<T>() <= 64, "buffers begin at multiples of 64 bytes") };
        let inner = self.inner();
        let bytes = (len as u64).checked_mul(size_of::<T>() as u64);
        let bytes = bytes.ok_or(farlink_mem::Error::OutOfAddressSpace { bytes: u64::MAX })?;
        let buffer = inner.memory.allocate_buffer(bytes).wait().map_err(|error| inner.explain(error.into()))?;
        Ok(SharedBuffer { buffer, _session: self.clone(), len, element: PhantomData })
    }

    /// Reads executor memory at `addr`.
    ///
    /// Linked data in memory that both processes share is read without a call, everything else by one. What is read may
    /// be changing.
    ///
    /// # Errors
    ///
    /// Fails if there is no such memory, or the executor cannot be reached.
    pub fn read_memory(&self, addr: ExecutorAddr, bytes: &mut [u8]) -> Result<(), Error> {
        let inner = self.inner();
        let range = range(addr, bytes.len())?;
        match inner.memory.view(range) {
            Some(view) => Ok(view.read_volatile(0, bytes)?),
            None => {
                let read = inner.runtime()?.read(range).map_err(|error| inner.explain(error))?;
                bytes.copy_from_slice(&read);
                Ok(())
            }
        }
    }

    /// Writes executor memory at `addr`, as [`Self::read_memory`] reads it. In memory that both processes share this
    /// also writes what linked code cannot: read-only data and code.
    ///
    /// # Errors
    ///
    /// Fails if there is no such memory, the executor may not write it, or the executor cannot be reached.
    pub fn write_memory(&self, addr: ExecutorAddr, bytes: &[u8]) -> Result<(), Error> {
        let inner = self.inner();
        match inner.memory.view(range(addr, bytes.len())?) {
            Some(view) => Ok(view.write_volatile(0, bytes)?),
            None => inner.runtime()?.write(addr, bytes).map_err(|error| inner.explain(error)),
        }
    }
}

impl SessionInner {
    /// Reads what has been linked.
    pub(crate) fn read_code(&self, range: ExecutorAddrRange) -> Result<Vec<u8>, Error> {
        let Some(view) = self.memory.view(range) else { return self.runtime()?.read(range) };
        let mut bytes = vec![0; range.len() as usize];
        view.read_volatile(0, &mut bytes)?;
        Ok(bytes)
    }
}

fn range(addr: ExecutorAddr, len: usize) -> Result<ExecutorAddrRange, Error> {
    let range = ExecutorAddrRange::from_len(addr, len as u64);
    Ok(range.ok_or(farlink_mem::Error::OutOfAddressSpace { bytes: len as u64 })?)
}

impl<T: Pod> SharedBuffer<T> {
    /// Returns the number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there are no elements, which is never so.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the address of the first element in the executor. It is a multiple of 64.
    #[must_use]
    pub fn executor_addr(&self) -> ExecutorAddr {
        self.buffer.range().start()
    }

    /// Returns the pointer to the first element, as linked code gets it.
    #[must_use]
    pub fn executor_ptr(&self) -> ExecutorPtr<T> {
        ExecutorPtr::new(self.executor_addr())
    }

    /// Reads the element at `index`.
    ///
    /// # Errors
    ///
    /// Fails if there is none.
    pub fn get(&self, index: usize) -> Result<T, Error> {
        let mut element = T::zeroed();
        self.read(index, std::slice::from_mut(&mut element))?;
        Ok(element)
    }

    /// Writes the element at `index`.
    ///
    /// # Errors
    ///
    /// Fails if there is none.
    pub fn set(&self, index: usize, element: T) -> Result<(), Error> {
        self.write(index, &[element])
    }

    /// Copies elements from `index` on to `elements`.
    ///
    /// # Errors
    ///
    /// Fails if there are not as many.
    pub fn read(&self, index: usize, elements: &mut [T]) -> Result<(), Error> {
        let bytes = bytemuck::cast_slice_mut(elements);
        Ok(self.buffer.memory().read_volatile(offset::<T>(index), bytes)?)
    }

    /// Copies `elements` to the elements from `index` on.
    ///
    /// # Errors
    ///
    /// Fails if there are not as many.
    pub fn write(&self, index: usize, elements: &[T]) -> Result<(), Error> {
        Ok(self.buffer.memory().write_volatile(offset::<T>(index), bytemuck::cast_slice(elements))?)
    }
}

/// Returns where an element begins, or an offset that is outside of any memory.
fn offset<T>(index: usize) -> u64 {
    (index as u64).saturating_mul(size_of::<T>() as u64)
}
