//! The executor program.

use std::process::ExitCode;

fn main() -> ExitCode {
    farlink_executor::main_with_args(std::env::args_os().skip(1))
}
