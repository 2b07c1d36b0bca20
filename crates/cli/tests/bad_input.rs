//! Bad input and bad luck: each gives one clear message, status 125, and leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, WAYS, available, compile, example, tool};
use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

/// Checks that `farlink run INPUTS` fails with a message that has all of `words`, in both processes' way and in one.
fn refused(inputs: &[PathBuf], words: &[&str]) {
    for way in [&[][..], &["--in-process"]] {
        let message = Farlink::new().arg("run").args(way).args(inputs).failure();
        for word in words {
            assert!(message.contains(word), "{word:?} is not in {message}");
        }
    }
}

struct Dir(TempDir);

impl Dir {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn compile(&self, name: &str, source: &str) -> PathBuf {
        compile(self.0.path(), name, source, &["-fPIC"])
    }
}

const MAIN: &str = "int main(void) { return 0; }";

/// A file that is not there is named, whatever it would have been.
#[test]
fn no_file() {
    for name in ["missing.o", "missing.c", "missing.a", "missing.rs"] {
        refused(&[name.into()], &[name, "No such file"]);
    }
    refused(&["/".into()], &["/", "directory"]);
}

/// Files that are nothing that can be linked are told for what they are.
#[test]
fn files_of_other_kinds() {
    let dir = Dir::new();
    refused(&[dir.write("empty.o", "")], &["empty.o", "empty"]);
    refused(&[dir.write("text.o", "int main() {}\n")], &["text.o", "text"]);
    refused(&[dir.write("noise.o", [0xde, 0xad, 0xbe, 0xef].repeat(100))], &["noise.o"]);
    refused(&[dir.write("text.so", "hello there\n")], &["text.so"]);
    let object = dir.compile("main.c", MAIN);
    let program = dir.0.path().join("program");
    tool(Command::new("cc").arg("-o").arg(&program).arg(&object));
    // A position-independent executable is a shared object to ELF; the program behind it is what the user has.
    refused(&[program], &["executable"]);
    let fixed = dir.0.path().join("fixed");
    tool(Command::new("cc").arg("-no-pie").arg("-o").arg(&fixed).arg(&object));
    refused(&[fixed], &["executable"]);
}

/// An object cut off anywhere is refused; none crashes or hangs.
#[test]
fn truncated_objects() {
    let dir = Dir::new();
    let whole = fs::read(dir.compile("main.c", MAIN)).unwrap();
    for len in [1, 4, 16, 63, 64, whole.len() / 2, whole.len() - 1] {
        refused(&[dir.write("cut.o", &whole[..len])], &["cut.o"]);
    }
}

/// An object for another architecture is told which.
#[test]
fn other_architecture() {
    let dir = Dir::new();
    let mut bytes = fs::read(dir.compile("main.c", MAIN)).unwrap();
    // e_machine is at offset 18; 183 is AArch64.
    bytes[18] = 183;
    refused(&[dir.write("arm.o", bytes)], &["arm.o", "AArch64"]);
    let object = dir.0.path().join("m32.o");
    if Command::new("cc")
        .args(["-m32", "-c", "-o"])
        .arg(&object)
        .arg(dir.write("m32.c", MAIN))
        .status()
        .unwrap()
        .success()
    {
        refused(&[object], &["m32.o", "32"]);
    }
}

/// All undefined symbols are listed, each with the objects that need it.
#[test]
fn undefined_symbols() {
    let dir = Dir::new();
    let a = dir.compile("a.c", "int first(void), second(void); int main(void) { return first() + second(); }");
    let b = dir.compile("b.c", "extern int second(void), third; int other(void) { return second() + third; }");
    refused(&[a, b], &["3 undefined symbols", "first", "second, needed by", "third", "a.c.o", "b.c.o"]);
    let cxx = compile(dir.0.path(), "x.cc", "#include <iostream>\nint main() { std::cout << 1; }", &["-fPIC"]);
    let message = Farlink::new().arg("run").args(["--memory", "remote"]).arg(cxx).failure();
    assert!(message.contains("-l stdc++"), "{message}");
}

/// Two strong definitions of a symbol are refused with both objects' names.
#[test]
fn duplicate_definitions() {
    let dir = Dir::new();
    let a = dir.compile("a.c", "int same(void) { return 1; } int main(void) { return same(); }");
    let b = dir.compile("b.c", "int same(void) { return 2; }");
    refused(&[a, b], &["same", "a.c.o", "b.c.o", "defined twice"]);
}

/// A program without an entry is told so.
#[test]
fn no_entry() {
    let dir = Dir::new();
    refused(&[dir.compile("f.c", "int f(void) { return 1; }")], &["main"]);
    let object = dir.compile("main.c", MAIN);
    let message = Farlink::new().arg("run").args(["--entry", "start"]).arg(object).failure();
    assert!(message.contains("start"), "{message}");
}

/// A relocation that cannot reach its target names the symbol and the way out.
#[test]
fn relocation_out_of_range() {
    let dir = Dir::new();
    let source = "extern int far; int main(void) { return far; }";
    let object = compile(dir.0.path(), "far.c", source, &["-fPIE", "-O1"]);
    for way in common::WAYS {
        let run = Farlink::new().arg("run").args(way).arg(&object).args(["--define", "far=0x10"]);
        let message = run.failure();
        for word in ["far.c.o", "R_X86_64_PC32", "far", "0x10", "-fPIC"] {
            assert!(message.contains(word), "{word:?} is not in {message}");
        }
    }
}

/// What is not supported yet is refused by name: thread-local variables and IFUNCs.
#[test]
fn unsupported_features() {
    let dir = Dir::new();
    let copy = dir.compile("copy.s", ".globl main\nmain: ret\n.reloc main, R_X86_64_COPY, other\n");
    refused(&[copy], &["copy.s.o", "R_X86_64_COPY", "other"]);
    let mixed = [
        dir.compile("tls.c", "extern __thread int value; int main(void) { return value; }"),
        dir.compile("plain.c", "int value = 5;"),
    ];
    refused(&mixed, &["tls.c.o", "value", "thread-local"]);
    let slim = compile(dir.0.path(), "slim.c", MAIN, &["-flto", "-fno-fat-lto-objects"]);
    refused(&[slim], &["slim.c.o", "-ffat-lto-objects"]);
}

/// A shared library that is not there, a library name that nothing has, a source that does not compile.
#[test]
fn libraries_and_sources() {
    let dir = Dir::new();
    let object = dir.compile("main.c", MAIN);
    let message = Farlink::new().arg("run").arg(&object).args(["-l", "nonesuch"]).failure();
    assert!(message.contains("libnonesuch.so") && message.contains("/usr/lib"), "{message}");
    let broken = dir.write("broken.c", "int main(void) { return }\n");
    let output = Farlink::new().arg("run").arg(&broken).output();
    assert_eq!(output.code, Some(125));
    assert!(output.stderr.contains("broken.c was not compiled"), "{}", output.stderr);
    let message = Farlink::new().arg("run").arg(example("hello.c")).env("CC", "/nonexistent/cc").failure();
    assert!(message.contains("/nonexistent/cc") && message.contains("CC"), "{message}");
    let mut library = fs::read("/lib/x86_64-linux-gnu/libm.so.6").unwrap();
    library.truncate(5000);
    refused(&[object, dir.write("libcut.so", library)], &["libcut.so"]);
}

/// A command line that cannot be understood ends with farlink's own status too.
#[test]
fn usage() {
    for args in [&["run"][..], &["run", "--memory", "magic", "x.o"], &["nonsense"], &["run", "x.o", "--define", "x"]] {
        let output = Farlink::new().args(args).output();
        assert_eq!(output.code, Some(125), "{args:?}");
        assert!(output.stderr.contains("Usage") || output.stderr.contains("error"), "{}", output.stderr);
    }
    assert_eq!(Farlink::new().arg("--help").output().code, Some(0));
}

/// An executor program that is missing, is no program, or is no executor.
#[test]
fn bad_executors() {
    let dir = Dir::new();
    let object = dir.compile("main.c", MAIN);
    let with = |executor: &str| Farlink::new().arg("run").arg("--executor").arg(executor).arg(&object).failure();
    let message = with("/nonexistent/executor");
    assert!(message.contains("/nonexistent/executor") && message.contains("No such file"), "{message}");
    let plain = dir.write("plain", "no program");
    assert!(with(plain.to_str().unwrap()).contains("Permission denied"));
    let message = with("/bin/false");
    assert!(message.contains("/bin/false") && message.contains("exited with status 1"), "{message}");
    let message = with("/bin/echo");
    assert!(message.contains("/bin/echo"), "{message}");
}

/// An executor that dies after each number of bytes it has written, before or during set-up or later: a message and
/// no hang.
#[test]
fn executors_that_die() {
    let dir = Dir::new();
    let object = dir.compile("main.c", MAIN);
    let script = |bytes: u32| {
        // Stands between the command and a real executor, and ends both when it has passed on that many bytes.
        let text = format!(
            "#!/usr/bin/env python3\n\
             import os, socket, subprocess, sys\n\
             number = int(sys.argv[1].split('=')[1].split(',')[0])\n\
             ours, theirs = socket.socketpair()\n\
             fd = theirs.fileno()\n\
             real = subprocess.Popen([{:?}, 'executor', f'filedescs={{fd}},{{fd}}', '--farlink'], pass_fds=[fd])\n\
             theirs.close()\n\
             peer = socket.socket(fileno=number)\n\
             left = {bytes}\n\
             import select\n\
             while left > 0:\n\
             \x20   ready, _, _ = select.select([ours, peer], [], [])\n\
             \x20   if ours in ready:\n\
             \x20       data = ours.recv(min(left, 65536))\n\
             \x20       if not data: break\n\
             \x20       peer.sendall(data); left -= len(data)\n\
             \x20   if peer in ready:\n\
             \x20       data = peer.recv(65536)\n\
             \x20       if not data: break\n\
             \x20       ours.sendall(data)\n\
             real.kill(); real.wait(); os._exit(9)\n",
            env!("CARGO_BIN_EXE_farlink")
        );
        let path = dir.write("proxy", text);
        tool(Command::new("chmod").arg("+x").arg(&path));
        path
    };
    if !available("executors_that_die", "python3") {
        return;
    }
    let mut outcomes = Vec::new();
    for bytes in [0, 1, 31, 32, 100, 2000, 4500, 5000, 5100, 5200, 5300, 1_000_000] {
        let output = Farlink::new().arg("run").arg("--executor").arg(script(bytes)).arg(&object).output();
        match output.code {
            Some(125) => assert!(output.stderr.contains("executor"), "{bytes}: {output:?}"),
            // Once the program has been started, the executor's end is the program's.
            Some(0 | 9) => {}
            _ => panic!("{bytes}: {output:?}"),
        }
        outcomes.push(output.code);
    }
    assert!(
        outcomes[..6].iter().all(|&code| code == Some(125)) && outcomes.is_sorted_by_key(|&code| code != Some(125))
    );
}

/// Runs hello with /dev/shm as `mount` makes it, in a mount namespace of its own.
fn with_shm(prepare: &str, memory: &str) -> common::Output {
    let object = Dir::new();
    let hello = object.compile("main.c", "#include <stdio.h>\nint main(void) { puts(\"hello\"); return 0; }");
    let script = format!("{prepare}; exec \"$0\" \"$@\"");
    let run = Farlink::new().args(["run", "--memory", memory]).arg(hello);
    run.through(&["unshare", "-m", "sh", "-c", &script]).output()
}

/// /dev/shm missing, full, read-only or noexec: POSIX shared memory is refused with a message that names it and the way
/// out, and the other kinds of memory work.
#[test]
fn shared_memory_trouble() {
    let can_mount = Command::new("unshare").args(["-m", "true"]).status().is_ok_and(|status| status.success());
    if !can_mount {
        assert!(std::env::var_os("FARLINK_REQUIRE_TOOLS").is_none(), "mount namespaces are needed");
        eprintln!("SKIPPED shared_memory_trouble: mount namespaces are not permitted here");
        return;
    }
    let mount = |options: &str| format!("mount -t tmpfs -o {options} tmpfs /dev/shm");
    let troubles = [
        ("missing", "mount -t tmpfs tmpfs /dev && cat /proc/uptime >/dev/null".to_owned(), "/dev/shm"),
        (
            "full",
            format!("{} && head -c 1M /dev/zero > /dev/shm/filler 2>/dev/null || true", mount("size=64k")),
            "full",
        ),
        ("read-only", mount("ro"), "Read-only"),
        ("noexec", mount("noexec"), "noexec"),
    ];
    for (name, prepare, word) in &troubles {
        let output = with_shm(prepare, "posix");
        assert_eq!(output.code, Some(125), "{name}: {output:?}");
        for word in [word, "/dev/shm", "--memory remote"] {
            assert!(output.stderr.contains(word), "{name}: {word:?} is not in {}", output.stderr);
        }
        for memory in ["shared", "remote"] {
            let output = with_shm(prepare, memory);
            assert_eq!((output.stdout.as_str(), output.code), ("hello\n", Some(0)), "{name} {memory}: {output:?}");
        }
    }
}

/// Little address space, few descriptors, small files: the program runs, or farlink says what there is too little of. No
/// signal, in no kind of memory.
#[test]
fn limits_of_the_system() {
    if !available("limits_of_the_system", "prlimit") {
        return;
    }
    let dir = Dir::new();
    let source =
        "#include <stdio.h>\nstatic char zeros[100000000]; int main(void) { puts(\"hello\"); return zeros[7]; }";
    let object = dir.compile("main.c", source);
    let mut outcomes = HashMap::new();
    for way in WAYS {
        // The program has 100 MB of zeros.
        let address_space =
            [32, 64, 100, 200, 500, 1000, 3000].map(|mebibytes: u64| format!("--as={}", mebibytes << 20));
        let descriptors = (4..16).map(|count| format!("--nofile={count}"));
        let files = [0, 1, 4096, 1 << 20, 100 << 20].map(|bytes: u64| format!("--fsize={bytes}"));
        for limit in address_space.into_iter().chain(descriptors).chain(files) {
            let run = Farlink::new().arg("run").args(way).arg(&object);
            let output = run.through(&["prlimit", &limit, "--"]).output();
            let kind = limit.split('=').next().unwrap().to_owned();
            match (output.code, output.stdout.as_str()) {
                (Some(0), "hello\n") => outcomes.entry(kind).or_insert([0, 0])[0] += 1,
                (Some(125), "") => {
                    // The executor may have said something before.
                    let says = output.stderr.lines().any(|line| line.starts_with("farlink: "));
                    assert!(says, "{way:?} {limit}: {output:?}");
                    outcomes.entry(kind).or_insert([0, 0])[1] += 1;
                }
                // Too little for the program to be started at all: not farlink's words.
                (Some(1 | 126 | 127), "")
                    if output.stderr.contains("prlimit: ") || output.stderr.contains("loading") => {}
                _ => panic!("{way:?} {limit}: {output:?}"),
            }
        }
    }
    // Each limit is enough somewhere, and too little somewhere else.
    assert!(outcomes.len() == 3 && outcomes.values().all(|[well, refused]| *well > 0 && *refused > 0), "{outcomes:?}");
}
