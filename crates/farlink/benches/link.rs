//! Whole links: objects as a C compiler writes them, from their bytes to the address of a function, and away again.
//!
//! `cargo bench -p farlink --bench link`. The executor is a copy of this program.

#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on panics")]

use divan::{Bencher, counter::ItemsCount};
use farlink::{Memory, Session};
use std::fmt::Write;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    if args.iter().any(|arg| arg.to_string_lossy().starts_with("filedescs=")) {
        return farlink::executor::main_with_args(args.into_iter().skip(1));
    }
    divan::main();
    ExitCode::SUCCESS
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    InProcess,
    Shared,
}

const KINDS: [Kind; 2] = [Kind::InProcess, Kind::Shared];

fn session(kind: Kind) -> Session {
    let builder = Session::builder().memory(Memory::Shared);
    match kind {
        Kind::InProcess => builder.in_process().unwrap(),
        Kind::Shared => builder.executor(std::env::current_exe().unwrap(), Vec::new()).spawn().unwrap(),
    }
}

/// Compiles a C source.
fn compile(source: &str, flags: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (text, object) = (dir.path().join("source.c"), dir.path().join("object.o"));
    std::fs::write(&text, source).unwrap();
    let status = Command::new("cc").args(["-c", "-O2", "-fPIC"]).args(flags).arg("-o").arg(&object).arg(&text).status();
    assert!(status.unwrap().success(), "the C compiler works");
    std::fs::read(object).unwrap()
}

/// Copies of an object that defines `f_000000`, each with a name of its own.
fn renamed(template: &[u8], count: usize) -> Vec<Vec<u8>> {
    let at = template.windows(8).position(|window| window == b"f_000000").unwrap();
    let copy = |number: usize| {
        let mut bytes = template.to_vec();
        bytes[at..at + 8].copy_from_slice(format!("f_{number:06}").as_bytes());
        bytes
    };
    (0..count).map(copy).collect()
}

const TINY: &str = "int f_000000(int x) { return x + 1; }";

/// One small object, added and linked, and removed: with unwind information, and without.
#[divan::bench(args = KINDS)]
fn tiny_object(bencher: Bencher, kind: Kind) {
    tiny(bencher, kind, &[]);
}

#[divan::bench(args = KINDS)]
fn tiny_object_without_unwind_information(bencher: Bencher, kind: Kind) {
    tiny(bencher, kind, &["-fno-asynchronous-unwind-tables"]);
}

fn tiny(bencher: Bencher, kind: Kind, flags: &[&str]) {
    let session = session(kind);
    let library = session.create_library("bench");
    let object = compile(TINY, flags);
    bencher.bench(|| {
        let object = library.add_object("tiny.o", object.clone()).unwrap();
        library.lookup("f_000000").unwrap();
        library.remove(object).unwrap();
    });
}

/// A thousand of those with one lookup.
#[divan::bench(args = KINDS)]
fn thousand_objects(bencher: Bencher, kind: Kind) {
    let session = session(kind);
    let objects = renamed(&compile(TINY, &[]), 1000);
    let names: Vec<String> = (0..objects.len()).map(|number| format!("f_{number:06}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    bencher.counter(ItemsCount::new(objects.len())).with_inputs(|| objects.clone()).bench_values(|objects| {
        let library = session.create_library("bench");
        for bytes in objects {
            library.add_object("tiny.o", bytes).unwrap();
        }
        library.lookup_all(&names).unwrap();
        library
    });
}

/// One object of many functions that call each other.
#[divan::bench(args = [4000, 100_000], consts = [0, 1])]
fn many_functions<const KIND: usize>(bencher: Bencher, count: usize) {
    let session = session(KINDS[KIND]);
    let mut source = String::from("int f0(int x) { return x; }\n");
    for number in 1..count {
        writeln!(source, "__attribute__((noinline)) int f{number}(int x) {{ return f{}(x) + {number}; }}", number - 1)
            .unwrap();
    }
    let object = compile(&source, &["-O1"]);
    bencher.counter(ItemsCount::new(count)).with_inputs(|| object.clone()).bench_values(|object| {
        let library = session.create_library("bench");
        library.add_object("functions.o", object).unwrap();
        library.lookup("f0").unwrap();
        library
    });
}
