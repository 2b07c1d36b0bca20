//! What linked code sees of the handlers that report faults: nothing.
//!
//! Where a handler of [`crate::report`] is, linked code that asks for a signal's action is told the default one, and where
//! it sets the default one the handler stays: what it does ends as the default action does. So programs that look before
//! they set a handler of their own, as those of Rust do, set it, and it works as natively.

use crate::report::{SIGNALS, action, give_up, handler_address, is_wanted};
use farlink_addr::ExecutorAddr;
use libc::{c_int, sigaction, sighandler_t};

/// Whether a handler of ours belongs in the place of a signal's default action.
fn reports(signal: c_int) -> bool {
    is_wanted() && SIGNALS.contains(&signal)
}

/// Whether a handler of ours is in the place of a signal's default action.
fn is_ours(signal: c_int) -> bool {
    // SAFETY: the structure is plain bytes, to be filled in.
    let mut now: sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is there to be written. A signal that is none is an error.
    let result = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut now) };
    result == 0 && now.sa_sigaction == handler_address()
}

/// What linked code gets for `sigaction`.
unsafe extern "C" fn own_sigaction(signal: c_int, new: *const sigaction, old: *mut sigaction) -> c_int {
    let was_ours = SIGNALS.contains(&signal) && is_ours(signal);
    // SAFETY: linked code passes null or a structure.
    let sets_default = !new.is_null() && unsafe { (*new).sa_sigaction } == libc::SIG_DFL;
    let reporting = action();
    let new = if reports(signal) && sets_default { &raw const reporting } else { new };
    // SAFETY: linked code passes what the function wants.
    let result = unsafe { libc::sigaction(signal, new, old) };
    if result == 0 && was_ours && !old.is_null() {
        // SAFETY: the structure is plain bytes; all zero, it is the default action.
        let default: sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: linked code passes a structure to be written.
        unsafe { old.write(default) };
    }
    result
}

/// What linked code gets for `signal`.
unsafe extern "C" fn own_signal(signal: c_int, handler: sighandler_t) -> sighandler_t {
    let old = if reports(signal) && handler == libc::SIG_DFL {
        // SAFETY: the structure is plain bytes, to be filled in.
        let mut old: sigaction = unsafe { std::mem::zeroed() };
        let reporting = action();
        // SAFETY: both structures are there, and the handler is made for any moment.
        match unsafe { libc::sigaction(signal, &raw const reporting, &raw mut old) } {
            0 => old.sa_sigaction,
            _ => libc::SIG_ERR,
        }
    } else {
        // SAFETY: linked code passes what the function wants.
        unsafe { libc::signal(signal, handler) }
    };
    if old == handler_address() { libc::SIG_DFL } else { old }
}

/// What linked code gets for `abort`.
///
/// On an alternate stack, in a handler of its own, there may be no room for another: the process ends without a report.
unsafe extern "C" fn own_abort() -> ! {
    // SAFETY: the structure is plain bytes, to be filled in.
    let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is there to be written.
    let result = unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) };
    if result == 0 && stack.ss_flags & libc::SS_ONSTACK != 0 {
        give_up(libc::SIGABRT);
    }
    // SAFETY: abort has no requirement.
    unsafe { libc::abort() }
}

/// Returns the address of a function that takes the place of the C library's own for linked code.
pub(crate) fn address_of(name: &str) -> Option<ExecutorAddr> {
    let address = match name {
        "sigaction" | "__sigaction" => own_sigaction as *const (),
        "signal" | "bsd_signal" => own_signal as *const (),
        "abort" => own_abort as *const (),
        _ => return None,
    };
    Some(ExecutorAddr::new(address as u64))
}
