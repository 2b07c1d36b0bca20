//! Memory that this process and linked code both use.

use crate::error::{attempt, attempt_handle, described, elements, free, reference};
use crate::session::FarlinkSession;
use farlink::SharedBuffer;

/// Bytes that this process and linked code both read and write. Zero at first.
pub struct FarlinkBuffer(SharedBuffer<u8>);

/// Allocates a buffer of `count` bytes.
///
/// # Safety
///
/// `session` must be NULL or a session that has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_buffer_create(session: *const FarlinkSession, count: usize) -> *mut FarlinkBuffer {
    attempt_handle(|| {
        // SAFETY: as for this function (caller).
        let session = unsafe { reference(session, "the session") }?;
        session.0.shared_buffer(count).map(FarlinkBuffer).map_err(described)
    })
}

/// Frees a buffer, which linked code must not use any more. NULL is none.
///
/// # Safety
///
/// `buffer` must be NULL or a buffer that has not been freed and that no other thread uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_buffer_free(buffer: *mut FarlinkBuffer) {
    // SAFETY: as for this function (caller).
    unsafe { free(buffer) };
}

/// Returns the address of the first byte in the executor, a multiple of 64; 0 if `buffer` is NULL.
///
/// # Safety
///
/// `buffer` must be NULL or a buffer that has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_buffer_addr(buffer: *const FarlinkBuffer) -> u64 {
    // SAFETY: as for this function (caller).
    let addr = || unsafe { reference(buffer, "the buffer") }.map(|buffer| buffer.0.executor_addr().as_u64());
    attempt(addr).unwrap_or(0)
}

/// Copies `count` bytes of the buffer, from `offset` on, to `bytes`.
///
/// # Safety
///
/// `buffer` must be NULL or a buffer that has not been freed, `bytes` NULL or a place for `count` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_buffer_read(
    buffer: *const FarlinkBuffer,
    offset: usize,
    bytes: *mut u8,
    count: usize,
) -> bool {
    let read = || {
        // SAFETY: as for this function (caller).
        let buffer = unsafe { reference(buffer, "the buffer") }?;
        if bytes.is_null() && count > 0 {
            return Err("the place for the bytes is NULL".to_owned());
        }
        if offset.checked_add(count).is_none_or(|end| end > buffer.0.len()) {
            return Err(format!("the buffer has no {count} bytes from {offset} on"));
        }
        let mut read = vec![0; count];
        buffer.0.read(offset, &mut read).map_err(described)?;
        if count > 0 {
            // SAFETY: there is a place for as many bytes (caller).
            unsafe { std::ptr::copy_nonoverlapping(read.as_ptr(), bytes, count) };
        }
        Ok(())
    };
    attempt(read).is_some()
}

/// Copies `count` bytes to the buffer, from `offset` on.
///
/// # Safety
///
/// `buffer` must be NULL or a buffer that has not been freed, `bytes` NULL or `count` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_buffer_write(
    buffer: *const FarlinkBuffer,
    offset: usize,
    bytes: *const u8,
    count: usize,
) -> bool {
    let write = || {
        // SAFETY: as for this function (caller).
        let buffer = unsafe { reference(buffer, "the buffer") }?;
        // SAFETY: as for this function (caller).
        let bytes = unsafe { elements(bytes, count, "the bytes") }?;
        buffer.0.write(offset, bytes).map_err(described)
    };
    attempt(write).is_some()
}
