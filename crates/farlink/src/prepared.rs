//! The process that executors are forked from, as this one sees it.
//!
//! Requests and answers go over its control socket one at a time ([`farlink_wire::prepared`]), each with a deadline. What it
//! forks are children of this process, each with a connection of its own, and are watched as those that are started.
//!
//! It is trusted no more than an executor. The child that it names has to be a child of this process that nobody has waited
//! for, and to hold the connection that was sent for it, before anything is done with it. After anything else than an answer
//! it is ended: nothing comes of it any more.

use crate::Error;
use crate::child::Child;
use crate::error::describe_status;
use crate::hang::DEFAULT_PROTOCOL_TIMEOUT;
use crate::process::{END_GRACE, Process, Program, Watch, socket_pair};
use farlink_rpc::{Handler, Options, Transport, connect};
use farlink_wire::functions::PID_KEY;
use farlink_wire::prepared::{Answer, MAX_MESSAGE_BYTES, MessageError, Request};
use farlink_wire::setup::ExecutorInfo;
use farlink_wire::sps::from_bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketType, recv, sendmsg, shutdown,
};
use rustix::process::{Pid, Signal};
use std::fs;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// A process that executors are forked from. Dropping it ends it; what has been forked goes on.
pub(crate) struct Prepared {
    program: String,
    pid: Pid,
    watch: Arc<Watch>,
    control: Mutex<Control>,
    /// What has been forked, by its id.
    children: Mutex<Vec<(Pid, Weak<Watch>)>>,
}

/// How long a process whose socket is closed may take to end.
const CLOSED_GRACE: Duration = Duration::from_secs(1);

struct Control {
    /// Shut down when the process has ended, whoever has the other end then.
    socket: Arc<OwnedFd>,
    /// Why nothing can be asked any more.
    failed: Option<Error>,
}

/// Why a request has no answer.
enum NoAnswer {
    TimedOut(Duration),
    /// The socket has been closed at the other end.
    Closed,
    /// What came is no answer.
    Wrong(MessageError),
    System(Errno),
}

impl Prepared {
    /// Starts `program` and waits until it is ready.
    ///
    /// # Errors
    ///
    /// Fails if the program cannot be started, or does not know how to be a prepared process.
    pub(crate) fn start(program: &Program) -> Result<Self, Error> {
        Self::start_within(program, Options::default().setup_timeout)
    }

    fn start_within(program: &Program, timeout: Duration) -> Result<Self, Error> {
        let (ours, theirs) = socket_pair(SocketType::SEQPACKET)?;
        let socket = Arc::new(ours);
        let shut_down = |socket: Arc<OwnedFd>, _| {
            let _ = shutdown(&*socket, Shutdown::Both);
        };
        let (watch, hand_over) = Watch::start(shut_down).map_err(|error| Error::Connect(Arc::new(error)))?;
        let child = program.start(theirs, None, &["--prepared"])?;
        let pid = child.id();
        // The thread waits for it.
        let _ = hand_over.send((child, Arc::clone(&socket)));
        let control = Mutex::new(Control { socket, failed: None });
        let program = program.path.display().to_string();
        let prepared = Self { program, pid, watch, control, children: Mutex::default() };
        let mut control = prepared.lock();
        let ready = receive(&control.socket, timeout);
        match ready {
            Ok(Answer(Ok(_))) => {}
            Ok(Answer(Err(text))) => return Err(prepared.failed(text)),
            Err(NoAnswer::Wrong(MessageError::NotPrepared) | NoAnswer::Closed) => {
                let how = prepared.end(CLOSED_GRACE).map(|how| format!(" (its process {how})")).unwrap_or_default();
                let text = format!(
                    "it does not know --prepared, which a farlink-executor of this version and a program that calls \
                     farlink::executor::init() do{how}"
                );
                return Err(prepared.failed(text));
            }
            Err(no_answer) => return Err(prepared.give_up(&mut control, no_answer)),
        }
        drop(control);
        Ok(prepared)
    }

    /// Opens a shared library, which every executor that is forked later has, at the same address.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be opened, or starts threads, or the prepared process has ended or does not answer.
    pub(crate) fn open(&self, path: &str) -> Result<(), Error> {
        let request = Request::Open { path: path.to_owned() };
        self.ask(&request, None, DEFAULT_PROTOCOL_TIMEOUT, "open the shared library").map(drop)
    }

    /// Forks an executor and waits until it has introduced itself.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be forked, the prepared process has ended or does not answer in time, or the executor does not
    /// introduce itself.
    pub(crate) fn fork(&self, handler: Arc<dyn Handler>, options: Options) -> Result<(Process, ExecutorInfo), Error> {
        let (ours, theirs) = socket_pair(SocketType::STREAM)?;
        let connection = Connection::of(&theirs)?;
        let asked = self.ask(&Request::Fork, Some(theirs.as_fd()), options.setup_timeout, "be forked");
        drop(theirs);
        let transport = Transport::from_socket(ours);
        if matches!(asked, Err(Error::Prepared { .. })) {
            self.end_orphan(transport, &connection, handler, options);
            return Err(asked.map(drop).expect_err("it has just been one"));
        }
        let child = self.adopt(asked?, &connection)?;
        let (process, info) = Process::watch(child, transport, &self.program, handler, options, || {})?;
        let mut children = self.children();
        children.retain(|(_, watch)| watch.strong_count() > 0);
        children.push((process.id(), Arc::downgrade(process.watched())));
        Ok((process, info))
    }

    /// Returns the id of the process.
    #[cfg(test)]
    pub(crate) fn id(&self) -> Pid {
        self.pid
    }

    /// Asks something; gives the number that is answered.
    fn ask(
        &self,
        request: &Request,
        descriptor: Option<BorrowedFd<'_>>,
        timeout: Duration,
        operation: &'static str,
    ) -> Result<u32, Error> {
        let refused = |text| Error::Refused { operation, text };
        let message = request.to_message().map_err(|error| refused(error.to_string()))?;
        let mut control = self.lock();
        if let Some(error) = &control.failed {
            return Err(error.clone());
        }
        let sent = send(&control.socket, &message, descriptor);
        match sent.and_then(|()| receive(&control.socket, timeout)) {
            Ok(Answer(answer)) => answer.map_err(refused),
            Err(no_answer) => Err(self.give_up(&mut control, no_answer)),
        }
    }

    /// Takes the child that is said to have been forked for a connection.
    fn adopt(&self, pid: u32, connection: &Connection) -> Result<Child, Error> {
        let named = i32::try_from(pid).ok().and_then(Pid::from_raw).filter(|&pid| pid != self.pid);
        let is_running = |watch: &Weak<Watch>| watch.upgrade().is_some_and(|watch| !watch.has_ended());
        let is_known = |named| self.children().iter().any(|(pid, watch)| *pid == named && is_running(watch));
        let new = named.filter(|&named| !is_known(named));
        new.and_then(|new| Child::found(new, |new| connection.is_held_by(new))).ok_or_else(|| {
            self.failed(format!(
                "it says that it has forked process {pid}, which is no executor that it can have forked"
            ))
        })
    }

    /// Ends an executor that may have been forked although nobody said so, if the prepared process died at that moment.
    fn end_orphan(
        &self,
        transport: std::io::Result<Transport>,
        connection: &Connection,
        handler: Arc<dyn Handler>,
        options: Options,
    ) {
        // If nobody holds the other end, this fails at once.
        let connected = transport.ok().and_then(|transport| connect(transport, handler, options).ok());
        let Some((endpoint, info)) = connected else { return };
        let pid = info.value(PID_KEY).and_then(|pid| from_bytes::<u64>(pid).ok());
        if let Some(child) = pid.and_then(|pid| self.adopt(u32::try_from(pid).ok()?, connection).ok()) {
            child.kill();
            let _ = child.wait();
        }
        endpoint.hang_up(Ok(()));
    }

    /// Ends the process, which has not answered; gives the error for this request and all that follow.
    fn give_up(&self, control: &mut Control, no_answer: NoAnswer) -> Error {
        let grace = if matches!(no_answer, NoAnswer::Closed) { CLOSED_GRACE } else { Duration::ZERO };
        let how = self.end(grace).unwrap_or_else(|| "does not end".to_owned());
        let error = self.failed(match no_answer {
            NoAnswer::Closed => format!("its process {how}; executors that it has forked are not affected"),
            NoAnswer::TimedOut(timeout) => {
                format!("it did not answer within {timeout:?}, and was ended (its process {how})")
            }
            NoAnswer::Wrong(error) => format!("it answered wrongly, and was ended: {error}"),
            NoAnswer::System(error) => format!("it cannot be asked: {error}"),
        });
        control.failed = Some(error.clone());
        error
    }

    /// Ends the process, unless it does so by itself in time; gives how it ended.
    fn end(&self, grace: Duration) -> Option<String> {
        let ended = self.watch.wait_timeout(grace).or_else(|| {
            self.watch.signal(self.pid, Signal::KILL);
            self.watch.wait_timeout(END_GRACE)
        });
        ended.map(|end| end.map_or_else(|| "has ended".to_owned(), describe_status))
    }

    fn failed(&self, problem: String) -> Error {
        Error::Prepared { program: self.program.clone(), problem }
    }

    fn lock(&self) -> MutexGuard<'_, Control> {
        // Nothing that can panic half-way through a change runs under this lock.
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn children(&self) -> MutexGuard<'_, Vec<(Pid, Weak<Watch>)>> {
        // As above.
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // For the process this is the end of its requests.
        let _ = shutdown(&*self.lock().socket, Shutdown::Both);
        self.end(END_GRACE);
    }
}

/// The end of a connection that is an executor's, by the number that the system gives it.
struct Connection(u64);

impl Connection {
    fn of(socket: &OwnedFd) -> Result<Self, Error> {
        let stat = rustix::fs::fstat(socket).map_err(|error| Error::Connect(Arc::new(error.into())))?;
        Ok(Self(stat.st_ino))
    }

    /// Returns whether a process has it open.
    fn is_held_by(&self, pid: Pid) -> bool {
        let socket = format!("socket:[{}]", self.0);
        let descriptors = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).into_iter().flatten().flatten();
        let mut files = descriptors.filter_map(|descriptor| fs::read_link(descriptor.path()).ok());
        files.any(|file| file.as_path() == Path::new(&socket))
    }
}

/// Sends a request, for which there is room if those before have been read.
fn send(socket: &OwnedFd, message: &[u8], descriptor: Option<BorrowedFd<'_>>) -> Result<(), NoAnswer> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = rustix::io::retry_on_intr(|| {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.as_slice();
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        sendmsg(socket, &[IoSlice::new(message)], &mut ancillary, flags)
    });
    match sent {
        Ok(_) => Ok(()),
        Err(Errno::PIPE | Errno::CONNRESET) => Err(NoAnswer::Closed),
        Err(error) => Err(NoAnswer::System(error)),
    }
}

/// Receives an answer. Descriptors that come with it are not taken.
fn receive(socket: &OwnedFd, timeout: Duration) -> Result<Answer, NoAnswer> {
    let deadline = Instant::now().checked_add(timeout);
    // One byte more, to tell what is too long.
    let mut buffer = [0; MAX_MESSAGE_BYTES + 1];
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        // More seconds than fit are as good as for ever.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], left.as_ref()) {
            Ok(0) => return Err(NoAnswer::TimedOut(timeout)),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(NoAnswer::System(error)),
        }
        match recv(socket, &mut buffer[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) | Err(Errno::CONNRESET) => return Err(NoAnswer::Closed),
            Ok((bytes, _)) => return Answer::parse(&buffer[..bytes]).map_err(NoAnswer::Wrong),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => return Err(NoAnswer::System(error)),
        }
    }
}

#[cfg(test)]
mod tests;
