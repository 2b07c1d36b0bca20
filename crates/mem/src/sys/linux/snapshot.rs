//! Copies of shared memory for the children that this process forks.
//!
//! Shared memory stays shared after `fork`. To give a child a copy, as it has of ordinary memory, the parent copies
//! what is there to memory of its own before it forks; the child, which has that memory too, puts it where the shared
//! memory was.

use super::{Mapping, Place, SharedObject, page_size};
use crate::sys::count::{SystemCall, call};
use farlink_addr::ExecutorAddrRange;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::sync::Arc;

/// A copy of a range of a mapping.
#[derive(Debug)]
pub(crate) struct Snapshot {
    of: Arc<Mapping>,
    range: ExecutorAddrRange,
    copy: Mapping,
}

impl Snapshot {
    /// Copies a range of `mapping`, which maps all of `object`. What has no physical memory has none in the copy.
    pub(crate) fn take(mapping: &Arc<Mapping>, object: &SharedObject, range: ExecutorAddrRange) -> Result<Self, Errno> {
        let source = mapping.inside(range)?;
        let copy = Mapping::private(range.len() as usize, Place::Anywhere)?;
        let base = range.start().as_u64() - mapping.range().start().as_u64();
        let copy_extent = |from: u64, len: u64| {
            let offset = (from - base) as usize;
            let target = copy.start().as_ptr().wrapping_add(offset);
            // SAFETY: the extent is inside the range, which both mappings have; they are different memory. What other
            // threads write meanwhile is copied or is not, as with memory that a fork copies at some moment.
            unsafe { std::ptr::copy_nonoverlapping(source.wrapping_add(offset), target, len as usize) };
        };
        // Programs that close every descriptor close the object's too; then its number may be another file's.
        if object.is_still_open() {
            extents(object, base, range.len(), copy_extent)?;
        } else {
            let page = page_size().bytes();
            resident_pages(mapping, range, |offset| copy_extent(offset, page))?;
        }
        Ok(Self { of: Arc::clone(mapping), range, copy })
    }

    /// Puts the copy where the range was. Only for a child: other threads may be using the range.
    pub(crate) fn install(self) -> Result<(), Errno> {
        let target = self.of.inside(self.range)?;
        let (source, len) = (self.copy.start().as_ptr(), self.range.len() as usize);
        let flags = rustix::mm::MremapFlags::MAYMOVE;
        call(SystemCall::Mremap, || {
            // SAFETY: the target is a range of a mapping of ours, of the length of the copy, whose old mapping ends
            // here. No reference to either exists.
            unsafe { rustix::mm::mremap_fixed(source.cast(), len, len, flags, target.cast()) }
        })?;
        // The copy's own addresses are nobody's any more.
        std::mem::forget(self.copy);
        Ok(())
    }
}

/// Calls `visit` with offset and length of every extent of `len` bytes from `offset` of an object that may have physical
/// memory.
fn extents(object: &SharedObject, offset: u64, len: u64, mut visit: impl FnMut(u64, u64)) -> Result<(), Errno> {
    let (mut at, end) = (offset, offset + len);
    while at < end {
        let from = match object.seek(SeekFrom::Data(at)) {
            Ok(from) if from < end => from,
            // There is nothing from here to the end.
            Ok(_) | Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error),
        };
        let to = object.seek(SeekFrom::Hole(from))?.min(end);
        visit(from, to - from);
        at = to;
    }
    Ok(())
}

/// Pages that one question about residence is about.
const PAGES_AT_ONCE: usize = 4096;

/// Calls `visit` with every resident page of `range`, as its offset in `mapping`. Slower than [`extents`] by far where
/// there is little in much.
fn resident_pages(mapping: &Mapping, range: ExecutorAddrRange, mut visit: impl FnMut(u64)) -> Result<(), Errno> {
    let page = page_size().bytes();
    let base = mapping.range().start();
    let mut at = range.start();
    let mut residence = [0u8; PAGES_AT_ONCE];
    while let Some(left) = range.end().offset_from(at).filter(|&left| left > 0) {
        let len = left.min(PAGES_AT_ONCE as u64 * page);
        let start = mapping.inside(ExecutorAddrRange::from_len(at, len).ok_or(Errno::FAULT)?)?;
        call(SystemCall::Mincore, || {
            // SAFETY: the range is inside the mapping and has at most as many pages as there are bytes for.
            match unsafe { libc::mincore(start.cast(), len as usize, residence.as_mut_ptr()) } {
                0 => Ok(()),
                _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::FAULT)),
            }
        })?;
        let offset = at.as_u64() - base.as_u64();
        let pages = residence.iter().take(len.div_ceil(page) as usize).enumerate();
        pages
            .filter(|(_, is_resident)| *is_resident & 1 == 1)
            .for_each(|(index, _)| visit(offset + index as u64 * page));
        at = at.checked_add(len).ok_or(Errno::FAULT)?;
    }
    Ok(())
}

impl Mapping {
    /// Returns how many bytes of a range, which is whole pages of private memory, have physical memory. `mincore(2)`.
    pub(crate) fn resident_bytes(&self, range: ExecutorAddrRange) -> Result<u64, Errno> {
        let mut pages = 0;
        resident_pages(self, range, |_| pages += 1)?;
        Ok(pages * page_size().bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use farlink_addr::ExecutorAddr;
    use std::os::fd::AsRawFd;

    /// A copy has what was there when it was taken, holes included, and replaces the shared memory.
    #[test]
    fn copies_replace_what_they_are_of() {
        for is_open in [true, false] {
            copy_replaces(is_open);
        }
    }

    fn copy_replaces(is_open: bool) {
        let page = page_size().bytes();
        let object = SharedObject::nameless(64 * page).unwrap();
        let mapping = Arc::new(object.map(64 * page as usize, Place::Anywhere).unwrap());
        let other = object.map(64 * page as usize, Place::Anywhere).unwrap();
        let at = |mapping: &Mapping, page_number: u64| mapping.range().start().checked_add(page_number * page).unwrap();
        // SAFETY: the byte is in the mapping, which is readable.
        let byte = |addr: ExecutorAddr| unsafe { (addr.as_u64() as *const u8).read_volatile() };
        for number in [0, 1, 2, 9, 40] {
            mapping.write(at(&mapping, number), &[number as u8 + 1]).unwrap();
        }
        let range = ExecutorAddrRange::new(at(&mapping, 2), at(&mapping, 40)).unwrap();
        let same = object.as_fd().try_clone_to_owned().unwrap();
        if !is_open {
            // SAFETY: the number stays open, as another file's.
            unsafe { libc::dup2(std::fs::File::open("/dev/zero").unwrap().as_raw_fd(), object.as_fd().as_raw_fd()) };
        }
        let snapshot = Snapshot::take(&mapping, &object, range).unwrap();
        let object = SharedObject::received(same).unwrap();
        for number in [0, 2, 9, 40] {
            other.write(at(&other, number), &[99]).unwrap();
        }
        let before = object.committed_bytes().unwrap();
        snapshot.install().unwrap();
        let now: Vec<u8> = [0, 1, 2, 3, 9, 39, 40].into_iter().map(|number| byte(at(&mapping, number))).collect();
        assert_eq!(now, [99, 2, 3, 0, 10, 0, 99]);
        // What is written there now is not shared, and what is written to the object does not arrive.
        mapping.write(at(&mapping, 3), &[7]).unwrap();
        other.write(at(&other, 9), &[8]).unwrap();
        assert_eq!((byte(at(&other, 3)), byte(at(&mapping, 9))), (0, 10));
        assert_eq!(object.committed_bytes().unwrap(), before + page);
    }
}
