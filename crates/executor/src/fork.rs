//! Children that linked code forks.
//!
//! A child goes on as a process of its own: it gets a copy of linked data, which is shared memory and would stay shared
//! otherwise, and it has no part in the session, which is its parent's. The C library's `fork` calls the handlers here;
//! whoever makes a process by the bare system call is not seen.

use crate::registry;
use crate::services::{ForkLock, lock_for_fork};
use farlink_mem::ChildCopy;
use std::cell::RefCell;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

/// Exit status of a child that cannot have its copy.
const NO_COPY_STATUS: i32 = 125;

/// Whether this process is a child of an executor.
static IS_CHILD: AtomicBool = AtomicBool::new(false);

/// What a child needs of its parent.
#[derive(Default)]
struct Inheritance {
    /// Linked data.
    copies: Vec<ChildCopy>,
    /// The descriptors of connections.
    connections: Vec<RawFd>,
}

thread_local! {
    /// What no other thread may be changing while this one forks.
    static FORK_LOCK: RefCell<Option<ForkLock>> = const { RefCell::new(None) };
}

thread_local! {
    /// What this thread has got ready for the child that it is forking, or why it could not.
    static INHERITANCE: RefCell<Result<Inheritance, String>> = RefCell::new(Ok(Inheritance::default()));
}

/// Has children of this process looked after from now on.
///
/// # Errors
///
/// Fails if there is no memory for the handlers.
pub(crate) fn register() -> std::io::Result<()> {
    static REGISTER: Once = Once::new();
    let mut result = 0;
    REGISTER.call_once(|| {
        // SAFETY: the handlers are functions of this program, which stays loaded.
        result = unsafe { libc::pthread_atfork(Some(before), Some(after_in_parent), Some(after_in_child)) };
    });
    if result == 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(result)) }
}

/// Returns whether this process is a child of an executor. The session is its parent's.
pub(crate) fn is_child() -> bool {
    IS_CHILD.load(Ordering::Relaxed)
}

/// Ends this process with `status` if it is a child: linked code has returned to what called it, and that is not there
/// any more.
pub(crate) fn exit_if_child(status: i32) {
    if is_child() {
        // SAFETY: `exit` runs what was registered for it, as it does when the last thread of a process returns.
        unsafe { libc::exit(status) }
    }
}

/// Runs before a fork, after the handlers of linked code.
extern "C" fn before() {
    if is_child() {
        // Its memory is its own, and forks as any other.
        return;
    }
    let prepare = || {
        let mut inheritance = Inheritance::default();
        for session in registry::sessions() {
            inheritance.copies.push(session.shared.copy_for_child().map_err(|error| error.to_string())?);
            inheritance.connections.extend(session.descriptor_numbers());
        }
        Ok(inheritance)
    };
    let inheritance = catch_unwind(prepare).unwrap_or_else(|_| Err("copying linked data panicked".to_owned()));
    INHERITANCE.set(inheritance);
    FORK_LOCK.set(Some(lock_for_fork()));
}

extern "C" fn after_in_parent() {
    FORK_LOCK.set(None);
    INHERITANCE.set(Ok(Inheritance::default()));
}

extern "C" fn after_in_child() {
    FORK_LOCK.set(None);
    if IS_CHILD.swap(true, Ordering::Relaxed) {
        return;
    }
    let install = || {
        let Inheritance { copies, connections } = INHERITANCE.replace(Ok(Inheritance::default()))?;
        copies.into_iter().try_for_each(ChildCopy::install).map_err(|error| error.to_string())?;
        connections.into_iter().try_for_each(disconnect)
    };
    let installed = catch_unwind(AssertUnwindSafe(install));
    if let Err(text) = installed.unwrap_or_else(|_| Err("taking over linked data panicked".to_owned())) {
        // To go on would change the parent's data, or disturb its session.
        eprintln!("farlink-executor: a child that was forked cannot go on: {text}");
        crate::services::end_process(NO_COPY_STATUS);
    }
}

/// Puts `/dev/null` in the place of a descriptor of the connection.
fn disconnect(number: RawFd) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("/dev/null cannot take the place of the connection: {error}");
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
    // SAFETY: the number is that of the connection, which stays open in the parent; here only this thread exists, and
    // nothing reads or writes it.
    match unsafe { libc::dup3(null.as_raw_fd(), number, libc::O_CLOEXEC) } {
        -1 => Err(failed(std::io::Error::last_os_error())),
        _ => Ok(()),
    }
}
