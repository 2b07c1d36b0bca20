//! Reservations that this process has a view of beside the executor's, and what is allocated in their stripes.
//!
//! What is in stripes needs no help of the executor to be what it has to be, so it is told of an allocation there only
//! if that has actions. Which keys are in use is known here.

use super::view::{DISCARDED_BYTES, Live, StripedView, View};
use super::{FinalizeRequest, MapperUsage, Reservations, StripeBytes, StripeRange};
use crate::sys::{self, SharedObject};
use crate::{Error, WorkingMemory};
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt, PageSize};
use farlink_wire::msg::Stripe;
use smallvec::SmallVec;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Fewest pages that a stripe is worth having for.
const MIN_STRIPE_PAGES: u64 = 16;

/// Largest stripe of code, and of read-only data, in bytes: data that lies behind them is to be within reach of code.
const MAX_CODE_STRIPE_BYTES: u64 = 512 << 20;

/// Divides a reservation: a quarter for code, a quarter for read-only data, the rest for data, with a page between them that
/// cannot be accessed. One that is too small for that has no stripes.
pub(super) fn divide(bytes: u64, page_size: PageSize) -> Vec<Stripe> {
    let page = page_size.bytes();
    let quarter = page_size.align().align_down(bytes / 4).min(MAX_CODE_STRIPE_BYTES);
    if quarter < MIN_STRIPE_PAGES * page {
        return Vec::new();
    }
    let needs = StripeBytes { code: quarter - page, read_only: quarter - page, data: bytes - 2 * quarter };
    beside_each_other(needs, page)
}

/// Divides a reservation for one allocation: each stripe has the length that it needs. Gives the length of all, too.
pub(super) fn divide_for(needs: StripeBytes, page_size: PageSize) -> Option<(u64, Vec<Stripe>)> {
    let page = page_size.bytes();
    let least = |bytes: u64| bytes.max(MIN_STRIPE_PAGES * page);
    let needs = StripeBytes { code: least(needs.code), read_only: least(needs.read_only), data: least(needs.data) };
    let bytes = needs.code.checked_add(needs.read_only)?.checked_add(needs.data)?.checked_add(2 * page)?;
    Some((bytes, beside_each_other(needs, page)))
}

fn beside_each_other(needs: StripeBytes, page: u64) -> Vec<Stripe> {
    let stripe = |prot, offset, size| {
        let group = AllocGroup::standard(prot);
        Stripe { group, offset, size, shared_with_children: false }
    };
    let read_only = needs.code + page;
    let data = read_only + needs.read_only + page;
    vec![
        stripe(MemProt::RX, 0, needs.code),
        stripe(MemProt::READ, read_only, needs.read_only),
        stripe(MemProt::RW, data, needs.data),
    ]
}

/// The one stripe of a reservation for buffers.
pub(super) fn buffers(bytes: u64) -> Vec<Stripe> {
    vec![Stripe { group: AllocGroup::standard(MemProt::RW), offset: 0, size: bytes, shared_with_children: true }]
}

/// The views of a mapper's reservations, and the allocations in their stripes.
pub(super) struct Views {
    page_size: PageSize,
    reservations: Mutex<Reservations<Arc<View>>>,
}

/// What of a request to finalize the executor has to be told.
pub(super) struct Told {
    /// The keys of all allocations.
    pub(super) keys: Vec<ExecutorAddr>,
    /// What the executor has to do, and the keys of that.
    pub(super) requests: Vec<FinalizeRequest>,
    pub(super) told_keys: Vec<ExecutorAddr>,
    /// Which of those are in stripes.
    pub(super) in_stripes: Vec<usize>,
    /// What to do if it does not.
    pub(super) undo: Undo,
}

/// How to undo what a request to finalize that failed has left.
#[derive(Default)]
pub(super) struct Undo {
    /// Keys and segments in stripes.
    striped: Vec<ExecutorAddr>,
    segments: Vec<(AllocGroup, ExecutorAddrRange)>,
    /// Working memory of what is not in stripes.
    pub(super) contents: Vec<WorkingMemory>,
}

impl Undo {
    /// Keys of the allocations in stripes.
    pub(super) fn striped(&self) -> &[ExecutorAddr] {
        &self.striped
    }
}

impl Views {
    pub(super) fn new(page_size: PageSize) -> Self {
        Self { page_size, reservations: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Reservations<Arc<View>>> {
        // No code that can panic half-way through a change runs under this lock.
        self.reservations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, range: ExecutorAddrRange, view: View) -> Result<(), Error> {
        self.lock().add(range, Arc::new(view))
    }

    /// Returns whether a reservation begins at `base`.
    pub(super) fn has(&self, base: ExecutorAddr) -> bool {
        self.lock().has(base)
    }

    /// Returns the ranges of reservations with these bases.
    pub(super) fn ranges(&self, bases: &[ExecutorAddr]) -> Result<Vec<ExecutorAddrRange>, Error> {
        let reservations = self.lock();
        let range = |&base| reservations.0.get(&base).map(|(range, _)| *range).ok_or(Error::UnknownReservation(base));
        bases.iter().map(range).collect()
    }

    /// Takes out reservations and what is allocated in them, or changes nothing.
    pub(super) fn remove(&self, bases: &[ExecutorAddr]) -> Result<(), Error> {
        self.lock().remove(bases).map(drop)
    }

    /// Returns the view of the reservation that has all of `range`, and where in it the range begins.
    pub(super) fn place(&self, range: ExecutorAddrRange) -> Result<(u64, Arc<View>), Error> {
        let reservations = self.lock();
        let (around, view) = reservations.around(range)?;
        Ok((range.start().as_u64() - around.start().as_u64(), Arc::clone(view)))
    }

    pub(super) fn working(&self, range: ExecutorAddrRange) -> Result<WorkingMemory, Error> {
        let reservations = self.lock();
        let (around, view) = reservations.around(range)?;
        view.working(range.start().as_u64() - around.start().as_u64(), range.len())
    }

    /// Returns whether a range is data that the executor's children do not share.
    pub(super) fn is_data(&self, range: ExecutorAddrRange) -> bool {
        self.place(range).is_ok_and(|(offset, view)| {
            let has = |stripe: &&Stripe| (stripe.offset..stripe.offset + stripe.size).contains(&offset);
            view.stripes.iter().find(has).is_some_and(Stripe::is_copied_on_fork)
        })
    }

    /// As [`View::secured`].
    pub(super) fn secured(&self, range: ExecutorAddrRange) -> Result<WorkingMemory, Error> {
        let (offset, view) = self.place(range)?;
        view.secured(offset, range.len())
    }

    /// Returns the view of a reservation, if it has stripes.
    pub(super) fn striped_view(&self, reservation: ExecutorAddr) -> Option<StripedView> {
        let reservations = self.lock();
        let (_, view) = reservations.0.get(&reservation).filter(|(_, view)| !view.stripes.is_empty())?;
        Some(StripedView::new(reservation, self.page_size, Arc::clone(view)))
    }

    pub(super) fn stripes(&self, reservation: ExecutorAddr) -> Vec<StripeRange> {
        let reservations = self.lock();
        let Ok((range, view)) = reservations.around(ExecutorAddrRange::at(reservation)) else { return Vec::new() };
        let addresses = |stripe: &Stripe| {
            let start = range.start().checked_add(stripe.offset)?;
            Some((stripe.group.prot, ExecutorAddrRange::from_len(start, stripe.size)?))
        };
        view.stripes.iter().filter_map(addresses).collect()
    }

    /// Makes segments ready for other allocations: `discarded` bytes of whole pages of data or more are given back.
    pub(super) fn recycle(&self, segments: &[(AllocGroup, ExecutorAddrRange)], discarded: u64) {
        for &(group, range) in segments {
            if let Ok((offset, view)) = self.place(range) {
                view.recycle(offset, range.len(), group, self.page_size, discarded);
            }
        }
    }

    /// Returns what the views take of the system in this process.
    pub(super) fn usage(&self) -> Result<MapperUsage, Error> {
        let views: Vec<_> = self.lock().0.values().map(|(_, view)| Arc::clone(view)).collect();
        let mappings: Vec<_> = views.iter().map(|view| view.mapping.range()).collect();
        let unknown = |error: std::io::Error| Error::system("memory cannot be examined", error);
        let controller_mappings = sys::count_mappings(&mappings).map_err(unknown)?;
        let committed = views.iter().filter_map(|view| view.object.as_ref()).map(SharedObject::committed_bytes);
        let committed_bytes = committed.sum::<Result<u64, _>>().map_err(|error| unknown(error.into()))?;
        Ok(MapperUsage { committed_bytes, controller_mappings, ..MapperUsage::default() })
    }

    /// Checks allocations and notes those in stripes; says what the executor has to be told of.
    pub(super) fn begin(&self, allocations: Vec<FinalizeRequest>) -> Result<Told, Error> {
        let keys = allocations.iter().map(FinalizeRequest::key).collect::<Result<Vec<_>, _>>()?;
        let striped = self.note(&allocations, &keys)?;
        let (mut requests, mut told_keys, mut undo) = (Vec::new(), Vec::new(), Undo::default());
        let mut told_in_stripes = Vec::new();
        if striped.len() < keys.len() || allocations.iter().any(|request| !request.actions.is_empty()) {
            let mut in_stripes = striped.iter().copied().peekable();
            for (request, &key) in allocations.into_iter().zip(&keys) {
                let segments = request.segments.iter();
                let is_striped = in_stripes.next_if_eq(&key).is_some();
                if is_striped {
                    undo.striped.push(key);
                    undo.segments.extend(segments.map(|segment| (segment.group, segment.range)));
                } else {
                    undo.contents.extend(segments.map(|segment| segment.working.clone()));
                }
                if !is_striped || !request.actions.is_empty() {
                    told_in_stripes.extend(is_striped.then_some(requests.len()));
                    told_keys.push(key);
                    requests.push(request);
                }
            }
        }
        Ok(Told { keys, requests, told_keys, in_stripes: told_in_stripes, undo })
    }

    /// Notes the allocations that are in stripes, all or none; gives their keys.
    fn note(&self, allocations: &[FinalizeRequest], keys: &[ExecutorAddr]) -> Result<Keys, Error> {
        let reservations = self.lock();
        let mut noted = Keys::with_capacity(keys.len());
        for (request, &key) in allocations.iter().zip(keys) {
            let Ok((range, view)) = reservations.around(ExecutorAddrRange::at(request.reservation)) else { continue };
            if view.stripes.is_empty() {
                continue;
            }
            let checked =
                check_in_stripes(request, range.start(), view).and_then(|offset| match view.live().entry(offset) {
                    Entry::Occupied(_) => Err(Error::Busy(key)),
                    Entry::Vacant(entry) => {
                        entry.insert(!request.actions.is_empty());
                        Ok(())
                    }
                });
            if let Err(error) = checked {
                for key in noted {
                    live_at(&reservations, key, forget);
                }
                return Err(error);
            }
            noted.push(key);
        }
        Ok(noted)
    }

    /// Makes stripes as they were before an allocation that could not be finalized.
    pub(super) fn undo(&self, undo: &Undo) {
        self.recycle(&undo.segments, DISCARDED_BYTES);
        let reservations = self.lock();
        for &key in &undo.striped {
            live_at(&reservations, key, forget);
        }
    }

    /// Forgets allocations that end; gives the keys of those that the executor has to be told of, or changes nothing.
    pub(super) fn end(&self, keys: Vec<ExecutorAddr>) -> Result<Vec<ExecutorAddr>, Error> {
        let reservations = self.lock();
        let mut told = Vec::new();
        let mut ended: SmallVec<[(ExecutorAddr, bool); 4]> = SmallVec::with_capacity(keys.len());
        for key in keys {
            match live_at(&reservations, key, forget) {
                Some(Some(is_told)) => {
                    ended.push((key, is_told));
                    if is_told {
                        told.push(key);
                    }
                }
                // The executor knows what is not in stripes.
                None => told.push(key),
                Some(None) => {
                    for (key, is_told) in ended {
                        live_at(&reservations, key, |live, offset| live.insert(offset, is_told));
                    }
                    return Err(Error::UnknownAllocation(key));
                }
            }
        }
        Ok(told)
    }
}

/// Keys of allocations.
type Keys = SmallVec<[ExecutorAddr; 4]>;

fn forget(live: &mut Live, offset: u64) -> Option<bool> {
    live.remove(&offset)
}

/// Looks at or changes what is known of an address in the stripes of a reservation; none if it is not in such.
fn live_at<R>(
    reservations: &Reservations<Arc<View>>,
    addr: ExecutorAddr,
    operation: impl FnOnce(&mut Live, u64) -> R,
) -> Option<R> {
    let (range, view) = reservations.around(ExecutorAddrRange::at(addr)).ok()?;
    if view.stripes.is_empty() {
        return None;
    }
    Some(operation(&mut view.live(), addr.offset_from(range.start())?))
}

/// Checks that each segment is in the stripe of its protection, and that no two overlap; gives where the first of them is in
/// the reservation at `base`.
fn check_in_stripes(request: &FinalizeRequest, base: ExecutorAddr, view: &View) -> Result<u64, Error> {
    if request.reservation != base {
        return Err(Error::UnknownReservation(request.reservation));
    }
    let mut lowest = u64::MAX;
    for (index, segment) in request.segments.iter().enumerate() {
        let offset = segment.range.start().offset_from(base).unwrap_or(u64::MAX);
        lowest = lowest.min(offset);
        let is_inside = |stripe: &Stripe| {
            let end = offset.checked_add(segment.range.len());
            stripe.group.prot == segment.group.prot
                && stripe.offset <= offset
                && end.is_some_and(|end| end <= stripe.offset + stripe.size)
        };
        if !view.stripes.iter().any(is_inside) {
            return Err(Error::OutsideReservation(segment.range));
        }
        // An allocation has as many segments as there are protections, so every pair is looked at.
        let mut before = request.segments[..index].iter().map(|other| other.range);
        if let Some(other) = before.find(|other| other.overlaps(segment.range)) {
            return Err(Error::Overlap(segment.range, other));
        }
    }
    Ok(lowest)
}
