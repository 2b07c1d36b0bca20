//! Linked code in executors that were forked: everything that depends on what the C library knows of its thread and its
//! process works as in one that was started.

use super::*;
use crate::{Library, Measure};
use std::os::unix::process::ExitStatusExt;

/// Links `linked.c` and gives the session's library and the object of a directory that goes with it.
fn link(session: &Session) -> Library {
    let (_dir, object) = compile("linked.c", include_str!("linked.c"), &["-c"]);
    let library = session.create_library("main");
    library.add_object("linked.o", fs::read(object).unwrap()).unwrap();
    library
}

fn run_main(library: &Library, what: &str) -> Result<i32, Error> {
    library.run_as_main("main", &["program".into(), what.into()])
}

/// Signals, mutexes, restartable sequences, threads and forks, on the main thread, which was forked, and on another.
#[test]
fn threads_know_who_they_are() {
    let _alone = alone();
    let prepared = start();
    for forked in [Forked::new(&prepared), Forked::new(&prepared)] {
        let library = link(&forked.session);
        assert_eq!(run_main(&library, "check").unwrap(), 0);
        let check = library.function::<fn() -> i32>("check").unwrap();
        // SAFETY: the function is declared so.
        assert_eq!(unsafe { check.call(()) }.unwrap(), 0);
        drop((check, library));
        assert_eq!(forked.end(), Some(0));
    }
}

/// Executors end as linked code ends them: by `abort`, also on a thread that was forked, by a signal that they raise, and by
/// `exit`, with its handlers.
#[test]
fn ends() {
    let _alone = alone();
    let prepared = start();
    let logs = TempDir::new().unwrap();
    let log = logs.path().join("log");
    for (what, code, signal) in
        [("abort", None, Some(libc::SIGABRT)), ("raise", None, Some(libc::SIGTERM)), ("exit", Some(5), None)]
    {
        let forked = Forked::new(&prepared);
        let library = link(&forked.session);
        let path = format!("{}\0", log.display());
        let text = forked.session.shared_buffer::<u8>(path.len()).unwrap();
        text.write(0, path.as_bytes()).unwrap();
        let leave = library.function::<fn(*const u8) -> i32>("leave").unwrap();
        // SAFETY: the function is declared so, and gets a C string.
        assert_eq!(unsafe { leave.call((text.executor_ptr(),)) }.unwrap(), 0);
        run_main(&library, what).unwrap_err();
        let status = forked.child.wait().unwrap();
        assert_eq!((status.code(), status.signal()), (code, signal), "{what}");
    }
    assert_eq!(fs::read_to_string(log).unwrap(), "the end\n");
    let forked = Forked::new(&prepared);
    let abort = link(&forked.session).function::<fn(u64) -> u64>("abort_there").unwrap();
    // SAFETY: the function takes and gives a pointer.
    unsafe { abort.call((0,)) }.unwrap_err();
    assert_eq!(forked.child.wait().unwrap().signal(), Some(libc::SIGABRT));
}

/// Exceptions pass through linked frames and those of a library that was opened beforehand.
#[test]
fn exceptions() {
    let _alone = alone();
    let prepared = start();
    prepared.open("libstdc++.so.6").unwrap();
    let source = "#include <stdexcept>
        extern \"C\" int deep(int n) { if (n == 0) throw std::runtime_error(\"deep\"); return deep(n - 1) + 1; }
        extern \"C\" int main(int, char **) { try { return deep(9); } catch (std::exception &error) { return error.what()[0]; } }";
    let (_dir, object) = compile("deep.cc", source, &["-c"]);
    let forked = Forked::new(&prepared);
    let library = forked.session.create_library("main");
    library.add_object("deep.o", fs::read(object).unwrap()).unwrap();
    assert_eq!(run_main(&library, "").unwrap(), i32::from(b'd'));
    let deep = library.function::<fn(i32) -> i32>("main").unwrap();
    // SAFETY: the function looks at no argument.
    assert_eq!(unsafe { deep.call((0,)) }.unwrap(), i32::from(b'd'));
}

/// A robust mutex that an executor's forked thread held when it died is found so by a sibling.
#[test]
fn robust_mutexes() {
    let _alone = alone();
    let source = "#include <pthread.h>
        #include <sys/mman.h>
        static pthread_mutex_t *mutex;
        __attribute__((constructor)) static void init(void) {
            pthread_mutexattr_t attributes;
            mutex = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
            pthread_mutexattr_init(&attributes);
            pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
            pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
            pthread_mutex_init(mutex, &attributes);
        }
        int lock_shared(void) { return pthread_mutex_trylock(mutex); }";
    let (_dir, library) = compile("robust.c", source, &["-shared"]);
    let main = "int lock_shared(void); void abort(void); int main(int argc, char **argv) {
            int result = lock_shared();
            if (result == 0) abort();
            return result;
        }";
    let (_dir, main) = compile("main.c", main, &["-c"]);
    let prepared = start();
    prepared.open(library.to_str().unwrap()).unwrap();
    let [one, other] = [(); 2].map(|()| {
        let forked = Forked::new(&prepared);
        let library = forked.session.create_library("main");
        library.add_object("main.o", fs::read(&main).unwrap()).unwrap();
        (forked, library)
    });
    run_main(&one.1, "").unwrap_err();
    assert_eq!(one.0.child.wait().unwrap().signal(), Some(libc::SIGABRT));
    assert_eq!(run_main(&other.1, "").unwrap(), libc::EOWNERDEAD);
}

/// Executors that are forked from a hardened process can be locked, each by itself, and cannot reach each other.
#[test]
fn hardened() {
    let _alone = alone();
    let prepared = Prepared::start(&Program { is_hardened: true, ..Program::this_one() }).unwrap();
    let forked = [(); 2].map(|()| Forked::with(&prepared, Session::builder().harden(true)));
    let parent = prepared.id().as_raw_nonzero().get();
    for (one, other) in [(0, 1), (1, 0)] {
        let measures = forked[one].session.lock().unwrap();
        let problems: Vec<Measure> = measures.into_iter().filter(|measure| measure.problem.is_some()).collect();
        if !problems.is_empty() {
            eprintln!("SKIPPED: this system cannot harden: {problems:?}");
            return;
        }
        let library = link(&forked[one].session);
        let escape = library.function::<fn(i32, i32) -> i32>("escape").unwrap();
        let sibling = forked[other].child.id().as_raw_nonzero().get();
        // SAFETY: the function is declared so.
        assert_eq!(unsafe { escape.call((sibling, parent)) }.unwrap(), 0);
        assert_eq!(run_main(&library, "check").unwrap(), 0);
    }
    // The prepared process is not locked.
    let later = Forked::with(&prepared, Session::builder().harden(true));
    assert_eq!(run_main(&link(&later.session), "check").unwrap(), 0);
}
