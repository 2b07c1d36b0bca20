//! Free ranges of one area: good fit, neighbours merged, every operation of constant cost.
//!
//! Ranges are kept in lists by length: one list for each of the shortest lengths, then 16 for each power of two, as in
//! two-level segregated fit (TLSF). What touches a range that is given back is found by its ends.

use farlink_addr::{Align, ExecutorAddr, ExecutorAddrRange};
use rustc_hash::FxHashMap;

/// Lists for each power of two, and for lengths below that many units.
const LISTS_PER_POWER: u64 = 16;

/// Lists for all lengths up to 2^64.
const LISTS: usize = (64 - LISTS_PER_POWER.ilog2() as usize + 1) * LISTS_PER_POWER as usize;

/// Lengths are told apart in units of this many bytes at the low end.
const UNIT: u64 = 16;

/// How many ranges of a list are tried for one whose length and alignment suit, while longer ones are left.
const CANDIDATES: usize = 8;

/// No range.
const NONE: u32 = u32::MAX;

/// The free ranges of an area. No two of them touch.
#[derive(Debug)]
pub(crate) struct FreeList {
    ranges: Vec<Free>,
    /// Unused elements of `ranges`.
    unused: Vec<u32>,
    by_start: FxHashMap<ExecutorAddr, u32>,
    by_end: FxHashMap<ExecutorAddr, u32>,
    /// The range that was changed last. It is in neither map, since it is the one that changes next as a rule.
    loose: u32,
    /// The first range of each list.
    lists: Box<[u32; LISTS]>,
    /// A bit for each list that is not empty.
    occupied: [u64; LISTS.div_ceil(64)],
    /// The sum of the lengths.
    total: u64,
}

/// A free range, and its neighbours in its list.
#[derive(Clone, Copy, Debug)]
struct Free {
    start: ExecutorAddr,
    len: u64,
    before: u32,
    after: u32,
}

/// Returns the list of ranges of `len` bytes.
fn list_of(len: u64) -> usize {
    let units = len / UNIT;
    if units < LISTS_PER_POWER {
        return units as usize;
    }
    // The bits after the highest one say which of the lists of that power of two it is.
    let power = units.ilog2();
    let bits = LISTS_PER_POWER.ilog2();
    let within = (units >> (power - bits)) - LISTS_PER_POWER;
    ((u64::from(power - bits) + 1) * LISTS_PER_POWER + within) as usize
}

impl FreeList {
    pub(crate) fn new(range: ExecutorAddrRange) -> Self {
        let mut list = Self {
            ranges: Vec::new(),
            unused: Vec::new(),
            by_start: FxHashMap::default(),
            by_end: FxHashMap::default(),
            loose: NONE,
            lists: Box::new([NONE; LISTS]),
            occupied: [0; LISTS.div_ceil(64)],
            total: 0,
        };
        if !range.is_empty() {
            list.insert(range.start(), range.len());
        }
        list
    }

    fn free(&self, index: u32) -> Free {
        self.ranges[index as usize]
    }

    /// Adds a range that touches no other.
    fn insert(&mut self, start: ExecutorAddr, len: u64) {
        let free = Free { start, len, before: NONE, after: NONE };
        let index = match self.unused.pop() {
            Some(index) => {
                self.ranges[index as usize] = free;
                index
            }
            None => {
                self.ranges.push(free);
                u32::try_from(self.ranges.len() - 1).expect("fewer ranges than fit in memory")
            }
        };
        self.keep_loose(index);
        self.total += len;
        self.link(index);
    }

    /// Has a range that is in no map be the one that stays out of them.
    fn keep_loose(&mut self, index: u32) {
        let before = std::mem::replace(&mut self.loose, index);
        if before != NONE {
            let free = self.free(before);
            self.by_start.insert(free.start, before);
            self.by_end.insert(end(free), before);
        }
    }

    /// Takes a range out of the maps.
    fn loosen(&mut self, index: u32) {
        if self.loose == index {
            self.loose = NONE;
        } else {
            let free = self.free(index);
            self.by_start.remove(&free.start);
            self.by_end.remove(&end(free));
        }
    }

    /// Returns the range that begins at `start`.
    fn beginning_at(&self, start: ExecutorAddr) -> Option<u32> {
        let is_loose = self.loose != NONE && self.free(self.loose).start == start;
        if is_loose { Some(self.loose) } else { self.by_start.get(&start).copied() }
    }

    /// Returns the range that ends before `at`.
    fn ending_at(&self, at: ExecutorAddr) -> Option<u32> {
        let is_loose = self.loose != NONE && end(self.free(self.loose)) == at;
        if is_loose { Some(self.loose) } else { self.by_end.get(&at).copied() }
    }

    /// Removes a range.
    fn remove(&mut self, index: u32) -> Free {
        self.unlink(index);
        self.loosen(index);
        let free = self.free(index);
        self.total -= free.len;
        self.unused.push(index);
        free
    }

    /// Changes where a range begins and how long it is.
    fn change(&mut self, index: u32, start: ExecutorAddr, len: u64) {
        let old = self.free(index);
        if self.loose != index {
            self.loosen(index);
            self.keep_loose(index);
        }
        let moves = list_of(old.len) != list_of(len);
        if moves {
            self.unlink(index);
        }
        let free = &mut self.ranges[index as usize];
        (free.start, free.len) = (start, len);
        self.total = self.total - old.len + len;
        if moves {
            self.link(index);
        }
    }

    /// Enters a range in the list of its length.
    fn link(&mut self, index: u32) {
        let list = list_of(self.free(index).len);
        let after = std::mem::replace(&mut self.lists[list], index);
        let free = &mut self.ranges[index as usize];
        (free.before, free.after) = (NONE, after);
        if after != NONE {
            self.ranges[after as usize].before = index;
        }
        self.occupied[list / 64] |= 1 << (list % 64);
    }

    /// Takes a range out of its list.
    fn unlink(&mut self, index: u32) {
        let Free { len, before, after, .. } = self.free(index);
        if after != NONE {
            self.ranges[after as usize].before = before;
        }
        if before != NONE {
            self.ranges[before as usize].after = after;
            return;
        }
        let list = list_of(len);
        self.lists[list] = after;
        if after == NONE {
            self.occupied[list / 64] &= !(1 << (list % 64));
        }
    }

    /// Returns the first list from `from` on that is not empty.
    fn next_list(&self, from: usize) -> Option<usize> {
        let words = self.occupied.iter().enumerate().skip(from / 64);
        let above = |(word, &bits): (usize, &u64)| {
            let bits = if word == from / 64 { bits & (u64::MAX << (from % 64)) } else { bits };
            (bits != 0).then(|| word * 64 + bits.trailing_zeros() as usize)
        };
        { words }.find_map(above)
    }

    /// Returns the ranges of a list.
    fn in_list(&self, list: usize) -> impl Iterator<Item = u32> {
        let first = Some(self.lists[list]).filter(|&index| index != NONE);
        std::iter::successors(first, |&index| Some(self.free(index).after).filter(|&index| index != NONE))
    }

    /// Takes `len` bytes at a multiple of `align` from a free range that is not much longer than need be.
    ///
    /// Finds them if there is a range of `len + align - 1` bytes and a sixteenth.
    pub(crate) fn take(&mut self, len: u64, align: Align) -> Option<ExecutorAddrRange> {
        let (index, taken) = self.find(len, align)?;
        let free = self.free(index);
        let (before, after) = (taken.start().offset_from(free.start)?, end(free).offset_from(taken.end())?);
        match (before, after) {
            (0, 0) => {
                self.remove(index);
            }
            (0, _) => self.change(index, taken.end(), after),
            (_, 0) => self.change(index, free.start, before),
            _ => {
                self.change(index, free.start, before);
                self.insert(taken.end(), after);
            }
        }
        Some(taken)
    }

    fn find(&self, len: u64, align: Align) -> Option<(u32, ExecutorAddrRange)> {
        let fits = |index: u32| {
            let free = self.free(index);
            let aligned = ExecutorAddrRange::from_len(free.start.align_up(align)?, len)?;
            (aligned.end() <= end(free)).then_some((index, aligned))
        };
        // Those of the same length, or almost, and then the next longer ones.
        let own = list_of(len);
        if let Some(found) = self.in_list(own).take(CANDIDATES).find_map(fits) {
            return Some(found);
        }
        let next = self.next_list(own + 1)?;
        if let Some(found) = self.in_list(next).take(CANDIDATES).find_map(fits) {
            return Some(found);
        }
        // All in a list above that of a length are longer.
        let enough = len.checked_add(align.bytes() - 1)?;
        self.in_list(self.next_list(list_of(enough) + 1)?).find_map(fits)
    }

    /// Gives back a range that was taken.
    pub(crate) fn give(&mut self, range: ExecutorAddrRange) {
        let (before, after) = (self.ending_at(range.start()), self.beginning_at(range.end()));
        match (before, after) {
            (None, None) => {
                if !range.is_empty() {
                    self.insert(range.start(), range.len());
                }
            }
            (Some(before), None) => {
                let free = self.free(before);
                self.change(before, free.start, free.len + range.len());
            }
            (None, Some(after)) => {
                let free = self.free(after);
                self.change(after, range.start(), free.len + range.len());
            }
            (Some(before), Some(after)) => {
                let last = self.remove(after);
                let free = self.free(before);
                self.change(before, free.start, free.len + range.len() + last.len);
            }
        }
    }

    /// Returns the length of the longest free range in bytes.
    pub(crate) fn largest(&self) -> u64 {
        let word = self.occupied.iter().rposition(|&bits| bits != 0);
        let list = word.map(|word| word * 64 + self.occupied[word].ilog2() as usize);
        list.into_iter().flat_map(|list| self.in_list(list)).map(|index| self.free(index).len).max().unwrap_or(0)
    }

    /// Returns the free ranges, by address.
    pub(crate) fn ranges(&self) -> Vec<ExecutorAddrRange> {
        let mut ranges = self.of_length(0);
        ranges.sort_unstable();
        ranges
    }

    /// Returns all free bytes.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Returns the free ranges of at least `len` bytes.
    pub(crate) fn of_length(&self, len: u64) -> Vec<ExecutorAddrRange> {
        let ranges = self.at_least(len);
        ranges.filter_map(|free| ExecutorAddrRange::from_len(free.start, free.len)).collect()
    }

    fn at_least(&self, len: u64) -> impl Iterator<Item = Free> {
        let lists = std::iter::successors(self.next_list(list_of(len)), |&list| self.next_list(list + 1));
        let ranges = lists.flat_map(|list| self.in_list(list)).map(|index| self.free(index));
        ranges.filter(move |free| free.len >= len)
    }

    /// Takes what is free of `wanted`, as far as that is in the free range that ends at `end`, if there is one.
    pub(crate) fn take_of(&mut self, end: ExecutorAddr, wanted: ExecutorAddrRange) -> Option<ExecutorAddrRange> {
        let index = self.ending_at(end)?;
        let start = self.free(index).start.max(wanted.start());
        let taken = ExecutorAddrRange::new(start, wanted.end().min(end)).filter(|taken| !taken.is_empty())?;
        let free = self.remove(index);
        for rest in [ExecutorAddrRange::new(free.start, start), ExecutorAddrRange::new(taken.end(), end)] {
            rest.into_iter().filter(|rest| !rest.is_empty()).for_each(|rest| self.insert(rest.start(), rest.len()));
        }
        Some(taken)
    }
}

fn end(free: Free) -> ExecutorAddr {
    free.start.checked_add(free.len).expect("a range ends within the address space")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BASE: u64 = 0x10000;
    const SIZE: u64 = 4096;

    proptest! {
        /// Against a map of bytes: what is taken was free and is aligned, a request fails only if no place has it with
        /// room to spare, what is free is known, and giving everything back leaves one range.
        #[test]
        fn behaves_as_a_map_of_bytes(requests in prop::collection::vec((1u64..200, 0u32..8, any::<prop::sample::Index>()), 1..200)) {
            let whole = ExecutorAddrRange::from_len(ExecutorAddr::new(BASE), SIZE).unwrap();
            let mut list = FreeList::new(whole);
            let mut used = vec![false; SIZE as usize];
            let mut taken: Vec<ExecutorAddrRange> = Vec::new();
            let offset = |addr: ExecutorAddr| (addr.as_u64() - BASE) as usize;
            for (len, log2, index) in requests {
                let align = Align::new(1 << log2).unwrap();
                // Ranges of the same list may be shorter, and are not all tried.
                let enough = (len + align.bytes() - 1) + (len + align.bytes()) / 16 + UNIT;
                let fits = (0..(SIZE + 1).saturating_sub(enough)).any(|at| !used[at as usize..(at + enough) as usize].contains(&true));
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
                let long = used.split(|&used| used).filter(|free| free.len() >= 100).count();
                prop_assert_eq!(list.of_length(100).len(), long);
            }
            let free: Vec<_> = (0..SIZE).filter(|&at| !used[at as usize]).map(|at| at + BASE).collect();
            let told = list.ranges().into_iter().flat_map(|range| range.start().as_u64()..range.end().as_u64());
            prop_assert_eq!(told.collect::<Vec<_>>(), free);
            // Of each, a part that is taken is taken out, and given back it is as it was.
            let before = list.ranges();
            for range in list.of_length(1) {
                let wanted = ExecutorAddrRange::new(ExecutorAddr::new(BASE + 100), ExecutorAddr::new(BASE + SIZE / 2)).unwrap();
                let start = range.start().max(wanted.start());
                let expected = ExecutorAddrRange::new(start, range.end().min(wanted.end())).filter(|part| !part.is_empty());
                let part = list.take_of(range.end(), wanted);
                prop_assert_eq!(part, expected);
                let total: u64 = before.iter().map(|range| range.len()).sum();
                prop_assert_eq!(list.total(), total - part.map_or(0, |part| part.len()));
                if let Some(part) = part {
                    prop_assert!(list.ranges().iter().all(|range| !range.overlaps(part)));
                    list.give(part);
                }
                prop_assert_eq!(list.ranges(), before.clone());
            }
            for range in taken {
                list.give(range);
            }
            prop_assert_eq!((list.largest(), list.ranges().len()), (SIZE, 1));
        }
    }

    /// Lists are in the order of lengths, and one is as wide as a sixteenth of its lengths.
    #[test]
    fn lists() {
        let mut last = 0;
        for len in (0..100_000).chain((17..64).flat_map(|power| [(1 << power) - 1, 1 << power, (1 << power) + 1])) {
            let list = list_of(len);
            assert!(list == last || list == last + 1 || len > 100_000 && list > last, "{len}");
            last = list;
        }
        assert!(list_of(u64::MAX) < LISTS);
        assert_eq!([0, 15, 16, 255, 256, 271, 272].map(list_of), [0, 0, 1, 15, 16, 16, 17]);
        assert_eq!(list_of(1 << 20), list_of((1 << 20) + (1 << 16) - 1));
        assert_eq!(list_of(1 << 20) + 1, list_of((1 << 20) + (1 << 16)));
    }

    /// Random allocations and frees of mixed sizes, at two thirds full: what is lost to fragmentation.
    #[test]
    fn fragmentation() {
        let whole = ExecutorAddrRange::from_len(ExecutorAddr::new(BASE), 64 << 20).unwrap();
        let mut list = FreeList::new(whole);
        let (mut taken, mut live) = (Vec::new(), 0);
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move |bound: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % bound
        };
        for _ in 0..400_000 {
            if live < (64 << 20) * 2 / 3 {
                let len = [16, 64, 256, 1024, 16_384][random(5) as usize] + random(8) * 16;
                taken.push(list.take(len, Align::new(16).unwrap()).expect("a third is free"));
                live += len;
            } else {
                let range: ExecutorAddrRange = taken.swap_remove(random(taken.len() as u64) as usize);
                live -= range.len();
                list.give(range);
            }
        }
        // The longest free range is a good part of what is free.
        assert!(list.largest() * 2 > list.total(), "{} of {}", list.largest(), list.total());
    }
}
