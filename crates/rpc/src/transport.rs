//! The descriptors that carry the frames, and how bytes move over them.
//!
//! A [`Transport`] is what a user hands in; a `Link` is the same in use, with one more descriptor, an eventfd that
//! wakes whoever waits for the peer. Closing works with everything that can be polled: `Link::close` sets a flag,
//! makes the eventfd readable and shuts sockets down, and from then on no operation waits any more.
//!
//! The file status flags of the descriptors are left alone, because others may share them: what must not block is
//! asked for call by call (`MSG_DONTWAIT`, `RWF_NOWAIT`).
//!
//! Writing to a socket never raises SIGPIPE. Writing to a pipe does when the peer has closed it, unless the process
//! ignores the signal, as Rust programs do from their start; a process that does not has to see to it.

use crate::count::{SystemCall, count};
use crate::ring::Ring;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{Errno, FdFlags, ReadWriteFlags, fcntl_getfd, fcntl_setfd, ioctl_fionread, pwritev2, read, writev};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, SocketFlags, SocketType, sockopt,
};
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Bytes that a pipe with room for anything accepts at once (`PIPE_BUF`).
const PIPE_ATOMIC_BYTES: usize = 4096;

/// Descriptors that a peer may send before they are taken.
const MAX_DESCRIPTORS: usize = 64;

/// The offset that makes `pwritev2` write where `write` would.
const CURRENT_OFFSET: u64 = u64::MAX;

/// The descriptors of a connection: bytes to read from one, bytes to write to the other, or one socket for both.
///
/// Not yet in use; [`connect`](crate::connect) and [`accept`](crate::accept) make an endpoint of it.
#[derive(Debug)]
pub struct Transport {
    read: Half,
    write: Half,
    /// This end of a ring that came with the connection.
    pub(crate) ring: Option<Ring>,
}

impl Transport {
    /// Returns a connection that reads from one descriptor and writes to another: pipes, or anything else with
    /// read and write. Both are made close-on-exec.
    ///
    /// # Errors
    ///
    /// Fails if a descriptor is not open for its direction.
    pub fn from_fds(read: OwnedFd, write: OwnedFd) -> io::Result<Self> {
        if access_mode(&read)? == OFlags::WRONLY {
            return Err(invalid("the descriptor to read from is open for writing only"));
        }
        if access_mode(&write)? == OFlags::RDONLY {
            return Err(invalid("the descriptor to write to is open for reading only"));
        }
        Ok(Self { read: Half::new(Arc::new(read))?, write: Half::new(Arc::new(write))?, ring: None })
    }

    /// Returns a connection over a stream socket, Unix or TCP. It is made close-on-exec, and TCP sends at once
    /// (`TCP_NODELAY`).
    ///
    /// # Errors
    ///
    /// Fails if the descriptor is not a stream socket.
    pub fn from_socket(socket: OwnedFd) -> io::Result<Self> {
        if sockopt::socket_type(&socket)? != SocketType::STREAM {
            return Err(invalid("the socket is not a stream socket"));
        }
        if matches!(sockopt::socket_domain(&socket)?, AddressFamily::INET | AddressFamily::INET6) {
            sockopt::set_tcp_nodelay(&socket, true)?;
        }
        let half = Half::new(Arc::new(socket))?;
        Ok(Self { read: half.clone(), write: half, ring: None })
    }

    /// Returns whether descriptors can be passed over the connection: whether it writes to a Unix socket.
    #[must_use]
    pub fn passes_descriptors(&self) -> bool {
        self.write.kind == Kind::Socket && matches!(sockopt::socket_domain(&self.write.fd), Ok(AddressFamily::UNIX))
    }

    /// Returns the two ends of a new connection (`socketpair`).
    ///
    /// # Errors
    ///
    /// Fails if the process or the system is out of descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        Ok((Self::from_socket(one)?, Self::from_socket(other)?))
    }
}

fn invalid(text: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

fn access_mode(fd: &OwnedFd) -> io::Result<OFlags> {
    Ok(fcntl_getfl(fd)? & OFlags::RWMODE)
}

/// How a descriptor is read and written without being stuck in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Socket,
    Pipe,
    Other,
}

/// One direction of a connection.
#[derive(Clone, Debug)]
struct Half {
    fd: Arc<OwnedFd>,
    kind: Kind,
}

impl Half {
    fn new(fd: Arc<OwnedFd>) -> io::Result<Self> {
        let kind = match FileType::from_raw_mode(fstat(&fd)?.st_mode) {
            FileType::Socket => Kind::Socket,
            FileType::Fifo => Kind::Pipe,
            _ => Kind::Other,
        };
        fcntl_setfd(&fd, fcntl_getfd(&fd)? | FdFlags::CLOEXEC)?;
        Ok(Self { fd, kind })
    }

    fn shut_down(&self, how: Shutdown) {
        if self.kind == Kind::Socket {
            // It fails only if the peer is gone already.
            let _ = rustix::net::shutdown(&self.fd, how);
        }
    }
}

/// Why an operation on a link did nothing.
#[derive(Debug)]
pub(crate) enum LinkError {
    /// The link has been closed at this end.
    Closed,
    /// The deadline has passed.
    TimedOut,
    /// The peer does not take bytes any more.
    Gone,
    /// The system reported an error.
    Io(Errno),
}

/// A connection in use. One thread reads; one at a time writes; any may close.
#[derive(Debug)]
pub(crate) struct Link {
    read: Half,
    write: Half,
    /// Readable from `close` on.
    wake: OwnedFd,
    closed: AtomicBool,
    /// Descriptors that have arrived and have not been taken.
    received: Mutex<VecDeque<OwnedFd>>,
    passes_descriptors: bool,
    /// Whether the pipe to write to knows `RWF_NOWAIT` (Linux 6.4), until it says that it does not.
    nowait: AtomicBool,
}

impl Link {
    pub(crate) fn new(transport: Transport) -> io::Result<Self> {
        let passes_descriptors = transport.passes_descriptors();
        let Transport { read, write, .. } = transport;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let nowait = AtomicBool::new(write.kind == Kind::Pipe);
        let (closed, received) = (AtomicBool::new(false), Mutex::default());
        Ok(Self { read, write, wake, closed, received, passes_descriptors, nowait })
    }

    /// Returns the numbers of the descriptors that are read from and written to.
    pub(crate) fn descriptor_numbers(&self) -> [RawFd; 2] {
        [self.read.fd.as_raw_fd(), self.write.fd.as_raw_fd()]
    }

    /// Ends all waiting, now and later. What has arrived can still be read.
    pub(crate) fn close(&self) {
        if !self.closed.swap(true, Ordering::SeqCst) {
            // The counter of a new eventfd has room for this.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
            self.read.shut_down(Shutdown::Read);
            self.write.shut_down(Shutdown::Write);
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Returns how many bytes can be read without waiting.
    pub(crate) fn arrived_bytes(&self) -> u64 {
        ioctl_fionread(&self.read.fd).unwrap_or(0)
    }

    /// Returns whether `wake` is readable. Unless there is something to do meanwhile, waits until that is so, or something can
    /// be read, or the link is closed.
    pub(crate) fn is_woken(&self, wake: BorrowedFd<'_>, has_work: bool) -> bool {
        let fds = [wake, self.read.fd.as_fd(), self.wake.as_fd()];
        let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let timeout = has_work.then(Timespec::default);
        loop {
            count(SystemCall::Poll);
            match poll(&mut fds, timeout.as_ref()) {
                Err(Errno::INTR) => {}
                // Reading says what is wrong.
                Err(_) => return false,
                Ok(_) => return !fds[0].revents().is_empty(),
            }
        }
    }

    /// Reads what is there, waiting until something is. 0 is the end.
    ///
    /// On a link that is closed it reads what has arrived and fails instead of waiting.
    pub(crate) fn read(&self, buffer: &mut [u8], deadline: Option<Instant>) -> Result<usize, LinkError> {
        // A socket need not be polled first: closing shuts it down, which ends a recv in progress.
        let mut wait = self.read.kind != Kind::Socket || deadline.is_some();
        loop {
            if wait {
                self.wait(&self.read, PollFlags::IN, deadline)?;
            }
            count(SystemCall::Receive);
            let received = match self.read.kind {
                Kind::Socket => self.receive(&mut *buffer),
                Kind::Pipe | Kind::Other => read(&self.read.fd, &mut *buffer),
            };
            match received {
                Ok(count) => return Ok(count),
                Err(Errno::INTR) => {}
                // Non-blocking by its owner's wish.
                Err(Errno::AGAIN) => wait = true,
                // The peer closed before it had read everything. What it sent came first.
                Err(Errno::CONNRESET | Errno::PIPE) => return Ok(0),
                Err(error) => return Err(LinkError::Io(error)),
            }
        }
    }

    /// Receives bytes, and the descriptors that come with them.
    fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(buffer)];
        let message = rustix::net::recvmsg(&self.read.fd, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = part {
                let mut received = self.received();
                // What is above the limit is closed; whoever misses it finds that out.
                let room = MAX_DESCRIPTORS.saturating_sub(received.len());
                received.extend(descriptors.take(room));
            }
        }
        Ok(message.bytes)
    }

    fn received(&self) -> MutexGuard<'_, VecDeque<OwnedFd>> {
        // Nothing that can panic runs under this lock.
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the descriptor that arrived first.
    pub(crate) fn take_descriptor(&self) -> Option<OwnedFd> {
        self.received().pop_front()
    }

    /// Writes `header` with `descriptor` in the ancillary data of its first byte.
    pub(crate) fn write_with_descriptor(&self, header: &[u8], descriptor: BorrowedFd<'_>) -> Result<(), LinkError> {
        if !self.passes_descriptors {
            return Err(LinkError::Io(Errno::OPNOTSUPP));
        }
        let descriptors = [descriptor];
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
            if self.is_closed() {
                return Err(LinkError::Closed);
            }
            count(SystemCall::Send);
            match rustix::net::sendmsg(&self.write.fd, &[IoSlice::new(header)], &mut ancillary, flags) {
                Ok(sent) => break sent,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(&self.write, PollFlags::OUT, None)?,
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(LinkError::Gone),
                Err(error) => return Err(LinkError::Io(error)),
            }
        };
        self.write(&header[sent..], &[], None)
    }

    /// Writes `header` and `payload`, in one system call if the system takes them at once.
    ///
    /// If it fails, part of them may have been written: nothing can be sent after that.
    pub(crate) fn write(&self, header: &[u8], payload: &[u8], deadline: Option<Instant>) -> Result<(), LinkError> {
        let mut storage = [IoSlice::new(header), IoSlice::new(payload)];
        let mut slices = &mut storage[..];
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            if self.is_closed() {
                return Err(LinkError::Closed);
            }
            match self.write_some(slices, deadline) {
                Ok(count) => IoSlice::advance_slices(&mut slices, count),
                Err(LinkError::Io(Errno::INTR)) => {}
                Err(LinkError::Io(Errno::AGAIN)) => self.wait(&self.write, PollFlags::OUT, deadline)?,
                Err(LinkError::Io(Errno::PIPE | Errno::CONNRESET)) => return Err(LinkError::Gone),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes as much as there is room for, at least a byte.
    fn write_some(&self, slices: &[IoSlice<'_>], deadline: Option<Instant>) -> Result<usize, LinkError> {
        let fd = &self.write.fd;
        count(SystemCall::Send);
        if self.write.kind == Kind::Socket {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            return rustix::net::sendmsg(fd, slices, &mut Default::default(), flags).map_err(LinkError::Io);
        }
        if self.nowait.load(Ordering::Relaxed) {
            match pwritev2(fd, slices, CURRENT_OFFSET, ReadWriteFlags::NOWAIT) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => self.nowait.store(false, Ordering::Relaxed),
                result => return result.map_err(LinkError::Io),
            }
        }
        // A pipe that polls as writable takes this much without blocking.
        self.wait(&self.write, PollFlags::OUT, deadline)?;
        let mut room = PIPE_ATOMIC_BYTES;
        let mut front = slices.iter().map(|slice| {
            let len = slice.len().min(room);
            room -= len;
            IoSlice::new(&slice[..len])
        });
        let front = [front.next(), front.next()].map(|slice| slice.unwrap_or(IoSlice::new(&[])));
        writev(fd, &front).map_err(LinkError::Io)
    }

    /// Waits until `half` is ready, the link is closed or the deadline has passed.
    fn wait(&self, half: &Half, flags: PollFlags, deadline: Option<Instant>) -> Result<(), LinkError> {
        loop {
            let mut fds = [PollFd::new(&half.fd, flags), PollFd::new(&self.wake, PollFlags::IN)];
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            // More seconds than fit are as good as for ever.
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            count(SystemCall::Poll);
            match poll(&mut fds, left.as_ref()) {
                Ok(0) => return Err(LinkError::TimedOut),
                // Ready comes before closed, so that what has arrived can be read after closing.
                Ok(_) if !fds[0].revents().is_empty() => return Ok(()),
                Ok(_) => return Err(LinkError::Closed),
                Err(Errno::INTR) => {}
                Err(error) => return Err(LinkError::Io(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::thread;
    use std::time::Duration;

    fn pipe_link() -> (Link, std::io::PipeReader, std::io::PipeWriter) {
        let (theirs_in, ours_out) = std::io::pipe().unwrap();
        let (ours_in, theirs_out) = std::io::pipe().unwrap();
        let link = Link::new(Transport::from_fds(ours_in.into(), ours_out.into()).unwrap()).unwrap();
        (link, theirs_in, theirs_out)
    }

    /// A message longer than a pipe holds arrives whole, with and without the kernel's `RWF_NOWAIT`.
    #[test]
    fn long_messages_pass_through_pipes() {
        for nowait in [true, false] {
            let (link, mut theirs, _out) = pipe_link();
            link.nowait.store(nowait, Ordering::Relaxed);
            let payload: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
            let (header, expected) = ([7; 32], payload.clone());
            let writer = thread::spawn(move || link.write(&header, &payload, None).unwrap());
            let mut received = Vec::new();
            theirs.read_to_end(&mut received).unwrap();
            writer.join().unwrap();
            assert_eq!(received[..32], [7; 32]);
            assert!(received[32..] == expected);
        }
    }

    /// A writer that a full pipe or socket holds up is let go by closing, and by its deadline.
    #[test]
    fn closing_and_deadlines_free_a_writer() {
        let sockets = || {
            let (one, other) = Transport::pair().unwrap();
            (Link::new(one).unwrap(), Box::new(other) as Box<dyn std::any::Any>)
        };
        let pipes = |nowait| {
            let (link, reader, writer) = pipe_link();
            link.nowait.store(nowait, Ordering::Relaxed);
            (link, Box::new((reader, writer)) as Box<dyn std::any::Any>)
        };
        for (link, peer) in [sockets(), pipes(true), pipes(false)] {
            let payload = vec![0; 10 << 20];
            let soon = Instant::now() + Duration::from_millis(20);
            assert!(matches!(link.write(&payload, &payload, Some(soon)), Err(LinkError::TimedOut)));
            let link = Arc::new(link);
            let writer = {
                let link = Arc::clone(&link);
                thread::spawn(move || link.write(&payload, &payload, None))
            };
            thread::sleep(Duration::from_millis(20));
            link.close();
            assert!(writer.join().unwrap().is_err());
            drop(peer);
        }
    }

    /// A reader that waits is let go by closing, and reads what had arrived before.
    #[test]
    fn closing_frees_a_reader() {
        let (link, _in, mut out) = pipe_link();
        let (one, other) = Transport::pair().unwrap();
        let (one, other) = (Link::new(one).unwrap(), Link::new(other).unwrap());
        std::io::Write::write_all(&mut out, b"arrived").unwrap();
        other.write(b"arrived", b"", None).unwrap();
        for link in [link, one] {
            let mut buffer = [0; 64];
            assert_eq!(link.read(&mut buffer, None).unwrap(), 7);
            let link = Arc::new(link);
            let reader = {
                let link = Arc::clone(&link);
                thread::spawn(move || matches!(link.read(&mut [0; 64], None), Ok(0) | Err(LinkError::Closed)))
            };
            thread::sleep(Duration::from_millis(20));
            link.close();
            assert!(reader.join().unwrap());
        }
    }

    /// Descriptors that cannot carry a connection are refused, and good ones become close-on-exec.
    #[test]
    fn descriptors_are_checked() {
        let (reader, writer) = std::io::pipe().unwrap();
        assert!(Transport::from_fds(writer.try_clone().unwrap().into(), writer.into()).is_err());
        assert!(Transport::from_fds(reader.try_clone().unwrap().into(), reader.try_clone().unwrap().into()).is_err());
        assert!(Transport::from_socket(reader.into()).is_err());
        let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert!(Transport::from_socket(datagram.into()).is_err());
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        fcntl_setfd(&socket, FdFlags::empty()).unwrap();
        let transport = Transport::from_socket(socket.into()).unwrap();
        assert_eq!(fcntl_getfd(&transport.read.fd).unwrap(), FdFlags::CLOEXEC);
    }
}
