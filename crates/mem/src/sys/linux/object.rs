//! Shared memory objects: POSIX ones, and those without a name.

use super::mapping::{Data, Mapping, Place};
use crate::Error;
use crate::sys::count::{SystemCall, call};
use farlink_wire::msg::Stripe;
use rustix::fs::{
    FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags, SeekFrom, Stat, StatVfsMountFlags, memfd_create,
};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use rustix::shm;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Memory behind a descriptor, to be mapped by several processes: a POSIX shared memory object, or one without a name.
#[derive(Debug)]
pub(crate) struct SharedObject {
    pub(super) fd: OwnedFd,
    /// Whether it is on a file system that may be full: see [`Self::secure`].
    is_limited: bool,
    /// Its file system and its number there.
    identity: (u64, u64),
}

impl SharedObject {
    /// Creates an object of `bytes` zero bytes that has no name and keeps its size: `memfd_create(2)`, sealed.
    ///
    /// No name can be left, or opened by another process, and nobody can make the pages of somebody else's mapping
    /// vanish.
    pub(crate) fn nameless(bytes: u64) -> Result<Self, Errno> {
        Self::make(bytes, true)
    }

    /// As [`Self::nameless`], for one whose writing [`Self::end_writing`] will end.
    pub(crate) fn nameless_for_a_while(bytes: u64) -> Result<Self, Errno> {
        Self::make(bytes, false)
    }

    fn make(bytes: u64, is_final: bool) -> Result<Self, Errno> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // The file is never executed as a program, which some systems demand to be said; mapped code may still run.
        // Kernels before 6.3 do not know the flag.
        let fd = call(SystemCall::MemfdCreate, || match memfd_create("farlink", flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => memfd_create("farlink", flags),
            other => other,
        })?;
        resize(&fd, bytes)?;
        let object = Self::new(fd, false)?;
        object.add_seals(
            SealFlags::SHRINK | SealFlags::GROW | if is_final { SealFlags::SEAL } else { SealFlags::empty() },
        )?;
        Ok(object)
    }

    fn add_seals(&self, seals: SealFlags) -> Result<(), Errno> {
        call(SystemCall::AddSeals, || rustix::fs::fcntl_add_seals(&self.fd, seals))
    }

    /// Has nobody who does not have it mapped to be written ever do so, whatever descriptor of it he has. Pages cannot be
    /// given back any more.
    pub(crate) fn end_writing(&self) -> Result<(), Errno> {
        self.add_seals(SealFlags::FUTURE_WRITE | SealFlags::SEAL)
    }

    /// Returns the object behind a descriptor that another process has sent.
    pub(crate) fn received(fd: OwnedFd) -> Result<Self, Errno> {
        Self::new(fd, false)
    }

    fn new(fd: OwnedFd, is_limited: bool) -> Result<Self, Errno> {
        let identity = identity(&stat(&fd)?);
        Ok(Self { fd, is_limited, identity })
    }

    /// Returns whether the descriptor is still the object's: linked code can close any.
    pub(super) fn is_still_open(&self) -> bool {
        stat(&self.fd).is_ok_and(|stat| identity(&stat) == self.identity)
    }

    /// `lseek(2)`.
    pub(super) fn seek(&self, to: SeekFrom) -> Result<u64, Errno> {
        call(SystemCall::Lseek, || rustix::fs::seek(&self.fd, to))
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
        let fd = match call(SystemCall::ShmOpen, || shm::open(name, flags, Mode::RUSR | Mode::WUSR)) {
            Ok(fd) => fd,
            Err(Errno::EXIST) => return Ok(None),
            Err(error) => return Err(Error::shared(name, "created", describe(error))),
        };
        let examined = Self::new(fd, true).map_err(|error| Error::shared(name, "examined", describe(error)));
        let created = examined.and_then(|object| object.checked(name, bytes));
        if created.is_err() {
            Self::unlink(name);
        }
        created.map(Some)
    }

    /// Checks that code can run from the file system, and sets the size.
    fn checked(self, name: &str, bytes: u64) -> Result<Self, Error> {
        let flags = call(SystemCall::Stat, || rustix::fs::fstatvfs(&self.fd)).map(|stat| stat.f_flag);
        if flags.is_ok_and(|flags| flags.contains(StatVfsMountFlags::NOEXEC)) {
            return Err(Error::shared(name, "executed", "/dev/shm is mounted noexec"));
        }
        resize(&self.fd, bytes).map_err(|error| Error::shared(name, "sized", describe(error)))?;
        Ok(self)
    }

    /// Opens the object `name` and removes the name, whether or not it could be opened.
    pub(crate) fn take(name: &str) -> Result<Self, Error> {
        // A link would lead to a file that is no shared memory object. `rustix` passes flags on as they are.
        let no_follow = shm::OFlags::from_bits_retain(rustix::fs::OFlags::NOFOLLOW.bits());
        let opened = call(SystemCall::ShmOpen, || shm::open(name, shm::OFlags::RDWR | no_follow, Mode::empty()));
        Self::unlink(name);
        let opened = opened.and_then(|fd| Self::new(fd, true));
        opened.map_err(|error| Error::shared(name, "opened", describe(error)))
    }

    /// Removes the name, if it is there. `shm_unlink(3)`.
    pub(crate) fn unlink(name: &str) {
        let _ = call(SystemCall::ShmUnlink, || shm::unlink(name));
    }

    /// Returns the size in bytes.
    pub(crate) fn len(&self) -> Result<u64, Errno> {
        Ok(u64::try_from(stat(&self.fd)?.st_size).unwrap_or(0))
    }

    /// Returns how many bytes of physical memory are behind the object.
    pub(crate) fn committed_bytes(&self) -> Result<u64, Errno> {
        // `st_blocks` counts units of 512 bytes, whatever the file system's blocks.
        Ok(u64::try_from(stat(&self.fd)?.st_blocks).unwrap_or(0).saturating_mul(512))
    }

    /// Returns whether there may be less memory for the object than its size: in a file system of limited size.
    pub(crate) fn is_limited(&self) -> bool {
        self.is_limited
    }

    /// Has physical memory for the pages of a range. Without this, writing when the file system is full is a SIGBUS.
    /// `fallocate(2)`.
    pub(crate) fn secure(&self, offset: u64, bytes: u64) -> Result<(), Errno> {
        let secure = || rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), offset, bytes);
        call(SystemCall::Fallocate, || rustix::io::retry_on_intr(secure))
    }

    pub(crate) fn map(&self, len: usize, place: Place) -> Result<Mapping, Errno> {
        Mapping::shared(&self.fd, len, place)
    }

    /// Maps stripes of the object: see [`Mapping::striped`].
    pub(crate) fn map_stripes(
        &self,
        len: usize,
        stripes: &[Stripe],
        data: Data,
        place: Place,
    ) -> Result<Mapping, Errno> {
        // Where there is no /proc, the descriptor that can do more is used.
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        let read_only = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok();
        Mapping::striped(&self.fd, read_only.as_ref().map(AsFd::as_fd), len, stripes, data, place)
    }
}

/// Sets the size of a file. `ftruncate(2)`.
fn resize(fd: &OwnedFd, bytes: u64) -> Result<(), Errno> {
    // The system's answer to more than this process may have in a file is a signal.
    if getrlimit(Resource::Fsize).current.is_some_and(|most| bytes > most) {
        return Err(Errno::FBIG);
    }
    call(SystemCall::Ftruncate, || rustix::fs::ftruncate(fd, bytes))
}

fn stat(fd: &OwnedFd) -> Result<Stat, Errno> {
    call(SystemCall::Stat, || rustix::fs::fstat(fd))
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
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
    use crate::sys::page_size;
    use farlink_addr::MemProt;

    /// Discarded pages read as zero again, in private memory and in both views of shared memory.
    #[test]
    fn discarded_pages_are_zero() {
        let name = format!("/farlink_{}_sys_test", std::process::id());
        let page = page_size().bytes();
        let object = SharedObject::create(&name, page).unwrap().unwrap();
        let other = SharedObject::take(&name).unwrap();
        assert_eq!(other.len().unwrap(), page);
        for mapping in [
            Mapping::private(page as usize, Place::Anywhere).unwrap(),
            object.map(page as usize, Place::Anywhere).unwrap(),
        ] {
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
        let other = SharedObject::received(object.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let (one, two) =
            (object.map(page as usize, Place::Anywhere).unwrap(), other.map(page as usize, Place::Anywhere).unwrap());
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
