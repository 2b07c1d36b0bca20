//! The prepared process by its protocol: what it answers, what it refuses, and how it ends.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{NoCallbacks, wait};
use farlink_rpc::{Executor, Options, Transport, connect};
use farlink_wire::functions::{DYLIB_INSTANCE, DYLIB_OPEN};
use farlink_wire::prepared::{Answer, MAX_MESSAGE_BYTES, Request};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

/// A prepared process and the way to ask it.
struct Prepared {
    child: Child,
    control: OwnedFd,
}

impl Prepared {
    fn start(kind: SocketType) -> Self {
        // While the child's end may be inherited, no other test may start a process.
        static SPAWN: Mutex<()> = Mutex::new(());
        let _guard = SPAWN.lock().unwrap();
        let (control, theirs) = rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_farlink-executor"));
        command.args(["--fd", &theirs.as_raw_fd().to_string(), "--farlink", "--prepared"]);
        let child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        Self { child, control }
    }

    fn send(&self, message: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        rustix::net::sendmsg(&self.control, &[IoSlice::new(message)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    }

    fn answer(&self) -> Result<u32, String> {
        let mut buffer = [0; MAX_MESSAGE_BYTES];
        let (bytes, _) = rustix::net::recv(&self.control, &mut buffer[..], RecvFlags::empty()).unwrap();
        Answer::parse(&buffer[..bytes]).unwrap().0
    }

    fn ask(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<u32, String> {
        self.send(&request.to_message().unwrap(), descriptors);
        self.answer()
    }

    /// Closes the control socket; gives the exit status and what was printed.
    fn end(mut self) -> (Option<i32>, String) {
        drop(self.control);
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        (wait(&mut self.child).code(), text)
    }
}

/// An executor is forked for the one descriptor that comes along; the process ends in order without requests, and its
/// executor with its own connection.
#[test]
fn forks() {
    let prepared = Prepared::start(SocketType::SEQPACKET);
    assert_eq!(prepared.answer(), Ok(0));
    assert_eq!(prepared.ask(&Request::Open { path: "libm.so.6".to_owned() }, &[]), Ok(0));
    assert!(prepared.ask(&Request::Open { path: "/no/such.so".to_owned() }, &[]).unwrap_err().contains("/no/such.so"));
    assert!(prepared.ask(&Request::Open { path: "\0".to_owned() }, &[]).unwrap_err().contains("NUL"));
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert!(prepared.ask(&Request::Fork, &[]).unwrap_err().contains("0 descriptors"));
    assert!(prepared.ask(&Request::Fork, &[theirs.as_fd(); 2]).unwrap_err().contains("2 descriptors"));
    assert!(prepared.ask(&Request::Fork, &[theirs.as_fd(); 8]).is_err());
    let id = prepared.ask(&Request::Fork, &[theirs.as_fd()]).unwrap();
    drop(theirs);
    let options = Options { out_of_band_results: true, ..Options::default() };
    let transport = Transport::from_socket(ours.into()).unwrap();
    let (endpoint, info) = connect(transport, Arc::new(NoCallbacks), options).unwrap();
    // The executor has the standard error stream too, so that does not end yet.
    let Prepared { mut child, control } = prepared;
    drop(control);
    assert_eq!(wait(&mut child).code(), Some(0));
    let executor = Executor::new(info, Arc::new(endpoint.clone())).unwrap();
    let instance = executor.object(DYLIB_INSTANCE).unwrap();
    let opened = executor.bind(DYLIB_OPEN).unwrap().call(&(instance, "libm.so.6".to_owned(), 0)).wait();
    assert!(opened.unwrap().is_ok());
    endpoint.hang_up(Ok(()));
    let forked = rustix::process::Pid::from_raw(i32::try_from(id).unwrap());
    let (_, status) = rustix::process::waitpid(forked, rustix::process::WaitOptions::empty()).unwrap().unwrap();
    assert_eq!(status.exit_status(), Some(0));
}

/// What is no request, or too long for one, ends the process with a message and status 1, and so does a control socket that
/// is none.
#[test]
fn garbage_is_refused() {
    for (message, word) in [(vec![0; 32], "no message"), (vec![7], "no message"), (vec![0; 100_000], "too long")] {
        let prepared = Prepared::start(SocketType::SEQPACKET);
        assert_eq!(prepared.answer(), Ok(0));
        prepared.send(&message, &[]);
        let (code, text) = prepared.end();
        assert!(code == Some(1) && text.contains(word), "{code:?}: {text}");
    }
    let (code, text) = Prepared::start(SocketType::STREAM).end();
    assert!(code == Some(1) && text.contains("--prepared wants a control socket"), "{code:?}: {text}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_farlink-executor"));
    let output = command.args(["--stdio", "--prepared"]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && text.contains("--prepared wants one inherited socket"), "{text}");
}
