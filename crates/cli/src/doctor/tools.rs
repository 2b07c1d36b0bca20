//! Compilers, debuggers and profilers: each does what it is there for.

use super::probes::outcome;
use super::{Finding, Status};
use crate::compile::{Language, compiler_command};
use std::path::Path;
use std::process::Command;
use std::thread;
use tempfile::TempDir;

const COMPILERS: &str = "compilers";
const TOOLS: &str = "debugging and profiling";

/// The exit status of the programs that are compiled.
const ANSWER: i32 = 42;

/// A language, its name, the name of a source, and a program that ends with [`ANSWER`].
const PROGRAMS: [(Language, &str, &str, &str); 5] = [
    (Language::C, "C", "answer.c", "int main(void) { return 42; }\n"),
    (Language::Cxx, "C++", "answer.cc", "int main() { try { throw 42; } catch (int answer) { return answer; } }\n"),
    (Language::Assembly, "assembly", "answer.s", ".globl main\nmain:\n mov $42, %eax\n ret\n"),
    (Language::Fortran, "Fortran", "answer.f90", "program answer\n  stop 42\nend program\n"),
    (Language::Rust, "Rust", "answer.rs", "fn main() {\n    std::process::exit(42)\n}\n"),
];

/// Tries all of them, beside each other where there can be threads.
pub(super) fn try_all(this: &Path, executor: Option<&Path>) -> Vec<Finding> {
    type Try<'a> = Box<dyn Fn() -> Finding + Sync + 'a>;
    let compilers = PROGRAMS.map(|program| Box::new(move || compiler(program, this, executor)) as Try<'_>);
    let tries: Vec<Try<'_>> = compilers.into_iter().chain([Box::new(gdb) as Try<'_>, Box::new(perf)]).collect();
    thread::scope(|scope| {
        let start = |one| thread::Builder::new().spawn_scoped(scope, one);
        let threads: Vec<_> = tries.iter().map(|one| (one, start(one))).collect();
        let finish = |(one, thread): (&Try<'_>, std::io::Result<thread::ScopedJoinHandle<'_, Finding>>)| {
            thread.ok().and_then(|thread| thread.join().ok()).unwrap_or_else(one)
        };
        threads.into_iter().map(finish).collect()
    })
}

/// Compiles a program with the compiler of a language, links it, and runs it.
fn compiler(
    (language, name, file, source): (Language, &'static str, &str, &str),
    this: &Path,
    executor: Option<&Path>,
) -> Finding {
    let finding = |status, seen, farlink: &str| {
        let farlink = farlink.to_owned();
        Finding { group: COMPILERS, name, status, seen, farlink }
    };
    let version = match version(&mut compiler_command(language)) {
        Ok(version) => version,
        Err(why) => return finding(Status::Limited, why, "takes no sources in it, but objects"),
    };
    let tried = TempDir::with_prefix("farlink-").and_then(|folder| {
        let path = folder.path().join(file);
        std::fs::write(&path, source)?;
        let mut command = Command::new(this);
        command.arg("run");
        if let Some(executor) = executor {
            command.arg("--executor").arg(executor);
        }
        Ok(outcome(command.arg(&path)))
    });
    match tried {
        Ok(Ok((_, ANSWER))) => finding(Status::Works, version, "compiles, links and runs sources in it"),
        Ok(Ok((text, status))) => {
            let line = text.lines().last().unwrap_or_default();
            let seen = format!("{version}; a program of it ended with {status} instead of {ANSWER}: {line}");
            finding(Status::Fails, seen, "cannot run programs in it")
        }
        Ok(Err(why)) => finding(Status::Fails, format!("{version}; {why}"), "cannot run programs in it"),
        Err(error) => finding(Status::Fails, error.to_string(), "cannot compile without a folder for temporary files"),
    }
}

/// Returns what a program calls itself.
fn version(command: &mut Command) -> Result<String, String> {
    let (text, status) = outcome(command.arg("--version"))?;
    let line = text.lines().next().unwrap_or_default().to_owned();
    if status == 0 { Ok(line) } else { Err(line) }
}

/// Has the debugger start a program and stop it.
fn gdb() -> Finding {
    let finding = |status, seen, farlink: &str| {
        let farlink = farlink.to_owned();
        Finding { group: TOOLS, name: "gdb", status, seen, farlink }
    };
    let version = match version(&mut Command::new("gdb")) {
        Ok(version) => version,
        Err(why) => return finding(Status::Limited, why, "runs programs all the same"),
    };
    let mut command = Command::new("gdb");
    command.args(["-nx", "-q", "-batch", "-ex", "starti", "-ex", "kill", "--args", "/bin/true"]);
    match outcome(&mut command) {
        Ok((text, _)) if text.contains("Program stopped") => finding(Status::Works, version, GDB_WORKS),
        Ok((text, _)) => {
            let why = text.lines().find(|line| line.contains("ptrace") || line.contains("trace the inferior"));
            let why = why.unwrap_or("it cannot start programs");
            finding(Status::Limited, format!("{version}; {why}"), "runs programs all the same")
        }
        Err(why) => finding(Status::Limited, format!("{version}; {why}"), "runs programs all the same"),
    }
}

/// What there is for debuggers.
const GDB_WORKS: &str =
    "shows it linked code with -g, in executors that it attaches to (--wait-for-debugger) or has started";

/// Has the profiler look at a program.
fn perf() -> Finding {
    let finding = |status, seen, farlink: &str| {
        let farlink = farlink.to_owned();
        Finding { group: TOOLS, name: "perf", status, seen, farlink }
    };
    let version = match version(&mut Command::new("perf")) {
        Ok(version) => version,
        Err(why) => return finding(Status::Limited, why, "runs programs all the same"),
    };
    let tried = TempDir::with_prefix("farlink-").map(|folder| {
        let mut command = Command::new("perf");
        command.args(["record", "-q", "-e", "cpu-clock", "-o"]).arg(folder.path().join("perf.data")).arg("true");
        outcome(&mut command)
    });
    match tried {
        Ok(Ok((_, 0))) => finding(Status::Works, version, PERF_WORKS),
        Ok(Ok((text, _))) => {
            let why = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
            finding(Status::Limited, format!("{version}; {why}"), "runs programs all the same")
        }
        Ok(Err(why)) => finding(Status::Limited, format!("{version}; {why}"), "runs programs all the same"),
        Err(error) => finding(Status::Limited, error.to_string(), "runs programs all the same"),
    }
}

/// What there is for profilers.
const PERF_WORKS: &str = "tells it the names of linked functions with --perf";
