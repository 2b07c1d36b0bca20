//! One end of a connection.
//!
//! Both ends are alike after the Setup message. Each has one thread that reads and gives results to those who wait
//! for them, and threads made on demand that serve the peer's calls. The reader runs no handler and writes nothing,
//! so a peer that is slow to read, or a handler that calls back, holds nothing else up.
//!
//! The threads share a `Session`, not the endpoint: dropping the last clone of an [`Endpoint`] closes it.

use crate::frames::{FrameEnd, FrameReader};
use crate::reading::{ReaderThread, Reading, Role, hangup_reason};
use crate::ring::Ring;
use crate::session::Session;
use crate::transport::{Link, LinkError, Transport};
use crate::{CallError, Caller, Disconnected, Pending, SetupError};
use farlink_addr::ExecutorAddr;
use farlink_wire::frame::{HEADER_BYTES, Header, MAX_FRAME_BYTES, Opcode};
use farlink_wire::functions::{RING_KEY, RING_VERSION, VERSION_KEY};
use farlink_wire::setup::ExecutorInfo;
use farlink_wire::sps::{from_bytes, to_bytes};
use std::collections::HashSet;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fmt, io};

/// How long hanging up waits for a peer that does not read.
const HANGUP_PATIENCE: Duration = Duration::from_secs(1);

/// Serves the calls of the peer.
pub trait Handler: Send + Sync + 'static {
    /// Serves a call: `function` is the address that was called, as the peer gave it.
    ///
    /// Runs on a thread of its own, beside others, and may itself call the peer. A panic is an error like any other
    /// to the peer.
    ///
    /// # Errors
    ///
    /// The text of an out-of-band error: the call could not be made or understood. An operation that failed says so
    /// in its result.
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Result<Vec<u8>, String>;

    /// Whether a call of `function` neither waits for another call, in either direction, nor runs anything that might, as
    /// long as no function has been called of which that is not said.
    ///
    /// The first calls through the shared ring are run by the thread that reads it, one after the other, if they are like
    /// that: an executor that starts has one thread less to make for each that comes while another is served.
    fn is_brief(&self, function: ExecutorAddr) -> bool {
        let _ = function;
        false
    }
}

/// What can be chosen about an endpoint.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long to wait for the peer in [`connect`] and [`accept`]. 30 s unless set.
    pub setup_timeout: Duration,
    /// How long a call may wait for room in the connection, which ends if that does not come. 5 minutes unless set.
    pub write_timeout: Duration,
    /// Calls of the peer's that may run at once, each on a thread. One above that gets an out-of-band error. 1024
    /// unless set.
    pub max_concurrent_calls: usize,
    /// Whether the peer is known to understand Results that carry an out-of-band error, as farlink does and LLVM 19
    /// and 22 do not; these get an empty value instead. Not unless set, but [`connect`] recognizes farlink's
    /// executor by itself.
    pub out_of_band_results: bool,
    /// Whether a controller shares a ring in memory with an executor that offers it, for small messages, if the connection
    /// passes descriptors. So unless unset.
    pub shared_ring: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            setup_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(300),
            max_concurrent_calls: 1024,
            out_of_band_results: false,
            shared_ring: true,
        }
    }
}

/// Opens a session with the executor at the other end, which must introduce itself. The controller's side.
///
/// # Errors
///
/// Fails if the executor does not introduce itself in time, or not as the protocol demands.
pub fn connect(
    mut transport: Transport,
    handler: Arc<dyn Handler>,
    options: Options,
) -> Result<(Endpoint, ExecutorInfo), SetupError> {
    let failed = |error: io::Error| SetupError::Disconnected(Disconnected::Io(Arc::new(error)));
    // What can be done before the executor has introduced itself is done while it starts.
    let reader = ReaderThread::start().map_err(failed)?;
    let inherited = transport.ring.take();
    let can_send = options.shared_ring && inherited.is_none() && transport.passes_descriptors();
    let ring = can_send.then(|| Ring::create().ok()).flatten();
    let link = Arc::new(Link::new(transport).map_err(failed)?);
    let mut frames = FrameReader::new(Arc::clone(&link), Instant::now().checked_add(options.setup_timeout));
    let info = match frames.next() {
        Ok((header, payload)) => read_setup(header, &payload)?,
        Err(FrameEnd::Invalid(error)) => return Err(SetupError::Invalid(error.to_string())),
        Err(FrameEnd::Ended(reason)) => return Err(reason.into()),
        Err(FrameEnd::TimedOut) => return Err(SetupError::TimedOut(options.setup_timeout)),
    };
    frames.set_deadline(None);
    let out_of_band_results = options.out_of_band_results || info.value(VERSION_KEY).is_some();
    let session = Session::new(&link, handler, &Options { out_of_band_results, ..options });
    let offers_ring = offers_ring(&info);
    if let Some(ring) = inherited.filter(|ring| offers_ring && ring.is_shared()) {
        // There is none yet.
        let _ = session.set_ring(ring);
    } else if let Some(ring) = ring.filter(|_| offers_ring) {
        session.offer_ring(ring);
    }
    reader.run(Reading::new(frames, Role::Controller, &session, offers_ring, link));
    Ok((Endpoint(Arc::new(Owner(session))), info))
}

/// Opens a session with the controller at the other end by introducing this process with `info`. The executor's
/// side.
///
/// # Errors
///
/// Fails if the controller does not take the message in time.
pub fn accept(
    transport: Transport,
    info: &ExecutorInfo,
    handler: Arc<dyn Handler>,
    options: Options,
) -> io::Result<Endpoint> {
    let (endpoint, reading) = accept_unread(transport, info, handler, options)?;
    reading.spawn()?;
    Ok(endpoint)
}

/// As [`accept`], for a caller with a thread that is to read: nothing arrives before it does.
///
/// # Errors
///
/// As [`accept`].
pub fn accept_unread(
    mut transport: Transport,
    info: &ExecutorInfo,
    handler: Arc<dyn Handler>,
    options: Options,
) -> io::Result<(Endpoint, Reading)> {
    let ring = transport.ring.take();
    let link = Arc::new(Link::new(transport)?);
    let payload = to_bytes(info);
    let payload_bytes = payload.len() as u64;
    if payload_bytes > MAX_FRAME_BYTES - HEADER_BYTES as u64 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the Setup message is longer than a message can be"));
    }
    let header = Header { opcode: Opcode::Setup, sequence: 0, tag: ExecutorAddr::NULL, payload_bytes };
    let deadline = Instant::now().checked_add(options.setup_timeout);
    link.write(&header.to_bytes(), &payload, deadline).map_err(|error| match error {
        LinkError::TimedOut => io::ErrorKind::TimedOut.into(),
        LinkError::Gone | LinkError::Closed => io::ErrorKind::BrokenPipe.into(),
        LinkError::Io(error) => io::Error::from(error),
    })?;
    let frames = FrameReader::new(Arc::clone(&link), None);
    let (session, offers_ring) = (Session::new(&link, handler, &options), offers_ring(info));
    if offers_ring {
        // There is none yet.
        let _ = ring.map(|ring| session.set_ring(ring));
        // Before there is a ring if it is sent, so that its calls need not wait for the thread.
        session.spawn_ring_server()?;
    }
    let reading = Reading::new(frames, Role::Executor, &session, offers_ring, link);
    Ok((Endpoint(Arc::new(Owner(session))), reading))
}

/// Returns whether the executor that introduced itself with `info` understands the shared ring.
fn offers_ring(info: &ExecutorInfo) -> bool {
    info.value(RING_KEY).is_some_and(|version| from_bytes(version) == Ok(RING_VERSION))
}

/// Checks the first message.
fn read_setup(header: Header, payload: &[u8]) -> Result<ExecutorInfo, SetupError> {
    let invalid = |text: String| Err(SetupError::Invalid(text));
    match header.opcode {
        Opcode::Setup => {}
        Opcode::Hangup => return Err(hangup_reason(payload).into()),
        other => return invalid(format!("it is a {other:?} message")),
    }
    if header.sequence != 0 || !header.tag.is_null() {
        return invalid(format!("its sequence number is {} and its tag {}, not 0", header.sequence, header.tag));
    }
    let info: ExecutorInfo = from_bytes(payload).map_err(|error| SetupError::Invalid(error.to_string()))?;
    let keys = info.bootstrap_map.iter().map(|(key, _)| key);
    let symbols = info.bootstrap_symbols.iter().map(|(name, _)| name);
    if let Some(name) = first_duplicate(keys).or_else(|| first_duplicate(symbols)) {
        return invalid(format!("{name:?} is announced twice"));
    }
    Ok(info)
}

fn first_duplicate<'a>(names: impl Iterator<Item = &'a String>) -> Option<&'a String> {
    let mut known = HashSet::new();
    names.into_iter().find(|name| !known.insert(*name))
}

/// One end of a connection. Cheap to clone; when the last clone is dropped the connection is closed.
#[derive(Clone)]
pub struct Endpoint(Arc<Owner>);

struct Owner(Arc<Session>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.close(Disconnected::Local);
    }
}

impl Endpoint {
    /// Calls `function` of the peer with encoded arguments; gives its encoded result.
    ///
    /// Blocks while the connection is full, until the peer reads or the connection is closed.
    pub fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Pending<Result<Vec<u8>, CallError>> {
        self.0.0.call(function, &args)
    }

    /// Sends a copy of `descriptor` to the executor; gives the tag that later calls name it by.
    ///
    /// # Errors
    ///
    /// Fails if the connection has ended, or is not a Unix socket.
    pub fn send_descriptor(&self, descriptor: BorrowedFd<'_>) -> Result<u64, CallError> {
        self.0.0.send_descriptor(descriptor)
    }

    /// As [`Self::send_descriptor`], by a tag of the caller's choice, which is greater than those before it. After this,
    /// descriptors are sent only so.
    ///
    /// # Errors
    ///
    /// As [`Self::send_descriptor`].
    pub fn send_descriptor_as(&self, tag: u64, descriptor: BorrowedFd<'_>) -> Result<(), CallError> {
        self.0.0.send_descriptor_as(tag, descriptor)
    }

    /// Takes the descriptor that the controller has sent with `tag`, if it has and nobody has taken it. One that was sent
    /// before the call that names it may come later than that: it is waited for, for at most two seconds.
    #[must_use]
    pub fn take_descriptor(&self, tag: u64) -> Option<OwnedFd> {
        self.0.0.descriptors.take(tag)
    }

    /// Tells the peer that the session ends, and whether in order, then closes the connection. A peer that does not
    /// read is given a second.
    pub fn hang_up(&self, reason: Result<(), String>) {
        self.0.0.hang_up(reason, Instant::now() + HANGUP_PATIENCE);
    }

    /// Closes the connection without a word to the peer. Calls fail with `reason` from now on. What has arrived
    /// already is still delivered; the calls that are pending then fail with `reason`.
    ///
    /// Does not wait for that: see [`wait_disconnected`](Self::wait_disconnected). Without effect if the connection
    /// has ended or another reason was given before.
    pub fn close(&self, reason: Disconnected) {
        self.0.0.close(reason);
    }

    /// Returns why the connection has ended, or is about to because this end has closed it. `None` while it is open.
    #[must_use]
    pub fn disconnected(&self) -> Option<Disconnected> {
        self.0.0.disconnected()
    }

    /// Waits until the connection has ended: its descriptors are closed and no call is pending. Returns the reason.
    ///
    /// Calls of the peer's may still be running: see [`wait_quiet`](Self::wait_quiet).
    pub fn wait_disconnected(&self) -> Disconnected {
        self.0.0.wait_disconnected()
    }

    /// Calls `f` with the reason when the connection has ended, on the thread that read from it, or on another if it has ended
    /// already. There is one such function: another takes its place. If no thread can be made for it, it is dropped.
    pub fn when_disconnected(&self, f: impl FnOnce(Disconnected) + Send + 'static) {
        self.0.0.when_disconnected(Box::new(f));
    }

    /// Returns the numbers of the descriptors that the connection reads from and writes to, as long as it is open.
    ///
    /// They are the endpoint's. A process that is forked from this one has copies, and has to see that it does not use
    /// them: it has no part in the session.
    #[must_use]
    pub fn descriptor_numbers(&self) -> Vec<RawFd> {
        self.0.0.descriptor_numbers()
    }

    /// Waits until no call of the peer's is running, for at most `timeout`; returns whether that is so.
    ///
    /// A process whose connection has ended uses it before it takes down what those calls may be using.
    #[must_use]
    pub fn wait_quiet(&self, timeout: Duration) -> bool {
        self.0.0.pool.wait_quiet(timeout)
    }
}

impl Caller for Endpoint {
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Pending<Result<Vec<u8>, CallError>> {
        self.call(function, args)
    }

    fn send_descriptor(&self, descriptor: BorrowedFd<'_>) -> Result<u64, CallError> {
        self.send_descriptor(descriptor)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("disconnected", &self.disconnected()).finish_non_exhaustive()
    }
}
