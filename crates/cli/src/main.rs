//! The `farlink` command: links and runs object code in another process, and shows what a link does.
//!
//! Failures of farlink itself end with status 125 ([`FAILURE`]), so that they can be told from the statuses of the
//! programs it runs, as `env` and `timeout` do it.

#![cfg_attr(not(test), no_main)]
#![deny(unsafe_code)]

mod args;
mod compile;
mod debugger;
mod doctor;
mod error;
mod inputs;
mod inspect;
mod link;
mod manual;
mod map;
mod progress;
mod run;
mod rust;
mod script;
mod signals;
mod start;
mod stats;
mod terminal;
mod trace;

use args::{Cli, Command};
use start::ExitCode;
use std::ffi::{c_char, c_int};

/// Exit status of every failure that is farlink's own.
const FAILURE: u8 = 125;

farlink::executor::unwinder_when_needed!();

/// What the C library calls. The arguments are where Rust's standard library has found them.
#[allow(unsafe_code, reason = "the name is the C library's")]
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
    start::run(command)
}

/// Does what the command line says.
fn command() -> ExitCode {
    if let Some(status) = rust::collect() {
        return status;
    }
    let cli = match Cli::read() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are printed by the same means, and are no failures.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(FAILURE) } else { ExitCode::SUCCESS };
        }
    };
    let outcome = match cli.command {
        Command::Run(args) => run::run(args),
        Command::Link(args) => link::link(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Completions(args) => manual::completions(&args),
        Command::Man(args) => manual::man(&args),
        Command::Executor(args) => std::process::exit(farlink::executor::exit_status(args.args.into_iter())),
    };
    outcome.unwrap_or_else(|error| {
        terminal::print_error(&error);
        ExitCode::from(FAILURE)
    })
}
