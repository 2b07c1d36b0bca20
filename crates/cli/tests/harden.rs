//! Hardened executors: attempts to get out of them fail, programs that do not try run as ever, and what is not possible any
//! more is said.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, compile, example};
use farlink::{Library, Memory, Session};
use std::collections::HashMap;
use std::fs;
use tempfile::TempDir;

fn attack(target: &str) -> HashMap<String, String> {
    let output = Farlink::new().args(["doctor", "--json", &format!("--attack={target}")]).output();
    let rows: serde_json::Value = serde_json::from_str(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let text = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap().to_owned();
    let rows: HashMap<String, String> =
        rows.as_array().unwrap().iter().map(|row| (text(row, "attempt"), text(row, "outcome"))).collect();
    let went_through = rows.values().any(|outcome| outcome == "WENT THROUGH");
    assert_eq!(output.code, Some(if went_through && target != "plain" { 125 } else { 0 }));
    rows
}

/// No attempt goes through, in a hardened executor or in a sandboxed one.
#[test]
fn no_attack_goes_through() {
    for target in ["hardened", "sandboxed"] {
        let rows = attack(target);
        let through: Vec<_> = rows.iter().filter(|(_, outcome)| *outcome != "refused").collect();
        assert!(rows.len() > 40 && through.is_empty(), "{target}: {through:?}");
    }
}

/// The attempts are ones that an executor which is not hardened allows, as far as it has no reason of its own not to.
#[test]
fn attacks_are_real() {
    let rows = attack("plain");
    for name in [
        "new code: make data executable",
        "new code: make the stack executable",
        "new code: map memory that is writable and executable",
        "new code: map memory that is executable",
        "new code: map a file",
        "new code: map a file without a name",
        "new code: load a library",
        "new code: run another program",
        "shared memory: map code to write",
        "shared memory: write code through a descriptor",
        "controller: send it a signal",
    ] {
        assert_eq!(rows[name], "WENT THROUGH", "{name}");
    }
    for name in ["code: make it writable", "shared memory: cut it off", "connection: forge a result"] {
        assert_eq!(rows[name], "refused", "{name}");
    }
}

/// Programs run as ever: output, threads with variables of their own, exceptions, libraries, forks, finalizers.
#[test]
fn programs_run() {
    let source = r#"
        #include <atomic>
        #include <cmath>
        #include <cstdio>
        #include <cstdlib>
        #include <stdexcept>
        #include <sys/wait.h>
        #include <thread>
        #include <unistd.h>
        #include <vector>
        #ifdef VARIABLES
        static thread_local int mine = 5;
        #else
        static std::atomic<int> mine(1);
        #endif
        static int shared = 1;
        struct Last { ~Last() { puts("last"); } } last;
        int main(int argc, char **argv) {
            setvbuf(stdout, nullptr, _IONBF, 0);
            std::vector<std::thread> threads;
            for (int i = 0; i < 4; i++) threads.emplace_back([] { mine++; std::vector<char> big(1 << 22, 1); });
            for (auto &thread : threads) thread.join();
            try { throw std::runtime_error("thrown"); } catch (std::exception &e) { puts(e.what()); }
            pid_t pid = fork();
            if (pid == 0) { shared = 7; _exit(shared); }
            int status;
            waitpid(pid, &status, 0);
            printf("%d %d %d %.3f\n", (int)mine, shared, WEXITSTATUS(status), std::cos(argc));
            FILE *file = fopen("/dev/null", "r");
            puts(file ? "files" : "no files");
            return 3;
        }"#;
    let dir = TempDir::new().unwrap();
    for (flag, files, variables) in [("--harden", "files", "-DVARIABLES"), ("--sandbox", "no files", "-DNONE")] {
        let object = compile(dir.path(), "program.cc", source, &["-O1", "-fPIC", variables]);
        let run = Farlink::new().args(["run", flag]).arg(&object).args(["-l", "stdc++", "-l", "m"]);
        let output = run.output();
        let forked = if flag == "--harden" { 7 } else { 125 };
        let expected = format!("thrown\n5 1 {forked} 0.540\n{files}\nlast\n");
        assert_eq!((output.stdout, output.code), (expected, Some(3)), "{flag}: {}", output.stderr);
    }
    let output = Farlink::new().args(["run", "--harden"]).arg(example("hello.c")).output();
    assert!(output.stdout.starts_with("hello") && output.stderr.is_empty(), "{output:?}");
    for way in [&["--memory", "remote"][..], &["--memory", "posix"]] {
        let text = Farlink::new().args(["run", "--harden"]).args(way).arg(example("hello.c")).failure();
        assert!(text.contains("the executor cannot lock itself"), "{text}");
    }
}

/// Deaths are reported as ever, also where no file can be opened any more.
#[test]
fn deaths_are_reported() {
    let source = "#include <stdlib.h>\nstatic int compare(const void *a, const void *b) { return *(volatile int *)8; }\n\
        int main(void) { int values[2] = {2, 1}; qsort(values, 2, 4, compare); return 0; }";
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "crash.c", source, &["-O1", "-fPIC", "-w"]);
    for flag in ["--harden", "--sandbox"] {
        let output = Farlink::new().args(["run", flag]).arg(&object).output();
        assert_eq!(output.code, Some(128 + 11));
        for wanted in ["at the address 0x8: nothing is mapped there; in compare+", "libc.so.6", "main+"] {
            assert!(output.stderr.contains(wanted), "{flag}: {wanted}: {}", output.stderr);
        }
    }
}

fn session(reservation_bytes: u64) -> (Session, Library) {
    let executor = env!("CARGO_BIN_EXE_farlink");
    let builder = Session::builder().executor(executor, vec!["executor".into()]).memory(Memory::Shared);
    let session = builder.harden(true).reservation_bytes(reservation_bytes).spawn().unwrap();
    let library = session.create_library("main");
    (session, library)
}

fn add(library: &Library, name: &str, source: &str) -> farlink::Object {
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), name, source, &["-O1", "-fPIC"]);
    library.add_object(name, fs::read(object).unwrap()).unwrap()
}

/// Once it is locked, objects come and go, libraries that are open are found, others are refused with the reason, and so
/// is memory beyond what was reserved.
#[test]
fn what_is_locked() {
    let (session, library) = session(64 << 20);
    library.add_shared_library("libm.so.6").unwrap();
    let measures = session.lock().unwrap();
    assert!(measures.len() >= 5, "{measures:?}");
    for measure in measures {
        assert_eq!(measure.problem, None, "{}", measure.name);
    }
    for round in 0..50 {
        let object = add(
            &library,
            "f.c",
            &format!("#include <math.h>\nstatic int n = {round}; int f(void) {{ return n++ + (int)sqrt(n * 0.0); }}"),
        );
        assert_eq!(library.run_as_main("f", &[]).unwrap(), round);
        library.remove(object).unwrap();
    }
    library.add_shared_library("libm.so.6").unwrap();
    let error = library.add_shared_library("libresolv.so.2").unwrap_err().to_string();
    assert!(error.contains("libresolv.so.2 has to be opened before the executor is locked"), "{error}");
    let big = "char filler[40 << 20]; int big(void) { return filler[0]; }";
    let other = session.create_library("other");
    add(&other, "big.c", big);
    let error = other.lookup("big").unwrap_err().to_string();
    assert!(error.contains("a locked executor maps no more code"), "{error}");
    add(&library, "g.c", "int g(void) { return 6; }");
    assert_eq!(library.run_as_main("g", &[]).unwrap(), 6);
}
