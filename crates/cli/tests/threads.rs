//! Thread-local variables through the Rust interface: threads that are there before the link, removal, memory used again.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::compile;
use farlink::{Error, Library, Memory, Object, Session};
use std::fs;
use std::process::Command;
use tempfile::TempDir;

fn sessions() -> Vec<Session> {
    let spawn = |memory| {
        let executor = env!("CARGO_BIN_EXE_farlink");
        let builder = Session::builder().memory(memory).static_tls_bytes(4096);
        builder.executor(executor, vec!["executor".into()]).spawn().unwrap()
    };
    vec![Session::in_process().unwrap(), spawn(Memory::Shared), spawn(Memory::Remote)]
}

/// Runs the test `name` in a process of its own, and gives whether this is that process. What a process has of room for
/// variables at one place in every thread is small, and what other tests took of it does not all come back.
fn is_alone(name: &str) -> bool {
    const ALONE: &str = "FARLINK_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let this = std::env::current_exe().unwrap();
    let output = Command::new(this).args(["--exact", name]).env(ALONE, "1").output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && stdout.contains("1 passed"), "{stdout}{stderr}");
    false
}

fn run(library: &Library, entry: &str) -> i32 {
    library.run_as_main(entry, &["test".into()]).unwrap()
}

struct Objects(TempDir);

impl Objects {
    fn add(&self, library: &Library, name: &str, source: &str, flags: &[&str]) -> Object {
        let bytes = fs::read(compile(self.0.path(), name, source, flags)).unwrap();
        library.add_object(name, bytes).unwrap()
    }
}

/// A thread that calls a function when it is told to, and gives its result.
const WORKER: &str = r#"
    #include <pthread.h>
    #include <semaphore.h>
    static sem_t go, done;
    static int (*volatile function)(void);
    static volatile int result;
    static pthread_t thread;
    static void *work(void *unused) {
        for (sem_wait(&go); function; sem_wait(&go)) { result = function(); sem_post(&done); }
        return unused;
    }
    int start(void) {
        sem_init(&go, 0, 0); sem_init(&done, 0, 0);
        return pthread_create(&thread, 0, work, 0);
    }
    int finish(void) { function = 0; sem_post(&go); return pthread_join(thread, 0); }
    int in_worker(int (*f)(void)) { function = f; sem_post(&go); sem_wait(&done); return result; }
"#;

/// What is linked while a thread runs has its initial values there, in every model, also where another object's variables
/// have been before.
#[test]
fn threads_from_before() {
    if !is_alone("threads_from_before") {
        return;
    }
    let objects = Objects(TempDir::new().unwrap());
    for session in sessions() {
        let library = session.create_library("main");
        objects.add(&library, "worker.c", WORKER, &["-O1", "-fPIC"]);
        assert_eq!(run(&library, "start"), 0);
        for (round, model) in ["-fPIC", "-fPIE", "-fPIC", "-fPIE", "-fPIE"].into_iter().enumerate() {
            let source = format!(
                "__thread int value_{round} = {first}; __thread int zero_{round}[40]; int in_worker(int (*)(void));\n\
                 static int next(void) {{ return value_{round}++ + zero_{round}[39]++; }}\n\
                 int run_{round}(void) {{ in_worker(next); int n = in_worker(next); return n * 100 + next(); }}",
                first = 10 + round
            );
            let object = objects.add(&library, &format!("round{round}.c"), &source, &["-O1", model]);
            let first = 10 + round as i32;
            assert_eq!(run(&library, &format!("run_{round}")), (first + 2) * 100 + first, "{model}");
            library.remove(object).unwrap();
        }
        // Its code goes with the session.
        assert_eq!(run(&library, "finish"), 0);
    }
}

/// Objects with thread-local variables come and go without end, and no memory with them, in both orders; a newer version
/// may come before the older one goes.
#[test]
fn memory_is_used_again() {
    let objects = Objects(TempDir::new().unwrap());
    for model in ["-fPIC", "-fPIE"] {
        let bytes = |number: usize| {
            let source = format!(
                "static __thread long values[16] = {{ {number} }}; int f{number}(void) {{ return values[0]++ + values[15]; }}"
            );
            fs::read(compile(objects.0.path(), &format!("{number}.c"), &source, &["-O1", model])).unwrap()
        };
        let versions = [bytes(0), bytes(1), bytes(2)];
        for session in sessions() {
            let library = session.create_library("main");
            let mut previous: Option<Object> = None;
            for round in 0..500 {
                let number = round % versions.len();
                let object = library.add_object("version.o", versions[number].clone()).unwrap();
                assert_eq!(run(&library, &format!("f{number}")), number as i32, "{model} {round}");
                if let Some(previous) = previous.replace(object) {
                    library.remove(previous).unwrap();
                }
            }
        }
    }
}

/// Destructors of an object that is removed do not run when their thread ends, since their code is gone; those of others do.
#[test]
fn destructors_of_removed_objects() {
    let objects = Objects(TempDir::new().unwrap());
    let registered = r#"
        extern void *__dso_handle;
        int __cxa_thread_atexit(void (*)(void *), void *, void *);
        static void end(void *counter) { ++*(int *)counter; }
        int REGISTER(void) { extern int ended; return __cxa_thread_atexit(end, &ended, &__dso_handle); }
    "#;
    let threads = r#"
        #include <pthread.h>
        #include <semaphore.h>
        int ended;
        static sem_t registered, leave;
        static pthread_t thread;
        static int (*functions[2])(void);
        static void *work(void *unused) {
            functions[0](); functions[1]();
            sem_post(&registered); sem_wait(&leave);
            return unused;
        }
        int first(void), second(void);
        int begin(int (*f)(void), int (*g)(void)) {
            functions[0] = f; functions[1] = g;
            sem_init(&registered, 0, 0); sem_init(&leave, 0, 0);
            pthread_create(&thread, 0, work, 0);
            return sem_wait(&registered);
        }
        int finish(void) { sem_post(&leave); pthread_join(thread, 0); return ended; }
    "#;
    for session in sessions() {
        let library = session.create_library("main");
        objects.add(&library, "threads.c", threads, &["-O1", "-fPIC"]);
        let object =
            |name: &str| objects.add(&library, &format!("{name}.c"), &registered.replace("REGISTER", name), &["-fPIC"]);
        let (first, _second) = (object("first"), object("second"));
        let start = "int begin(int (*)(void), int (*)(void)); int first(void), second(void);\n\
                     int start(void) { return begin(first, second); }";
        let start = objects.add(&library, "start.c", start, &["-fPIC"]);
        assert_eq!(run(&library, "start"), 0);
        library.remove(start).unwrap();
        library.remove(first).unwrap();
        assert_eq!(run(&library, "finish"), 1);
    }
}

/// What code wants at one place in every thread, and there is no room for, is refused with the way out; then other objects
/// still link.
#[test]
fn no_room() {
    let objects = Objects(TempDir::new().unwrap());
    for session in sessions() {
        let library = session.create_library("main");
        objects.add(&library, "large.c", "__thread char large[100000]; int f(void) { return large[5]; }", &["-fPIE"]);
        let error = library.lookup("f").unwrap_err().to_string();
        assert!(error.contains("100000 bytes") && error.contains("-fPIC"), "{error}");
        let source = "__thread char larger[100000]; int g(void) { return larger[5]++; }";
        objects.add(&library, "larger.c", source, &["-fPIC"]);
        assert!(!library.lookup("g").unwrap().is_null());
    }
}

/// A thread-local variable has no address to look up.
#[test]
fn lookup_of_a_variable() {
    let objects = Objects(TempDir::new().unwrap());
    for session in sessions() {
        let library = session.create_library("main");
        objects.add(&library, "variable.c", "__thread int variable = 5; int f(void) { return variable; }", &["-fPIC"]);
        for _ in 0..2 {
            assert!(matches!(library.lookup("variable"), Err(Error::ThreadLocal { .. })));
            assert_eq!(run(&library, "f"), 5);
        }
    }
}

/// Low memory is a choice: without it, code that was compiled for it is refused with the reason.
#[test]
fn low_memory() {
    let objects = Objects(TempDir::new().unwrap());
    let source = "static int table[4] = {1, 2, 40, 4}; int f(int i) { return table[i & 3] + table[(i + 1) & 3]; }";
    let flags = ["-O1", "-fno-pic", "-mcmodel=small"];
    let library = Session::in_process().unwrap().create_library("high");
    objects.add(&library, "absolute.c", source, &flags);
    let error = library.lookup("f").unwrap_err();
    assert!(matches!(error, Error::Link(_)) && error.to_string().contains("low_memory"), "{error}");
    let executor = env!("CARGO_BIN_EXE_farlink");
    let builder =
        |memory| Session::builder().low_memory(true).memory(memory).executor(executor, vec!["executor".into()]);
    let sessions = [Memory::Shared, Memory::Posix, Memory::Remote].map(|memory| builder(memory).spawn().unwrap());
    for session in sessions.into_iter().chain([Session::builder().low_memory(true).in_process().unwrap()]) {
        let library = session.create_library("low");
        objects.add(&library, "absolute.c", source, &flags);
        assert!(library.lookup("f").unwrap().as_u64() < 1 << 31);
        assert_eq!(run(&library, "f"), 42);
    }
}
