//! How this process begins and ends: where C programs do, without what Rust's start-up code does before `main`.
//!
//! That code looks at the stack's mapping, and gives every thread a stack for a handler of overflowing stacks; both cost
//! more than the rest of a small run's start, and linked programs in this process or in an executor that is this program
//! do not expect either. What else it does is done here: standard streams that are closed are opened, so that no other
//! file gets their numbers, and writing to a pipe that nobody reads is an error.

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, fcntl_getfd};
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::panic::catch_unwind;

/// Exit status of a process that panicked, as Rust's programs have it.
const PANICKED: i32 = 101;

/// As the standard library's, which does not tell its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExitCode(u8);

impl ExitCode {
    pub(crate) const SUCCESS: Self = Self(0);
    pub(crate) const FAILURE: Self = Self(1);
}

impl From<u8> for ExitCode {
    fn from(status: u8) -> Self {
        Self(status)
    }
}

/// Runs `command` and ends the process with its status, or serves a controller if the process was started for that.
pub(crate) fn run(command: fn() -> ExitCode) -> ! {
    let status = catch_unwind(|| {
        open_standard_streams();
        // What `farlink run` starts does not get further.
        farlink::executor::init();
        farlink::executor::ignore_broken_pipes();
        farlink::executor::wait_for_children();
        i32::from(command().0)
    });
    // What is buffered is written.
    std::process::exit(status.unwrap_or(PANICKED))
}

/// Opens those of the standard streams that are closed.
fn open_standard_streams() {
    let streams: [BorrowedFd<'_>; 3] = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    for stream in streams {
        if fcntl_getfd(stream) == Err(Errno::BADF) {
            // The lowest number that is free, which is this one. Without the file, what uses the stream fails.
            let null = rustix::fs::open(c"/dev/null", OFlags::RDWR, Mode::empty());
            let _ = null.map(IntoRawFd::into_raw_fd);
        }
    }
}
