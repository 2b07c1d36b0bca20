//! Descriptors that a controller sends to an executor over a Unix socket.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use farlink_addr::ExecutorAddr;
use farlink_rpc::{CallError, Disconnected, Endpoint, Handler, Options, Transport, accept, connect};
use farlink_wire::frame::{Header, Opcode};
use farlink_wire::setup::ExecutorInfo;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

struct Nothing;

impl Handler for Nothing {
    fn call(&self, _function: ExecutorAddr, args: Vec<u8>) -> Result<Vec<u8>, String> {
        Ok(args)
    }
}

fn ends() -> (Endpoint, Endpoint) {
    let (ours, theirs) = Transport::pair().unwrap();
    let executor = accept(theirs, &ExecutorInfo::default(), Arc::new(Nothing), Options::default()).unwrap();
    let (controller, _) = connect(ours, Arc::new(Nothing), Options::default()).unwrap();
    (controller, executor)
}

/// An executor whose controller writes bytes as it likes.
fn raw_controller() -> (UnixStream, Endpoint) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let transport = Transport::from_socket(theirs.into()).unwrap();
    (ours, accept(transport, &ExecutorInfo::default(), Arc::new(Nothing), Options::default()).unwrap())
}

fn descriptor_frame(tag: u64) -> [u8; 32] {
    let tag = ExecutorAddr::new(tag);
    Header { opcode: Opcode::Descriptor, sequence: 0, tag, payload_bytes: 0 }.to_bytes()
}

/// A descriptor that was sent before a call is there when the call runs, is the file that was sent, is close-on-exec,
/// and can be taken once.
#[test]
fn descriptors_arrive_before_calls() {
    let (controller, executor) = ends();
    for round in 0..200u8 {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let tag = controller.send_descriptor(writer.as_fd()).unwrap();
        drop(writer);
        let result = controller.call(ExecutorAddr::new(1), vec![round]).wait().unwrap();
        assert_eq!(result, [round]);
        let descriptor = executor.take_descriptor(tag).unwrap();
        assert_eq!(rustix::io::fcntl_getfd(&descriptor).unwrap(), rustix::io::FdFlags::CLOEXEC);
        assert!(executor.take_descriptor(tag).is_none());
        fs::File::from(descriptor).write_all(&[round]).unwrap();
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, [round]);
    }
}

/// What nobody takes is closed when the session ends: the other end of the pipe sees it.
#[test]
fn descriptors_end_with_the_session() {
    let (controller, executor) = ends();
    let (mut reader, writer) = std::io::pipe().unwrap();
    controller.send_descriptor(writer.as_fd()).unwrap();
    drop(writer);
    controller.call(ExecutorAddr::new(1), Vec::new()).wait().unwrap();
    controller.hang_up(Ok(()));
    executor.wait_disconnected();
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    assert!(matches!(controller.send_descriptor(reader.as_fd()), Err(CallError::Disconnected(_))));
}

/// Pipes pass no descriptors, and say so; the session goes on.
#[test]
fn pipes_pass_none() {
    let (their_in, our_out) = std::io::pipe().unwrap();
    let (our_in, their_out) = std::io::pipe().unwrap();
    let theirs = Transport::from_fds(OwnedFd::from(their_in), their_out.into()).unwrap();
    let ours = Transport::from_fds(our_in.into(), our_out.into()).unwrap();
    assert!(!ours.passes_descriptors());
    let _executor = accept(theirs, &ExecutorInfo::default(), Arc::new(Nothing), Options::default()).unwrap();
    let (controller, _) = connect(ours, Arc::new(Nothing), Options::default()).unwrap();
    let file = fs::File::open("/dev/null").unwrap();
    assert!(matches!(controller.send_descriptor(file.as_fd()), Err(CallError::Missing(_))));
    assert_eq!(controller.call(ExecutorAddr::new(1), vec![7]).wait().unwrap(), [7]);
}

/// A message that promises a descriptor and brings none, one with a tag that is taken, and one from an executor end
/// the session with a reason.
#[test]
fn false_messages_end_the_session() {
    let (mut raw, executor) = raw_controller();
    raw.write_all(&descriptor_frame(1)).unwrap();
    let reason = executor.wait_disconnected();
    assert!(matches!(&reason, Disconnected::Protocol(text) if text.contains("without a descriptor")), "{reason}");

    let (raw, executor) = raw_controller();
    let file = fs::File::open("/dev/null").unwrap();
    for _ in 0..2 {
        send(&raw, &descriptor_frame(5), &[file.as_fd()]);
    }
    let reason = executor.wait_disconnected();
    assert!(matches!(&reason, Disconnected::Protocol(text) if text.contains("that another has")), "{reason}");

    let (controller, executor) = ends();
    executor.send_descriptor(file.as_fd()).unwrap();
    let reason = controller.wait_disconnected();
    assert!(matches!(&reason, Disconnected::Protocol(text) if text.contains("from an executor")), "{reason}");
}

/// A peer that sends descriptors without end, with or without saying so, does not fill this process's table.
#[test]
fn floods_are_bounded() {
    let open = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    let file = fs::File::open("/dev/null").unwrap();
    let (raw, executor) = raw_controller();
    // Stray descriptors beside calls: they are nobody's.
    let call = Header { opcode: Opcode::Call, sequence: 0, tag: ExecutorAddr::new(1), payload_bytes: 0 }.to_bytes();
    for _ in 0..100 {
        send(&raw, &call, &[file.as_fd(); 8]);
    }
    for tag in 0..100 {
        // The executor may have had enough by now.
        try_send(&raw, &descriptor_frame(tag), &[file.as_fd()]);
    }
    let reason = executor.wait_disconnected();
    assert!(matches!(&reason, Disconnected::Protocol(text) if text.contains("as many")), "{reason}");
    drop((raw, file, executor));
    let start = Instant::now();
    while open() > before && start.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(5));
    }
    // Other tests of this file open and close descriptors meanwhile, but far fewer.
    assert!(open() < before + 50, "{} descriptors are left", open() - before);
}

fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[std::os::fd::BorrowedFd<'_>]) {
    assert!(try_send(socket, bytes, descriptors));
}

fn try_send(socket: &UnixStream, bytes: &[u8], descriptors: &[std::os::fd::BorrowedFd<'_>]) -> bool {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    let sent = sendmsg(socket, &[std::io::IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL);
    sent.is_ok_and(|sent| sent == bytes.len())
}
