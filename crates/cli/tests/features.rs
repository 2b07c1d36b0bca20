//! What compilers emit: each program of `features/`, compiled in many ways, does what it does when it is linked natively.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, Output, available, native, root, tool};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use tempfile::TempDir;

/// Ways to compile what has to work for every program.
const MODELS: [&str; 6] = [
    "-O0",
    "-O2 -fPIC",
    "-O3 -fPIE",
    "-O2 -fPIC -mcmodel=large",
    "-O1 -fno-plt -fPIC -fcf-protection",
    "-Os -fPIC -g -gz",
];

/// Ways to compile thread-local variables besides.
const TLS_MODELS: [&str; 5] = [
    "-fPIC -mtls-dialect=gnu2",
    "-fPIC -ftls-model=local-dynamic",
    "-fPIC -ftls-model=initial-exec",
    "-fno-plt -fPIC -mtls-dialect=gnu2",
    "-fno-pic",
];

fn source(name: &str) -> PathBuf {
    root().join("crates/cli/tests/features").join(name)
}

/// A program of several sources.
struct Program {
    sources: &'static [&'static str],
    compilers: &'static [&'static str],
    /// Flags of every compilation.
    flags: &'static [&'static str],
    /// What it is linked with.
    libraries: &'static [&'static str],
}

impl Program {
    /// Compiles the program with each compiler in each way, runs it natively and linked, and compares.
    fn check(&self, test: &str, models: &[&str]) {
        let compilers = self.compilers.iter().filter(|compiler| available(test, compiler));
        thread::scope(|scope| {
            for compiler in compilers {
                scope.spawn(move || {
                    for model in models {
                        self.check_one(compiler, model);
                    }
                });
            }
        });
    }

    fn check_one(&self, compiler: &str, model: &str) {
        let dir = TempDir::new().unwrap();
        let objects: Vec<PathBuf> =
            self.sources.iter().map(|name| self.compile(dir.path(), compiler, model, name)).collect();
        // A program that is no position-independent executable has room for everything that these may contain.
        let pie = if model.contains("-fno-pic") || model.contains("large") { "-no-pie" } else { "-pie" };
        let flags: Vec<&str> = [pie, "-pthread"].iter().chain(self.libraries).copied().collect();
        let linker = if self.sources[0].ends_with(".cc") { "c++" } else { "cc" };
        let native = native(linker, &objects, &flags, &[], b"");
        for way in [&[][..], &["--in-process"]] {
            let output = run(way, &objects, self.libraries, &[]);
            assert_eq!(output, native, "{compiler} {model} {:?} {way:?}", self.sources);
        }
    }

    fn compile(&self, dir: &Path, compiler: &str, model: &str, name: &str) -> PathBuf {
        let object = dir.join(format!("{name}.o"));
        let mut command = Command::new(compiler);
        command.arg("-c").args(self.flags).args(model.split(' ')).arg("-o").arg(&object).arg(source(name));
        tool(&mut command);
        object
    }
}

fn run(way: &[&str], inputs: &[PathBuf], libraries: &[&str], args: &[&str]) -> Output {
    Farlink::new().arg("run").args(way).args(inputs).args(libraries).arg("--").args(args).output()
}

const C: &[&str] = &["gcc", "clang-22"];
const CXX: &[&str] = &["g++", "clang++-22"];

/// Thread-local variables in C, in every model.
#[test]
fn thread_local_variables() {
    let program = Program { sources: &["tls.c", "tls_other.c"], compilers: C, flags: &[], libraries: &[] };
    let models: Vec<&str> = MODELS.into_iter().chain(TLS_MODELS).collect();
    // A process that links in itself has little room for what has to be at one place in every thread.
    for compiler in program.compilers.iter().filter(|compiler| available("thread_local_variables", compiler)) {
        for model in &models {
            let dir = TempDir::new().unwrap();
            let objects: Vec<PathBuf> =
                program.sources.iter().map(|name| program.compile(dir.path(), compiler, model, name)).collect();
            let pie = if model.contains("-fno-pic") || model.contains("large") { "-no-pie" } else { "-pie" };
            let native = native("cc", &objects, &[pie, "-pthread"], &[], b"");
            for way in [&[][..], &["--memory", "posix"], &["--memory", "remote"]] {
                assert_eq!(run(way, &objects, &[], &[]), native, "{compiler} {model} {way:?}");
            }
            let output = run(&["--in-process"], &objects, &[], &[]);
            let is_refused = output.code == Some(125) && output.stderr.contains("static TLS");
            assert!(output == native || is_refused, "{compiler} {model} {output:?}");
            assert!(!is_refused || !model.contains("-fPIC") || model.contains("tls"), "{compiler} {model} {output:?}");
        }
    }
}

/// What an executor is started with to have room for thread-local variables is not in its program's environment.
#[test]
fn environment() {
    let dir = TempDir::new().unwrap();
    let program = Program { sources: &["tls.c", "tls_other.c"], compilers: C, flags: &[], libraries: &[] };
    let objects: Vec<PathBuf> =
        program.sources.iter().map(|name| program.compile(dir.path(), "cc", "-O1 -fPIE", name)).collect();
    let last = |output: &Output| output.stdout.lines().last().map(str::to_owned);
    let value = "glibc.malloc.tcache_count=5";
    let output = Farlink::new().arg("run").args(&objects).env("GLIBC_TUNABLES", value).output();
    assert_eq!((last(&output), output.code), (Some(format!("{value} none")), Some(2)), "{output:?}");
    let output = Farlink::new().arg("run").args(&objects).output();
    assert_eq!((last(&output), output.code), (Some("none none".to_owned()), Some(2)), "{output:?}");
    // Whoever gives room himself is left alone.
    let value = "glibc.rtld.optional_static_tls=100000";
    let output = Farlink::new().arg("run").args(&objects).env("GLIBC_TUNABLES", value).output();
    assert_eq!((last(&output), output.code), (Some(format!("{value} none")), Some(2)), "{output:?}");
}

/// Thread-local objects in C++.
#[test]
fn thread_local_objects() {
    let program = Program { sources: &["tls.cc"], compilers: CXX, flags: &["-std=c++17"], libraries: &["-lstdc++"] };
    program.check("thread_local_objects", &MODELS);
}

/// IFUNCs.
#[test]
fn ifuncs() {
    let program = Program { sources: &["ifunc.c", "ifunc_other.c"], compilers: C, flags: &[], libraries: &[] };
    // GNU ld does not support them in the large model.
    let models: Vec<&str> =
        MODELS.into_iter().filter(|model| !model.contains("large")).chain(["-O2 -fno-pic"]).collect();
    program.check("ifuncs", &models);
}

/// Addresses of functions of shared libraries, in code that holds them in 32 bits and in other code.
#[test]
fn addresses_of_functions() {
    let program = Program { sources: &["functions.c", "functions_other.c"], compilers: C, flags: &[], libraries: &[] };
    program.check("addresses_of_functions", &["-O2", "-O0 -fno-pic", "-O2 -fno-pic", "-O2 -fno-pic -mcmodel=medium"]);
    // One object of each kind: both see one address.
    let dir = TempDir::new().unwrap();
    let objects = [
        program.compile(dir.path(), "cc", "-O1 -fno-pic", "functions.c"),
        program.compile(dir.path(), "cc", "-O1 -fPIC", "functions_other.c"),
    ];
    let native = native("cc", &objects, &["-no-pie"], &[], b"");
    assert_eq!(run(&[], &objects, &[], &[]), native);
}

/// Objects of C++ that are not position-independent catch exceptions of their own.
#[test]
fn exceptions_in_low_memory() {
    let dir = TempDir::new().unwrap();
    let text = "struct Failure { int n; }; struct Scope { int &n; ~Scope() { n++; } };\n\
                __attribute__((noinline)) static void fail(int n) { throw Failure{n}; }\n\
                int main() { int n = 0; try { Scope scope{n}; fail(4); } catch (const Failure &failure) { return failure.n + n; } }";
    let object = common::compile(dir.path(), "exceptions.cc", text, &["-O1", "-fno-pic"]);
    for way in common::WAYS {
        let output = run(way, std::slice::from_ref(&object), &["-lstdc++"], &[]);
        assert_eq!((output.code, output.stderr.as_str()), (Some(5), ""), "{way:?}");
    }
}

/// Trampolines on the stack.
#[test]
fn nested_functions() {
    let program = Program { sources: &["nested.c"], compilers: &["gcc"], flags: &[], libraries: &[] };
    program.check("nested_functions", &MODELS);
}

/// Names that linkers define.
#[test]
fn names_of_the_linker() {
    let program = Program { sources: &["linker.c"], compilers: C, flags: &["-fno-builtin"], libraries: &[] };
    program.check("names_of_the_linker", &["-O0", "-O2 -fPIC", "-O3 -fPIE"]);
}

/// Alignments and large zero fill.
#[test]
fn alignments() {
    let program = Program { sources: &["align.c"], compilers: C, flags: &["-mcmodel=medium"], libraries: &[] };
    program.check("alignments", &["-O1 -fPIC", "-O2 -fPIE"]);
}

/// Zero fill of more than a gigabyte, within reach of code of the small model, also in low memory.
#[test]
fn gigabytes_of_zeros() {
    let program = Program { sources: &["zeros.c"], compilers: C, flags: &[], libraries: &[] };
    program.check("gigabytes_of_zeros", &["-O0", "-O2 -fPIC", "-O2 -fno-pic"]);
}

/// Beginning, end, children and signals.
#[test]
fn life_cycle() {
    let program = Program { sources: &["life.c"], compilers: C, flags: &[], libraries: &[] };
    program.check("life_cycle", &MODELS);
}

/// Unwinding.
#[test]
fn unwinding() {
    let program = Program {
        sources: &["unwind.cc", "unwind_other.cc"],
        compilers: CXX,
        flags: &["-fnon-call-exceptions", "-fasynchronous-unwind-tables"],
        libraries: &["-lstdc++"],
    };
    program.check("unwinding", &MODELS);
}

/// An exception that nobody catches ends the program as natively, with the runtime's own words.
#[test]
fn uncaught_exceptions() {
    let dir = TempDir::new().unwrap();
    let text = "#include <stdexcept>\nint main() { throw std::runtime_error(\"nobody wants it\"); }";
    let object = common::compile(dir.path(), "uncaught.cc", text, &["-O1", "-fPIC"]);
    let native = native("c++", [&object], &[], &[], b"");
    assert!(native.stderr.contains("nobody wants it"), "{native:?}");
    for way in [&[][..], &["--in-process"]] {
        let output = run(way, std::slice::from_ref(&object), &["-lstdc++"], &[]);
        assert!(output.stderr.starts_with(&native.stderr), "{way:?} {output:?}");
        assert!(matches!(output.code, Some(134) | None), "{way:?} {output:?}");
    }
}

/// Bindings, visibilities, versions, sections.
#[test]
fn symbols_and_sections() {
    let program =
        Program { sources: &["symbols.c", "symbols_other.c"], compilers: C, flags: &["-fcommon"], libraries: &[] };
    let models: Vec<&str> =
        MODELS.into_iter().filter(|model| !model.contains("large")).chain(["-O2 -fno-pic"]).collect();
    program.check("symbols_and_sections", &models);
}

/// A Fortran program, compiled on the way.
#[test]
fn fortran() {
    if !available("fortran", "gfortran") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let object = dir.path().join("program.o");
    let mut compile = Command::new("gfortran");
    tool(compile.args(["-c", "-fopenmp", "-O2", "-fPIC"]).arg("-o").arg(&object).arg(source("program.f90")));
    let expected = native("gfortran", [&object], &[], &[], b"");
    assert_eq!(expected.code, Some(4));
    for way in common::WAYS {
        assert_eq!(run(way, std::slice::from_ref(&object), &["-lgfortran"], &[]), expected, "{way:?}");
        let from_source = run(way, &[source("program.f90")], &[], &[]);
        assert_eq!((from_source.stdout, from_source.code), (expected.stdout.clone(), expected.code), "{way:?}");
    }
}

/// A Rust program with std, compiled on the way.
#[test]
fn rust() {
    let dir = TempDir::new().unwrap();
    let program = dir.path().join("program");
    tool(Command::new("rustc").args(["--edition=2021", "-Copt-level=2", "-o"]).arg(&program).arg(source("program.rs")));
    let expected = Command::new(&program).args(["one", "two"]).output().unwrap();
    assert_eq!(expected.status.code(), Some(17));
    for way in common::WAYS {
        let output = run(way, &[source("program.rs")], &[], &["one", "two"]);
        assert_eq!(output.stdout, String::from_utf8_lossy(&expected.stdout), "{way:?} {}", output.stderr);
        assert_eq!(output.code, Some(17), "{way:?} {}", output.stderr);
        assert!(output.stderr.contains("panicked at") && output.stderr.contains("expected"), "{}", output.stderr);
    }
}

/// Objects that also hold intermediate code for link-time optimization, and objects of nothing.
#[test]
fn fat_and_empty_objects() {
    let dir = TempDir::new().unwrap();
    let main = "int other(void); int main(void) { return other(); }";
    for (compiler, flags) in [("gcc", "-flto -ffat-lto-objects"), ("clang-22", "-flto -ffat-lto-objects")] {
        if !available("fat_and_empty_objects", compiler) {
            continue;
        }
        let flags: Vec<&str> = flags.split(' ').collect();
        let compile = |name: &str, text: &str| {
            let (source, object) = (dir.path().join(name), dir.path().join(format!("{name}.o")));
            std::fs::write(&source, text).unwrap();
            tool(Command::new(compiler).args(["-c", "-O1", "-fPIC"]).args(&flags).arg("-o").arg(&object).arg(&source));
            object
        };
        let objects =
            [compile("main.c", main), compile("other.c", "int other(void) { return 23; }"), compile("empty.c", "")];
        for way in common::WAYS {
            assert_eq!(run(way, &objects, &[], &[]).code, Some(23), "{compiler} {way:?}");
        }
    }
}

/// Relocations in the compact form that LLVM has for them.
#[test]
fn compact_relocations() {
    let flags = &["-Wa,--allow-experimental-crel,--crel"];
    let program =
        Program { sources: &["symbols.c", "symbols_other.c"], compilers: &["clang-22"], flags, libraries: &[] };
    // GNU ld may not know them, so what it is compared with is compiled without.
    if !available("compact_relocations", "clang-22") {
        return;
    }
    let dir = TempDir::new().unwrap();
    for model in ["-O0 -fcommon", "-O2 -fPIC -fcommon", "-O2 -fno-pic -fcommon"] {
        let objects: Vec<PathBuf> =
            program.sources.iter().map(|name| program.compile(dir.path(), "clang-22", model, name)).collect();
        let sections = tool(Command::new("readelf").args(["-SW"]).arg(&objects[0]));
        assert!(sections.contains(".crel.text") && !sections.contains(".rela.text"), "{sections}");
        let plain = Program { flags: &[], ..program };
        let others: Vec<PathBuf> = plain
            .sources
            .iter()
            .map(|name| plain.compile(TempDir::new_in(dir.path()).unwrap().keep().as_path(), "clang-22", model, name))
            .collect();
        let pie = if model.contains("-fno-pic") { "-no-pie" } else { "-pie" };
        let native = native("cc", &others, &[pie], &[], b"");
        for way in common::WAYS {
            assert_eq!(run(way, &objects, &[], &[]), native, "{model} {way:?}");
        }
    }
}

/// Which members of archives are linked, and what is left out, as GNU ld decides it.
#[test]
fn archives_and_unused_sections() {
    let dir = TempDir::new().unwrap();
    let object = |name: &str, text: &str| {
        common::compile(dir.path(), name, text, &["-O1", "-fPIC", "-fcommon", "-ffunction-sections"])
    };
    let main = object(
        "main.c",
        r#"
        #include <stdio.h>
        int common; int value(void); __attribute__((weak)) int absent(void);
        extern char __start_used[] __attribute__((weak)), __stop_used[] __attribute__((weak));
        int never(void); int unused(void) { return never(); }
        int main(void) { printf("%d %d %d %d\n", common, value(), absent != 0, (int)(__stop_used - __start_used)); return 0; }
        "#,
    );
    let members = [
        // Loaded for a strong reference, and by it a second one.
        object("value.c", "int more(void); int value(void) { return more() + 1; }"),
        object("more.c", "int more(void) { return 40; } __attribute__((section(\"used\"), used)) static char here[8];"),
        // Initialized data counts more than a common symbol: its member is loaded for that.
        object("common.c", "int common = 77;"),
        // Nothing but a weak reference.
        object(
            "absent.c",
            "#include <stdio.h>\n int absent(void) { return 1; } \
                            __attribute__((constructor)) static void begin(void) { puts(\"absent\"); }",
        ),
    ];
    let archive = dir.path().join("members.a");
    tool(Command::new("ar").arg("rcs").arg(&archive).args(&members));
    let collected = native("cc", [&main, &archive], &["-Wl,--gc-sections"], &[], b"");
    assert_eq!(collected.stdout, "77 41 0 8\n", "{collected:?}");
    for way in common::WAYS {
        let way: Vec<&str> = way.iter().copied().chain(["--gc-sections"]).collect();
        assert_eq!(run(&way, &[main.clone(), archive.clone()], &[], &[]), collected, "{way:?}");
    }
    // Without that, what nothing needs is linked, and so has to be complete.
    let output = run(&[], &[main.clone(), archive.clone()], &[], &[]);
    assert!(output.stderr.contains("never, needed by"), "{output:?}");
    let whole = native(
        "cc",
        [&main],
        &["-Wl,--gc-sections", "-Wl,--whole-archive", archive.to_str().unwrap(), "-Wl,--no-whole-archive"],
        &[],
        b"",
    );
    assert!(whole.stdout.starts_with("absent\n77 41 1"), "{whole:?}");
    let output = run(&["--gc-sections", "--whole-archive", archive.to_str().unwrap()], &[main], &[], &[]);
    assert_eq!(output, whole);
}
