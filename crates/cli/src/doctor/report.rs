//! What was found, for people and for programs.

use super::{Finding, Status};
use crate::terminal::{Paint, WIDTH, wrap};
use farlink::executor::probe::c_library;
use rustix::system::uname;
use serde_json::{Value, json};
use std::io::{self, Write};

/// Returns what this machine is, by what it is called in the report.
fn machine() -> [(&'static str, String); 5] {
    let system = uname();
    let text = |name: &std::ffi::CStr| name.to_string_lossy().into_owned();
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    [
        ("system", format!("{} {}", text(system.sysname()), text(system.release()))),
        ("architecture", text(system.machine())),
        ("c_library", c_library().unwrap_or("unknown".to_owned())),
        ("processors", processors.to_string()),
        ("page_bytes", farlink::mem::page_size().bytes().to_string()),
    ]
}

fn name(status: Status) -> &'static str {
    match status {
        Status::Works => "works",
        Status::Limited => "limited",
        Status::Fails => "fails",
    }
}

/// Prints one JSON object.
pub(super) fn json(findings: &[Finding], can_run: bool) -> io::Result<()> {
    let machine: serde_json::Map<String, Value> =
        machine().into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
    let finding = |finding: &Finding| {
        let Finding { group, name: what, status, seen, farlink } = finding;
        json!({ "group": group, "name": what, "status": name(*status), "seen": seen, "farlink": farlink })
    };
    let findings: Vec<Value> = findings.iter().map(finding).collect();
    let report = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "machine": machine,
        "can_run": can_run,
        "findings": findings,
    });
    writeln!(io::stdout(), "{report:#}")
}

/// Prints a table for people; `ways` are those in which an executor can be run.
pub(super) fn text(findings: &[Finding], ways: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let paint = Paint::on(&io::stdout());
    let [system, architecture, c_library, processors, page] = machine().map(|(_, value)| value);
    let version = env!("CARGO_PKG_VERSION");
    writeln!(
        out,
        "farlink {version} on {system}, {architecture}, {c_library}, {processors} processors, pages of {page} bytes"
    )?;
    let mut group = "";
    for finding in findings {
        if finding.group != group {
            group = finding.group;
            writeln!(out, "\n{}", paint.bold(group))?;
        }
        print(&mut out, finding, paint)?;
    }
    if ways.is_empty() {
        writeln!(out, "\n{}", painted(paint, Status::Fails, "farlink cannot run programs here"))
    } else {
        writeln!(out, "\n{} ({ways})", painted(paint, Status::Works, "farlink can run programs here"))
    }
}

fn print(out: &mut impl Write, finding: &Finding, paint: Paint) -> io::Result<()> {
    const INDENT: &str = "           ";
    let status = format!("{:<7}", name(finding.status));
    let title = format!("  {}  {}", painted(paint, finding.status, &status), finding.name);
    // What is short stands beside the name.
    let is_short = INDENT.len() + finding.name.len() + 2 + finding.seen.chars().count() <= WIDTH;
    if finding.seen.is_empty() {
        writeln!(out, "{title}")?;
    } else if is_short && !finding.seen.contains('\n') {
        writeln!(out, "{title}: {}", finding.seen)?;
    } else {
        writeln!(out, "{title}:")?;
        print_wrapped(out, INDENT, "", &finding.seen, paint)?;
    }
    print_wrapped(out, INDENT, "farlink: ", &finding.farlink, paint)
}

/// Prints text in lines that are not too long, with a label before the first.
fn print_wrapped(out: &mut impl Write, indent: &str, label: &str, text: &str, paint: Paint) -> io::Result<()> {
    let mut label = label.to_owned();
    for line in wrap(text, WIDTH - indent.len() - label.len()) {
        writeln!(out, "{indent}{}", paint.dim(&format!("{label}{line}")))?;
        label = " ".repeat(label.len());
    }
    Ok(())
}

fn painted(paint: Paint, status: Status, text: &str) -> String {
    match status {
        Status::Works => paint.green(text),
        Status::Limited => paint.yellow(text),
        Status::Fails => paint.red(text),
    }
}
