//! Signals as a program expects them.

/// Makes SIGPIPE end the process again, as it ends a program that has not said otherwise. Rust's start-up code ignores
/// it.
pub fn restore_default_signals() {
    // SAFETY: the default action needs no handler; no other thread depends on SIGPIPE being ignored, since connections
    // are written with MSG_NOSIGNAL.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}
