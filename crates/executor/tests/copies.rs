//! Reservations that several executors have at one address, each with its own copy of the data that it writes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::Process;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_mem::{MemoryMapper, SharedMemoryMapper};
use farlink_rpc::{CallError, Caller, Executor, Pending};
use farlink_wire::functions::{READ_BUFFERS, SHARED_INSTANCE, SHARED_MAP_AT, SHARED_RENEW, WRITE_BUFFERS};
use farlink_wire::sps::SpsError;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

const BYTES: u64 = 64 << 20;
const PAGE: u64 = 4096;

/// Calls two executors, whose functions are at different addresses, as one: of what they answer the first one's counts.
struct Both(Executor, Executor);

impl Caller for Both {
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Pending<Result<Vec<u8>, CallError>> {
        assert_eq!(SHARED_MAP_AT.find(self.0.info()), Some(function));
        let other = self.1.bind(SHARED_MAP_AT).unwrap().call_encoded(args.clone()).wait().unwrap();
        self.0.bind(SHARED_MAP_AT).unwrap().call_encoded(args).map(move |base| {
            assert_eq!(base.unwrap(), other);
            Ok(farlink_wire::sps::to_bytes(&other))
        })
    }

    fn send_descriptor(&self, descriptor: BorrowedFd<'_>) -> Result<u64, CallError> {
        let tags = [&self.0, &self.1].map(|executor| executor.send_descriptor(descriptor).unwrap());
        assert_eq!(tags[0], tags[1]);
        Ok(tags[0])
    }
}

fn read(executor: &Executor, at: ExecutorAddr) -> Vec<u8> {
    let range = ExecutorAddrRange::from_len(at, 4).unwrap();
    executor.bind(READ_BUFFERS).unwrap().call(&(vec![range],)).wait().unwrap().remove(0)
}

fn write(executor: &Executor, at: ExecutorAddr, bytes: &[u8; 4]) -> bool {
    executor.bind(WRITE_BUFFERS).unwrap().call(&(vec![(at, bytes.to_vec().into())],)).wait().is_ok()
}

fn renew(executor: &Executor, at: ExecutorAddr, bytes: u64) -> bool {
    let instance = executor.object(SHARED_INSTANCE).unwrap();
    let pages = ExecutorAddrRange::from_len(at, bytes).unwrap();
    let SpsError(result) = executor.bind(SHARED_RENEW).unwrap().call(&(instance, pages)).wait().unwrap();
    result.is_ok()
}

/// What the controller has written is in both, at one address; what one of them writes nobody else sees, until it gives up
/// its copy. Constants cannot be written.
#[test]
fn each_has_its_own_data() {
    let (one, other) = (Process::spawn(), Process::spawn());
    let executors = [one.executor.clone(), other.executor.clone()];
    let both = Both(one.executor.clone(), other.executor.clone());
    let executor = Executor::new(one.executor.info().clone(), Arc::new(both)).unwrap();
    let mapper = SharedMemoryMapper::replicated(&executor, false, None).unwrap();
    let base = mapper.reserve(BYTES).wait().unwrap().start();
    let stripe = |wanted| mapper.stripes(base).into_iter().find(|(prot, _)| *prot == wanted).unwrap().1;
    let (data, constants) = (stripe(MemProt::RW), stripe(MemProt::READ));
    let at = |stripe: ExecutorAddrRange| ExecutorAddrRange::from_len(stripe.start(), PAGE).unwrap();
    for stripe in [data, constants] {
        mapper.prepare(at(stripe)).unwrap().write(0, b"init").unwrap();
    }
    for executor in &executors {
        assert_eq!((read(executor, data.start()), read(executor, constants.start())), (b"init".into(), b"init".into()));
        assert!(!write(executor, constants.start(), b"bad!"));
    }
    assert!(write(&executors[0], data.start(), b"mine"));
    let seen = |executor: &Executor| read(executor, data.start());
    assert_eq!((seen(&executors[0]), seen(&executors[1])), (b"mine".into(), b"init".into()));
    // The controller's view is of data as they were linked, which says nothing of any executor.
    assert!(mapper.view(at(data)).is_none() && mapper.view(at(constants)).is_some());
    mapper.prepare(at(data)).unwrap().write(0, b"next").unwrap();
    assert_eq!((seen(&executors[0]), seen(&executors[1])), (b"mine".into(), b"next".into()));
    assert!(renew(&executors[0], data.start(), PAGE));
    assert_eq!(seen(&executors[0]), b"next");
    one.end();
    other.end();
}

/// Only whole pages of data can be renewed, and nothing is mapped where something is.
#[test]
fn requests_that_are_refused() {
    let process = Process::spawn();
    let mapper = SharedMemoryMapper::replicated(&process.executor, false, None).unwrap();
    let base = mapper.reserve(BYTES).wait().unwrap().start();
    let stripes = mapper.stripes(base);
    for (prot, stripe) in &stripes {
        assert_eq!(renew(&process.executor, stripe.start(), PAGE), *prot == MemProt::RW, "{prot:?}");
        assert!(!renew(&process.executor, stripe.start().checked_add(8).unwrap(), PAGE));
        assert!(!renew(&process.executor, stripe.start(), 8));
        assert!(!renew(&process.executor, stripe.start(), stripe.len() + 2 * PAGE));
    }
    assert!(!renew(&process.executor, ExecutorAddr::new(PAGE), PAGE));
    let usual = SharedMemoryMapper::new(&process.executor).unwrap();
    let shared = usual.reserve(BYTES).wait().unwrap().start();
    let (_, data) = usual.stripes(shared).into_iter().find(|(prot, _)| *prot == MemProt::RW).unwrap();
    assert!(!renew(&process.executor, data.start(), PAGE), "what all share is nobody's copy");
    let map = process.executor.bind(SHARED_MAP_AT).unwrap();
    let object = rustix::fs::memfd_create("object", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&object, BYTES).unwrap();
    let instance = process.executor.object(SHARED_INSTANCE).unwrap();
    let tag = process.executor.send_descriptor(std::os::fd::AsFd::as_fd(&object)).unwrap();
    assert!(map.call(&(instance, tag, BYTES, Vec::new(), base)).wait().unwrap().is_err(), "{base} is taken");
    process.end();
}
