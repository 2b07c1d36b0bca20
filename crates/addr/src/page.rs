//! The page size of a process, as a checked type: page arithmetic with a size that is not a power of two is
//! nonsense, and the size may have been announced by the other process.

use crate::Align;
use std::fmt;

/// The size of a page in bytes: a power of two of at least 4096.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageSize(Align);

impl PageSize {
    /// 4096 bytes, the page size of x86-64.
    pub const SIZE_4K: Self = match Align::new(4096) {
        Some(align) => Self(align),
        None => unreachable!(),
    };

    /// Largest page size accepted, in bytes: 1 GiB, the largest that any Linux system uses.
    pub const MAX_BYTES: u64 = 1 << 30;

    /// Returns a page size of `bytes`, or `None` if that is not a power of two from 4096 to [`Self::MAX_BYTES`].
    #[must_use]
    pub const fn new(bytes: u64) -> Option<Self> {
        match Align::new(bytes) {
            Some(align) if bytes >= 4096 && bytes <= Self::MAX_BYTES => Some(Self(align)),
            _ => None,
        }
    }

    /// Returns the page size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0.bytes()
    }

    /// Returns the page size as an alignment.
    #[must_use]
    pub const fn align(self) -> Align {
        self.0
    }

    /// Rounds `bytes` up to whole pages, or returns `None` on overflow.
    #[must_use]
    pub const fn round_up(self, bytes: u64) -> Option<u64> {
        self.0.align_up(bytes)
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSize({})", self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a peer may announce is limited to sizes that exist.
    #[test]
    fn rejects_sizes_that_no_system_has() {
        for bad in [0, 1, 2048, 3000, 4097, 1 << 31, u64::MAX] {
            assert_eq!(PageSize::new(bad), None, "{bad}");
        }
        assert_eq!(PageSize::new(4096), Some(PageSize::SIZE_4K));
        assert_eq!(PageSize::SIZE_4K.round_up(1), Some(4096));
        assert_eq!(PageSize::SIZE_4K.round_up(0), Some(0));
        assert_eq!(PageSize::SIZE_4K.round_up(u64::MAX), None);
    }
}
