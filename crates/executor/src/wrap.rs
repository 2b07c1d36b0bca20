//! From Rust functions of decoded arguments to wrapper functions that C can call.

use farlink_addr::ExecutorAddr;
use farlink_mem::wrapper::{WrapperFunction, WrapperResult};
use farlink_wire::sps::{Decode, Encode, from_bytes, to_bytes};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Why a call has no result of its type: an out-of-band error.
pub(crate) type OutOfBand = String;

/// Decodes arguments, calls `f`, and encodes its result.
///
/// # Safety
///
/// As [`call_with_bytes`].
pub(crate) unsafe fn call<A, R: Encode>(
    name: &str,
    args: *const u8,
    size: usize,
    f: impl FnOnce(A) -> Result<R, OutOfBand>,
) -> WrapperResult
where
    A: for<'a> Decode<'a>,
{
    // SAFETY: the caller passes what the function wants.
    unsafe { call_with_bytes(name, args, size, |bytes| f(decode(name, bytes)?)) }
}

/// Calls `f` with encoded arguments, and encodes its result. A panic stops here: it must not unwind into C.
///
/// # Safety
///
/// `args` must be `size` bytes, or anything if `size` is 0.
pub(crate) unsafe fn call_with_bytes<R: Encode>(
    name: &str,
    args: *const u8,
    size: usize,
    f: impl FnOnce(&[u8]) -> Result<R, OutOfBand>,
) -> WrapperResult {
    let bytes = if size == 0 {
        &[]
    } else {
        // SAFETY: the caller passes that many bytes, which live until this function returns.
        unsafe { std::slice::from_raw_parts(args, size) }
    };
    let run = || f(bytes).map(|result| to_bytes(&result));
    WrapperResult::from_result(catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(format!("{name} panicked"))))
}

/// Decodes the arguments of `name`.
pub(crate) fn decode<'a, A: Decode<'a>>(name: &str, bytes: &'a [u8]) -> Result<A, OutOfBand> {
    from_bytes(bytes).map_err(|error| format!("the arguments of {name} cannot be decoded: {error}"))
}

/// Returns the address that a wrapper function is called at.
pub(crate) fn address(function: WrapperFunction) -> ExecutorAddr {
    ExecutorAddr::new(function as *const () as u64)
}

/// Defines wrapper functions and the list of their announcements.
///
/// Each row is a constant of [`farlink_wire::functions`], the name of the function that C calls, and the Rust function
/// behind it, from decoded arguments to `Result<Ret, OutOfBand>`.
macro_rules! wrappers {
    ($announce:ident: $($constant:ident => $name:ident = $implementation:path;)*) => {
        $(
            /// The wrapper function behind the constant of that name.
            pub(crate) unsafe extern "C" fn $name(args: *const u8, size: usize) -> farlink_mem::wrapper::WrapperResult {
                // SAFETY: whoever calls a wrapper function passes `size` bytes.
                unsafe {
                    $crate::wrap::call(farlink_wire::functions::$constant.name(), args, size, $implementation)
                }
            }
        )*

        /// Announces the functions of this service.
        pub(crate) fn $announce(info: &mut farlink_wire::setup::ExecutorInfo) {
            $(farlink_wire::functions::$constant.announce($crate::wrap::address($name), info);)*
        }
    };
}

pub(crate) use wrappers;
