//! Sessions and libraries through the Rust interface: declare, look up, link, remove, and what happens when something
//! goes wrong. In a process of its own and in this one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{compile, tool};
use farlink::addr::ExecutorAddr;
use farlink::{Error, Library, Memory, ParsedObjects, Session};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn spawn(memory: Memory) -> Session {
    let executor = env!("CARGO_BIN_EXE_farlink");
    Session::builder().memory(memory).executor(executor, vec!["executor".into()]).spawn().unwrap()
}

/// Runs `test` in each kind of session.
fn in_each_session(test: impl Fn(&Session)) {
    test(&Session::in_process().unwrap());
    for memory in [Memory::Shared, Memory::Posix, Memory::Remote] {
        test(&spawn(memory));
    }
}

/// Objects compiled for a test.
struct Objects(TempDir);

impl Objects {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn c(&self, name: &str, source: &str) -> Vec<u8> {
        fs::read(compile(self.0.path(), name, source, &["-O1", "-fPIC"])).unwrap()
    }

    fn add(&self, library: &Library, name: &str, source: &str) -> farlink::Object {
        library.add_object(name, self.c(name, source)).unwrap()
    }
}

fn run(library: &Library, entry: &str) -> i32 {
    library.run_as_main(entry, &["test".into()]).unwrap()
}

/// Nothing is linked before it is looked up, only what a lookup needs is, and what it needs is found across objects.
#[test]
fn lookup_links_what_it_needs() {
    let objects = Objects::new();
    in_each_session(|session| {
        let library = session.create_library("main");
        objects.add(&library, "a.c", "int b(void); int a(void) { return b() + 1; }");
        objects.add(&library, "b.c", "int b(void) { return 41; }");
        objects.add(&library, "c.c", "int missing(void); int c(void) { return missing(); }");
        assert_eq!(session.memory_stats().live_allocations, 0);
        let address = library.lookup("a").unwrap();
        assert_eq!(session.memory_stats().live_allocations, 2);
        assert_eq!(library.lookup("a").unwrap(), address);
        // What the process has is found too.
        assert!(!library.lookup("malloc").unwrap().is_null());
        assert!(matches!(library.lookup("nonesuch"), Err(Error::Undefined(names)) if names[0].name == "nonesuch"));
        assert_eq!(session.memory_stats().live_allocations, 2);
    });
}

/// A lookup that fails leaves the library as it was: once what was missing is there, it succeeds.
#[test]
fn failed_lookup_can_be_repeated() {
    let objects = Objects::new();
    in_each_session(|session| {
        let library = session.create_library("main");
        objects.add(&library, "main.c", "int missing(void); int main(void) { return missing(); }");
        for _ in 0..3 {
            let error = library.lookup("main").unwrap_err().to_string();
            assert!(error.contains("missing, needed by main.c"), "{error}");
        }
        assert_eq!(session.memory_stats().live_bytes, 0);
        objects.add(&library, "missing.c", "int missing(void) { return 7; }");
        assert_eq!(run(&library, "main"), 7);
    });
}

/// What cannot be linked is refused each time it is looked up, and what does not need it is not concerned.
#[test]
fn refused_objects_stay_refused() {
    let objects = Objects::new();
    in_each_session(|session| {
        let library = session.create_library("main");
        let copy = "int copy(void) { __asm__(\".reloc ., R_X86_64_COPY, other\"); return 0; }";
        objects.add(&library, "copy.c", copy);
        objects.add(&library, "tls.c", "extern __thread int plain; int tls(void) { return plain; }");
        objects.add(&library, "plain.c", "int plain;");
        objects.add(&library, "good.c", "int good(void) { return 3; }");
        for _ in 0..3 {
            for (name, what) in [("tls", "thread-local"), ("copy", "R_X86_64_COPY")] {
                let error = library.lookup(name).unwrap_err().to_string();
                assert!(error.contains(name) && error.contains(what), "{error}");
            }
        }
        assert_eq!(session.memory_stats().live_bytes, 0);
        library.lookup("good").unwrap();
        assert_eq!(session.memory_stats().live_allocations, 1);
    });
}

/// `__start_X` and `__stop_X` enclose the sections named `X` of all objects, which nothing else refers to.
#[test]
fn bounds_of_sections() {
    let objects = Objects::new();
    let entry = |name: &str, value: i32| {
        format!("__attribute__((section(\"numbers\"), used)) static const int {name} = {value};\n")
    };
    let sum = "extern const int __start_numbers[], __stop_numbers[];\n\
               int sum(void) { int n = 0; for (const int *p = __start_numbers; p < __stop_numbers; p++) n += *p; return n; }";
    let source = format!("{}{}{sum}\nint value(void) {{ return sum(); }}", entry("a", 30), entry("b", 12));
    in_each_session(|session| {
        let library = session.create_library("main");
        objects.add(&library, "sum.c", &source);
        assert_eq!(run(&library, "value"), 42);
        let library = session.create_library("split");
        objects.add(&library, "sum.c", &source);
        objects.add(&library, "other.c", &entry("c", 5));
        library.link_all().unwrap();
        assert_eq!(run(&library, "value"), 47);
        let library = session.create_library("none");
        objects.add(&library, "sum.c", sum);
        let error = library.lookup("sum").unwrap_err().to_string();
        assert!(error.contains("__start_numbers, needed by sum.c"), "{error}");
    });
}

/// How many calls a session has made for anything but to count.
fn calls(session: &Session) -> u64 {
    let calls = session.stats().unwrap().calls;
    calls.iter().filter(|(name, _)| **name != "farlink.memory.usage").map(|(_, count)| count).sum()
}

/// A buffer is one memory to linked code, to its children and to this process; where memory is not shared there is none.
/// Its place is used again once it is dropped, zero.
#[test]
fn shared_buffers() {
    let objects = Objects::new();
    let source = r#"
        #include <stdlib.h>
        #include <sys/wait.h>
        #include <unistd.h>
        static double *numbers; static long count;
        int take(int argc, char **argv) { numbers = (double *)strtoul(argv[1], 0, 0); count = atol(argv[2]); return 0; }
        int sum(void) { double total = 0; for (long i = 0; i < count; i++) total += numbers[i]; numbers[0] = total; return 7; }
        int in_child(void) {
            pid_t pid = fork();
            if (pid == 0) { numbers[1] = 3.5; _exit(0); }
            return waitpid(pid, 0, 0) == pid ? 0 : 1;
        }"#;
    in_each_session(|session| {
        let library = session.create_library("main");
        objects.add(&library, "numbers.c", source);
        let buffer = match session.shared_buffer::<f64>(100_000) {
            Ok(buffer) => buffer,
            Err(error) => {
                assert!(error.to_string().contains("messages only"), "{error}");
                return;
            }
        };
        let numbers: Vec<f64> = (0..100_000).map(f64::from).collect();
        buffer.write(0, &numbers).unwrap();
        let (address, count) = (buffer.executor_addr().to_string(), buffer.len().to_string());
        let take = || library.run_as_main("take", &["test".into(), address.clone().into(), count.clone().into()]);
        assert_eq!(take().unwrap(), 0);
        assert_eq!(run(&library, "sum"), 7);
        assert_eq!(buffer.get(0).unwrap(), 4_999_950_000.0);
        let before = calls(session);
        buffer.set(1, 1.0).unwrap();
        let mut back = vec![0.0; 100_000];
        buffer.read(0, &mut back).unwrap();
        assert_eq!((back[1], &back[2..]), (1.0, &numbers[2..]));
        assert_eq!(calls(session), before);
        assert_eq!(run(&library, "in_child"), 0);
        assert_eq!(buffer.get(1).unwrap(), 3.5);
        // Past the end, and more than there is.
        assert!(buffer.get(100_000).is_err() && buffer.write(99_999, &[0.0; 2]).is_err());
        assert!(buffer.read(usize::MAX, &mut back).is_err());
        assert!(session.shared_buffer::<u8>(0).is_err() && session.shared_buffer::<u64>(usize::MAX / 8).is_err());
        let small = session.shared_buffer::<u32>(3).unwrap();
        assert!(small.executor_addr().as_u64().is_multiple_of(64));
        let committed = session.stats().unwrap().usage.committed_bytes;
        let address = buffer.executor_addr();
        drop(buffer);
        assert!(session.stats().unwrap().usage.committed_bytes + 700_000 < committed);
        let buffer = session.shared_buffer::<f64>(100_000).unwrap();
        assert_eq!(buffer.executor_addr(), address);
        buffer.read(0, &mut back).unwrap();
        assert!(back.iter().all(|&number| number == 0.0));
    });
}

/// Linked data is read and written by this process, without a call where memory is shared; so is what the process has of
/// its own, by one.
#[test]
fn memory_of_the_executor() {
    let objects = Objects::new();
    in_each_session(|session| {
        let library = session.create_library("main");
        objects.add(
            &library,
            "data.c",
            "long value = 5; const long fixed = 6; int doubled(void) { return value * 2; }",
        );
        let (value, fixed) = (library.lookup("value").unwrap(), library.lookup("fixed").unwrap());
        let (before, is_shared) = (calls(session), session.stats().unwrap().usage.controller_mappings > 0);
        let mut bytes = [0; 8];
        session.read_memory(value, &mut bytes).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), 5);
        session.write_memory(value, &21u64.to_le_bytes()).unwrap();
        session.read_memory(fixed, &mut bytes).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), 6);
        assert_eq!(calls(session) - before, if is_shared { 0 } else { 3 });
        assert_eq!(run(&library, "doubled"), 42);
        // The executor's own memory, and none at all.
        let version = library.lookup("gnu_get_libc_version").unwrap();
        session.read_memory(version, &mut bytes).unwrap();
        assert_ne!(bytes, [0; 8]);
        for addr in [8, u64::MAX - 8, u64::MAX] {
            assert!(session.read_memory(ExecutorAddr::new(addr), &mut bytes).is_err(), "{addr:#x}");
            assert!(session.write_memory(ExecutorAddr::new(addr), &bytes).is_err(), "{addr:#x}");
        }
    });
}

/// Removing an object runs what it left for its end, once, gives its memory back, and is refused while others use it.
#[test]
fn removal() {
    let objects = Objects::new();
    let log = objects.0.path().join("log");
    let append = format!(
        "#include <stdio.h>\n#include <stdlib.h>\nstatic void note(const char *what) {{ FILE *log = fopen(\"{}\", \"a\"); fputs(what, log); fclose(log); }}",
        log.display()
    );
    in_each_session(|session| {
        let _ = fs::remove_file(&log);
        let library = session.create_library("main");
        let base = format!(
            "{append}\n__attribute__((destructor)) static void last(void) {{ note(\"destructor \"); }}\n\
             static void handler(void) {{ note(\"atexit \"); }}\n\
             int base(void) {{ atexit(handler); return 5; }}"
        );
        let base = objects.add(&library, "base.c", &base);
        let user = objects.add(&library, "user.c", "int base(void); int user(void) { return base() + 1; }");
        let empty = session.memory_stats();
        assert_eq!(run(&library, "user"), 6);
        let Err(Error::InUse { object, users }) = library.remove(base) else { panic!("base.c is in use") };
        assert_eq!((object.as_str(), users), ("base.c", vec!["user.c".to_owned()]));
        assert!(!log.exists());
        library.remove(user).unwrap();
        library.remove(base).unwrap();
        assert_eq!(fs::read_to_string(&log).unwrap(), "atexit destructor ");
        assert!(matches!(library.remove(base), Err(Error::Removed)));
        let stats = session.memory_stats();
        assert_eq!((stats.live_bytes, stats.live_allocations), (empty.live_bytes, 0));
        assert!(matches!(library.lookup("user"), Err(Error::Undefined(_))));
        // The names are free again, and so is the memory.
        objects.add(&library, "base.c", "int base(void) { return 8; }");
        assert_eq!(run(&library, "base"), 8);
        drop(library);
        assert_eq!(session.memory_stats().live_allocations, 0);
        assert_eq!(fs::read_to_string(&log).unwrap(), "atexit destructor ");
    });
}

/// Of a weak and a strong definition the strong one counts, whichever came first; removing it brings the weak one back.
#[test]
fn weak_definitions() {
    let objects = Objects::new();
    let weak = "__attribute__((weak)) int f(void) { return 1; } int call(void) { return f(); }";
    in_each_session(|session| {
        let library = session.create_library("main");
        let weak_object = objects.add(&library, "weak.c", weak);
        let strong = objects.add(&library, "strong.c", "int f(void) { return 2; }");
        assert_eq!(run(&library, "call"), 2);
        let again = library.add_object("again.c", objects.c("again.c", "int f(void) { return 3; }"));
        assert!(matches!(again, Err(Error::DuplicateDefinition { .. })));
        library.remove(weak_object).unwrap();
        library.remove(strong).unwrap();
        objects.add(&library, "weak.c", weak);
        assert_eq!(run(&library, "call"), 1);
    });
}

/// Several objects are declared at once, in their order, by as many threads as they are worth; or none of them, if one is
/// refused, whatever for.
#[test]
fn objects_at_once() {
    let objects = Objects::new();
    let source = |number| format!("char large_{number}[1500000] = {{1}}; int f_{number}(void) {{ return {number}; }}");
    let all: Vec<_> = (0..4).map(|number| (format!("{number}.c"), objects.c("f.c", &source(number)))).collect();
    let same = objects.c("same.c", "int other(void) { return 1; } int f_1(void) { return 2; }");
    let session = Session::in_process().unwrap();
    let library = session.create_library("main");
    for (refused, word) in [(same, "f_1"), (b"text".to_vec(), "bad.c")] {
        let refused = all.iter().cloned().chain([("bad.c".to_owned(), refused)]);
        let error = library.add_objects(refused).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        for name in ["f_0", "f_1", "f_3", "other"] {
            assert!(matches!(library.lookup(name), Err(Error::Undefined(_))), "{name}");
        }
    }
    assert!(library.add_objects(Vec::<(&str, Vec<u8>)>::new()).unwrap().is_empty());
    let added = library.add_objects(all).unwrap();
    assert_eq!([0, 1, 2, 3].map(|number| run(&library, &format!("f_{number}"))), [0, 1, 2, 3]);
    library.remove(added[2]).unwrap();
    assert!(library.lookup("f_2").is_err() && library.lookup("f_3").is_ok());
}

/// Objects are read while an executor starts, and what is wrong with them or with it is told; a program that cannot be
/// started leaves nothing to wait for.
#[test]
fn objects_read_meanwhile() {
    let objects = Objects::new();
    let (one, two) =
        (objects.c("one.c", "int one(void) { return 1; }"), objects.c("two.c", "int two(void) { return 2; }"));
    let builder = || Session::builder().executor(env!("CARGO_BIN_EXE_farlink"), vec!["executor".into()]);
    let (session, parsed) = builder().spawn_while(|| ParsedObjects::parse([("one.c", one), ("two.c", two)]));
    let (session, parsed) = (session.unwrap(), parsed.unwrap().unwrap());
    let library = session.create_library("main");
    assert_eq!(library.add_parsed(parsed).unwrap().len(), 2);
    assert_eq!([run(&library, "one"), run(&library, "two")], [1, 2]);
    let again = ParsedObjects::parse([("again.c", objects.c("again.c", "int two(void) { return 3; }"))]).unwrap();
    assert!(library.add_parsed(again).unwrap_err().to_string().contains("two"));

    let (session, parsed) = builder().spawn_while(|| ParsedObjects::parse([("text", b"text".to_vec())]));
    assert!(session.is_ok() && parsed.unwrap().unwrap_err().to_string().contains("text"));
    let (session, worked) = Session::builder().executor("/nowhere/executor", Vec::new()).spawn_while(|| ());
    assert!(matches!(session, Err(Error::Spawn { .. })) && worked.is_none());
    let (session, worked) = Session::builder().executor("/bin/true", Vec::new()).spawn_while(|| 7);
    assert!(session.is_err() && worked == Some(7));
    let (session, worked) = builder().executors(2).spawn_while(|| 7);
    assert!(session.is_ok() && worked == Some(7));
}

/// Addresses can be defined, and stay what they are.
#[test]
fn absolute_symbols() {
    let objects = Objects::new();
    in_each_session(|session| {
        let library = session.create_library("main");
        library.define("place", ExecutorAddr::new(0x1230)).unwrap();
        assert!(library.define("place", ExecutorAddr::new(1)).is_err());
        objects.add(&library, "use.c", "extern char place; int use(void) { return (int)(long)&place; }");
        assert_eq!(run(&library, "use"), 0x1230);
    });
}

/// What code does not reach by itself it reaches through stubs and slots, which the first object that wants it gets when that
/// turns out and the next at once; nothing is left of that, and what is in reach takes less.
#[test]
fn definitions_out_of_reach() {
    let objects = Objects::new();
    let source = |number: usize| {
        format!(
            "extern char far_place; int far_function(void); int near(void);
            int use_{number}(int count) {{ return count > 5 ? far_function() : (int)((long)&far_place >> 36) + near(); }}"
        )
    };
    in_each_session(|session| {
        let library = session.create_library("main");
        let far = 0x1230_0000_0000;
        library.define("far_place", ExecutorAddr::new(far)).unwrap();
        library.define("far_function", ExecutorAddr::new(far)).unwrap();
        let near = objects.add(&library, "near.c", "int near(void) { return 7; }");
        let mut sizes = Vec::new();
        let mut added = Vec::new();
        for number in 0..2 {
            added.push(objects.add(&library, "use.c", &source(number)));
            let before = session.memory_stats().requested_bytes;
            assert_eq!(run(&library, &format!("use_{number}")), 0x123 + 7);
            sizes.push(session.memory_stats().requested_bytes - before);
        }
        // The first came with what it calls.
        assert!(sizes[0] > sizes[1], "{sizes:?}");
        let beside = session.create_library("beside");
        objects.add(
            &beside,
            "near.c",
            "int near(void) { return 7; } int far_function(void) { return 8; } char far_place;",
        );
        objects.add(&beside, "use.c", &source(0));
        let before = session.memory_stats().requested_bytes;
        beside.lookup_all(&["near", "use_0"]).unwrap();
        assert!(session.memory_stats().requested_bytes - before < sizes[0], "{sizes:?}");
        drop(beside);
        assert_eq!(session.memory_stats().live_allocations, 3);
        added.into_iter().chain([near]).for_each(|object| library.remove(object).unwrap());
        assert_eq!(session.memory_stats().live_bytes, 0);
    });
}

/// This program's own functions are far from linked code, which is where shared libraries are.
#[test]
fn calls_of_the_program() {
    extern "C" fn twice(number: i32) -> i32 {
        number * 2
    }
    let objects = Objects::new();
    let session = Session::in_process().unwrap();
    let library = session.create_library("main");
    library.define("twice", ExecutorAddr::new(twice as *const () as u64)).unwrap();
    for name in ["one", "other"] {
        objects.add(&library, "calls.c", &format!("int twice(int); int {name}(void) {{ return twice(21) + 1; }}"));
        assert_eq!(run(&library, name), 43);
    }
}

/// A long chain of objects that need each other links in one batch, and its memory comes back.
#[test]
fn long_chain() {
    const LENGTH: usize = 2000;
    let dir = TempDir::new().unwrap();
    let mut assembly = String::new();
    for index in 0..LENGTH {
        let body =
            if index + 1 < LENGTH { format!("call f{}@PLT\n inc %eax", index + 1) } else { "xor %eax, %eax".into() };
        assembly = format!(".globl f{index}\nf{index}: sub $8, %rsp\n {body}\n add $8, %rsp\n ret\n");
        fs::write(dir.path().join(format!("{index}.s")), &assembly).unwrap();
    }
    drop(assembly);
    let sources = (0..LENGTH).map(|index| format!("{index}.s"));
    tool(Command::new("cc").arg("-c").args(sources).current_dir(dir.path()));
    in_each_session(|session| {
        let library = session.create_library("main");
        for index in 0..LENGTH {
            let name = format!("{index}.o");
            library.add_object(&name, fs::read(dir.path().join(&name)).unwrap()).unwrap();
        }
        assert_eq!(run(&library, "f0"), LENGTH as i32 - 1);
        assert_eq!(session.memory_stats().live_allocations, LENGTH as u64);
        drop(library);
        assert_eq!(session.memory_stats().live_bytes, 0);
    });
}

/// Threads that look up overlapping sets of symbols at once all get the same addresses, and every initializer runs once.
#[test]
fn concurrent_lookups() {
    const COUNT: usize = 60;
    let objects = Objects::new();
    let bytes: Vec<_> = (0..COUNT)
        .map(|index| {
            let next = if index + 1 < COUNT { format!("return f{}();", index + 1) } else { "return runs;".to_owned() };
            let callee = format!("int f{}(void);", index + 1);
            let source = format!(
                "extern int runs; {callee} __attribute__((constructor)) static void once(void) {{ runs++; }}\n\
                 int f{index}(void) {{ {next} }}"
            );
            objects.c(&format!("f{index}.c"), &source)
        })
        .collect();
    in_each_session(|session| {
        let library = session.create_library("main");
        objects.add(&library, "runs.c", "int runs;");
        for (index, bytes) in bytes.iter().enumerate() {
            library.add_object(&format!("f{index}.c"), bytes.as_slice()).unwrap();
        }
        let barrier = Barrier::new(4);
        let found: Vec<Vec<ExecutorAddr>> = thread::scope(|scope| {
            let look_up = |first: usize| {
                let (library, barrier) = (&library, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    (0..COUNT)
                        .map(|index| library.lookup(&format!("f{}", (index + first * 17) % COUNT)).unwrap())
                        .collect()
                })
            };
            let threads: Vec<_> = (0..4).map(look_up).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (first, addresses) in found.iter().enumerate() {
            for (index, &address) in addresses.iter().enumerate() {
                assert_eq!(address, library.lookup(&format!("f{}", (index + first * 17) % COUNT)).unwrap());
            }
        }
        assert_eq!(run(&library, "f0"), COUNT as i32);
    });
}

/// A session over given descriptors: two pipes to an executor that somebody else started.
#[test]
fn connect_to_given_descriptors() {
    let (their_read, our_write) = rustix::pipe::pipe().unwrap();
    let (our_read, their_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    rustix::io::fcntl_setfd(&our_write, rustix::io::FdFlags::CLOEXEC).unwrap();
    rustix::io::fcntl_setfd(&their_write, rustix::io::FdFlags::empty()).unwrap();
    let spec = format!("filedescs={},{}", their_read.as_raw_fd(), their_write.as_raw_fd());
    let mut command = Command::new(env!("CARGO_BIN_EXE_farlink"));
    let mut child = command.arg("executor").arg(spec).stdin(Stdio::null()).spawn().unwrap();
    drop::<[OwnedFd; 2]>([their_read, their_write]);
    let session = Session::connect(our_read, our_write).unwrap();
    let objects = Objects::new();
    let library = session.create_library("main");
    objects.add(&library, "main.c", "int main(void) { return 9; }");
    assert_eq!(run(&library, "main"), 9);
    // The executor is no child of the session, so it does not end with the program.
    let status = library.run_program("main", &["test".into()]).unwrap();
    assert_eq!(status.code(), Some(9));
    drop((library, session));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// When the executor is killed, every later operation says how it ended, and nothing hangs.
#[test]
fn executor_dies() {
    let objects = Objects::new();
    let session = spawn(Memory::Shared);
    let library = session.create_library("main");
    let object = objects.add(&library, "main.c", "int main(void) { return 0; }");
    let crash = "int crash(void) { *(volatile int *)0 = 1; return 0; }";
    objects.add(&library, "crash.c", crash);
    assert_eq!(run(&library, "main"), 0);
    let error = library.run_as_main("crash", &["test".into()]).unwrap_err();
    assert!(matches!(&error, Error::ExecutorEnded(how) if how.to_string().contains("SIGSEGV")), "{error}");
    objects.add(&library, "later.c", "int later(void) { return 0; }");
    for error in [library.lookup("later").unwrap_err(), library.remove(object).unwrap_err()] {
        assert!(error.to_string().contains("SIGSEGV"), "{error}");
    }
    assert!(!Path::new(&format!("/proc/{}", session.process_id().unwrap())).exists());
}

/// Sessions come and go without leaving descriptors, mappings or threads in this process.
#[test]
fn sessions_leave_nothing() {
    let objects = Objects::new();
    let bytes = objects.c("main.c", "int data[1000] = {1}; int main(void) { return data[0]; }");
    let round = || {
        in_each_session(|session| {
            let library = session.create_library("main");
            library.add_object("main.c", bytes.as_slice()).unwrap();
            assert_eq!(run(&library, "main"), 1);
        });
    };
    // Other tests run in this process at the same time, so it is one of their own that is watched.
    if std::env::var_os("FARLINK_TEST_ALONE").is_none() {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "sessions_leave_nothing", "--test-threads=1"]).env("FARLINK_TEST_ALONE", "1");
        tool(&mut command);
        return;
    }
    round();
    let count = |what: &str| fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    let farlink_maps = || fs::read_to_string("/proc/self/maps").unwrap().matches("farlink_").count();
    let before = (count("fd"), farlink_maps());
    for _ in 0..5 {
        round();
    }
    // A thread that reads a connection lets go of it shortly after the session's end.
    let start = Instant::now();
    while (count("fd"), farlink_maps()) != before && start.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!((count("fd"), farlink_maps()), before);
    assert_eq!(farlink_maps(), 0);
}
