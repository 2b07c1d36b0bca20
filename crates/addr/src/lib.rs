//! Addresses, ranges, page sizes, alignments and protections of an executor's memory.
//!
//! An [`ExecutorAddr`] names a byte in the address space of the process that runs linked code. The controller
//! never turns one into a pointer, so this crate offers no way to do that; arithmetic is checked and spelled out
//! (`checked_add`, `offset_from`) because every one of these numbers may have come from the other process.

#![forbid(unsafe_code)]

mod align;
mod page;
mod prot;
mod range;

use std::fmt;

pub use align::Align;
pub use page::PageSize;
pub use prot::{AllocGroup, MemLifetime, MemProt};
pub use range::ExecutorAddrRange;

/// An address in the executor's address space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ExecutorAddr(u64);

impl ExecutorAddr {
    /// The null address, which no allocation has.
    pub const NULL: Self = Self(0);

    /// Wraps the number `addr`.
    #[must_use]
    pub const fn new(addr: u64) -> Self {
        Self(addr)
    }

    /// Returns the address as a number.
    #[must_use]
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// Returns whether this is the null address.
    #[must_use]
    pub const fn is_null(self) -> bool {
        self.0 == 0
    }

    /// Returns the address `bytes` after this one, or `None` past the end of the address space.
    #[must_use]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(addr) => Some(Self(addr)),
            None => None,
        }
    }

    /// Returns the address `bytes` before this one, or `None` below zero.
    #[must_use]
    pub const fn checked_sub(self, bytes: u64) -> Option<Self> {
        match self.0.checked_sub(bytes) {
            Some(addr) => Some(Self(addr)),
            None => None,
        }
    }

    /// Returns how many bytes this address lies after `base`, or `None` when it lies before.
    #[must_use]
    pub const fn offset_from(self, base: Self) -> Option<u64> {
        self.0.checked_sub(base.0)
    }

    /// Returns the first address at or after this one that `align` divides, or `None` past the end of the address
    /// space.
    #[must_use]
    pub const fn align_up(self, align: Align) -> Option<Self> {
        match align.align_up(self.0) {
            Some(addr) => Some(Self(addr)),
            None => None,
        }
    }

    /// Returns whether `align` divides this address.
    #[must_use]
    pub const fn is_aligned(self, align: Align) -> bool {
        align.is_aligned(self.0)
    }
}

impl fmt::Display for ExecutorAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for ExecutorAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Addition and subtraction stop at both ends of the address space.
    #[test]
    fn arithmetic_is_checked_at_both_ends() {
        let top = ExecutorAddr::new(u64::MAX);
        assert_eq!(top.checked_add(0), Some(top));
        assert_eq!(top.checked_add(1), None);
        assert_eq!(ExecutorAddr::NULL.checked_sub(1), None);
        assert_eq!(top.checked_sub(u64::MAX), Some(ExecutorAddr::NULL));
        assert_eq!(ExecutorAddr::new(5).offset_from(ExecutorAddr::new(7)), None);
        assert_eq!(ExecutorAddr::new(7).offset_from(ExecutorAddr::new(5)), Some(2));
        assert_eq!(top.align_up(Align::new(16).unwrap()), None);
    }

    /// Addresses print as hex, for people and for debugging alike.
    #[test]
    fn prints_as_hex() {
        assert_eq!(format!("{0} {0:?}", ExecutorAddr::new(0x7f00)), "0x7f00 0x7f00");
    }
}
