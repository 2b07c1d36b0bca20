//! LLVM's own tools with our executor, in every mode that they have, and our controller with LLVM's executors.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, available, compile, example, native, tool, ways_of_llvm};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

const HELLO: &str = r#"
    #include <stdio.h>
    static int ran;
    __attribute__((constructor)) static void init(void) { ran = 7; }
    int main(int argc, char **argv) { printf("hello %d, %d\n", ran, argc); fflush(stdout); return 0; }
    "#;

const THROW: &str = r#"
    #include <cstdio>
    #include <stdexcept>
    #include <string>
    struct Gone { int v; Gone(int v) : v(v) {} ~Gone() { std::printf("gone %d\n", v); std::fflush(stdout); } };
    __attribute__((noinline)) int f(int n) {
        Gone local(n);
        if (n > 1) throw std::runtime_error("thrown " + std::to_string(n));
        return n;
    }
    #ifdef GLOBAL
    static Gone global(5);
    #endif
    int main() {
        try { f(1); f(2); } catch (const std::exception &e) {
            std::printf("caught %s\n", e.what());
            std::fflush(stdout);
            return 0;
        }
        return 1;
    }
    "#;

const TLS: &str = r#"
    #include <cstdio>
    #include <thread>
    thread_local int t = 40;
    int main() {
        t++;
        int other = 0;
        std::thread([&] { t++; other = t; }).join();
        std::printf("tls %d %d\n", t, other);
        std::fflush(stdout);
        return t == 41 && other == 41 ? 0 : 1;
    }
    "#;

/// A program, whether it needs LLVM's runtime for linked code, and what it prints with and without that.
struct Program {
    object: PathBuf,
    needs_runtime: bool,
    with: &'static str,
    without: &'static str,
}

fn programs(dir: &Path) -> Vec<Program> {
    let cxx = |name: &str, source: &str, flags: &[&str]| {
        let (path, object) = (dir.join(name), dir.join(format!("{name}.o")));
        std::fs::write(&path, source).unwrap();
        tool(Command::new("c++").args(["-c", "-fPIC"]).args(flags).arg("-o").arg(&object).arg(&path));
        object
    };
    let thrown = "gone 1\ngone 2\ncaught thrown 2\n";
    let program = |object, needs_runtime, with, without| Program { object, needs_runtime, with, without };
    vec![
        program(compile(dir, "hello.c", HELLO, &["-O1", "-fPIC"]), false, "hello 7, 0\n", "hello 0, 0\n"),
        program(compile(dir, "hello_g.c", HELLO, &["-g", "-fPIC"]), false, "hello 7, 0\n", "hello 0, 0\n"),
        program(cxx("throw.cc", THROW, &["-O1"]), false, thrown, thrown),
        program(cxx("throw_g.cc", THROW, &["-g"]), false, thrown, thrown),
        program(cxx("global.cc", THROW, &["-O1", "-DGLOBAL"]), true, "gone 1\ngone 2\ncaught thrown 2\ngone 5\n", ""),
        program(cxx("tls.cc", TLS, &["-O1"]), true, "tls 41 41\n", ""),
    ]
}

impl Program {
    fn expected(&self, has_runtime: bool) -> &'static str {
        if has_runtime { self.with } else { self.without }
    }
}

/// Runs LLVM's linker. On its way out, after the program has run, it may still be linking on other threads, of which it takes
/// no notice: on a busy machine it crashes in that, or says that their trackers are defunct, with any executor. Then it gets
/// another try.
fn output_of_llvm(command: &mut Command, expected: &str) -> Output {
    let mut output = command.output().unwrap();
    for _ in 0..4 {
        let text = String::from_utf8_lossy(&output.stderr);
        let is_its_own =
            text.contains("PLEASE submit a bug report to https://github.com/llvm") || text.contains("defunct");
        if !is_its_own || output.stdout != expected.as_bytes() {
            break;
        }
        eprintln!("once more, for want of an orderly end: {command:?}");
        output = command.output().unwrap();
    }
    output
}

/// Runs `llvm-jitlink` of a version with our executor in each of `modes`, with and without the runtime.
fn jitlink(version: u32, modes: &[&str]) {
    let linker = format!("llvm-jitlink-{version}");
    let runtime = format!("/usr/lib/llvm-{version}/lib/clang/{version}/lib/linux/liborc_rt-x86_64.a");
    let test = format!("jitlink_{version}");
    if !available(&test, &linker) || !available(&test, &runtime) {
        return;
    }
    let dir = TempDir::new().unwrap();
    for program in programs(dir.path()) {
        for mode in modes {
            for has_runtime in [true, false] {
                if program.needs_runtime && !has_runtime {
                    continue;
                }
                let mut command = Command::new(&linker);
                command.arg(format!("-oop-executor={}", executor(dir.path()).display())).args(mode.split_whitespace());
                if has_runtime {
                    command.arg(format!("-orc-runtime={runtime}"));
                }
                command.arg(&program.object);
                let output = output_of_llvm(&mut command, program.expected(has_runtime));
                let (stdout, stderr) =
                    (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
                let what = format!("{} {mode} {has_runtime}", program.object.display());
                assert!(output.status.success(), "{what}: {stdout}{stderr}");
                assert_eq!(stdout, program.expected(has_runtime), "{what}");
                assert_eq!(stderr, "", "{what}");
            }
        }
    }
}

/// Our executor as a program that takes LLVM's arguments.
fn executor(dir: &Path) -> PathBuf {
    let path = dir.join("executor");
    let text = format!("#!/bin/sh\nexec {} executor \"$@\"\n", env!("CARGO_BIN_EXE_farlink"));
    if !path.exists() {
        std::fs::write(&path, text).unwrap();
        tool(Command::new("chmod").arg("+x").arg(&path));
    }
    path
}

/// The linker of LLVM 19: content in messages, and in shared memory, which LLVM's own executor cannot do with the runtime.
#[test]
fn jitlink_19() {
    jitlink(19, &["", "-use-shared-memory"]);
}

/// The linker of LLVM 22, with each of its memory managers.
#[test]
fn jitlink_22() {
    jitlink(22, &["-use-memmgr=default", "-use-memmgr=generic", "-use-memmgr=simple-remote", "-use-memmgr=shared"]);
}

/// The linkers connect over TCP by themselves to an executor that demands no secret. At their end they wait for ever, with
/// LLVM's own executor too: they close a socket that they are still reading. So they are ended when the program has run.
#[test]
fn jitlink_over_tcp() {
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "hello.c", HELLO, &["-O1", "-fPIC"]);
    for version in [19, 22] {
        let linker = format!("llvm-jitlink-{version}");
        if !available("jitlink_over_tcp", &linker) {
            continue;
        }
        let mut executor = Command::new(env!("CARGO_BIN_EXE_farlink"))
            .args(["executor", "listen=localhost:0", "--insecure"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(executor.stderr.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("farlink-executor: listening at ").unwrap();
        let port = address.rsplit_once(':').unwrap().1;
        let connect = format!("-oop-executor-connect=localhost:{port}");
        let mut linker = Command::new(&linker).arg(connect).arg(&object).spawn().unwrap();
        let mut stdout = BufReader::new(executor.stdout.take().unwrap());
        line.clear();
        stdout.read_line(&mut line).unwrap();
        linker.kill().unwrap();
        linker.wait().unwrap();
        assert_eq!(line, "hello 0, 0\n", "{version}");
        executor.wait().unwrap();
    }
}

/// A session with clang's interpreter: functions, globals, classes, redefinition, exceptions.
#[test]
fn clang_repl() {
    const INPUT: &str = r#"
int x = 42;
int twice(int n) { return n * 2; }
extern "C" int printf(const char *, ...);
auto r0 = printf("%d\n", twice(x));
class A { public: int v; A(int v) : v(v) {} int get() { return v + 1; } };
A a(9);
auto r1 = printf("class %d\n", a.get());
int answer() { return 1; }
%undo
int answer() { return 2; }
auto r2 = printf("answer %d\n", answer());
#include <stdexcept>
int boom() { throw std::runtime_error("boom"); }
int guarded() { try { return boom(); } catch (const std::exception &e) { return printf("caught %s\n", e.what()); } }
auto r3 = guarded();
%quit
"#;
    let runtime = "/usr/lib/llvm-22/lib/clang/22/lib/linux/liborc_rt-x86_64.a";
    if !available("clang_repl", "clang-repl-22") || !available("clang_repl", runtime) {
        return;
    }
    let dir = TempDir::new().unwrap();
    for shared in [None, Some("--use-shared-memory")] {
        let mut child = Command::new("clang-repl-22")
            .arg(format!("--oop-executor={}", executor(dir.path()).display()))
            .arg(format!("--orc-runtime={runtime}"))
            .args(shared)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(INPUT.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{shared:?}: {output:?}");
        // The interpreter and the program print to the same stream, each when it likes.
        for line in ["84", "class 10", "answer 2", "caught boom"] {
            assert!(stdout.lines().any(|printed| printed.ends_with(line)), "{shared:?}: {line}: {output:?}");
        }
    }
}

/// Our command with LLVM's executors: C and C++, initializers, exceptions, static objects, end of the program.
#[test]
fn executors_of_llvm() {
    for (linker, source, args) in [("cc", "hello.c", ["a", "b"]), ("c++", "words.cc", ["dog", "dog"])] {
        let expected = native(linker, &[example(source)], &[], &args, b"");
        for way in ways_of_llvm("executors_of_llvm") {
            let run = Farlink::new().arg("run").args(&way).arg(example(source)).arg("--").args(args);
            assert_eq!(run.output(), expected, "{way:?}");
        }
    }
}

/// What LLVM's executors do not have is reported by name, and objects come and go in them.
#[test]
fn sessions_with_executors_of_llvm() {
    use farlink::{Memory, Session};
    let dir = TempDir::new().unwrap();
    let log = dir.path().join("log");
    let source = format!(
        "#include <stdio.h>\n#include <stdlib.h>\nstatic int zeros[3000], n = 1;\n\
         __attribute__((constructor)) static void first(void) {{ n += 10; }}\n\
         __attribute__((destructor)) static void last(void) {{ FILE *f = fopen(\"{}\", \"a\"); fputs(\"end \", f); fclose(f); }}\n\
         int value(int argc, char **argv) {{ if (argc > 1) return *(unsigned char *)strtoul(argv[1], 0, 0); for (int i = 0; i < 3000; i++) n += zeros[i]++; return n; }}",
        log.display()
    );
    let object = std::fs::read(compile(dir.path(), "value.c", &source, &["-O1", "-fPIC"])).unwrap();
    for version in [19, 22] {
        let executor = format!("/usr/lib/llvm-{version}/bin/llvm-jitlink-executor");
        if !available("sessions_with_executors_of_llvm", &executor) {
            continue;
        }
        for memory in [Memory::Shared, Memory::Posix, Memory::Remote] {
            let _ = std::fs::remove_file(&log);
            let session = Session::builder().memory(memory).executor(&executor, Vec::new()).spawn().unwrap();
            let library = session.create_library("main");
            // Memory that is used again is zero.
            for _ in 0..4 {
                let added = library.add_object("value.o", &object[..]).unwrap();
                assert_eq!(library.run_as_main("value", &["value".into()]).unwrap(), 11, "{version} {memory:?}");
                library.remove(added).unwrap();
            }
            assert_eq!(std::fs::read_to_string(&log).unwrap(), "end end end end ", "{version} {memory:?}");
            match session.shared_buffer::<u8>(8) {
                Ok(buffer) => {
                    buffer.set(0, 77).unwrap();
                    let added = library.add_object("value.o", &object[..]).unwrap();
                    let args = ["value".into(), buffer.executor_addr().to_string().into()];
                    assert_eq!(library.run_as_main("value", &args).unwrap(), 77, "{version} {memory:?}");
                    library.remove(added).unwrap();
                }
                Err(error) => assert!(matches!(memory, Memory::Remote), "{version} {memory:?}: {error}"),
            }
            let stats = session.stats().unwrap();
            assert!(stats.usage.executor_mappings.is_none(), "{stats:?}");
        }
    }
}
