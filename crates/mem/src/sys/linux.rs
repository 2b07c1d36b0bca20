//! Linux: mappings, their protection and their pages, and POSIX shared memory objects.

use crate::Error;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange, MemProt, PageSize};
use farlink_wire::msg::Stripe;
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, SealFlags, StatVfsMountFlags, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use rustix::shm;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
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

    /// Reserves `len` bytes of address space and maps each stripe of a shared memory object at its offset, with its
    /// protection for good. What is between stripes cannot be accessed.
    ///
    /// Protections are set by mapping and not by changing them, which a hardened process refuses.
    pub(crate) fn striped(object: impl AsFd, len: usize, stripes: &[Stripe]) -> Result<Self, Errno> {
        // SAFETY: as in `private`.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let mapping = Self::new(start, len, true);
        for stripe in stripes {
            let addr = mapping.range().start().checked_add(stripe.offset).ok_or(Errno::INVAL)?;
            let range = ExecutorAddrRange::from_len(addr, stripe.size).ok_or(Errno::INVAL)?;
            let target = mapping.inside(range)?;
            let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
            let prot = ProtFlags::from_bits_truncate(prot_flags(stripe.group.prot).bits());
            // SAFETY: the range is inside the reservation made above, of which nobody knows yet.
            unsafe {
                rustix::mm::mmap(target.cast(), stripe.size as usize, prot, flags, object.as_fd(), stripe.offset)
            }?;
        }
        Ok(mapping)
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
        let start = self.inside(range)?;
        // SAFETY: the range is inside this mapping, to whose bytes no reference exists. Whether code may still use
        // them as they were protected is for the owner of the allocation to know.
        unsafe { rustix::mm::mprotect(start.cast(), range.len() as usize, prot_flags(prot)) }
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
        // SAFETY: this mapping is not used after its drop. Working memory keeps it alive; code in it is the owner's.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "unmapping a mapping of our own cannot fail");
    }
}

/// Memory behind a descriptor, to be mapped by several processes: a POSIX shared memory object, or one without a name.
#[derive(Debug)]
pub(crate) struct SharedObject {
    fd: OwnedFd,
    /// Whether it is on a file system that may be full: see [`Self::secure`].
    is_limited: bool,
}

impl SharedObject {
    /// Creates an object of `bytes` zero bytes that has no name and keeps its size: `memfd_create(2)`, sealed.
    ///
    /// No name can be left, or opened by another process, and nobody can make the pages of somebody else's mapping
    /// vanish.
    pub(crate) fn nameless(bytes: u64) -> Result<Self, Errno> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // The file is never executed as a program, which some systems demand to be said; mapped code may still run.
        // Kernels before 6.3 do not know the flag.
        let fd = match memfd_create("farlink", flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => memfd_create("farlink", flags),
            other => other,
        }?;
        rustix::fs::ftruncate(&fd, bytes)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Self { fd, is_limited: false })
    }

    /// Returns the object behind a descriptor that another process has sent.
    pub(crate) fn received(fd: OwnedFd) -> Self {
        Self { fd, is_limited: false }
    }

    /// Returns the descriptor.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

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
        let created = Self { fd, is_limited: true }.checked(name, bytes);
        if created.is_err() {
            Self::unlink(name);
        }
        created.map(Some)
    }

    /// Checks that code can run from the file system, and sets the size.
    fn checked(self, name: &str, bytes: u64) -> Result<Self, Error> {
        let flags = rustix::fs::fstatvfs(&self.fd).map(|stat| stat.f_flag);
        if flags.is_ok_and(|flags| flags.contains(StatVfsMountFlags::NOEXEC)) {
            return Err(Error::shared(name, "executed", "/dev/shm is mounted noexec"));
        }
        rustix::fs::ftruncate(&self.fd, bytes).map_err(|error| Error::shared(name, "sized", describe(error)))?;
        Ok(self)
    }

    /// Opens the object `name` and removes the name, whether or not it could be opened.
    pub(crate) fn take(name: &str) -> Result<Self, Error> {
        // A link would lead to a file that is no shared memory object. `rustix` passes flags on as they are.
        let no_follow = shm::OFlags::from_bits_retain(rustix::fs::OFlags::NOFOLLOW.bits());
        let opened = shm::open(name, shm::OFlags::RDWR | no_follow, Mode::empty());
        Self::unlink(name);
        opened.map(|fd| Self { fd, is_limited: true }).map_err(|error| Error::shared(name, "opened", describe(error)))
    }

    /// Removes the name, if it is there. `shm_unlink(3)`.
    pub(crate) fn unlink(name: &str) {
        let _ = shm::unlink(name);
    }

    /// Returns the size in bytes.
    pub(crate) fn len(&self) -> Result<u64, Errno> {
        Ok(u64::try_from(rustix::fs::fstat(&self.fd)?.st_size).unwrap_or(0))
    }

    /// Makes sure that the pages of a range can be written: without this, writing when the file system is full is a
    /// SIGBUS. `fallocate(2)`.
    pub(crate) fn secure(&self, offset: u64, bytes: u64) -> Result<(), Errno> {
        if !self.is_limited {
            return Ok(());
        }
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), offset, bytes))
    }

    pub(crate) fn map(&self, len: usize) -> Result<Mapping, Errno> {
        Mapping::shared(&self.fd, len)
    }

    pub(crate) fn map_stripes(&self, len: usize, stripes: &[Stripe]) -> Result<Mapping, Errno> {
        Mapping::striped(&self.fd, len, stripes)
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

    /// An object without a name is one memory to all who map it, and keeps its size.
    #[test]
    fn nameless_objects_keep_their_size() {
        let page = page_size().bytes();
        let object = SharedObject::nameless(page).unwrap();
        let other = SharedObject::received(object.as_fd().try_clone_to_owned().unwrap());
        let (one, two) = (object.map(page as usize).unwrap(), other.map(page as usize).unwrap());
        one.write(one.range().start(), b"x").unwrap();
        // SAFETY: the first byte of the mapping is readable.
        assert_eq!(unsafe { two.start().as_ptr().read_volatile() }, b'x');
        for bytes in [0, 2 * page] {
            assert_eq!(rustix::fs::ftruncate(&other.fd, bytes), Err(Errno::PERM));
        }
        one.protect(one.range(), MemProt::RX).unwrap();
        two.discard(two.range()).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { one.start().as_ptr().read_volatile() }, 0);
    }
}
