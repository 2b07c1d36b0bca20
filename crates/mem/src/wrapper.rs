//! Wrapper functions: the C ABI behind every call and every action (ORC: `CWrapperFunctionResult`).
//!
//! `WrapperResult f(const char *args, size_t args_size)`. The result is 16 bytes: eight bytes of data or a pointer,
//! and a size.
//!
//! | size | data |
//! | --- | --- |
//! | 1 to 8 | the bytes themselves |
//! | above 8 | a pointer to that many bytes from `malloc`, which the receiver frees |
//! | 0, data null | no bytes |
//! | 0, data not null | an out-of-band error: a pointer to a text from `malloc`, which the receiver frees |

use farlink_addr::ExecutorAddr;
use std::ffi::{CStr, c_char};

/// Result of a wrapper function.
#[derive(Debug)]
#[repr(C)]
pub struct WrapperResult {
    data: Data,
    size: usize,
}

#[derive(Clone, Copy)]
#[repr(C)]
union Data {
    pointer: *mut c_char,
    inline: [u8; 8],
}

impl std::fmt::Debug for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Data")
    }
}

/// A wrapper function.
pub type WrapperFunction = unsafe extern "C" fn(args: *const u8, args_size: usize) -> WrapperResult;

impl WrapperResult {
    /// Returns encoded bytes, or the text of an out-of-band error, to C.
    #[must_use]
    pub fn from_result(result: Result<Vec<u8>, String>) -> Self {
        match result {
            Ok(bytes) if bytes.len() <= 8 => {
                let mut inline = [0; 8];
                inline[..bytes.len()].copy_from_slice(&bytes);
                Self { data: Data { inline }, size: bytes.len() }
            }
            Ok(bytes) => match copy_to_malloc(&bytes) {
                Some(pointer) => Self { data: Data { pointer }, size: bytes.len() },
                None => Self::out_of_memory(),
            },
            Err(text) => {
                // The text ends at its first NUL.
                let mut bytes: Vec<u8> = text.into_bytes().into_iter().take_while(|&byte| byte != 0).collect();
                bytes.push(0);
                match copy_to_malloc(&bytes) {
                    Some(pointer) => Self { data: Data { pointer }, size: 0 },
                    None => Self::out_of_memory(),
                }
            }
        }
    }

    /// Without memory for a text there is none either; an empty result fails to decode in the caller.
    fn out_of_memory() -> Self {
        Self { data: Data { inline: [0; 8] }, size: 0 }
    }

    /// Takes the bytes, or the text of an out-of-band error, from C, and frees what C allocated.
    ///
    /// # Safety
    ///
    /// The value must be as a wrapper function returns it: a pointer in it is from `malloc`, to `size` bytes, or to a
    /// text that ends with NUL if the size is 0, and nobody else frees it.
    pub unsafe fn into_result(self) -> Result<Vec<u8>, String> {
        if (1..=8).contains(&self.size) {
            // SAFETY: every bit pattern is a value of the bytes.
            let inline = unsafe { self.data.inline };
            return Ok(inline[..self.size].to_vec());
        }
        // SAFETY: every bit pattern is a value of the pointer, which is only used below.
        let pointer = unsafe { self.data.pointer };
        if pointer.is_null() {
            return if self.size == 0 {
                Ok(Vec::new())
            } else {
                Err("a wrapper function returned no memory".to_owned())
            };
        }
        let result = if self.size == 0 {
            // SAFETY: with size 0, a pointer that is not null is to a text that ends with NUL (caller).
            Err(unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned())
        } else {
            // SAFETY: the pointer is to `size` bytes (caller).
            Ok(unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), self.size) }.to_vec())
        };
        // SAFETY: the pointer is from `malloc` and nobody else frees it (caller); the bytes have been copied.
        unsafe { libc::free(pointer.cast()) };
        result
    }
}

fn copy_to_malloc(bytes: &[u8]) -> Option<*mut c_char> {
    // SAFETY: malloc has no requirement.
    let pointer = unsafe { libc::malloc(bytes.len()) }.cast::<u8>();
    if pointer.is_null() {
        return None;
    }
    // SAFETY: the memory has that many bytes and is fresh.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), pointer, bytes.len()) };
    Some(pointer.cast())
}

/// Calls the wrapper function at `function` of this process.
///
/// # Errors
///
/// Gives the text of an out-of-band error, also for the null address.
///
/// # Safety
///
/// Unless it is null, `function` must be the address of a [`WrapperFunction`] of this process that may be called with
/// `args`.
pub unsafe fn call_wrapper(function: ExecutorAddr, args: &[u8]) -> Result<Vec<u8>, String> {
    let pointer = function.as_u64() as usize as *const ();
    if pointer.is_null() {
        return Err("the function to call is null".to_owned());
    }
    // SAFETY: the address is that of such a function (caller), and function pointers are addresses on every system
    // that farlink supports.
    let function = unsafe { std::mem::transmute::<*const (), WrapperFunction>(pointer) };
    // SAFETY: the function may be called with these bytes (caller), which live until it returns.
    let result = unsafe { function(args.as_ptr(), args.len()) };
    // SAFETY: a wrapper function returned it.
    unsafe { result.into_result() }
}

#[cfg(test)]
mod tests {
    use super::*;

    unsafe extern "C" fn echo(args: *const u8, size: usize) -> WrapperResult {
        // SAFETY: the caller passes a slice.
        let args = unsafe { std::slice::from_raw_parts(args, size) };
        WrapperResult::from_result(if args == b"fail" { Err("failed\0twice".into()) } else { Ok(args.to_vec()) })
    }

    /// Results of every shape come back: none, inline, allocated, out-of-band.
    #[test]
    fn results_of_every_shape() {
        let address = ExecutorAddr::new(echo as *const () as u64);
        // SAFETY: `echo` is a wrapper function.
        let call = |args: &[u8]| unsafe { call_wrapper(address, args) };
        for args in [&b""[..], b"1", b"12345678", b"123456789", &[7; 1000]] {
            assert_eq!(call(args), Ok(args.to_vec()));
        }
        assert_eq!(call(b"fail"), Err("failed".to_owned()));
        // SAFETY: the null address is allowed.
        assert!(unsafe { call_wrapper(ExecutorAddr::NULL, b"") }.is_err());
    }
}
