//! A call and its result between two processes: through the ring while both are awake, through the ring after both have
//! gone to sleep, over the socket alone, and what a socket of the system takes for as many bytes.
//!
//! `cargo bench -p farlink-rpc --bench round_trip`. The second process is a copy of this program.

#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on panics")]

use divan::Bencher;
use farlink_addr::ExecutorAddr;
use farlink_rpc::{Endpoint, Handler, Options, Transport, accept, connect};
use farlink_wire::functions::{RING_KEY, RING_VERSION};
use farlink_wire::setup::ExecutorInfo;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// The argument that makes a copy of this program the other end, and those that say of what.
const PEER: &str = "--peer";
const CALLS: &str = "calls";
const BYTES: &str = "bytes";

fn main() {
    let args: Vec<_> = std::env::args().collect();
    if args.get(1).is_some_and(|arg| arg == PEER) {
        return peer(args[2] == CALLS);
    }
    divan::main();
}

struct Echo;

impl Handler for Echo {
    fn call(&self, _function: ExecutorAddr, args: Vec<u8>) -> Result<Vec<u8>, String> {
        Ok(args)
    }
}

/// Bytes of a message with 16 of arguments.
const MESSAGE_BYTES: usize = 48;

/// Sends back what comes over standard input, which is a socket.
fn peer(has_calls: bool) {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    if has_calls {
        let mut info = ExecutorInfo { page_size: 4096, ..ExecutorInfo::default() };
        info.set_value(RING_KEY, &RING_VERSION);
        let transport = Transport::from_socket(socket).unwrap();
        accept(transport, &info, Arc::new(Echo), Options::default()).unwrap().wait_disconnected();
    } else {
        let mut socket = UnixStream::from(socket);
        let mut buffer = [0; MESSAGE_BYTES];
        while socket.read_exact(&mut buffer).is_ok() {
            socket.write_all(&buffer).unwrap();
        }
    }
}

/// The other process, which ends when its socket does.
struct Peer(Child);

impl Peer {
    fn start(of: &str) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut program = Command::new(std::env::current_exe().unwrap());
        let child = program.args([PEER, of]).stdin(Stdio::from(OwnedFd::from(theirs))).spawn().unwrap();
        (Self(child), ours)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.wait();
    }
}

/// The process of an executor, and its controller, which has to be dropped before that: last declared, first dropped.
fn controller(shared_ring: bool) -> (Peer, Endpoint) {
    let (peer, socket) = Peer::start(CALLS);
    let options = Options { shared_ring, ..Options::default() };
    let (endpoint, _) = connect(Transport::from_socket(socket.into()).unwrap(), Arc::new(Echo), options).unwrap();
    (peer, endpoint)
}

fn call(endpoint: &Endpoint) -> Vec<u8> {
    endpoint.call(ExecutorAddr::new(1), vec![7; MESSAGE_BYTES - 32]).wait().unwrap()
}

#[divan::bench(sample_size = 100, sample_count = 300)]
fn ring_awake(bencher: Bencher<'_, '_>) {
    let (_peer, endpoint) = controller(true);
    (0..1000).for_each(|_| drop(call(&endpoint)));
    bencher.bench_local(|| call(&endpoint));
}

#[divan::bench(sample_size = 10, sample_count = 300)]
fn socket_without_ring(bencher: Bencher<'_, '_>) {
    let (_peer, endpoint) = controller(false);
    (0..1000).for_each(|_| drop(call(&endpoint)));
    bencher.bench_local(|| call(&endpoint));
}

/// How long nothing happens before a call, so that both ends sleep.
const REST: Duration = Duration::from_millis(1);

#[divan::bench(sample_size = 1, sample_count = 500)]
fn ring_asleep(bencher: Bencher<'_, '_>) {
    let (_peer, endpoint) = controller(true);
    bencher.with_inputs(|| std::thread::sleep(REST)).bench_local_values(|()| call(&endpoint));
}

#[divan::bench(sample_size = 1, sample_count = 500)]
fn socket_without_ring_asleep(bencher: Bencher<'_, '_>) {
    let (_peer, endpoint) = controller(false);
    bencher.with_inputs(|| std::thread::sleep(REST)).bench_local_values(|()| call(&endpoint));
}

fn ping(socket: &mut UnixStream) {
    let mut buffer = [7; MESSAGE_BYTES];
    socket.write_all(&buffer).unwrap();
    socket.read_exact(&mut buffer).unwrap();
}

#[divan::bench(sample_size = 10, sample_count = 300)]
fn bare_socket(bencher: Bencher<'_, '_>) {
    let (_peer, mut socket) = Peer::start(BYTES);
    (0..1000).for_each(|_| ping(&mut socket));
    bencher.bench_local(|| ping(&mut socket));
}

#[divan::bench(sample_size = 1, sample_count = 500)]
fn bare_socket_asleep(bencher: Bencher<'_, '_>) {
    let (_peer, mut socket) = Peer::start(BYTES);
    bencher.with_inputs(|| std::thread::sleep(REST)).bench_local_values(|()| ping(&mut socket));
}
