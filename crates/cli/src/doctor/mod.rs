//! `farlink doctor`: tries every mechanism on this machine, and says what works, what does not, why, and what farlink does
//! about it.
//!
//! What could harm this process, or changes it for good, is tried in a process of its own: this program again, with
//! `--probe`. What ends such a process is the answer.

mod attack;
mod machine;
mod probes;
mod report;
mod tools;

use crate::args::DoctorArgs;
use crate::error::Error;
use crate::start::ExitCode;
use std::ffi::OsString;
use std::path::PathBuf;

pub(crate) use attack::Target;
pub(crate) use probes::Probe;

/// What came of trying something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Status {
    Works,
    /// It works in part, or as something to know of.
    Limited,
    Fails,
}

/// Something that was tried.
struct Finding {
    /// Under which heading it is shown.
    group: &'static str,
    name: &'static str,
    status: Status,
    /// What was seen: a version, a number, or why it does not work.
    seen: String,
    /// What farlink does with it, or without it.
    farlink: String,
}

/// The executor that is tried: a program and its first arguments.
struct Program {
    path: PathBuf,
    args: Vec<OsString>,
}

pub(crate) fn doctor(args: &DoctorArgs) -> Result<ExitCode, Error> {
    let this = std::env::current_exe().map_err(Error::NoSelf)?;
    let program = match &args.executor {
        Some(path) => Program { path: path.clone(), args: Vec::new() },
        None => Program { path: this.clone(), args: vec!["executor".into()] },
    };
    if let Some(probe) = args.probe {
        return Ok(probes::answer(probe, &program));
    }
    if let Some(target) = args.attack {
        return attack::attack(target, &program, args.json);
    }
    let mut findings = probes::try_all(&this, args.executor.as_deref());
    let ways: Vec<&str> = findings.iter().filter(|finding| is_way(finding)).map(|finding| finding.name).collect();
    let ways = ways.join(", ");
    findings.extend(machine::settings());
    findings.extend(tools::try_all(&this, args.executor.as_deref()));
    let can_run = !ways.is_empty();
    if args.json { report::json(&findings, can_run) } else { report::text(&findings, &ways) }
        .map_err(|error| Error::Write { path: "stdout".into(), error })?;
    Ok(if can_run { ExitCode::SUCCESS } else { ExitCode::from(crate::FAILURE) })
}

/// Whether a finding is that an executor can be run and reached in some way.
fn is_way(finding: &Finding) -> bool {
    finding.group == probes::EXECUTOR && finding.status != Status::Fails
}
