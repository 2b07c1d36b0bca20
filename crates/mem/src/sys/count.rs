//! Every system call of the memory layer is made through [`call`]: it is counted there, and tests can make it fail.

use rustix::io::Errno;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! system_calls {
    ($($(#[$doc:meta])* $kind:ident = $name:literal,)*) => {
        /// A kind of system call that the memory layer makes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum SystemCall {
            $($(#[$doc])* $kind,)*
        }

        const NAMES: &[&str] = &[$($name,)*];
    };
}

system_calls! {
    Mmap = "mmap",
    Munmap = "munmap",
    Mprotect = "mprotect",
    Madvise = "madvise",
    Mremap = "mremap",
    Mincore = "mincore",
    MemfdCreate = "memfd_create",
    Ftruncate = "ftruncate",
    AddSeals = "fcntl",
    Fallocate = "fallocate",
    Lseek = "lseek",
    Stat = "fstat",
    Mseal = "mseal",
    ShmOpen = "shm_open",
    ShmUnlink = "shm_unlink",
}

static COUNTS: [AtomicU64; NAMES.len()] = [const { AtomicU64::new(0) }; NAMES.len()];

/// Makes a system call.
pub(crate) fn call<T>(kind: SystemCall, call: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    COUNTS[kind as usize].fetch_add(1, Ordering::Relaxed);
    #[cfg(feature = "fault-injection")]
    super::fault::strike(kind)?;
    call()
}

/// Returns how many system calls the memory layer has made in this process, by their names.
pub fn system_calls() -> impl Iterator<Item = (&'static str, u64)> {
    NAMES.iter().zip(&COUNTS).map(|(&name, count)| (name, count.load(Ordering::Relaxed)))
}
