//! Allocations packed in stripes that have one protection for good, in a real executor.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::Process;
use farlink_addr::{Align, AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_mem::{FinalizeRequest, FinalizeSegment, MemoryManager, MemoryMapper, SegmentLayout, SharedMemoryMapper};
use farlink_rpc::{CallError, Caller, Endpoint, Executor, Pending};
use farlink_wire::functions::{READ_BUFFERS, RUN_AS_VOID_FUNCTION, WRITE_BUFFERS};
use farlink_wire::msg::{ActionPair, WrapperFunctionCall};
use std::collections::HashSet;
use std::fs;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const GIB: u64 = 1 << 30;

/// Counts the calls that go to an executor.
struct Counting {
    endpoint: Endpoint,
    calls: Arc<AtomicU64>,
}

impl Caller for Counting {
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Pending<Result<Vec<u8>, CallError>> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.endpoint.call(function, args)
    }

    fn send_descriptor(&self, descriptor: BorrowedFd<'_>) -> Result<u64, CallError> {
        self.endpoint.send_descriptor(descriptor)
    }
}

struct Subject {
    process: Process,
    manager: MemoryManager,
    calls: Arc<AtomicU64>,
}

impl Subject {
    fn new() -> Self {
        let process = Process::spawn();
        let calls = Arc::<AtomicU64>::default();
        let caller = Counting { endpoint: process.endpoint.clone(), calls: Arc::clone(&calls) };
        let executor = Executor::new(process.executor.info().clone(), Arc::new(caller)).unwrap();
        let manager = MemoryManager::new(Arc::new(SharedMemoryMapper::new(&executor).unwrap()), GIB);
        Self { process, manager, calls }
    }

    fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// The protections of the executor's mappings from the first of shared memory to the last.
    fn mappings(&self) -> Vec<String> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.process.child.id())).unwrap();
        let is_shared = |line: &str| line.contains("memfd:farlink (");
        let lines: Vec<_> = maps.lines().skip_while(|line| !is_shared(line)).collect();
        let end = lines.iter().rposition(|line| is_shared(line)).unwrap();
        lines[..=end].iter().map(|line| line.split_whitespace().nth(1).unwrap().to_owned()).collect()
    }

    /// How often the executor has changed a protection.
    fn protections_changed(&self) -> u64 {
        let usage = self.manager.usage().wait().unwrap();
        usage.executor_system_calls.iter().filter(|(name, _)| name == "mprotect").map(|(_, count)| count).sum()
    }

    fn read(&self, range: ExecutorAddrRange) -> Vec<u8> {
        self.process.executor.bind(READ_BUFFERS).unwrap().call(&(vec![range],)).wait().unwrap().remove(0)
    }

    fn write(&self, at: ExecutorAddr, bytes: &[u8]) -> bool {
        let write = self.process.executor.bind(WRITE_BUFFERS).unwrap();
        write.call(&(vec![(at, bytes.to_vec().into())],)).wait().is_ok()
    }

    fn call(&self, at: ExecutorAddr) -> i32 {
        self.process.executor.bind(RUN_AS_VOID_FUNCTION).unwrap().call(&(at,)).wait().unwrap()
    }

    fn end(self) {
        drop(self.manager);
        self.process.end();
    }
}

fn segment(prot: MemProt, content_bytes: u64, zero_fill_bytes: u64, align: u64) -> SegmentLayout {
    let align = Align::new(align).unwrap();
    SegmentLayout { group: AllocGroup::standard(prot), content_bytes, zero_fill_bytes, align }
}

/// `mov $value, %eax; ret`.
fn returns(value: u32) -> [u8; 6] {
    let [a, b, c, d] = value.to_le_bytes();
    [0xb8, a, b, c, d, 0xc3]
}

/// Ten thousand objects without actions: no call but the one that reserves, no mapping but the reservation's, few bytes
/// each; all of them run, and what they may not write they cannot.
#[test]
fn many_small_objects() {
    const COUNT: u64 = 10_000;
    let subject = Subject::new();
    let layout =
        || vec![segment(MemProt::READ, 8, 0, 8), segment(MemProt::RW, 4, 4, 4), segment(MemProt::RX, 6, 0, 16)];
    let mut finalized = Vec::new();
    for index in 0..COUNT {
        let alloc = subject.manager.allocate(layout()).wait().unwrap();
        let [constant, data, code] = alloc.segments() else { panic!("three segments") };
        constant.working.write(0, &index.to_le_bytes()).unwrap();
        data.working.write(0, b"data").unwrap();
        code.working.write(0, &returns(index as u32)).unwrap();
        finalized.extend(subject.manager.finalize(vec![(alloc, Vec::new())]).wait().unwrap());
    }
    assert_eq!(subject.calls(), 1);
    let mut mappings = subject.mappings();
    assert!(mappings.len() <= 5, "{mappings:?}");
    // Systems that cannot do without have mappings for what is between.
    mappings.retain(|prot| prot != "---p");
    assert_eq!(mappings, ["r-xs", "r--s", "rw-s"]);
    assert_eq!(subject.protections_changed(), 0);
    assert_eq!(subject.manager.usage().wait().unwrap().controller_mappings, 1);
    let stats = subject.manager.stats();
    assert_eq!((stats.live_allocations, stats.reservations), (COUNT, 1));
    assert!(stats.live_bytes <= COUNT * (8 + 8 + 6 + 64), "{} bytes each", stats.live_bytes / COUNT);
    for (index, alloc) in finalized.iter().enumerate().step_by(997) {
        let [(_, constant), (_, data), (_, code)] = &alloc.segments()[..] else { panic!("three segments") };
        assert_eq!(subject.read(*constant), (index as u64).to_le_bytes());
        assert_eq!(subject.read(*data), b"data\0\0\0\0");
        assert_eq!(subject.call(code.start()), index as i32);
        assert!(!subject.write(constant.start(), b"x") && !subject.write(code.start(), b"x"));
        assert!(subject.write(data.start(), b"x"));
        // Within reach of each other.
        assert!(code.start().as_u64().abs_diff(data.start().as_u64()) < GIB);
    }
    subject.manager.deallocate(finalized).wait().unwrap();
    // Two of them asked for what memory takes of the system.
    assert_eq!((subject.calls(), subject.manager.stats().live_bytes), (3, 0));
    subject.end();
}

/// What was deallocated or abandoned is zero for the next one, large ranges included; code that is gone traps.
#[test]
fn reused_memory_is_zero() {
    let subject = Subject::new();
    let layout = || vec![segment(MemProt::RW, 100_000, 300_000, 64), segment(MemProt::RX, 6, 0, 16)];
    for round in 0..6 {
        let alloc = subject.manager.allocate(layout()).wait().unwrap();
        let data = alloc.segments()[0].range;
        let mut content = vec![1; 100_000];
        alloc.segments()[0].working.read(0, &mut content).unwrap();
        assert!(content.iter().all(|&byte| byte == 0), "round {round}");
        alloc.segments()[0].working.write(0, &[0xee; 100_000]).unwrap();
        alloc.segments()[1].working.write(0, &returns(7)).unwrap();
        if round % 2 == 0 {
            alloc.abandon();
            continue;
        }
        let finalized = subject.manager.finalize(vec![(alloc, Vec::new())]).wait().unwrap();
        let code = finalized[0].segments()[1].1;
        let bytes = subject.read(data);
        assert!(bytes[..100_000].iter().all(|&byte| byte == 0xee) && bytes[100_000..].iter().all(|&byte| byte == 0));
        assert!(subject.write(data.start(), &[0x77; 400_000]));
        assert_eq!(subject.call(code.start()), 7);
        subject.manager.deallocate(finalized).wait().unwrap();
        assert!(subject.read(data).iter().all(|&byte| byte == 0));
        assert_eq!(subject.read(code), [0xcc; 6]);
    }
    subject.end();
}

/// Alignments up to a large page hold; a segment that is larger than a stripe gets a reservation that has room for it;
/// zeros take no memory.
#[test]
fn large_segments_and_alignments() {
    let subject = Subject::new();
    let place = |layout| subject.manager.allocate(vec![layout]).wait().unwrap();
    for align in [1, 64, 4096, 1 << 16, 2 << 20] {
        let alloc = place(segment(MemProt::RX, 6, 0, align));
        assert!(alloc.segments()[0].range.start().is_aligned(Align::new(align).unwrap()));
    }
    let huge = place(segment(MemProt::RW, 1, 3 * GIB, 64));
    assert_eq!(subject.manager.stats().reservations, 2);
    let finalized = subject.manager.finalize(vec![(huge, Vec::new())]).wait().unwrap();
    let last = finalized[0].segments()[0].1.end().checked_sub(1).unwrap();
    assert!(subject.write(last, b"x"));
    let status = fs::read_to_string(format!("/proc/{}/status", subject.process.child.id())).unwrap();
    let resident = status.lines().find(|line| line.starts_with("RssShmem:")).unwrap();
    let kib: u64 = resident.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 1024, "{resident}");
    subject.end();
}

/// Objects with actions are told to the executor, in one call for a batch, and again when they go; a failing action
/// leaves nothing of the batch.
#[test]
fn actions_in_stripes() {
    let subject = Subject::new();
    // A wrapper function that counts its runs and succeeds: incl (counter); xor %eax, %eax; mov $1, %edx; ret. The
    // counter's address is its argument.
    let count = [0x48, 0x8b, 0x07, 0xff, 0x00, 0x31, 0xc0, 0xba, 1, 0, 0, 0, 0xc3];
    let fail = [0x31, 0xc0, 0x31, 0xd2, 0xc3];
    let alloc =
        subject.manager.allocate(vec![segment(MemProt::RW, 0, 8, 8), segment(MemProt::RX, 32, 0, 16)]).wait().unwrap();
    let (counter, code) = (alloc.segments()[0].range, alloc.segments()[1].range.start());
    alloc.segments()[1].working.write(0, &count).unwrap();
    alloc.segments()[1].working.write(16, &fail).unwrap();
    let _functions = subject.manager.finalize(vec![(alloc, Vec::new())]).wait().unwrap();
    let call = || Some(WrapperFunctionCall::new(code, &(counter.start(),)));
    let pair = || ActionPair { finalize: call(), dealloc: call() };
    let runs = || u32::from_le_bytes(subject.read(counter)[..4].try_into().unwrap());
    let small = || subject.manager.allocate(vec![segment(MemProt::READ, 4, 0, 4)]).wait().unwrap();
    let calls = subject.calls();
    let batch = vec![(small(), vec![pair()]), (small(), Vec::new()), (small(), vec![pair(), pair()])];
    let finalized = subject.manager.finalize(batch).wait().unwrap();
    assert_eq!((runs(), subject.calls() - calls), (3, 1));
    subject.manager.deallocate(finalized).wait().unwrap();
    assert_eq!((runs(), subject.calls() - calls), (6, 2));
    let live = subject.manager.stats().live_allocations;
    let failing =
        ActionPair { finalize: Some(WrapperFunctionCall::new(code.checked_add(16).unwrap(), &())), dealloc: None };
    let batch = vec![(small(), vec![pair()]), (small(), vec![failing])];
    assert!(subject.manager.finalize(batch).wait().is_err());
    assert_eq!((runs(), subject.manager.stats().live_allocations), (8, live));
    subject.end();
}

/// Requests to the executor that are outside a stripe, or want another protection than it has, are errors.
#[test]
fn requests_outside_stripes() {
    let process = Process::spawn();
    let mapper = SharedMemoryMapper::new(&process.executor).unwrap();
    let base = mapper.reserve(GIB).wait().unwrap();
    let stripes = mapper.stripes(base.start());
    let prots: HashSet<_> = stripes.iter().map(|&(prot, _)| prot).collect();
    assert_eq!(prots, HashSet::from([MemProt::RX, MemProt::READ, MemProt::RW]));
    let some_action = || vec![ActionPair { finalize: None, dealloc: None }];
    let finalize = |prot, at: ExecutorAddr, len| {
        let range = ExecutorAddrRange::from_len(at, len).unwrap();
        let working = mapper.prepare(range).unwrap();
        let segments = vec![FinalizeSegment { group: AllocGroup::standard(prot), range, content_bytes: 0, working }];
        let request = FinalizeRequest { reservation: base.start(), segments, actions: some_action() };
        mapper.finalize(vec![request]).wait()
    };
    for &(prot, stripe) in &stripes {
        let other = if prot == MemProt::RW { MemProt::RX } else { MemProt::RW };
        assert!(finalize(other, stripe.start(), 16).is_err());
        assert!(finalize(prot, stripe.start(), 16).is_ok());
        assert!(finalize(prot, stripe.start(), 16).is_err(), "the key is taken");
        if stripe.end() < base.end() {
            // The page between it and the next is nobody's.
            let gap = ExecutorAddrRange::from_len(stripe.end(), 1).unwrap();
            let read = process.executor.bind(READ_BUFFERS).unwrap().call(&(vec![gap],)).wait();
            assert!(read.is_err(), "{gap}");
            assert!(finalize(prot, stripe.end().checked_sub(8).unwrap(), 16).is_err());
            assert!(finalize(prot, stripe.end(), 8).is_err());
        }
    }
    let code = stripes.iter().find(|(prot, _)| *prot == MemProt::RX).unwrap().1;
    assert!(finalize(MemProt::RX.union(MemProt::WRITE), code.start(), 16).is_err());
    process.end();
}
