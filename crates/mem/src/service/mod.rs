//! The executor's side of memory: slabs, and the allocations finalized in them.
//!
//! A **slab** is a range that was reserved, to be freed as a whole. An **allocation** is a finalized range in a slab
//! with the dealloc actions to run when it goes. Both are kept apart: finalizing never makes or frees a slab.
//!
//! Every range is checked against a slab, start and end, before anything is done with it. No lock is held while
//! actions run: what an operation works on is marked busy, and another operation on the same thing is refused.

mod slabs;
mod system;

pub use system::{ChildCopy, ServiceUsage};

use crate::sys::{self, Data, Mapping, Place, SharedObject};
use crate::{Error, action};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange, MemProt, PageSize};
use farlink_wire::msg::{ActionPair, Segment, Stripe, WrapperFunctionCall};
use rustix::io::Errno;
use slabs::{Backing, Checked, Leaving, SharedName, Slab, State, Status};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Largest slab in bytes: as much address space as a process has on x86-64.
const MAX_SLAB_BYTES: u64 = 1 << 47;

/// How many names of shared memory objects are tried until one is free.
const MAX_NAMES_TRIED: usize = 1000;

/// What to finalize.
#[derive(Clone, Debug, Default)]
pub struct Allocation<'a> {
    /// Base of the slab that the segments have to be in; none if any will do.
    pub slab: Option<ExecutorAddr>,
    /// The segments. Their content is copied; for memory that is shared it is there already, and they carry none.
    pub segments: Vec<Segment<'a>>,
    /// The actions.
    pub actions: Vec<ActionPair>,
}

/// The slabs and allocations of one session, in the process that has the memory.
///
/// Whatever is left when it is dropped is torn down as by [`MemoryService::shut_down`].
#[derive(Debug)]
pub struct MemoryService {
    page_size: PageSize,
    /// What is reserved ends below this address; 0 is no limit.
    limit: AtomicU64,
    state: Mutex<State>,
}

impl Default for MemoryService {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryService {
    /// Returns a service without slabs.
    #[must_use]
    pub fn new() -> Self {
        Self { page_size: sys::page_size(), limit: AtomicU64::new(0), state: Mutex::default() }
    }

    /// Returns the page size of this process.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic half-way through a change runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves whole pages of at least `bytes`: private memory, readable and writable until it is finalized.
    ///
    /// # Errors
    ///
    /// Fails if the size is 0 or more than an address space has, or the system has no room for it.
    pub fn reserve_private(&self, bytes: u64) -> Result<ExecutorAddrRange, Error> {
        let bytes = self.slab_bytes(bytes)?;
        let mapping = Mapping::private(bytes as usize, self.place()).map_err(|_| Error::OutOfAddressSpace { bytes })?;
        self.add_slab(mapping, Backing::Private { object: None }, &[])
    }

    /// As [`Self::reserve_private`], of memory with stripes, each of which has its protection for good. What can be
    /// written is memory of this process's own, unless children share it; the rest has a second view to write it by.
    pub(crate) fn reserve_in_two_views(
        &self,
        bytes: u64,
        stripes: &[Stripe],
    ) -> Result<(ExecutorAddrRange, Arc<Mapping>), Error> {
        let bytes = self.slab_bytes(bytes)?;
        slabs::check_stripes(stripes, bytes, self.page_size)?;
        let object = SharedObject::nameless(bytes).map_err(|error| nameless_error(error, bytes))?;
        let no_space = |_| Error::OutOfAddressSpace { bytes };
        let mapping = object.map_stripes(bytes as usize, stripes, Data::Own, self.place()).map_err(no_space)?;
        let view = object.map(bytes as usize, Place::Anywhere).map_err(no_space)?;
        let range = self.add_slab(mapping, Backing::Private { object: Some(object) }, stripes)?;
        Ok((range, Arc::new(view)))
    }

    /// As [`Self::reserve_private`], of memory behind a POSIX shared memory object; gives its name too.
    ///
    /// The pages are readable and writable from the start: LLVM 19's controllers have code look at memory before it is
    /// finalized. Whoever opens the object removes its name.
    ///
    /// # Errors
    ///
    /// As [`Self::reserve_private`]; also fails if `/dev/shm` cannot be used. Then no name is left.
    pub fn reserve_shared(&self, bytes: u64) -> Result<(ExecutorAddrRange, String), Error> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let bytes = self.slab_bytes(bytes)?;
        let names = || format!("/farlink_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        // A process that had this number before may have left names.
        let created = std::iter::repeat_with(names)
            .take(MAX_NAMES_TRIED)
            .find_map(|name| Some(SharedObject::create(&name, bytes).transpose()?.map(|object| (object, name))));
        let (object, name) = created.unwrap_or_else(|| Err(Error::shared("/farlink_*", "created", Errno::EXIST)))?;
        let guard = SharedName(name.clone());
        let mapping = object.map(bytes as usize, self.place()).map_err(|_| Error::OutOfAddressSpace { bytes })?;
        Ok((self.add_slab(mapping, Backing::Shared { object, copies_data: false, _name: Some(guard) }, &[])?, name))
    }

    /// As [`Self::reserve_private`], of memory behind a descriptor that the controller has sent and has mapped too.
    ///
    /// With stripes, each is mapped with its protection for good; allocations in them are not page by page, and are only
    /// made known here if they have actions.
    ///
    /// With `base`, the memory is there or nowhere, and this process has its own copy of each page of data that it
    /// writes: see [`Self::renew`]. What children share is not copied.
    ///
    /// # Errors
    ///
    /// As [`Self::reserve_private`]; also fails if the object is smaller than `bytes` or cannot be mapped, the
    /// stripes are not whole pages, in order and apart, or something is at `base`.
    pub fn reserve_received(
        &self,
        object: OwnedFd,
        bytes: u64,
        stripes: &[Stripe],
        base: Option<ExecutorAddr>,
    ) -> Result<ExecutorAddrRange, Error> {
        let (data, place) = base.map_or((Data::Shared, self.place()), |base| (Data::Copied, Place::At(base)));
        let bytes = self.slab_bytes(bytes)?;
        slabs::check_stripes(stripes, bytes, self.page_size)?;
        let unknown = |error| Error::system("the object received cannot be examined", error);
        let object = SharedObject::received(object).map_err(unknown)?;
        let size = object.len().map_err(unknown)?;
        if size < bytes {
            return Err(Error::BadSize { what: "mapped of a smaller object", bytes });
        }
        let mapped = match stripes {
            [] => object.map(bytes as usize, place),
            stripes => object.map_stripes(bytes as usize, stripes, data, place),
        };
        let mapping = mapped.map_err(|error| match error {
            Errno::NOMEM => Error::OutOfAddressSpace { bytes },
            Errno::PERM => Error::system(
                "a locked executor maps no more code: it has to be reserved before it is locked",
                Errno::PERM,
            ),
            error => Error::system("the object received cannot be mapped", error),
        })?;
        let copies_data = matches!(data, Data::Copied);
        self.add_slab(mapping, Backing::Shared { object, copies_data, _name: None }, stripes)
    }

    /// Gives up this process's copies of pages of data, which are what their object has again.
    ///
    /// # Errors
    ///
    /// Fails if `pages` are not whole pages of data in a slab that this process has copies of.
    pub fn renew(&self, pages: ExecutorAddrRange) -> Result<(), Error> {
        let page = self.page_size.align();
        if !pages.start().is_aligned(page) || !page.is_aligned(pages.len()) {
            return Err(Error::Misaligned(pages.start()));
        }
        let mapping = {
            let mut state = self.lock();
            let slab = state.slab_around(pages, None)?;
            if !slab.copies(pages) {
                return Err(Error::OutsideReservation(pages));
            }
            Arc::clone(&slab.mapping)
        };
        mapping.renew(pages).map_err(|error| Error::system("data cannot be made as it was linked", error))
    }

    /// Places what is reserved from now on below `limit`; null is no limit.
    pub fn place_below(&self, limit: ExecutorAddr) {
        self.limit.store(limit.as_u64(), Ordering::Relaxed);
    }

    fn place(&self) -> Place {
        match ExecutorAddr::new(self.limit.load(Ordering::Relaxed)) {
            ExecutorAddr::NULL => Place::Anywhere,
            limit => Place::Below(limit),
        }
    }

    fn slab_bytes(&self, bytes: u64) -> Result<u64, Error> {
        let rounded = self.page_size.round_up(bytes).filter(|&bytes| bytes != 0 && bytes <= MAX_SLAB_BYTES);
        rounded.ok_or(Error::BadSize { what: "reserved", bytes })
    }

    fn add_slab(&self, mapping: Mapping, backing: Backing, stripes: &[Stripe]) -> Result<ExecutorAddrRange, Error> {
        let range = mapping.range();
        let stripes = slabs::stripe_ranges(range, stripes);
        let slab = Slab { mapping: Arc::new(mapping), backing, stripes, allocations: Default::default() };
        let mut state = self.lock();
        if state.is_shut_down {
            return Err(Error::ShutDown);
        }
        state.slabs.insert(range.start(), slab);
        Ok(range)
    }

    /// Returns whether `addr` is in a slab.
    #[must_use]
    pub fn is_reserved(&self, addr: ExecutorAddr) -> bool {
        self.lock().slab_around(ExecutorAddrRange::at(addr), None).is_ok()
    }

    /// Returns whether `key` is that of an allocation.
    #[must_use]
    pub fn has_allocation(&self, key: ExecutorAddr) -> bool {
        let mut state = self.lock();
        state.slab_around(ExecutorAddrRange::at(key), None).is_ok_and(|slab| slab.allocations.contains_key(&key))
    }

    /// Returns the mapping behind the slab that `range` is in, for working memory in this process.
    pub(crate) fn mapping_of(&self, range: ExecutorAddrRange) -> Result<Arc<Mapping>, Error> {
        let mut state = self.lock();
        let slab = state.slab_around(range, None)?;
        // Writing to pages that could not be made writable again would be a fault.
        let taken = slab.allocations.range(..range.end()).rev().map(|(_, record)| record);
        let overlapping = taken.take_while(|record| record.span.overlaps(range));
        if let Some(record) = { overlapping }.find(|record| matches!(record.status, Status::Lost)) {
            return Err(Error::Overlap(range, record.span));
        }
        Ok(Arc::clone(&slab.mapping))
    }

    /// Finalizes allocations, all or none: copies content, applies protections, runs finalize actions in order, and
    /// records dealloc actions. Gives the key of each, which is its lowest address.
    ///
    /// # Errors
    ///
    /// Fails if a range is not whole and free in one slab, if a protection cannot be applied, or if an action fails.
    /// Then the dealloc actions of what ran have run in reverse, the pages are zero and writable again, and nothing
    /// is recorded.
    pub fn initialize(&self, allocations: Vec<Allocation<'_>>) -> Result<Vec<ExecutorAddr>, Error> {
        let checked = self.check_all(allocations)?;
        let keys: Vec<_> = checked.iter().map(|checked| checked.key).collect();
        let ranges: Vec<_> = checked
            .iter()
            .map(|checked| {
                let segments = checked.segments.iter();
                let ranges: Vec<_> = segments.map(|(range, segment)| (*range, segment.group.prot)).collect();
                (Arc::clone(&checked.mapping), ranges)
            })
            .collect();
        let mut dealloc = Vec::with_capacity(checked.len());
        let mut failure = None;
        for allocation in checked {
            match apply(allocation) {
                Ok(calls) => dealloc.push(calls),
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        if let Some(error) = failure {
            let undone: Vec<_> =
                dealloc.into_iter().rev().filter_map(|calls| action::deallocate(calls).err()).collect();
            for (key, (mapping, ranges)) in keys.iter().zip(&ranges) {
                let is_reset = reset(mapping, ranges);
                self.lock().free(*key, is_reset);
            }
            return Err(if undone.is_empty() {
                error
            } else {
                Error::Actions(format!("{error}\n{}", undone.join("\n")))
            });
        }
        let unrecorded = self.lock().record(&keys, dealloc);
        if unrecorded.is_empty() {
            return Ok(keys);
        }
        // The service has been shut down while the actions ran, and knew nothing of them: they are undone here.
        let undone = unrecorded.into_iter().rev().filter_map(|calls| action::deallocate(calls).err()).collect();
        joined(undone).and(Err(Error::ShutDown))
    }

    /// Checks every allocation and marks its range busy, or changes nothing.
    fn check_all<'a>(&self, allocations: Vec<Allocation<'a>>) -> Result<Vec<Checked<'a>>, Error> {
        let mut state = self.lock();
        let mut checked: Vec<Checked<'a>> = Vec::with_capacity(allocations.len());
        for allocation in allocations {
            match state.check(allocation, self.page_size) {
                Ok(allocation) => checked.push(allocation),
                Err(error) => {
                    let keys: Vec<_> = checked.iter().map(|checked| checked.key).collect();
                    state.forget(&keys);
                    return Err(error);
                }
            }
        }
        Ok(checked)
    }

    /// Runs the dealloc actions of allocations, the last key's first, and gives their memory back to their slabs: zero
    /// and writable.
    ///
    /// # Errors
    ///
    /// Fails and changes nothing if a key is unknown, given twice or in use. If actions fail, all have run, the memory
    /// is given back, and the error joins their texts.
    pub fn deinitialize(&self, keys: &[ExecutorAddr]) -> Result<(), Error> {
        let leaving = self.lock().take_allocations(keys)?;
        let failed: Vec<_> = leaving.into_iter().rev().filter_map(|leaving| self.leave(leaving).err()).collect();
        joined(failed)
    }

    /// Runs what has to run for an allocation that goes, and frees its range.
    fn leave(&self, leaving: Leaving) -> Result<(), String> {
        let result = action::deallocate(leaving.dealloc);
        let is_reset = reset(&leaving.mapping, &leaving.segments);
        self.lock().free(leaving.key, is_reset);
        result
    }

    /// Ends slabs: deallocates what is left in them, the newest first, then unmaps them.
    ///
    /// # Errors
    ///
    /// Fails and changes nothing if a base is unknown, given twice, or has an allocation in use. If actions fail, all
    /// have run, the slabs are gone, and the error joins their texts.
    pub fn release(&self, bases: &[ExecutorAddr]) -> Result<(), Error> {
        let slabs = self.lock().take_slabs(bases)?;
        tear_down(slabs)
    }

    /// Ends everything: deallocates all allocations, the newest first, then unmaps all slabs. Later calls do nothing.
    ///
    /// # Errors
    ///
    /// If actions fail, all have run, everything is gone, and the error joins their texts.
    pub fn shut_down(&self) -> Result<(), Error> {
        let slabs = {
            let mut state = self.lock();
            state.is_shut_down = true;
            std::mem::take(&mut state.slabs)
        };
        tear_down(slabs.into_values().collect())
    }
}

impl Drop for MemoryService {
    fn drop(&mut self) {
        // Nobody is left to be told of actions that fail.
        let _ = self.shut_down();
    }
}

/// Fills and protects a checked allocation and runs its finalize actions; gives its dealloc actions.
fn apply(allocation: Checked<'_>) -> Result<Vec<WrapperFunctionCall>, Error> {
    for (range, segment) in &allocation.segments {
        let protect_error = |error| protect_error(*range, segment.group.prot, error);
        allocation.mapping.write(segment.addr, &segment.content.0).map_err(protect_error)?;
        if !range.is_empty() {
            allocation.mapping.protect(*range, segment.group.prot).map_err(protect_error)?;
        }
    }
    action::finalize(allocation.actions).map_err(Error::Actions)
}

/// Returns what it means that an object without a name could not be made.
pub(crate) fn nameless_error(error: Errno, bytes: u64) -> Error {
    match error {
        Errno::FBIG | Errno::INVAL => Error::BadSize { what: "reserved: a file cannot be that large", bytes },
        error => Error::system("memory without a name cannot be made", error),
    }
}

fn protect_error(range: ExecutorAddrRange, prot: MemProt, error: Errno) -> Error {
    let hint = match error {
        Errno::ACCESS => "; is /dev/shm mounted noexec, or executable memory forbidden?",
        Errno::NOMEM => "; is the limit vm.max_map_count reached?",
        _ => "",
    };
    Error::Protect { range, prot, text: format!("{error}{hint}") }
}

/// Makes ranges writable and zero again; gives whether that could be done.
///
/// A range that was valid to protect is valid to protect again. But it may need one more mapping in the kernel, and
/// their number is limited.
fn reset(mapping: &Mapping, ranges: &[(ExecutorAddrRange, MemProt)]) -> bool {
    let mut is_reset = true;
    for &(range, _) in ranges.iter().filter(|(range, _)| !range.is_empty()) {
        if mapping.protect(range, MemProt::RW).is_err() {
            is_reset = false;
        } else if mapping.discard(range).is_err() {
            zero_by_hand(mapping, range);
        }
    }
    is_reset
}

/// Zeroes pages that the system could not drop.
fn zero_by_hand(mapping: &Mapping, range: ExecutorAddrRange) {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut addr = range.start();
    while let Some(left) = range.end().offset_from(addr).filter(|&left| left > 0) {
        let len = left.min(ZEROS.len() as u64);
        // The range is inside the mapping.
        let _ = mapping.write(addr, &ZEROS[..len as usize]);
        addr = addr.checked_add(len).expect("the range ends within the address space");
    }
}

/// Deallocates what is left in slabs that are known to nobody any more, the newest first, and unmaps them.
fn tear_down(slabs: Vec<Slab>) -> Result<(), Error> {
    let mut left = Vec::new();
    let mut mappings = Vec::with_capacity(slabs.len());
    for slab in slabs {
        for record in slab.allocations.into_values() {
            if let Status::Live { number, dealloc } = record.status {
                left.push((number, dealloc));
            }
        }
        mappings.push((slab.mapping, slab.backing));
    }
    left.sort_by_key(|&(number, _)| std::cmp::Reverse(number));
    let failed = left.into_iter().filter_map(|(_, dealloc)| action::deallocate(dealloc).err()).collect();
    drop(mappings);
    joined(failed)
}

fn joined(failed: Vec<String>) -> Result<(), Error> {
    if failed.is_empty() { Ok(()) } else { Err(Error::Actions(failed.join("\n"))) }
}
