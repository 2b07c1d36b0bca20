//! The example language: its programs run from their text, in another process and in this one. Being its own executor, this
//! test has a `main` of its own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "../examples/toy/compiler.rs"]
mod compiler;
#[path = "../examples/toy/lexer.rs"]
mod lexer;
#[path = "../examples/toy/parser.rs"]
mod parser;

use compiler::Program;
use farlink::Session;
use std::sync::{Arc, Mutex};

fn main() {
    farlink::executor::init();
    if std::env::args().any(|arg| arg == "--list") {
        println!("toy: test");
        return;
    }
    for session in [Session::in_process().unwrap(), Session::spawn().unwrap()] {
        programs_run(&session);
        errors_are_said(&session);
        statements_leave_nothing(&session);
    }
    println!("toy: all tests passed");
}

/// The program beside the example prints what it has to; expressions have their values.
fn programs_run(session: &Session) {
    let printed = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&printed);
    let mut program = Program::new(session, move |number| kept.lock().unwrap().push(number)).unwrap();
    program.run(include_str!("../examples/primes.toy")).unwrap();
    assert_eq!(*printed.lock().unwrap(), [76_127.0, 76_127.0_f64.sqrt()]);
    for (text, value) in [
        ("1 + 2 * 3 - 4 / 8;", 6.5),
        ("-(2 - 5) * 2;", 6.0),
        ("7 % 4 == 3;", 1.0),
        ("1 < 2; 2 <= 1;", 0.0),
        ("fn sum(a, b) { return a + b; } sum(sum(1, 2), 4) >= 7;", 1.0),
        (
            "fn even(n) { if n == 0 { return 1; } else { return odd(n - 1); } } fn odd(n) { if n { return even(n - 1); } } even(10);",
            1.0,
        ),
        (
            "fn steps(n) { let count = 0; while n != 1 { if n % 2 { n = 3 * n + 1; } else { n = n / 2; } count = count + 1; } return count; } steps(27);",
            111.0,
        ),
        ("fn old() { return 1; } fn user() { return old(); } user(); fn old() { return 2; } user();", 2.0),
        ("# nothing but a comment\npow(2, 10);", 1024.0),
    ] {
        assert_eq!(program.run(text), Ok(Some(value)), "{text}");
    }
}

/// What is wrong is said, and what comes after it runs.
fn errors_are_said(session: &Session) {
    let mut program = Program::new(session, |_| {}).unwrap();
    for (text, said) in [
        ("1 +;", "an expression wanted"),
        ("fn f( { }", "line 1"),
        ("let 1 = 2;", "a name wanted"),
        ("x;", "x is no variable"),
        ("1 $ 2;", "means nothing"),
        ("1.2.3;", "is no number"),
        ("nowhere(1);", "nowhere"),
        ("fn g() { return 1; } fn g(a) { return 2; }", "g"),
        (&format!("{}1{};", "(".repeat(1000), ")".repeat(1000)), "less deep"),
    ] {
        let error = program.run(text).unwrap_err();
        assert!(error.contains(said), "{text}: {error}");
        if text.starts_with("fn g") {
            assert_eq!(program.run("g() + 1;"), Ok(Some(2.0)));
        }
        assert_eq!(program.run("40 + 2;"), Ok(Some(42.0)), "{text}");
    }
}

/// The functions that statements are compiled to are gone when they have run.
fn statements_leave_nothing(session: &Session) {
    let mut program = Program::new(session, |_| {}).unwrap();
    program.run("fn f(x) { return x; } f(1);").unwrap();
    let before = session.memory_stats().live_bytes;
    for _ in 0..100 {
        program.run("f(1) + f(2);").unwrap();
    }
    assert_eq!(session.memory_stats().live_bytes, before);
}
