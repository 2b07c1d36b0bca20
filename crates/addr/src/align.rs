//! A power-of-two alignment, kept as its exponent so that no other value can be expressed.

use std::fmt;

/// An alignment in bytes: a power of two from 1 to 2^63.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Align(u8);

impl Align {
    /// Alignment to one byte: every address has it.
    pub const ONE: Self = Self(0);

    /// Returns the alignment to `bytes`, or `None` if that is not a power of two.
    #[must_use]
    pub const fn new(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() { Some(Self(bytes.trailing_zeros() as u8)) } else { None }
    }

    /// Returns the alignment in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// Returns the exponent: the base-two logarithm of the alignment.
    #[must_use]
    pub const fn log2(self) -> u8 {
        self.0
    }

    /// Rounds `value` up to a multiple of the alignment, or returns `None` on overflow.
    #[must_use]
    pub const fn align_up(self, value: u64) -> Option<u64> {
        let mask = self.bytes() - 1;
        match value.checked_add(mask) {
            Some(sum) => Some(sum & !mask),
            None => None,
        }
    }

    /// Rounds `value` down to a multiple of the alignment.
    #[must_use]
    pub const fn align_down(self, value: u64) -> u64 {
        value & !(self.bytes() - 1)
    }

    /// Returns whether `value` is a multiple of the alignment.
    #[must_use]
    pub const fn is_aligned(self, value: u64) -> bool {
        value & (self.bytes() - 1) == 0
    }
}

impl fmt::Display for Align {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bytes())
    }
}

impl fmt::Debug for Align {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Align({})", self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Only powers of two are alignments.
    #[test]
    fn rejects_what_is_not_a_power_of_two() {
        assert_eq!(Align::new(0), None);
        assert_eq!(Align::new(3), None);
        assert_eq!(Align::new(1), Some(Align::ONE));
        assert_eq!(Align::new(1 << 63).unwrap().log2(), 63);
    }

    proptest! {
        /// Rounding up gives the smallest multiple that is not below the value.
        #[test]
        fn align_up_is_the_next_multiple(value in 0u64..1 << 40, log2 in 0u32..20) {
            let align = Align::new(1 << log2).unwrap();
            let up = align.align_up(value).unwrap();
            prop_assert!(align.is_aligned(up) && up >= value && up - value < align.bytes());
            prop_assert!(align.align_down(value) <= value && align.is_aligned(align.align_down(value)));
        }
    }
}
