//! Working memory: where the controller writes what an executor will run.

#![allow(unsafe_code)]

use crate::Error;
use crate::sys::Mapping;
use std::cell::UnsafeCell;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The controller's view of a range of executor memory.
///
/// The executor may see the same pages, and write them, so there are only copying accessors and never a slice. An
/// access costs a bounds check and the copy; it makes no system call.
///
/// It is for writing content before its range is finalized. Afterwards the pages may be protected in this process, if
/// it is its own executor, and belong to running code in any case.
#[derive(Clone)]
pub struct WorkingMemory {
    start: NonNull<u8>,
    len: u64,
    /// Keeps the bytes alive.
    _owner: Owner,
}

#[derive(Clone)]
enum Owner {
    Mapping { _mapping: Arc<Mapping> },
    Heap { _bytes: Arc<HeapBytes> },
}

/// Bytes of the heap that are reached by pointer only.
struct HeapBytes(Box<[UnsafeCell<u8>]>);

// SAFETY: bytes have no owner thread. Races between copying accessors are the callers' to avoid, as with a mapping.
unsafe impl Send for HeapBytes {}
// SAFETY: as above.
unsafe impl Sync for HeapBytes {}

// SAFETY: the pointer is to memory that `_owner` keeps alive from any thread; `len` does not change.
unsafe impl Send for WorkingMemory {}
// SAFETY: as above; a write needs `&self` only, as the other process's writes do, and makes no reference.
unsafe impl Sync for WorkingMemory {}

/// Writes the first bytes of a slice as one value of an integer type; gives their number.
macro_rules! write_as {
    ($int:ty, $at:ident, $bytes:ident) => {{
        let mut value = [0; size_of::<$int>()];
        value.copy_from_slice(&$bytes[..size_of::<$int>()]);
        // SAFETY: as many bytes are inside memory that the owner keeps mapped and writable, and the address is a
        // multiple of their number.
        unsafe { $at.cast::<$int>().write_volatile(<$int>::from_ne_bytes(value)) };
        size_of::<$int>()
    }};
}

/// Reads one value of an integer type to the first bytes of a slice; gives their number.
macro_rules! read_as {
    ($int:ty, $at:ident, $bytes:ident) => {{
        // SAFETY: as many bytes are inside memory that the owner keeps mapped and readable, and the address is a
        // multiple of their number.
        let value = unsafe { $at.cast::<$int>().read_volatile() };
        $bytes[..size_of::<$int>()].copy_from_slice(&value.to_ne_bytes());
        size_of::<$int>()
    }};
}

impl WorkingMemory {
    /// Returns zero bytes of this process's heap, for mappers that send content in messages.
    ///
    /// # Errors
    ///
    /// Fails if there is not that much memory.
    pub fn in_heap(len: u64) -> Result<Self, Error> {
        let size = usize::try_from(len).map_err(|_| Error::OutOfAddressSpace { bytes: len })?;
        let mut bytes: Vec<u8> = Vec::new();
        bytes.try_reserve_exact(size).map_err(|error| Error::system("working memory cannot be had", error))?;
        bytes.resize(size, 0);
        let bytes: Box<[UnsafeCell<u8>]> = bytes.into_iter().map(UnsafeCell::new).collect();
        let bytes = Arc::new(HeapBytes(bytes));
        let start = NonNull::new(UnsafeCell::raw_get(bytes.0.as_ptr())).expect("a box is not null");
        Ok(Self { start, len, _owner: Owner::Heap { _bytes: bytes } })
    }

    /// Returns `len` bytes of `mapping` from `offset`.
    pub(crate) fn in_mapping(mapping: &Arc<Mapping>, offset: u64, len: u64) -> Result<Self, Error> {
        let size = mapping.range().len();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::OutOfBounds { offset, len, size });
        }
        // SAFETY: the offset is inside the mapping, or one past its end.
        let start = unsafe { mapping.start().add(offset as usize) };
        Ok(Self { start, len, _owner: Owner::Mapping { _mapping: Arc::clone(mapping) } })
    }

    /// Returns the length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns a pointer to `len` bytes at `offset` after checking that they are inside.
    fn inside(&self, offset: u64, len: u64) -> Result<NonNull<u8>, Error> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Error::OutOfBounds { offset, len, size: self.len });
        }
        // SAFETY: the offset is inside the memory, or one past its end.
        Ok(unsafe { self.start.add(offset as usize) })
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    ///
    /// Fails if they would not be inside.
    #[inline]
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let target = self.inside(offset, bytes.len() as u64)?;
        // SAFETY: the target is inside memory that the owner keeps mapped and writable, and `bytes`, a Rust slice, is
        // other memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies bytes from `offset` to `bytes`. What is read may be changing, and must not be trusted if the other
    /// process can write it.
    ///
    /// # Errors
    ///
    /// Fails if they are not inside.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let source = self.inside(offset, bytes.len() as u64)?;
        // SAFETY: the source is inside memory that the owner keeps mapped and readable, and `bytes` is other memory.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// As [`Self::write`], for memory that the executor is using: every byte is written once, and aligned values of up to
    /// 8 bytes are written whole.
    ///
    /// # Errors
    ///
    /// Fails if the bytes would not be inside.
    pub fn write_volatile(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let target = self.inside(offset, bytes.len() as u64)?.as_ptr();
        let mut done = 0;
        while done < bytes.len() {
            let at = target.wrapping_add(done);
            let rest = &bytes[done..];
            done += match chunk(at, rest.len()) {
                8 => write_as!(u64, at, rest),
                4 => write_as!(u32, at, rest),
                2 => write_as!(u16, at, rest),
                _ => write_as!(u8, at, rest),
            };
        }
        Ok(())
    }

    /// Writes an aligned word for readers that read it whole at the same time.
    ///
    /// # Errors
    ///
    /// Fails if the word would not be inside, or is not aligned.
    pub(crate) fn store_u32(&self, offset: u64, value: u32) -> Result<(), Error> {
        let target = self.inside(offset, 4)?.as_ptr().cast::<u32>();
        if !target.is_aligned() {
            return Err(Error::OutOfBounds { offset, len: 4, size: self.len });
        }
        // SAFETY: the word is inside memory that the owner keeps mapped and writable, aligned, and the other side reads it
        // by atomic loads.
        let word = unsafe { AtomicU32::from_ptr(target) };
        word.store(value, Ordering::Release);
        Ok(())
    }

    /// As [`Self::read`], for memory that the executor is using: every byte is read once, and aligned values of up to 8
    /// bytes are read whole.
    ///
    /// # Errors
    ///
    /// Fails if the bytes are not inside.
    pub fn read_volatile(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let source = self.inside(offset, bytes.len() as u64)?.as_ptr();
        let mut done = 0;
        while done < bytes.len() {
            let at = source.wrapping_add(done);
            let rest = &mut bytes[done..];
            done += match chunk(at, rest.len()) {
                8 => read_as!(u64, at, rest),
                4 => read_as!(u32, at, rest),
                2 => read_as!(u16, at, rest),
                _ => read_as!(u8, at, rest),
            };
        }
        Ok(())
    }

    /// Returns where the memory is in this process.
    #[cfg(test)]
    pub(crate) fn address(&self) -> farlink_addr::ExecutorAddr {
        farlink_addr::ExecutorAddr::new(self.start.as_ptr().expose_provenance() as u64)
    }

    /// Sets every byte to zero.
    pub(crate) fn zero(&self) {
        self.fill(0);
    }

    /// Sets every byte to `value`.
    pub(crate) fn fill(&self, value: u8) {
        // SAFETY: the bytes are inside memory that the owner keeps mapped and writable.
        unsafe { std::ptr::write_bytes(self.start.as_ptr(), value, self.len as usize) };
    }
}

/// Returns how many bytes can be accessed at once: the largest power of two, up to 8, that the address is a multiple of
/// and that is not above `len`.
fn chunk(at: *mut u8, len: usize) -> usize {
    let aligned = 1 << at.addr().trailing_zeros().min(3);
    let fitting = 1 << len.min(8).ilog2();
    usize::min(aligned, fitting)
}

impl fmt::Debug for WorkingMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WorkingMemory({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Accesses are checked at the end and against overflow; those inside read back what was written.
    #[test]
    fn accesses_are_checked() {
        let memory = WorkingMemory::in_heap(8).unwrap();
        memory.write(4, b"abcd").unwrap();
        let mut back = [0xff; 5];
        memory.read(3, &mut back).unwrap();
        assert_eq!(&back, b"\0abcd");
        for (offset, len) in [(5, 4), (8, 1), (u64::MAX, 1), (u64::MAX - 3, 4)] {
            assert!(memory.write(offset, &vec![1; len]).is_err(), "{offset}");
        }
        for (offset, len) in [(5, 4), (8, 1), (u64::MAX, 1)] {
            assert!(memory.write_volatile(offset, &vec![1; len]).is_err(), "{offset}");
            assert!(memory.read_volatile(offset, &mut vec![1; len]).is_err(), "{offset}");
        }
        memory.write(8, b"").unwrap();
        memory.zero();
        let mut all = [1; 8];
        memory.read(0, &mut all).unwrap();
        assert_eq!(all, [0; 8]);
    }

    /// Volatile copies are copies, at every offset and of every length.
    #[test]
    fn volatile_copies() {
        for offset in 0..16u64 {
            for len in 0..=32 {
                let memory = WorkingMemory::in_heap(64).unwrap();
                let bytes: Vec<u8> = (1..=len).collect();
                memory.write_volatile(offset, &bytes).unwrap();
                let (mut plain, mut back) = ([0; 64], vec![0; bytes.len()]);
                memory.read(0, &mut plain).unwrap();
                memory.read_volatile(offset, &mut back).unwrap();
                let mut expected = [0; 64];
                expected[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
                assert_eq!((plain, back), (expected, bytes));
            }
        }
    }

    /// Aligned values are accessed whole.
    #[test]
    fn chunks() {
        let at = |address: usize| std::ptr::without_provenance_mut(address);
        let chunks = [(64, 8), (64, 7), (68, 8), (68, 4), (66, 9), (65, 9), (64, 1), (64, 100)];
        assert_eq!(chunks.map(|(address, len)| chunk(at(address), len)), [8, 4, 4, 4, 2, 1, 1, 8]);
    }
}
