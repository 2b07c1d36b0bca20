//! Sessions of both programs with something between them that cuts the connection at any message, or damages one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, compile};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(20);

/// How long nothing may move before the connection is cut: a message whose length was damaged keeps both waiting.
const QUIET: Duration = Duration::from_millis(150);

/// Bytes of a frame's header, whose first eight are the length of the frame.
const HEADER_BYTES: usize = 32;

/// What happens to one message of one direction.
#[derive(Clone, Copy, Debug)]
enum Damage {
    None,
    /// Ends the connection after so many bytes of the message.
    Cut(usize),
    /// Changes the byte at this place, modulo the message's length, by exclusive or.
    Flip(usize, u8),
    /// Sends the message twice.
    Twice,
}

/// Carries messages, one of which is damaged; gives how many there were.
fn carry(mut from: UnixStream, mut to: UnixStream, nth: usize, damage: Damage) -> usize {
    from.set_read_timeout(Some(if nth == usize::MAX { DEADLINE } else { QUIET })).unwrap();
    let mut count = 0;
    loop {
        let mut message = vec![0; HEADER_BYTES];
        // A quiet connection is cut by whichever direction notices first.
        if from.read_exact(&mut message).is_err() {
            break;
        }
        let len = u64::from_le_bytes(message[..8].try_into().unwrap()) as usize;
        message.resize(len, 0);
        if from.read_exact(&mut message[HEADER_BYTES..]).is_err() {
            break;
        }
        let is_it = count == nth;
        count += 1;
        match damage {
            Damage::Cut(bytes) if is_it => {
                let _ = to.write_all(&message[..bytes.min(len)]);
                break;
            }
            Damage::Flip(at, mask) if is_it => message[at % len] ^= mask,
            Damage::Twice if is_it => {
                let _ = to.write_all(&message);
            }
            _ => {}
        }
        if to.write_all(&message).is_err() {
            break;
        }
    }
    for stream in [from, to] {
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
    count
}

/// A session with damage in one direction; gives the number of messages to the executor and back.
fn session(dir: &Path, object: &Path, memory: &str, to_executor: bool, nth: usize, damage: Damage) -> [usize; 2] {
    let (front, back) = (dir.join("front"), dir.join("back"));
    let listener = UnixListener::bind(&front).unwrap();
    let mut executor = Command::new(env!("CARGO_BIN_EXE_farlink"))
        .args(["executor", "--unix"])
        .arg(&back)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let proxy = thread::spawn(move || {
        let controller = listener.accept().unwrap().0;
        let start = Instant::now();
        let executor = loop {
            match UnixStream::connect(&back) {
                Ok(executor) => break executor,
                Err(_) if start.elapsed() < DEADLINE => thread::sleep(Duration::from_millis(1)),
                Err(error) => panic!("{error}"),
            }
        };
        let (from, to) = (controller.try_clone().unwrap(), executor.try_clone().unwrap());
        let undamaged = move |is_here: bool| if is_here { damage } else { Damage::None };
        let forward = thread::spawn(move || carry(from, to, nth, undamaged(to_executor)));
        let back = carry(executor, controller, nth, undamaged(!to_executor));
        [forward.join().unwrap(), back]
    });
    let what = format!("{memory}, {} executor, message {nth}, {damage:?}", if to_executor { "to" } else { "from" });
    let start = Instant::now();
    let spec = format!("unix:{}", front.display());
    let run = Farlink::new().arg("run").args(["--connect", &spec, "--memory", memory]).arg(object).output();
    assert!(!run.stderr.contains("panicked") && run.code.is_some(), "{what}: {run:?}");
    match damage {
        Damage::None => assert_eq!((run.code, run.stderr.as_str()), (Some(7), ""), "{what}"),
        Damage::Cut(_) => assert!(run.code == Some(7) || run.code == Some(125), "{what}: {run:?}"),
        _ => {}
    }
    let counts = proxy.join().unwrap();
    while executor.try_wait().unwrap().is_none() {
        if start.elapsed() > DEADLINE {
            executor.kill().unwrap();
            panic!("{what}: the executor does not end");
        }
        thread::sleep(Duration::from_millis(1));
    }
    let mut text = String::new();
    executor.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(!text.contains("panicked"), "{what}: {text}");
    // A damaged address may have been the end of the executor; then its names are the system's to keep or the
    // controller's to remove.
    let prefix = format!("farlink_{}_", executor.id());
    let left = fs::read_dir("/dev/shm").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let left: Vec<_> = left.filter(|name| name.starts_with(&prefix)).collect();
    assert!(left.is_empty(), "{what}: {left:?}");
    fs::remove_file(&front).unwrap();
    let _ = fs::remove_file(dir.join("back"));
    counts
}

/// At each message of a session, in each direction: cut before it, inside its header, inside its body; sent twice; damaged
/// in places of every kind. Each end comes to its own end, without a panic, and leaves no name.
#[test]
fn every_message() {
    let dir = TempDir::new().unwrap();
    let source = "static int n = 3; __attribute__((constructor)) static void first(void) { n += 4; } int main(void) { return n; }";
    let object = compile(dir.path(), "main.c", source, &["-O1", "-fPIC"]);
    for memory in ["posix", "remote"] {
        let counts = session(dir.path(), &object, memory, true, usize::MAX, Damage::None);
        assert!(counts[0] > 4 && counts[1] > 4, "{counts:?}");
        for (to_executor, count) in [(true, counts[0]), (false, counts[1])] {
            for nth in 0..count {
                let damages = [Damage::Cut(0), Damage::Cut(9), Damage::Cut(HEADER_BYTES + 5), Damage::Twice];
                // The length, the opcode, the sequence number, the tag, and places in the body.
                let flips = [0, 8, 16, 24, 35, 40, 51, 77].map(|at| Damage::Flip(at, 1 << (nth % 8)));
                for damage in damages.into_iter().chain(flips) {
                    session(dir.path(), &object, memory, to_executor, nth, damage);
                }
            }
        }
    }
}
