//! Prepared processes and what is forked from them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(unsafe_code)]

use super::*;
use crate::Session;
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// Makes the program of the tests its own executor, which has to be so before the test harness's `main`.
#[used]
// SAFETY: the C library calls what is in this section as C functions, before `main`.
#[unsafe(link_section = ".init_array")]
static BE_THE_EXECUTOR: extern "C" fn() = {
    extern "C" fn init() {
        farlink_executor::init();
    }
    init
};

fn executor() -> Program {
    Program::this_one()
}

struct NoCallbacks;

impl Handler for NoCallbacks {
    fn call(&self, function: farlink_addr::ExecutorAddr, _args: Vec<u8>) -> Result<Vec<u8>, String> {
        Err(format!("no function {function}"))
    }
}

fn fork(prepared: &Prepared) -> Result<(Process, ExecutorInfo), Error> {
    prepared.fork(Arc::new(NoCallbacks), Options { out_of_band_results: true, ..Options::default() })
}

/// Executors that are forked announce the same but for their ids, and are children of this process.
#[test]
fn the_same_layout() {
    let prepared = Prepared::start(&executor()).unwrap();
    let (one, mut first) = fork(&prepared).unwrap();
    let (other, mut second) = fork(&prepared).unwrap();
    for (process, info) in [(&one, &mut first), (&other, &mut second)] {
        let pid: u64 = from_bytes(info.value(PID_KEY).unwrap()).unwrap();
        assert_eq!(u64::try_from(process.id().as_raw_nonzero().get()).unwrap(), pid);
        info.bootstrap_map.retain(|(key, _)| key != PID_KEY);
    }
    assert_eq!(first, second);
}

/// Compiles a C or C++ source with these flags.
fn compile(name: &str, source: &str, flags: &[&str]) -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let (text, output) = (dir.path().join(name), dir.path().join("output"));
    fs::write(&text, source).unwrap();
    let compiler = if name.ends_with(".cc") { "c++" } else { "cc" };
    let status = Command::new(compiler).args(["-O1", "-fPIC"]).args(flags).arg("-o").arg(&output).arg(&text).status();
    assert!(status.unwrap().success());
    (dir, output)
}

/// A session in an executor that has been forked, and its process.
struct Forked {
    session: Session,
    child: Child,
}

impl Forked {
    fn new(prepared: &Prepared) -> Self {
        let (ours, theirs) = socket_pair(SocketType::STREAM).unwrap();
        let connection = Connection::of(&theirs).unwrap();
        let pid = prepared.ask(&Request::Fork, Some(theirs.as_fd()), DEADLINE, "fork").unwrap();
        drop(theirs);
        let child = prepared.adopt(pid, &connection).unwrap();
        let session = Session::builder().connect(Transport::from_socket(ours).unwrap()).unwrap();
        Self { session, child }
    }

    fn end(self) -> Option<i32> {
        drop(self.session);
        self.child.wait().unwrap().code()
    }
}

/// A library that is opened beforehand is in every executor, where it is in the others, and its initializers have run once,
/// in the prepared process. What they print is printed once.
#[test]
fn libraries_are_opened_once() {
    let source = "#include <stdio.h>
        #include <unistd.h>
        int opened_by, count = 40;
        __attribute__((constructor)) static void init(void) { opened_by = getpid(); puts(\"opened\"); }
        int add(int n) { return count += n; }
        int who(void) { return opened_by; }";
    let (_dir, library) = compile("library.c", source, &["-shared"]);
    let prepared = Prepared::start(&Program::this_one()).unwrap();
    prepared.open(library.to_str().unwrap()).unwrap();
    let forked = [Forked::new(&prepared), Forked::new(&prepared)];
    let addresses = forked.each_ref().map(|forked| {
        let process = forked.session.create_library("process");
        let add = process.function::<fn(i32) -> i32>("add").unwrap();
        // SAFETY: the functions are declared so.
        assert_eq!(unsafe { add.call((2,)) }.unwrap(), 42);
        let who = process.function::<fn() -> i32>("who").unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { who.call(()) }.unwrap(), prepared.id().as_raw_nonzero().get());
        (add.addr(), process.lookup("malloc").unwrap())
    });
    assert_eq!(addresses[0], addresses[1]);
    assert_eq!(forked.map(Forked::end), [Some(0), Some(0)]);
    let refused = prepared.open("/no/library.so").unwrap_err().to_string();
    assert!(refused.contains("cannot open the shared library: /no/library.so"), "{refused}");
    let long = prepared.open(&"x".repeat(MAX_MESSAGE_BYTES)).unwrap_err().to_string();
    assert!(long.contains("above the limit"), "{long}");
    fork(&prepared).unwrap();
}
