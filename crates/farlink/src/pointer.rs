//! Pointers of the executor's: addresses with the type of what is there.

use farlink_addr::ExecutorAddr;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;

/// A pointer to a `T` in the executor's memory: what C functions there take and give for `T *`.
///
/// It cannot be followed here. What it points to is read and written with
/// [`Session::read_memory`](crate::Session::read_memory) and
/// [`Session::write_memory`](crate::Session::write_memory), or shared as a [`SharedBuffer`](crate::SharedBuffer).
pub struct ExecutorPtr<T> {
    addr: ExecutorAddr,
    target: PhantomData<fn() -> T>,
}

impl<T> ExecutorPtr<T> {
    /// Returns the pointer to `addr`.
    #[must_use]
    pub const fn new(addr: ExecutorAddr) -> Self {
        Self { addr, target: PhantomData }
    }

    /// Returns the null pointer.
    #[must_use]
    pub const fn null() -> Self {
        Self::new(ExecutorAddr::NULL)
    }

    /// Returns the pointer that `pointer` is to linked code in this process. It means nothing to an executor in another.
    #[must_use]
    pub fn in_process(pointer: *const T) -> Self {
        Self::new(ExecutorAddr::new(pointer.expose_provenance() as u64))
    }

    /// Returns its address.
    #[must_use]
    pub const fn addr(self) -> ExecutorAddr {
        self.addr
    }

    /// Returns whether this is the null pointer.
    #[must_use]
    pub const fn is_null(self) -> bool {
        self.addr.is_null()
    }

    /// Returns the pointer `count` elements after this one, or nothing past the end of the address space.
    #[must_use]
    pub const fn checked_add(self, count: u64) -> Option<Self> {
        let Some(bytes) = count.checked_mul(size_of::<T>() as u64) else { return None };
        match self.addr.checked_add(bytes) {
            Some(addr) => Some(Self::new(addr)),
            None => None,
        }
    }

    /// Returns the same address as a pointer to something else.
    #[must_use]
    pub const fn cast<U>(self) -> ExecutorPtr<U> {
        ExecutorPtr::new(self.addr)
    }
}

// Not derived: what is pointed to need not have these.
impl<T> Clone for ExecutorPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for ExecutorPtr<T> {}

impl<T> PartialEq for ExecutorPtr<T> {
    fn eq(&self, other: &Self) -> bool {
        self.addr == other.addr
    }
}

impl<T> Eq for ExecutorPtr<T> {}

impl<T> Hash for ExecutorPtr<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.addr.hash(state);
    }
}

impl<T> fmt::Debug for ExecutorPtr<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.addr, f)
    }
}

impl<T> fmt::Display for ExecutorPtr<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.addr, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pointers count in elements and stop at the end of the address space.
    #[test]
    fn arithmetic_is_checked() {
        let pointer = ExecutorPtr::<u32>::new(ExecutorAddr::new(0x1000));
        assert_eq!(pointer.checked_add(3).map(ExecutorPtr::addr), Some(ExecutorAddr::new(0x100c)));
        assert_eq!(pointer.checked_add(u64::MAX / 4), None);
        assert_eq!(pointer.checked_add(u64::MAX), None);
        assert_eq!(pointer.cast::<u8>().checked_add(3).unwrap().to_string(), "0x1003");
        assert!(ExecutorPtr::<u8>::null().is_null());
    }
}
