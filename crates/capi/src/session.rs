//! Sessions: executors, in another process or in this one.

use crate::error::{attempt, attempt_handle, described, free, reference, text};
use farlink::Session;
use std::ffi::c_char;
use std::time::Duration;

/// An executor with memory of its own. When it and all its libraries and buffers have been freed, the executor ends.
pub struct FarlinkSession(pub(crate) Session);

/// Makes this program its own executor. Called first in `main`: in a process that farlink has started to be the executor of
/// this program, it does not return. In others it takes note that farlink_session_spawn(NULL) can start this program.
#[unsafe(no_mangle)]
pub extern "C" fn farlink_init() {
    attempt(|| {
        farlink::executor::init();
        Ok(())
    });
}

/// Starts an executor in a process of its own: the program `executor`, or if that is NULL, what the environment variable
/// FARLINK_EXECUTOR names, or this program if it has called farlink_init(), or farlink-executor.
///
/// # Safety
///
/// `executor` must be NULL or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_session_spawn(executor: *const c_char) -> *mut FarlinkSession {
    attempt_handle(|| {
        let mut builder = Session::builder();
        if !executor.is_null() {
            // SAFETY: it is a C string (caller).
            builder = builder.executor(unsafe { text(executor, "the executor") }?, Vec::new());
        }
        builder.spawn().map(FarlinkSession).map_err(described)
    })
}

/// Runs linked code in this process.
#[unsafe(no_mangle)]
pub extern "C" fn farlink_session_in_process() -> *mut FarlinkSession {
    attempt_handle(|| Session::in_process().map(FarlinkSession).map_err(described))
}

/// Frees a session. NULL is none.
///
/// # Safety
///
/// `session` must be NULL or a session that has not been freed and that no other thread uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_session_free(session: *mut FarlinkSession) {
    // SAFETY: as for this function (caller).
    unsafe { free(session) };
}

/// Ends the executor at once: calls that are running fail. Fails if the executor is this process.
///
/// # Safety
///
/// `session` must be NULL or a session that has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_session_kill(session: *const FarlinkSession) -> bool {
    let kill = || {
        // SAFETY: as for this function (caller).
        let session = unsafe { reference(session, "the session") }?;
        if session.0.kill() { Ok(()) } else { Err("the executor is this process".to_owned()) }
    };
    attempt(kill).is_some()
}

/// Reads the executor's memory at an address.
///
/// # Safety
///
/// `session` must be NULL or a session that has not been freed, `bytes` NULL or a place for `count` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_session_read(
    session: *const FarlinkSession,
    addr: u64,
    bytes: *mut u8,
    count: usize,
) -> bool {
    let read = || {
        // SAFETY: as for this function (caller).
        let session = unsafe { reference(session, "the session") }?;
        let mut read = vec![0; count];
        session.0.read_memory(farlink::addr::ExecutorAddr::new(addr), &mut read).map_err(described)?;
        if bytes.is_null() {
            return Err("the place for the bytes is NULL".to_owned());
        }
        // SAFETY: there is a place for as many bytes (caller).
        unsafe { std::ptr::copy_nonoverlapping(read.as_ptr(), bytes, count) };
        Ok(())
    };
    attempt(read).is_some()
}

/// Returns a duration of milliseconds; nothing for 0.
pub(crate) fn timeout(milliseconds: u64) -> Option<Duration> {
    (milliseconds > 0).then(|| Duration::from_millis(milliseconds))
}
