//! A process that executors are forked from: with one layout, since all of them are copies of it.
//!
//! It has one thread, which reads requests of its controller and answers them ([`farlink_wire::prepared`]). Each child is a
//! child of the controller, which waits for it as for an executor that it has started, and serves its own connection as
//! such. What the requests have opened before, every child has; of the control socket it has nothing.

#[allow(unsafe_code)]
mod sibling;

use crate::harden::{self, Rules};
use crate::{fork, server, services, unwinder};
use farlink_rpc::{Options, Transport};
use farlink_wire::prepared::{Answer, MAX_MESSAGE_BYTES, Request};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketType, recvmsg, send, sockopt,
};
use sibling::{Side, Thread};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

/// Descriptors that come with a request at most; one is wanted.
const MAX_DESCRIPTORS: usize = 4;

/// Answers requests until `control` ends; gives the exit status. In a child this serves an executor's controller instead, and
/// gives the status that [`server::run`] does.
///
/// Must be called on the main thread, while there is no other.
pub(crate) fn run(control: OwnedFd, rules: Option<Rules>, options: Options) -> Result<i32, String> {
    if sockopt::socket_type(&control) != Ok(SocketType::SEQPACKET) {
        return Err("--prepared wants a control socket that keeps the bounds of messages".to_owned());
    }
    let thread = match prepare() {
        Ok(thread) => thread,
        Err(text) => {
            answer(&control, Err(text.clone()))?;
            return Err(text);
        }
    };
    answer(&control, Ok(0))?;
    while let Some((request, descriptors)) = receive(&control)? {
        let result = match request {
            Request::Open { path } => open(path).map(|()| 0),
            Request::Fork => match fork(&thread, descriptors) {
                Ok(Forked::Parent(child)) => Ok(child),
                Ok(Forked::Child(socket)) => {
                    drop(control);
                    return serve(socket, rules, options);
                }
                Err(text) => Err(text),
            },
        };
        answer(&control, result)?;
    }
    Ok(0)
}

/// Does what every child would do.
fn prepare() -> Result<Thread, String> {
    // So that it has one address in all of them.
    unwinder::load();
    fork::register().map_err(|error| format!("handlers for fork cannot be registered: {error}"))?;
    Thread::find()
}

/// Opens a library, for every child to come.
fn open(path: String) -> Result<(), String> {
    services::open_library(path.clone())?;
    // What initializers have left in buffers would be written by every child.
    services::flush_streams();
    check_threads().map_err(|text| format!("{path} is open now, but {text}"))
}

/// Who goes on after a fork.
enum Forked {
    /// The prepared process, with the child's id.
    Parent(u32),
    /// The child, with its connection.
    Child(OwnedFd),
}

fn fork(thread: &Thread, descriptors: Vec<OwnedFd>) -> Result<Forked, String> {
    let [socket] = <[OwnedFd; 1]>::try_from(descriptors).map_err(|descriptors| {
        format!("{} descriptors have come for an executor, which wants one", descriptors.len())
    })?;
    check_threads()?;
    Ok(match thread.fork()? {
        Side::Parent(child) => Forked::Parent(child),
        Side::Child => Forked::Child(socket),
    })
}

/// Checks that no initializer of a library has left threads behind: a child would not have them, and would have for ever
/// the locks that they hold at that moment.
fn check_threads() -> Result<(), String> {
    // The folder has a link from each thread's, one from itself and one from above. Without /proc nothing can be said.
    let threads = rustix::fs::stat("/proc/self/task").map_or(1, |folder| folder.st_nlink.saturating_sub(2));
    match threads {
        0 | 1 => Ok(()),
        _ => Err(format!(
            "{threads} threads run, started by initializers of shared libraries, and an executor that is forked would have one of \
             them: open such a library in each executor"
        )),
    }
}

/// Serves as an executor that was started with this connection.
fn serve(socket: OwnedFd, rules: Option<Rules>, options: Options) -> Result<i32, String> {
    // A domain of its own: processes in one may reach into each other.
    rules.iter().for_each(harden::begin);
    drop(rules);
    let transport =
        Transport::from_socket(socket).map_err(|error| format!("the connection cannot be used: {error}"))?;
    server::run(transport, options).map_err(|error| format!("the session could not begin: {error}"))
}

/// Receives a request and the descriptors that come with it; none at the end.
fn receive(control: &OwnedFd) -> Result<Option<(Request, Vec<OwnedFd>)>, String> {
    let mut buffer = [0; MAX_MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(control, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    });
    let message = match received {
        Ok(message) if message.bytes == 0 => return Ok(None),
        Ok(message) if message.flags.contains(ReturnFlags::TRUNC) => return Err("a request is too long".to_owned()),
        Ok(message) => message,
        Err(Errno::CONNRESET) => return Ok(None),
        Err(error) => return Err(format!("requests cannot be received: {error}")),
    };
    let descriptors = ancillary.drain().filter_map(|part| match part {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors = descriptors.flatten().collect();
    let request = Request::parse(&buffer[..message.bytes]).map_err(|error| error.to_string())?;
    Ok(Some((request, descriptors)))
}

/// Sends an answer. If nobody is there to take it, the next request is the end.
fn answer(control: &OwnedFd, result: Result<u32, String>) -> Result<(), String> {
    let message = Answer(result).to_message();
    match rustix::io::retry_on_intr(|| send(control, &message, SendFlags::NOSIGNAL)) {
        Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
        Err(error) => Err(format!("an answer cannot be sent: {error}")),
    }
}
