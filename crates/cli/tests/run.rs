//! `farlink run`: programs behave as their native builds do, in each way of running them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, Output, WAYS, compile, example, native, tool};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Runs `inputs` in every way and checks that each gives what the native build gives.
fn same_as_native(linker: &str, inputs: &[PathBuf], extra: &[&str], args: &[&str], stdin: &[u8]) -> Output {
    let expected = native(linker, inputs, extra, args, stdin);
    for way in WAYS {
        let run = Farlink::new().arg("run").args(way).args(inputs).args(extra).arg("--").args(args).stdin(stdin);
        assert_eq!(run.output(), expected, "{way:?}");
    }
    expected
}

/// The C example gets its arguments, prints, and exits with its own status.
#[test]
fn c_example() {
    let expected = same_as_native("cc", &[example("hello.c")], &[], &["a", "b"], b"");
    assert_eq!(expected.code, Some(2));
    assert!(expected.stdout.contains("argument 2: b"));
}

/// The C++ example: exceptions of its own and of the library, containers, iostreams, static objects.
#[test]
fn cxx_example() {
    let expected = same_as_native("c++", &[example("words.cc")], &[], &["dog", "dog"], b"");
    assert_eq!(expected.code, Some(3));
    assert!(expected.stdout.contains("caught: out of range"));
    assert!(expected.stdout.ends_with("leave program\n"));
}

/// Objects of every kind that C and C++ compilers write for ordinary programs: position-independent or for an
/// executable, every optimization level, a section for each function or not.
#[test]
fn compiler_flags() {
    let compilers = [("cc", "hello.c"), ("c++", "words.cc"), ("clang-22", "hello.c"), ("clang++-22", "words.cc")];
    for (compiler, source) in compilers {
        if compiler.starts_with("clang") && !common::available("compiler_flags", compiler) {
            continue;
        }
        let linker = if source.ends_with(".cc") { "c++" } else { "cc" };
        let mut expected = None;
        for level in ["-O0", "-O1", "-O2", "-O3"] {
            for pic in ["-fPIC", "-fPIE"] {
                for sections in [&[][..], &["-ffunction-sections", "-fdata-sections"]] {
                    let dir = TempDir::new().unwrap();
                    let object = dir.path().join("program.o");
                    let mut command = Command::new(compiler);
                    command.args(["-c", level, pic]).args(sections).arg("-o").arg(&object).arg(example(source));
                    tool(&mut command);
                    let expected = expected.get_or_insert_with(|| native(linker, [&object], &[], &["x"], b""));
                    let run = Farlink::new().arg("run").arg(&object).args(["-l", "stdc++", "--", "x"]);
                    assert_eq!(&run.output(), expected, "{compiler} {level} {pic} {sections:?}");
                }
            }
        }
    }
}

/// Standard input, environment and standard error are the program's.
#[test]
fn streams_and_environment() {
    let source = r#"
        #include <stdio.h>
        #include <stdlib.h>
        int main(void) {
            char line[64];
            int lines = 0;
            while (fgets(line, sizeof line, stdin)) { lines++; fputs(line, stdout); }
            fprintf(stderr, "read %d lines, HOME2 is %s\n", lines, getenv("HOME2"));
            return lines;
        }"#;
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "cat.c", source, &["-O1", "-fPIC"]);
    for way in WAYS {
        let run = Farlink::new().arg("run").args(way).arg(&object).env("HOME2", "here").stdin(b"one\ntwo\n");
        let expected = Output {
            stdout: "one\ntwo\n".to_owned(),
            stderr: "read 2 lines, HOME2 is here\n".to_owned(),
            code: Some(2),
        };
        assert_eq!(run.output(), expected, "{way:?}");
    }
}

/// A command whose standard streams are closed runs a program all the same: their numbers go to nothing else. What the
/// program reads and writes there is lost.
#[test]
fn closed_streams() {
    let source = r#"
        #include <stdio.h>
        int main(void) { return getchar() == EOF && printf("lost\n") == 5 && fflush(stdout) == 0 ? 7 : 8; }"#;
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "closed.c", source, &["-O1", "-fPIC"]);
    for way in WAYS {
        let mut shell = Command::new("sh");
        shell.args(["-c", r#"exec "$0" run "$@" <&- >&-"#, env!("CARGO_BIN_EXE_farlink")]).args(way).arg(&object);
        let output = shell.output().unwrap();
        assert_eq!((output.status.code(), output.stderr, output.stdout), (Some(7), vec![], vec![]), "{way:?}");
    }
}

/// A command that is started by somebody who does not want to know of its children's ends knows how its own ended, the
/// compiler first.
#[test]
fn ignored_children() {
    let dir = TempDir::new().unwrap();
    let source = dir.path().join("seven.c");
    std::fs::write(&source, "int main(void) { return 7; }").unwrap();
    let mut shell = Command::new("bash");
    shell.args(["-c", r#"trap '' CHLD; exec "$0" run "$@""#, env!("CARGO_BIN_EXE_farlink")]).arg(&source);
    let output = shell.output().unwrap();
    assert_eq!((output.status.code(), output.stderr, output.stdout), (Some(7), vec![], vec![]));
}

/// argv[0] is the program's name, argv ends with a null pointer, and `main` runs on the process's main thread.
#[test]
fn main_is_called_as_natively() {
    let source = r#"
        #define _GNU_SOURCE
        #include <stdio.h>
        #include <string.h>
        #include <unistd.h>
        #include <stdlib.h>
        extern char **environ;
        int main(int argc, char **argv, char **envp) {
            const char *name = strrchr(argv[0], '/');
            printf("%d %s %d %d\n", argc, name ? name + 1 : argv[0], argv[argc] == NULL, envp == environ);
            return gettid() == getpid() ? 0 : 1;
        }"#;
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "called.c", source, &["-fPIC"]);
    for way in WAYS {
        let output = Farlink::new().arg("run").args(way).arg(&object).args(["--", "", "a b"]).output();
        assert_eq!((output.stdout.as_str(), output.code), ("3 called.c 1 1\n", Some(0)), "{way:?}");
    }
}

/// Constructors, destructors, `atexit` and static objects run in the native order, priorities included, over two
/// objects; also when the program calls `exit` itself.
#[test]
fn initializers_and_exits() {
    let source = |part: &str| {
        format!(
            r#"
            #include <cstdio>
            #include <cstdlib>
            #include <cstring>
            struct Static {{
                Static() {{ puts("static {part}"); }}
                ~Static() {{ puts("~static {part}"); }}
            }};
            static Static object;
            __attribute__((constructor(200))) static void late() {{ puts("constructor 200 {part}"); }}
            __attribute__((constructor(101))) static void early() {{ puts("constructor 101 {part}"); }}
            __attribute__((constructor)) static void plain() {{ puts("constructor {part}"); }}
            __attribute__((destructor(200))) static void d_late() {{ puts("destructor 200 {part}"); }}
            __attribute__((destructor(101))) static void d_early() {{ puts("destructor 101 {part}"); }}
            __attribute__((destructor)) static void d_plain() {{ puts("destructor {part}"); }}
            static void at_exit() {{ puts("atexit {part}"); }}
            void part_{part}() {{ static Static local; atexit(at_exit); }}
            "#
        )
    };
    let main = r#"
        void part_b();
        int main(int argc, char **argv) {
            part_a();
            part_b();
            puts("main");
            if (argc > 1 && !strcmp(argv[1], "exit")) exit(7);
            if (argc > 1 && !strcmp(argv[1], "quick")) { at_quick_exit(at_exit); quick_exit(9); }
            return 5;
        }"#;
    let dir = TempDir::new().unwrap();
    let objects = [
        compile(dir.path(), "a.cc", &(source("a") + main), &["-O1", "-fPIC"]),
        compile(dir.path(), "b.cc", &source("b"), &["-O1", "-fPIC"]),
    ];
    for args in [&[][..], &["exit"], &["quick"]] {
        let expected = native("c++", &objects, &[], args, b"");
        assert!(args == ["quick"] || expected.stdout.contains("atexit a"));
        for way in WAYS {
            let run = Farlink::new().arg("run").args(way).args(&objects).args(["-l", "stdc++", "--"]).args(args);
            let output = run.output();
            if args.is_empty() || args == ["exit"] {
                assert_eq!(output, expected, "{way:?} {args:?}");
            } else {
                // `quick_exit` does not flush: what was printed before may or may not be there.
                assert_eq!(output.code, expected.code, "{way:?}");
            }
        }
    }
}

/// Weak definitions give way to strong ones, common symbols merge, inline functions and their statics exist once, and
/// weak references to nothing are null.
#[test]
fn definitions_merge() {
    let header = r#"
        #include <cstdio>
        inline int counter() { static int count = 0; return ++count; }
        template <class T> struct Box { static int boxes; Box() { boxes++; } };
        template <class T> int Box<T>::boxes = 0;
        extern "C" __attribute__((weak)) const char *name() { return "weak"; }
        "#;
    let dir = TempDir::new().unwrap();
    let a = format!(
        r#"{header}
        extern "C" __attribute__((weak)) void nowhere();
        int other();
        int main() {{
            counter();
            Box<int> box;
            printf("%d %d %s %d %d\n", other(), counter(), name(), Box<int>::boxes, nowhere == nullptr);
        }}"#
    );
    let b = format!("{header} int other() {{ Box<int> box; return counter(); }}");
    let objects = [
        compile(dir.path(), "a.cc", &a, &["-fPIC"]),
        compile(dir.path(), "b.cc", &b, &["-fPIC", "-O2"]),
        compile(dir.path(), "strong.c", "const char *name(void) { return \"strong\"; }", &["-fPIC"]),
        compile(dir.path(), "c1.c", "int shared[4]; int *one(void) { return shared; }", &["-fPIC", "-fcommon"]),
        compile(dir.path(), "c2.c", "int shared[64]; int *two(void) { return shared + 63; }", &["-fPIC", "-fcommon"]),
    ];
    same_as_native("c++", &objects, &["-lstdc++"], &[], b"");
}

/// Exceptions thrown in one object are caught in another, in a shared library's callback, and across both.
#[test]
fn exceptions_cross_objects_and_libraries() {
    let library = r#"
        #include <stdexcept>
        void call(void (*f)(int), int n) { try { f(n); } catch (int &) { throw std::runtime_error("from library"); } }
        "#;
    let thrower = "void thrower(int n) { if (n > 1) throw n; throw \"text\"; }";
    let main = r#"
        #include <cstdio>
        #include <stdexcept>
        void call(void (*f)(int), int n);
        void thrower(int n);
        int main() {
            try { call(thrower, 5); } catch (std::exception &e) { printf("%s\n", e.what()); }
            try { call(thrower, 1); } catch (const char *text) { printf("%s\n", text); }
            for (int i = 0; i < 1000; i++) try { thrower(i + 2); } catch (int) {}
        }"#;
    let dir = TempDir::new().unwrap();
    let shared = dir.path().join("libcall.so");
    let object = compile(dir.path(), "call.cc", library, &["-fPIC"]);
    tool(Command::new("c++").args(["-shared", "-o"]).arg(&shared).arg(&object));
    let objects = [
        compile(dir.path(), "main.cc", main, &["-fPIC", "-O2"]),
        compile(dir.path(), "thrower.cc", thrower, &["-fPIC", "-O2"]),
    ];
    let folder = dir.path().to_str().unwrap();
    let rpath = format!("-Wl,-rpath,{folder}");
    let expected = native("c++", &objects, &["-L", folder, "-lcall", &rpath], &[], b"");
    for way in WAYS {
        let run = |library: &[&str]| Farlink::new().arg("run").args(way).args(&objects).args(library).output();
        assert_eq!(run(&["-L", folder, "-l", "call"]), expected, "{way:?}");
        assert_eq!(run(&[shared.to_str().unwrap()]), expected, "{way:?}");
    }
}

/// What a program has one of is one with shared libraries: variables of templates, inline ones, those of inline functions.
#[test]
fn one_per_program() {
    let dir = TempDir::new().unwrap();
    let header = r#"
        #include <string>
        template <class T> struct Counter { static inline int count = 0; };
        struct Log { int lines = 0; };
        inline Log &log() { static Log log; return log; }
        inline int plain = 5;
        inline std::string text = "begin";
    "#;
    let library = format!(
        "{header} extern \"C\" int *touch() {{ Counter<int>::count += 10; log().lines += 7; plain++; text += \"-library\"; \
         return &Counter<int>::count; }}"
    );
    let main = format!(
        "{header} #include <cstdio>\n extern \"C\" int *touch(); int main() {{ Counter<int>::count++; log().lines++; \
         bool same = touch() == &Counter<int>::count; \
         std::printf(\"%d %d %d %s %d\\n\", Counter<int>::count, log().lines, plain, text.c_str(), same); }}"
    );
    let flags = ["-std=c++17", "-O1", "-fPIC"];
    let library = compile(dir.path(), "library.cc", &library, &flags);
    let main = compile(dir.path(), "main.cc", &main, &flags);
    let shared = dir.path().join("liblibrary.so");
    tool(Command::new("c++").arg("-shared").arg("-o").arg(&shared).arg(&library));
    // Also where what defines them is a member of an archive.
    let archive = dir.path().join("main.a");
    tool(Command::new("ar").arg("rcs").arg(&archive).arg(&main));
    for way in WAYS {
        for program in [&main, &archive] {
            let run = Farlink::new().arg("run").args(way).arg(program).arg(&shared).arg("-lstdc++").output();
            assert_eq!(run.stdout, "11 8 6 begin-library 1\n", "{way:?} {run:?}");
        }
    }
}

/// Members of archives are loaded as they are needed: by index, from a thin archive, with names that occur twice.
#[test]
fn archives() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    let main = compile(dir.path(), "main.c", "int one(void); int main(void) { return one(); }", &["-fPIC"]);
    let one = compile(dir.path(), "one.c", "int two(void); int one(void) { return 40 + two(); }", &["-fPIC"]);
    let unneeded =
        compile(dir.path(), "unneeded.c", "int missing(void); int f(void) { return missing(); }", &["-fPIC"]);
    fs::create_dir(path("sub")).unwrap();
    let two = compile(&path("sub"), "one.c", "int two(void) { return 2; }", &["-fPIC"]);
    for (flags, name) in [("rcs", "full.a"), ("rcST", "thin.a"), ("qcS", "no-index.a")] {
        let mut ar = Command::new("ar");
        if flags == "rcs" {
            // Quick append keeps both members of one name.
            ar.arg("qcs");
        } else {
            ar.arg(flags);
        }
        tool(ar.arg(path(name)).args([&one, &unneeded, &two]).current_dir(dir.path()));
        for way in WAYS {
            let output = Farlink::new().arg("run").args(way).arg(&main).arg(path(name)).output();
            assert_eq!(output.code, Some(42), "{name} {way:?}: {}", output.stderr);
        }
    }
    // A thin archive's members may be those of another archive.
    tool(Command::new("ar").args(["qcs", "inner.a"]).args([&unneeded, &two]).current_dir(dir.path()));
    tool(Command::new("ar").args(["rcST", "nested.a", "one.c.o", "inner.a"]).current_dir(dir.path()));
    assert!(fs::read(path("nested.a")).unwrap().windows(2).any(|pair| pair[0] == b':' && pair[1].is_ascii_digit()));
    let output = Farlink::new().arg("run").arg(&main).arg(path("nested.a")).output();
    assert_eq!(output.code, Some(42), "{output:?}");
}

/// Sources in assembly, and in Rust without its standard library; a source without an entry is refused with the reason.
#[test]
fn other_languages() {
    let dir = TempDir::new().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let assembly = write("answer.s", ".globl main\nmain: movl $42, %eax\n ret\n.section .note.GNU-stack,\"\"\n");
    assert_eq!(Farlink::new().arg("run").arg(assembly).output().code, Some(42));
    let preprocessed = write("answer.S", "#define ANSWER 43\n.globl main\nmain: movl $ANSWER, %eax\n ret\n");
    assert_eq!(Farlink::new().arg("run").arg(preprocessed).output().code, Some(43));
    let rust = write(
        "answer.rs",
        "#![no_std]\n#[unsafe(no_mangle)]\npub extern \"C\" fn main(count: i32, _: *const *const u8) -> i32 { 43 + count }\n",
    );
    assert_eq!(Farlink::new().arg("run").arg(rust).output().code, Some(44));
    let library = write("library.rs", "#![no_main]\npub fn main() {}\n");
    let output = Farlink::new().arg("run").arg(library).output();
    assert_eq!(output.code, Some(125));
    assert!(output.stderr.contains("#[unsafe(no_mangle)]"), "{output:?}");
}

/// An address and another entry can be given.
#[test]
fn entry_and_definitions() {
    let source = "extern char place; int start(void) { return (int)((unsigned long)&place >> 4); }";
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "entry.c", source, &["-fPIC"]);
    let run = Farlink::new().arg("run").arg(object).args(["--entry", "start", "--define", "place=0x2a0"]);
    assert_eq!(run.output().code, Some(0x2a));
}

/// Phases and memory are reported on standard error, not mixed with what the program prints.
#[test]
fn reports() {
    let run = Farlink::new().arg("run").args(["--time", "--stats"]).arg(example("hello.c")).output();
    assert!(run.stdout.starts_with("hello"));
    for word in ["start executor", "fix up", "finalize", "live_bytes"] {
        assert!(run.stderr.contains(word), "{word}: {}", run.stderr);
    }
}

/// Statistics are JSON on request, and count what they are about: one call to reserve, one to resolve, one for the directory
/// of code, one for reports of faults; in stripes no change of protection, or, where the executor knows pages only, a few at the beginning.
#[test]
fn statistics() {
    let stats = |way: &[&str]| -> serde_json::Value {
        let run = Farlink::new().arg("run").args(way).arg("--stats=json").arg(example("hello.c")).output();
        assert!(run.stdout.starts_with("hello"), "{run:?}");
        serde_json::from_str(&run.stderr).unwrap()
    };
    let striped = stats(&[]);
    let round_trips = striped["round_trips"].as_object().unwrap();
    assert_eq!(round_trips.values().map(|count| count.as_u64().unwrap()).collect::<Vec<_>>(), [1; 4], "{striped}");
    assert_eq!(striped["mappings"], serde_json::json!({"controller": 1, "executor": 3}));
    assert!(striped["system_calls_of_the_executor"]["mprotect"].is_null(), "{striped}");
    let memory = |name: &str| striped["memory"][name].as_u64().unwrap();
    assert_eq!((memory("live_allocations"), memory("reserved_bytes")), (1, 1 << 30));
    assert_eq!(memory("live_bytes"), memory("requested_bytes") + memory("bytes_lost_to_alignment"));
    assert!(memory("bytes_lost_to_alignment") < 64 && memory("committed_bytes") < 64 << 10, "{striped}");
    // A protection for each stripe, and one for the page that stands for the object with its actions.
    let posix = stats(&["--memory", "posix"]);
    assert_eq!(posix["system_calls_of_the_executor"]["mprotect"], 4, "{posix}");
    assert_eq!(posix["system_calls_of_the_controller"]["shm_unlink"], 2, "{posix}");
    assert!(posix["memory"]["committed_bytes"].as_u64().unwrap() < 64 << 10, "{posix}");
    let remote = stats(&["--memory", "remote"]);
    assert_eq!(remote["mappings"]["controller"], 0, "{remote}");
    assert!(remote["memory"]["committed_bytes"].as_u64().unwrap() >= 8192, "{remote}");
    let in_process = stats(&["--in-process"]);
    assert!(in_process["system_calls_of_the_controller"]["send"].is_null(), "{in_process}");
    assert_eq!(in_process["mappings"], serde_json::json!({"controller": 1, "executor": 3}));
}

/// A program that a signal ends is reported with the signal, and ends with 128 and its number as in a shell.
#[test]
fn death_by_signal() {
    let dir = TempDir::new().unwrap();
    let crash = compile(dir.path(), "crash.c", "int main(void) { *(volatile int *)8 = 1; }", &["-fPIC"]);
    let output = Farlink::new().arg("run").arg(crash).output();
    assert_eq!(output.code, Some(128 + 11));
    assert!(output.stderr.contains("SIGSEGV"), "{}", output.stderr);
    let abort = compile(dir.path(), "abort.c", "#include <stdlib.h>\nint main(void) { abort(); }", &["-fPIC"]);
    assert_eq!(Farlink::new().arg("run").arg(abort).output().code, Some(128 + 6));
}

fn send(signal: &str, target: &str) {
    tool(Command::new("kill").args(["-s", signal, "--", target]));
}

const LOOP: &str = r#"
    #include <stdio.h>
    int main(void) { puts("ready"); fflush(stdout); for (;;) ; }
    "#;

fn start_loop(dir: &Path, way: &[&str]) -> common::Running {
    let object = compile(dir, "loop.c", LOOP, &["-fPIC"]);
    let mut run = Farlink::new().arg("run").args(way).arg(object).start();
    let mut line = [0; 6];
    std::io::Read::read_exact(run.child.stdout.as_mut().unwrap(), &mut line).unwrap();
    assert_eq!(&line, b"ready\n");
    run
}

/// A signal to the command alone ends both processes, and the command ends as the program did.
#[test]
fn interrupt_ends_both() {
    let dir = TempDir::new().unwrap();
    for (signal, number) in [("INT", 2), ("TERM", 15), ("HUP", 1)] {
        let run = start_loop(dir.path(), &[]);
        send(signal, &run.child.id().to_string());
        assert_eq!(run.output().code, Some(128 + number), "{signal}");
    }
    let run = start_loop(dir.path(), &["--in-process"]);
    send("INT", &run.child.id().to_string());
    assert_eq!(run.output().code, None);
}

/// Ctrl-C on a terminal reaches a program once: it ends both processes, or is handled by the program.
#[test]
fn interrupt_from_a_terminal() {
    let handles = r#"
        #include <signal.h>
        #include <stdio.h>
        #include <unistd.h>
        static volatile int count;
        static void handler(int signal) { count++; }
        int main(void) {
            signal(SIGINT, handler);
            puts("ready"); fflush(stdout);
            while (!count) usleep(1000);
            usleep(200000);
            return count;
        }"#;
    let dir = TempDir::new().unwrap();
    for (name, source, code) in [("loop.c", LOOP, 130), ("handles.c", handles, 1)] {
        let object = compile(dir.path(), name, source, &["-fPIC"]);
        let terminal = rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
        rustix::pty::grantpt(&terminal).unwrap();
        rustix::pty::unlockpt(&terminal).unwrap();
        let path = rustix::pty::ptsname(&terminal, Vec::new()).unwrap().into_string().unwrap();
        let open = || fs::File::options().read(true).write(true).open(&path).unwrap();
        let mut child = Command::new("setsid")
            .args(["--ctty", "--wait", env!("CARGO_BIN_EXE_farlink"), "run"])
            .arg(&object)
            .stdin(open())
            .stdout(open())
            .stderr(open())
            .spawn()
            .unwrap();
        let mut terminal = fs::File::from(terminal);
        let mut seen = Vec::new();
        while !seen.ends_with(b"ready\r\n") {
            let mut byte = [0];
            std::io::Read::read_exact(&mut terminal, &mut byte).unwrap();
            seen.push(byte[0]);
        }
        std::io::Write::write_all(&mut terminal, b"\x03").unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{name}");
    }
}

/// When the command is killed without a chance to do anything, the executor ends, even in a loop.
#[test]
fn executor_ends_with_its_controller() {
    let dir = TempDir::new().unwrap();
    let mut run = start_loop(dir.path(), &[]);
    run.child.kill().unwrap();
    run.wait();
    run.check_clean();
}

/// When the executor is killed, the command says so and ends as a shell would.
#[test]
fn executor_is_killed() {
    let dir = TempDir::new().unwrap();
    let run = start_loop(dir.path(), &[]);
    send("KILL", &run.wait_for_executor().to_string());
    let output = run.output();
    assert_eq!(output.code, Some(128 + 9));
    assert!(output.stderr.contains("SIGKILL"), "{}", output.stderr);
}

/// A program that writes into a pipe nobody reads ends by SIGPIPE, as natively.
#[test]
fn broken_pipe_ends_the_program() {
    let source = "#include <stdio.h>\nint main(void) { for (;;) puts(\"line\"); }";
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "yes.c", source, &["-fPIC"]);
    let mut run = Farlink::new().arg("run").arg(&object).start();
    drop(run.child.stdout.take());
    assert_eq!(run.wait().code(), Some(128 + 13));
    run.check_clean();
}

/// What a child writes to linked data is its own, and what its parent writes after the fork is not the child's: with
/// children of children, many pages, `.bss` and `.data`, and an exit by return.
#[test]
fn forked_children_have_copies() {
    let source = r#"
        #include <stdio.h>
        #include <stdlib.h>
        #include <sys/wait.h>
        #include <unistd.h>
        static int counter = 5;
        static char zeros[100 * 4096];
        static int list[5000] = {1, 2, 3};
        static int to_child[2], to_parent[2];
        static void expect(int got, int wanted, int line) { if (got != wanted) { printf("line %d: %d\n", line, got); exit(9); } }
        #define EXPECT(got, wanted) expect(got, wanted, __LINE__)
        static int child(int depth) {
            char byte;
            EXPECT(read(to_child[0], &byte, 1), 1);
            /* The parent has written all of these. */
            EXPECT(counter, 5 + depth); EXPECT(zeros[50 * 4096], depth); EXPECT(list[2], 3); EXPECT(list[4999], 0);
            counter = 100; zeros[0] = 1; zeros[99 * 4096] = 7; list[0] = -1;
            EXPECT(zeros[98 * 4096], 0);
            EXPECT(write(to_parent[1], "x", 1), 1);
            return counter;
        }
        int main(void) {
            setvbuf(stdout, NULL, _IONBF, 0);
            for (int depth = 0; depth < 3; depth++) {
                if (pipe(to_child) || pipe(to_parent)) return 1;
                pid_t pid = fork();
                if (pid == 0) {
                    int result = child(depth);
                    if (depth == 1) {
                        pid_t grandchild = fork();
                        if (grandchild == 0) { EXPECT(counter, 100); counter = 33; return counter; }
                        int status;
                        waitpid(grandchild, &status, 0);
                        EXPECT(WEXITSTATUS(status), 33); EXPECT(counter, 100);
                    }
                    if (depth == 2) _exit(result);
                    return result;
                }
                counter++; zeros[50 * 4096]++; list[2] = 44; list[4999] = 55;
                char byte;
                EXPECT(write(to_child[1], "x", 1), 1);
                EXPECT(read(to_parent[0], &byte, 1), 1);
                EXPECT(zeros[0], 0); EXPECT(zeros[99 * 4096], 0); EXPECT(list[0], 1);
                int status;
                EXPECT(waitpid(pid, &status, 0), pid);
                printf("child %d: %d\n", depth, WEXITSTATUS(status));
                EXPECT(counter, 6 + depth); EXPECT(list[2], 44);
                list[2] = 3; list[4999] = 0;
            }
            return 3;
        }"#;
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "fork.c", source, &["-O1", "-fPIC"]);
    let expected = same_as_native("cc", &[object], &[], &[], b"");
    assert_eq!((expected.code, &*expected.stdout), (Some(3), "child 0: 100\nchild 1: 100\nchild 2: 100\n"));
}

/// Children that close every descriptor, that thread after thread forks, and that run other programs.
#[test]
fn forks_of_all_kinds() {
    let source = r#"
        #include <pthread.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <string.h>
        #include <sys/wait.h>
        #include <unistd.h>
        static int data[4096];
        static void *forker(void *argument) {
            int me = *(int *)argument;
            for (int round = 0; round < 20; round++) {
                data[me * 1024] = round;
                pid_t pid = fork();
                if (pid == 0) {
                    if (data[me * 1024] != round) _exit(1);
                    data[me * 1024] = 1000;
                    _exit(0);
                }
                int status;
                if (waitpid(pid, &status, 0) != pid || status != 0 || data[me * 1024] != round) exit(9);
            }
            return NULL;
        }
        int main(void) {
            pthread_t threads[4];
            int numbers[4] = {0, 1, 2, 3};
            for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, forker, &numbers[i]);
            for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
            data[7] = 70;
            fflush(stdout);
            if (fork() == 0) {
                for (int fd = 3; fd < 1024; fd++) close(fd);
                data[7] = 71;
                if (fork() == 0) { _exit(data[7] == 71 ? 0 : 1); }
                int status;
                wait(&status);
                _exit(status ? 5 : 0);
            }
            int status;
            wait(&status);
            printf("closed: %d, data %d\n", WEXITSTATUS(status), data[7]);
            printf("system: %d\n", WEXITSTATUS(system("exit 7")));
            FILE *pipe = popen("echo from a shell", "r");
            char line[64];
            printf("popen: %s", fgets(line, sizeof line, pipe));
            pclose(pipe);
            return 0;
        }"#;
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "forks.c", source, &["-O1", "-fPIC"]);
    let expected = same_as_native("cc", &[object], &["-lpthread"], &[], b"");
    assert!(expected.stdout.starts_with("closed: 0, data 70\nsystem: 7\npopen: from a shell"), "{expected:?}");
}
