//! The shared ring: small messages between farlink's own ends, past the socket.
//!
//! Two queues in shared memory, one for each direction. The connection stays: it carries descriptors, messages that are
//! too long or find no room, and it tells at once when the peer is gone.
//!
//! Who waits for a result reads the queue itself meanwhile ([`Session::drive`]): it delivers what it finds, to other
//! threads too, until its own result is there. In the executor one thread more reads, and runs the calls it finds itself
//! ([`Session::serve_ring`]). While a thread runs a call, or nobody waits, nobody reads; then the writer rings the bell:
//! it sends a Doorbell message over the socket, whose reading thread delivers what is in the queue. So calls run beside
//! each other however long one takes, nothing is handed from thread to thread as long as calls come one after the other,
//! and no thread has to be kept in reserve.

mod primitive;
mod queue;
mod spin;
mod sys;
#[cfg(test)]
mod tests;

use crate::Disconnected;
use crate::endpoint::Handler;
use crate::pool::Job;
use crate::reading::Role;
use crate::session::Session;
use crate::transport::Transport;
use farlink_wire::frame::{HEADER_BYTES, Header, Opcode};
use queue::{Corrupt, Inbound, Memory, Message, Outbound, Sent};
use rustix::io::Errno;
use spin::Spin;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};
use sys::{Mapping, WORDS};

type Attendant<'a> = queue::Attendant<'a, WORDS>;

/// Longest message in the ring, in bytes, with its header.
pub(crate) const MAX_RING_BYTES: usize = Memory::<WORDS>::MAX_BYTES;

/// One end of a ring.
#[derive(Debug)]
pub(crate) struct Ring {
    mapping: Mapping,
    role: Role,
    inbound: Inbound,
    outbound: Outbound,
    spin: Spin,
    server: Server,
    /// Whether this end has closed: nothing is sent any more.
    sends_nothing: AtomicBool,
}

/// The thread that serves calls at this end of the ring, if there is one.
#[derive(Debug, Default)]
struct Server {
    thread: OnceLock<Thread>,
    /// Whether it waits for the attendant to leave.
    waits: AtomicBool,
}

impl Transport {
    /// Makes a ring for the session to come, in memory of which an executor that is started with the connection inherits the
    /// descriptor that this gives: so it is there from the first call on. If the executor does not take it, there is no ring.
    ///
    /// # Errors
    ///
    /// Fails if the system has no such memory.
    pub fn offer_ring(&mut self) -> io::Result<OwnedFd> {
        let (ring, memory) = Ring::create()?;
        self.ring = Some(ring);
        Ok(memory)
    }

    /// Takes the memory of a ring that came with the connection. The executor's side of [`Self::offer_ring`].
    ///
    /// # Errors
    ///
    /// Fails if it is not the memory of a ring.
    pub fn take_ring(&mut self, memory: &OwnedFd) -> io::Result<()> {
        self.ring = Some(Ring::open(memory)?);
        Ok(())
    }
}

impl Ring {
    /// Makes a ring; gives its controller's end, and the memory for the executor.
    pub(crate) fn create() -> Result<(Self, OwnedFd), Errno> {
        let (mapping, object) = Mapping::create()?;
        Ok((Self::new(mapping, Role::Controller), object))
    }

    /// Returns the executor's end of the ring whose memory its controller has made. The thread that serves calls comes, so the
    /// controller need not ring for it.
    pub(crate) fn open(object: &OwnedFd) -> Result<Self, Errno> {
        let ring = Self::new(Mapping::open(object)?, Role::Executor);
        ring.incoming().expect_reader();
        ring.outgoing().open();
        Ok(ring)
    }

    /// Whether the peer has the memory too. The controller cannot know that before: whatever carries the connection may have
    /// let the descriptor fall.
    pub(crate) fn is_shared(&self) -> bool {
        self.role == Role::Executor || self.incoming().is_open()
    }

    fn new(mapping: Mapping, role: Role) -> Self {
        let (inbound, outbound) = (Inbound::default(), Outbound::default());
        let (spin, server, sends_nothing) = (Spin::default(), Server::default(), AtomicBool::new(false));
        Self { mapping, role, inbound, outbound, spin, server, sends_nothing }
    }

    /// Returns the queue that this end reads.
    fn incoming(&self) -> &Memory<WORDS> {
        let queues = self.mapping.queues();
        if self.role == Role::Controller { &queues.to_controller } else { &queues.to_executor }
    }

    /// Returns the queue that this end writes.
    fn outgoing(&self) -> &Memory<WORDS> {
        let queues = self.mapping.queues();
        if self.role == Role::Controller { &queues.to_executor } else { &queues.to_controller }
    }

    fn attend(&self) -> Option<Attendant<'_>> {
        self.inbound.attend(self.incoming())
    }

    /// Makes way for another thread; returns whether a message may wait for the calling thread.
    fn leave(&self, attendant: Attendant<'_>) -> bool {
        let has_message = attendant.leave();
        // The fence in there stands before this: either this thread sees the server waiting or that sees the way free.
        if self.server.waits.load(Ordering::Relaxed) && self.server.waits.swap(false, Ordering::Relaxed) {
            self.server.wake();
        }
        has_message
    }

    /// Waits until there is a message, the ring is closed, `stop` is true or the deadline has passed. May return without
    /// cause.
    fn wait(&self, attendant: &Attendant<'_>, stop: &dyn Fn() -> bool, deadline: Option<Instant>) {
        let peers_processor = self.incoming().writers_processor();
        let is_ready = || attendant.has_message() || self.inbound.is_closed();
        self.spin.wait(peers_processor, is_ready, stop, |stop| attendant.sleep(stop, time_left(deadline)));
    }

    /// Lets nothing out any more: this end has closed.
    pub(crate) fn close_outgoing(&self) {
        self.sends_nothing.store(true, Ordering::SeqCst);
    }

    /// Lets the thread that waits look whether what it waits for has come another way.
    pub(crate) fn nudge(&self) {
        self.inbound.nudge(self.incoming());
    }
}

impl Server {
    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}

fn time_left(deadline: Option<Instant>) -> Option<Duration> {
    deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
}

/// Gives a thread that waits something to do meanwhile.
pub(crate) trait Drive: Send + Sync {
    /// Works until the deadline, for as long as this thread can be of use and `is_done` is false.
    fn drive(&self, is_done: &dyn Fn() -> bool, deadline: Option<Instant>);
}

impl Drive for Session {
    /// Reads the ring and delivers what comes, unless another thread does.
    fn drive(&self, is_done: &dyn Fn() -> bool, deadline: Option<Instant>) {
        let Some(ring) = self.ring() else { return };
        let Some(mut attendant) = ring.attend() else { return };
        while !is_done() && !ring.inbound.is_closed() {
            match attendant.receive() {
                Ok(None) => {
                    ring.wait(&attendant, is_done, deadline);
                    if !attendant.has_message() && time_left(deadline).is_some_and(|left| left.is_zero()) {
                        break;
                    }
                }
                received => {
                    if self.deliver_received(received).is_none() {
                        return;
                    }
                }
            }
        }
        self.leave_ring(ring, attendant);
    }
}

impl Session {
    /// Puts a message into the ring. Returns whether that was possible; if not, it goes over the socket.
    pub(crate) fn send_by_ring(&self, header: &[u8; HEADER_BYTES], payload: &[u8]) -> bool {
        let fits = HEADER_BYTES + payload.len() <= MAX_RING_BYTES;
        let is_usable = |ring: &&Ring| fits && ring.is_shared() && !ring.sends_nothing.load(Ordering::SeqCst);
        let Some(ring) = self.ring().filter(is_usable) else { return false };
        match ring.outbound.send(ring.outgoing(), header, payload, spin::processor()) {
            Ok(Sent::Done) => true,
            Ok(Sent::NobodyReads) => {
                self.ring_bell();
                true
            }
            Ok(Sent::NoRoom) => false,
            Err(corrupt) => {
                self.close(corrupt.into());
                true
            }
        }
    }

    /// Delivers a message of the ring. `None` if there was none, or if it has been the end of the session.
    fn deliver_received(&self, received: Result<Option<Message>, Corrupt>) -> Option<()> {
        let deliver = |(header, payload): Message| self.deliver(ring_header(&header)?, payload);
        let delivered = received.map_err(Disconnected::from).and_then(|message| message.map(deliver).transpose());
        delivered.unwrap_or_else(|reason| {
            self.close(reason);
            None
        })
    }

    /// Makes way for another thread, after delivering what has come meanwhile.
    fn leave_ring<'a>(&self, ring: &'a Ring, mut attendant: Attendant<'a>) {
        while ring.leave(attendant) {
            match ring.attend() {
                Some(again) => attendant = again,
                // Who is in its place sees to the rest.
                None => return,
            }
            while self.deliver_received(attendant.receive()).is_some() {}
            if self.disconnected().is_some() {
                return;
            }
        }
    }

    /// Delivers what is in the ring, if nobody else reads it: the socket's reader has been called.
    pub(crate) fn answer_bell(&self) -> Result<(), Disconnected> {
        let ring = self.ring().ok_or_else(|| Disconnected::Protocol("a Doorbell message without a ring".to_owned()))?;
        if let Some(mut attendant) = ring.attend() {
            while self.deliver_received(attendant.receive()).is_some() {}
            self.leave_ring(ring, attendant);
        }
        Ok(())
    }

    /// Ends the use of the ring: delivers what is in it, and lets nobody read it again. The session's reader does it
    /// before it ends the session.
    pub(crate) fn end_ring(&self) {
        let Some(ring) = self.ring() else { return };
        let mut attendant = ring.inbound.close(ring.incoming());
        ring.server.wake();
        for _ in 0..Memory::<WORDS>::MAX_MESSAGES {
            if self.deliver_received(attendant.receive()).is_none() {
                return;
            }
        }
    }

    /// Serves the calls that come through the ring as soon as there is one, one after the other, until it is closed. The body
    /// of a thread.
    pub(crate) fn serve_ring(&self, handler: &dyn Handler) {
        let Some(ring) = self.wait_ring() else { return };
        let _ = ring.server.thread.set(thread::current());
        while let Some(attendant) = ring.attend_when_free() {
            let Some(job) = self.next_call(ring, attendant, handler) else { return };
            let sequence = job.sequence;
            let result = job.run(handler);
            self.pool.finish_job();
            self.answer(sequence, result);
        }
    }

    /// Reads the ring until there is a call for this thread to run, and makes way for another. Calls that are brief it runs
    /// before that. `None` at the end.
    fn next_call(&self, ring: &Ring, mut attendant: Attendant<'_>, handler: &dyn Handler) -> Option<Job> {
        while !ring.inbound.is_closed() {
            let received = attendant.receive();
            let call = received.as_ref().ok().and_then(Option::as_ref).and_then(call_header);
            match (received, call) {
                (Ok(None), _) => ring.wait(&attendant, &|| false, None),
                (Ok(Some((_, args))), Some(call)) if handler.is_brief(call.tag) && self.pool.begin_brief_job() => {
                    let result = Job::new(call, args).run(handler);
                    self.pool.finish_brief_job();
                    self.answer(call.sequence, result);
                }
                (Ok(Some((_, args))), Some(call)) if self.pool.begin_job() => {
                    self.leave_ring(ring, attendant);
                    return Some(Job::new(call, args));
                }
                (received, _) => self.deliver_received(received)?,
            }
        }
        None
    }
}

impl Ring {
    /// Makes the calling thread, the server, the attendant as soon as nobody else is. `None` when the ring is closed.
    fn attend_when_free(&self) -> Option<Attendant<'_>> {
        loop {
            if let Some(attendant) = self.attend() {
                return Some(attendant);
            }
            self.server.waits.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if let Some(attendant) = self.attend() {
                self.server.waits.store(false, Ordering::Relaxed);
                return Some(attendant);
            }
            if self.inbound.is_closed() {
                return None;
            }
            thread::park();
        }
    }
}

/// Returns the header of a message of the ring, if it is a call.
fn call_header((header, _): &Message) -> Option<Header> {
    ring_header(header).ok().filter(|header| header.opcode == Opcode::Call)
}

/// Reads the header of a message of the ring. Only calls and results are there.
fn ring_header(bytes: &[u8; HEADER_BYTES]) -> Result<Header, Disconnected> {
    let header = Header::parse(bytes)?;
    match header.opcode {
        Opcode::Call | Opcode::Result => Ok(header),
        other => Err(Disconnected::Protocol(format!("a {other:?} message in the shared ring"))),
    }
}

impl From<Corrupt> for Disconnected {
    fn from(Corrupt(text): Corrupt) -> Self {
        Self::Protocol(format!("the shared ring: {text}"))
    }
}
