//! What the threads of an endpoint share: the calls that wait for results, the turn to write, and how it all ends.
//!
//! A session ends once, in the reader thread, whoever causes it: `close` only says why and wakes the reader, which
//! first delivers what has arrived. Then, in this order: new calls fail, the descriptors are closed, pending calls
//! complete with the reason, and those who wait for the end are told.

use crate::descriptors::Descriptors;
use crate::endpoint::{Handler, Options};
use crate::error::shortened;
use crate::pool::Pool;
use crate::reading::READER;
use crate::ring::{Drive, Ring};
use crate::transport::{Link, LinkError};
use crate::{CallError, Completer, Disconnected, Pending};
use farlink_addr::ExecutorAddr;
use farlink_wire::frame::{HEADER_BYTES, Header, MAX_FRAME_BYTES, Opcode, RESULT_ERROR, RESULT_VALUE};
use farlink_wire::functions::RING_TAG;
use farlink_wire::sps::{SpsError, to_bytes};
use rustc_hash::FxHashMap;
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

type CallResult = Result<Vec<u8>, CallError>;

/// The shared state of an endpoint.
pub(crate) struct Session {
    pub(crate) pool: Pool,
    state: Mutex<State>,
    /// The phase has changed, or there is a ring.
    changed: Condvar,
    turn: Mutex<Turn>,
    turn_free: Condvar,
    /// Descriptors that the peer has sent.
    pub(crate) descriptors: Descriptors,
    /// Tag of the next descriptor that this end sends.
    next_descriptor: Mutex<u64>,
    /// Whether the peer understands Results that carry an error.
    out_of_band_results: bool,
    /// How long a call may wait for room.
    write_timeout: Duration,
    /// The way for small messages past the socket, if there is one.
    ring: OnceLock<Ring>,
    /// Serves the peer's calls. None when the session has ended.
    handler: Mutex<Option<Arc<dyn Handler>>>,
    this: Weak<Session>,
}

struct State {
    phase: Phase,
    next_sequence: u64,
    pending: FxHashMap<u64, Completer<CallResult>>,
    /// What the reader does last.
    at_the_end: Option<AtTheEnd>,
}

type AtTheEnd = Box<dyn FnOnce(Disconnected) + Send>;

enum Phase {
    Open(Arc<Link>),
    /// This end is telling the peer that the session ends, and then closes.
    HangingUp(Arc<Link>),
    /// A write has failed. The reader is reading what the peer had sent before; calls wait for what it finds.
    PeerGone(Arc<Link>, Disconnected),
    /// This end has closed. The reader is reading what had arrived.
    Closed(Disconnected),
    /// Nothing is left but the reason. The flag says whether all pending calls have been completed.
    Ended(Disconnected, bool),
}

impl Phase {
    /// Why calls fail from now on.
    fn reason(&self) -> Option<Disconnected> {
        match self {
            Self::Open(_) | Self::PeerGone(..) => None,
            Self::HangingUp(_) => Some(Disconnected::Local),
            Self::Closed(reason) | Self::Ended(reason, _) => Some(reason.clone()),
        }
    }
}

/// Who may write to the link.
enum Turn {
    Free(Arc<Link>),
    Taken,
    /// Nobody, ever again.
    Over,
}

impl Session {
    pub(crate) fn new(link: &Arc<Link>, handler: Arc<dyn Handler>, options: &Options) -> Arc<Self> {
        let phase = Phase::Open(Arc::clone(link));
        let state = State { phase, next_sequence: 0, pending: FxHashMap::default(), at_the_end: None };
        Arc::new_cyclic(|this| Self {
            pool: Pool::new(options.max_concurrent_calls),
            state: Mutex::new(state),
            changed: Condvar::new(),
            turn: Mutex::new(Turn::Free(Arc::clone(link))),
            turn_free: Condvar::new(),
            descriptors: Descriptors::default(),
            next_descriptor: Mutex::new(1),
            out_of_band_results: options.out_of_band_results,
            write_timeout: options.write_timeout,
            ring: OnceLock::new(),
            handler: Mutex::new(Some(handler)),
            this: this.clone(),
        })
    }

    /// Returns the ring, if there is one.
    pub(crate) fn ring(&self) -> Option<&Ring> {
        self.ring.get()
    }

    /// Puts the ring to use, unless there is one.
    pub(crate) fn set_ring(&self, ring: Ring) -> Result<(), Ring> {
        self.ring.set(ring)?;
        drop(self.lock());
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until there is a ring. `None` at the end.
    pub(crate) fn wait_ring(&self) -> Option<&Ring> {
        let mut state = self.lock();
        while self.ring().is_none() && !matches!(state.phase, Phase::Ended(..)) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.ring()
    }

    /// Returns what a thread that serves calls needs. `None` when the session has ended.
    pub(crate) fn server_parts(&self) -> Option<(Arc<Self>, Arc<dyn Handler>)> {
        let handler = self.handler.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.this.upgrade().zip(handler)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a call of the peer.
    pub(crate) fn call(self: &Arc<Self>, function: ExecutorAddr, args: &[u8]) -> Pending<CallResult> {
        let bytes = (args.len() as u64).saturating_add(HEADER_BYTES as u64);
        if bytes > MAX_FRAME_BYTES {
            return Pending::ready(Err(CallError::TooLarge { bytes }));
        }
        let (sequence, pending) = {
            let mut state = self.lock();
            if let Some(reason) = state.phase.reason() {
                return Pending::ready(Err(reason.into()));
            }
            let sequence = state.next_sequence;
            state.next_sequence += 1;
            let (completer, pending) = Pending::channel(|| Err(Disconnected::Local.into()));
            state.pending.insert(sequence, completer);
            (sequence, pending)
        };
        // The end of the session completes the call if this fails.
        let header = Header { opcode: Opcode::Call, sequence, tag: function, payload_bytes: args.len() as u64 };
        if self.send_by_ring(&header.to_bytes(), args) {
            return pending.driven_by(Arc::clone(self) as Arc<dyn Drive>);
        }
        self.send(header, args, Instant::now().checked_add(self.write_timeout));
        pending
    }

    /// Sends a descriptor; gives the tag that calls name it by.
    pub(crate) fn send_descriptor(&self, descriptor: BorrowedFd<'_>) -> Result<u64, CallError> {
        let mut next = self.next_descriptor.lock().unwrap_or_else(PoisonError::into_inner);
        // While the next one waits: they go out in the order of their tags.
        self.send_descriptor_as(*next, descriptor)?;
        *next += 1;
        Ok(*next - 1)
    }

    /// Sends the memory of a ring to the executor and puts it to use. Without one, all goes over the socket.
    pub(crate) fn offer_ring(&self, (ring, memory): (Ring, OwnedFd)) {
        if self.send_descriptor_as(RING_TAG, memory.as_fd()).is_ok() {
            // There is none yet.
            let _ = self.set_ring(ring);
        }
    }

    pub(crate) fn send_descriptor_as(&self, tag: u64, descriptor: BorrowedFd<'_>) -> Result<(), CallError> {
        if let Some(reason) = self.lock().phase.reason() {
            return Err(reason.into());
        }
        let header = Header { tag: ExecutorAddr::new(tag), ..bare(Opcode::Descriptor) };
        let Some(link) = self.take_turn(None) else { return Err(Disconnected::Local.into()) };
        let written = link.write_with_descriptor(&header.to_bytes(), descriptor);
        let result = match written {
            Ok(()) => Ok(()),
            Err(LinkError::Io(Errno::OPNOTSUPP)) => Err(CallError::Missing("a connection that passes descriptors")),
            Err(error) => Err(self.write_failed(error).into()),
        };
        self.give_turn(Turn::Free(link));
        result
    }

    /// Completes a call with what the peer returned. Fails if there is no such call.
    pub(crate) fn complete(&self, sequence: u64, result: CallResult) -> Result<(), Disconnected> {
        let completer = self.lock().pending.remove(&sequence);
        match completer {
            Some(completer) => completer.complete_safely(result),
            None => {
                return Err(Disconnected::Protocol(format!(
                    "a Result message for call {sequence}, which is not pending"
                )));
            }
        }
        Ok(())
    }

    /// Answers a call of the peer's.
    pub(crate) fn answer(&self, sequence: u64, result: Result<Vec<u8>, String>) {
        let result = result.and_then(|value| {
            let bytes = value.len() as u64 + HEADER_BYTES as u64;
            if bytes > MAX_FRAME_BYTES {
                return Err(CallError::TooLarge { bytes }.to_string());
            }
            Ok(value)
        });
        let (kind, payload) = match result {
            Ok(value) => (RESULT_VALUE, value),
            Err(text) if self.out_of_band_results => (RESULT_ERROR, to_bytes(shortened(&text))),
            Err(_) => (RESULT_VALUE, Vec::new()),
        };
        let tag = ExecutorAddr::new(kind);
        let header = Header { opcode: Opcode::Result, sequence, tag, payload_bytes: payload.len() as u64 };
        if !self.send_by_ring(&header.to_bytes(), &payload) {
            self.send(header, &payload, None);
        }
    }

    /// Calls the peer's reader to the ring.
    pub(crate) fn ring_bell(&self) {
        self.send(bare(Opcode::Doorbell), &[], None);
    }

    /// Lets a thread that reads the ring while it waits for a result look whether that has come over the socket.
    pub(crate) fn nudge_ring(&self) {
        if let Some(ring) = self.ring() {
            ring.nudge();
        }
    }

    /// Tells the peer that the session ends, if it takes the message before the deadline, and closes this end.
    pub(crate) fn hang_up(&self, reason: Result<(), String>, deadline: Instant) {
        {
            let mut state = self.lock();
            match &state.phase {
                // From here on the peer's end of the connection is the answer, and no reason of its own.
                Phase::Open(link) => state.phase = Phase::HangingUp(Arc::clone(link)),
                Phase::PeerGone(..) => {}
                Phase::HangingUp(_) | Phase::Closed(_) | Phase::Ended(..) => return,
            }
        }
        let payload = to_bytes(&SpsError(reason.map_err(|text| shortened(&text).to_owned())));
        let header = Header { payload_bytes: payload.len() as u64, ..bare(Opcode::Hangup) };
        self.send(header, &payload, Some(deadline));
        self.close(Disconnected::Local);
    }

    /// Sends a message. If that fails the session is about to end.
    fn send(&self, header: Header, payload: &[u8], deadline: Option<Instant>) {
        let Some(link) = self.take_turn(deadline) else {
            // Whoever writes waits for a peer that does not read. What is not sent is not to be waited for.
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                self.write_failed(LinkError::TimedOut);
            }
            return;
        };
        if let Err(error) = link.write(&header.to_bytes(), payload, deadline) {
            self.write_failed(error);
        }
        // Only now: nobody may write behind a message that was cut off.
        self.give_turn(Turn::Free(link));
    }

    /// Takes note that a write has failed; gives what that means for the session.
    fn write_failed(&self, error: LinkError) -> Disconnected {
        let reason = match error {
            // Who closes says why.
            LinkError::Closed => return self.lock().phase.reason().unwrap_or(Disconnected::Local),
            LinkError::Gone => Disconnected::Eof,
            LinkError::TimedOut => Disconnected::Io(Arc::new(std::io::ErrorKind::TimedOut.into())),
            LinkError::Io(error) => Disconnected::Io(Arc::new(error.into())),
        };
        self.peer_gone(reason.clone());
        reason
    }

    /// Waits until nobody else writes. `None` if that does not come before the deadline, or never again.
    fn take_turn(&self, deadline: Option<Instant>) -> Option<Arc<Link>> {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match std::mem::replace(&mut *turn, Turn::Taken) {
                Turn::Free(link) => return Some(link),
                Turn::Taken => {}
                Turn::Over => {
                    *turn = Turn::Over;
                    return None;
                }
            }
            let Some(deadline) = deadline else {
                turn = self.turn_free.wait(turn).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            turn = self.turn_free.wait_timeout(turn, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn give_turn(&self, next: Turn) {
        let over = matches!(next, Turn::Over);
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = next;
        if over { self.turn_free.notify_all() } else { self.turn_free.notify_one() }
    }

    /// Takes note that a write has failed. What the peer sent before is still read, and says more.
    fn peer_gone(&self, reason: Disconnected) {
        let mut state = self.lock();
        if let Phase::Open(link) = &state.phase {
            let link = Arc::clone(link);
            link.close();
            state.phase = Phase::PeerGone(link, reason);
        }
    }

    /// Returns the numbers of the descriptors that are read from and written to, as long as the session has them.
    pub(crate) fn descriptor_numbers(&self) -> Vec<RawFd> {
        match &self.lock().phase {
            Phase::Open(link) | Phase::PeerGone(link, _) | Phase::HangingUp(link) => link.descriptor_numbers().to_vec(),
            Phase::Closed(_) | Phase::Ended(..) => Vec::new(),
        }
    }

    /// Closes this end for `reason`.
    pub(crate) fn close(&self, reason: Disconnected) {
        let mut state = self.lock();
        let (link, reason) = match &state.phase {
            Phase::Open(link) | Phase::PeerGone(link, _) => (link, reason),
            Phase::HangingUp(link) => (link, Disconnected::Local),
            Phase::Closed(_) | Phase::Ended(..) => return,
        };
        link.close();
        state.phase = Phase::Closed(reason);
        if let Some(ring) = self.ring() {
            ring.close_outgoing();
        }
    }

    /// Ends the session: the reader's last act. `found` is why it stopped reading, and counts unless another
    /// reason has been given before. The reader has given up its hold on the link.
    pub(crate) fn end(&self, link: Arc<Link>, found: Disconnected) {
        link.close();
        drop(link);
        let (reason, pending) = {
            let mut state = self.lock();
            let reason = match &state.phase {
                Phase::PeerGone(_, reason) if matches!(found, Disconnected::Eof) => reason.clone(),
                other => other.reason().unwrap_or(found),
            };
            state.phase = Phase::Ended(reason.clone(), false);
            (reason, std::mem::take(&mut state.pending))
        };
        // Whoever is writing has been woken; after that nobody holds the link.
        drop(self.take_turn(None));
        self.give_turn(Turn::Over);
        self.pool.close();
        self.descriptors.end();
        for completer in pending.into_values() {
            completer.complete_safely(Err(reason.clone().into()));
        }
        let last = {
            let mut state = self.lock();
            state.phase = Phase::Ended(reason.clone(), true);
            state.at_the_end.take()
        };
        self.changed.notify_all();
        // It may hold an endpoint of this session.
        let handler = self.handler.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(handler);
        if let Some(last) = last {
            last(reason);
        }
    }

    /// Has the reader call `f` when the session has ended, or another thread if it has.
    pub(crate) fn when_disconnected(&self, f: AtTheEnd) {
        let reason = {
            let mut state = self.lock();
            match &state.phase {
                Phase::Ended(reason, true) => reason.clone(),
                _ => {
                    state.at_the_end = Some(f);
                    return;
                }
            }
        };
        // A thread that cannot be made drops it: that is for the function's own drop to mend.
        let started = thread::Builder::new().name(READER.to_owned()).spawn(move || f(reason));
        drop(started);
    }

    /// Returns why the session has ended or is about to.
    pub(crate) fn disconnected(&self) -> Option<Disconnected> {
        self.lock().phase.reason()
    }

    /// Waits until the session has ended.
    pub(crate) fn wait_disconnected(&self) -> Disconnected {
        let mut state = self.lock();
        loop {
            if let Phase::Ended(reason, true) = &state.phase {
                return reason.clone();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Runs calls of the peer's until there are none for a while. The body of a worker thread.
    pub(crate) fn work(&self, handler: &dyn Handler) {
        while let Some(job) = self.pool.next_job() {
            let sequence = job.sequence;
            let result = job.run(handler);
            self.pool.finish_job();
            self.answer(sequence, result);
        }
    }

    /// Answers the calls that are refused. The body of the refuser thread.
    pub(crate) fn refuse(&self) {
        while let Some(sequence) = self.pool.next_refused() {
            self.answer(sequence, Err("too many calls at once".to_owned()));
        }
    }
}

/// Returns the header of a message about nothing in particular, without a payload.
fn bare(opcode: Opcode) -> Header {
    Header { opcode, sequence: 0, tag: ExecutorAddr::NULL, payload_bytes: 0 }
}
