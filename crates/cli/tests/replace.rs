//! Definitions that are replaced while linked code uses them, and definitions that are made when they are needed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::compile;
use farlink::{Error, Function, Library, Memory, Object, Session, SharedBuffer};
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn spawn(memory: Memory) -> Session {
    let executor = env!("CARGO_BIN_EXE_farlink");
    Session::builder().memory(memory).executor(executor, vec!["executor".into()]).spawn().unwrap()
}

fn object(source: &str, flags: &[&str]) -> Vec<u8> {
    let dir = TempDir::new().unwrap();
    fs::read(compile(dir.path(), "source.c", source, &[&["-O1", "-fPIC"], flags].concat())).unwrap()
}

fn add(library: &Library, name: &str, source: &str) -> Object {
    library.add_object(name, object(source, &[])).unwrap()
}

/// Runs `test` in each kind of session.
fn in_each_session(test: impl Fn(&Session)) {
    test(&Session::in_process().unwrap());
    for memory in [Memory::Shared, Memory::Posix, Memory::Remote] {
        test(&spawn(memory));
    }
}

fn call(function: &Function<fn(i32) -> i32>, argument: i32) -> i32 {
    // SAFETY: what this is used for is declared so.
    unsafe { function.call((argument,)) }.unwrap()
}

/// Callers of a redirectable symbol reach the version that is in use, whatever they were linked with; versions do not
/// contradict each other, and one that is in use stays.
#[test]
fn versions_replace_each_other() {
    in_each_session(|session| {
        let library = session.create_library("main");
        let redirect = library.define_redirectable("f").unwrap();
        library.define_redirectable("g").unwrap();
        assert!(matches!(library.define_redirectable("f"), Err(Error::DuplicateDefinition { .. })));
        add(
            &library,
            "user.o",
            "int f(int), g(int); int user(int n) { return f(n) * 10 + g(n); } int (*pointer)(int) = f;",
        );
        let first =
            add(&library, "first.o", "int f(int n) { return n ? f(n - 1) + 1 : 1; } int g(int n) { return 1; }");
        let second = add(&library, "second.o", "static int calls; int f(int n) { return ++calls; }");
        let unrelated = add(&library, "unrelated.o", "int h(int n) { return n; }");
        assert!(matches!(library.redirect(unrelated), Err(Error::NotRedirectable)));
        library.redirect(first).unwrap();
        let [user, f] = ["user", "f"].map(|name| library.function::<fn(i32) -> i32>(name).unwrap());
        assert_eq!(f.addr(), redirect.addr());
        assert_eq!((call(&user, 4), call(&f, 0)), (51, 1));
        let error = library.remove(first).unwrap_err();
        assert!(error.to_string().contains("the redirectable symbol"), "{error}");
        library.redirect(second).unwrap();
        assert_eq!((call(&user, 4), call(&f, 0)), (11, 2));
        // Its `g` is still in use.
        assert!(matches!(library.retire(first), Err(Error::InUse { .. })));
        let third = add(&library, "third.o", "int f(int n) { return -n; } int g(int n) { return 3; }");
        library.redirect(third).unwrap();
        assert_eq!(call(&user, 4), -37);
        let before = session.memory_stats().live_bytes;
        library.remove(first).unwrap();
        library.retire(second).unwrap();
        assert!(session.memory_stats().live_bytes < before);
        assert!(matches!(library.remove(second), Err(Error::Removed)));
        // Anything that is a function will do.
        redirect.set(library.lookup("h").unwrap()).unwrap();
        assert_eq!(call(&user, 4), 43);
        // A version whose object cannot be linked changes nothing.
        let broken = add(&library, "broken.o", "int nowhere(int); int f(int n) { return nowhere(n); }");
        assert!(matches!(library.redirect(broken), Err(Error::Undefined(_))));
        assert_eq!(call(&user, 4), 43);
    });
}

/// While linked code calls the function as fast as it can, the controller switches it as fast as it can, without asking the
/// executor for anything: every call is one of one version or of the other.
#[test]
fn switching_takes_no_calls() {
    let session = spawn(Memory::Shared);
    let library = session.create_library("main");
    library.define_redirectable("f").unwrap();
    let versions = [1, 2].map(|version| {
        let source = format!("int f(int n) {{ return n + {version}; }}");
        let version = add(&library, "version.o", &source);
        library.redirect(version).unwrap();
        version
    });
    let source = "int f(int);
        int spin(volatile int *state) {
            while (state[0] == 0) {
                int version = f(40) - 40;
                if (version != 1 && version != 2) return -1;
                state[1] |= version;
            }
            return state[1];
        }";
    add(&library, "spin.o", source);
    let spin = library.function::<fn(*mut i32) -> i32>("spin").unwrap();
    let state = session.shared_buffer::<i32>(2).unwrap();
    // SAFETY: the function is declared so, and ends when the state says so.
    let spinning = unsafe { spin.start((state.executor_ptr(),)) };
    let calls = |session: &Session| session.stats().unwrap().calls.values().sum::<u64>();
    let before = calls(&session);
    let start = Instant::now();
    let mut switches = 0;
    while switches < 1000 || (state.get(1).unwrap() != 3 && start.elapsed() < Duration::from_secs(20)) {
        library.redirect(versions[switches % 2]).unwrap();
        switches += 1;
    }
    // What asking takes itself.
    assert!(calls(&session) - before <= 2);
    state.set(0, 1).unwrap();
    assert_eq!(spinning.wait().unwrap(), 3);
}

fn wait_for(state: &SharedBuffer<i32>, index: usize) {
    let start = Instant::now();
    while state.get(index).unwrap() == 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "linked code does not come to {index}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Retired code stays until the calls that were running have returned, and does not wait for later ones.
#[test]
fn retired_code_waits_for_running_calls() {
    for session in [Session::in_process().unwrap(), spawn(Memory::Shared)] {
        let library = session.create_library("main");
        library.define_redirectable("f").unwrap();
        let wait = "#include <sched.h>
            int f(volatile int *state) { state[0] = 1; while (!state[1]) sched_yield(); return 1; }";
        let first = add(&library, "first.o", wait);
        library.redirect(first).unwrap();
        let f = library.function::<fn(*mut i32) -> i32>("f").unwrap();
        let [early, late] = [(); 2].map(|()| session.shared_buffer::<i32>(2).unwrap());
        let waits = |state: &SharedBuffer<i32>| {
            // SAFETY: the function is declared so.
            unsafe { f.call((state.executor_ptr(),)) }.unwrap()
        };
        thread::scope(|scope| {
            let running = scope.spawn(|| waits(&early));
            wait_for(&early, 0);
            let second = add(&library, "second.o", &wait.replace("return 1", "return 2"));
            library.redirect(second).unwrap();
            let both = session.memory_stats().live_bytes;
            library.retire(first).unwrap();
            let later = scope.spawn(|| waits(&late));
            wait_for(&late, 0);
            assert_eq!(session.memory_stats().live_bytes, both);
            early.set(1, 1).unwrap();
            assert_eq!(running.join().unwrap(), 1);
            assert!(session.memory_stats().live_bytes < both);
            late.set(1, 1).unwrap();
            assert_eq!(later.join().unwrap(), 2);
        });
    }
}

/// A redirectable function without a version ends who calls it, in a way that is defined.
#[test]
fn a_function_without_a_version_traps() {
    let session = spawn(Memory::Shared);
    let library = session.create_library("main");
    let redirect = library.define_redirectable("f").unwrap();
    let version = add(&library, "version.o", "int f(int n) { return n; }");
    library.redirect(version).unwrap();
    let f = library.function::<fn(i32) -> i32>("f").unwrap();
    assert_eq!(call(&f, 1), 1);
    redirect.clear().unwrap();
    library.remove(version).unwrap();
    // SAFETY: what happens is done to a process of its own.
    let error = unsafe { f.call((1,)) }.unwrap_err();
    assert!(error.to_string().contains("SIGILL"), "{error}");
}

/// A closure makes what it stands for when a lookup or an object needs it: once, however many threads do, and again if it has
/// failed. What nobody needs is not made.
#[test]
fn lookups_have_definitions_made() {
    in_each_session(|session| {
        let library = session.create_library("main");
        let made: Arc<[AtomicUsize; 3]> = Arc::default();
        let counted = Arc::clone(&made);
        library.define_lazily(&["square", "cube"], move |library| {
            counted[0].fetch_add(1, Ordering::Relaxed);
            add(library, "square.o", "int one(void); int square(int n) { return n * n * one(); }");
            add(library, "cube.o", "int cube(int n) { return n * n * n; }");
            Ok(())
        });
        let counted = Arc::clone(&made);
        library.define_lazily(&["one"], move |library| {
            // It may use the library, and may fail.
            assert_eq!(call(&library.function("cube")?, 2), 8);
            match counted[1].fetch_add(1, Ordering::Relaxed) {
                0 => Err("not yet".into()),
                _ => {
                    add(library, "one.o", "int one(void) { return 1; }");
                    Ok(())
                }
            }
        });
        let counted = Arc::clone(&made);
        library.define_lazily(&["unneeded"], move |_| {
            counted[2].fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        add(&library, "user.o", "int square(int); int user(int n) { return square(n) + 1; }");
        let error = library.lookup("user").unwrap_err();
        assert!(error.to_string().contains("one cannot be defined: not yet"), "{error}");
        let barrier = Barrier::new(4);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    barrier.wait();
                    assert_eq!(call(&library.function("user").unwrap(), 3), 10);
                });
            }
        });
        assert_eq!(made.each_ref().map(|count| count.load(Ordering::Relaxed)), [1, 2, 0]);
        // What does not do what it says is found out.
        assert!(matches!(library.lookup("unneeded"), Err(Error::Undefined(_))));
        library.define_lazily(&["circle"], |library| {
            library.lookup("circle")?;
            Ok(())
        });
        let error = library.lookup("circle").unwrap_err();
        assert!(error.to_string().contains("by the closure"), "{error}");
        // An object that is there counts.
        library.define_lazily(&["there"], |_| Err("it is there".into()));
        add(&library, "there.o", "int there(int n) { return n; }");
        assert_eq!(call(&library.function("there").unwrap(), 5), 5);
    });
}

/// A function is made when linked code first calls it: the call goes on with its arguments, wherever they are, later ones go
/// there at once, and threads that call it meanwhile wait.
#[test]
fn first_calls_have_functions_made() {
    let source = "#include <pthread.h>
        double mixed(int, double, long, float, char, double, short, long, long, long, int, double);
        double variadic(int, ...);
        int twice(int);
        double test(void) {
            return mixed(1, 2.5, 3, 4.5f, 5, 6.5, 7, 8, 9, 10, 11, 12.5) + variadic(3, 1.0, 2.0, 4.0);
        }
        static void *thread(void *arg) { return (void *)(long)twice((int)(long)arg); }
        int threads(int count) {
            pthread_t ids[16];
            int sum = 0;
            for (long i = 0; i < count; i++) pthread_create(&ids[i], 0, thread, (void *)i);
            for (int i = 0; i < count; i++) { void *result; pthread_join(ids[i], &result); sum += (int)(long)result; }
            return sum;
        }";
    let mixed = "double mixed(int a, double b, long c, float d, char e, double f, short g, long h, long i, long j, int k, double l) {
            return a + b + c + d + e + f + g + h + i + j + k + l;
        }";
    let variadic = "#include <stdarg.h>
        double variadic(int count, ...) {
            va_list args;
            va_start(args, count);
            double sum = 0;
            while (count--) sum += va_arg(args, double);
            va_end(args);
            return sum;
        }";
    in_each_session(|session| {
        let library = session.create_library("main");
        let count = Arc::new(AtomicUsize::new(0));
        for (name, source) in
            [("mixed", mixed), ("variadic", variadic), ("twice", "int twice(int n) { return 2 * n; }")]
        {
            let counted = Arc::clone(&count);
            let bytes = object(source, &[]);
            let make = move |library: &Library| {
                counted.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(10));
                Ok(library.add_object(name, bytes)?)
            };
            library.define_lazy_function(name, make).unwrap();
        }
        add(&library, "test.o", source);
        let test = library.function::<fn() -> f64>("test").unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 0);
        for _ in 0..2 {
            // SAFETY: the function is declared so.
            assert_eq!(unsafe { test.call(()) }.unwrap(), 80.0 + 7.0);
        }
        let threads = library.function::<fn(i32) -> i32>("threads").unwrap();
        assert_eq!(call(&threads, 8), 56);
        assert_eq!(count.load(Ordering::Relaxed), 3);
        let calls = session.stats().unwrap().calls;
        assert_eq!(call(&threads, 8), 56);
        assert_eq!(count.load(Ordering::Relaxed), 3, "{calls:?}");
    });
}

/// Vectors that are passed in registers arrive whole.
#[test]
fn first_calls_keep_vectors() {
    if !std::arch::is_x86_feature_detected!("avx") {
        eprintln!("SKIPPED first_calls_keep_vectors: this processor has no AVX");
        return;
    }
    let session = spawn(Memory::Shared);
    let library = session.create_library("main");
    let types = "typedef double v4 __attribute__((vector_size(32)));";
    let sum = format!("{types} double sum(v4 a, v4 b) {{ v4 c = a * b; return c[0] + c[1] + c[2] + c[3]; }}");
    let user =
        format!("{types} double sum(v4 a, v4 b); double user(void) {{ v4 a = {{1, 2, 3, 4}}; return sum(a, a + 1); }}");
    let sum = object(&sum, &["-mavx"]);
    library.define_lazy_function("sum", move |library| Ok(library.add_object("sum.o", sum)?)).unwrap();
    library.add_object("user.o", object(&user, &["-mavx"])).unwrap();
    let user = library.function::<fn() -> f64>("user").unwrap();
    // SAFETY: the function is declared so.
    assert_eq!(unsafe { user.call(()) }.unwrap(), 40.0);
}

/// A function that cannot be made ends the executor, and the call that led there says why.
#[test]
fn a_function_that_cannot_be_made_ends_the_call() {
    let session = spawn(Memory::Shared);
    let library = session.create_library("main");
    library.define_lazy_function("f", |_| Err("no compiler".into())).unwrap();
    let f = library.function::<fn(i32) -> i32>("f").unwrap();
    // SAFETY: what happens is done to a process of its own.
    let error = unsafe { f.call((1,)) }.unwrap_err();
    assert!(error.to_string().contains("its definition cannot be made: no compiler"), "{error}");
}
