//! A host for plugins, each in a process of its own: what one does wrong is its own end, and nobody else's.
//!
//!     cargo run -p farlink --example plugin_host [SOURCE.c ...]
//!
//! A plugin has `int run(int number)`, and can call
//! `void report(long number)`, which is a closure of the host's. Without sources the host has three of its own, one of
//! which crashes and one of which never ends.

mod common;

use common::{Result, compile};
use farlink::{Error, Session};
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

const PLUGINS: [(&str, &str); 3] = [
    ("count", "void report(long); int run(int n) { for (int i = 1; i <= n; i++) report(i); return n; }"),
    ("crash", "void report(long); int run(int n) { report(n); return *(volatile int *)(long)n; }"),
    ("stuck", "#include <unistd.h>\nint run(int n) { for (;;) usleep(n); }"),
];

/// How long a plugin may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// What is passed to each plugin.
const NUMBER: i32 = 7;

/// Runs a plugin in a process of its own; gives its result and the sum of what it has reported.
fn run(name: &str, source: &str) -> Result<(i32, i64)> {
    let session = Session::builder().call_timeout(PATIENCE).end_when_stuck(true).spawn()?;
    let library = session.create_library(name);
    let total = Arc::new(AtomicI64::new(0));
    let sum = Arc::clone(&total);
    library.define_callback("report", move |number: i64| {
        sum.fetch_add(number, Ordering::Relaxed);
    })?;
    library.add_object(name, compile(source, &["-O1"])?)?;
    let run = library.function::<fn(i32) -> i32>("run")?;
    // SAFETY: plugins are to declare the function so. One that does not is in a process of its own.
    let result = unsafe { run.call((NUMBER,)) }?;
    Ok((result, total.load(Ordering::Relaxed)))
}

fn main() -> Result<()> {
    farlink::executor::init();
    let mut plugins: Vec<(String, String)> = Vec::new();
    for path in std::env::args().skip(1) {
        let source = fs::read_to_string(&path)?;
        plugins.push((path, source));
    }
    if plugins.is_empty() {
        plugins = PLUGINS.map(|(name, source)| (name.to_owned(), source.to_owned())).to_vec();
    }
    for (name, source) in plugins {
        match run(&name, &source) {
            Ok((result, total)) => println!("{name}: {result}, reported {total}"),
            Err(error) => match error.downcast_ref() {
                Some(Error::ExecutorEnded(death)) => println!("{name}: {}", death.report()),
                _ => println!("{name}: {error}"),
            },
        }
    }
    Ok(())
}
