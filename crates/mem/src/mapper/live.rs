//! Which allocations are live in a reservation, by where they begin.
//!
//! Nearly all begin at multiples of 8 bytes, as the manager places them, so a bit for each of those says it, in pieces that
//! are made when they are needed.

use rustc_hash::FxHashSet;

/// Bytes that a bit stands for.
const GRANULE: u64 = 8;

/// Words of a piece: 4 KiB of bits, for 256 KiB of the reservation.
const PIECE_WORDS: usize = 512;

/// Places of allocations, as offsets in their reservation.
#[derive(Default)]
pub(super) struct Live {
    pieces: Vec<Option<Box<[u64; PIECE_WORDS]>>>,
    /// Those that begin elsewhere.
    others: FxHashSet<u64>,
    /// Those that the executor has been told of.
    told: FxHashSet<u64>,
}

impl Live {
    /// Returns the word with an offset's bit, and the bit.
    fn bit(&mut self, offset: u64) -> (&mut u64, u64) {
        let bit = (offset / GRANULE) as usize;
        let word = bit / u64::BITS as usize;
        let piece = word / PIECE_WORDS;
        if self.pieces.len() <= piece {
            self.pieces.resize_with(piece + 1, || None);
        }
        let piece = self.pieces[piece].get_or_insert_with(|| Box::new([0; PIECE_WORDS]));
        (&mut piece[word % PIECE_WORDS], 1 << (bit % u64::BITS as usize))
    }

    /// Notes an allocation; gives whether none was there.
    pub(super) fn insert(&mut self, offset: u64, is_told: bool) -> bool {
        let is_new = if offset.is_multiple_of(GRANULE) {
            let (word, bit) = self.bit(offset);
            let is_new = *word & bit == 0;
            *word |= bit;
            is_new
        } else {
            self.others.insert(offset)
        };
        if is_new && is_told {
            self.told.insert(offset);
        }
        is_new
    }

    /// Forgets an allocation; gives whether the executor has been told of it, if it was there.
    pub(super) fn remove(&mut self, offset: u64) -> Option<bool> {
        let was_there = if offset.is_multiple_of(GRANULE) {
            let (word, bit) = self.bit(offset);
            let was_there = *word & bit != 0;
            *word &= !bit;
            was_there
        } else {
            self.others.remove(&offset)
        };
        was_there.then(|| !self.told.is_empty() && self.told.remove(&offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each place is kept apart from its neighbours, wherever it is.
    #[test]
    fn places_are_apart() {
        let mut live = Live::default();
        let places = [0, 16, 32, 33, 34, 16 * 63, 16 * 64, (512 << 10) - 16, 512 << 10, (1 << 30) - 16, (1 << 30) - 1];
        for (index, &place) in places.iter().enumerate() {
            assert!(live.insert(place, index % 2 == 0), "{place}");
            assert!(!live.insert(place, true), "{place}");
        }
        for (index, &place) in places.iter().enumerate() {
            assert_eq!(live.remove(place), Some(index % 2 == 0), "{place}");
            assert_eq!(live.remove(place), None, "{place}");
        }
    }
}
