//! Many objects, sections and functions: work is in proportion to them, and nothing recurses.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, compile, tool};
use farlink::{Memory, Session};
use std::fmt::Write;
use std::fs;
use std::process::Command;
use tempfile::TempDir;

/// Each of 100,000 objects needs the next: they are found one after the other, linked as one batch, and removed.
#[test]
fn chain_of_objects() {
    const LENGTH: u32 = 100_000;
    let dir = TempDir::new().unwrap();
    let template = compile(
        dir.path(),
        "link.c",
        "int f_AAAAAA(void); int f_BBBBBB(void) { return f_AAAAAA(); }",
        &["-fPIC", "-O2"],
    );
    let template = fs::read(template).unwrap();
    let position = |name: &[u8]| template.windows(name.len()).position(|window| window == name).unwrap();
    let (callee, function) = (position(b"f_AAAAAA"), position(b"f_BBBBBB"));
    let executor = env!("CARGO_BIN_EXE_farlink");
    let session =
        Session::builder().memory(Memory::Shared).executor(executor, vec!["executor".into()]).spawn().unwrap();
    let library = session.create_library("chain");
    for number in 0..LENGTH {
        let mut bytes = template.clone();
        let mut rename =
            |at: usize, number: u32| bytes[at..at + 8].copy_from_slice(format!("f_{number:06}").as_bytes());
        rename(function, number);
        rename(callee, number + 1);
        library.add_object(&format!("{number}.o"), bytes).unwrap();
    }
    let last = compile(dir.path(), "last.c", &format!("int f_{LENGTH:06}(void) {{ return 42; }}"), &["-fPIC"]);
    library.add_object("last.o", fs::read(last).unwrap()).unwrap();
    assert_eq!(library.run_as_main("f_000000", &["chain".into()]).unwrap(), 42);
    assert_eq!(session.memory_stats().live_allocations, u64::from(LENGTH) + 1);
    drop(library);
    assert_eq!(session.memory_stats().live_allocations, 0);
}

/// An object of 100,000 functions, each in a section of its own and with unwind information: more sections than a section
/// number of 16 bits can name.
#[test]
fn many_sections() {
    const COUNT: usize = 100_000;
    let dir = TempDir::new().unwrap();
    let mut text = String::new();
    for number in 0..COUNT {
        writeln!(
            text,
            ".section .text.f{number},\"ax\"\n.globl f{number}\nf{number}: .cfi_startproc\n mov ${number}, %eax\n ret\n .cfi_endproc"
        )
        .unwrap();
    }
    let functions = compile(dir.path(), "functions.s", &text, &[]);
    let main = format!(
        "int f0(void); int f{last}(void); int main(void) {{ return f0() + f{last}() == {last} ? 7 : 1; }}",
        last = COUNT - 1
    );
    let main = compile(dir.path(), "main.c", &main, &["-fPIC"]);
    for options in [&[][..], &["--gc-sections"]] {
        let output = Farlink::new().arg("run").args(options).args([&main, &functions]).output();
        assert_eq!(output.code, Some(7), "{options:?} {output:?}");
    }
}

/// One section of 100,000 functions.
#[test]
fn many_functions() {
    let dir = TempDir::new().unwrap();
    let mut text = String::from(".text\n");
    for number in 0..100_000 {
        writeln!(text, ".globl f{number}\nf{number}: .cfi_startproc\n mov ${number}, %eax\n ret\n .cfi_endproc")
            .unwrap();
    }
    let functions = compile(dir.path(), "functions.s", &text, &[]);
    // What GNU ld makes of it in one step is as good.
    let merged = dir.path().join("merged.o");
    tool(Command::new("ld").arg("-r").arg("-o").arg(&merged).arg(&functions));
    let main = compile(
        dir.path(),
        "main.c",
        "int f99999(void); int main(void) { return f99999() == 99999 ? 7 : 1; }",
        &["-fPIC"],
    );
    for object in [functions, merged] {
        let output = Farlink::new().arg("run").args([&main, &object]).output();
        assert_eq!(output.code, Some(7), "{output:?}");
    }
}
