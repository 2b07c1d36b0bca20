//! The executor program.
//!
//! It begins where C programs do. What Rust's start-up code does before `main` it does not need, and linked programs do
//! not expect: a handler for overflowing stacks with a stack of its own for each thread, and SIGPIPE ignored. Starting is
//! a tenth quicker without.

#![no_main]

use std::ffi::{c_char, c_int};

farlink_executor::unwinder_when_needed!();

/// What the C library calls. The arguments are where Rust's standard library has found them.
#[unsafe(no_mangle)]
extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
    farlink_executor::exit_status(std::env::args_os().skip(1))
}
