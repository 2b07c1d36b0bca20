//! This process's view of one reservation: where what the executor has is written, made sure of and wiped.

use super::resident::Resident;
use crate::sys::{Mapping, SharedObject};
use crate::{Error, WorkingMemory};
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt, PageSize};
use farlink_wire::msg::Stripe;
use rustc_hash::FxHashMap;
use rustix::io::Errno;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of whole pages in a range that are worth a system call to give back.
pub(super) const SWEPT_BYTES: u64 = 64 << 10;

/// Bytes of whole pages that are given back at once unless they are known to be there: zeros would be written to pages that
/// nobody has used. To write zeros to pages takes a seventh of what giving them back takes, and they need not be had again.
pub(super) const DISCARDED_BYTES: u64 = 4 << 20;

/// Bytes of working memory that are worth a system call to have all their pages at once: it takes a fifth off what the
/// faults cost.
const POPULATED_BYTES: u64 = 256 << 10;

/// The instruction that traps: `int3`.
const TRAP: u8 = 0xcc;

/// This process's view of a reservation.
pub(super) struct View {
    /// The object behind it, if this process has to do more with that than to map it.
    pub(super) object: Option<SharedObject>,
    /// All of it, readable and writable.
    pub(super) mapping: Arc<Mapping>,
    /// The executor's own view, if that is in this process and stripes for data exist only there.
    own_data: Option<Arc<Mapping>>,
    pub(super) stripes: Vec<Stripe>,
    /// Pages that are known to have physical memory. Where there are no stripes the executor may give it back.
    resident: Option<Resident>,
    live: Mutex<Live>,
}

/// Allocations in stripes that were finalized by the mapper, by where in the reservation they begin, and whether the executor
/// has been told of them. What is not in stripes the executor knows.
pub(super) type Live = FxHashMap<u64, bool>;

impl View {
    pub(super) fn new(
        object: Option<SharedObject>,
        mapping: Arc<Mapping>,
        own_data: Option<Arc<Mapping>>,
        stripes: Vec<Stripe>,
    ) -> Self {
        let resident = (!stripes.is_empty()).then(|| Resident::new(mapping.range().len(), crate::sys::page_size()));
        Self { object, mapping, own_data, stripes, resident, live: Mutex::default() }
    }

    pub(super) fn live(&self) -> MutexGuard<'_, Live> {
        // No code that can panic half-way through a change runs under this lock.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the mapping that shows what the executor has at `offset`.
    fn mapping_at(&self, offset: u64) -> &Arc<Mapping> {
        let is_own = |stripe: &Stripe| {
            stripe.is_copied_on_fork() && (stripe.offset..stripe.offset + stripe.size).contains(&offset)
        };
        match &self.own_data {
            Some(own) if self.stripes.iter().any(is_own) => own,
            _ => &self.mapping,
        }
    }

    /// Makes sure that part of the object can be written, if its file system may be full.
    pub(super) fn secure(&self, offset: u64, len: u64) -> Result<(), Error> {
        let is_limited = self.object.as_ref().is_some_and(SharedObject::is_limited);
        if is_limited { self.have_pages(offset, len) } else { Ok(()) }
    }

    /// Makes sure that there is physical memory, all at once if it is much.
    fn have_pages(&self, offset: u64, len: u64) -> Result<(), Error> {
        if len == 0 || self.resident.as_ref().is_some_and(|resident| resident.has(offset, len)) {
            return Ok(());
        }
        // The system is a fifth faster if it finds pages before they are mapped, also where it has to have them anyway.
        if let Some(object) = &self.object
            && let Err(error) = object.secure(offset, len)
            && object.is_limited()
        {
            let text = match error {
                Errno::NOSPC => "/dev/shm is full".to_owned(),
                error => error.to_string(),
            };
            return Err(Error::shared("", "had", text));
        }
        if len >= POPULATED_BYTES {
            let pages = self.addresses(offset, len)?;
            let populated = self.mapping_at(offset).populate(pages);
            populated.map_err(|error| Error::system("there is no physical memory", error))?;
        }
        if let Some(resident) = &self.resident {
            resident.add(offset, len);
        }
        Ok(())
    }

    /// Returns the addresses of a part in this process.
    fn addresses(&self, offset: u64, len: u64) -> Result<ExecutorAddrRange, Error> {
        let (mapped, out) = (self.mapping_at(offset).range(), Error::OutOfBounds { offset, len, size: 0 });
        let start = mapped.start().checked_add(offset);
        start.and_then(|start| ExecutorAddrRange::from_len(start, len)).ok_or(out)
    }

    pub(super) fn working(&self, offset: u64, len: u64) -> Result<WorkingMemory, Error> {
        WorkingMemory::in_mapping(self.mapping_at(offset), offset, len)
    }

    /// As [`Self::working`], after making sure that there is physical memory where that has to be asked for, or where it
    /// pays to ask for it at once.
    pub(super) fn secured(&self, offset: u64, len: u64) -> Result<WorkingMemory, Error> {
        if len >= POPULATED_BYTES {
            self.have_pages(offset, len)?;
        } else {
            self.secure(offset, len)?;
        }
        self.working(offset, len)
    }

    /// Makes a part of it ready for another allocation: data whose pages are known to be there is written with zeros, and of
    /// other data, which may have none, `discarded` bytes of whole pages or more are given back.
    fn wipe(&self, offset: u64, bytes: u64, group: AllocGroup, page_size: PageSize, discarded: u64) {
        let is_resident = bytes >= discarded && self.resident.as_ref().is_some_and(|pages| pages.has(offset, bytes));
        self.recycle(offset, bytes, group, page_size, if is_resident { u64::MAX } else { discarded });
    }

    /// Makes a part of it ready for another allocation: `discarded` bytes of whole pages of data or more are given back.
    pub(super) fn recycle(&self, offset: u64, bytes: u64, group: AllocGroup, page_size: PageSize, discarded: u64) {
        let (start, end) = (offset, offset + bytes);
        let is_code = group.prot.contains(MemProt::EXEC) && !self.stripes.is_empty();
        // Large ranges of data give their whole pages back to the system, and only the edges are written. Code is filled
        // in any case: a page of zeros would not trap.
        let is_large = |&(first, last): &(u64, u64)| last - first >= discarded;
        let pages = whole_pages(start, end, page_size).filter(|pages| !is_code && is_large(pages));
        let (first, last) = pages.filter(|&(first, last)| self.discard(first, last - first)).unwrap_or((end, end));
        let fill = if is_code { TRAP } else { 0 };
        for (from, to) in [(start, first), (last, end)].into_iter().filter(|(from, to)| from < to) {
            if let Ok(addresses) = self.addresses(from, to - from) {
                // What is not in the mapping is nobody's.
                let _ = self.mapping_at(from).fill(addresses, fill);
            }
        }
    }

    /// Gives whole pages back to the system; gives whether it took them.
    fn discard(&self, offset: u64, len: u64) -> bool {
        if let Some(resident) = &self.resident {
            resident.remove(offset, len);
        }
        self.addresses(offset, len).is_ok_and(|pages| self.mapping_at(offset).discard(pages).is_ok())
    }
}

/// Returns where the whole pages between two offsets begin and end, if there are any.
fn whole_pages(start: u64, end: u64, page_size: PageSize) -> Option<(u64, u64)> {
    let (first, last) = (page_size.round_up(start)?, page_size.align().align_down(end));
    (first < last).then_some((first, last))
}

/// A mapper's view of a reservation in stripes. What is allocated there is made ready by it alone, and nobody has to look for
/// the reservation each time.
#[derive(Clone)]
pub struct StripedView {
    base: ExecutorAddr,
    page_size: PageSize,
    view: Arc<View>,
}

impl StripedView {
    pub(super) fn new(base: ExecutorAddr, page_size: PageSize, view: Arc<View>) -> Self {
        Self { base, page_size, view }
    }

    /// Returns where in the reservation a range begins.
    fn offset(&self, range: ExecutorAddrRange) -> Result<u64, Error> {
        range.start().offset_from(self.base).ok_or(Error::OutsideReservation(range))
    }

    /// As [`MemoryMapper::prepare`](super::MemoryMapper::prepare).
    pub(crate) fn prepare(&self, range: ExecutorAddrRange) -> Result<WorkingMemory, Error> {
        self.view.secured(self.offset(range)?, range.len())
    }

    /// As [`MemoryMapper::secure`](super::MemoryMapper::secure).
    pub(crate) fn secure(&self, range: ExecutorAddrRange) -> Result<(), Error> {
        self.view.secure(self.offset(range)?, range.len())
    }

    /// Gives whole pages of a free range back to the system, if it takes them; nothing is written.
    pub(crate) fn trim(&self, range: ExecutorAddrRange) {
        let pages = self.offset(range).ok().and_then(|at| whole_pages(at, at + range.len(), self.page_size));
        if let Some((first, last)) = pages {
            self.view.discard(first, last - first);
        }
    }

    /// As [`MemoryMapper::recycle`](super::MemoryMapper::recycle).
    pub(crate) fn recycle(&self, segments: &[(AllocGroup, ExecutorAddrRange)]) {
        for &(group, range) in segments {
            if let Ok(offset) = self.offset(range) {
                self.view.wipe(offset, range.len(), group, self.page_size, DISCARDED_BYTES);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapper::views::buffers;
    use crate::sys::{Place, page_size};

    /// In memory that may run out, pages are had before they are written, and again when they have been given back.
    #[test]
    fn pages_are_had_again() {
        let (page, bytes) = (page_size().bytes(), 64 * page_size().bytes());
        let name = format!("/farlink_{}_view_test", std::process::id());
        let object = SharedObject::create(&name, bytes).unwrap().unwrap();
        SharedObject::unlink(&name);
        let mapping = Arc::new(object.map(bytes as usize, Place::Anywhere).unwrap());
        let view = View::new(Some(object), mapping, None, buffers(bytes));
        let committed = || view.object.as_ref().unwrap().committed_bytes().unwrap();
        let group = AllocGroup::standard(MemProt::RW);
        for _ in 0..2 {
            drop(view.secured(page / 2, 20 * page).unwrap());
            view.secure(30 * page, 1).unwrap();
            assert_eq!(committed(), 22 * page);
            // The first page and the last are not all of this range's.
            view.recycle(page / 2, 20 * page, group, page_size(), page);
            assert_eq!(committed(), 3 * page);
        }
    }

    /// What is free costs nothing where the system takes no pages back, since nobody may write the memory any more but those
    /// who have it mapped.
    #[test]
    fn sealed_memory_is_not_written() {
        let (page, bytes) = (page_size().bytes(), 64 * page_size().bytes());
        let object = SharedObject::nameless_for_a_while(bytes).unwrap();
        let mapping = Arc::new(object.map(bytes as usize, Place::Anywhere).unwrap());
        object.end_writing().unwrap();
        let view = Arc::new(View::new(Some(object), mapping, None, buffers(bytes)));
        let striped = StripedView::new(ExecutorAddr::new(bytes), page_size(), Arc::clone(&view));
        let all = ExecutorAddrRange::from_len(ExecutorAddr::new(bytes), bytes).unwrap();
        view.secured(0, page).unwrap().write(0, b"x").unwrap();
        striped.recycle(&[(AllocGroup::standard(MemProt::RW), ExecutorAddrRange::from_len(all.start(), 1).unwrap())]);
        striped.trim(all);
        assert_eq!(view.object.as_ref().unwrap().committed_bytes().unwrap(), page);
    }
}
