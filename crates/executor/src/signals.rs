//! Signals as a program expects them.

/// Makes SIGPIPE end the process again, as it ends a program that has not said otherwise. Rust's start-up code ignores
/// it.
pub fn restore_default_signals() {
    // SAFETY: the default action needs no handler; no other thread depends on SIGPIPE being ignored, since connections
    // are written with MSG_NOSIGNAL.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Has the system tell how children end, also if whoever started this process did not want to know it of his own.
pub fn wait_for_children() {
    // SAFETY: the default action needs no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Lets writing to a pipe that nobody reads be an error, as Rust's start-up code does, which not every executor has.
pub fn ignore_broken_pipes() {
    // SAFETY: ignoring a signal needs no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
