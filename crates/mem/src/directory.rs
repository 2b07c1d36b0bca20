//! Which object's code is at an address: a table in a reservation that the controller writes and the executor reads,
//! without a call for any object.
//!
//! The executor's unwinder has the address of some code and wants the index of its object's unwind information. The table
//! has a head for each 4 KiB of the stripe of code: the first object with code there. Objects in one of those pages are
//! linked in the order of their addresses through the first bytes of their indexes, which are in the stripe of read-only
//! data. So adding and removing write a few words, wherever others are.
//!
//! The controller never reads the table: what is in it is known here too. A sequence number that is odd while the table
//! changes tells a reader to look again.
//!
//! All numbers are u32. The table: the sequence number, 4 bytes unused, then the heads. An index begins with the start of
//! its object's code, the length of that, and the next object's index in the same page of code; what follows is the
//! index's own. Places are offsets in the reservation, and 0 is none, since code is first there.

#![allow(unsafe_code)]

use crate::{Error, WorkingMemory};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering, fence};

/// Bytes at the start of an index that are this module's.
pub const INDEX_LINK_BYTES: u64 = 12;

/// Bytes of code that one head is for, as a power of two.
const PAGE_BITS: u32 = 12;

const HEADS_OFFSET: u64 = 8;
const LENGTH_OFFSET: u64 = 4;
const NEXT_OFFSET: u64 = 8;

/// How often a reader looks at a table that is being changed: a change takes well under a microsecond, unless whoever
/// makes it has been stopped.
const MAX_LOOKS: u32 = 1 << 20;

/// Returns the bytes of a table for so many bytes of code.
pub(crate) fn table_bytes(code_bytes: u64) -> u64 {
    HEADS_OFFSET + code_bytes.div_ceil(1 << PAGE_BITS) * 4
}

/// An object in a directory.
struct Object {
    /// Where its code ends, and where its index is.
    end: u32,
    index: u32,
}

impl Object {
    fn last_page(&self) -> u32 {
        (self.end - 1) >> PAGE_BITS
    }
}

/// The controller's side.
pub(crate) struct Directory {
    base: ExecutorAddr,
    /// The stripe of read-only data: where in the reservation it begins, and a view of it.
    indexes_start: u64,
    indexes: WorkingMemory,
    /// Where in the stripe the table is.
    table: u64,
    sequence: u32,
    /// By where their code begins.
    objects: BTreeMap<u32, Object>,
}

impl Directory {
    /// Returns the directory of the reservation at `base` with its table at `table` in `indexes`, of which `view` is a view.
    pub(crate) fn new(
        base: ExecutorAddr,
        table: ExecutorAddr,
        indexes: ExecutorAddrRange,
        view: WorkingMemory,
    ) -> Option<Self> {
        let indexes_start = indexes.start().offset_from(base)?;
        let table = table.offset_from(indexes.start())?;
        Some(Self { base, indexes_start, indexes: view, table, sequence: 0, objects: BTreeMap::new() })
    }

    fn offset(&self, addr: ExecutorAddr) -> Result<u32, Error> {
        let offset = addr.offset_from(self.base).and_then(|offset| u32::try_from(offset).ok());
        offset.ok_or(Error::OutsideReservation(ExecutorAddrRange::at(addr)))
    }

    fn write(&self, offset: u64, value: u32) -> Result<(), Error> {
        self.indexes.store_u32(offset, value)
    }

    fn write_head(&self, page: u32, index: u32) -> Result<(), Error> {
        self.write(self.table + HEADS_OFFSET + u64::from(page) * 4, index)
    }

    fn write_next(&self, index: u32, next: u32) -> Result<(), Error> {
        self.write(u64::from(index) - self.indexes_start + NEXT_OFFSET, next)
    }

    /// Makes a change that readers see as a whole.
    fn change(&mut self, change: impl FnOnce(&Self) -> Result<(), Error>) -> Result<(), Error> {
        self.write(self.table, self.sequence.wrapping_add(1))?;
        fence(Ordering::Release);
        let result = change(self);
        fence(Ordering::Release);
        self.sequence = self.sequence.wrapping_add(2);
        self.write(self.table, self.sequence)?;
        result
    }

    /// Has code found by `first`, from the page `start` is in: after the object before it there, if there is one.
    fn lead_to(&self, start: u32, first: u32) -> Result<(), Error> {
        let page = start >> PAGE_BITS;
        match self.objects.range(..start).next_back() {
            Some((_, before)) if before.last_page() == page => self.write_next(before.index, first),
            _ => self.write_head(page, first),
        }
    }

    /// Returns the index of the first object after `start` whose code begins in `page`; 0 if there is none.
    fn next_in(&self, start: u32, page: u32) -> u32 {
        let next = self.objects.range(start + 1..).next();
        next.filter(|(next, _)| *next >> PAGE_BITS == page).map_or(0, |(_, object)| object.index)
    }

    /// Has the code in `code` found, with the index at `index`.
    pub(crate) fn add(&mut self, code: ExecutorAddrRange, index: ExecutorAddr) -> Result<(), Error> {
        let (start, end) = (self.offset(code.start())?, self.offset(code.end())?);
        let object = Object { end, index: self.offset(index)? };
        self.change(|directory| {
            let at = u64::from(object.index) - directory.indexes_start;
            directory.write(at, start)?;
            directory.write(at + LENGTH_OFFSET, end - start)?;
            directory.write_next(object.index, directory.next_in(start, object.last_page()))?;
            directory.lead_to(start, object.index)?;
            let more = (start >> PAGE_BITS) + 1..=object.last_page();
            { more }.try_for_each(|page| directory.write_head(page, object.index))
        })?;
        self.objects.insert(start, object);
        Ok(())
    }

    /// Has the code that begins at `code` found no more.
    pub(crate) fn remove(&mut self, code: ExecutorAddr) -> Result<(), Error> {
        let start = self.offset(code)?;
        let Some(object) = self.objects.remove(&start) else { return Ok(()) };
        self.change(|directory| {
            let (first, last) = (start >> PAGE_BITS, object.last_page());
            let next = directory.next_in(start, last);
            directory.lead_to(start, if last == first { next } else { 0 })?;
            let more = first + 1..=last;
            { more }.try_for_each(|page| directory.write_head(page, if page == last { next } else { 0 }))
        })
    }
}

/// The executor's side of a directory: where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeDirectory {
    base: ExecutorAddr,
    table: ExecutorAddrRange,
    code: ExecutorAddrRange,
    indexes: ExecutorAddrRange,
}

impl CodeDirectory {
    /// Returns the directory of a reservation's `code`, which begins at its base, with a table and indexes at these places;
    /// none if they cannot be that.
    ///
    /// # Safety
    ///
    /// While it is used, the table and the indexes must be mapped readable, and be written by a controller as this module
    /// says.
    #[must_use]
    pub unsafe fn new(code: ExecutorAddrRange, table: ExecutorAddrRange, indexes: ExecutorAddrRange) -> Option<Self> {
        let base = code.start();
        let fits = indexes.start().offset_from(base).is_some() && indexes.contains_range(table);
        let is_table = table.len() >= table_bytes(code.len()) && table.start().as_u64().is_multiple_of(4);
        (fits && is_table).then_some(Self { base, table, code, indexes })
    }

    /// Returns where the table is.
    #[must_use]
    pub fn table(&self) -> ExecutorAddrRange {
        self.table
    }

    /// Returns the address of the index of the object whose code is at `pc`.
    #[must_use]
    pub fn find(&self, pc: ExecutorAddr) -> Option<ExecutorAddr> {
        if !self.code.contains(pc) {
            return None;
        }
        for _ in 0..MAX_LOOKS {
            let before = load(self.table.start()).filter(|sequence| sequence % 2 == 0);
            let found = before.and_then(|_| self.look(pc));
            fence(Ordering::Acquire);
            if let (Some(sequence), Some(found)) = (before, found)
                && load(self.table.start()) == Some(sequence)
            {
                return found;
            }
            std::hint::spin_loop();
        }
        None
    }

    /// As [`Self::find`], in a table that may be changing: what is found counts if it has not changed. None if it has for
    /// certain.
    fn look(&self, pc: ExecutorAddr) -> Option<Option<ExecutorAddr>> {
        let offset = u32::try_from(pc.offset_from(self.base)?).ok()?;
        let head = self.table.start().checked_add(HEADS_OFFSET + u64::from(offset >> PAGE_BITS) * 4)?;
        let mut index = load(head)?;
        let mut last = None;
        while index != 0 {
            let addr = self.base.checked_add(index.into())?;
            let link = ExecutorAddrRange::from_len(addr, INDEX_LINK_BYTES)?;
            if !self.indexes.contains_range(link) || !addr.as_u64().is_multiple_of(4) {
                return None;
            }
            let (start, length) = (load(addr)?, load(addr.checked_add(LENGTH_OFFSET)?)?);
            if offset.wrapping_sub(start) < length {
                return Some(Some(addr));
            }
            // They are in order; where they are not, the table has changed.
            if last.is_some_and(|last| start <= last) {
                return None;
            }
            if start > offset {
                break;
            }
            last = Some(start);
            index = load(addr.checked_add(NEXT_OFFSET)?)?;
        }
        Some(None)
    }
}

/// Reads a word of the table or of an index.
fn load(addr: ExecutorAddr) -> Option<u32> {
    let at = usize::try_from(addr.as_u64()).ok()? as *mut u32;
    // SAFETY: the callers give addresses inside the table or the indexes, which are multiples of four; whoever made the
    // directory has promised that those are mapped.
    let word = unsafe { AtomicU32::from_ptr(at) };
    Some(word.load(Ordering::Acquire))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CODE_BYTES: u64 = 16 << 12;
    const INDEXES_BYTES: u64 = 4096;

    /// A directory whose reservation is in this process's heap, and what is expected to be in it.
    struct Both {
        directory: Directory,
        reader: CodeDirectory,
        base: ExecutorAddr,
        /// Code by its start, with the number of its index.
        expected: BTreeMap<u64, (u64, u64)>,
    }

    impl Both {
        fn new() -> Self {
            // The code is never looked at, so only the rest is memory.
            let view = WorkingMemory::in_heap(INDEXES_BYTES + table_bytes(CODE_BYTES)).unwrap();
            let indexes = ExecutorAddrRange::from_len(view.address(), view.len()).unwrap();
            let base = indexes.start().checked_sub(CODE_BYTES).unwrap();
            let table = indexes.start().checked_add(INDEXES_BYTES).unwrap();
            let directory = Directory::new(base, table, indexes, view).unwrap();
            let code = ExecutorAddrRange::from_len(base, CODE_BYTES).unwrap();
            let table = ExecutorAddrRange::from_len(table, table_bytes(CODE_BYTES)).unwrap();
            // SAFETY: the heap memory lives as long as the directory that is beside it.
            let reader = unsafe { CodeDirectory::new(code, table, indexes) }.unwrap();
            Self { directory, reader, base, expected: BTreeMap::new() }
        }

        fn index_address(&self, number: u64) -> ExecutorAddr {
            self.base.checked_add(CODE_BYTES + number * 16).unwrap()
        }

        /// Adds code with the first index that is free, if nothing is there.
        fn add(&mut self, start: u64, end: u64) {
            let end = end.min(CODE_BYTES);
            let overlaps = |(&other, &(other_end, _)): (&u64, &(u64, u64))| start < other_end && other < end;
            if start >= end || self.expected.iter().any(overlaps) {
                return;
            }
            let is_free = |number: &u64| !self.expected.values().any(|(_, used)| used == number);
            let number = (0..INDEXES_BYTES / 16).find(is_free).unwrap();
            let start_addr = self.base.checked_add(start).unwrap();
            let code = ExecutorAddrRange::from_len(start_addr, end - start).unwrap();
            self.directory.add(code, self.index_address(number)).unwrap();
            self.expected.insert(start, (end, number));
        }

        fn remove(&mut self, nth: usize) {
            let Some(&start) = self.expected.keys().nth(nth % self.expected.len().max(1)) else { return };
            self.expected.remove(&start);
            self.directory.remove(self.base.checked_add(start).unwrap()).unwrap();
        }

        fn check(&self, pc: u64) {
            let below = self.expected.range(..=pc).next_back();
            let expected = below.filter(|(_, (end, _))| pc < *end).map(|(_, (_, number))| self.index_address(*number));
            assert_eq!(self.reader.find(self.base.checked_add(pc).unwrap()), expected, "{pc:#x}");
        }
    }

    proptest! {
        /// Whatever is added and removed, code is found with its index, and nothing else.
        #[test]
        fn finds_what_is_there(
            operations in prop::collection::vec((any::<bool>(), 0..CODE_BYTES / 16, 1u64..1500), 1..120),
            pcs in prop::collection::vec(0..CODE_BYTES, 20),
        ) {
            let mut both = Both::new();
            for (adds, start, length) in operations {
                // Mostly short, some over many pages.
                let length = if length % 10 == 0 { length * 16 } else { length };
                if adds { both.add(start * 16, start * 16 + length) } else { both.remove(start as usize) }
                for (start, (end, _)) in both.expected.clone() {
                    [start.saturating_sub(1), start, end - 1, end % CODE_BYTES].into_iter().for_each(|pc| both.check(pc));
                }
                pcs.iter().for_each(|&pc| both.check(pc));
            }
        }
    }

    /// A table with any words in it is looked at to an end, and nothing outside the indexes is read.
    #[test]
    fn damaged_tables() {
        for word in [1u32, 4, 0x1000, CODE_BYTES as u32, CODE_BYTES as u32 + 8, CODE_BYTES as u32 + 9, u32::MAX] {
            let mut both = Both::new();
            both.add(0, 64);
            both.add(64, 128);
            both.directory.write_next(CODE_BYTES as u32, word).unwrap();
            let _ = both.reader.look(both.base.checked_add(100).unwrap());
            both.directory.write_head(0, word).unwrap();
            let _ = both.reader.look(both.base.checked_add(100).unwrap());
            // An index that leads to itself.
            both.directory.write_next(CODE_BYTES as u32, CODE_BYTES as u32).unwrap();
            both.directory.write_head(0, CODE_BYTES as u32).unwrap();
            assert_eq!(both.reader.look(both.base.checked_add(100).unwrap()), None);
        }
    }

    /// Whoever looks while another thread changes the table finds what stays there, and of the rest all or nothing.
    #[test]
    fn readers_beside_a_writer() {
        let mut both = Both::new();
        both.add(4096, 3 * 4096);
        let (reader, base) = (both.reader, both.base);
        let (stays, comes) = (both.index_address(0), both.index_address(1));
        let writer = std::thread::spawn(move || {
            for _ in 0..20_000 {
                both.add(0, 4096);
                both.remove(0);
            }
            both
        });
        while !writer.is_finished() {
            assert_eq!(reader.find(base.checked_add(5000).unwrap()), Some(stays));
            let found = reader.find(base.checked_add(100).unwrap());
            assert!(found.is_none() || found == Some(comes), "{found:?}");
        }
        writer.join().unwrap();
    }
}
