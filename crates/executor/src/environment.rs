//! The environment that an executor is started with, and the one that its program sees.

use std::ffi::{OsStr, OsString};

/// The variable by which the C library is told of its parameters before a program begins.
pub const TUNABLES: &str = "GLIBC_TUNABLES";

/// The variable with the value that [`TUNABLES`] had before a controller added to it; empty if there was none.
pub const OLD_TUNABLES: &str = "FARLINK_OLD_GLIBC_TUNABLES";

/// Makes the environment what it was before a controller added to it.
///
/// # Safety
///
/// No other thread may use the environment: call it before there is one.
pub(crate) unsafe fn restore() {
    let Some(old) = std::env::var_os(OLD_TUNABLES) else { return };
    // SAFETY: no other thread uses the environment (caller).
    let set = |name: &str, value: Option<&OsStr>| match value {
        // SAFETY: as above.
        Some(value) => unsafe { std::env::set_var(name, value) },
        // SAFETY: as above.
        None => unsafe { std::env::remove_var(name) },
    };
    let old: Option<&OsString> = Some(&old).filter(|old| !old.is_empty());
    set(TUNABLES, old.map(OsString::as_os_str));
    set(OLD_TUNABLES, None);
}
