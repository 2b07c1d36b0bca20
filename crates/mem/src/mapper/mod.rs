//! The seam between linking and address spaces.

mod in_process;
mod key_pages;
mod posix;
mod remote;
mod resident;
mod shared;
mod view;
mod views;

pub use in_process::InProcessMapper;
pub use remote::RemoteMapper;
pub use shared::SharedMemoryMapper;
pub use view::StripedView;

use crate::{Error, WorkingMemory};
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt, PageSize};
use farlink_rpc::{CallError, Pending};
use farlink_wire::functions::Expected;
use farlink_wire::msg::{ActionPair, MemoryUsage};
use std::collections::BTreeMap;

/// Reserves executor memory, gives working memory for parts of it, and moves those parts through their life.
///
/// A caller prepares only what it has reserved, finalizes what it has prepared, and deallocates what has been
/// finalized; operations on different ranges may run at once. An operation that is given back as [`Pending`] is under
/// way already; waiting for it only tells its outcome. No lock is held while an operation is under way.
pub trait MemoryMapper: Send + Sync {
    /// Returns the executor's page size.
    fn page_size(&self) -> PageSize;

    /// Reserves at least `bytes` of executor address space: whole pages, zero, writable to the executor.
    ///
    /// If the result is dropped instead of waited for, what was reserved is never used and lasts as long as the
    /// session: only its answer tells where it is.
    fn reserve(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>>;

    /// As [`Self::reserve`], for one allocation that is too large for stripes of the usual lengths: if there are stripes,
    /// they have room for `needs`, and not for much more.
    fn reserve_for(&self, bytes: u64, needs: StripeBytes) -> Pending<Result<ExecutorAddrRange, Error>> {
        let _ = needs;
        self.reserve(bytes)
    }

    /// Returns working memory for `range`, which is part of a reservation. It is zero if the range has not been
    /// allocated before, or has been deallocated since.
    ///
    /// # Errors
    ///
    /// Fails if the range is not inside one reservation, or there is no physical memory for it.
    fn prepare(&self, range: ExecutorAddrRange) -> Result<WorkingMemory, Error>;

    /// Makes sure that all of `range`, which is part of a reservation, can be written by the executor: also what has no
    /// content, and so is not prepared. Memory of the executor's own needs nothing.
    ///
    /// # Errors
    ///
    /// Fails if the range is not inside one reservation, or there is no physical memory for it.
    fn secure(&self, range: ExecutorAddrRange) -> Result<(), Error> {
        let _ = range;
        Ok(())
    }

    /// Returns the parts of a reservation that have one protection for their whole life, if it has such: allocations are
    /// packed in them, at their own alignment, and finalizing changes no protection. Without stripes allocations are
    /// whole pages, protected when they are finalized.
    fn stripes(&self, reservation: ExecutorAddr) -> Vec<StripeRange> {
        let _ = reservation;
        Vec::new()
    }

    /// Returns this process's view of a reservation with stripes, if that is all that an allocation there needs: with it ranges
    /// are prepared and recycled without this mapper, and only allocations with actions are finalized and deallocated.
    fn striped_view(&self, reservation: ExecutorAddr) -> Option<StripedView> {
        let _ = reservation;
        None
    }

    /// Returns whether a reservation is for one allocation, which begins where it begins and ends it when it is
    /// deallocated: all that some executors offer.
    fn is_exclusive(&self) -> bool {
        false
    }

    /// Reserves at least `bytes` for buffers: memory that both processes read and write for as long as they like, and that
    /// children of the executor share. Nothing in it is finalized.
    ///
    /// Fails with [`Error::NotShared`] unless an implementation shares memory.
    fn reserve_buffers(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        let _ = bytes;
        Pending::ready(Err(Error::NotShared))
    }

    /// Returns memory that shows what the executor has in `range` and can be read and written at any time, also when the
    /// range has been finalized; none if there is no such view.
    fn view(&self, range: ExecutorAddrRange) -> Option<WorkingMemory> {
        let _ = range;
        None
    }

    /// Returns whether reservations are still there when an executor has gone, for another: then what the one that has gone
    /// was asked to finalize is nowhere.
    fn outlives_executors(&self) -> bool {
        false
    }

    /// Returns what the reservations take of the system: nothing, unless an implementation says otherwise.
    fn usage(&self) -> Pending<Result<MapperUsage, Error>> {
        Pending::ready(Ok(MapperUsage::default()))
    }

    /// Makes ranges that have been deallocated or were never finalized ready for others, as far as that has not been done:
    /// data is zero, and code in stripes is instructions that trap.
    fn recycle(&self, segments: &[(AllocGroup, ExecutorAddrRange)]) {
        let _ = segments;
    }

    /// As [`Self::recycle`], and gives the physical memory of whole pages of data back to the system, if it can.
    fn discard(&self, segments: &[(AllocGroup, ExecutorAddrRange)]) {
        self.recycle(segments);
    }

    /// Makes allocations what they are to be, all or none: content in place, protections applied, finalize actions
    /// run. Gives the key of each, its lowest address. On failure the ranges are as they were reserved.
    fn finalize(&self, allocations: Vec<FinalizeRequest>) -> Pending<Result<Vec<ExecutorAddr>, Error>>;

    /// Runs the dealloc actions of allocations, the last first, and makes their ranges as they were reserved.
    fn deallocate(&self, keys: Vec<ExecutorAddr>) -> Pending<Result<(), Error>>;

    /// Ends reservations, with whatever is still allocated in them.
    fn release(&self, bases: Vec<ExecutorAddr>) -> Pending<Result<(), Error>>;
}

/// A part of a reservation, with its protection.
pub type StripeRange = (MemProt, ExecutorAddrRange);

/// What the reservations of a mapper take of the system.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MapperUsage {
    /// Bytes of physical memory behind them, each byte once however many processes map it.
    pub committed_bytes: u64,
    /// Mappings in this process, as far as they are not the executor's.
    pub controller_mappings: u64,
    /// Mappings in the executor, guards included; none if it does not tell.
    pub executor_mappings: Option<u64>,
    /// System calls that the memory layer has made in the executor's process since it started, by name; none if it does
    /// not tell.
    pub executor_system_calls: Vec<(String, u64)>,
}

/// What an allocation needs of each stripe, in bytes: whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StripeBytes {
    /// Of that of code.
    pub code: u64,
    /// Of that of read-only data.
    pub read_only: u64,
    /// Of that of data.
    pub data: u64,
}

/// An allocation to finalize.
#[derive(Clone, Debug)]
pub struct FinalizeRequest {
    /// Base of the reservation that the segments are in.
    pub reservation: ExecutorAddr,
    /// The segments, each of which begins at a page boundary unless it is in a stripe.
    pub segments: Vec<FinalizeSegment>,
    /// The actions.
    pub actions: Vec<ActionPair>,
}

/// A segment of an allocation.
#[derive(Clone, Debug)]
pub struct FinalizeSegment {
    /// Protection and lifetime.
    pub group: AllocGroup,
    /// Its addresses, zero fill included.
    pub range: ExecutorAddrRange,
    /// Length of the content in bytes; what the range has beyond it is zero.
    pub content_bytes: u64,
    /// The content, of at least that length.
    pub working: WorkingMemory,
}

impl FinalizeRequest {
    /// Checks the lengths of the segments, and returns the key that the allocation will have.
    fn key(&self) -> Result<ExecutorAddr, Error> {
        for FinalizeSegment { range, content_bytes: content, working, .. } in &self.segments {
            if *content > range.len() {
                return Err(Error::ContentTooLong { addr: range.start(), content: *content, size: range.len() });
            }
            if *content > working.len() {
                return Err(Error::OutOfBounds { offset: 0, len: *content, size: working.len() });
            }
        }
        self.lowest().ok_or(Error::NoSegments)
    }

    fn lowest(&self) -> Option<ExecutorAddr> {
        self.segments.iter().map(|segment| segment.range.start()).min()
    }
}

/// Reservations by base, looked up by any range inside.
struct Reservations<T>(BTreeMap<ExecutorAddr, (ExecutorAddrRange, T)>);

impl<T> Default for Reservations<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Reservations<T> {
    /// Adds a reservation that an executor claims to have made.
    fn add(&mut self, range: ExecutorAddrRange, value: T) -> Result<(), Error> {
        let below = self.0.range(..range.end()).next_back();
        if let Some((_, (other, _))) = below.filter(|(_, (other, _))| other.overlaps(range)) {
            return Err(bad_answer("reserve", format!("{range} overlaps the earlier reservation {other}")));
        }
        self.0.insert(range.start(), (range, value));
        Ok(())
    }

    /// Returns whether a reservation begins at `base`.
    fn has(&self, base: ExecutorAddr) -> bool {
        self.0.contains_key(&base)
    }

    /// Returns the reservation that has all of `range`.
    fn around(&self, range: ExecutorAddrRange) -> Result<&(ExecutorAddrRange, T), Error> {
        let below = self.0.range(..=range.start()).next_back().map(|(_, reservation)| reservation);
        below.filter(|(around, _)| around.contains_range(range)).ok_or(Error::OutsideReservation(range))
    }

    /// Takes out the reservations with these bases, or changes nothing.
    fn remove(&mut self, bases: &[ExecutorAddr]) -> Result<Vec<(ExecutorAddrRange, T)>, Error> {
        if let Some(&unknown) = bases.iter().find(|base| !self.0.contains_key(base)) {
            return Err(Error::UnknownReservation(unknown));
        }
        let mut removed = Vec::with_capacity(bases.len());
        for base in bases {
            // A base given twice is found once.
            removed.extend(self.0.remove(base));
        }
        Ok(removed)
    }
}

/// Checks a range that an executor claims to have reserved.
fn check_reserved(base: ExecutorAddr, bytes: u64, page_size: PageSize) -> Result<ExecutorAddrRange, Error> {
    if base.is_null() || !base.is_aligned(page_size.align()) {
        return Err(bad_answer("reserve", format!("{base} is not the address of a page")));
    }
    let range = page_size.round_up(bytes).and_then(|bytes| ExecutorAddrRange::from_len(base, bytes));
    let range = range.filter(|range| !range.is_empty());
    range.ok_or_else(|| {
        bad_answer("reserve", format!("{bytes} bytes at {base} are nothing or pass the end of the address space"))
    })
}

/// Checks the keys that an executor gives to allocations.
fn check_keys(keys: Vec<ExecutorAddr>, wanted: &[ExecutorAddr]) -> Result<Vec<ExecutorAddr>, Error> {
    if keys == wanted {
        Ok(keys)
    } else {
        Err(bad_answer("initialize", format!("keys {keys:?} instead of {wanted:?}")))
    }
}

/// Waits for initialize calls, all of which have been sent; if one fails, `undo` gets the keys of those that did not.
fn undo_unless_all(
    calls: Vec<Pending<Result<Expected<ExecutorAddr>, CallError>>>,
    undo: impl FnOnce(Vec<ExecutorAddr>) + Send + 'static,
) -> Pending<Result<Vec<ExecutorAddr>, Error>> {
    // Every call's outcome is wanted, so none of them is an error to `all`.
    let outcomes = calls.into_iter().map(|call| call.map(Ok::<_, std::convert::Infallible>)).collect();
    Pending::all(outcomes).map(move |outcomes| {
        let Ok(outcomes) = outcomes;
        let mut keys = Vec::with_capacity(outcomes.len());
        let mut failure = None;
        for outcome in outcomes {
            match outcome.map_err(Error::from).and_then(|answer| answer.map_err(refused("finalize memory"))) {
                Ok(key) => keys.push(key),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        match failure {
            None => Ok(keys),
            Some(error) => {
                if !keys.is_empty() {
                    undo(keys);
                }
                Err(error)
            }
        }
    })
}

/// Adds what an executor says of itself to what is known here.
fn executor_usage(own: MapperUsage, answer: Expected<MemoryUsage>) -> Result<MapperUsage, Error> {
    let told = answer.map_err(refused("examine its memory"))?;
    Ok(MapperUsage { executor_mappings: Some(told.mappings), executor_system_calls: told.system_calls, ..own })
}

fn bad_answer(what: &'static str, text: String) -> Error {
    Error::BadAnswer { what, text }
}

fn refused(what: &'static str) -> impl FnOnce(String) -> Error {
    move |text| Error::Refused { what, text }
}
