//! From nothing to the first call of a linked function, beside the start and the end of a native process.
//!
//! `FARLINK_EXECUTOR=$PWD/target/release/farlink-executor cargo bench -p farlink --bench start`; without the variable, the
//! executor is a copy of this program, which is larger.

#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on panics")]

use divan::Bencher;
use farlink::{Function, Session};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    if args.iter().any(|arg| arg.to_string_lossy().starts_with("filedescs=")) {
        return farlink::executor::main_with_args(args.into_iter().skip(1));
    }
    divan::main();
    ExitCode::SUCCESS
}

/// Compiles a C source; `output` makes it an object or a program.
fn compile(source: &str, dir: &std::path::Path, flags: &[&str]) -> std::path::PathBuf {
    let (text, output) = (dir.join("source.c"), dir.join("output"));
    std::fs::write(&text, source).unwrap();
    let status = Command::new("cc").args(["-O2", "-fPIC"]).args(flags).arg("-o").arg(&output).arg(&text).status();
    assert!(status.unwrap().success(), "the C compiler works");
    output
}

fn session() -> Session {
    let builder = Session::builder();
    let builder = match std::env::var_os("FARLINK_EXECUTOR") {
        Some(path) => builder.executor(path, Vec::new()),
        None => builder.executor(std::env::current_exe().unwrap(), Vec::new()),
    };
    builder.spawn().unwrap()
}

fn first_call(object: &[u8]) -> Session {
    let session = session();
    let library = session.create_library("main");
    library.add_object("add.o", object.to_vec()).unwrap();
    let add: Function<fn(i32, i32) -> i32> = library.function("add").unwrap();
    // SAFETY: `add` is declared so.
    assert_eq!(unsafe { add.call((20, 22)) }.unwrap(), 42);
    session
}

/// Until the executor has introduced itself.
#[divan::bench(sample_size = 1, sample_count = 200)]
fn spawn(bencher: Bencher<'_, '_>) {
    // The end, in the drop of the value, is not measured.
    bencher.bench_local(session);
}

/// Until a linked function has been called.
#[divan::bench(sample_size = 1, sample_count = 200)]
fn spawn_to_first_call(bencher: Bencher<'_, '_>) {
    let dir = tempfile::tempdir().unwrap();
    let object = compile("int add(int a, int b) { return a + b; }", dir.path(), &["-c"]);
    let object = std::fs::read(object).unwrap();
    bencher.bench_local(|| first_call(&object));
}

/// As before, and until the executor's process has ended.
#[divan::bench(sample_size = 1, sample_count = 200)]
fn spawn_to_end(bencher: Bencher<'_, '_>) {
    let dir = tempfile::tempdir().unwrap();
    let object = compile("int add(int a, int b) { return a + b; }", dir.path(), &["-c"]);
    let object = std::fs::read(object).unwrap();
    bencher.bench_local(|| drop(first_call(&object)));
}

/// The start and the end of a program that does nothing, linked with the C library as usual.
#[divan::bench(sample_size = 1, sample_count = 200)]
fn native_process(bencher: Bencher<'_, '_>) {
    let dir = tempfile::tempdir().unwrap();
    let program = compile("int main(void) { return 0; }", dir.path(), &[]);
    bencher.bench_local(|| Command::new(&program).status().unwrap());
}

/// As before, linked statically.
#[divan::bench(sample_size = 1, sample_count = 200)]
fn native_static_process(bencher: Bencher<'_, '_>) {
    let dir = tempfile::tempdir().unwrap();
    let program = compile("int main(void) { return 0; }", dir.path(), &["-static"]);
    bencher.bench_local(|| Command::new(&program).status().unwrap());
}
