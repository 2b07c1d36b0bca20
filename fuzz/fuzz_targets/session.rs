//! A whole session with the executor program, some messages of which are damaged on their way, in either direction.
//!
//! Nothing may panic, neither end may stay, and the executor says why it ends early. A damaged address may be the
//! executor's end by a signal. Wants the executor program's path in `FARLINK_EXECUTOR`, and a C compiler.

#![no_main]

use farlink::{Memory, Session};
use farlink_wire::frame::HEADER_BYTES;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

/// How long nothing may move before the connection is cut.
const QUIET: Duration = Duration::from_millis(100);

/// How long an executor may take to end when its connection has: more than what it allows linked code.
const PATIENCE: Duration = Duration::from_secs(20);

/// A change to one byte.
#[derive(Clone, Copy, Debug, Arbitrary)]
struct Damage {
    to_executor: bool,
    message: u8,
    at: u16,
    mask: u8,
}

/// An object with an initializer, data and unwind information.
fn object() -> &'static [u8] {
    static OBJECT: OnceLock<Vec<u8>> = OnceLock::new();
    OBJECT.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("farlink-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (source, object) = (dir.join("main.c"), dir.join("main.o"));
        let text = "static int n = 3; __attribute__((constructor)) static void first(void) { n += 4; } int main(void) { return n; }";
        std::fs::write(&source, text).unwrap();
        let compiled = Command::new("cc").args(["-O1", "-fPIC", "-c", "-o"]).arg(&object).arg(&source).status().unwrap();
        assert!(compiled.success());
        let bytes = std::fs::read(&object).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        bytes
    })
}

/// Carries messages from one end to the other, damaged, until either is gone or nothing moves.
fn carry(mut from: UnixStream, mut to: UnixStream, damage: &[Damage]) {
    from.set_read_timeout(Some(QUIET)).unwrap();
    for number in 0.. {
        let mut message = vec![0; HEADER_BYTES];
        if from.read_exact(&mut message).is_err() {
            break;
        }
        let len = u64::from_le_bytes(message[..8].try_into().unwrap()) as usize;
        message.resize(len, 0);
        if from.read_exact(&mut message[HEADER_BYTES..]).is_err() {
            break;
        }
        for change in damage.iter().filter(|change| u64::from(change.message) == number) {
            message[usize::from(change.at) % len] ^= change.mask;
        }
        if to.write_all(&message).is_err() {
            break;
        }
    }
    for stream in [from, to] {
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}

fuzz_target!(|damage: Vec<Damage>| {
    let (controller, front) = UnixStream::pair().unwrap();
    let (back, executor) = UnixStream::pair().unwrap();
    let stream = || Stdio::from(std::os::fd::OwnedFd::from(executor.try_clone().unwrap()));
    let program = std::env::var_os("FARLINK_EXECUTOR").expect("FARLINK_EXECUTOR names the executor program");
    let mut command = Command::new(program);
    command.arg("--stdio").stdin(stream()).stdout(stream()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop((command, executor));
    thread::scope(|scope| {
        let (forward, backward): (Vec<_>, Vec<_>) = damage.into_iter().partition(|change| change.to_executor);
        let (front_in, back_in) = (front.try_clone().unwrap(), back.try_clone().unwrap());
        scope.spawn(move || carry(front_in, back_in, &forward));
        scope.spawn(move || carry(back, front, &backward));
        let transport = farlink::rpc::Transport::from_socket(controller.into()).unwrap();
        if let Ok(session) = Session::builder().memory(Memory::Remote).connect(transport) {
            let library = session.create_library("main");
            let _ = library.add_object("main.o", object());
            let _ = library.run_as_main("main", &["main".into()]);
        }
    });
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("the executor stays");
        }
        thread::sleep(Duration::from_millis(1));
    }
    let mut text = String::new();
    let _ = child.stderr.take().unwrap().read_to_string(&mut text);
    assert!(!text.contains("panicked"), "{text}");
});
