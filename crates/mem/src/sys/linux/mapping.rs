//! Mappings, their protection and their pages.

use crate::sys::count::{SystemCall, call};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_wire::msg::Stripe;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

/// Memory of this process that one `mmap` made. Unmapped when dropped.
///
/// Other code, linked code above all, may read and write it at any time, so no reference to its bytes is ever made.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    is_shared: bool,
    /// Whether a part of it stays mapped for as long as the process lives.
    is_sealed: AtomicBool,
}

// SAFETY: a mapping belongs to the process, not to a thread. Its bytes are only reached by raw pointers, whose users
// answer for races; the fields do not change.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` fresh bytes, zero, readable and writable, which take physical memory only as they are touched.
    pub(crate) fn private(len: usize, place: Place) -> Result<Self, Errno> {
        Ok(Self::new(anonymous(len, ProtFlags::READ | ProtFlags::WRITE, place)?, len, false))
    }

    /// Maps the first `len` bytes of a shared memory object, readable and writable.
    pub(crate) fn shared(object: impl AsFd, len: usize, place: Place) -> Result<Self, Errno> {
        let (prot, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        let start = map_at(len, place, |addr, flags| {
            // SAFETY: a mapping that exists is not replaced: `map_at` says so in the flags.
            unsafe { rustix::mm::mmap(addr, len, prot, shared | flags, object.as_fd(), 0) }
        })?;
        Ok(Self::new(start, len, true))
    }

    /// Reserves `len` bytes of address space and maps each stripe of a shared memory object at its offset, with its
    /// protection for good. What is after a stripe, up to the next, cannot be accessed.
    ///
    /// Stripes that can be written and are not shared with children are what `data` says.
    ///
    /// Protections are set by mapping and not by changing them, which a hardened process refuses.
    pub(crate) fn striped(
        object: impl AsFd,
        read_only: Option<BorrowedFd<'_>>,
        len: usize,
        stripes: &[Stripe],
        data: Data,
        place: Place,
    ) -> Result<Self, Errno> {
        let mapping = Self::new(anonymous(len, ProtFlags::empty(), place)?, len, !matches!(data, Data::Own));
        for (index, stripe) in stripes.iter().enumerate() {
            let end = stripes.get(index + 1).map_or(len as u64, |next| next.offset);
            let with_gap = end.checked_sub(stripe.offset).filter(|&size| size >= stripe.size).ok_or(Errno::INVAL)?;
            let target = mapping.part(stripe.offset, with_gap)?.cast();
            let prot = ProtFlags::from_bits_truncate(prot_flags(stripe.group.prot).bits());
            let flags = MapFlags::NORESERVE | MapFlags::FIXED;
            call(SystemCall::Mmap, || {
                let size = with_gap as usize;
                let data = Some(data).filter(|_| stripe.is_copied_on_fork());
                if let Some(Data::Own) = data {
                    // SAFETY: the range is inside the reservation made above, of which nobody knows yet.
                    return unsafe { rustix::mm::mmap_anonymous(target, size, prot, flags | MapFlags::PRIVATE) };
                }
                let is_copied = matches!(data, Some(Data::Copied));
                // What this process does not write in the object is mapped so that it never can.
                let read_only = read_only.filter(|_| is_copied || !stripe.group.prot.contains(MemProt::WRITE));
                let object = read_only.unwrap_or(object.as_fd());
                let flags = flags | if is_copied { MapFlags::PRIVATE } else { MapFlags::SHARED };
                // SAFETY: as above.
                unsafe { rustix::mm::mmap(target, size, prot, flags, object, stripe.offset) }
            })?;
            if with_gap > stripe.size {
                mapping.guard(stripe.offset + stripe.size, with_gap - stripe.size)?;
            }
        }
        Ok(mapping)
    }

    /// Makes whole pages inaccessible for good, if the system can without a mapping of their own, else with one.
    fn guard(&self, offset: u64, size: u64) -> Result<(), Errno> {
        /// `MADV_GUARD_INSTALL`, of Linux 6.15 for memory behind a descriptor.
        const GUARD_INSTALL: libc::c_int = 102;
        let (start, size) = (self.part(offset, size)?.cast(), size as usize);
        // SAFETY: the range is inside this mapping, of which nobody knows yet.
        let installed = call(SystemCall::Madvise, || match unsafe { libc::madvise(start, size, GUARD_INSTALL) } {
            0 => Ok(()),
            _ => Err(Errno::INVAL),
        });
        if installed.is_err() {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
            call(SystemCall::Mmap, || {
                // SAFETY: as above.
                unsafe { rustix::mm::mmap_anonymous(start, size, ProtFlags::empty(), flags) }
            })?;
        }
        Ok(())
    }

    /// Returns a pointer to `size` bytes at `offset` after checking that they are inside.
    fn part(&self, offset: u64, size: u64) -> Result<*mut u8, Errno> {
        let addr = self.range().start().checked_add(offset).ok_or(Errno::INVAL)?;
        self.inside(ExecutorAddrRange::from_len(addr, size).ok_or(Errno::INVAL)?)
    }

    fn new(start: *mut core::ffi::c_void, len: usize, is_shared: bool) -> Self {
        let start = NonNull::new(start.cast()).expect("Linux maps nothing at null unless asked to");
        Self { start, len, is_shared, is_sealed: AtomicBool::new(false) }
    }

    /// Returns the first byte.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Returns the addresses, in this process.
    pub(crate) fn range(&self) -> ExecutorAddrRange {
        let start = ExecutorAddr::new(self.start.as_ptr() as u64);
        ExecutorAddrRange::from_len(start, self.len as u64).expect("a mapping ends within the address space")
    }

    /// Returns a pointer to `range` after checking that it is inside.
    pub(super) fn inside(&self, range: ExecutorAddrRange) -> Result<*mut u8, Errno> {
        if !self.range().contains_range(range) {
            return Err(Errno::FAULT);
        }
        let offset = range.start().as_u64() - self.range().start().as_u64();
        Ok(self.start.as_ptr().wrapping_add(offset as usize))
    }

    /// Sets the protection of whole pages. `mprotect(2)`.
    pub(crate) fn protect(&self, range: ExecutorAddrRange, prot: MemProt) -> Result<(), Errno> {
        let start = self.inside(range)?;
        call(SystemCall::Mprotect, || {
            // SAFETY: the range is inside this mapping, to whose bytes no reference exists. Whether code may still use
            // them as they were protected is for the owner of the allocation to know.
            unsafe { rustix::mm::mprotect(start.cast(), range.len() as usize, prot_flags(prot)) }
        })
    }

    /// Has `range`, whole pages, stay as it is mapped for as long as the process lives. `mseal(2)`, of Linux 6.10.
    pub(crate) fn seal(&self, range: ExecutorAddrRange) -> Result<(), Errno> {
        const SYS_MSEAL: libc::c_long = 462;
        let start = self.inside(range)?;
        call(SystemCall::Mseal, || {
            // SAFETY: the range is inside this mapping; nothing about it changes.
            match unsafe { libc::syscall(SYS_MSEAL, start, range.len() as usize, 0usize) } {
                0 => Ok(()),
                _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::NOSYS)),
            }
        })?;
        self.is_sealed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Gives the physical pages of `range`, which is whole writable pages, back to the system: they read as zero from
    /// now on, here and wherever else the memory is shared. `madvise(2)`.
    pub(crate) fn discard(&self, range: ExecutorAddrRange) -> Result<(), Errno> {
        let advice = if self.is_shared { Advice::LinuxRemove } else { Advice::LinuxDontNeed };
        let start = self.inside(range)?;
        call(SystemCall::Madvise, || {
            // SAFETY: the range is inside this mapping, to whose bytes no reference exists.
            unsafe { rustix::mm::madvise(start.cast(), range.len() as usize, advice) }
        })
    }

    /// Gives up this process's own copies of the pages of `range`, which is whole pages of a stripe of [`Data::Copied`]: they
    /// are what the object has, again. `madvise(2)`.
    pub(crate) fn renew(&self, range: ExecutorAddrRange) -> Result<(), Errno> {
        let start = self.inside(range)?;
        call(SystemCall::Madvise, || {
            // SAFETY: the range is inside this mapping, to whose bytes no reference exists.
            unsafe { rustix::mm::madvise(start.cast(), range.len() as usize, Advice::LinuxDontNeed) }
        })
    }

    /// Has the system find physical memory for all pages that `range` touches, which costs less at once than page by page,
    /// and fails where a write would be a SIGBUS. Does nothing where the system cannot do it (before Linux 5.14).
    /// `madvise(2)`.
    pub(crate) fn populate(&self, range: ExecutorAddrRange) -> Result<(), Errno> {
        let page = crate::sys::page_size();
        let start = page.align().align_down(range.start().as_u64());
        let end = page.round_up(range.end().as_u64()).unwrap_or(u64::MAX).min(self.range().end().as_u64());
        let whole = ExecutorAddrRange::new(ExecutorAddr::new(start), ExecutorAddr::new(end)).ok_or(Errno::INVAL)?;
        let start = self.inside(whole)?;
        let populated = call(SystemCall::Madvise, || {
            // SAFETY: the range is inside this mapping; its content stays as it is.
            unsafe { rustix::mm::madvise(start.cast(), whole.len() as usize, Advice::LinuxPopulateWrite) }
        });
        populated.or_else(|error| if error == Errno::INVAL { Ok(()) } else { Err(error) })
    }

    /// Sets every byte of `range` to `value`.
    pub(crate) fn fill(&self, range: ExecutorAddrRange, value: u8) -> Result<(), Errno> {
        let start = self.inside(range)?;
        // SAFETY: the range is inside this mapping, to whose bytes no reference exists, and has been writable since it was
        // mapped: whoever fills it has a view to write by.
        unsafe { std::ptr::write_bytes(start, value, range.len() as usize) };
        Ok(())
    }

    /// Copies `bytes` to `addr`.
    pub(crate) fn write(&self, addr: ExecutorAddr, bytes: &[u8]) -> Result<(), Errno> {
        let range = ExecutorAddrRange::from_len(addr, bytes.len() as u64).ok_or(Errno::FAULT)?;
        let start = self.inside(range)?;
        // SAFETY: the range is inside this mapping, is writable until it is finalized, and does not overlap `bytes`,
        // which is a Rust slice of other memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len()) };
        Ok(())
    }
}

/// Maps `len` bytes of this process's own, which take physical memory only as they are touched.
fn anonymous(len: usize, prot: ProtFlags, place: Place) -> Result<*mut core::ffi::c_void, Errno> {
    map_at(len, place, |addr, flags| {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | flags;
        // SAFETY: a mapping that exists is not replaced: `map_at` says so in the flags.
        unsafe { rustix::mm::mmap_anonymous(addr, len, prot, flags) }
    })
}

/// Where a mapping goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// Wherever the system has room.
    Anywhere,
    /// Where it ends below this address.
    Below(ExecutorAddr),
    /// At this address, if nothing is there.
    At(ExecutorAddr),
}

/// What stripes of data are to a process that maps an object in stripes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Data {
    /// The object's memory, which all who have mapped it write.
    Shared,
    /// Memory of this process alone, zero at first.
    Own,
    /// This process's copy of the object's memory: of each page, from when it first writes it.
    Copied,
}

/// Where mappings with a limit are tried: from here on, in steps.
const FIRST_PLACE: usize = 256 << 20;
const PLACE_STEP: usize = 64 << 20;

/// Makes a mapping by `map`, which is called with an address and with flags that keep it from replacing another.
fn map_at(
    len: usize,
    place: Place,
    map: impl Fn(*mut core::ffi::c_void, MapFlags) -> Result<*mut core::ffi::c_void, Errno>,
) -> Result<*mut core::ffi::c_void, Errno> {
    let at = |start: usize| {
        let start: *mut core::ffi::c_void = std::ptr::without_provenance_mut(start);
        match call(SystemCall::Mmap, || map(start, MapFlags::FIXED_NOREPLACE))? {
            mapped if mapped == start => Ok(mapped),
            // Systems before Linux 4.17 take the address for a hint.
            elsewhere => {
                // SAFETY: this is the mapping made just now, of which nobody knows.
                call(SystemCall::Munmap, || unsafe { rustix::mm::munmap(elsewhere, len) })?;
                Err(Errno::EXIST)
            }
        }
    };
    let limit = match place {
        Place::Anywhere => return call(SystemCall::Mmap, || map(std::ptr::null_mut(), MapFlags::empty())),
        Place::At(start) => return at(start.as_u64() as usize),
        Place::Below(limit) => limit,
    };
    let last = (limit.as_u64() as usize).checked_sub(len).ok_or(Errno::NOMEM)?;
    for start in (FIRST_PLACE..=last).step_by(PLACE_STEP) {
        match at(start) {
            Err(Errno::EXIST) => {}
            other => return other,
        }
    }
    Err(Errno::NOMEM)
}

fn prot_flags(prot: MemProt) -> MprotectFlags {
    let flags = [
        (MemProt::READ, MprotectFlags::READ),
        (MemProt::WRITE, MprotectFlags::WRITE),
        (MemProt::EXEC, MprotectFlags::EXEC),
    ];
    flags.iter().filter(|(bit, _)| prot.contains(*bit)).map(|&(_, flag)| flag).collect()
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.is_sealed.load(Ordering::Relaxed) {
            return;
        }
        let unmapped = call(SystemCall::Munmap, || {
            // SAFETY: this mapping is not used after its drop. Working memory keeps it alive; code in it is the owner's.
            unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) }
        });
        debug_assert!(unmapped.is_ok(), "unmapping a mapping of our own cannot fail");
    }
}
