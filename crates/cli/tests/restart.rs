//! Executors of which any may go, and another take its place: as what was linked was at first, at the same addresses.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::compile;
use farlink::{Error, Function, Library, Object, Restart, Session, SessionBuilder};
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn builder() -> SessionBuilder {
    Session::builder().executor(env!("CARGO_BIN_EXE_farlink"), vec!["executor".into()])
}

fn spawn(restart: Restart) -> Session {
    builder().restart(restart).spawn().unwrap()
}

fn object(name: &str, source: &str, flags: &[&str]) -> Vec<u8> {
    let dir = TempDir::new().unwrap();
    fs::read(compile(dir.path(), name, source, &[&["-O1", "-fPIC"], flags].concat())).unwrap()
}

fn add(library: &Library, name: &str, source: &str) -> Object {
    library.add_object(name, object("source.c", source, &[])).unwrap()
}

fn number(library: &Library, name: &str) -> Function<fn() -> i32> {
    library.function(name).unwrap()
}

fn get(function: &Function<fn() -> i32>) -> i32 {
    // SAFETY: what this is used for is declared so.
    unsafe { function.call(()) }.unwrap()
}

/// Waits until something is so.
fn wait_until(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "it takes too long");
        thread::sleep(Duration::from_millis(1));
    }
}

const STATE: &str = r#"
int value = 7, zero, order[4], runs;
const char text[] = "constant";
const char *pointer = text;
__attribute__((constructor(200))) static void second(void) { order[runs++] = 2; }
__attribute__((constructor(101))) static void first(void) { order[runs++] = 1; }
static int chosen(void) { return 42; }
static int (*choose(void))(void) { return chosen; }
int resolved(void) __attribute__((ifunc("choose")));
int next(void) { return value++ * 100 + zero++; }
int started(void) { return runs * 100 + order[0] * 10 + order[1]; }
int read_text(void) { return pointer[0]; }
int call_resolved(void) { return resolved(); }
int die(void) { __builtin_trap(); }
"#;

/// Data is as it was at first, initializers have run once, IFUNCs are resolved, and functions that were looked up before are
/// where they were: after a restart that was asked for, and by each policy after a death.
#[test]
fn everything_is_put_back() {
    for restart in [Restart::Never, Restart::OnNextCall, Restart::AtOnce] {
        let session = spawn(restart);
        let library = session.create_library("main");
        add(&library, "state.o", STATE);
        let next = number(&library, "next");
        let others = ["started", "read_text", "call_resolved"].map(|name| number(&library, name));
        let die = number(&library, "die");
        let check = || {
            assert_eq!((get(&next), get(&next)), (700, 801));
            assert_eq!(others.each_ref().map(get), [212, i32::from(b'c'), 42]);
        };
        check();
        let before = session.process_id();
        session.restart().unwrap();
        assert_ne!(session.process_id(), before);
        check();
        assert_eq!(library.lookup("next").unwrap(), next.addr());
        // SAFETY: it is declared so.
        let error = unsafe { die.call(()) }.unwrap_err();
        assert!(error.to_string().contains("SIGILL") && error.to_string().contains("die"), "{error}");
        match restart {
            Restart::OnNextCall => {}
            Restart::AtOnce => wait_until(|| get_one(&next).is_ok()),
            _ => {
                assert!(matches!(get_one(&next), Err(Error::ExecutorEnded(_))));
                session.restart().unwrap();
            }
        }
        if restart == Restart::AtOnce {
            // What was just called has changed it.
            session.restart().unwrap();
        }
        check();
        assert!(session.death().is_some());
    }
}

fn get_one(function: &Function<fn() -> i32>) -> Result<i32, Error> {
    // SAFETY: what this is used for is declared so.
    unsafe { function.call(()) }
}

/// What has been removed does not come back, what is linked later is there too, and places are used again: data that an
/// executor has written is not what the next object finds.
#[test]
fn objects_come_and_go() {
    let session = spawn(Restart::OnNextCall);
    let library = session.create_library("main");
    let one =
        |number: usize| format!("int data{number} = {number}; int next{number}(void) {{ return data{number}++; }}");
    let objects: Vec<_> = (0..20).map(|number| add(&library, &format!("{number}.o"), &one(number))).collect();
    let functions: Vec<_> = (0..20).map(|index| number(&library, &format!("next{index}"))).collect();
    functions.iter().for_each(|function| assert_eq!(get(function) + 1, get(function)));
    for index in (0..20).step_by(2) {
        library.remove(objects[index]).unwrap();
    }
    add(
        &library,
        "init.o",
        "int runs = 5; __attribute__((constructor)) static void init(void) { runs++; } int read(void) { return runs; }",
    );
    let read = number(&library, "read");
    for round in 0..3 {
        assert_eq!(get(&read), 6, "round {round}");
        for index in (1..20).step_by(2) {
            let expected = index as i32 + if round == 0 { 2 } else { 0 };
            assert_eq!(get(&functions[index]), expected);
        }
        let again: Vec<_> = (100..110).map(|number| add(&library, &format!("{number}.o"), &one(number))).collect();
        for index in 100..110 {
            let next = number(&library, &format!("next{index}"));
            assert_eq!((get(&next), get(&next)), (index, index + 1));
        }
        again.into_iter().for_each(|object| library.remove(object).unwrap());
        session.restart().unwrap();
    }
    assert_eq!(session.memory_stats().reservations, 1);
}

/// Exceptions, thread-local variables, closures, buffers, redirectable symbols and functions that are made when they are
/// called work as before.
#[test]
fn what_else_there_is() {
    let session = spawn(Restart::OnNextCall);
    let library = session.create_library("main");
    library.add_shared_library("libstdc++.so.6").unwrap();
    let cxx = r#"#include <stdexcept>
        extern "C" int callback(int);
        extern "C" int version();
        extern "C" int lazy(int);
        thread_local int local = 3;
        extern "C" int thrown() { try { throw std::runtime_error("x"); } catch (std::exception &e) { return e.what()[0]; } }
        extern "C" int next_local() { return local++; }
        extern "C" int call_back() { return callback(20); }
        extern "C" int call_version() { return version(); }
        extern "C" int call_lazy() { return lazy(4); }
        extern "C" int at(int *numbers) { return numbers[1]++; }
        "#;
    let calls = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&calls);
    let count = move |number: i32| number + i32::try_from(counted.fetch_add(1, Ordering::Relaxed)).unwrap();
    library.define_callback("callback", count).unwrap();
    library.define_redirectable("version").unwrap();
    let lazy = object("lazy.c", "int lazy(int n) { return n * n; }", &[]);
    library.define_lazy_function("lazy", move |library| Ok(library.add_object("lazy.o", lazy)?)).unwrap();
    library.add_object("cxx.o", object("cxx.cpp", cxx, &[])).unwrap();
    let first = add(&library, "first.o", "int version(void) { return 1; }");
    let second = add(&library, "second.o", "int version(void) { return 2; }");
    library.redirect(first).unwrap();
    let [thrown, local, back, version, lazy] =
        ["thrown", "next_local", "call_back", "call_version", "call_lazy"].map(|name| number(&library, name));
    let at = library.function::<fn(*mut i32) -> i32>("at").unwrap();
    let buffer = session.shared_buffer::<i32>(2).unwrap();
    for round in 0..4 {
        assert_eq!((get(&thrown), get(&back)), (i32::from(b'x'), 20 + round));
        assert_eq!(get(&version), if round < 2 { 1 } else { 2 });
        // Which thread a call runs on is not said.
        assert!(get(&local) >= 3);
        assert_eq!(get(&lazy), 16);
        // SAFETY: it is declared so, and the buffer has two numbers. What is in buffers is nobody's initial state.
        assert_eq!(unsafe { at.call((buffer.executor_ptr(),)) }.unwrap(), round);
        if round == 1 {
            library.redirect(second).unwrap();
        }
        session.kill();
        session.restart().unwrap();
    }
}

/// Executors that are linked for at once: each has its own data, a call can be for one of them, and one that dies is replaced
/// while the others go on. What is removed is removed in all.
#[test]
fn several_executors() {
    const COUNT: usize = 4;
    let session = builder().executors(COUNT).spawn().unwrap();
    assert_eq!((session.executor_count(), session.process_ids().len()), (COUNT, COUNT));
    let library = session.create_library("main");
    let state = add(&library, "state.o", STATE);
    let next = number(&library, "next");
    let started = number(&library, "started");
    let each: Vec<_> = (0..COUNT).map(|index| next.clone().on(index)).collect();
    for (index, function) in each.iter().enumerate() {
        for _ in 0..index {
            get(function);
        }
    }
    for (index, function) in each.iter().enumerate() {
        assert_eq!(get(function), 700 + 101 * index as i32);
        assert_eq!(get(&started.clone().on(index)), 212);
    }
    let die = number(&library, "die").on(2);
    let before = session.process_ids();
    assert!(matches!(get_one(&die), Err(Error::ExecutorEnded(_))));
    wait_until(|| session.process_ids()[2] != before[2]);
    let after = session.process_ids();
    assert_eq!((after[0], after[1], after[3]), (before[0], before[1], before[3]));
    assert_eq!((get(&each[2]), get(&each[3])), (700, 1104));
    library.remove(state).unwrap();
    add(&library, "again.o", "int value = 9; int next(void) { return value; }");
    assert_eq!((0..COUNT).map(|index| get(&number(&library, "next").on(index))).collect::<Vec<_>>(), [9; COUNT]);
    let error = get_one(&number(&library, "next").on(COUNT)).unwrap_err();
    assert!(error.to_string().contains("the session has 4"), "{error}");
    let error = library.add_shared_library("libm.so.6").unwrap_err();
    assert!(error.to_string().contains("before the first lookup"), "{error}");
}

/// Calls are spread over executors: as many run at once as there are.
#[test]
fn calls_are_spread() {
    const COUNT: usize = 3;
    let session = builder().executors(COUNT).spawn().unwrap();
    let library = session.create_library("main");
    add(
        &library,
        "wait.o",
        "#include <unistd.h>\nint who(void) { return getpid(); }\nint wait_for(volatile int *go) { while (!*go) usleep(100); return getpid(); }",
    );
    let wait_for = library.function::<fn(*const i32) -> i32>("wait_for").unwrap();
    let go = session.shared_buffer::<i32>(1).unwrap();
    // SAFETY: it is declared so, and the buffer lives until all have returned.
    let waiting: Vec<_> = (0..COUNT).map(|_| unsafe { wait_for.start((go.executor_ptr(),)) }).collect();
    go.write(0, &[1]).unwrap();
    let mut pids: Vec<u32> = waiting.into_iter().map(|call| call.wait().unwrap() as u32).collect();
    let mut all = session.process_ids();
    pids.sort_unstable();
    all.sort_unstable();
    assert_eq!(pids, all);
}

/// Threads that link, call and remove while executors are killed: errors say what happened, and in the end all work and
/// nothing is left.
#[test]
fn deaths_while_linking() {
    let session = builder().executors(2).spawn().unwrap();
    let source = object("f.c", "int counter = 1; int f(void) { return counter++; }", &[]);
    let library = session.create_library("warm");
    library.add_object("f.o", source.clone()).unwrap();
    get(&number(&library, "f"));
    let barrier = Barrier::new(4);
    thread::scope(|scope| {
        for index in 0..3 {
            let (session, source, barrier) = (&session, &source, &barrier);
            scope.spawn(move || {
                barrier.wait();
                for round in 0..150 {
                    let library = session.create_library(&format!("{index}-{round}"));
                    let object = library.add_object("f.o", source.clone()).unwrap();
                    match library.function::<fn() -> i32>("f").and_then(|f| get_one(&f)) {
                        Ok(1) => library.remove(object).unwrap(),
                        Ok(other) => panic!("data begins with {other}"),
                        Err(Error::ExecutorEnded(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        barrier.wait();
        for round in 0..20 {
            let pids = session.process_ids();
            let pid = rustix::process::Pid::from_raw(pids[round % pids.len()] as i32).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            thread::sleep(Duration::from_millis(5));
        }
    });
    session.restart().unwrap();
    let f = number(&library, "f");
    assert_eq!((get(&f.clone().on(0)), get(&f.on(1))), (1, 1));
    drop(library);
    assert_eq!(session.memory_stats().requested_bytes, 0);
}

/// However many reservations there are, a new executor has them.
#[test]
fn many_reservations() {
    let session = builder().restart(Restart::Never).reservation_bytes(2 << 20).spawn().unwrap();
    let library = session.create_library("main");
    let source = "int big[150000] = {7}; int first(void) { return big[0]++; }";
    let (big, first) = ("big", "first");
    let object = object("big.c", &source.replace(big, "bigNNN").replace(first, "firstNNN"), &[]);
    for index in 0..100 {
        let digits = format!("{index:03}");
        let mut bytes = object.clone();
        for at in 0..bytes.len() - 3 {
            if &bytes[at..at + 3] == b"NNN" {
                bytes[at..at + 3].copy_from_slice(digits.as_bytes());
            }
        }
        library.add_object(&digits, bytes).unwrap();
    }
    library.link_all().unwrap();
    assert!(session.memory_stats().reservations > 64);
    let functions: Vec<_> = (0..100).map(|index| number(&library, &format!("first{index:03}"))).collect();
    for _ in 0..3 {
        assert!(functions.iter().all(|function| get(function) == 7));
        session.restart().unwrap();
    }
}

/// Hardened executors are locked again before linked code runs in them, and low memory is where it was.
#[test]
fn hardened_and_low() {
    for builder in [builder().harden(true), builder().sandbox(true), builder().low_memory(true)] {
        let session = builder.executors(2).restart(Restart::OnNextCall).spawn().unwrap();
        let library = session.create_library("main");
        library.add_shared_library("libm.so.6").unwrap();
        let source = r#"#include <math.h>
            #include <sys/mman.h>
            int data = 4;
            int root(void) { return (int)sqrt(data++); }
            int map_code(void) { return mmap(0, 4096, PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED; }"#;
        add(&library, "root.o", source);
        let (root, map_code) = (number(&library, "root"), number(&library, "map_code"));
        let is_locked = !session.lock().unwrap().is_empty();
        for _ in 0..3 {
            assert_eq!((get(&root.clone().on(0)), get(&root.clone().on(1))), (2, 2));
            assert_eq!(get(&map_code), i32::from(!is_locked));
            session.restart().unwrap();
        }
    }
}

/// A library that is added late is opened again, and linked code refers to it wherever it then is: directly, through pointers
/// in its data, and as the inline function of which a program has one.
#[test]
fn late_libraries() {
    for restart in [Restart::Never, Restart::OnNextCall, Restart::AtOnce] {
        let session = spawn(restart);
        let library = session.create_library("main");
        // What linked code takes of the addresses is not there in the next executor: the library is elsewhere then.
        let map = "#include <sys/mman.h>\nint map(void) { for (int i = 0; i < 20000; i++) if (mmap(0, 4096 * (1 + i % 5), PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED) return 0; return 1; }";
        add(&library, "map.o", map);
        assert_eq!(get(&number(&library, "map")), 1);
        let dir = TempDir::new().unwrap();
        let late = dir.path().join("late.so");
        let source =
            "int counter = 5; int next(void) { return counter++; } __attribute__((weak)) int only(void) { return 6; }";
        let object = compile(dir.path(), "late.c", source, &["-O1", "-fPIC"]);
        common::tool(std::process::Command::new("cc").arg("-shared").arg("-o").arg(&late).arg(object));
        library.add_shared_library(late.to_str().unwrap()).unwrap();
        let user = r#"extern int counter; int next(void);
            int (*pointer)(void) = next; static int *place = &counter;
            __attribute__((weak)) int only(void) { return 6; }
            long place_of_next(void) { return (long)next; }
            int call(void) { return next() * 10000 + pointer() * 1000 + *place * 100 + counter * 10 + only(); }"#;
        add(&library, "user.o", user);
        let call = number(&library, "call");
        assert_eq!(get(&call), 5 * 10000 + 6 * 1000 + 7 * 100 + 70 + 6);
        let place = library.function::<fn() -> i64>("place_of_next").unwrap();
        // SAFETY: it is declared so.
        let (mut addr, mut moved) = (unsafe { place.call(()) }.unwrap(), 0);
        for _ in 0..3 {
            let before = library.lookup("call").unwrap();
            session.restart().unwrap();
            // SAFETY: it is declared so.
            let now = unsafe { place.call(()) }.unwrap();
            moved += i32::from(now != addr);
            addr = now;
            assert_eq!(get(&call), 5 * 10000 + 6 * 1000 + 7 * 100 + 70 + 6);
            assert_eq!(library.lookup("call").unwrap(), before);
        }
        assert!(moved > 0, "the library did not move");
        if restart == Restart::OnNextCall {
            session.kill();
            let _ = session.wait();
            add(&library, "more.o", "int next(void); int more(void) { return next(); }");
            assert_eq!(get(&number(&library, "more")), 5);
        }
    }
}

/// What linked code does at its start may end an executor that is to take a place: that is an error, once for each time that
/// somebody wants one.
#[test]
fn executors_that_cannot_start() {
    for restart in [Restart::OnNextCall, Restart::AtOnce] {
        let session = spawn(restart);
        let library = session.create_library("main");
        let flag = session.shared_buffer::<i32>(1).unwrap();
        library.define("flag", flag.executor_addr()).unwrap();
        add(
            &library,
            "start.o",
            "extern int flag; __attribute__((constructor)) static void start(void) { if (flag) __builtin_trap(); } int one(void) { return 1; }",
        );
        let one = number(&library, "one");
        assert_eq!(get(&one), 1);
        flag.set(0, 1).unwrap();
        session.kill();
        let _ = session.wait();
        for _ in 0..3 {
            assert!(get_one(&one).is_err());
        }
        flag.set(0, 0).unwrap();
        session.restart().unwrap();
        assert_eq!(get(&one), 1);
    }
}

/// Without the process that executors are forked from, those that run go on, and nobody takes a place.
#[test]
fn without_the_prepared_process() {
    let dir = TempDir::new().unwrap();
    // By this name it is found, and no other.
    let program = dir.path().join("prepared");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_farlink"), &program).unwrap();
    let builder = Session::builder().executor(&program, vec!["executor".into()]);
    let session = builder.restart(Restart::OnNextCall).spawn().unwrap();
    let library = session.create_library("main");
    add(&library, "one.o", "int one(void) { return 1; }");
    let one = number(&library, "one");
    let own = session.process_id().unwrap() as i32;
    let is_prepared = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        *pid != own && line.starts_with(program.as_os_str().as_encoded_bytes())
    };
    let entries = fs::read_dir("/proc").unwrap();
    let mut pids = entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let prepared = rustix::process::Pid::from_raw(pids.find(is_prepared).unwrap()).unwrap();
    rustix::process::kill_process(prepared, rustix::process::Signal::KILL).unwrap();
    assert_eq!(get(&one), 1);
    session.kill();
    let _ = session.wait();
    let error = wait_for_error(&one);
    assert!(error.contains("SIGKILL"), "{error}");
    let error = session.restart().unwrap_err();
    assert!(error.to_string().contains("SIGKILL"), "{error}");
}

fn wait_for_error(function: &Function<fn() -> i32>) -> String {
    loop {
        if let Err(error) = get_one(function) {
            return error.to_string();
        }
    }
}

/// Sessions that cannot be restarted say so, and what restarts cannot be combined with is refused.
#[test]
fn what_cannot_be() {
    let session = Session::in_process().unwrap();
    let error = session.restart().unwrap_err();
    assert!(error.to_string().contains("SessionBuilder::restart"), "{error}");
    for builder in [builder().memory(farlink::Memory::Remote), builder().debug(true), builder().trace(true)] {
        let error = builder.executors(2).spawn().map(drop).unwrap_err();
        assert!(error.to_string().contains("take the place of another"), "{error}");
    }
}
