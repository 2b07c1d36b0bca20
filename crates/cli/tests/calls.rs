//! Typed calls of linked functions, and linked code that calls closures: the values that arrive, threads, deadlines, and
//! ends of the executor. In a process of its own and in this one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::compile;
use farlink::{Error, ExecutorPtr, Library, Memory, Session};
use std::fs;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

farlink::c_struct! {
    #[derive(Debug, PartialEq)]
    struct Mixed { a: f32, b: i32, c: f64 }
    #[derive(Debug, PartialEq)]
    struct Floats { a: [f32; 3] }
    #[derive(Debug, PartialEq)]
    struct Pair { a: i64, b: ExecutorPtr<u8> }
    #[derive(Debug, PartialEq)]
    struct Tiny { a: u8, b: bool }
    #[derive(Debug, PartialEq)]
    struct Big { a: i32, b: [f64; 4], c: Tiny }
}

/// The same in C, before every test's source.
const DECLARATIONS: &str = "
    #include <stdarg.h>
    #include <stdbool.h>
    #include <stdint.h>
    #include <stddef.h>
    struct mixed { float a; int b; double c; };
    struct floats { float a[3]; };
    struct pair { long a; unsigned char *b; };
    struct tiny { unsigned char a; bool b; };
    struct big { int a; double b[4]; struct tiny c; };
    ";

fn spawn(memory: Memory) -> Session {
    let executor = env!("CARGO_BIN_EXE_farlink");
    Session::builder().memory(memory).executor(executor, vec!["executor".into()]).spawn().unwrap()
}

fn object(name: &str, source: &str, flags: &[&str]) -> Vec<u8> {
    let dir = TempDir::new().unwrap();
    let source = if name.ends_with(".c") { format!("{DECLARATIONS}{source}") } else { source.to_owned() };
    fs::read(compile(dir.path(), name, &source, flags)).unwrap()
}

fn library(session: &Session, source: &str) -> Library {
    let library = session.create_library("calls");
    library.add_object("calls.c", object("calls.c", source, &["-O1", "-fPIC"])).unwrap();
    library
}

/// Runs `test` with the same code in this process and in another.
fn in_each_session(source: &str, test: impl Fn(&Session, &Library)) {
    for session in [Session::in_process().unwrap(), spawn(Memory::Shared), spawn(Memory::Remote)] {
        test(&session, &library(&session, source));
    }
}

/// Calls `$name` of a library with this signature.
macro_rules! call {
    ($library:expr, $name:ident: $signature:ty, $($args:expr),* $(,)?) => {{
        let function = $library.function::<$signature>(stringify!($name)).unwrap();
        // SAFETY: the source declares the function so, and it uses only what it gets.
        unsafe { function.call(($($args,)*)) }
    }};
}

/// Every scalar type arrives and comes back as it was, at the ends of its range and in every place that an argument has.
#[test]
fn scalars_arrive() {
    let source = "
        int8_t i8(int8_t a) { return a; }
        int i8_wide(int8_t a) { return a; }
        uint16_t u16(uint16_t a) { return a; }
        int32_t i32(int32_t a) { return a; }
        uint64_t u64(uint64_t a) { return a; }
        float f32(float a) { return a; }
        double f64(double a) { return a; }
        bool not(bool a) { return !a; }
        void *next(unsigned char *a) { return a + 1; }
        static int seen;
        void see(int a) { seen = a; }
        int get(void) { return seen; }
        double all(int8_t a, double b, uint16_t c, float d, int64_t e, bool f, size_t g, int32_t h, double i, int j, long k,
                   short l) {
            return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 9 * i + 10 * j + 11 * k + 12 * l;
        }
        double floats(double a, double b, double c, double d, double e, double f, double g, double h, double i, double j) {
            return a - b + c - d + e - f + g - h + 10 * i - 100 * j;
        }
        double variadic(int count, ...) {
            va_list args;
            va_start(args, count);
            double sum = 0;
            while (count--) sum += va_arg(args, double);
            va_end(args);
            return sum;
        }";
    in_each_session(source, |_, library| {
        for value in [i8::MIN, -1, 0, i8::MAX] {
            assert_eq!(call!(library, i8: fn(i8) -> i8, value).unwrap(), value);
            assert_eq!(call!(library, i8_wide: extern "C" fn(i8) -> i32, value).unwrap(), i32::from(value));
        }
        assert_eq!(call!(library, u16: fn(u16) -> u16, u16::MAX).unwrap(), u16::MAX);
        assert_eq!(call!(library, i32: unsafe extern "C" fn(i32) -> i32, i32::MIN).unwrap(), i32::MIN);
        assert_eq!(call!(library, u64: fn(u64) -> u64, u64::MAX).unwrap(), u64::MAX);
        assert_eq!(call!(library, f32: fn(f32) -> f32, -0.25).unwrap(), -0.25);
        assert_eq!(call!(library, f64: fn(f64) -> f64, f64::MAX).unwrap(), f64::MAX);
        assert!(!call!(library, not: fn(bool) -> bool, true).unwrap());
        assert!(call!(library, not: fn(bool) -> bool, false).unwrap());
        let pointer = ExecutorPtr::<u8>::new(farlink::addr::ExecutorAddr::new(0x1000));
        assert_eq!(call!(library, next: fn(*const u8) -> *mut u8, pointer).unwrap(), pointer.checked_add(1).unwrap());
        call!(library, see: fn(i32), 42).unwrap();
        assert_eq!(call!(library, get: fn() -> i32,).unwrap(), 42);
        type All = fn(i8, f64, u16, f32, i64, bool, usize, i32, f64, i32, i64, i16) -> f64;
        let all = call!(library, all: All, -1, 1.5, 3, 0.5, -5, true, 7, 8, 9.5, 10, 11, -12).unwrap();
        let expected = -1.0 + 3.0 + 9.0 + 2.0 - 25.0 + 6.0 + 49.0 + 64.0 + 85.5 + 100.0 + 121.0 - 144.0;
        assert_eq!(all, expected);
        type Floats = fn(f64, f64, f64, f64, f64, f64, f64, f64, f64, f64) -> f64;
        let floats = call!(library, floats: Floats, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25).unwrap();
        assert_eq!(floats, 8.0 - 7.0 + 6.0 - 5.0 + 4.0 - 3.0 + 2.0 - 1.0 + 5.0 - 25.0);
        assert_eq!(call!(library, variadic: fn(i32, f64, f64, f64) -> f64, 3, 1.0, 2.0, 4.0).unwrap(), 7.0);
    });
}

/// Structures go by value as C passes them: in registers of both kinds, in memory, and when registers have run out.
#[test]
fn structures_go_by_value() {
    let source = "
        struct mixed mixed(struct mixed s) { return (struct mixed){ s.c, -s.b, s.a }; }
        struct floats floats(struct floats s, float f) { return (struct floats){{ s.a[2] * f, s.a[1] * f, s.a[0] * f }}; }
        struct pair pair(struct pair s) { return (struct pair){ s.a + 1, s.b + 1 }; }
        struct tiny tiny(struct tiny s) { return (struct tiny){ s.a + 1, !s.b }; }
        struct big big(int first, struct big s) {
            return (struct big){ s.a + first, { s.b[3], s.b[2], s.b[1], s.b[0] }, { s.c.a + 1, !s.c.b } };
        }
        double late(long a, long b, long c, long d, long e, struct pair s, struct mixed m, struct big big, double f) {
            return a + b + c + d + e + s.a + (long)s.b + m.a + m.b + m.c + big.b[1] + f;
        }";
    in_each_session(source, |_, library| {
        let mixed = Mixed { a: 0.5, b: 7, c: -2.0 };
        assert_eq!(call!(library, mixed: fn(Mixed) -> Mixed, mixed).unwrap(), Mixed { a: -2.0, b: -7, c: 0.5 });
        let floats = call!(library, floats: fn(Floats, f32) -> Floats, Floats { a: [1.0, 2.0, 3.0] }, 2.0);
        assert_eq!(floats.unwrap(), Floats { a: [6.0, 4.0, 2.0] });
        let at = |addr| ExecutorPtr::new(farlink::addr::ExecutorAddr::new(addr));
        let pair = Pair { a: -1, b: at(0x10) };
        assert_eq!(call!(library, pair: fn(Pair) -> Pair, pair).unwrap(), Pair { a: 0, b: at(0x11) });
        let tiny = Tiny { a: 255, b: true };
        assert_eq!(call!(library, tiny: fn(Tiny) -> Tiny, tiny).unwrap(), Tiny { a: 0, b: false });
        let big = Big { a: 40, b: [1.0, 2.0, 3.0, 4.0], c: tiny };
        let back = Big { a: 42, b: [4.0, 3.0, 2.0, 1.0], c: Tiny { a: 0, b: false } };
        assert_eq!(call!(library, big: fn(i32, Big) -> Big, 2, big).unwrap(), back);
        type Late = fn(i64, i64, i64, i64, i64, Pair, Mixed, Big, f64) -> f64;
        let late = call!(library, late: Late, 1, 2, 3, 4, 5, pair, mixed, big, 0.25).unwrap();
        assert_eq!(late, 15.0 - 1.0 + 16.0 + 0.5 + 7.0 - 2.0 + 2.0 + 0.25);
    });
}

/// Arguments in a shared buffer are used where they are, by both sides.
#[test]
fn buffers_are_passed_by_pointer() {
    let source = "double sum(double *numbers, size_t count) {
        double sum = 0;
        for (size_t i = 0; i < count; i++) { sum += numbers[i]; numbers[i] = -numbers[i]; }
        return sum;
    }";
    for session in [Session::in_process().unwrap(), spawn(Memory::Shared)] {
        let library = library(&session, source);
        let data = session.shared_buffer::<f64>(1000).unwrap();
        (0..1000).for_each(|index| data.set(index, index as f64).unwrap());
        let total = call!(library, sum: fn(*mut f64, usize) -> f64, data.executor_ptr(), data.len()).unwrap();
        assert_eq!(total, 499_500.0);
        assert_eq!(data.get(999).unwrap(), -999.0);
    }
}

/// Calls from several threads run beside each other: each waits in the executor until all have come.
#[test]
fn calls_run_in_parallel() {
    let source = "
        static int arrived;
        int meet(int count) {
            __atomic_add_fetch(&arrived, 1, __ATOMIC_SEQ_CST);
            while (__atomic_load_n(&arrived, __ATOMIC_SEQ_CST) < count) __builtin_ia32_pause();
            return count;
        }";
    in_each_session(source, |_, library| {
        let meet = library.function::<fn(i32) -> i32>("meet").unwrap();
        thread::scope(|scope| {
            for _ in 0..8 {
                // SAFETY: the function is declared so, and returns when eight have called it.
                scope.spawn(|| assert_eq!(unsafe { meet.call((8,)) }.unwrap(), 8));
            }
        });
        // Without waiting for one before the next is made.
        // SAFETY: as above; eight have called it.
        let started: Vec<_> = (0..4).map(|_| unsafe { meet.start((2,)) }).collect();
        assert!(started.into_iter().all(|pending| pending.wait().unwrap() == 2));
    });
}

/// A call that does not return in time fails then, and other calls go on; ending the executor fails what is still running.
#[test]
fn calls_have_deadlines_and_can_be_ended() {
    let source = "#include <unistd.h>
        void forever(void) { for (;;) pause(); }
        int answer(void) { return 42; }";
    let session = spawn(Memory::Shared);
    let library = library(&session, source);
    let forever = library.function::<fn()>("forever").unwrap();
    let brief = forever.clone().with_timeout(Duration::from_millis(20));
    // SAFETY: the function is declared so.
    let error = unsafe { brief.call(()) }.unwrap_err();
    assert!(matches!(&error, Error::TimedOut { function, .. } if function == "forever"), "{error}");
    assert_eq!(call!(library, answer: fn() -> i32,).unwrap(), 42);
    thread::scope(|scope| {
        // SAFETY: as above.
        let call = scope.spawn(|| unsafe { forever.call(()) });
        // SAFETY: as above.
        let started = unsafe { forever.start(()) };
        assert!(session.kill());
        for error in [call.join().unwrap().unwrap_err(), started.wait().unwrap_err()] {
            assert!(error.to_string().starts_with("the executor was killed by SIGKILL"), "{error}");
        }
    });
    assert!(!Session::in_process().unwrap().kill());
}

/// What ends a program ends the executor, and the call says how: a bad address, an exception that nobody catches.
#[test]
fn bad_ends_are_reported() {
    let ends = |source: &str, name: &str| {
        let session = spawn(Memory::Shared);
        let library = session.create_library("ends");
        library.add_shared_library("libstdc++.so.6").unwrap();
        library.add_object("ends.cc", object("ends.cc", source, &["-O1", "-fPIC"])).unwrap();
        let function = library.function::<fn(i32) -> i32>(name).unwrap();
        // SAFETY: the function is declared so; what it does wrong is done to its own process.
        unsafe { function.call((0,)) }.unwrap_err().to_string()
    };
    let crash = "extern \"C\" int crash(int n) { return *(volatile int *)(long)(n + 8); }";
    let end = ends(crash, "crash");
    assert!(
        end.starts_with("the executor was killed by SIGSEGV at the address 0x8") && end.contains("in crash+"),
        "{end}"
    );
    let raise = "#include <stdexcept>
        extern \"C\" int raise(int n) { if (!n) throw std::runtime_error(\"thrown\"); return n; }";
    let end = ends(raise, "raise");
    assert!(end.starts_with("the executor was killed by SIGABRT; in raise+"), "{end}");
    let caught = "#include <stdexcept>
        extern \"C\" int outer(int n) { try { throw n; } catch (int) { throw std::runtime_error(\"again\"); } }";
    assert!(ends(caught, "outer").starts_with("the executor was killed by SIGABRT"));
}

/// Backtraces go through what calls linked code, and through what linked code calls, to the thread's beginning.
#[test]
fn backtraces_go_through() {
    let source = "#include <execinfo.h>
        int depth(long a, long b, long c, long d, long e, long f, long on_the_stack) {
            void *frames[64];
            return backtrace(frames, 64) + 0 * on_the_stack;
        }
        int through(int (*function)(void)) { return function() + 0; }";
    in_each_session(source, |session, library| {
        type Depth = fn(i64, i64, i64, i64, i64, i64, i64) -> i32;
        let depth = call!(library, depth: Depth, 0, 0, 0, 0, 0, 0, 0).unwrap();
        // The function, what calls it, Rust's frames and the thread's.
        assert!(depth > 5, "{depth}");
        let inner = library.clone();
        let callback = move || call!(inner, depth: Depth, 0, 0, 0, 0, 0, 0, 0).unwrap();
        let callback = session.callback("again", callback).unwrap();
        let twice = call!(library, through: fn(farlink::addr::ExecutorAddr) -> i32, callback.addr()).unwrap();
        if session.process_id().is_none() {
            assert!(twice > depth + 5, "{twice} {depth}");
        }
    });
}

/// Linked code calls closures with values of every kind and gets their results.
#[test]
fn linked_code_calls_closures() {
    let source = "
        void log_number(int level, double number);
        struct mixed mix(struct mixed s, bool b, struct big big);
        struct big grow(struct big s, long a, long b, long c, long d, long e, long f, long g, unsigned char h);
        unsigned char *next(unsigned char *);
        int run(int n) {
            for (int i = 0; i < n; i++) log_number(i, i / 2.0);
            struct big big = { 1, { 1, 2, 3, 4 }, { 5, true } };
            struct mixed m = mix((struct mixed){ 1, 2, 3 }, true, big);
            big = grow(big, 1, 2, 3, 4, 5, 6, 7, 200);
            unsigned char bytes[2];
            return m.a == 2 && m.b == 3 && m.c == 1 && big.a == 229 && big.b[0] == 2 && !big.c.b && next(bytes) == bytes + 1;
        }";
    in_each_session(source, |_, library| {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&lines);
        library
            .define_callback("log_number", move |level: i32, number: f64| kept.lock().unwrap().push((level, number)))
            .unwrap();
        let mix = |s: Mixed, b: bool, big: Big| {
            assert!(b);
            Mixed { a: s.b as f32, b: s.c as i32, c: big.b[0] }
        };
        library.define_callback("mix", mix).unwrap();
        let grow = |s: Big, a: i64, b: i64, c: i64, d: i64, e: i64, f: i64, g: i64, h: u8| Big {
            a: s.a + (a + b + c + d + e + f + g) as i32 + i32::from(h),
            b: s.b.map(|number| 2.0 * number),
            c: Tiny { a: s.c.a, b: !s.c.b },
        };
        library.define_callback("grow", grow).unwrap();
        library.define_callback("next", |pointer: ExecutorPtr<u8>| pointer.checked_add(1).unwrap()).unwrap();
        assert!(matches!(library.define_callback("next", || ()), Err(Error::DuplicateDefinition { .. })));
        assert_eq!(call!(library, run: fn(i32) -> i32, 3).unwrap(), 1);
        assert_eq!(*lines.lock().unwrap(), [(0, 0.0), (1, 0.5), (2, 1.0)]);
    });
}

type Step = farlink::Function<fn(i32) -> i32>;

/// A closure may call linked code, which calls a closure, and so on; from several threads of the executor's at once.
#[test]
fn calls_nest_and_closures_run_on_many_threads() {
    let source = "#include <pthread.h>
        int down(int n);
        int step(int n) { return n == 0 ? 0 : 1 + down(n - 1); }
        static void *thread(void *arg) { return (void *)(long)step((int)(long)arg); }
        int threads(int count) {
            pthread_t ids[16];
            int sum = 0;
            for (int i = 0; i < count; i++) pthread_create(&ids[i], 0, thread, (void *)10L);
            for (int i = 0; i < count; i++) { void *result; pthread_join(ids[i], &result); sum += (int)(long)result; }
            return sum;
        }";
    in_each_session(source, |session, library| {
        let step: Arc<Mutex<Option<Step>>> = Arc::default();
        let (inner, count) = (Arc::clone(&step), Arc::new(AtomicI64::new(0)));
        let counted = Arc::clone(&count);
        let down = move |n: i32| {
            counted.fetch_add(1, Ordering::Relaxed);
            let step = inner.lock().unwrap().clone().unwrap();
            // SAFETY: the function is declared so, and its library is there while it runs.
            unsafe { step.call((n,)) }.unwrap()
        };
        let down = session.callback("down", down).unwrap();
        library.define("down", down.addr()).unwrap();
        *step.lock().unwrap() = Some(library.function("step").unwrap());
        assert_eq!(call!(library, step: fn(i32) -> i32, 20).unwrap(), 20);
        assert_eq!(call!(library, threads: fn(i32) -> i32, 8).unwrap(), 80);
        assert_eq!(count.load(Ordering::Relaxed), 100);
        // The closure holds the session, which would otherwise stay.
        step.lock().unwrap().take();
    });
}

/// A closure that panics ends the executor, and the call that led there says what the closure said.
#[test]
fn a_panic_in_a_closure_ends_the_call() {
    let session = spawn(Memory::Shared);
    let library = library(&session, "int check(int); int run(int n) { return check(n); }");
    let check = |n: i32| if n < 2 { n } else { panic!("{n} is too many") };
    library.define_callback("check", check).unwrap();
    assert_eq!(call!(library, run: fn(i32) -> i32, 1).unwrap(), 1);
    let error = call!(library, run: fn(i32) -> i32, 2).unwrap_err();
    let said = "the controller's function check panicked: 2 is too many; the executor has ended";
    assert_eq!(error.to_string(), said);
    assert!(session.wait().is_some());
}

/// LLVM's executors call no functions of any signature: that is an error.
#[test]
fn executors_of_llvm_are_refused() {
    let executor = "/usr/lib/llvm-22/bin/llvm-jitlink-executor";
    if !common::available("executors_of_llvm_are_refused", executor) {
        return;
    }
    let session = Session::builder().memory(Memory::Posix).executor(executor, Vec::new()).spawn().unwrap();
    let library = library(&session, "int answer(void) { return 42; }");
    let error = library.function::<fn() -> i32>("answer").unwrap_err();
    assert!(error.to_string().contains("farlink.call"), "{error}");
    let error = library.define_callback("f", || ()).unwrap_err();
    assert!(error.to_string().contains("farlink.callback"), "{error}");
}
