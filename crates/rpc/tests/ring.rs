//! The shared ring between two ends of a connection, and what a controller that is none of ours makes of it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::*;
use farlink_addr::ExecutorAddr;
use farlink_rpc::{Disconnected, Endpoint, Handler, Options, Transport, accept, system_calls};
use farlink_wire::frame::Opcode;
use farlink_wire::functions::{RING_KEY, RING_TAG, RING_VERSION};
use farlink_wire::setup::ExecutorInfo;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::collections::HashSet;
use std::future::Future;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::pin::pin;
use std::sync::{Arc, Barrier, Mutex};
use std::task::{Context, Poll, Wake};
use std::thread;
use std::time::Duration;

/// Bytes of a ring's memory: two queues, each with the writer's part, the reader's, and 32 KiB.
const RING_BYTES: u64 = 2 * (256 + (32 << 10));

fn sends() -> u64 {
    system_calls().find(|&(name, _)| name == "send").unwrap().1
}

/// Calls go past the socket: next to none of them is sent over it.
#[test]
fn calls_pass_the_socket_by() {
    within_deadline("calls", || {
        let (controller, _executor) = session(Transport::pair().unwrap(), echo(), echo(), options());
        let before = sends();
        for round in 0..3000u64 {
            let args = round.to_le_bytes().to_vec();
            assert_eq!(controller.call(addr(1), args.clone()).wait().unwrap(), args);
        }
        // Over the socket it would be 6000. A doorbell now and then, when the thread that waits was not there yet, and what
        // other tests of this program send.
        assert!(sends() - before < 4500, "{} messages were sent", sends() - before);
    });
}

/// Calls go through a ring that comes with the connection, and over the socket if the executor does not take it. Other memory
/// is no ring's.
#[test]
fn a_ring_comes_with_the_connection() {
    within_deadline("calls", || {
        for is_taken in [true, false] {
            let (mut ours, mut theirs) = Transport::pair().unwrap();
            let memory = ours.offer_ring().unwrap();
            if is_taken {
                theirs.take_ring(&memory).unwrap();
            }
            let (controller, _executor) = session((ours, theirs), echo(), echo(), options());
            for round in 0..100u8 {
                assert_eq!(controller.call(addr(1), vec![round]).wait().unwrap(), [round]);
            }
        }
        let (_ours, mut theirs) = Transport::pair().unwrap();
        let other = memfd_create("other", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&other, RING_BYTES).unwrap();
        assert!(theirs.take_ring(&other).is_err(), "it is not sealed");
    });
}

/// A controller that does not want a ring has none, and calls go over the socket.
#[test]
fn a_ring_can_be_refused() {
    within_deadline("calls", || {
        let without = Options { shared_ring: false, ..options() };
        let (controller, _executor) = session(Transport::pair().unwrap(), echo(), echo(), without);
        let before = sends();
        for round in 0..100u8 {
            assert_eq!(controller.call(addr(1), vec![round]).wait().unwrap(), [round]);
        }
        assert!(sends() - before >= 200);
    });
}

/// Calls that wait for each other run at once, though one thread serves those that come one by one; so do calls that are
/// made before any is waited for.
#[test]
fn calls_run_beside_each_other() {
    within_deadline("calls", || {
        let barrier = Arc::new(Barrier::new(5));
        let meeting = {
            let barrier = Arc::clone(&barrier);
            Serve(move |_, args| {
                barrier.wait();
                Ok(args)
            })
        };
        let (controller, _executor) = session(Transport::pair().unwrap(), echo(), Arc::new(meeting), options());
        for _ in 0..50 {
            thread::scope(|scope| {
                for number in 0..4u8 {
                    let call = controller.call(addr(1), vec![number]);
                    scope.spawn(move || assert_eq!(call.wait().unwrap(), [number]));
                }
                barrier.wait();
            });
        }
    });
}

struct Unparker(thread::Thread);

impl Wake for Unparker {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Results reach tasks that await them, though no thread reads the ring meanwhile.
#[test]
fn results_can_be_awaited() {
    within_deadline("awaiting", || {
        let (controller, _executor) = session(Transport::pair().unwrap(), echo(), echo(), options());
        for round in 0..200u8 {
            let mut pending = pin!(controller.call(addr(1), vec![round]));
            let waker = Arc::new(Unparker(thread::current())).into();
            let result = loop {
                match pending.as_mut().poll(&mut Context::from_waker(&waker)) {
                    Poll::Ready(result) => break result,
                    Poll::Pending => thread::park(),
                }
            };
            assert_eq!(result.unwrap(), [round]);
        }
    });
}

/// A thread that waits at the ring gets a result that is too long for it, over the socket.
#[test]
fn long_results_find_who_waits_at_the_ring() {
    within_deadline("a long result", || {
        let long = Arc::new(Serve(|function, _| {
            // Long enough for the caller to fall asleep at the ring.
            thread::sleep(std::time::Duration::from_millis(2));
            Ok(vec![5; function as usize])
        }));
        let (controller, _executor) = session(Transport::pair().unwrap(), echo(), long, options());
        for len in [0, 8000, 9000, 200_000].repeat(10) {
            assert_eq!(controller.call(addr(len), Vec::new()).wait().unwrap().len() as u64, len);
        }
    });
}

/// An executor that offers a ring, and a controller that writes what it likes.
fn raw_controller() -> (RawPeer, Endpoint) {
    let (mut raw, transport) = RawPeer::new();
    let mut info = ExecutorInfo { page_size: 4096, ..ExecutorInfo::default() };
    info.set_value(RING_KEY, &RING_VERSION);
    let endpoint = accept(transport, &info, echo(), options()).unwrap();
    assert_eq!(raw.receive().0.opcode, Opcode::Setup);
    (raw, endpoint)
}

fn memory(bytes: u64, seals: SealFlags) -> OwnedFd {
    let object = memfd_create("ring", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&object, bytes).unwrap();
    fcntl_add_seals(&object, seals).unwrap();
    object
}

fn send_ring(raw: &RawPeer, object: &OwnedFd) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [object.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let message = frame(Opcode::Descriptor, 0, RING_TAG, &[]);
    assert_eq!(sendmsg(&raw.0, &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL).unwrap(), message.len());
}

fn assert_protocol_error(endpoint: &Endpoint, expected: &str) {
    let reason = endpoint.wait_disconnected();
    assert!(matches!(&reason, Disconnected::Protocol(text) if text.contains(expected)), "{reason}: {expected}");
}

/// Memory that is too small, or that its maker could make so later, is refused; so are a second ring, and a doorbell where
/// there is none. Where the memory does not get through, there is no ring.
#[test]
fn memory_that_could_vanish_is_refused() {
    within_deadline("refusals", || {
        for (bytes, seals) in [(4096, SealFlags::SHRINK), (RING_BYTES, SealFlags::GROW), (0, SealFlags::SHRINK)] {
            let (raw, endpoint) = raw_controller();
            send_ring(&raw, &memory(bytes, seals));
            assert_protocol_error(&endpoint, "cannot be used");
        }
        let (raw, endpoint) = raw_controller();
        send_ring(&raw, &memory(RING_BYTES, SealFlags::SHRINK));
        send_ring(&raw, &memory(RING_BYTES, SealFlags::SHRINK));
        assert_protocol_error(&endpoint, "while there is one");
        let (mut raw, endpoint) = raw_controller();
        raw.send(&frame(Opcode::Descriptor, 0, RING_TAG, &[]));
        raw.send(&frame(Opcode::Doorbell, 0, 0, &[]));
        assert_protocol_error(&endpoint, "without a ring");
    });
}

/// Lengths that are out of bounds, and messages that do not belong into a ring, end the session, also behind
/// a call that is well-formed.
#[test]
fn a_ring_that_makes_no_sense_ends_the_session() {
    within_deadline("nonsense", || {
        let mut too_short = frame(Opcode::Call, 0, 1, &[]);
        too_short[0] = 31;
        let messages = [
            (vec![0xff; 32], "length of a message"),
            (too_short, "length of a message"),
            (frame(Opcode::Call, 0, 1, &[0; 9000]), "length of a message"),
            ([&[32, 0, 0, 0, 0, 0, 0, 0][..], &[0xff; 24]].concat(), "unknown opcode"),
            (frame(Opcode::Hangup, 0, 0, &[]), "a Hangup message"),
            (frame(Opcode::Doorbell, 0, 0, &[]), "a Doorbell message"),
            (frame(Opcode::Result, 9, 0, &[]), "not pending"),
        ];
        for (message, expected) in messages {
            let (raw, endpoint) = raw_controller();
            let object = std::fs::File::from(memory(RING_BYTES, SealFlags::SHRINK));
            object.write_all_at(&message, 256).unwrap();
            send_ring(&raw, &object.into());
            assert_protocol_error(&endpoint, expected);
        }
        let (raw, endpoint) = raw_controller();
        let object = std::fs::File::from(memory(RING_BYTES, SealFlags::SHRINK));
        let call = frame(Opcode::Call, 0, 1, &[1; 8]);
        object.write_all_at(&call, 256).unwrap();
        object.write_all_at(&[0xff; 8], 256 + 64).unwrap();
        send_ring(&raw, &object.into());
        assert_protocol_error(&endpoint, "length of a message");
    });
}

/// Who waits at the ring for a limited time gets a result that comes in it, and goes on after it where none does.
#[test]
fn waiting_at_the_ring_can_be_limited() {
    within_deadline("limits", || {
        let (release, released) = std::sync::mpsc::channel::<()>();
        let released = std::sync::Mutex::new(released);
        let waiting = Arc::new(Serve(move |function, args| {
            if function == 2 {
                released.lock().unwrap().recv().unwrap();
            }
            Ok(args)
        }));
        let (controller, _executor) = session(Transport::pair().unwrap(), echo(), waiting, options());
        let before = sends();
        for round in 0..3000u64 {
            let args = round.to_le_bytes().to_vec();
            assert_eq!(controller.call(addr(1), args.clone()).wait_timeout(DEADLINE).unwrap().unwrap(), args);
        }
        // As above.
        assert!(sends() - before < 4500, "{} messages were sent", sends() - before);
        let late = controller.call(addr(2), Vec::new());
        assert!(late.wait_timeout(std::time::Duration::from_millis(20)).is_none());
        assert_eq!(controller.call(addr(1), vec![7]).wait().unwrap(), [7]);
        release.send(()).unwrap();
        assert_eq!(controller.call(addr(1), vec![8]).wait().unwrap(), [8]);
    });
}

/// A handler whose functions with even numbers are brief. Keeps which thread ran what.
struct Briefly(Mutex<Vec<(u64, thread::ThreadId)>>);

impl Handler for Briefly {
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Result<Vec<u8>, String> {
        self.0.lock().unwrap().push((function.as_u64(), thread::current().id()));
        // So that others come meanwhile.
        thread::sleep(Duration::from_millis(2));
        Ok(args)
    }

    fn is_brief(&self, function: ExecutorAddr) -> bool {
        function.as_u64().is_multiple_of(2)
    }
}

/// Brief calls that come first are run by one thread in their order, as many as there are at once; after the first other
/// call they get threads like all.
#[test]
fn brief_calls_need_no_threads() {
    within_deadline("calls", || {
        let (mut ours, mut theirs) = Transport::pair().unwrap();
        let memory = ours.offer_ring().unwrap();
        theirs.take_ring(&memory).unwrap();
        let handler = Arc::new(Briefly(Mutex::default()));
        let (controller, _executor) = session((ours, theirs), echo(), handler.clone(), options());
        let call_all = |numbers: &[u64]| {
            let pending: Vec<_> = numbers.iter().map(|&number| controller.call(addr(number), vec![])).collect();
            pending.into_iter().for_each(|pending| assert_eq!(pending.wait().unwrap(), []));
            std::mem::take(&mut *handler.0.lock().unwrap())
        };
        let threads = |ran: &[(u64, thread::ThreadId)]| ran.iter().map(|&(_, thread)| thread).collect::<HashSet<_>>();

        let first = call_all(&[2, 4, 6, 8, 10, 12]);
        assert_eq!(threads(&first).len(), 1, "{first:?}");
        assert_eq!(first.iter().map(|&(number, _)| number).collect::<Vec<_>>(), [2, 4, 6, 8, 10, 12]);
        call_all(&[1]);
        let later = call_all(&[2, 4, 6, 8, 10, 12]);
        assert!(threads(&later).len() > 1, "{later:?}");
    });
}

/// A handler whose function 2 is brief and takes the descriptor that its argument names.
struct Takes(Slot);

impl Handler for Takes {
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Result<Vec<u8>, String> {
        if function == addr(2) {
            let tag = u64::from_le_bytes(args.as_slice().try_into().unwrap());
            let endpoint = eventually(|| self.0.lock().unwrap().clone());
            endpoint.take_descriptor(tag).ok_or("no descriptor has come")?;
        }
        Ok(args)
    }

    fn is_brief(&self, function: ExecutorAddr) -> bool {
        function == addr(2)
    }
}

fn eventually<T>(f: impl Fn() -> Option<T>) -> T {
    loop {
        if let Some(found) = f() {
            return found;
        }
        thread::yield_now();
    }
}

/// A brief call gets its descriptor, also if calls that are not brief come over the socket before that.
#[test]
fn brief_calls_hold_no_reader_up() {
    within_deadline("calls", || {
        for _ in 0..20 {
            let (mut ours, mut theirs) = Transport::pair().unwrap();
            let memory = ours.offer_ring().unwrap();
            theirs.take_ring(&memory).unwrap();
            let slot = Slot::default();
            let (controller, executor) = session((ours, theirs), echo(), Arc::new(Takes(slot.clone())), options());
            *slot.lock().unwrap() = Some(executor);
            let brief = controller.call(addr(2), 1u64.to_le_bytes().to_vec());
            // It is too long for the ring.
            let other = controller.call(addr(1), vec![0; 20_000]);
            assert_eq!(controller.send_descriptor(memory.as_fd()).unwrap(), 1);
            assert_eq!(brief.wait().unwrap(), 1u64.to_le_bytes());
            assert_eq!(other.wait().unwrap().len(), 20_000);
            // Nobody else drops it.
            drop(slot.lock().unwrap().take());
        }
    });
}
