//! Programs that are their own executors.
//!
//! A controller starts its own program again, with [`EXECUTOR_ARG`] as its first argument. That goes to this one child: what
//! it starts in turn gets neither the argument nor anything in its environment that would make it an executor.

use crate::args::exit_status;
use std::sync::atomic::{AtomicBool, Ordering};

/// The first argument of a program that has been started to be an executor.
pub const EXECUTOR_ARG: &str = "--farlink-be-the-executor";

/// Whether [`init`] has been called.
static CAN_BE_STARTED_AGAIN: AtomicBool = AtomicBool::new(false);

/// Makes this program its own executor: no other program is needed for sessions in a process of their own.
///
/// Call it first in `main`:
///
/// ```no_run
/// fn main() -> Result<(), Box<dyn std::error::Error>> {
///     farlink_executor::init(); // `farlink::executor::init()` for those who use `farlink`
///     // What the program does.
///     Ok(())
/// }
/// ```
///
/// In a process that a controller has started as its executor, this serves the controller and does not return: the process
/// ends with it. In every other process it takes note that this program may be started so, and returns.
///
/// The program's `main` must not have started threads before, must not have changed what is open, and must not depend on
/// its arguments.
pub fn init() {
    let mut args = std::env::args_os().skip(1);
    if args.next().is_some_and(|arg| arg == EXECUTOR_ARG) {
        std::process::exit(exit_status(args));
    }
    CAN_BE_STARTED_AGAIN.store(true, Ordering::Relaxed);
}

/// Returns whether this program can be started again to be an executor: whether [`init`] has been called.
#[must_use]
pub fn can_be_started_again() -> bool {
    CAN_BE_STARTED_AGAIN.load(Ordering::Relaxed)
}
