//! Free ranges of one area: best fit, neighbours merged, every operation logarithmic.

use farlink_addr::{Align, ExecutorAddr, ExecutorAddrRange};
use std::collections::{BTreeMap, BTreeSet};

/// The free ranges of a reservation. No two of them touch.
#[derive(Debug, Default)]
pub(crate) struct FreeList {
    /// Ends by start.
    by_start: BTreeMap<ExecutorAddr, ExecutorAddr>,
    /// (length, start).
    by_length: BTreeSet<(u64, ExecutorAddr)>,
    /// The sum of the lengths.
    total: u64,
}

/// How many of the smallest ranges that are long enough are tried for one whose alignment happens to suit.
const CANDIDATES: usize = 8;

impl FreeList {
    pub(crate) fn new(range: ExecutorAddrRange) -> Self {
        let mut list = Self::default();
        list.insert(range);
        list
    }

    fn insert(&mut self, range: ExecutorAddrRange) {
        if !range.is_empty() {
            self.by_start.insert(range.start(), range.end());
            self.by_length.insert((range.len(), range.start()));
            self.total += range.len();
        }
    }

    fn remove(&mut self, start: ExecutorAddr) -> Option<ExecutorAddrRange> {
        let end = self.by_start.remove(&start)?;
        let range = ExecutorAddrRange::new(start, end)?;
        self.by_length.remove(&(range.len(), start));
        self.total -= range.len();
        Some(range)
    }

    /// Takes `len` bytes at a multiple of `align` from one of the smallest free ranges that have them.
    ///
    /// Finds them if a range has `len + align - 1` bytes, or one of the smallest that have `len` happens to suit.
    pub(crate) fn take(&mut self, len: u64, align: Align) -> Option<ExecutorAddrRange> {
        let fits = |&(free, start): &(u64, ExecutorAddr)| {
            let aligned = ExecutorAddrRange::from_len(start.align_up(align)?, len)?;
            (aligned.end() <= start.checked_add(free)?).then_some((start, aligned))
        };
        let at_least = |len: u64| self.by_length.range((len, ExecutorAddr::NULL)..);
        let fitting = at_least(len).take(CANDIDATES).find_map(fits);
        let fitting = fitting.or_else(|| at_least(len.saturating_add(align.bytes() - 1)).find_map(fits));
        let (start, taken) = fitting?;
        let free = self.remove(start)?;
        for left in [(free.start(), taken.start()), (taken.end(), free.end())] {
            self.insert(ExecutorAddrRange::new(left.0, left.1)?);
        }
        Some(taken)
    }

    /// Gives back a range that was taken.
    pub(crate) fn give(&mut self, range: ExecutorAddrRange) {
        let before = self.by_start.range(..range.start()).next_back();
        let before = before.filter(|(_, end)| **end == range.start()).map(|(&start, _)| start);
        let start = before.and_then(|start| self.remove(start)).map_or(range.start(), ExecutorAddrRange::start);
        let end = self.remove(range.end()).map_or(range.end(), ExecutorAddrRange::end);
        self.insert(ExecutorAddrRange::new(start, end).expect("merged neighbours are in order"));
    }

    /// Returns the length of the longest free range in bytes.
    pub(crate) fn largest(&self) -> u64 {
        self.by_length.last().map_or(0, |&(len, _)| len)
    }

    /// Returns all free bytes.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Takes the first free range of at least `len` bytes at or after `from`, whole.
    pub(crate) fn take_after(&mut self, from: ExecutorAddr, len: u64) -> Option<ExecutorAddrRange> {
        let long =
            |(start, end): (&ExecutorAddr, &ExecutorAddr)| end.offset_from(*start).is_some_and(|free| free >= len);
        let start = self.by_start.range(from..).find(|&entry| long(entry)).map(|(&start, _)| start)?;
        self.remove(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BASE: u64 = 0x10000;
    const SIZE: u64 = 4096;

    proptest! {
        /// Against a map of bytes: what is taken was free and is aligned, a request fails only if no place has it with
        /// room to align, and giving everything back leaves one range.
        #[test]
        fn behaves_as_a_map_of_bytes(requests in prop::collection::vec((1u64..200, 0u32..8, any::<prop::sample::Index>()), 1..200)) {
            let whole = ExecutorAddrRange::from_len(ExecutorAddr::new(BASE), SIZE).unwrap();
            let mut list = FreeList::new(whole);
            let mut used = vec![false; SIZE as usize];
            let mut taken: Vec<ExecutorAddrRange> = Vec::new();
            let offset = |addr: ExecutorAddr| (addr.as_u64() - BASE) as usize;
            for (len, log2, index) in requests {
                let align = Align::new(1 << log2).unwrap();
                let enough = len + align.bytes() - 1;
                let fits = (0..SIZE - enough + 1).any(|at| !used[at as usize..(at + enough) as usize].contains(&true));
                match list.take(len, align) {
                    Some(range) => {
                        let bytes = &mut used[offset(range.start())..offset(range.end())];
                        prop_assert!(range.len() == len && range.start().is_aligned(align) && !bytes.contains(&true));
                        bytes.fill(true);
                        taken.push(range);
                    }
                    None => {
                        prop_assert!(!fits);
                        if !taken.is_empty() {
                            let range = taken.swap_remove(index.index(taken.len()));
                            used[offset(range.start())..offset(range.end())].fill(false);
                            list.give(range);
                        }
                    }
                }
                prop_assert_eq!(list.total(), used.iter().filter(|&&used| !used).count() as u64);
                let longest = used.split(|&used| used).map(<[bool]>::len).max().unwrap_or(0);
                prop_assert_eq!(list.largest(), longest as u64);
            }
            for range in taken {
                list.give(range);
            }
            prop_assert_eq!((list.largest(), list.by_start.len()), (SIZE, 1));
        }
    }
}
