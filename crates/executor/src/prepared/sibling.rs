//! Forking a child of this process's parent: `clone(2)` with `CLONE_PARENT`.
//!
//! The C library's `fork` makes children of this process only, so the system call is made without it. This process has one
//! thread, so no lock of the C library's is taken, and what is left for the child is what the system has of its thread:
//!
//! - its id, which the C library keeps beside the thread for `raise`, `abort` and mutexes: the system writes the child's
//!   there (`CLONE_CHILD_SETTID`). Where that is the system knows too, since it clears it at the thread's end;
//! - the list of robust mutexes, which a child does not inherit.
//!
//! Its registration for restartable sequences, its alternate signal stack and its signal mask a child does inherit.

use libc::{c_int, c_long, c_ulong, c_void};

/// `PR_GET_TID_ADDRESS`.
const GET_TID_ADDRESS: c_int = 40;

/// Exit status of a child that cannot be put right.
const UNFIT_STATUS: c_int = 125;

/// What the system knows of the only thread of this process.
pub(super) struct Thread {
    /// Where the C library keeps the thread's id.
    tid: *mut c_int,
    /// Its list of robust mutexes: the head, and its length in bytes.
    robust_list: (*mut c_void, usize),
}

/// Who goes on after a fork.
pub(super) enum Side {
    /// The process that forked, with the child's id.
    Parent(u32),
    /// The child.
    Child,
}

impl Thread {
    /// Finds what a child has to be given.
    pub(super) fn find() -> Result<Self, String> {
        let mut tid: *mut c_int = std::ptr::null_mut();
        // SAFETY: the call writes a pointer to where it is told to.
        let result = unsafe { libc::prctl(GET_TID_ADDRESS, &raw mut tid) };
        check(
            result.into(),
            "where the C library keeps the id of its thread (PR_GET_TID_ADDRESS: a kernel with CONFIG_CHECKPOINT_RESTORE has it)",
        )?;
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        // SAFETY: the system clears this word when the thread ends, so the C library has it for as long as that.
        if tid.is_null() || unsafe { tid.read() } != own {
            return Err(
                "this C library does not keep the id of a thread where the system clears it: executors can be forked \
                        with glibc only"
                    .to_owned(),
            );
        }
        let mut robust_list: (*mut c_void, usize) = (std::ptr::null_mut(), 0);
        // SAFETY: the call writes a pointer and a length to where it is told to. 0 is the calling thread.
        let result =
            unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut robust_list.0, &raw mut robust_list.1) };
        check(result, "its list of robust mutexes")?;
        Ok(Self { tid, robust_list })
    }

    /// Forks. Both sides go on from here.
    pub(super) fn fork(&self) -> Result<Side, String> {
        // The parent is told of the child's end by the signal that it is told of this process's by.
        let flags = libc::CLONE_PARENT | libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD;
        let (no_stack, no_address, no_tls) = (0 as c_ulong, 0 as c_ulong, 0 as c_ulong);
        // SAFETY: without `CLONE_VM` and without a stack the child has a copy of this process's memory and goes on here, as
        // after `fork`. There is one thread (`has_one_thread`), so the copy is of a moment at which nothing is half done. The
        // word for the id is the C library's (`find`).
        let pid: c_long =
            unsafe { libc::syscall(libc::SYS_clone, flags as c_ulong, no_stack, no_address, self.tid, no_tls) };
        match pid {
            -1 => Err(format!("a process cannot be forked: {}", std::io::Error::last_os_error())),
            0 => {
                self.put_right();
                Ok(Side::Child)
            }
            pid => Ok(Side::Parent(u32::try_from(pid).expect("ids of processes are positive"))),
        }
    }

    /// Gives the calling thread, the only one of a child, what it did not inherit.
    fn put_right(&self) {
        let (head, bytes) = self.robust_list;
        // SAFETY: the list is the C library's for this thread, empty, and stays with it.
        let result = unsafe { libc::syscall(libc::SYS_set_robust_list, head, bytes) };
        if result != 0 {
            // It would be an executor with mutexes that do not work. Its controller sees the connection end.
            crate::services::end_process(UNFIT_STATUS);
        }
    }
}

fn check(result: c_long, what: &str) -> Result<(), String> {
    if result == 0 {
        Ok(())
    } else {
        Err(format!("the system does not tell {what}: {}", std::io::Error::last_os_error()))
    }
}
