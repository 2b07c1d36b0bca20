//! The slabs of a memory service and what is allocated in them: every check of a range, and nothing that changes memory.

use super::Allocation;
use crate::Error;
use crate::sys::{Mapping, SharedObject};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange, MemProt, PageSize};
use farlink_wire::msg::{ActionPair, Segment, Stripe, WrapperFunctionCall};
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) slabs: BTreeMap<ExecutorAddr, Slab>,
    /// Number of the next allocation: newer ones have greater numbers.
    pub(super) next: u64,
    pub(super) is_shut_down: bool,
}

#[derive(Debug)]
pub(super) struct Slab {
    pub(super) mapping: Arc<Mapping>,
    pub(super) backing: Backing,
    /// The parts with a protection of their own. If there are none, protections change with allocations.
    pub(super) stripes: Vec<(Stripe, ExecutorAddrRange)>,
    pub(super) allocations: BTreeMap<ExecutorAddr, Record>,
}

/// What is behind a slab.
#[derive(Debug)]
pub(super) enum Backing {
    /// Memory of this process's own. If there is an object too, it is behind what a child would not get a copy of.
    Private { object: Option<SharedObject> },
    /// An object that another process has mapped too, and its name, until the slab goes.
    Shared {
        object: SharedObject,
        /// Whether this process has its own copy of each page of data that it writes.
        copies_data: bool,
        _name: Option<SharedName>,
    },
}

/// The name of a shared memory object that this service created. The controller removes it; if it never did, dropping
/// this does.
#[derive(Debug)]
pub(super) struct SharedName(pub(super) String);

impl Drop for SharedName {
    fn drop(&mut self) {
        SharedObject::unlink(&self.0);
    }
}

#[derive(Debug)]
pub(super) struct Record {
    /// From the first segment's start to the last one's end, in whole pages.
    pub(super) span: ExecutorAddrRange,
    /// The segments, in whole pages, and their protections.
    pub(super) segments: Vec<(ExecutorAddrRange, MemProt)>,
    pub(super) status: Status,
}

#[derive(Debug)]
pub(super) enum Status {
    /// Some thread is finalizing or deallocating it.
    Busy,
    Live {
        number: u64,
        dealloc: Vec<WrapperFunctionCall>,
    },
    /// It has gone, but its pages could not be made writable again. Nobody gets them until the slab goes.
    Lost,
}

/// An allocation whose ranges have been checked and marked busy.
pub(super) struct Checked<'a> {
    pub(super) key: ExecutorAddr,
    pub(super) mapping: Arc<Mapping>,
    pub(super) segments: Vec<(ExecutorAddrRange, Segment<'a>)>,
    pub(super) actions: Vec<ActionPair>,
}

/// An allocation that is going, and what has to run.
pub(super) struct Leaving {
    pub(super) mapping: Arc<Mapping>,
    pub(super) key: ExecutorAddr,
    pub(super) segments: Vec<(ExecutorAddrRange, MemProt)>,
    pub(super) dealloc: Vec<WrapperFunctionCall>,
}

impl State {
    /// Returns the slab that has all of `range`.
    pub(super) fn slab_around(
        &mut self,
        range: ExecutorAddrRange,
        wanted: Option<ExecutorAddr>,
    ) -> Result<&mut Slab, Error> {
        let found = self.slabs.range_mut(..=range.start()).next_back();
        let Some((&base, slab)) = found.filter(|(_, slab)| slab.mapping.range().contains_range(range)) else {
            return Err(Error::OutsideReservation(range));
        };
        match wanted {
            Some(wanted) if wanted != base => Err(Error::OutsideReservation(range)),
            _ => Ok(slab),
        }
    }

    /// Checks an allocation and marks its range busy.
    pub(super) fn check<'a>(&mut self, allocation: Allocation<'a>, page_size: PageSize) -> Result<Checked<'a>, Error> {
        if self.is_shut_down {
            return Err(Error::ShutDown);
        }
        if let Some(base) = allocation.slab
            && !self.slabs.contains_key(&base)
        {
            return Err(Error::UnknownReservation(base));
        }
        if let Some(slab) = allocation.slab.and_then(|base| self.slabs.get_mut(&base))
            && !slab.stripes.is_empty()
        {
            return slab.check_striped(allocation);
        }
        let segments = page_ranges(allocation.segments, page_size)?;
        let mut ranges: Vec<_> = segments.iter().map(|(range, segment)| (*range, segment.group.prot)).collect();
        ranges.sort_by_key(|&(range, _)| range);
        for pair in ranges.windows(2) {
            if pair[0].0.overlaps(pair[1].0) {
                return Err(Error::Overlap(pair[1].0, pair[0].0));
            }
        }
        let last = ranges.iter().map(|(range, _)| range.end()).max();
        let (Some((first, _)), Some(last)) = (ranges.first(), last) else {
            return Err(Error::NoSegments);
        };
        let key = first.start();
        let span = ExecutorAddrRange::new(key, last).expect("the last end is after the first start");
        if span.is_empty() {
            // It would have no place among the others, which are told apart by their addresses.
            return Err(Error::BadSize { what: "finalized", bytes: 0 });
        }
        let slab = self.slab_around(span, allocation.slab)?;
        slab.check_free(span)?;
        let record = Record { span, segments: ranges, status: Status::Busy };
        slab.allocations.insert(key, record);
        Ok(Checked { key, mapping: Arc::clone(&slab.mapping), segments, actions: allocation.actions })
    }

    /// Forgets allocations that are not finalized after all.
    pub(super) fn forget(&mut self, keys: &[ExecutorAddr]) {
        for slab in self.slabs.values_mut() {
            for key in keys {
                slab.allocations.remove(key);
            }
        }
    }

    /// Ends an allocation whose memory is as it was reserved, or could not be made so.
    pub(super) fn free(&mut self, key: ExecutorAddr, is_reset: bool) {
        let Some((_, slab)) = self.slabs.range_mut(..=key).next_back() else { return };
        if is_reset {
            slab.allocations.remove(&key);
        } else if let Some(record) = slab.allocations.get_mut(&key) {
            record.status = Status::Lost;
        }
    }

    /// Records allocations as finalized; gives back what there is no slab for any more.
    pub(super) fn record(
        &mut self,
        keys: &[ExecutorAddr],
        dealloc: Vec<Vec<WrapperFunctionCall>>,
    ) -> Vec<Vec<WrapperFunctionCall>> {
        let mut unrecorded = Vec::new();
        for (key, dealloc) in keys.iter().zip(dealloc) {
            let number = self.next;
            self.next += 1;
            match self.record_mut(*key) {
                Some(record) => record.status = Status::Live { number, dealloc },
                None => unrecorded.push(dealloc),
            }
        }
        unrecorded
    }

    fn record_mut(&mut self, key: ExecutorAddr) -> Option<&mut Record> {
        let (_, slab) = self.slabs.range_mut(..=key).next_back()?;
        slab.allocations.get_mut(&key)
    }

    /// Marks allocations busy and takes what has to run, or changes nothing.
    pub(super) fn take_allocations(&mut self, keys: &[ExecutorAddr]) -> Result<Vec<Leaving>, Error> {
        let mut sorted = keys.to_vec();
        sorted.sort();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::Busy(pair[0]));
        }
        for &key in keys {
            match self.record_mut(key).ok_or(Error::UnknownAllocation(key))?.status {
                Status::Live { .. } => {}
                Status::Busy => return Err(Error::Busy(key)),
                Status::Lost => return Err(Error::UnknownAllocation(key)),
            }
        }
        let take = |&key: &ExecutorAddr| {
            let (_, slab) = self.slabs.range_mut(..=key).next_back()?;
            let mapping = Arc::clone(&slab.mapping);
            let record = slab.allocations.get_mut(&key)?;
            let Status::Live { dealloc, .. } = std::mem::replace(&mut record.status, Status::Busy) else {
                return None;
            };
            Some(Leaving { mapping, key, segments: record.segments.clone(), dealloc })
        };
        Ok(keys.iter().filter_map(take).collect())
    }

    /// Takes slabs out, or changes nothing.
    pub(super) fn take_slabs(&mut self, bases: &[ExecutorAddr]) -> Result<Vec<Slab>, Error> {
        let mut sorted = bases.to_vec();
        sorted.sort();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::Busy(pair[0]));
        }
        for base in bases {
            let slab = self.slabs.get(base).ok_or(Error::UnknownReservation(*base))?;
            let busy = slab.allocations.iter().find(|(_, record)| matches!(record.status, Status::Busy));
            if let Some((&key, _)) = busy {
                return Err(Error::Busy(key));
            }
        }
        Ok(bases.iter().filter_map(|base| self.slabs.remove(base)).collect())
    }
}

impl Slab {
    /// Returns the ranges of shared memory that a child would share, and is to have a copy of.
    pub(super) fn copied_on_fork(&self) -> Vec<ExecutorAddrRange> {
        let stripes = self.data().filter(|_| !self.copies_data());
        let live = self.allocations.values().flat_map(|record| &record.segments);
        let written = live.filter(|(_, prot)| prot.contains(MemProt::WRITE)).map(|&(range, _)| range);
        stripes.chain(written).filter(|range| !range.is_empty()).collect()
    }

    /// Returns the addresses of stripes of data that children do not share.
    pub(super) fn data(&self) -> impl Iterator<Item = ExecutorAddrRange> {
        self.stripes.iter().filter(|(stripe, _)| stripe.is_copied_on_fork()).map(|&(_, range)| range)
    }

    fn copies_data(&self) -> bool {
        matches!(self.backing, Backing::Shared { copies_data: true, .. })
    }

    /// Returns whether this process has its own copies of pages in `range`.
    pub(super) fn copies(&self, range: ExecutorAddrRange) -> bool {
        self.copies_data() && { self.data() }.any(|data| data.contains_range(range))
    }

    /// Checks an allocation in stripes, and marks it busy by its lowest address. Its memory is as it has to be.
    fn check_striped<'a>(&mut self, allocation: Allocation<'a>) -> Result<Checked<'a>, Error> {
        let mut ranges = Vec::with_capacity(allocation.segments.len());
        for Segment { group, addr, size, content } in &allocation.segments {
            let bad_size = Error::BadSize { what: "finalized", bytes: *size };
            let range = ExecutorAddrRange::from_len(*addr, *size).filter(|range| !range.is_empty()).ok_or(bad_size)?;
            let is_inside = |(stripe, addresses): &(Stripe, ExecutorAddrRange)| {
                stripe.group.prot == group.prot && addresses.contains_range(range)
            };
            if !content.0.is_empty() || !self.stripes.iter().any(is_inside) {
                return Err(Error::OutsideReservation(range));
            }
            ranges.push(range);
        }
        let key = ranges.iter().map(|range| range.start()).min().ok_or(Error::NoSegments)?;
        if let Some(taken) = self.allocations.get(&key) {
            return Err(Error::Overlap(ranges[0], taken.span));
        }
        let span = ranges.into_iter().min().expect("there is one");
        self.allocations.insert(key, Record { span, segments: Vec::new(), status: Status::Busy });
        let (mapping, segments) = (Arc::clone(&self.mapping), Vec::new());
        Ok(Checked { key, mapping, segments, actions: allocation.actions })
    }

    /// Checks that nothing is allocated in `span`.
    fn check_free(&self, span: ExecutorAddrRange) -> Result<(), Error> {
        let before = self.allocations.range(..=span.start()).next_back();
        let after = self.allocations.range(span.start()..).next();
        let taken = before.into_iter().chain(after).map(|(_, record)| record.span);
        match { taken }.find(|taken| taken.overlaps(span)) {
            Some(taken) => Err(Error::Overlap(span, taken)),
            None => Ok(()),
        }
    }
}

/// Checks each segment by itself; gives its whole pages.
fn page_ranges(
    segments: Vec<Segment<'_>>,
    page_size: PageSize,
) -> Result<Vec<(ExecutorAddrRange, Segment<'_>)>, Error> {
    segments.into_iter().map(|segment| Ok((pages_of(&segment, page_size)?, segment))).collect()
}

fn pages_of(segment: &Segment<'_>, page_size: PageSize) -> Result<ExecutorAddrRange, Error> {
    let (addr, size, content) = (segment.addr, segment.size, segment.content.0.len() as u64);
    if !addr.is_aligned(page_size.align()) {
        return Err(Error::Misaligned(addr));
    }
    if content > size {
        return Err(Error::ContentTooLong { addr, content, size });
    }
    let pages = page_size.round_up(size).and_then(|size| ExecutorAddrRange::from_len(addr, size));
    pages.ok_or(Error::BadSize { what: "finalized", bytes: size })
}

/// Most stripes of a slab: one for each protection, and room for more.
const MAX_STRIPES: usize = 16;

/// Checks that stripes are whole pages, in order, apart, and inside `bytes`, and that no page is both writable and
/// executable.
pub(super) fn check_stripes(stripes: &[Stripe], bytes: u64, page_size: PageSize) -> Result<(), Error> {
    let mut end = 0;
    for stripe in stripes {
        let bad = Error::BadSize { what: "a stripe of the reservation", bytes: stripe.size };
        let is_whole = page_size.align().is_aligned(stripe.offset) && page_size.align().is_aligned(stripe.size);
        let stripe_end = stripe.offset.checked_add(stripe.size).filter(|&end| end <= bytes);
        let Some(stripe_end) = stripe_end.filter(|_| is_whole && stripe.size > 0 && stripe.offset >= end) else {
            return Err(bad);
        };
        if stripe.group.prot.contains(MemProt::WRITE | MemProt::EXEC) || stripes.len() > MAX_STRIPES {
            return Err(bad);
        }
        end = stripe_end;
    }
    Ok(())
}

/// Returns the addresses of stripes, which have been checked, in a slab.
pub(super) fn stripe_ranges(slab: ExecutorAddrRange, stripes: &[Stripe]) -> Vec<(Stripe, ExecutorAddrRange)> {
    let range = |stripe: &Stripe| {
        let start = slab.start().checked_add(stripe.offset)?;
        Some((*stripe, ExecutorAddrRange::from_len(start, stripe.size)?))
    };
    stripes.iter().filter_map(range).collect()
}
