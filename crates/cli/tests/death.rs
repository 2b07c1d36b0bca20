//! Executors that die: what is said of it, by the command and by the library, and that programs do not notice that somebody
//! is ready for it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, compile, native, tool};
use farlink::{Death, Error, Library, Memory, Session};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, LazyLock};
use std::thread;
use tempfile::TempDir;

/// A program that dies in the way that its argument names.
const FAULTS: &str = r#"#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
static volatile int *where;
static int deep(int n) { if (n) return deep(n - 1) + 1; where = (int *)8; return *where; }
static int compare(const void *a, const void *b) { (void)a; (void)b; return *(volatile int *)16; }
static int overflow(int n) { volatile char big[1000]; big[0] = n; return overflow(n + 1) + big[0]; }
static int huge(int n) { volatile char big[200000]; big[100000] = n; return huge(n + 1) + big[0]; }
static void *thread(void *f) { where = (int *)24; return f ? (void *)(long)overflow(0) : (void *)(long)*where; }
static int in_thread(void *f) { pthread_t t; pthread_create(&t, NULL, thread, f); pthread_join(t, NULL); return 0; }
static int sum_of_bus(void) {
    char name[] = "/tmp/farlink-bus-XXXXXX";
    int fd = mkstemp(name);
    unlink(name);
    if (ftruncate(fd, 4096)) return 1;
    volatile int *p = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
    if (ftruncate(fd, 0)) return 1;
    return *p;
}
int die(const char *how) {
    int values[3] = {3, 2, 1};
    if (!strcmp(how, "segv")) return deep(3);
    if (!strcmp(how, "callback")) { qsort(values, 3, 4, compare); return values[0]; }
    if (!strcmp(how, "null")) { void (*volatile f)(void) = NULL; f(); return 1; }
    if (!strcmp(how, "wild")) return *(volatile int *)0x1234123412341234;
    if (!strcmp(how, "text")) { *(volatile char *)die = 1; return 1; }
    if (!strcmp(how, "overflow")) return overflow(0);
    if (!strcmp(how, "huge")) return huge(0);
    if (!strcmp(how, "bus")) return sum_of_bus();
    if (!strcmp(how, "fpe")) { volatile int zero = 0; return 5 / zero; }
    if (!strcmp(how, "ill")) __builtin_trap();
    if (!strcmp(how, "trap")) { __asm__ volatile("int3"); return 77; }
    if (!strcmp(how, "abort")) abort();
    if (!strcmp(how, "raise")) { raise(SIGSEGV); return 77; }
    if (!strcmp(how, "free")) { void *volatile p = (void *)0x1234560; free(p); return 1; }
    if (!strcmp(how, "thread")) return in_thread(NULL);
    if (!strcmp(how, "thread overflow")) return in_thread(values);
    if (!strcmp(how, "exit")) exit(3);
    if (!strcmp(how, "kill")) kill(getpid(), SIGKILL);
    return 0;
}
int main(int argc, char **argv) { return die(argc > 1 ? argv[1] : ""); }
"#;

struct Faults {
    _dir: TempDir,
    object: PathBuf,
}

static OBJECT: LazyLock<Faults> = LazyLock::new(|| {
    let dir = TempDir::new().unwrap();
    // Recursion is to stay recursion.
    let flags = ["-O1", "-g", "-fPIC", "-w", "-fno-optimize-sibling-calls"];
    let object = compile(dir.path(), "faults.c", FAULTS, &flags);
    Faults { _dir: dir, object }
});

fn native_signal(how: &str) -> i32 {
    let dir = TempDir::new().unwrap();
    let program = dir.path().join("program");
    tool(Command::new("cc").arg("-o").arg(&program).arg(&OBJECT.object).arg("-lpthread"));
    Command::new(&program).arg(how).status().unwrap().signal().unwrap()
}

/// Every kind of fault ends the command as a shell would, by the signal that it ends a native program by, and the
/// report names signal, address, reason, function, line and the way there, through libraries too.
#[test]
fn faults_are_reported() {
    let own = "(".to_owned() + OBJECT.object.to_str().unwrap() + ")";
    let line = "faults.c:";
    for (how, signal, wanted) in [
        (
            "segv",
            "SIGSEGV",
            &["at the address 0x8: nothing is mapped there; in deep+", "\n  #4", "in deep", "main+"][..],
        ),
        ("callback", "SIGSEGV", &["in compare+", "libc.so.6)\n", "die+", "main+"]),
        ("null", "SIGSEGV", &["at the address 0x0", "#0  0x0000000000000000 no code that is known", "die+"]),
        ("wild", "SIGSEGV", &["no address that the processor has", "die+"]),
        ("text", "SIGSEGV", &["what is mapped there does not allow it; in die+"]),
        ("overflow", "SIGSEGV", &["the stack has overflown; in overflow+", "and as often again", "and more"]),
        ("huge", "SIGSEGV", &["the stack has overflown; in huge+"]),
        ("bus", "SIGBUS", &["there is no memory behind the address; in ", "die+"]),
        ("fpe", "SIGFPE", &["divided by zero", "in die+"]),
        ("ill", "SIGILL", &["in die+"]),
        ("trap", "SIGTRAP", &["in die+"]),
        ("abort", "SIGABRT", &["in die+", "abort+"]),
        ("raise", "SIGSEGV", &["in die+", "raise+"]),
        ("free", "SIGSEGV", &["in die+", "free+"]),
        ("thread", "SIGSEGV", &["at the address 0x18", "in thread+"]),
    ] {
        let output = Farlink::new().arg("run").arg(&OBJECT.object).args(["--", how]).output();
        let number = native_signal(how);
        assert_eq!(output.code, Some(128 + number), "{how}: {output:?}");
        let text = &output.stderr;
        assert!(text.starts_with(&format!("farlink: the program was killed by {signal}")), "{how}: {text}");
        for wanted in wanted.iter().chain(&[own.as_str(), line, " rip 0x", "\nthread "]) {
            assert!(text.contains(wanted), "{how}: no {wanted:?} in {text}");
        }
    }
}

/// The executor program, which begins without Rust's start-up code, reports an overflown stack too.
#[test]
fn overflow_in_the_executor_program() {
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_farlink")).with_file_name("farlink-executor");
    if !program.exists() {
        eprintln!("SKIPPED overflow_in_the_executor_program: {} has not been built", program.display());
        return;
    }
    let run = Farlink::new().arg("run").arg("--executor").arg(program).arg(&OBJECT.object);
    let output = run.args(["--", "overflow"]).output();
    assert_eq!(output.code, Some(128 + 11));
    assert!(output.stderr.contains("the stack has overflown; in overflow+"), "{output:?}");
}

/// Names of C++ are shown as people write them.
#[test]
fn names_are_demangled() {
    let source = "namespace shapes { template <class T> struct Circle { T *at; __attribute__((noinline)) T area() { return *at; } }; }\n\
        int main() { shapes::Circle<int> circle = {(int *)8}; return circle.area() + 1; }";
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "shapes.cc", source, &["-O1", "-fPIC"]);
    let output = Farlink::new().arg("run").arg(&object).output();
    assert!(output.stderr.contains("in shapes::Circle<int>::area()+"), "{output:?}");
}

/// Where no report can be left, in a thread of linked code whose stack is full, the program dies as natively, and that is
/// said.
#[test]
fn deaths_without_a_report() {
    let output = Farlink::new().arg("run").arg(&OBJECT.object).args(["--", "thread overflow"]).output();
    assert_eq!((output.code, native_signal("thread overflow")), (Some(128 + 11), 11));
    assert_eq!(output.stderr, "farlink: the program was killed by SIGSEGV\n");
    let output = Farlink::new().arg("run").arg(&OBJECT.object).args(["--", "kill"]).output();
    assert_eq!(output.code, Some(128 + 9));
    assert!(output.stderr.contains("SIGKILL, which somebody sent, or the system for want of memory\n"), "{output:?}");
    let remote = Farlink::new().arg("run").args(["--memory", "remote"]).arg(&OBJECT.object).args(["--", "segv"]);
    assert!(remote.output().stderr.contains("in deep+"));
}

/// Programs that set handlers of their own are told of no other, get their signals, and die as natively afterwards; so do
/// those of Rust, which say so when their stack is full.
#[test]
fn programs_have_their_own_handlers() {
    let source = r#"
        #include <setjmp.h>
        #include <signal.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <string.h>
        static sigjmp_buf back;
        static volatile int count;
        static void handler(int signal) { count++; siglongjmp(back, signal); }
        static void report(const char *what, const struct sigaction *old) {
            printf("%s: %d\n", what, old->sa_handler == SIG_DFL);
        }
        int main(int argc, char **argv) {
            struct sigaction own, old;
            setvbuf(stdout, NULL, _IONBF, 0);
            memset(&own, 0, sizeof own);
            own.sa_handler = handler;
            sigaction(SIGSEGV, NULL, &old);
            report("at first", &old);
            sigaction(SIGSEGV, &own, &old);
            report("before", &old);
            for (int round = 0; round < 3; round++)
                if (!sigsetjmp(back, 1)) *(volatile int *)0 = 1;
            printf("%d\n", count);
            sigaction(SIGSEGV, &old, &own);
            printf("own: %d\n", own.sa_handler == handler);
            sigaction(SIGSEGV, NULL, &old);
            report("after", &old);
            printf("%d\n", signal(SIGFPE, handler) == SIG_DFL);
            printf("%d\n", signal(SIGFPE, SIG_DFL) == handler);
            printf("%d\n", signal(SIGFPE, SIG_DFL) == SIG_DFL);
            *(volatile int *)8 = 1;
        }"#;
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "handlers.c", source, &["-O1", "-fPIC"]);
    let expected = native("cc", [&object], &[], &[], b"");
    let output = Farlink::new().arg("run").arg(&object).output();
    assert_eq!((output.stdout.as_str(), output.code), (expected.stdout.as_str(), Some(128 + 11)));
    assert!(output.stderr.contains("killed by SIGSEGV at the address 0x8"), "{output:?}");
    let rust = dir.path().join("overflow.rs");
    let source = "fn f(n: u64) -> u64 { let big = [n; 100]; std::hint::black_box(&big); f(n + 1) + big[3] }\n\
                  fn main() { println!(\"{}\", f(std::env::args().count() as u64)); }";
    fs::write(&rust, source).unwrap();
    let output = Farlink::new().arg("run").arg(&rust).output();
    assert_eq!(output.code, Some(128 + 6), "{output:?}");
    assert!(
        output.stderr.contains("thread 'main'") && output.stderr.contains("has overflowed its stack"),
        "{output:?}"
    );
}

/// A child that linked code forks dies as any other, and leaves nothing in the report of its parent.
#[test]
fn children_leave_no_report() {
    let source = r#"
        #include <stdio.h>
        #include <sys/wait.h>
        #include <unistd.h>
        int main(void) {
            int status;
            if (fork() == 0) *(volatile int *)8 = 1;
            wait(&status);
            printf("%d\n", WTERMSIG(status));
            fflush(stdout);
            *(volatile int *)0x30 = 1;
        }"#;
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "fork.c", source, &["-O1", "-fPIC"]);
    let output = Farlink::new().arg("run").arg(&object).output();
    assert_eq!((output.stdout.as_str(), output.code), ("11\n", Some(128 + 11)));
    assert!(output.stderr.contains("at the address 0x30"), "{output:?}");
}

/// A report that something has written over is said to be damaged, one that says something else than the system is not
/// believed.
#[test]
fn damaged_reports() {
    let source = r#"
        #include <stdio.h>
        #include <signal.h>
        #include <string.h>
        #include <stdlib.h>
        static unsigned long *find(void) {
            FILE *maps = fopen("/proc/self/maps", "r");
            char line[512];
            unsigned long start, end;
            while (fgets(line, sizeof line, maps))
                if (strstr(line, "memfd:farlink") && sscanf(line, "%lx-%lx", &start, &end) == 2 && end - start == 0x141000)
                    return (unsigned long *)start;
            exit(9);
        }
        int main(int argc, char **argv) {
            unsigned long *report = find();
            if (argv[1][0] == 'a') memset(report, 0x55, 4096);
            if (argv[1][0] == 'b') report[1] = 1;
            if (argv[1][0] == 'c') { report[0] = 0x016b6e696c726166; report[1] = 2; }
            raise(SIGKILL);
        }"#;
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "damage.c", source, &["-O1", "-fPIC"]);
    for (how, wanted) in [("a", "damaged"), ("b", "cut off"), ("c", "damaged")] {
        let output = Farlink::new().arg("run").arg(&object).args(["--", how]).output();
        assert_eq!(output.code, Some(128 + 9), "{output:?}");
        assert!(output.stderr.contains(wanted), "{how}: {output:?}");
    }
}

fn session(memory: Memory) -> (Session, Library) {
    let executor = env!("CARGO_BIN_EXE_farlink");
    let session = Session::builder().memory(memory).executor(executor, vec!["executor".into()]).spawn().unwrap();
    let library = session.create_library("main");
    library.add_object("faults.o", fs::read(&OBJECT.object).unwrap()).unwrap();
    let wait = "#include <unistd.h>\nint waiting(void) { for (;;) pause(); }";
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "waiting.c", wait, &["-O1", "-fPIC"]);
    library.add_object("waiting.o", fs::read(object).unwrap()).unwrap();
    library.link_all().unwrap();
    (session, library)
}

fn death(error: &Error) -> &Arc<Death> {
    match error {
        Error::ExecutorEnded(death) => death,
        error => panic!("{error}"),
    }
}

/// All calls that are pending, on several threads, and all later ones say how the executor died, also when the stack of a
/// thread that serves calls is full.
#[test]
fn every_call_says_how() {
    for (memory, how, wanted) in [
        (Memory::Shared, "segv", "SIGSEGV"),
        (Memory::Remote, "overflow", "overflown; in overflow+"),
        (Memory::Shared, "exit", "exited with status 3"),
        (Memory::Shared, "kill", "SIGKILL"),
    ] {
        let (session, library) = session(memory);
        thread::scope(|scope| {
            let waiting = [(); 4].map(|()| scope.spawn(|| library.run_as_main("waiting", &[])));
            // The first call may have the main thread, and then this one has another.
            thread::sleep(std::time::Duration::from_millis(50));
            assert!(session.death().is_none());
            let error = library.run_as_main("main", &["x".into(), how.into()]).unwrap_err();
            assert!(error.to_string().contains(wanted), "{how}: {error}");
            for call in waiting {
                assert!(Arc::ptr_eq(death(&call.join().unwrap().unwrap_err()), death(&error)));
            }
        });
        let later = library.run_as_main("main", &[]).unwrap_err();
        assert!(Arc::ptr_eq(death(&later), &session.death().unwrap()));
        let fault = death(&later).fault();
        assert_eq!(fault.is_some(), ["segv", "overflow"].contains(&how), "{how}");
        if let Some(frame) = fault.and_then(|fault| fault.linked_frame()) {
            assert_eq!(frame.object.as_deref(), Some("faults.o"));
            assert!(frame.line.as_ref().is_some_and(|(file, line)| file.ends_with("faults.c") && *line > 8));
        }
    }
}

/// What dies in a destructor, while its object or its library is removed, is named all the same.
#[test]
fn deaths_at_the_end_of_objects() {
    let source = "int here(void) { return 1; }\n\
        __attribute__((destructor)) static void at_its_end(void) { *(volatile int *)8 = 1; }";
    let dir = TempDir::new().unwrap();
    let object = fs::read(compile(dir.path(), "end.c", source, &["-O1", "-fPIC"])).unwrap();
    for drops_library in [false, true] {
        let (session, _library) = session(Memory::Shared);
        let library = session.create_library("ends");
        let object = library.add_object("end.o", object.as_slice()).unwrap();
        library.lookup("here").unwrap();
        if drops_library {
            drop(library);
        } else {
            let error = library.remove(object).unwrap_err().to_string();
            assert!(error.contains("in at_its_end+"), "{error}");
        }
        let _ = session.wait();
        assert!(session.death().unwrap().to_string().contains("in at_its_end+"), "{drops_library}");
    }
}

/// Of small objects without line numbers the files are not kept. The way back through them, whose frames have no frame
/// pointer, is found all the same, with the names of their own functions, also if all of them are called alike.
#[test]
fn the_way_back_through_small_objects() {
    let function = |number: i32, body: &str| {
        format!(
            "int f{}(int n);
            static __attribute__((noinline)) int inner{number}(int n) {{ volatile char room[100]; room[n] = 1; {body} }}
            int f{number}(int n) {{ return inner{number}(n) + 1; }}",
            number + 1
        )
    };
    let dir = TempDir::new().unwrap();
    let flags = ["-O1", "-fPIC", "-fno-optimize-sibling-calls", "-fomit-frame-pointer"];
    for memory in [Memory::Shared, Memory::Posix, Memory::Remote] {
        let (session, _library) = session(memory);
        let library = session.create_library("small");
        for number in 0..3 {
            let call = format!("return f{}(n) + room[n];", number + 1);
            let body = if number == 2 { "return *(volatile int *)8;" } else { &call };
            let object = compile(dir.path(), &format!("f{number}.c"), &function(number, body), &flags);
            library.add_object("small.o", fs::read(object).unwrap()).unwrap();
        }
        let error = library.run_as_main("f0", &[]).unwrap_err();
        let frames = death(&error).fault().unwrap().frames.iter().filter(|frame| frame.is_linked);
        let names: Vec<_> = frames.filter_map(|frame| frame.function.as_ref().map(|(name, _)| name.as_str())).collect();
        assert_eq!(names, ["inner2", "f2", "inner1", "f1", "inner0", "f0"], "{memory:?}");
    }
}

/// A session in this process sets no handler.
#[test]
fn in_process_sessions_set_no_handler() {
    let handlers = || {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        status.lines().find(|line| line.starts_with("SigCgt")).unwrap().to_owned()
    };
    let before = handlers();
    let session = Session::in_process().unwrap();
    let library = session.create_library("main");
    library.add_object("faults.o", fs::read(&OBJECT.object).unwrap()).unwrap();
    assert_eq!(library.run_as_main("main", &["x".into()]).unwrap(), 0);
    assert_eq!(handlers(), before);
}
