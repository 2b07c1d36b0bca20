//! From the death of an executor to the first call of a function in the one that takes its place, and what executors that
//! share linked code take of memory.
//!
//! `FARLINK_EXECUTOR=$PWD/target/release/farlink-executor cargo bench -p farlink --bench restart`

#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on panics")]

use farlink::{Function, Library, Restart, Session};
use std::fs;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// How often each is measured.
const ROUNDS: usize = 51;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    if args.iter().any(|arg| arg.to_string_lossy().starts_with("filedescs=")) {
        return farlink::executor::main_with_args(args.into_iter().skip(1));
    }
    if args.iter().any(|arg| arg == "--test") {
        return ExitCode::SUCCESS;
    }
    println!("death to first call, medians of {ROUNDS}:");
    for (what, source) in [("functions", FUNCTION), ("functions with data", DATA), ("with an initializer", INITIALIZER)]
    {
        for count in [1, 10_000] {
            let times = restarts(source, count);
            println!("  {count:>6} {what}: {:?} (p10 {:?}, p90 {:?})", times[1], times[0], times[2]);
        }
    }
    println!("code of 8 MiB in several executors, proportional set sizes:");
    for count in [1, 2, 4, 8] {
        let [linked, executors, controller] = memory(count);
        println!(
            "  {count} executors: their linked code {linked} KiB, with what the controller has of it {} KiB; all of the \
             executors {executors} KiB",
            linked + controller
        );
    }
    ExitCode::SUCCESS
}

const FUNCTION: &str = "int fN(int n) { return n + N; }";
const DATA: &str = "int dN = N; int fN(int n) { dN += n; return dN; }";
const INITIALIZER: &str =
    "int dN; __attribute__((constructor)) static void iN(void) { dN = N; } int fN(int n) { return n + dN; }";

fn compile(source: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (text, output) = (dir.path().join("source.c"), dir.path().join("output.o"));
    fs::write(&text, source).unwrap();
    let status = Command::new("cc").args(["-O2", "-fPIC", "-c", "-o"]).arg(&output).arg(&text).status();
    assert!(status.unwrap().success(), "the C compiler works");
    fs::read(output).unwrap()
}

/// Objects that are alike but for their numbers, of as many digits.
fn link(library: &Library, source: &str, count: usize) {
    let object = compile(&source.replace('N', "12345"));
    for number in 0..count {
        let mut bytes = object.clone();
        let digits = format!("{number:05}");
        for at in 0..bytes.len() - 5 {
            if &bytes[at..at + 5] == b"12345" {
                bytes[at..at + 5].copy_from_slice(digits.as_bytes());
            }
        }
        library.add_object(&digits, bytes).unwrap();
    }
    library.link_all().unwrap();
}

fn builder() -> farlink::SessionBuilder {
    let program = std::env::var_os("FARLINK_EXECUTOR").map_or_else(|| std::env::current_exe().unwrap(), Into::into);
    Session::builder().executor(program, Vec::new())
}

/// Returns the times of a tenth, a half and nine tenths of restarts.
fn restarts(source: &str, count: usize) -> [Duration; 3] {
    let session = builder().restart(Restart::OnNextCall).spawn().unwrap();
    let library = session.create_library("main");
    link(&library, source, count);
    let last: Function<fn(i32) -> i32> = library.function(&format!("f{:05}", count - 1)).unwrap();
    // SAFETY: it is declared so.
    let call = || unsafe { last.call((0,)) };
    let mut times: Vec<_> = (0..ROUNDS)
        .map(|_| {
            assert_eq!(call().unwrap(), 12345);
            session.kill();
            let _ = session.wait();
            let start = Instant::now();
            // The connection's end may not have been seen.
            while call().is_err() {}
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    [times[ROUNDS / 10], times[ROUNDS / 2], times[ROUNDS * 9 / 10]]
}

/// Returns proportional set sizes in KiB, when as many executors have used all of their linked code: of linked code in them,
/// of everything in them, and of linked code in the controller.
fn memory(count: usize) -> [u64; 3] {
    let session = builder().executors(count).spawn().unwrap();
    let library = session.create_library("main");
    let source = "__attribute__((section(\".text.big\"))) static const char big[8 << 20] = {1};
        int sum(void) { int n = 0; for (int i = 0; i < sizeof big; i += 64) n += big[i]; return n; }";
    library.add_object("big.o", compile(source)).unwrap();
    let sum: Function<fn() -> i32> = library.function("sum").unwrap();
    for index in 0..count {
        // SAFETY: it is declared so.
        assert_eq!(unsafe { sum.clone().on(index).call(()) }.unwrap(), 1);
    }
    let sizes: Vec<_> = session.process_ids().into_iter().map(|pid| shares(pid, "r-x")).collect();
    let (controller, _) = shares(std::process::id(), "rw-s");
    [sizes.iter().map(|sizes| sizes.0).sum(), sizes.iter().map(|sizes| sizes.1).sum(), controller]
}

/// Returns a process's proportional share of linked memory with this protection, and of all memory, in KiB.
fn shares(pid: u32, protection: &str) -> (u64, u64) {
    let (mut linked, mut all, mut is_linked) = (0, 0, false);
    for line in fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap().lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap();
        if !first.ends_with(':') {
            is_linked = line.contains("memfd:farlink (") && words.next().unwrap().starts_with(protection);
        } else if first == "Pss:" {
            let size: u64 = words.next().unwrap().parse().unwrap();
            all += size;
            linked += if is_linked { size } else { 0 };
        }
    }
    (linked, all)
}
