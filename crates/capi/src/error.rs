//! What went wrong last, by thread, and the way from Rust's results to C's.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static LAST: RefCell<Option<CString>> = const { RefCell::new(None) };
}

/// Returns what went wrong with the last call on this thread that failed: a text that is there until the next call of this
/// interface fails on this thread. NULL if none has failed.
#[unsafe(no_mangle)]
pub extern "C" fn farlink_last_error() -> *const c_char {
    LAST.with_borrow(|last| last.as_ref().map_or(std::ptr::null(), |text| text.as_ptr()))
}

/// Keeps a text for [`farlink_last_error`]. It ends where it has a NUL.
fn keep(text: &str) {
    let text = text.split('\0').next().unwrap_or_default();
    LAST.set(CString::new(text).ok());
}

/// Runs `f`; gives nothing, and keeps why, if it fails or panics.
pub(crate) fn attempt<T>(f: impl FnOnce() -> Result<T, String>) -> Option<T> {
    let result = catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| Err("farlink panicked".to_owned()));
    result.inspect_err(|text| keep(text)).ok()
}

/// As [`attempt`], for a handle that C is to free.
pub(crate) fn attempt_handle<T>(f: impl FnOnce() -> Result<T, String>) -> *mut T {
    attempt(f).map_or(std::ptr::null_mut(), |value| Box::into_raw(Box::new(value)))
}

/// Frees a handle, if it is not null.
///
/// # Safety
///
/// It must be one of [`attempt_handle`] that has not been freed.
pub(crate) unsafe fn free<T>(handle: *mut T) {
    if handle.is_null() {
        return;
    }
    // SAFETY: the handle was made from a box of this type, and nobody else frees it (caller).
    let handle = unsafe { Box::from_raw(handle) };
    attempt(|| {
        drop(handle);
        Ok(())
    });
}

/// Returns what a pointer is to.
///
/// # Safety
///
/// It must be null, or to a value that lives and is not changed while this is used.
pub(crate) unsafe fn reference<'a, T>(pointer: *const T, what: &str) -> Result<&'a T, String> {
    // SAFETY: as for this function (caller).
    unsafe { pointer.as_ref() }.ok_or_else(|| format!("{what} is NULL"))
}

/// Returns the text of a C string.
///
/// # Safety
///
/// It must be null, or a C string that lives while this is used.
pub(crate) unsafe fn text<'a>(pointer: *const c_char, what: &str) -> Result<&'a str, String> {
    if pointer.is_null() {
        return Err(format!("{what} is NULL"));
    }
    // SAFETY: it is a C string (caller).
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map_err(|_| format!("{what} is not UTF-8"))
}

/// Returns the elements at a pointer, which may be null if there are none.
///
/// # Safety
///
/// Unless `count` is 0, it must be null, or to that many elements that live and are not changed while this is used.
pub(crate) unsafe fn elements<'a, T>(pointer: *const T, count: usize, what: &str) -> Result<&'a [T], String> {
    match (pointer.is_null(), count) {
        (_, 0) => Ok(&[]),
        (true, _) => Err(format!("{what} is NULL")),
        // SAFETY: it is to that many elements (caller).
        (false, _) => Ok(unsafe { std::slice::from_raw_parts(pointer, count) }),
    }
}

/// Writes a result, if C wants it.
///
/// # Safety
///
/// The pointer must be null, or to a place of this type that may be written.
pub(crate) unsafe fn give<T>(place: *mut T, value: T) {
    if !place.is_null() {
        // SAFETY: the place may be written (caller).
        unsafe { place.write(value) };
    }
}

pub(crate) fn described(error: impl Display) -> String {
    error.to_string()
}
