//! A small language, from its text to running code in another process.
//!
//! `cargo run -p farlink-cranelift --example toy -- crates/cranelift/examples/primes.toy` runs a program;
//! `cargo run -p farlink-cranelift --example toy` reads one from standard input, line by line, and shows values.

mod compiler;
mod lexer;
mod parser;

use compiler::Program;
use farlink::Session;
use std::io::BufRead;
use std::process::ExitCode;

fn main() -> ExitCode {
    farlink::executor::init();
    let result = match std::env::args_os().nth(1) {
        Some(path) => run_file(path.as_ref()),
        None => read_lines(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("toy: {text}");
            ExitCode::FAILURE
        }
    }
}

fn program() -> Result<Program, String> {
    let session = Session::spawn().map_err(|error| error.to_string())?;
    Program::new(&session, |number| println!("{number}"))
}

fn run_file(path: &std::path::Path) -> Result<(), String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    program()?.run(&text).map(drop)
}

fn read_lines() -> Result<(), String> {
    let mut program = program()?;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| error.to_string())?;
        // What is wrong with a line is said, and the next one has its chance.
        match program.run(&line) {
            Ok(Some(value)) => println!("{value}"),
            Ok(None) => {}
            Err(text) => eprintln!("toy: {text}"),
        }
    }
    Ok(())
}
