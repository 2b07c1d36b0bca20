//! One suite for every memory mapper: in-process and over shared memory without a name, in stripes and page by page; over
//! POSIX shared memory; and over messages. All but those in-process against an executor in a process of its own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::Process;
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_mem::{
    Error, FinalizeRequest, FinalizeSegment, InProcessMapper, MemoryMapper, RemoteMapper, SharedMemoryMapper,
};
use farlink_rpc::Executor;
use farlink_wire::functions::{READ_BUFFERS, RUN_AS_VOID_FUNCTION, WRITE_BUFFERS};
use farlink_wire::msg::{ActionPair, WrapperFunctionCall};

const PAGE: u64 = 4096;

/// Bytes reserved in a test.
const RESERVATION: u64 = 64 * PAGE;

/// `mov $42, %eax; ret`.
const RETURN_42: [u8; 6] = [0xb8, 42, 0, 0, 0, 0xc3];

/// A wrapper function that appends its argument byte to a log and succeeds. The log is a position byte, then entries;
/// its address comes after the argument byte.
///
/// ```text
/// mov 1(%rdi), %rdx      the log
/// movzbl (%rdx), %ecx    its position
/// mov (%rdi), %al
/// mov %al, 1(%rdx,%rcx)
/// incb (%rdx)
/// xor %eax, %eax         one byte, 0: an SPS error that is none
/// mov $1, %edx
/// ret
/// ```
const LOG: [u8; 24] = [
    0x48, 0x8b, 0x57, 0x01, 0x0f, 0xb6, 0x0a, 0x8a, 0x07, 0x88, 0x44, 0x0a, 0x01, 0xfe, 0x02, 0x31, 0xc0, 0xba, 1, 0,
    0, 0, 0xc3, 0x90,
];

/// A wrapper function that returns no bytes, which is not a result: `xor %eax, %eax; xor %edx, %edx; ret`.
const FAIL: [u8; 5] = [0x31, 0xc0, 0x31, 0xd2, 0xc3];

/// A mapper and the executor whose memory it maps.
struct Subject<'a> {
    name: &'a str,
    mapper: &'a dyn MemoryMapper,
    executor: &'a Executor,
}

impl Subject<'_> {
    fn reserve(&self) -> ExecutorAddrRange {
        let range = self.mapper.reserve(RESERVATION).wait().unwrap();
        assert!(range.len() >= RESERVATION && range.start().as_u64().is_multiple_of(PAGE), "{}", self.name);
        range
    }

    fn is_striped(&self) -> bool {
        self.name.ends_with("striped")
    }

    /// An address that a segment of this protection can begin at, whole pages after the first of them.
    fn at(&self, base: ExecutorAddrRange, prot: MemProt, page: u64) -> ExecutorAddr {
        let stripes = self.mapper.stripes(base.start());
        assert_eq!(!stripes.is_empty(), self.is_striped());
        let stripe = stripes.iter().find(|stripe| stripe.0 == prot).map_or(base, |stripe| stripe.1);
        stripe.start().checked_add(page * PAGE).unwrap()
    }

    /// Ends an allocation with one segment, and makes its memory ready for another.
    fn deallocate(&self, key: ExecutorAddr, prot: MemProt, len: u64) {
        self.mapper.deallocate(vec![key]).wait().unwrap();
        if self.is_striped() {
            self.mapper.recycle(&[(AllocGroup::standard(prot), ExecutorAddrRange::from_len(key, len).unwrap())]);
        }
    }

    fn segment(&self, at: ExecutorAddr, prot: MemProt, content: &[u8], size: u64) -> FinalizeSegment {
        let range = ExecutorAddrRange::from_len(at, size).unwrap();
        let working = self.mapper.prepare(ExecutorAddrRange::from_len(at, content.len() as u64).unwrap()).unwrap();
        working.write(0, content).unwrap();
        let content_bytes = content.len() as u64;
        FinalizeSegment { group: AllocGroup::standard(prot), range, content_bytes, working }
    }

    fn finalize(&self, request: FinalizeRequest) -> Result<ExecutorAddr, Error> {
        self.mapper.finalize(vec![request]).wait().map(|keys| keys[0])
    }

    /// Finalizes one segment.
    fn place(&self, base: ExecutorAddrRange, page: u64, prot: MemProt, content: &[u8], size: u64) -> ExecutorAddr {
        let segments = vec![self.segment(self.at(base, prot, page), prot, content, size)];
        self.finalize(FinalizeRequest { reservation: base.start(), segments, actions: Vec::new() }).unwrap()
    }

    fn read(&self, at: ExecutorAddr, len: u64) -> Vec<u8> {
        let read = self.executor.bind(READ_BUFFERS).unwrap();
        let range = ExecutorAddrRange::from_len(at, len).unwrap();
        read.call(&(vec![range],)).wait().unwrap().remove(0)
    }

    fn can_write(&self, at: ExecutorAddr) -> bool {
        let write = self.executor.bind(WRITE_BUFFERS).unwrap();
        write.call(&(vec![(at, vec![0x77u8].into())],)).wait().is_ok()
    }

    fn call(&self, at: ExecutorAddr) -> i32 {
        self.executor.bind(RUN_AS_VOID_FUNCTION).unwrap().call(&(at,)).wait().unwrap()
    }
}

/// Runs `test` for each mapper.
fn for_each_mapper(test: impl Fn(&Subject<'_>)) {
    let local = farlink_executor::local();
    test(&Subject { name: "in-process, striped", mapper: &InProcessMapper::new(), executor: &local });
    test(&Subject { name: "in-process, paged", mapper: &InProcessMapper::page_by_page(), executor: &local });
    for name in ["shared, striped", "shared, paged", "posix, striped", "posix, paged", "remote"] {
        let process = Process::spawn();
        let executor = &process.executor;
        let mapper: Box<dyn MemoryMapper> = match name {
            "shared, striped" => Box::new(SharedMemoryMapper::new(executor).unwrap()),
            "shared, paged" => Box::new(SharedMemoryMapper::page_by_page(executor).unwrap()),
            "posix, striped" => Box::new(SharedMemoryMapper::posix(executor).unwrap()),
            "posix, paged" => Box::new(SharedMemoryMapper::posix_page_by_page(executor).unwrap()),
            _ => Box::new(RemoteMapper::new(executor).unwrap()),
        };
        test(&Subject { name, mapper: &*mapper, executor });
        process.end();
    }
}

/// What is written before finalize is there after it, what was not is zero, and code runs.
#[test]
fn content_arrives_and_runs() {
    for_each_mapper(|subject| {
        let base = subject.reserve();
        let data = subject.place(base, 0, MemProt::RW, b"content", 3 * PAGE);
        assert_eq!(subject.read(data, 7), b"content");
        assert_eq!(subject.read(data.checked_add(7).unwrap(), 3 * PAGE - 7), vec![0; 3 * PAGE as usize - 7]);
        let code = subject.place(base, 4, MemProt::RX, &RETURN_42, RETURN_42.len() as u64);
        assert_eq!(subject.call(code), 42);
        // A zero-sized content, and a segment at the very end of the reservation.
        let stripes = subject.mapper.stripes(base.start());
        let pages = stripes.iter().find(|stripe| stripe.0 == MemProt::READ).map_or(base.len(), |stripe| stripe.1.len());
        let last = pages / PAGE - 1;
        let empty = subject.place(base, last, MemProt::READ, b"", PAGE);
        assert_eq!(subject.read(empty, PAGE), vec![0; PAGE as usize]);
        subject.mapper.deallocate(vec![data, code, empty]).wait().unwrap();
        subject.mapper.release(vec![base.start()]).wait().unwrap();
    });
}

/// Finalized protections hold. Deallocated memory is zero again, and code that is gone traps in stripes; without them it
/// is writable again.
#[test]
fn protections_hold_until_deallocate() {
    for_each_mapper(|subject| {
        let base = subject.reserve();
        for (prot, writable) in [(MemProt::READ, false), (MemProt::RX, false), (MemProt::RW, true)] {
            let at = subject.at(base, prot, 0);
            let key = subject.place(base, 0, prot, &RETURN_42, 2 * PAGE);
            assert_eq!(subject.can_write(at), writable, "{} {prot}", subject.name);
            subject.deallocate(key, prot, 2 * PAGE);
            if subject.is_striped() {
                let expected = if prot == MemProt::RX { 0xcc } else { 0 };
                assert_eq!(subject.read(at, 2 * PAGE), vec![expected; 2 * PAGE as usize], "{} {prot}", subject.name);
                continue;
            }
            assert!(subject.can_write(at), "{}", subject.name);
            assert_eq!(subject.read(at, 2), [0x77, 0], "{}: deallocated memory is zero", subject.name);
            // The test's own byte is not part of the life-cycle: another round has to take it away.
            let key = subject.place(base, 0, MemProt::RW, b"\0", PAGE);
            subject.mapper.deallocate(vec![key]).wait().unwrap();
        }
        subject.mapper.release(vec![base.start()]).wait().unwrap();
    });
}

/// The log of actions in executor memory, and the functions that write it.
struct Actions {
    log: ExecutorAddr,
    append: ExecutorAddr,
    fail: ExecutorAddr,
}

impl Actions {
    fn new(subject: &Subject<'_>, base: ExecutorAddrRange) -> Self {
        let log = subject.place(base, 0, MemProt::RW, b"", PAGE);
        let code = [&LOG[..], &FAIL].concat();
        let append = subject.place(base, 1, MemProt::RX, &code, PAGE);
        Self { log, append, fail: append.checked_add(LOG.len() as u64).unwrap() }
    }

    fn call(&self, entry: u8) -> Option<WrapperFunctionCall> {
        Some(WrapperFunctionCall::new(self.append, &(entry, self.log)))
    }

    fn pair(&self, finalize: u8, dealloc: u8) -> ActionPair {
        ActionPair { finalize: self.call(finalize), dealloc: self.call(dealloc) }
    }

    fn failing(&self, dealloc: u8) -> ActionPair {
        ActionPair { finalize: Some(WrapperFunctionCall::new(self.fail, &())), dealloc: self.call(dealloc) }
    }

    fn entries(&self, subject: &Subject<'_>) -> Vec<u8> {
        let bytes = subject.read(self.log, 100);
        bytes[1..1 + usize::from(bytes[0])].to_vec()
    }
}

/// Finalize actions run in order, dealloc actions in reverse, those of the last key first; a pair may lack either.
#[test]
fn actions_run_in_order() {
    for_each_mapper(|subject| {
        let base = subject.reserve();
        let actions = Actions::new(subject, base);
        let request = |page: u64, actions| {
            let at = subject.at(base, MemProt::READ, page);
            let segments = vec![subject.segment(at, MemProt::READ, b"x", 1)];
            FinalizeRequest { reservation: base.start(), segments, actions }
        };
        let only_dealloc = ActionPair { finalize: None, dealloc: actions.call(23) };
        let first = request(4, vec![actions.pair(10, 20), actions.pair(11, 21), only_dealloc]);
        let second = request(5, vec![actions.pair(12, 22), ActionPair { finalize: actions.call(13), dealloc: None }]);
        let keys = subject.mapper.finalize(vec![first, second]).wait().unwrap();
        assert_eq!(actions.entries(subject), [10, 11, 12, 13], "{}", subject.name);
        subject.mapper.deallocate(keys).wait().unwrap();
        assert_eq!(actions.entries(subject), [10, 11, 12, 13, 22, 23, 21, 20], "{}", subject.name);
    });
}

/// When an action fails, what ran before it is undone, its own dealloc is not run, nothing of the batch is recorded, and
/// the ranges can be finalized again, zero.
#[test]
fn failure_is_undone() {
    for_each_mapper(|subject| {
        let base = subject.reserve();
        let actions = Actions::new(subject, base);
        let at = |page: u64| subject.at(base, MemProt::READ, page);
        let request = |page, actions| {
            let segments = vec![subject.segment(at(page), MemProt::READ, b"gone", 4)];
            FinalizeRequest { reservation: base.start(), segments, actions }
        };
        let batch =
            vec![request(4, vec![actions.pair(1, 101)]), request(5, vec![actions.pair(2, 102), actions.failing(103)])];
        let error = subject.mapper.finalize(batch).wait().unwrap_err().to_string();
        assert!(error.contains("finalize action 2 of 2"), "{}: {error}", subject.name);
        assert_eq!(actions.entries(subject), [1, 2, 102, 101], "{}", subject.name);
        for page in [4, 5] {
            assert_eq!(subject.read(at(page), 4), [0; 4], "{}", subject.name);
            assert!(subject.mapper.deallocate(vec![at(page)]).wait().is_err(), "{}", subject.name);
            subject.place(base, page, MemProt::READ, b"again", PAGE);
            assert_eq!(subject.read(at(page), 5), b"again");
        }
    });
}

/// A dealloc action that fails is reported; the others run and the memory comes back.
#[test]
fn failing_dealloc_still_frees() {
    for_each_mapper(|subject| {
        let base = subject.reserve();
        let actions = Actions::new(subject, base);
        let fails = ActionPair { finalize: None, dealloc: Some(WrapperFunctionCall::new(actions.fail, &())) };
        let at = subject.at(base, MemProt::READ, 4);
        let segments = vec![subject.segment(at, MemProt::READ, b"x", 1)];
        let pairs = vec![actions.pair(1, 2), fails, actions.pair(3, 4)];
        let key = subject.finalize(FinalizeRequest { reservation: base.start(), segments, actions: pairs }).unwrap();
        let error = subject.mapper.deallocate(vec![key]).wait().unwrap_err().to_string();
        assert!(error.contains("dealloc action 2 of 3"), "{}: {error}", subject.name);
        assert_eq!(actions.entries(subject), [1, 3, 4, 2], "{}", subject.name);
        subject.place(base, 4, MemProt::READ, b"again", PAGE);
    });
}

/// Requests that cannot be are errors and change nothing.
#[test]
fn bad_requests_change_nothing() {
    for_each_mapper(|subject| {
        let name = subject.name;
        for bytes in [0, 1 << 60, u64::MAX] {
            assert!(subject.mapper.reserve(bytes).wait().is_err(), "{name} {bytes:#x}");
        }
        let (base, other) = (subject.reserve(), subject.reserve());
        let key = subject.place(base, 1, MemProt::READ, b"live", 2 * PAGE);
        let at = |offset: u64| subject.at(base, MemProt::READ, 0).checked_add(offset).unwrap();
        let range = |start, len| ExecutorAddrRange::from_len(start, len).unwrap();
        // Working memory outside any reservation, or across the end of one.
        assert!(subject.mapper.prepare(range(ExecutorAddr::new(PAGE), 1)).is_err(), "{name}");
        assert!(subject.mapper.prepare(range(base.end().checked_sub(1).unwrap(), 2)).is_err(), "{name}");
        let working = subject.mapper.prepare(range(at(8 * PAGE), 8)).unwrap();
        let bad = |reservation: ExecutorAddr, start: ExecutorAddr, len: u64| {
            let group = AllocGroup::standard(MemProt::READ);
            let segment =
                FinalizeSegment { group, range: range(start, len), content_bytes: 0, working: working.clone() };
            let request = FinalizeRequest { reservation, segments: vec![segment], actions: Vec::new() };
            assert!(subject.finalize(request).is_err(), "{name}: {start} {len:#x}");
        };
        bad(base.start(), at(PAGE), 8);
        if subject.is_striped() {
            // Across the end of a stripe, and in one with another protection.
            bad(base.start(), at(base.len() / 4 - 2 * PAGE), PAGE + 1);
            bad(base.start(), subject.at(base, MemProt::RW, 0), 8);
            bad(base.start(), subject.at(base, MemProt::RX, 0), 8);
        } else {
            bad(base.start(), at(1), 8);
            bad(base.start(), at(0), 2 * PAGE);
            bad(base.start(), at(2 * PAGE), 8);
        }
        bad(base.start(), base.end().checked_sub(PAGE).unwrap(), PAGE + 1);
        bad(base.start(), ExecutorAddr::new(PAGE), 8);
        let segment = || subject.segment(at(8 * PAGE), MemProt::READ, b"twice", 8);
        let segments = vec![segment(), segment()];
        let twice = FinalizeRequest { reservation: base.start(), segments, actions: Vec::new() };
        assert!(subject.finalize(twice).is_err(), "{name}");
        if name != "remote" {
            bad(other.start(), at(8 * PAGE), 8);
            bad(at(PAGE), at(8 * PAGE), 8);
        }
        let empty = FinalizeRequest { reservation: base.start(), segments: Vec::new(), actions: Vec::new() };
        assert!(subject.finalize(empty).is_err(), "{name}");
        for keys in [vec![at(0)], vec![key, key], vec![key, at(0)], vec![ExecutorAddr::NULL]] {
            assert!(subject.mapper.deallocate(keys).wait().is_err(), "{name}");
        }
        assert!(subject.mapper.release(vec![at(PAGE)]).wait().is_err(), "{name}");
        assert_eq!(subject.read(key, 4), b"live", "{name}");
        subject.mapper.deallocate(vec![key]).wait().unwrap();
        assert!(subject.mapper.deallocate(vec![key]).wait().is_err(), "{name}");
        subject.mapper.release(vec![base.start(), other.start()]).wait().unwrap();
        assert!(subject.mapper.release(vec![base.start()]).wait().is_err(), "{name}");
    });
}

/// Releasing a reservation deallocates what is left in it, the newest first.
#[test]
fn release_with_live_allocations() {
    for_each_mapper(|subject| {
        let (logs, base) = (subject.reserve(), subject.reserve());
        let actions = Actions::new(subject, logs);
        for (page, number) in [(3, 1), (0, 2), (5, 3)] {
            let segments = vec![subject.segment(subject.at(base, MemProt::READ, page), MemProt::READ, b"x", 1)];
            let pairs = vec![ActionPair { finalize: None, dealloc: actions.call(number) }];
            let request = FinalizeRequest { reservation: base.start(), segments, actions: pairs };
            subject.finalize(request).unwrap();
        }
        subject.mapper.release(vec![base.start()]).wait().unwrap();
        assert_eq!(actions.entries(subject), [3, 2, 1], "{}", subject.name);
        assert!(subject.mapper.prepare(base).is_err(), "{}", subject.name);
    });
}

/// The end of the session runs what is left, too: a program's output shows it.
#[test]
fn end_of_session_runs_dealloc_actions() {
    let process = Process::spawn();
    let mapper = SharedMemoryMapper::page_by_page(&process.executor).unwrap();
    let subject = Subject { name: "shared, paged", mapper: &mapper, executor: &process.executor };
    let base = subject.reserve();
    let actions = Actions::new(&subject, base);
    let at = base.start().checked_add(4 * PAGE).unwrap();
    let segments = vec![subject.segment(at, MemProt::READ, b"x", 1)];
    let pairs = vec![actions.pair(1, 2)];
    subject.finalize(FinalizeRequest { reservation: base.start(), segments, actions: pairs }).unwrap();
    // The log is shared memory, which this process still sees when the executor has gone.
    let view = mapper.prepare(ExecutorAddrRange::from_len(actions.log, 3).unwrap()).unwrap();
    process.end();
    let mut log = [0; 3];
    view.read(0, &mut log).unwrap();
    assert_eq!(log, [2, 1, 2]);
}
