//! What the tests of endpoints share.

#![allow(dead_code, reason = "each test program uses a part")]

use farlink_addr::ExecutorAddr;
use farlink_rpc::{Endpoint, Handler, Options, Transport, accept, connect};
use farlink_wire::frame::{HEADER_BYTES, Header, Opcode};
use farlink_wire::functions::{RING_KEY, RING_VERSION};
use farlink_wire::setup::ExecutorInfo;
use farlink_wire::sps::to_bytes;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

/// How long anything may take: so long that only what hangs exceeds it.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Runs `f` on a thread of its own and panics if it hangs.
pub(crate) fn within_deadline<T: Send + 'static>(what: &str, f: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    let worker = thread::spawn(move || {
        let _ = done.send(f());
    });
    match result.recv_timeout(DEADLINE) {
        Ok(value) => {
            worker.join().unwrap();
            value
        }
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what} hangs"),
        Err(mpsc::RecvTimeoutError::Disconnected) => std::panic::resume_unwind(worker.join().unwrap_err()),
    }
}

/// A handler made of a closure over the number of the function and the arguments.
pub(crate) struct Serve<F>(pub(crate) F);

impl<F: Fn(u64, Vec<u8>) -> Result<Vec<u8>, String> + Send + Sync + 'static> Handler for Serve<F> {
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Result<Vec<u8>, String> {
        (self.0)(function.as_u64(), args)
    }
}

/// A handler that returns its arguments.
pub(crate) fn echo() -> Arc<dyn Handler> {
    Arc::new(Serve(|_, args| Ok(args)))
}

/// Where a handler finds the endpoint that it calls back through.
pub(crate) type Slot = Arc<Mutex<Option<Endpoint>>>;

pub(crate) fn endpoint_in(slot: &Slot) -> Endpoint {
    slot.lock().unwrap().clone().expect("the test has filled the slot")
}

pub(crate) fn addr(number: u64) -> ExecutorAddr {
    ExecutorAddr::new(number)
}

pub(crate) fn options() -> Options {
    Options { out_of_band_results: true, ..Options::default() }
}

pub(crate) fn info() -> ExecutorInfo {
    ExecutorInfo { triple: "x86_64-unknown-linux-gnu".to_owned(), page_size: 4096, ..ExecutorInfo::default() }
}

pub(crate) fn pipes() -> (Transport, Transport) {
    let (one_in, other_out) = std::io::pipe().unwrap();
    let (other_in, one_out) = std::io::pipe().unwrap();
    let transport = |input: std::io::PipeReader, output: std::io::PipeWriter| {
        Transport::from_fds(input.into(), output.into()).unwrap()
    };
    (transport(one_in, one_out), transport(other_in, other_out))
}

pub(crate) fn tcp() -> (Transport, Transport) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let other = listener.accept().unwrap().0;
    (Transport::from_socket(one.into()).unwrap(), Transport::from_socket(other.into()).unwrap())
}

/// Two pairs of sockets, one for each direction, which their owner has made non-blocking.
pub(crate) fn nonblocking_sockets() -> (Transport, Transport) {
    let pair = || {
        let (one, other) = UnixStream::pair().unwrap();
        one.set_nonblocking(true).unwrap();
        other.set_nonblocking(true).unwrap();
        (one, other)
    };
    let ((one_in, other_out), (one_out, other_in)) = (pair(), pair());
    let transport = |input: UnixStream, output: UnixStream| Transport::from_fds(input.into(), output.into()).unwrap();
    (transport(one_in, one_out), transport(other_in, other_out))
}

/// A way to make the two ends of a connection, and its name.
pub(crate) type Way = (&'static str, fn() -> (Transport, Transport));

/// Every kind of connection.
pub(crate) const WAYS: [Way; 4] = [
    ("a pair of sockets and a ring", || Transport::pair().unwrap()),
    ("two pipes", pipes),
    ("TCP", tcp),
    ("non-blocking sockets and a ring", nonblocking_sockets),
];

/// Opens a session over `ends`; returns the controller's endpoint and the executor's. Over sockets that pass descriptors
/// there is a shared ring, as between farlink's own ends.
pub(crate) fn session(
    ends: (Transport, Transport),
    controller: Arc<dyn Handler>,
    executor: Arc<dyn Handler>,
    options: Options,
) -> (Endpoint, Endpoint) {
    let mut info = info();
    if ends.1.passes_descriptors() {
        info.set_value(RING_KEY, &RING_VERSION);
    }
    let executor = accept(ends.1, &info, executor, options.clone()).unwrap();
    let (controller, announced) = connect(ends.0, controller, options).unwrap();
    assert_eq!(announced, info);
    (controller, executor)
}

/// A peer that is driven byte by byte.
pub(crate) struct RawPeer(pub(crate) UnixStream);

impl RawPeer {
    /// Returns a raw peer and the other end of its connection.
    pub(crate) fn new() -> (Self, Transport) {
        let (raw, other) = UnixStream::pair().unwrap();
        (Self(raw), Transport::from_socket(other.into()).unwrap())
    }

    /// Returns a raw executor and a controller connected to it.
    pub(crate) fn executor(handler: Arc<dyn Handler>) -> (Self, Endpoint) {
        let (mut raw, transport) = Self::new();
        raw.send(&setup());
        (raw, connect(transport, handler, options()).unwrap().0)
    }

    /// Returns a raw controller and an executor connected to it.
    pub(crate) fn controller(handler: Arc<dyn Handler>) -> (Self, Endpoint) {
        let (mut raw, transport) = Self::new();
        let endpoint = accept(transport, &info(), handler, options()).unwrap();
        assert_eq!(raw.receive().0.opcode, Opcode::Setup);
        (raw, endpoint)
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub(crate) fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut header = [0; HEADER_BYTES];
        self.0.read_exact(&mut header).unwrap();
        let header = Header::parse(&header).unwrap();
        let mut payload = vec![0; header.payload_bytes as usize];
        self.0.read_exact(&mut payload).unwrap();
        (header, payload)
    }
}

/// Returns the bytes of a message.
pub(crate) fn frame(opcode: Opcode, sequence: u64, tag: u64, payload: &[u8]) -> Vec<u8> {
    let header = Header { opcode, sequence, tag: addr(tag), payload_bytes: payload.len() as u64 };
    [&header.to_bytes(), payload].concat()
}

pub(crate) fn setup() -> Vec<u8> {
    frame(Opcode::Setup, 0, 0, &to_bytes(&info()))
}
