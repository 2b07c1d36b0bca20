//! Linux: mappings, their protection and their pages, and POSIX shared memory objects.

use crate::Error;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange, MemProt, PageSize};
use rustix::fs::{FallocateFlags, Mode, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use rustix::shm;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

/// Returns the page size of this process.
pub(crate) fn page_size() -> PageSize {
    PageSize::new(rustix::param::page_size() as u64).expect("Linux has page sizes that are powers of two from 4096")
}

/// Memory of this process that one `mmap` made. Unmapped when dropped.
///
/// Other code, linked code above all, may read and write it at any time, so no reference to its bytes is ever made.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    is_shared: bool,
}

// SAFETY: a mapping belongs to the process, not to a thread. Its bytes are only reached by raw pointers, whose users
// answer for races; the fields do not change.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` fresh bytes, zero, readable and writable, which take physical memory only as they are touched.
    pub(crate) fn private(len: usize) -> Result<Self, Errno> {
        // SAFETY: no address is asked for, so no mapping that exists is replaced.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        Ok(Self::new(start, len, false))
    }

    /// Maps the first `len` bytes of a shared memory object, readable and writable.
    pub(crate) fn shared(object: impl AsFd, len: usize) -> Result<Self, Errno> {
        // SAFETY: as in `private`.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                object,
                0,
            )
        }?;
        Ok(Self::new(start, len, true))
    }

    fn new(start: *mut core::ffi::c_void, len: usize, is_shared: bool) -> Self {
        let start = NonNull::new(start.cast()).expect("Linux maps nothing at null unless asked to");
        Self { start, len, is_shared }
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
    fn inside(&self, range: ExecutorAddrRange) -> Result<*mut u8, Errno> {
        if !self.range().contains_range(range) {
            return Err(Errno::FAULT);
        }
        let offset = range.start().as_u64() - self.range().start().as_u64();
        Ok(self.start.as_ptr().wrapping_add(offset as usize))
    }

    /// Sets the protection of whole pages. `mprotect(2)`.
    pub(crate) fn protect(&self, range: ExecutorAddrRange, prot: MemProt) -> Result<(), Errno> {
        let flags = [
            (MemProt::READ, MprotectFlags::READ),
            (MemProt::WRITE, MprotectFlags::WRITE),
            (MemProt::EXEC, MprotectFlags::EXEC),
        ];
        let flags = flags.iter().filter(|(bit, _)| prot.contains(*bit)).map(|&(_, flag)| flag).collect();
        let start = self.inside(range)?;
        // SAFETY: the range is inside this mapping, to whose bytes no reference exists. Whether code may still use
        // them as they were protected is for the owner of the allocation to know.
        unsafe { rustix::mm::mprotect(start.cast(), range.len() as usize, flags) }
    }

    /// Gives the physical pages of `range`, which is whole writable pages, back to the system: they read as zero from
    /// now on, here and wherever else the memory is shared. `madvise(2)`.
    pub(crate) fn discard(&self, range: ExecutorAddrRange) -> Result<(), Errno> {
        let advice = if self.is_shared { Advice::LinuxRemove } else { Advice::LinuxDontNeed };
        let start = self.inside(range)?;
        // SAFETY: the range is inside this mapping, to whose bytes no reference exists.
        unsafe { rustix::mm::madvise(start.cast(), range.len() as usize, advice) }
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

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this mapping is not used after its drop. Working memory keeps it alive; code in it is the owner's.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "unmapping a mapping of our own cannot fail");
    }
}

/// A POSIX shared memory object.
#[derive(Debug)]
pub(crate) struct SharedObject(OwnedFd);

impl SharedObject {
    /// Creates the object `name` (with a leading slash) of `bytes` zero bytes. `shm_open(3)`, `ftruncate(2)`.
    ///
    /// Gives nothing if the name is another object's. On failure no name is left.
    pub(crate) fn create(name: &str, bytes: u64) -> Result<Option<Self>, Error> {
        let flags = shm::OFlags::CREATE | shm::OFlags::EXCL | shm::OFlags::RDWR;
        let fd = match shm::open(name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => fd,
            Err(Errno::EXIST) => return Ok(None),
            Err(error) => return Err(Error::shared(name, "created", describe(error))),
        };
        let created = Self(fd).checked(name, bytes);
        if created.is_err() {
            Self::unlink(name);
        }
        created.map(Some)
    }

    /// Checks that code can run from the file system, and sets the size.
    fn checked(self, name: &str, bytes: u64) -> Result<Self, Error> {
        let flags = rustix::fs::fstatvfs(&self.0).map(|stat| stat.f_flag);
        if flags.is_ok_and(|flags| flags.contains(StatVfsMountFlags::NOEXEC)) {
            return Err(Error::shared(name, "executed", "/dev/shm is mounted noexec"));
        }
        rustix::fs::ftruncate(&self.0, bytes).map_err(|error| Error::shared(name, "sized", describe(error)))?;
        Ok(self)
    }

    /// Opens the object `name` and removes the name, whether or not it could be opened.
    pub(crate) fn take(name: &str) -> Result<Self, Error> {
        // A link would lead to a file that is no shared memory object. `rustix` passes flags on as they are.
        let no_follow = shm::OFlags::from_bits_retain(rustix::fs::OFlags::NOFOLLOW.bits());
        let opened = shm::open(name, shm::OFlags::RDWR | no_follow, Mode::empty());
        Self::unlink(name);
        opened.map(Self).map_err(|error| Error::shared(name, "opened", describe(error)))
    }

    /// Removes the name, if it is there. `shm_unlink(3)`.
    pub(crate) fn unlink(name: &str) {
        let _ = shm::unlink(name);
    }

    /// Returns the size in bytes.
    pub(crate) fn len(&self) -> Result<u64, Errno> {
        Ok(u64::try_from(rustix::fs::fstat(&self.0)?.st_size).unwrap_or(0))
    }

    /// Makes sure that the pages of a range can be written: without this, writing when the file system is full is a
    /// SIGBUS. `fallocate(2)`.
    pub(crate) fn secure(&self, offset: u64, bytes: u64) -> Result<(), Errno> {
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.0, FallocateFlags::empty(), offset, bytes))
    }

    pub(crate) fn map(&self, len: usize) -> Result<Mapping, Errno> {
        Mapping::shared(&self.0, len)
    }
}

/// Returns what an error means for shared memory, where the system's words would not say.
fn describe(error: Errno) -> String {
    match error {
        Errno::NOSPC => "/dev/shm is full".to_owned(),
        Errno::NOENT => "/dev/shm is not there, or the name is gone".to_owned(),
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Discarded pages read as zero again, in private memory and in both views of shared memory.
    #[test]
    fn discarded_pages_are_zero() {
        let name = format!("/farlink_{}_sys_test", std::process::id());
        let page = page_size().bytes();
        let object = SharedObject::create(&name, page).unwrap().unwrap();
        let other = SharedObject::take(&name).unwrap();
        assert_eq!(other.len().unwrap(), page);
        for mapping in [Mapping::private(page as usize).unwrap(), object.map(page as usize).unwrap()] {
            let range = mapping.range();
            mapping.write(range.start(), b"content").unwrap();
            mapping.discard(range).unwrap();
            // SAFETY: the first byte of the mapping is readable.
            assert_eq!(unsafe { mapping.start().as_ptr().read_volatile() }, 0);
            assert_eq!(mapping.write(range.end(), b"x"), Err(Errno::FAULT));
        }
        assert!(SharedObject::take(&name).is_err());
    }
}
