//! `farlink doctor --attack`: programs that try to get out of a hardened executor, and what comes of each attempt.
//!
//! Each runs in an executor of its own, so that one that goes through helps no other. The same attempts in an executor that
//! is not hardened show what they are about.

use super::Program;
use crate::compile::{Language, compile};
use crate::error::Error;
use crate::signals::Signals;
use crate::start::ExitCode;
use clap::ValueEnum;
use farlink::Session;
use serde_json::json;
use std::io::{self, Write};
use std::time::Duration;

/// The attempts, one function each.
const SOURCE: &str = include_str!("attack.c");

/// How long an attempt may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is attacked.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// A hardened executor.
    Hardened,
    /// A hardened executor without files and network.
    Sandboxed,
    /// An executor as it is otherwise.
    Plain,
}

/// What came of an attempt.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Refused,
    WentThrough,
    /// It cannot be made here.
    NoUse,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::WentThrough => "WENT THROUGH",
            Self::NoUse => "no use here",
        }
    }
}

struct Row {
    name: &'static str,
    outcome: Outcome,
    /// How the executor or the session ended, if it did.
    seen: String,
}

/// Makes all attempts and prints what came of them.
pub(super) fn attack(target: Target, program: &Program, is_json: bool) -> Result<ExitCode, Error> {
    let signals = Signals::install()?;
    let object = {
        let folder = signals.temporary_folder()?;
        let path = folder.path().join("attack.c");
        std::fs::write(&path, SOURCE).map_err(|error| Error::Write { path: path.clone(), error })?;
        // The folder for the object takes the place of this one in what a signal removes.
        compile(&path, Language::C, false, &signals)?
    };
    let names = names();
    let mut rows = Vec::with_capacity(names.len());
    for (index, name) in names.into_iter().enumerate() {
        let (outcome, seen) = attempt(target, program, &object, index)?;
        rows.push(Row { name, outcome, seen });
    }
    print(&rows, is_json).map_err(|error| Error::Write { path: "stdout".into(), error })?;
    let went_through = rows.iter().any(|row| row.outcome == Outcome::WentThrough);
    Ok(if target != Target::Plain && went_through { ExitCode::from(crate::FAILURE) } else { ExitCode::SUCCESS })
}

/// Reads the names of the attempts out of their table.
fn names() -> Vec<&'static str> {
    let name = |line: &'static str| Some(line.strip_prefix("    {\"")?.split_once('"')?.0);
    SOURCE.lines().filter_map(name).collect()
}

/// Makes one attempt.
fn attempt(target: Target, program: &Program, object: &[u8], index: usize) -> Result<(Outcome, String), Error> {
    let session = Session::builder()
        .executor(&program.path, program.args.clone())
        .harden(target != Target::Plain)
        .sandbox(target == Target::Sandboxed)
        .call_timeout(PATIENCE)
        .end_when_stuck(true)
        .spawn()?;
    let library = session.create_library("attack");
    library.add_object("attack.o", object)?;
    library.link_all()?;
    Ok(match library.run_as_main("main", &["attack".into(), index.to_string().into()]) {
        Ok(0) => (Outcome::Refused, String::new()),
        Ok(2) => (Outcome::NoUse, String::new()),
        Ok(_) => (Outcome::WentThrough, String::new()),
        Err(farlink::Error::TimedOut { .. }) => (Outcome::WentThrough, "nobody took notice".to_owned()),
        Err(error) => (Outcome::Refused, error.to_string()),
    })
}

fn print(rows: &[Row], is_json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if is_json {
        let row = |row: &Row| json!({ "attempt": row.name, "outcome": row.outcome.name(), "seen": row.seen });
        return writeln!(out, "{:#}", json!(rows.iter().map(row).collect::<Vec<_>>()));
    }
    for Row { name, outcome, seen } in rows {
        let seen = if seen.is_empty() { String::new() } else { format!(": {seen}") };
        writeln!(out, "{:<13} {name}{seen}", outcome.name())?;
    }
    Ok(())
}
