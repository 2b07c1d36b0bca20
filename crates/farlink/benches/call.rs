//! Calls of linked functions, and calls back.
//!
//! `cargo bench -p farlink --bench call`. The executor is a copy of this program.

#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on panics")]

use divan::Bencher;
use farlink::{Function, Library, Session};
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

const SOURCE: &str = "
    long back(long);
    long add(long a, long b) { return a + b; }
    double many(double a, double b, int c, long d, float e, long f, long g, long h, long i, long j, double k, int l) {
        return a + b + c + d + e + f + g + h + i + j + k + l;
    }
    long call_back(long n) { long sum = 0; for (long i = 0; i < n; i++) sum += back(i); return sum; }";

fn library(kind: Kind) -> Library {
    let session = match kind {
        Kind::InProcess => Session::in_process().unwrap(),
        Kind::Shared => Session::builder().executor(std::env::current_exe().unwrap(), Vec::new()).spawn().unwrap(),
    };
    let dir = tempfile::tempdir().unwrap();
    let (source, object) = (dir.path().join("source.c"), dir.path().join("object.o"));
    std::fs::write(&source, SOURCE).unwrap();
    let status = Command::new("cc").args(["-c", "-O2", "-fPIC", "-o"]).arg(&object).arg(&source).status();
    assert!(status.unwrap().success(), "the C compiler works");
    let library = session.create_library("bench");
    library.add_object("bench.o", std::fs::read(object).unwrap()).unwrap();
    library.define_callback("back", |n: i64| n).unwrap();
    library
}

/// One call with two integers.
#[divan::bench(args = KINDS)]
fn add(bencher: Bencher<'_, '_>, kind: Kind) {
    let add: Function<fn(i64, i64) -> i64> = library(kind).function("add").unwrap();
    // SAFETY: the function is declared so.
    bencher.bench_local(|| unsafe { add.call((divan::black_box(1), 2)) }.unwrap());
}

/// One call with twelve arguments, some on the stack.
#[divan::bench(args = KINDS)]
fn many(bencher: Bencher<'_, '_>, kind: Kind) {
    type Many = fn(f64, f64, i32, i64, f32, i64, i64, i64, i64, i64, f64, i32) -> f64;
    let many: Function<Many> = library(kind).function("many").unwrap();
    let args = (1.0, 2.0, 3, 4, 5.0, 6, 7, 8, 9, 10, 11.0, 12);
    // SAFETY: the function is declared so.
    bencher.bench_local(|| unsafe { many.call(divan::black_box(args)) }.unwrap());
}

/// One call that calls back once.
#[divan::bench(args = KINDS)]
fn call_back(bencher: Bencher<'_, '_>, kind: Kind) {
    let call_back: Function<fn(i64) -> i64> = library(kind).function("call_back").unwrap();
    // SAFETY: the function is declared so.
    bencher.bench_local(|| unsafe { call_back.call((1,)) }.unwrap());
}
