//! A half-open range of executor addresses whose end is never before its start.

use crate::ExecutorAddr;
use std::fmt;

/// The addresses from `start` up to, and without, `end`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ExecutorAddrRange {
    start: ExecutorAddr,
    end: ExecutorAddr,
}

impl ExecutorAddrRange {
    /// Returns the range from `start` to `end`, or `None` if it would end before it starts.
    #[must_use]
    pub fn new(start: ExecutorAddr, end: ExecutorAddr) -> Option<Self> {
        (start <= end).then_some(Self { start, end })
    }

    /// Returns the range of `len` bytes at `start`, or `None` if it would pass the end of the address space.
    #[must_use]
    pub fn from_len(start: ExecutorAddr, len: u64) -> Option<Self> {
        Some(Self { start, end: start.checked_add(len)? })
    }

    /// Returns the range without bytes at `addr`.
    #[must_use]
    pub const fn at(addr: ExecutorAddr) -> Self {
        Self { start: addr, end: addr }
    }

    /// Returns the first address.
    #[must_use]
    pub const fn start(self) -> ExecutorAddr {
        self.start
    }

    /// Returns the first address after the range.
    #[must_use]
    pub const fn end(self) -> ExecutorAddr {
        self.end
    }

    /// Returns the length in bytes.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end.as_u64() - self.start.as_u64()
    }

    /// Returns whether the range has no bytes.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Returns whether `addr` lies in the range.
    #[must_use]
    pub fn contains(self, addr: ExecutorAddr) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Returns whether every byte of `other` lies in this range. An empty range must start and end within it.
    #[must_use]
    pub fn contains_range(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Returns whether the ranges have a byte in common.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end && !self.is_empty() && !other.is_empty()
    }
}

impl fmt::Display for ExecutorAddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl fmt::Debug for ExecutorAddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, end: u64) -> ExecutorAddrRange {
        ExecutorAddrRange::new(ExecutorAddr::new(start), ExecutorAddr::new(end)).unwrap()
    }

    /// A range that ends before it starts, or past the address space, cannot be made.
    #[test]
    fn constructors_check() {
        assert_eq!(ExecutorAddrRange::new(ExecutorAddr::new(2), ExecutorAddr::new(1)), None);
        assert_eq!(ExecutorAddrRange::from_len(ExecutorAddr::new(2), u64::MAX), None);
        assert!(range(2, 2).is_empty());
    }

    /// Touching ranges do not overlap, and an empty range overlaps nothing.
    #[test]
    fn touching_is_not_overlapping() {
        assert!(!range(0, 4).overlaps(range(4, 8)));
        assert!(range(0, 5).overlaps(range(4, 8)));
        assert!(!range(2, 2).overlaps(range(0, 4)));
        assert!(range(0, 4).contains_range(range(4, 4)));
        assert!(!range(0, 4).contains_range(range(3, 5)));
    }

    proptest! {
        /// Two ranges overlap exactly if some byte lies in both.
        #[test]
        fn overlap_means_a_common_byte(a in 0u64..32, b in 0u64..32, c in 0u64..32, d in 0u64..32) {
            let (x, y) = (range(a.min(b), a.max(b)), range(c.min(d), c.max(d)));
            let common = (0..32).map(ExecutorAddr::new).any(|addr| x.contains(addr) && y.contains(addr));
            prop_assert_eq!(x.overlaps(y), common);
            prop_assert_eq!(y.overlaps(x), common);
        }
    }
}
