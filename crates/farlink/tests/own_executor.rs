//! A program that is its own executor: `init` at the top of its `main` is all it needs. Being such a program, this test has
//! a `main` of its own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use farlink::executor::EXECUTOR_ARG;
use farlink::rpc::Transport;
use farlink::{Memory, Session};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::thread;
use tempfile::TempDir;

fn main() {
    farlink::executor::init();
    match std::env::args().nth(1).as_deref() {
        // What test runners ask for and give.
        Some("--list") => println!("own_executor: test"),
        Some("child") => println!("a child"),
        _ => {
            starts_itself();
            its_children_are_no_executors();
            exceptions_are_found_by_index();
            a_connection_that_was_accepted();
            println!("own_executor: all tests passed");
        }
    }
}

fn compile(name: &str, source: &str) -> Vec<u8> {
    let dir = TempDir::new().unwrap();
    let (text, object) = (dir.path().join(name), dir.path().join("object.o"));
    fs::write(&text, source).unwrap();
    let compiler = if name.ends_with(".cc") { "c++" } else { "cc" };
    let status = Command::new(compiler).args(["-c", "-O1", "-fPIC", "-o"]).arg(&object).arg(&text).status();
    assert!(status.unwrap().success());
    fs::read(object).unwrap()
}

/// The executor is another process of the same program, found without any help, also by a session with room for thread-local
/// variables of the fixed kind.
fn starts_itself() {
    let source = "#include <unistd.h>
        __thread int counter __attribute__((tls_model(\"initial-exec\"))) = 40;
        int pid(void) { return getpid(); }
        int count(int n) { return counter += n; }";
    let sessions = [
        Session::spawn().unwrap(),
        Session::builder().static_tls_bytes(4096).spawn().unwrap(),
        Session::builder().memory(Memory::Remote).spawn().unwrap(),
    ];
    for session in sessions {
        let library = session.create_library("main");
        library.add_object("pid.o", compile("pid.c", source)).unwrap();
        let pid = library.function::<fn() -> i32>("pid").unwrap();
        // SAFETY: the function is declared so.
        let pid = u32::try_from(unsafe { pid.call(()) }.unwrap()).unwrap();
        assert_eq!(Some(pid), session.process_id());
        assert_ne!(pid, std::process::id());
        let exe = |pid: u32| fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        assert_eq!(exe(pid), exe(std::process::id()));
        let count = library.function::<fn(i32) -> i32>("count").unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { count.call((2,)) }.unwrap(), 42);
    }
}

/// A child that linked code starts of the same program is an ordinary one.
fn its_children_are_no_executors() {
    let source = "#include <stdio.h>
        int child_says(const char *command) {
            FILE *pipe = popen(command, \"r\");
            char line[20] = { 0 };
            int read = fgets(line, sizeof line, pipe) != 0;
            return pclose(pipe) == 0 && read ? line[2] : -1;
        }";
    let session = Session::spawn().unwrap();
    let library = session.create_library("main");
    library.add_object("child.o", compile("child.c", source)).unwrap();
    let command = format!("'{}' child\0", std::env::current_exe().unwrap().display());
    let text = session.shared_buffer::<u8>(command.len()).unwrap();
    text.write(0, command.as_bytes()).unwrap();
    let says = library.function::<fn(*const u8) -> i32>("child_says").unwrap();
    // SAFETY: the function is declared so, and gets a C string.
    assert_eq!(unsafe { says.call((text.executor_ptr(),)) }.unwrap(), i32::from(b'c'));
}

/// libgcc asks this program for unwind information: the linker exports the function that it asks, since libgcc's shared
/// library has one of that name.
fn exceptions_are_found_by_index() {
    let source = "#include <stdexcept>
        extern \"C\" int deep(int n) { if (n == 0) throw std::runtime_error(\"deep\"); return deep(n - 1) + 1; }
        extern \"C\" int catches(int n) { try { return deep(n); } catch (std::exception &error) { return error.what()[0]; } }";
    let session = Session::spawn().unwrap();
    let library = session.create_library("main");
    library.add_shared_library("libstdc++.so.6").unwrap();
    library.add_object("deep.o", compile("deep.cc", source)).unwrap();
    let catches = library.function::<fn(i32) -> i32>("catches").unwrap();
    // SAFETY: the function is declared so.
    assert_eq!(unsafe { catches.call((100,)) }.unwrap(), i32::from(b'd'));
    // As the process finds it, not libstdc++, which depends on libgcc's library.
    let found = session.create_library("process").lookup("_Unwind_Find_FDE").unwrap().as_u64();
    let maps = fs::read_to_string(format!("/proc/{}/maps", session.process_id().unwrap())).unwrap();
    let holds = |line: &&str| {
        let (start, rest) = line.split_once('-').unwrap();
        let end = rest.split(' ').next().unwrap();
        let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
        (number(start)..number(end)).contains(&found)
    };
    let place = maps.lines().find(holds).unwrap();
    let program = std::env::current_exe().unwrap();
    assert!(place.ends_with(program.to_str().unwrap()), "{place}");
}

/// An executor that connects to its controller is as good as one that it starts.
fn a_connection_that_was_accepted() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let executor = thread::spawn(move || {
        let socket = UnixStream::connect(path).unwrap();
        // A copy that children get.
        let socket = rustix::io::dup(&socket).unwrap();
        let number = socket.as_raw_fd().to_string();
        let mut command = Command::new(std::env::current_exe().unwrap());
        let mut child = command.args([EXECUTOR_ARG, "--fd", &number, "--farlink"]).spawn().unwrap();
        drop(socket);
        child.wait().unwrap()
    });
    let (socket, _) = listener.accept().unwrap();
    let session = Session::builder().connect(Transport::from_socket(socket.into()).unwrap()).unwrap();
    let library = session.create_library("main");
    library.add_object("answer.o", compile("answer.c", "int answer(void) { return 42; }")).unwrap();
    let answer = library.function::<fn() -> i32>("answer").unwrap();
    // SAFETY: the function is declared so.
    assert_eq!(unsafe { answer.call(()) }.unwrap(), 42);
    drop((answer, library, session));
    assert!(executor.join().unwrap().success());
}
