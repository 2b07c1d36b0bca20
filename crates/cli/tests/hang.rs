//! Executors that do not answer: calls and steps of the protocol end with what the executor's threads were doing, and it is
//! ended by request or by policy only.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::compile;
use farlink::{Error, Library, Session, SessionBuilder, ThreadState};
use std::fs;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

const SOURCE: &str = r#"
    #include <unistd.h>
    int sleeps(void) { for (;;) pause(); }
    int spins(void) { for (volatile int i = 0;; i++); }
    int nothing(void) { return 5; }
    struct stuck { int nothing; };
    "#;

const DESTRUCTOR: &str = r#"
    #include <unistd.h>
    int loaded(void) { return 1; }
    __attribute__((destructor)) static void end(void) { for (;;) pause(); }
    "#;

fn session(change: impl FnOnce(SessionBuilder) -> SessionBuilder) -> (Session, Library) {
    let builder = Session::builder().executor(env!("CARGO_BIN_EXE_farlink"), vec!["executor".into()]);
    let session = change(builder).spawn().unwrap();
    let library = session.create_library("main");
    (session, library)
}

fn add(library: &Library, name: &str, source: &str) -> farlink::Object {
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), name, source, &["-O1", "-g", "-fPIC"]);
    library.add_object(name, fs::read(object).unwrap()).unwrap()
}

/// Stops the executor, and waits until it has stopped.
fn stop(session: &Session) {
    session.signal(rustix::process::Signal::STOP);
    while session.threads().iter().any(|thread| thread.state != 'T') {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn timed_out(error: Error) -> Arc<[ThreadState]> {
    match error {
        Error::TimedOut { threads, .. } => threads,
        error => panic!("{error}"),
    }
}

/// A call that takes too long is an error that shows the linked function in which a thread waits, or that it runs; the
/// executor goes on, and ends on request.
#[test]
fn calls_take_too_long() {
    let (session, library) = session(|builder| builder.call_timeout(Duration::from_millis(200)));
    add(&library, "slow.c", SOURCE);
    let error = library.run_as_main("sleeps", &[]).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("sleeps did not return within 200ms\n"), "{text}");
    assert!(text.contains("sleeps+") && text.contains("slow.c:3") && text.contains("waits"), "{text}");
    let threads = timed_out(error);
    let main = threads.iter().find(|thread| thread.tid == session.process_id().unwrap()).unwrap();
    assert_eq!((main.state, main.system_call), ('S', Some(34)));
    let threads = timed_out(library.run_as_main("spins", &[]).unwrap_err());
    assert!(threads.iter().any(|thread| thread.state == 'R' && thread.name == "farlink-call"), "{threads:?}");
    assert_eq!(library.run_as_main("nothing", &[]).unwrap(), 5);
    assert!(session.death().is_none());
    session.signal(rustix::process::Signal::KILL);
    let error = library.run_as_main("nothing", &[]).unwrap_err();
    assert!(error.to_string().contains("SIGKILL"), "{error}");
}

/// A step of the protocol that takes too long, because the executor is stopped or what it runs at an object's end does not
/// return, is an error; when the executor goes on, so does the session.
#[test]
fn steps_take_too_long() {
    let (session, library) = session(|builder| builder.protocol_timeout(Duration::from_millis(300)));
    add(&library, "slow.c", SOURCE);
    let object = add(&library, "end.c", DESTRUCTOR);
    assert_eq!(library.run_as_main("nothing", &[]).unwrap(), 5);
    assert_eq!(library.run_as_main("loaded", &[]).unwrap(), 1);
    stop(&session);
    let other = session.create_library("other");
    add(&other, "other.c", "#include <stdlib.h>\nint f(void) { return atoi(\"4\"); }");
    let threads = timed_out(other.lookup("f").unwrap_err());
    assert!(threads.iter().all(|thread| thread.state == 'T') && !threads.is_empty(), "{threads:?}");
    session.signal(rustix::process::Signal::CONT);
    assert_eq!(other.run_as_main("f", &[]).unwrap(), 4);
    let text = library.remove(object).unwrap_err().to_string();
    assert!(text.contains("did not return within 300ms") && text.contains("    end+"), "{text}");
    assert_eq!(library.run_as_main("nothing", &[]).unwrap(), 5);
}

/// Calls that an executor which has stopped does not even take do not wait for ever either, and with the policy a stuck
/// executor is killed.
#[test]
fn stuck_executors_are_ended() {
    let (session, library) =
        session(|builder| builder.protocol_timeout(Duration::from_millis(200)).end_when_stuck(true));
    add(&library, "slow.c", SOURCE);
    let addr = library.lookup("nothing").unwrap();
    stop(&session);
    timed_out(session.read_memory(farlink::addr::ExecutorAddr::new(addr.as_u64() & 0xff), &mut [0; 8]).unwrap_err());
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&session.wait().unwrap()), Some(9));
}
