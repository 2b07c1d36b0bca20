//! The `farlink` command: links and runs object code in another process, and shows what a link does.
//!
//! Failures of farlink itself end with status 125 ([`FAILURE`]), so that they can be told from the statuses of the
//! programs it runs, as `env` and `timeout` do it.

#![forbid(unsafe_code)]

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
mod stats;
mod terminal;
mod trace;

use args::{Cli, Command};
use clap::Parser;
use std::process::ExitCode;

/// Exit status of every failure that is farlink's own.
const FAILURE: u8 = 125;

fn main() -> ExitCode {
    // What `farlink run` starts does not get further.
    farlink::executor::init();
    if let Some(status) = rust::collect() {
        return status;
    }
    let cli = match Cli::try_parse() {
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
        Command::Executor(args) => return farlink::executor::main_with_args(args.args.into_iter()),
    };
    outcome.unwrap_or_else(|error| {
        terminal::print_error(&error);
        ExitCode::from(FAILURE)
    })
}
