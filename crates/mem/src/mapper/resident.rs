//! Which pages of a reservation have physical memory, as far as it was asked for: asking again is a system call for nothing.

use farlink_addr::PageSize;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Words of a piece, which are made when they are needed: bits for 4,096 pages.
const PIECE_WORDS: u64 = 64;

type Piece = [AtomicU64; PIECE_WORDS as usize];

/// A bit for each page. Whoever changes one has allocated bytes of its page, or all of it.
pub(super) struct Resident {
    page_size: PageSize,
    pieces: Box<[OnceLock<Box<Piece>>]>,
}

impl Resident {
    /// Returns what is known of a reservation of that many bytes that nobody has used.
    pub(super) fn new(bytes: u64, page_size: PageSize) -> Self {
        let pages = bytes / page_size.bytes() + 1;
        let pieces = pages.div_ceil(PIECE_WORDS * u64::from(u64::BITS));
        Self { page_size, pieces: (0..pieces).map(|_| OnceLock::new()).collect() }
    }

    /// Calls `each` with the words that have the pages touched by a range that is not empty, and the bits of those pages.
    fn words(&self, offset: u64, len: u64) -> impl Iterator<Item = (&OnceLock<Box<Piece>>, usize, u64)> {
        let page = self.page_size.bytes();
        let (first, last) = (offset / page, (offset + len - 1) / page);
        let bits = u64::from(u64::BITS);
        (first / bits..=last / bits).filter_map(move |word| {
            let (from, to) = (first.max(word * bits) % bits, last.min(word * bits + bits - 1) % bits);
            let mask = (u64::MAX >> (bits - 1 - (to - from))) << from;
            let piece = self.pieces.get((word / PIECE_WORDS) as usize)?;
            Some((piece, (word % PIECE_WORDS) as usize, mask))
        })
    }

    /// Returns whether all pages that a range touches are known to have memory.
    pub(super) fn has(&self, offset: u64, len: u64) -> bool {
        self.words(offset, len).all(|(piece, word, mask)| {
            piece.get().is_some_and(|piece| piece[word].load(Ordering::Acquire) & mask == mask)
        })
    }

    /// Notes that all pages that a range touches have memory.
    pub(super) fn add(&self, offset: u64, len: u64) {
        for (piece, word, mask) in self.words(offset, len) {
            let piece = piece.get_or_init(|| Box::new([const { AtomicU64::new(0) }; PIECE_WORDS as usize]));
            piece[word].fetch_or(mask, Ordering::Release);
        }
    }

    /// Notes that whole pages, which nobody uses, have none.
    pub(super) fn remove(&self, offset: u64, len: u64) {
        for (piece, word, mask) in self.words(offset, len) {
            if let Some(piece) = piece.get() {
                piece[word].fetch_and(!mask, Ordering::Release);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    const PAGE: u64 = 4096;
    const PAGES: u64 = 10_000;

    proptest! {
        /// As a set of pages: a range has memory if all pages that it touches have.
        #[test]
        fn behaves_as_a_set_of_pages(ops in prop::collection::vec((0..3, 0..PAGES * PAGE - 1, 1..300 * PAGE), 1..100)) {
            let resident = Resident::new(PAGES * PAGE, PageSize::new(PAGE).unwrap());
            let mut pages = HashSet::new();
            for (op, offset, len) in ops {
                let len = len.min(PAGES * PAGE - offset);
                let touched = offset / PAGE..=(offset + len - 1) / PAGE;
                match op {
                    0 => {
                        resident.add(offset, len);
                        pages.extend(touched.clone());
                    }
                    1 => {
                        resident.remove(offset, len);
                        pages.retain(|page| !touched.contains(page));
                    }
                    _ => {}
                }
                prop_assert_eq!(resident.has(offset, len), touched.clone().all(|page| pages.contains(&page)));
                let (first, last) = (*touched.start(), *touched.end());
                for page in [first.saturating_sub(1), first, last, (last + 1).min(PAGES - 1)] {
                    prop_assert_eq!(resident.has(page * PAGE, 1), pages.contains(&page));
                }
            }
        }
    }
}
