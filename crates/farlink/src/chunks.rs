//! A list whose elements stay where they are: of a million small objects there is no second copy while it grows, and no room
//! for as many again.

use std::ops::{Index, IndexMut};

/// Elements of a chunk, as a power of two.
const CHUNK_BITS: u32 = 6;

/// A list in chunks.
pub(crate) struct Chunks<T>(Vec<Vec<T>>);

impl<T> Default for Chunks<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

/// Returns in which chunk an element is, and where in that.
fn place(index: usize) -> (usize, usize) {
    (index >> CHUNK_BITS, index & ((1 << CHUNK_BITS) - 1))
}

impl<T> Chunks<T> {
    pub(crate) fn len(&self) -> usize {
        self.0.last().map_or(0, |last| ((self.0.len() - 1) << CHUNK_BITS) + last.len())
    }

    pub(crate) fn push(&mut self, element: T) {
        match self.0.last_mut() {
            Some(last) if last.len() < 1 << CHUNK_BITS => last.push(element),
            _ => {
                let mut chunk = Vec::with_capacity(1 << CHUNK_BITS);
                chunk.push(element);
                self.0.push(chunk);
            }
        }
    }

    pub(crate) fn get(&self, index: usize) -> Option<&T> {
        let (chunk, within) = place(index);
        self.0.get(chunk)?.get(within)
    }

    pub(crate) fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        let (chunk, within) = place(index);
        self.0.get_mut(chunk)?.get_mut(within)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().flatten()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut().flatten()
    }
}

impl<T> Index<usize> for Chunks<T> {
    type Output = T;

    fn index(&self, index: usize) -> &T {
        let (chunk, within) = place(index);
        &self.0[chunk][within]
    }
}

impl<T> IndexMut<usize> for Chunks<T> {
    fn index_mut(&mut self, index: usize) -> &mut T {
        let (chunk, within) = place(index);
        &mut self.0[chunk][within]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Elements are found where they were put, however many there are.
    #[test]
    fn elements_are_in_order() {
        let mut list = Chunks::default();
        for number in 0..200 {
            assert_eq!((list.len(), list.get(number)), (number, None));
            list.push(number);
        }
        list[130] += 1000;
        list.iter_mut().for_each(|element| *element += 1);
        let expected: Vec<_> = (0..200).map(|number| if number == 130 { 1131 } else { number + 1 }).collect();
        assert_eq!(list.iter().copied().collect::<Vec<_>>(), expected);
        assert_eq!((list[63], list[64], list.get_mut(199).copied(), list.get_mut(200)), (64, 65, Some(200), None));
    }
}
